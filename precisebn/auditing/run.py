"""audit: all checks over one model."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from precisebn.auditing.check import Check
from precisebn.auditing.checks import CHECKS
from precisebn.auditing.finding import SEVERITIES, Finding
from precisebn.auditing.optimizers import Optimizers, checked_optimizers
from precisebn.auditing.report import AuditReport
from precisebn.auditing.subject import LossFn, Subject, Unobservable
from precisebn.errors import InputError
from precisebn.models.batches import ForwardFn

__all__ = ["audit", "choose", "run_checks"]


def audit(
    model: nn.Module,
    batch: Any = None,
    *,
    optimizer: Optimizers = None,
    loss: LossFn | None = None,
    loader: Iterable[Any] | None = None,
    other: nn.Module | None = None,
    num_steps: int | None = None,
    forward: ForwardFn | None = None,
    only: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
) -> AuditReport:
    """Look for mistakes with BatchNorm, its statistics and its training, before they cost a training run.

    The model alone shows many; each argument shows more, and checks that miss theirs are listed as not run. Model,
    optimizer and random generators are left as they were, bit for bit. docs/audit.md has all checks. No other thread
    may run the model meanwhile, not in eval mode either: the mode that it trains in is one for all threads, so that
    such a forward would move the running statistics, maybe after they have been put back.

    Args:
        model: the model, in the mode that it is about to run in.
        batch: a mini-batch as in training, on the model's device.
        optimizer: what trains it; several, where several do.
        loss: ``loss(output, batch)``, a scalar; by default the output's own ``loss``, or the mean of its squares.
        loader: mini-batches as in training.
        other: a model that should share nothing with this one. (For a copy there is :func:`check_copy`.)
        num_steps: optimizer steps of the training run.
        forward: ``forward(model, batch)``, which gives the output; by default as for :func:`update_bn_stats`.
        only: codes, or patterns over codes (``"PBN1*"``), of the checks to run; all by default.
        ignore: the same; what not to run.

    Returns:
        The findings, gravest first, and what was not run. ``print(report)``, ``report.raise_if("error")``.

    Raises:
        InputError: an argument is not what it has to be; a pattern that no code matches; the model is being
            recalibrated, or in a block of :func:`precisebn.accumulate_statistics`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False))
        >>> _ = model[1].requires_grad_(False)
        >>> [one.code for one in audit(model, only="PBN1*")]
        ['PBN101']
    """
    for name, module in {"model": model, "other": other}.items():
        if not isinstance(module, nn.Module) and (module is not None or name == "model"):
            raise InputError(f"{name} must be a module, not {type(module).__name__}")
    if other is model:
        raise InputError("other= is the model itself, pass another one, or leave it out")
    if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1):
        raise InputError(f"num_steps={num_steps!r} must be a whole number, 1 or more")
    for name, function in {"loss": loss, "forward": forward}.items():
        if function is not None and not callable(function):
            raise InputError(f"{name} must be a function, not {type(function).__name__}")
    subject = Subject(
        model, batch, optimizer=checked_optimizers("optimizer", optimizer), loss=loss, loader=loader, other=other,
        num_steps=num_steps, forward=forward,
    )  # fmt: skip
    return run_checks(choose(CHECKS, only, ignore), subject)


def choose(
    checks: Sequence[Check], only: str | Iterable[str] | None, ignore: str | Iterable[str] | None
) -> list[Check]:
    """The checks that were asked for.

    Raises:
        InputError: a pattern that matches no code, with the code that comes near it.
    """
    codes = [one.code for one in checks]
    wanted = set(codes) if only is None else set(_matching("only", only, codes))
    left_out = set() if ignore is None else set(_matching("ignore", ignore, codes))
    return [one for one in checks if one.code in wanted - left_out]


def _matching(argument: str, patterns: str | Iterable[str], codes: Sequence[str]) -> Iterator[str]:
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    if argument == "only" and not several:
        raise InputError("only= is empty, so that nothing would be looked for; leave it out to run every check")
    for pattern in several:
        if not isinstance(pattern, str):
            raise InputError(f"{argument}= takes codes and patterns over them, not {type(pattern).__name__}")
        matched = [code for code in codes if fnmatchcase(code, pattern.upper())]
        if not matched:
            near = get_close_matches(pattern.upper(), codes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they go from {min(codes)} to {max(codes)}"
            raise InputError(f"{argument}={pattern!r} matches the code of no check; {hint}")
        yield from matched


def run_checks(checks: Iterable[Check], subject: Subject) -> AuditReport:
    """Run some checks over a subject, and put all that is found into a report."""
    subject.check_free()
    findings: list[Finding] = []
    not_run: dict[str, str] = {}
    passed: list[str] = []
    for one in checks:
        missing = [f"{subject.argument_names.get(name, name)}=" for name in one.needs if not subject.has(name)]
        if missing:
            not_run[one.code] = f"needs {' and '.join(missing)}"
            continue
        try:
            found = one.findings(subject)
        except Unobservable as error:
            not_run[one.code] = str(error)
            continue
        findings += found
        if not found:
            passed.append(one.code)
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))  # stable: by code where alike
    return AuditReport(tuple(findings), not_run, tuple(passed))
