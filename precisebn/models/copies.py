"""Copies: of many small tensors, in one allocation for each dtype and device.

A network has hundreds of running statistics, and a tensor costs a microsecond or more to make, whatever its size. So
they are copied all at once, and cut into pieces when somebody wants them.
"""

from collections.abc import Iterator, Sequence

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
        self._kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
        self._shapes = [tensor.shape for tensor in tensors]
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for kind, tensor in zip(self._kinds, tensors, strict=True):
            alike.setdefault(kind, []).append(tensor.detach())
        self._flat = {kind: flattened(own) for kind, own in alike.items()}

    def __iter__(self) -> Iterator[Tensor]:
        places = list(zip(self._kinds, self._shapes, strict=True))
        pieces = {
            kind: iter(flat.split([shape.numel() for other, shape in places if other == kind]))
            for kind, flat in self._flat.items()
        }
        for kind, shape in places:
            yield next(pieces[kind]).view(shape)
