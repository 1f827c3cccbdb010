"""check_determinism: one training step, twice from one state, and where bits first part.

Two runs that should be equal and are not: shared or unseeded random state, an operator whose sums come in another order
every time, buffers that a forward in training mode has moved, data in another order. What differs at the end of a step
is everything; what tells is what differed first. So every call of a module, every gradient and all that the step leaves
behind is compared in the order in which it came ("Reproducibility",
https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from precisebn._torch import unwrapped
from precisebn.auditing.optimizers import Optimizers, checked_optimizers, optimizers_of
from precisebn.auditing.surroundings import MOST_ITEMS, ObjectsPicture, Surroundings
from precisebn.errors import InputError
from precisebn.models.checksums import checksums
from precisebn.models.in_use import check_free
from precisebn.models.interrupts import HeldBack
from precisebn.models.nested import tensors_in
from precisebn.models.selection import named_modules
from precisebn.models.tensor_pictures import bytes_of
from precisebn.models.transaction import Transaction

__all__ = ["DeterminismReport", "check_determinism"]


@dataclass(frozen=True, slots=True)
class DeterminismReport:
    """What :func:`precisebn.check_determinism` has found: ask ``report.deterministic``.

    Attributes:
        deterministic: whether both runs gave the same bits.
        compared: how many values were compared: inputs and outputs of modules, gradients, what the step left behind.
        kind: what parted first: ``"input"`` or ``"output"`` of a module, ``"order"`` of the calls, ``"gradient"``,
            ``"parameter"``, ``"buffer"``, ``"optimizer"`` (its state) or ``"result"``; empty where nothing did.
        name: qualified name of the module, parameter or buffer.
        what: one sentence of what happens.
        cause: what the cause is likely to be.
        remedy: one sentence with the call to make.
    """

    deterministic: bool
    compared: int
    kind: str = ""
    name: str = ""
    what: str = ""
    cause: str = ""
    remedy: str = ""

    def __bool__(self) -> bool:
        """Neither: a report of an audit is true where something was found, and this might be meant the other way."""
        raise TypeError("ask report.deterministic, whether both runs gave the same bits")

    def to_dict(self) -> dict[str, Any]:
        """All of it, in what JSON knows."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        if self.deterministic:
            return f"deterministic: {self.compared} values are the same bit for bit in two runs from one state"
        return "\n".join(
            [f"not deterministic: {self.what}", f"likely cause: {self.cause}", f"remedy:       {self.remedy}"]
        )


def check_determinism(
    step: Callable[[], Any],
    *,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizers = None,
    restore: Iterable[object] = (),
) -> DeterminismReport:
    """Run a training step twice from one state, and say where the two first part.

    In between, and at the end, everything is put back bit for bit: the models, gradients, optimizers, the global random
    generators of Python, NumPy and torch, and those in attributes of the models. If the two part, the step runs twice
    more under ``torch.use_deterministic_algorithms``, to tell whether that mends it. No other thread may use the models
    meanwhile.

    Args:
        step: ``step()`` does one step: forward, backward, ``optimizer.step()``, on a mini-batch that is there. What it
            returns, the loss for one, is compared too. One that takes its mini-batch from an iterator takes the next
            one the second time, which is found as a difference in the data.
        model: the model, or all models, that it runs.
        optimizer: what it steps, one or several.
        restore: whatever else keeps a state from step to step: generators, samplers, loaders, schedulers, scalers. What
            their attributes hold is put back.

    Returns:
        A report, whose ``deterministic`` says whether all bits are the same.

    Raises:
        InputError: no module or no optimizer where one has to be, or a step that cannot be called; a model is being
            recalibrated, or in a block of :func:`precisebn.accumulate_statistics`.
        Exception: whatever the step raises; all is put back before.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(8, 4)
        >>> def step():
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        >>> check_determinism(step, model=model, optimizer=optimizer).deterministic
        True
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    if not models or not all(isinstance(one, nn.Module) for one in models):
        raise InputError(f"model must be a module, or several in a list, not {type(model).__name__}")
    if not callable(step):
        raise InputError(f"step must be a function without arguments, not {type(step).__name__}")
    optimizers = optimizers_of(checked_optimizers("optimizer", optimizer))
    for one in models:
        check_free(one)
    with HeldBack() as interrupts:
        trial = _Trial(step, models, optimizers, list(restore), interrupts)
        try:
            first, second = trial.run(), trial.run()
            parted = _first_difference(first, second)
            if parted is None:
                return DeterminismReport(True, len(first))
            return _explained(parted, len(first), trial)
        finally:
            trial.put_back()


class _Event(NamedTuple):
    """Something with bits: what it is, of what, and the bits in short; of a module what class it is of."""

    kind: str
    name: str
    digest: tuple[object, ...]
    about: str = ""


class _Parted(NamedTuple):
    """Where two runs part, and the last event that they have in common."""

    event: _Event
    before: _Event | None
    same_order: bool


class _Trial:
    """A step that can be run again and again from the state that it was made in."""

    def __init__(
        self,
        step: Callable[[], Any],
        models: list[nn.Module],
        optimizers: Sequence[Any],
        restore: list[object],
        interrupts: HeldBack,
    ) -> None:
        self.step = step
        self.models = models
        self.optimizers = optimizers
        self.interrupts = interrupts
        self._before = [Surroundings(models[0], optimizers), *(Surroundings(one) for one in models[1:])]
        self._restore = ObjectsPicture(restore, tensors=True, most_items=MOST_ITEMS)

    def put_back(self) -> None:
        steps = Transaction()
        steps.on_undo(self._restore.put_back)
        for one in self._before:
            steps.on_undo(one.put_back)
        steps.undo()

    def run(self) -> list[_Event]:
        """Run it from the state that it was made in; all that happens, and what it leaves behind."""
        self.put_back()
        events: list[_Event] = []
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(_listens(model, events))
            with self.interrupts.let_through():
                result = self.step()
        for model in self.models:
            events += [_Event("parameter", name, _digest([p])) for name, p in model.named_parameters()]
            events += [_Event("buffer", name, _digest([b])) for name, b in model.named_buffers()]
        events += [
            _Event("optimizer", self._name_of(parameter), _digest(state), type(optimizer).__name__)
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
        ]
        return [*events, _Event("result", "", _digest(result))]

    def _name_of(self, parameter: Any) -> str:
        names = (name for model in self.models for name, p in model.named_parameters() if p is parameter)
        return next(names, "a parameter of another model")


@contextmanager
def _listens(model: nn.Module, events: list[_Event]) -> Iterator[None]:
    """Within this block, inputs and outputs of all modules and all gradients are noted."""

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            events.append(_Event("input", name, _digest((args, kwargs)), type(module).__name__))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            events.append(_Event("output", name, _digest(output), type(module).__name__))

        return hook

    def gradient(name: str) -> Any:
        return lambda parameter: events.append(_Event("gradient", name, _digest([parameter.grad])))

    with ExitStack() as hooks:
        for name, module in named_modules(model):
            hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after(name)).remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.is_leaf:
                hooks.callback(parameter.register_post_accumulate_grad_hook(gradient(name)).remove)
        yield


def _first_difference(first: list[_Event], second: list[_Event]) -> _Parted | None:
    before: _Event | None = None
    for one, other in zip(first, second, strict=False):
        if (one.kind, one.name) != (other.kind, other.name):
            return _Parted(one, before, same_order=False)
        if one.digest != other.digest:
            return _Parted(one, before, same_order=True)
        before = one
    if len(first) != len(second):
        return _Parted(max(first, second, key=len)[min(len(first), len(second))], before, same_order=False)
    return None


def _explained(parted: _Parted, compared: int, trial: _Trial) -> DeterminismReport:
    """What parted, and why that is likely to be."""
    event = parted.event
    kind = event.kind if parted.same_order else "order"
    operator, mended = (None, False) if kind == "order" else _with_deterministic_algorithms(trial)
    if operator or mended:
        named = f" ({operator})" if operator else ""
        cause = f"an operator without a fixed order of its sums{named}"
        remedy = "torch.use_deterministic_algorithms(True), which raises where there is no other operator."
    else:
        cause, remedy = _cause(kind, event, parted.before)
    return DeterminismReport(False, compared, kind, event.name, _what(kind, event, parted.before), cause, remedy)


def _what(kind: str, event: _Event, before: _Event | None) -> str:
    named = f"{event.name!r} ({event.about})" if event.name else f"the model ({event.about})"
    after = "" if before is None or not before.name else f", right after the {before.kind} of {before.name!r}"
    return {
        "order": f"modules and gradients come in another order, from the {event.kind} of {named} on{after}.",
        "input": f"the input of {named} is the first that differs{after}.",
        "output": f"the output of {named} is the first that differs, though its input is the same.",
        "gradient": f"the gradient of {event.name!r} is the first that differs, though the forward is the same.",
        "parameter": f"parameter {event.name!r} differs after the step, though all gradients are the same.",
        "buffer": f"buffer {event.name!r} differs after the step, though the forward is the same.",
        "optimizer": f"the state of {event.about} for {event.name!r} differs, though all gradients are the same.",
        "result": "what the step returns differs, though all that it does with the model is the same.",
    }[kind]


def _cause(kind: str, event: _Event, before: _Event | None) -> tuple[str, str]:
    """A likely cause and its remedy, where deterministic operators make no difference."""
    if kind == "input" and before is None:
        return (
            "data: the step takes another mini-batch, or draws an augmentation from a generator that is not put back",
            "let the step use a mini-batch that is there, or pass the loader, sampler or generator as restore=[...].",
        )
    if kind == "order":
        return (
            "which modules run is decided by something that is not put back: an order of a set, a clock, a generator",
            "iterate over sorted(...) and not over sets; pass the generator as restore=[...].",
        )
    if kind == "output" and "drop" in event.about.lower():
        return (
            "dropout that draws from a generator of its own, which is neither global nor an attribute of the model",
            "pass that generator as restore=[...], and seed it: generator.manual_seed(seed).",
        )
    if kind in ("parameter", "optimizer"):
        return (
            "an optimizer, scheduler or scaler that is not put back",
            "pass optimizer=, and schedulers and scalers as restore=[...].",
        )
    if kind == "buffer":
        return (
            "something besides the forward writes to it, with a state or an order of its own",
            "pause_tracking(model) around forwards that are not for training; pass what else has a state as restore=.",
        )
    return (
        "something there has a state that is neither in model=, optimizer= nor restore=: a random generator, a "
        "counter, another model",
        "pass it as model= or restore=[...], and seed its generators from one place: torch.manual_seed(seed).",
    )


def _with_deterministic_algorithms(trial: _Trial) -> tuple[str, bool]:
    """Whether deterministic operators make both runs equal, and the operator that has no such form, if torch names one.

    Returns:
        Its name, or an empty string; and whether they are equal then.
    """
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled():
        return "", False
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = trial.run(), trial.run()
        told = [str(one.message).split(_HAS_NONE)[0] for one in caught if _HAS_NONE in str(one.message)]
        return (told[0] if told else ""), _first_difference(first, second) is None
    finally:
        torch.use_deterministic_algorithms(False, warn_only=only_warns)


_HAS_NONE = " does not have a deterministic implementation"  # what torch warns of


@torch.no_grad()
def _digest(value: Any) -> tuple[object, ...]:
    """Shapes and checksums of all tensors in nested containers; of sparse ones of what they stand for, in any order."""
    tensors = [unwrapped(tensor) for tensor in tensors_in(value)]
    dense = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors]
    shapes = (tensor.shape for tensor in tensors if not tensor.is_nested)  # a jagged one has another name each time
    return (*shapes, *checksums(map(bytes_of, dense)))
