"""What a data loader yields: how to call a model on it, move it to a device, and count its samples."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precisebn.errors import BatchFormatError, InputError

__all__ = ["ForwardFn", "call_model", "common_device", "move_to", "num_samples"]

ForwardFn = Callable[[nn.Module, Any], Any]
"""How to call a model on a batch: ``forward(model, batch)``; what it returns is dropped."""


def call_model(model: nn.Module, batch: Any) -> None:
    """Call the model on a batch by the form of the batch.

    A mapping becomes keyword arguments; a list or tuple of one floating-point tensor followed by no other (labels,
    strings, metadata) stands for that tensor; anything else is passed as it is, as fvcore does.

    Raises:
        BatchFormatError: the call is a TypeError; the message names ``forward=``.
    """
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif _is_input_and_labels(batch):
            model(batch[0])
        else:
            model(batch)
    except TypeError as error:
        raise BatchFormatError(
            f"calling {type(model).__name__} on a batch of the form {_describe(batch)} raised TypeError: {error}. "
            "If the model takes its input differently, pass forward=lambda model, batch: model(...)"
        ) from error


def move_to(batch: Any, device: torch.device | str) -> Any:
    """The batch with every tensor in it on ``device``; containers are rebuilt, anything else is passed through.

    Reaches into mappings, lists, tuples and named tuples, and calls ``.to(device)`` of objects that have it
    (transformers' BatchEncoding, PyG's Data, packed sequences).
    """
    if isinstance(batch, Tensor):
        # A copy to the host that does not block may be read before it is there.
        return batch.to(device, non_blocking=torch.device(device).type != "cpu")
    if not isinstance(batch, Mapping | list) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: move_to(value, device) for key, value in batch.items()}
        return batch if all(moved[key] is batch[key] for key in moved) else _rebuilt(batch, moved)
    if isinstance(batch, list | tuple):
        items = [move_to(value, device) for value in batch]
        return batch if all(a is b for a, b in zip(items, batch, strict=True)) else _rebuilt(batch, items)
    return batch


def _rebuilt(batch: Any, items: Any) -> Any:
    """A container of the batch's own type with other items in it."""
    kind = type(batch)
    try:
        if isinstance(batch, Mapping):
            copied = copy.copy(batch)
            copied.update(items)  # type: ignore[attr-defined]
            return copied
        return kind(*items) if hasattr(batch, "_fields") else kind(items)
    except Exception as error:
        raise InputError(
            f"a mini-batch holds a {kind.__name__}, which cannot be rebuilt on another device: {error}. Move "
            "mini-batches in the loader, or in forward="
        ) from error


def common_device(model: nn.Module) -> torch.device | None:
    """The device that holds all parameters of a model (all buffers, if it has none); None if there are several."""
    devices = {p.device for p in model.parameters()} or {b.device for b in model.buffers()}
    return devices.pop() if len(devices) == 1 else None


def num_samples(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor, or the length of a list of samples."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        return num_samples(next((value for value in batch.values() if _holds(value, _has_dimensions)), None))
    if isinstance(batch, list | tuple) and batch:
        return len(batch) if _is_list_of_samples(batch) else num_samples(batch[0])
    return 1


def _is_list_of_samples(batch: Any) -> bool:
    """Detection's form: a list with one mapping, or one image without a batch dimension, for each sample."""
    if all(isinstance(item, Tensor) for item in batch):
        return isinstance(batch, list) and len({item.dim() for item in batch}) == 1 and batch[0].dim() == 3
    return all(isinstance(item, Mapping) for item in batch) or not isinstance(batch[0], Tensor | Mapping | list | tuple)


def _is_input_and_labels(batch: Any) -> bool:
    return (
        isinstance(batch, list | tuple)
        and len(batch) > 0
        and isinstance(batch[0], Tensor)
        and batch[0].is_floating_point()
        and not any(_holds(item, Tensor.is_floating_point) for item in batch[1:])
    )


def _holds(item: Any, wanted: Callable[[Tensor], bool]) -> bool:
    """Whether a tensor that is ``wanted`` lies anywhere in nested containers."""
    if isinstance(item, Tensor):
        return wanted(item)
    if isinstance(item, Mapping):
        return any(_holds(value, wanted) for value in item.values())
    if isinstance(item, list | tuple):
        return any(_holds(value, wanted) for value in item)
    return False


def _has_dimensions(tensor: Tensor) -> bool:
    return tensor.dim() > 0


def _describe(batch: Any) -> str:
    """A batch in a few words: types and shapes, two levels deep."""

    def brief(item: Any, depth: int) -> str:
        if isinstance(item, Tensor):
            return f"Tensor{tuple(item.shape)}"
        if depth and isinstance(item, Mapping):
            inner = ", ".join(f"{key!r}: {brief(value, depth - 1)}" for key, value in list(item.items())[:4])
            return f"{type(item).__name__}({inner}{', ...' if len(item) > 4 else ''})"
        if depth and isinstance(item, list | tuple):
            inner = ", ".join(brief(value, depth - 1) for value in item[:4])
            return f"{type(item).__name__}({inner}{', ...' if len(item) > 4 else ''})"
        return type(item).__name__

    return brief(batch, 2)
