"""How tensors ``(N, C, *)`` and tensors ``(G, C)`` come together in the fallbacks: by sample, by group, in chunks.

A chunk is a few MB of float64, so that memory does not grow with the input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["chunks", "per_sample", "sum_by_group"]

_CHUNK_VALUES = 2**19


def sum_by_group(per_sample: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Add the rows of ``per_sample`` that share a group."""
    # index_put_ adds in a fixed order. On CUDA index_add_ does not: it uses atomics.
    if num_groups == 1:
        return per_sample.sum(0, keepdim=True)
    total = per_sample.new_zeros(num_groups, *per_sample.shape[1:])
    return total.index_put_((index,), per_sample, accumulate=True)


def per_sample(per_group: Tensor, x: Tensor, group: Tensor | None) -> Tensor:
    """``per_group [G, C]`` as it applies to ``x (N, C, *)``, broadcastable against it."""
    rows = per_group if group is None else per_group[group]
    return rows.reshape(rows.shape + (1,) * (x.dim() - 2))


def chunks(tensors: tuple[Tensor, ...], group: Tensor | None) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Cut tensors ``(N, C, *)`` into float64 pieces ``(n, C, L)``, each with the groups of its ``n`` samples."""
    x = tensors[0]
    if x.numel() == 0:
        return
    if group is None:
        group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    flat = [t.flatten(2) if t.dim() > 2 else t.unsqueeze(2) for t in tensors]
    channels, length = flat[0].shape[1:]
    columns = min(length, max(1, _CHUNK_VALUES // channels))
    rows = max(1, _CHUNK_VALUES // (channels * columns))
    for sample in range(0, len(x), rows):
        for start in range(0, length, columns):
            pieces = [t[sample : sample + rows, :, start : start + columns].double() for t in flat]
            yield pieces, group[sample : sample + rows]
