"""check_copy: whether a copy of a model, and of its optimizer, is one, and stands on its own.

``copy.deepcopy`` does not follow closures, a deep copy of an optimizer by itself trains nobody, and models that were
built around one part, or loaded with ``assign=True``, have memory in common.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precisebn.auditing.check import Check, Problem, check
from precisebn.auditing.checks import optimizer as optimizer_checks
from precisebn.auditing.checks import sharing
from precisebn.auditing.generators import generators_in, state_of
from precisebn.auditing.memory import overlapping
from precisebn.auditing.optimizers import Optimizers, checked_optimizers, optimizers_of
from precisebn.auditing.reach import attributes, hooks, objects_held
from precisebn.auditing.report import AuditReport
from precisebn.auditing.run import choose, run_checks
from precisebn.auditing.subject import Subject
from precisebn.auditing.tensors import parameters_and_buffers_of
from precisebn.distributed import is_sharded
from precisebn.errors import InputError
from precisebn.models.tensor_pictures import same_bits

__all__ = ["COPY_CHECKS", "check_copy"]


def check_copy(
    model: nn.Module,
    copy: nn.Module,
    *,
    optimizer: Optimizers = None,
    copy_optimizer: Optimizers = None,
    only: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
) -> AuditReport:
    """Look for what a copy of a model still has in common with it, and for what differs.

    Nothing may be shared: memory of parameters and buffers (views included), modules, hooks and patched methods that
    are bound to the original, random generators, lists in attributes; and everything is to be alike: names, shapes,
    dtypes, bits, modes and what is trainable. An optimizer of the copy is to hold the copy's parameters, with the
    settings and the state of the original's.

    Args:
        model: the original.
        copy: the copy; layers in findings are its.
        optimizer: of the original.
        copy_optimizer: of the copy.
        only: codes of checks to run, or patterns over them.
        ignore: the same; what not to run (``"PBN51*"`` once the two have been trained apart).

    Returns:
        What was found; ``check_copy(...).raise_if("warning")`` for a test.

    Raises:
        InputError: an argument is not what it has to be; the copy is the model itself; one of the two is being
            recalibrated, or in a block of :func:`precisebn.accumulate_statistics`.

    Example:
        >>> import copy, torch
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> len(check_copy(model, copy.deepcopy(model)))
        0
        >>> twin, its_sgd = copy.deepcopy(model), copy.deepcopy(sgd)
        >>> [one.code for one in check_copy(model, twin, optimizer=sgd, copy_optimizer=its_sgd)]
        ['PBN301']
        >>> twin, its_sgd = copy.deepcopy((model, sgd))  # together
        >>> len(check_copy(model, twin, optimizer=sgd, copy_optimizer=its_sgd))
        0
    """
    for name, module in {"model": model, "copy": copy}.items():
        if not isinstance(module, nn.Module):
            raise InputError(f"{name} must be a module, not {type(module).__name__}")
    if copy is model:
        raise InputError("copy is the model itself: `copy = model` copies nothing, copy.deepcopy(model) does")
    subject = _Copy(
        copy, other=model,
        optimizer=checked_optimizers("copy_optimizer", copy_optimizer),
        other_optimizer=checked_optimizers("optimizer", optimizer),
    )  # fmt: skip
    return run_checks(choose(COPY_CHECKS, only, ignore), subject)


class _Copy(Subject):
    """A copy, with the original as the other model, and the optimizers of both."""

    argument_names: ClassVar = {"optimizer": "copy_optimizer", "other_optimizer": "optimizer"}

    def __init__(self, model: nn.Module, *, other_optimizer: Any, **given: Any) -> None:
        super().__init__(model, **given)
        self.other_optimizer = other_optimizer


@check(
    "PBN511", "warning", "a copy with other parts or values", needs=("other",),
    source="https://docs.python.org/3/library/copy.html",
)  # fmt: skip
def different_values(subject: Subject) -> Iterator[Problem]:
    """Classes, hooks; names, shapes, dtypes and bits of parameters and buffers, also of those in no state dict."""
    original = subject.other_modules
    yield from _different_parts(subject.modules, original)
    own, theirs = parameters_and_buffers_of(subject.modules), parameters_and_buffers_of(original)
    if lacking := own.keys() ^ theirs.keys():
        yield Problem(
            "They are in one of the two models alone.",
            "copy.deepcopy(model) makes a copy with the same parts.",
            [name for name in {**theirs, **own} if name in lacking],
        )
    differing = [name for name, tensor in own.items() if name in theirs and not _alike(tensor, theirs[name])]
    if differing:
        yield Problem(
            "Their values, shapes or dtypes are not those of the original.",
            "copy.load_state_dict(model.state_dict()) makes them so.",
            differing,
        )


@check(
    "PBN512", "warning", "a copy in another mode", needs=("other",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.train",
)  # fmt: skip
def different_modes(subject: Subject) -> Iterator[Problem]:
    """Training and eval mode, and which parameters require gradients: a state dict has neither."""
    original = subject.other_modules
    modes = [name for name, m in subject.modules.items() if name in original and m.training != original[name].training]
    if modes:
        yield Problem(
            "They are in training mode in one of the two models and in eval mode in the other.",
            "copy.train(model.training), or copy.deepcopy(model), which keeps the mode of each part.",
            modes,
        )
    own, theirs = parameters_and_buffers_of(subject.modules), parameters_and_buffers_of(original)
    trained = [name for name, t in own.items() if name in theirs and t.requires_grad != theirs[name].requires_grad]
    if trained:
        yield Problem(
            "They require gradients in one of the two models and not in the other.",
            "freeze(copy, ...) what is frozen in the original, or copy.deepcopy(model).",
            trained,
        )


@check(
    "PBN513", "error", "an optimizer that shares its state with another", needs=("optimizer", "other_optimizer"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.load_state_dict.html",
)  # fmt: skip
def shared_optimizer_state(subject: Subject) -> Iterator[Problem]:
    """``load_state_dict(other.state_dict())`` takes tensors over where dtype and device are right already."""
    assert isinstance(subject, _Copy)
    ours, theirs = optimizers_of(subject.optimizer), optimizers_of(subject.other_optimizer)
    if any(one is another for one in ours for another in theirs):
        yield Problem(
            "The optimizer of the copy is that of the original.",
            "copy.deepcopy((model, optimizer)) copies both together.",
        )
        return
    shared = overlapping(_optimizer_tensors(ours), _optimizer_tensors(theirs))
    if shared:
        yield Problem(
            "These entries of the optimizer's state (parameter by parameter) lie in the memory of the original's.",
            "optimizer.load_state_dict(copy.deepcopy(original.state_dict())), or copy.deepcopy((model, optimizer)).",
            list(shared),
        )


@check(
    "PBN514", "warning", "an optimizer with other settings or state than the original's",
    needs=("optimizer", "other_optimizer"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.state_dict.html",
)  # fmt: skip
def different_optimizer_state(subject: Subject) -> Iterator[Problem]:
    """A new optimizer has no momentum, and goes another way than the one that it stands for."""
    assert isinstance(subject, _Copy)
    both = (subject.optimizer, subject.other_optimizer)
    ours, theirs = ([one.state_dict() for one in optimizers_of(of)] for of in both)
    if not _equal(ours, theirs):
        yield Problem(
            "Its settings or its state (momentum, counts of steps) are not those of the original's.",
            "optimizer.load_state_dict(copy.deepcopy(original.state_dict())).",
        )


COPY_CHECKS: tuple[Check, ...] = (
    optimizer_checks.optimizer_of_another_model,
    optimizer_checks.parameters_that_no_optimizer_holds,
    optimizer_checks.parameters_held_twice,
    optimizer_checks.memory_of_the_model_that_is_no_parameter,
    sharing.shared_parameters,
    sharing.shared_buffers,
    sharing.shared_modules,
    sharing.shared_hooks,
    sharing.bound_to_the_other,
    sharing.shared_generators,
    sharing.shared_attributes,
    different_values,
    different_modes,
    shared_optimizer_state,
    different_optimizer_state,
)
"""What :func:`check_copy` runs, in the order of codes."""


def _different_parts(modules: Mapping[str, nn.Module], original: Mapping[str, nn.Module]) -> Iterator[Problem]:
    other_class = [name for name, m in modules.items() if name in original and type(m) is not type(original[name])]
    if other_class:
        yield Problem(
            "They are of another class than in the original.",
            "copy.deepcopy(model); or convert the copy as the original was converted.",
            other_class,
        )
    own, theirs = (Counter(name for name, _ in hooks(of)) for of in (modules, original))
    if differing := [name for name in {**theirs, **own} if own[name] != theirs[name]]:
        yield Problem(
            "One of the two models has hooks there that the other has not: a state dict holds none.",
            "copy.deepcopy(model), or register them with the copy.",
            differing,
        )
    states, others = _generator_states(modules), _generator_states(original)
    if differing := [name for name in states if name in others and states[name] != others[name]]:
        yield Problem(
            "Their random generators are not in the state of the original's, and draw other numbers.",
            "copy.generator.set_state(model.generator.get_state()), or copy.deepcopy(model).",
            differing,
        )


def _generator_states(modules: Mapping[str, nn.Module]) -> dict[str, list[object]]:
    """The states of random generators in attributes, by name; all in Python's own values."""
    return {name: found for name, value in attributes(modules) if (found := list(map(state_of, generators_in(value))))}


def _alike(a: Tensor, b: Tensor) -> bool:
    if is_lazy(a) or is_lazy(b):
        return type(a) is type(b)
    if is_sharded(a) and is_sharded(b):
        a, b = a.to_local(), b.to_local()  # type: ignore[attr-defined]  # DTensors
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or b.is_meta or same_bits(a.cpu(), b.cpu()))


def _optimizer_tensors(optimizers: Iterable[Any]) -> dict[str, Tensor]:
    """Tensors in the state of optimizers, by the number of the parameter and the name of the entry."""
    found: dict[str, Tensor] = {}
    for one in optimizers:
        held = (p for group in one.param_groups for p in group["params"])
        number = {id(p): i for i, p in enumerate(held)}
        for p, entries in one.state.items():
            for key, value in entries.items() if isinstance(entries, Mapping) else ():
                for held in objects_held(value):
                    if isinstance(held, Tensor):
                        found[f"{number.get(id(p), '?')}.{key}"] = held
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _alike(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)
