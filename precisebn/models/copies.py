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
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._places = []
        for tensor in tensors:
            if tensor.requires_grad:
                tensor = tensor.detach()
            kind = tensor.dtype, tensor.device
            self._places.append((kind, tensor.shape))
            alike.setdefault(kind, []).append(tensor)
        self._flat = {kind: flattened(own) for kind, own in alike.items()}

    def __iter__(self) -> Iterator[Tensor]:
        sizes: dict[tuple[torch.dtype, torch.device], list[int]] = {kind: [] for kind in self._flat}
        for kind, shape in self._places:
            sizes[kind].append(shape.numel())
        pieces = {kind: iter(flat.split(sizes[kind])) for kind, flat in self._flat.items()}
        for kind, shape in self._places:
            piece = next(pieces[kind])
            yield piece if len(shape) == 1 else piece.view(shape)
