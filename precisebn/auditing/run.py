"""audit: all checks over one model."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from precisebn.auditing.checks import CHECKS
from precisebn.auditing.finding import SEVERITIES, Finding
from precisebn.auditing.report import AuditReport
from precisebn.auditing.subject import LossFn, Subject, Unobservable
from precisebn.models.batches import ForwardFn

__all__ = ["audit"]


def audit(
    model: nn.Module,
    batch: Any = None,
    *,
    optimizer: Optimizer | None = None,
    loss: LossFn | None = None,
    loader: Iterable[Any] | None = None,
    other: nn.Module | None = None,
    num_steps: int | None = None,
    forward: ForwardFn | None = None,
) -> AuditReport:
    """Look for mistakes with BatchNorm, its statistics and its training.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
        >>> _ = model[1].requires_grad_(False)
        >>> [one.code for one in audit(model)]
        ['PBN101']
    """
    subject = Subject(
        model, batch, optimizer=optimizer, loss=loss, loader=loader, other=other, num_steps=num_steps, forward=forward
    )
    findings: list[Finding] = []
    not_run: dict[str, str] = {}
    for one in CHECKS:
        missing = [f"{name}=" for name in one.needs if not subject.has(name)]
        if missing:
            not_run[one.code] = f"needs {' and '.join(missing)}"
            continue
        try:
            findings += one.findings(subject)
        except Unobservable as error:
            not_run[one.code] = str(error)
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    return AuditReport(tuple(findings), not_run)
