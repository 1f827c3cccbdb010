"""Which layers a recalibration is of, and why it leaves each of the others alone."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from precisebn._reports import by_reason, counted
from precisebn.distributed import is_sharded
from precisebn.errors import InputError, InsufficientDataError
from precisebn.models.batches import copied
from precisebn.models.families import is_frozen, populations_of, tracking_code
from precisebn.models.selection import ModuleSelection, named_modules, select_modules
from precisebn.models.snapshot import Snapshot
from precisebn.models.tensor_pictures import PLAIN_TENSORS
from precisebn.models.transaction import Transaction
from precisebn.recalibration.settings import Settings
from precisebn.recalibration.writable import check_writable

__all__ = ["Choice", "choose", "initialize_lazy_layers"]


@dataclass
class Choice:
    """The layers of a model, by qualified name and in its order.

    Attributes:
        layers: what to recalibrate.
        skipped: what not, with the reason, in words that do for many layers.
        some_are_lazy: whether any layer of the model does not know its size yet.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    some_are_lazy: bool = False

    def why_nothing(self, model: nn.Module) -> str:
        """What to tell the user where there is nothing to recalibrate: all reasons, and what mends each."""
        kind = type(model).__name__
        if not self.skipped:
            return (
                f"{kind} has no BatchNorm layer, so nothing was recalibrated; frozen, scripted (torch.jit), exported "
                "(torch.export) and quantized BatchNorm has no statistics to update: recalibrate before such a "
                "conversion"
            )
        layers = counted(len(self.skipped), "BatchNorm layer")
        reasons = [(_WORDS[reason.partition(" (")[0]], len(names)) for reason, names in by_reason(self.skipped).items()]
        why = ", ".join(f"{number} {words.one if number == 1 else words.several}" for words, number in reasons)
        remedies = "".join(f"; {words.remedy}" for words, _ in reasons if words.remedy)
        return f"nothing was recalibrated: of {layers} of {kind}, {why}{remedies}"


class _Words(NamedTuple):
    """A reason to leave layers alone, as the end of a sentence about one or several, and what mends it."""

    one: str
    several: str
    remedy: str = ""


_WORDS = {
    "frozen": _Words("is frozen", "are frozen", "pass modules='*', or names, to take frozen layers too"),
    "eval mode": _Words(
        "is in eval mode", "are in eval mode", "call model.train() before, or pass modules='all' for any mode"
    ),
    "no running statistics": _Words(
        "keeps no running statistics (track_running_stats=False)",
        "keep no running statistics (track_running_stats=False)",
    ),
    "running statistics that are no buffers": _Words(
        "keeps running statistics that are no buffers",
        "keep running statistics that are no buffers",
        "register_buffer makes buffers of parameters and attributes",
    ),
    "lazy, and not reached by the first mini-batch": _Words(
        "is lazy, and not reached by the first mini-batch", "are lazy, and not reached by the first mini-batch"
    ),
    "code of torch.jit": _Words(
        "is code of torch.jit", "are code of torch.jit", "recalibrate the model before torch.jit compiles it"
    ),
    "code of torch.export": _Words(
        "is code of torch.export", "are code of torch.export", "recalibrate the model before torch.export takes it"
    ),
    "exclude=": _Words("is left out by exclude=", "are left out by exclude="),
    "not chosen by modules=": _Words("is not chosen by modules=", "are not chosen by modules="),
}
"""By the reason in a report, without what stands in brackets."""

EXCLUDED = "exclude="
NO_STATISTICS = "no running statistics (track_running_stats=False)"
NO_BUFFERS = "running statistics that are no buffers (but parameters, plain attributes or parametrized)"


def choose(settings: Settings) -> Choice:
    """What ``modules=`` and ``exclude=`` ask for.

    Raises:
        InputError: something that selects no BatchNorm layer of the model; a layer on the meta device, or whose
            running statistics are cut into parts, or cannot be written, see :func:`check_writable`.
    """
    selection = select_modules(settings.model, settings.modules, settings.exclude)
    lazy = {name for name, layer in selection.found.items() if _is_lazy(layer)}
    result = Choice(some_are_lazy=bool(lazy))
    to_write = []
    for name, layer in selection.found.items():
        if layer in selection.excluded:
            result.skipped[name] = EXCLUDED
        elif name not in selection.chosen:
            result.skipped[name] = _reason_not_chosen(layer, settings.modules)
        else:
            populations = populations_of(layer)
            if not populations:
                result.skipped[name] = NO_BUFFERS if _has_statistics_elsewhere(layer) else NO_STATISTICS
            elif name in lazy:
                result.skipped[name] = "lazy, and not reached by the first mini-batch"
            elif populations[0].mean.is_meta:
                raise InputError(
                    f"layer {name!r} ({type(layer).__name__}) is on the meta device, where nothing has values; "
                    "bring the model onto a device first, by to_empty(device=...) and load_state_dict"
                )
            elif is_sharded(populations[0].mean):
                raise InputError(
                    f"the running statistics of layer {name!r} ({type(layer).__name__}) are DTensors, of which every "
                    "rank may hold a part; keep buffers out of distribute_module, as fully_shard does"
                )
            else:
                result.layers[name] = layer
                to_write.append((name, layer, populations))
    check_writable(to_write)
    for name, module in named_modules(settings.model):
        compiler = tracking_code(module)
        if name and compiler and "InstanceNorm" not in str(getattr(module, "original_name", "")):
            result.skipped[name] = f"code of {compiler}"
    return result


def _reason_not_chosen(layer: nn.Module, modules: ModuleSelection) -> str:
    """Why a layer is not among those that ``modules`` chose."""
    if is_frozen(layer) and isinstance(modules, str) and modules in ("training", "all"):
        return f"frozen (modules={modules!r} leaves these out; modules='*', or names, to take them)"
    if modules == "training" and not layer.training:
        return "eval mode"
    return "not chosen by modules="


def _has_statistics_elsewhere(layer: nn.Module) -> bool:
    """Whether a layer without populations has running statistics all the same, which its own forward may move."""
    return any(getattr(layer, name, None) is not None for name in ("running_mean", "running_var"))


def initialize_lazy_layers(model: nn.Module, batches: Iterator[Any], run: Callable[[Any], object]) -> Iterator[Any]:
    """Run the first mini-batch once, so that lazy layers get their size; all else is put back.

    Args:
        model: the model.
        batches: mini-batches.
        run: calls the model on one.

    Returns:
        The mini-batches, none of them lost.

    Raises:
        InsufficientDataError: there is none.
        BatchFormatError: it cannot be copied.
    """
    first = next(batches, None)
    if first is None:
        raise InsufficientDataError("the data loader gave no mini-batch, so lazy BatchNorm layers have no size yet")
    before, modes = Snapshot(model), Transaction()
    modes.on_undo(before.put_back)
    try:
        for module in model.modules():
            if isinstance(module, _NormBase):  # so that no statistics move of those that cannot be put back
                modes.put(vars(module), "training", False)
        with torch.no_grad():
            # A copy: the mini-batch runs again, and a model may change its input in place.
            run(copied(first, "run one forward of the model before, which gives lazy layers their size"))
    finally:
        modes.undo()
    return itertools.chain([first], batches)


def _is_lazy(layer: nn.Module) -> bool:
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    return not _NOT_LAZY.issuperset(map(type, tensors)) and any(is_lazy(t) for t in tensors if t is not None)


_NOT_LAZY = PLAIN_TENSORS | {type(None)}
