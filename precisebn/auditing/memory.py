"""Memory that tensors share: exactly, element by element, also between views of one flat tensor."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from precisebn.distributed import is_sharded

__all__ = ["overlapping"]


def overlapping(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor of ``a`` that shares memory with one of ``b``, by name, the name of the first such.

    Two views of one storage that have no element in common share nothing. Of sharded tensors it is this rank's part
    that counts. Tensors without memory (meta, lazy, empty) share it with themselves alone.

    Example:
        >>> flat = torch.zeros(6)
        >>> overlapping({"left": flat[:3], "odd": flat[1::2]}, {"right": flat[3:]})
        {'odd': 'right'}
    """
    by_storage: dict[tuple[object, ...], list[tuple[str, _Extent]]] = {}
    for name, tensor in b.items():
        for extent in _extents(tensor):
            by_storage.setdefault(extent.storage, []).append((name, extent))
    found: dict[str, str] = {}
    for name, tensor in a.items():
        for extent in _extents(tensor):
            for other, its in by_storage.get(extent.storage, ()):
                if name not in found and extent.meets(its):
                    found[name] = other
    return found


class _Extent(NamedTuple):
    """Where the elements of a strided tensor lie: from ``first`` to before ``end``, in bytes of a storage."""

    storage: tuple[object, ...]
    first: int
    end: int
    tensor: Tensor | None

    def meets(self, other: "_Extent") -> bool:
        """Whether they have a byte in common."""
        a, b = self.tensor, other.tensor
        if a is None or b is None:
            return True  # the very same object
        if self.first >= other.end or other.first >= self.end:
            return False
        if _is_dense(a) and _is_dense(b):
            return True
        return not _bytes_of(a).isdisjoint(_bytes_of(b))


def _extents(tensor: Tensor) -> Iterable[_Extent]:
    if is_lazy(tensor) or tensor.is_meta:
        return [_Extent(("object", id(tensor)), 0, 1, None)]
    if is_sharded(tensor):
        return _extents(tensor.to_local())  # type: ignore[attr-defined]  # a DTensor's
    if tensor.layout is not torch.strided or tensor.is_nested:
        return [_Extent(("object", id(tensor)), 0, 1, None)]
    if not tensor.numel():
        return []
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrappers around others have none
        return [_Extent(("object", id(tensor)), 0, 1, None)]
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    return [_Extent((str(tensor.device), storage), first, first + _span(tensor) * size, tensor)]


def _is_dense(tensor: Tensor) -> bool:
    """Whether it has an element wherever it could, from its first to its last."""
    return _span(tensor) == tensor.numel()


def _span(tensor: Tensor) -> int:
    """How many places there are from its first element to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _bytes_of(tensor: Tensor) -> set[int]:
    """The places of all its elements in the storage, each in bytes: for the few that interleave with others."""
    size = tensor.element_size()
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(n, device="cpu") * stride
    starts = (places.flatten() + int(tensor.storage_offset())) * size
    return set((starts.unsqueeze(1) + torch.arange(size, device="cpu")).flatten().tolist())
