"""pause_tracking: forwards in training mode that leave the running statistics alone.

For the second forward of SAM, the perturbed ones of VAT, a mean teacher's, or any look at the training loss: layers
normalize by the mini-batch, as in training, and nothing is written. Code for these writes its own ``bypass_bn`` or
``_disable_tracking_bn_stats`` again and again, often by a momentum of 0, which still counts the mini-batch, and divides
by that count where momentum is None.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from precisebn.errors import InputError
from precisebn.models.families import PAUSED, is_instance_norm, is_norm_with_statistics
from precisebn.models.interrupts import HeldBack, Undisturbed
from precisebn.tracking.layers import select_tracking

__all__ = ["is_in_block", "pause_tracking"]


def pause_tracking(model: nn.Module, *modules: str | nn.Module) -> Undisturbed[nn.Module]:
    """Within this block, layers normalize as they would, and do not write their running statistics.

    Layers in training mode normalize by the mini-batch, those in eval mode by their running statistics. What stands
    still is ``running_mean``, ``running_var`` and ``num_batches_tracked``. Blocks nest, also of several threads that
    share the model: a layer tracks again when the last of them has ended. (A deep copy made inside does not.) A lazy
    layer may see its first mini-batch inside.

    Args:
        model: the model.
        modules: where: modules of the model, qualified names, glob patterns over qualified names; none: everywhere.

    Raises:
        InputError: something that matches no layer with running statistics; such a layer in training mode in
            code of torch.jit or torch.export.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
        >>> with pause_tracking(model):
        ...     y = model(torch.randn(4, 3, 8, 8))
        >>> int(model[1].num_batches_tracked), model[1].running_mean.abs().max().item()
        (0, 0.0)
    """
    return Undisturbed(_paused, model, modules)


def _paused(interrupts: HeldBack, model: nn.Module, modules: Iterable[str | nn.Module]) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    layers = list(select_tracking(model, modules, is_norm_with_statistics, "pause_tracking").values())
    paused: list[nn.Module] = []
    try:
        for layer in layers:
            _pause(layer)
            paused.append(layer)
        yield model
    finally:
        for layer in paused:
            _resume(layer)


def is_in_block(layer: nn.Module) -> bool:
    """Whether a paused layer is in a block that has yet to end; a copy that was made inside of one is not."""
    return layer in _blocks


class _Blocks(NamedTuple):
    """How many blocks a layer is in, and which of its attributes had which value before the first."""

    number: int
    name: str
    before: Any


_blocks: "WeakKeyDictionary[nn.Module, _Blocks]" = WeakKeyDictionary()
_lock = threading.Lock()


def _switch(layer: nn.Module) -> tuple[str, Any]:
    """The attribute that makes a layer's forward write nothing, and its value for that."""
    # torch's BatchNorm in training mode hands on its running statistics only where the flag is set; in eval mode,
    # always. Its InstanceNorm takes an unset flag to mean, in eval mode too, that there are none; it counts nothing.
    return ("momentum", 0.0) if is_instance_norm(layer) else ("track_running_stats", False)


def _pause(layer: nn.Module) -> None:
    with _lock:
        blocks = _blocks.get(layer)
        if blocks is not None:
            _blocks[layer] = blocks._replace(number=blocks.number + 1)
            return
        name, value = _switch(layer)
        before = getattr(layer, name)
        _blocks[layer] = _Blocks(1, name, before)
        setattr(layer, name, value)
        vars(layer)[PAUSED] = True
        if isinstance(layer, LazyModuleMixin) and name == "track_running_stats" and before:
            vars(layer)["initialize_parameters"] = _InitializedTracking(layer)


def _resume(layer: nn.Module) -> None:
    with _lock:
        blocks = _blocks.get(layer)
        if blocks is None:
            return
        if blocks.number > 1:
            _blocks[layer] = blocks._replace(number=blocks.number - 1)
            return
        setattr(layer, blocks.name, blocks.before)
        for added in (PAUSED, "initialize_parameters"):
            vars(layer).pop(added, None)
        del _blocks[layer]


class _InitializedTracking:
    """In the place of the method by which a lazy layer gets its size: torch makes running statistics if it tracks."""

    def __init__(self, layer: LazyModuleMixin) -> None:
        self.layer = layer
        self.initialize: Callable[..., object] = type(layer).initialize_parameters

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Initialize the layer as one that tracks."""
        attributes = vars(self.layer)
        paused = attributes["track_running_stats"]
        try:
            attributes["track_running_stats"] = True
            self.initialize(self.layer, *args, **kwargs)
        finally:
            attributes["track_running_stats"] = paused
