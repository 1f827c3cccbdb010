"""pause_tracking: forwards in training mode that leave the running statistics alone.

For the second forward of SAM, the perturbed ones of VAT, a mean teacher's, or any look at the training loss: layers
normalize by the mini-batch, as in training, and nothing is written. Code for these writes its own ``bypass_bn`` or
``_disable_tracking_bn_stats`` again and again, often by a momentum of 0, which still counts the mini-batch, and divides
by that count where momentum is None.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from precisebn.errors import InputError
from precisebn.models.families import PAUSED, is_instance_norm, is_norm_with_statistics
from precisebn.models.interrupts import HeldBack
from precisebn.models.selection import select

__all__ = ["is_in_block", "pause_tracking"]


@contextmanager
def pause_tracking(model: nn.Module, *modules: str | nn.Module) -> Iterator[nn.Module]:
    """Within this block, layers normalize as they would, and do not write their running statistics.

    Layers in training mode normalize by the mini-batch, those in eval mode by their running statistics. What stands
    still is ``running_mean``, ``running_var`` and ``num_batches_tracked``. Blocks nest, also of several threads that
    share the model: a layer tracks again when the last of them has ended. (A deep copy made inside does not.)

    Args:
        model: the model.
        modules: where: modules of the model, qualified names, glob patterns over qualified names; none: everywhere.

    Raises:
        InputError: something that matches no layer with running statistics.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
        >>> with pause_tracking(model):
        ...     y = model(torch.randn(4, 3, 8, 8))
        >>> int(model[1].num_batches_tracked), model[1].running_mean.abs().max().item()
        (0, 0.0)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    layers = list(
        select(model, list(modules) or None, argument="modules", is_layer=is_norm_with_statistics).chosen.values()
    )
    paused: list[nn.Module] = []
    try:
        with HeldBack():  # an interrupt could leave the lock locked
            for layer in layers:
                _pause(layer)
                paused.append(layer)
        yield model
    finally:
        with HeldBack():
            for layer in paused:
                _resume(layer)


def is_in_block(layer: nn.Module) -> bool:
    """Whether a paused layer is in a block that has yet to end; a copy that was made inside of one is not."""
    return layer in _blocks


# How many blocks a layer is in, and what it had before the first.
_blocks: "WeakKeyDictionary[nn.Module, tuple[int, Any]]" = WeakKeyDictionary()
_lock = threading.Lock()


def _switch(layer: nn.Module) -> tuple[str, Any]:
    """The attribute that makes a layer's forward write nothing, and its value for that."""
    # torch's BatchNorm in training mode hands on its running statistics only where the flag is set; in eval mode,
    # always. Its InstanceNorm takes an unset flag to mean, in eval mode too, that there are none; it counts nothing.
    return ("momentum", 0.0) if is_instance_norm(layer) else ("track_running_stats", False)


def _pause(layer: nn.Module) -> None:
    name, value = _switch(layer)
    with _lock:
        number, before = _blocks.get(layer, (0, getattr(layer, name)))
        _blocks[layer] = number + 1, before
        setattr(layer, name, value)
        vars(layer)[PAUSED] = True


def _resume(layer: nn.Module) -> None:
    name, _ = _switch(layer)
    with _lock:
        number, before = _blocks.get(layer, (0, None))
        if number > 1:
            _blocks[layer] = number - 1, before
        elif number == 1:
            setattr(layer, name, before)
            vars(layer).pop(PAUSED, None)
            del _blocks[layer]
