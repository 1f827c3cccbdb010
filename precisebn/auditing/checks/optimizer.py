"""Optimizer: that what it steps is what the model trains."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from precisebn._reports import counted
from precisebn.auditing.check import Problem, check
from precisebn.auditing.memory import overlapping
from precisebn.auditing.optimizers import optimizers_of
from precisebn.auditing.subject import Subject
from precisebn.auditing.tensors import parameters_and_buffers_of, parameters_of, parameters_once

__all__ = [
    "frozen_parameters_in_the_optimizer",
    "memory_of_the_model_that_is_no_parameter",
    "names_held",
    "optimizer_of_another_model",
    "parameters_held_twice",
    "parameters_that_no_optimizer_holds",
]


@check(
    "PBN301", "error", "an optimizer of another model", needs=("optimizer",),
    source="https://docs.pytorch.org/docs/stable/optim.html",
)  # fmt: skip
def optimizer_of_another_model(subject: Subject) -> Iterator[Problem]:
    """A deep copy of an optimizer holds copies of parameters, a shallow one the old model's, and neither the new one's.

    The same comes of making the optimizer before layers are replaced. Parameters of a loss beside the model's own are
    nothing of the kind: nothing of the model is missing.
    """
    held, foreign, missing = _compared(subject)
    if not foreign:
        return
    stand_ins = _alike(foreign, missing)
    if len(foreign) == len(held) or stand_ins:
        whose = _of_the_other_model(subject, foreign)
        yield Problem(
            f"Of {counted(len(held), 'parameter')} in the optimizer, {len(foreign)} are not of this model{whose}; "
            "those of this model that are named here stay as they are.",
            _anew(subject),
            stand_ins or list(missing),
        )
    else:
        yield Problem(
            f"The optimizer also steps {counted(len(foreign), 'parameter')} not of this model: of a loss, or of layers "
            "that have been replaced.",
            "Nothing, if they are meant to be trained as well; else trainable_parameters(model) has only the model's.",
            (),
            "note",
        )


@check(
    "PBN302", "warning", "trainable parameters that no optimizer holds", needs=("optimizer",),
    source="https://docs.pytorch.org/docs/stable/optim.html",
)  # fmt: skip
def parameters_that_no_optimizer_holds(subject: Subject) -> Iterator[Problem]:
    """They get gradients, and stay as they are. (Where the optimizer holds none at all, PBN301 says so.)"""
    held, foreign, missing = _compared(subject)
    if missing and len(foreign) < len(held) and not _alike(foreign, missing):
        yield Problem(
            "They require gradients, but no optimizer steps them.",
            "Make the optimizer from trainable_parameters(model); freeze(model, ...) what is not to be trained; "
            "pass all optimizers to audit, if there are several.",
            list(missing),
        )


@check(
    "PBN303", "note", "frozen parameters in the optimizer", needs=("optimizer",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html",
)  # fmt: skip
def frozen_parameters_in_the_optimizer(subject: Subject) -> Iterator[Problem]:
    """An optimizer passes over parameters without a gradient, and steps those with one, though it be zero.

    With a gradient of zeros, weight decay and momentum go on moving a parameter that was frozen after a backward.
    """
    own = parameters_once(subject.modules)
    held = {id(p) for p in _held(subject)}
    frozen = {name: p for name, p in own.values() if not p.requires_grad and id(p) in held}
    moving = [name for name, p in frozen.items() if p.grad is not None]
    if moving:
        yield Problem(
            "They are frozen, but have gradients from before: weight decay and momentum move them at the next step.",
            "optimizer.zero_grad(set_to_none=True) before the next step; freeze(model, ...) does so by itself.",
            moving,
            "warning",
        )
    elif frozen:
        yield Problem(
            "They are frozen, and the optimizer holds them: without gradients it passes over them, with its weight "
            "decay and momentum.",
            "Make the optimizer from trainable_parameters(model).",
            list(frozen),
        )


@check(
    "PBN304", "warning", "parameters that are stepped twice", needs=("optimizer",),
    source="https://github.com/pytorch/pytorch/issues/40967",
)  # fmt: skip
def parameters_held_twice(subject: Subject) -> Iterator[Problem]:
    """In several optimizers, or several times in one."""
    own = parameters_once(subject.modules)
    times = Counter(map(id, _held(subject)))
    twice = [name for name, p in own.values() if times[id(p)] > 1]
    if twice:
        yield Problem(
            "They are held more than once, and stepped more than once, with a weight decay and momentum for each.",
            "Give each parameter to one optimizer, once.",
            twice,
        )


@check(
    "PBN305", "error", "an optimizer that writes what is no parameter", needs=("optimizer",),
    source="https://docs.pytorch.org/docs/stable/optim.html",
)  # fmt: skip
def memory_of_the_model_that_is_no_parameter(subject: Subject) -> Iterator[Problem]:
    """Parameters that have become buffers since, as a frozen layer's: in the same memory, which steps still write."""
    own = parameters_once(subject.modules)
    foreign = {str(i): p for i, p in enumerate(_held(subject)) if id(p) not in own}
    written = overlapping(parameters_and_buffers_of(subject.modules), foreign)
    if written:
        yield Problem(
            "The optimizer holds tensors that are no parameters of the model, but lie in the memory of these.",
            "Make the optimizer anew from trainable_parameters(model), after layers are frozen or converted.",
            list(written),
        )


def names_held(subject: Subject) -> set[str]:
    """Names of the model's parameters that an optimizer holds; of all, where mixed precision keeps copies of them."""
    compared = _compared(subject)
    return {name for name, _ in parameters_once(subject.modules).values() if name not in compared.missing}


def _held(subject: Subject) -> list[Tensor]:
    """The parameters of all optimizers, in order; those that are held twice, twice."""
    return [p for one in optimizers_of(subject.optimizer) for group in one.param_groups for p in group["params"]]


class _Compared(NamedTuple):
    """What an optimizer holds, beside what the model trains."""

    held: list[Tensor]
    foreign: list[Tensor]
    """Held, and no parameters of the model."""
    missing: dict[str, Tensor]
    """Trainable parameters of the model that are not held, by name."""


def _compared(subject: Subject) -> _Compared:
    own = parameters_once(subject.modules)
    held = _held(subject)
    there = {id(p) for p in held}
    foreign = [p for p in held if id(p) not in own]
    missing = {name: p for name, p in own.values() if p.requires_grad and id(p) not in there}
    if _are_master_copies(foreign, missing):
        return _Compared(held, [], {})
    return _Compared(held, foreign, missing)


def _alike(foreign: list[Tensor], missing: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters that the optimizer does not hold, for each of which it holds a foreign one of its shape."""
    there = Counter((_shape(p), p.dtype) for p in foreign)
    names = []
    for name, p in missing.items():
        if there[_shape(p), p.dtype]:
            there[_shape(p), p.dtype] -= 1
            names.append(name)
    return names


def _anew(subject: Subject) -> str:
    """The call that makes the optimizer anew; and that its state goes on, where it is that of the same parameters."""
    parameters = dict(parameters_once(subject.modules).values())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for source, taken in (("trainable_parameters(model)", trained), ("model.parameters()", parameters)):
        if _takes_the_state(subject, taken):
            return (
                f"Make the optimizer anew from {source}, after copying or converting; then "
                "load_state_dict(old.state_dict())."
            )
    return (
        "Make the optimizer anew from trainable_parameters(model), after copying or converting; the state of the old "
        "one does not fit these."
    )


def _takes_the_state(subject: Subject, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the state of the optimizer, which goes by position, is that of parameters such as these, in this order.

    ``load_state_dict`` compares how many there are in a group, and no shapes: what does not fit fails in ``step()``.
    """
    optimizers = optimizers_of(subject.optimizer)
    if len(optimizers) != 1 or len(optimizers[0].param_groups) != 1:
        return False
    [group] = optimizers[0].param_groups
    if list(map(_shape, group["params"])) != list(map(_shape, parameters.values())):
        return False
    names = group.get("param_names") or _names_in_other(subject, group["params"])
    return names is None or names == list(parameters)


def _names_in_other(subject: Subject, held: list[Tensor]) -> list[str] | None:
    """What these are called in ``other``; None where it was not given, or has not all of them."""
    names = {id(p): name for name, p in parameters_of(subject.other_modules).items()}
    return [names[id(p)] for p in held] if all(id(p) in names for p in held) else None


def _are_master_copies(foreign: list[Tensor], missing: Mapping[str, Tensor]) -> bool:
    """Whether they are float32 copies of the model's parameters of half precision, which mixed precision may keep."""
    half = [p for p in missing.values() if p.dtype in (torch.float16, torch.bfloat16)]
    return (
        len(half) == len(missing) == len(foreign)
        and all(p.dtype == torch.float32 for p in foreign)
        and Counter(map(_shape, foreign)) == Counter(map(_shape, half))
    )


def _shape(parameter: Tensor) -> torch.Size | None:
    """None of a lazy one, which has none yet."""
    return None if is_lazy(parameter) else parameter.shape


def _of_the_other_model(subject: Subject, foreign: list[Tensor]) -> str:
    """How many of them are those of ``other``, in words."""
    if subject.other is None:
        return ""
    theirs = {id(p) for p in subject.other.parameters()}
    number = sum(id(p) in theirs for p in foreign)
    return f" ({number} are of the other)" if number else ""
