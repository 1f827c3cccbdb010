"""Copies: of many small tensors, in one allocation for each dtype and device.

A network has hundreds of running statistics, and a tensor costs a microsecond or more to make, whatever its size. So
they are copied all at once, and cut into pieces when somebody wants them.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precisebn._torch import flattened

__all__ = ["Copies"]


class Copies:
    """Copies of some tensors; to iterate over them cuts them anew, in their order and in their shapes.

    Args:
        tensors: of any dtypes, on any devices.

    Example:
        >>> copies = Copies([torch.zeros(2), torch.ones((), dtype=torch.int64)])
        >>> list(copies)
        [tensor([0., 0.]), tensor(1)]
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self._number = len(tensors)
        alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, kind in enumerate(map(_kind_of, tensors)):
            alike.setdefault(kind, []).append(index)
        self._parts = [_Part.of(tensors, indices) for indices in alike.values()]

    def __iter__(self) -> Iterator[Tensor]:
        found: list[Any] = [None] * self._number
        for part in self._parts:
            pieces = part.flat.split([shape.numel() for shape in part.shapes])
            for index, shape, piece in zip(part.indices, part.shapes, pieces, strict=True):
                found[index] = piece if len(shape) == 1 else piece.view(shape)
        return iter(found)


class _Part(NamedTuple):
    """Copies of the tensors of one dtype and device: which they are of all, their shapes, and their values."""

    indices: list[int]
    shapes: list[torch.Size]
    flat: Tensor

    @staticmethod
    def of(tensors: Sequence[Tensor], indices: list[int]) -> "_Part":
        own = [tensors[index] for index in indices]
        # Not under no_grad, which Ctrl-C can leave on where nobody holds it back.
        return _Part(indices, [tensor.shape for tensor in own], flattened(own).detach())


_kind_of = attrgetter("dtype", "device")
