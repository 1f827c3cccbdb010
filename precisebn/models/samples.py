"""How many samples a mini-batch holds, in whatever form a loader yields it.

No form of batch says so itself; what is known is conventions. A number is certain where all that a batch holds agrees
on it. Where it does not, a report may guess; whatever weighs samples must not.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from precisebn.errors import BatchFormatError
from precisebn.models.batches import describe_batch, is_passed_as_its_first_item
from precisebn.models.nested import tensors_in

__all__ = ["certain_num_samples", "num_samples"]

_DEPTH = 5
"""How deep to look into containers and objects, which may lead round in circles."""


def num_samples(batch: Any) -> int:
    """Samples in a batch, as far as that can be told; of what holds no tensors, items of a list, or 1.

    Example:
        >>> import torch
        >>> num_samples({"size": torch.tensor([[8, 8]]), "image": torch.zeros(4, 3, 8, 8)})
        4
    """
    found = _candidates(batch)
    if found is not None and len(found) == 1:
        return next(iter(found))
    if isinstance(batch, list | tuple) and batch and (found is None or len(batch) in found):
        return len(batch)
    if found:
        return max(found)
    plain = [tensor for tensor in tensors_in(batch, in_data_classes=False) if tensor.dim() > 0]
    tensors = plain or [tensor for tensor in _tensors(batch) if tensor.dim() > 0]
    return max(tensors, key=Tensor.dim).shape[0] if tensors else 1  # images rather than what goes with them


def certain_num_samples(batch: Any, wanted_by: str) -> int:
    """Samples in a batch.

    A tensor has as many as its first dimension, and so has a list or tuple that begins with a floating-point tensor; a
    PackedSequence has its sequences; a list of mappings or objects, or of tensors that differ in size, its items. A
    mapping, a dataclass or another object has as many as all tensors in it agree on; objects beside tensors are
    metadata, as for :func:`precisebn.models.batches.call_model`.

    Args:
        batch: what a loader yielded.
        wanted_by: the argument that needs the number, for the message.

    Raises:
        BatchFormatError: nothing in it tells, or not all of it tells the same; the message has the remedy.
    """
    found = _candidates(batch)
    if found is not None and len(found) == 1:
        return next(iter(found))
    if found:
        why = f"it may be {' or '.join(map(str, sorted(found)))}"
    else:
        sizes = sorted({tensor.shape[0] for tensor in _tensors(batch) if tensor.dim() > 0})
        why = f"its tensors have first dimensions {', '.join(map(str, sizes))}" if sizes else "it has no tensor to tell"
    raise BatchFormatError(
        f"{wanted_by} weighs samples, and how many the mini-batch, {describe_batch(batch)}, holds cannot be told: "
        f"{why}. Let the loader yield pairs (x, batch) with the tensor x whose first dimension is that of the samples, "
        "and pass forward=lambda model, pair: model(pair[1])"
    )


def _candidates(batch: Any, depth: int = _DEPTH) -> set[int] | None:
    """What the number of samples may be: none if parts disagree; None where there is nothing to tell by."""
    if isinstance(batch, Tensor):
        return {batch.size(0)} if batch.dim() else None
    if isinstance(batch, PackedSequence):
        return {int(batch.batch_sizes[0])}
    if depth == 0:
        return None
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        is_whole_batch = depth == _DEPTH and is_passed_as_its_first_item(batch)
        return _candidates(batch[0]) if is_whole_batch else _of_sequence(batch, depth - 1)
    if isinstance(batch, tuple) and batch and _is_floating(batch[0]):
        return _candidates(batch[0])
    return _agreed(_parts(batch), depth - 1)


def _of_sequence(items: "list[Any] | tuple[Any, ...]", depth: int) -> set[int] | None:
    """Of a list or tuple: of samples, or of what belongs to all of them."""
    if not items:
        return None
    if all(isinstance(item, Tensor) for item in items):
        sizes = {item.shape[0] if item.dim() else 0 for item in items}
        if len({item.dim() for item in items}) == 1 and len(sizes) > 1:
            return {len(items)}  # boxes of each image
        if all(item.dim() == 3 for item in items):  # images (C, H, W), or sequences (N, C, L)
            return {len(items)} | sizes
    elif all(isinstance(item, Mapping) or _is_record(item) for item in items):  # detection's form
        inner = _agreed(items, depth) if isinstance(items, tuple) else None
        return {len(items)} | (inner or set())
    if _is_floating(items[0]):
        return _candidates(items[0])  # inputs first, as everywhere in torch
    return _agreed(items, depth)


def _agreed(parts: Iterable[Any], depth: int) -> set[int] | None:
    """What all parts that tell anything agree on; objects beside tensors are metadata, and are not asked."""
    parts = list(parts)
    for asked in ([part for part in parts if _is_plain(part)], [part for part in parts if not _is_plain(part)]):
        told = [found for part in asked if (found := _candidates(part, depth)) is not None]
        if told:
            return set.intersection(*told)
    return None


def _is_plain(item: Any) -> bool:
    return isinstance(item, Tensor | Mapping | list | tuple)


def _is_floating(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point() and item.dim() > 0


def _is_record(item: Any) -> bool:
    """Whether an item is an object that holds tensors: one sample, with what goes with it."""
    return not isinstance(item, Tensor | list | tuple) and any(True for _ in _tensors(item))


def _parts(batch: Any) -> Collection[Any]:
    """What is in a mapping, a list, a tuple, or the attributes of an object."""
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, list | tuple):
        return batch
    if isinstance(batch, type | nn.Module):
        return ()
    if dataclasses.is_dataclass(batch):
        return [getattr(batch, field.name, None) for field in dataclasses.fields(batch)]
    return getattr(batch, "__dict__", {}).values()


def _tensors(batch: Any, depth: int = _DEPTH) -> Iterable[Tensor]:
    """All tensors in nested containers and objects, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif depth:
        for part in _parts(batch):
            yield from _tensors(part, depth - 1)
