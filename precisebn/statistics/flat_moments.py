"""FlatMoments: the Moments of many layers in one flat tensor, so that merging all of them is a few operations."""

from functools import cached_property

import torch
from torch import Tensor

from precisebn.ops.chan import merge, merge_rows

__all__ = ["FlatMoments", "per_channel"]


class FlatMoments:
    """Moments of all layers, of one or several mini-batches: counts, then all means, then all m2, in one tensor.

    To be written to before anything is asked of them, and not after.

    Args:
        buffer: float64, ``(L + 2 S,)``, or ``(B, L + 2 S)`` for B mini-batches.
        layer_of_channel: ``(S,)``.
    """

    def __init__(self, buffer: Tensor, layer_of_channel: Tensor) -> None:
        self.buffer = buffer
        self.layer_of_channel = layer_of_channel
        channels = layer_of_channel.numel()
        self.count = buffer.narrow(-1, 0, buffer.shape[-1] - 2 * channels)
        self.mean = buffer.narrow(-1, buffer.shape[-1] - 2 * channels, channels)
        self.m2 = buffer.narrow(-1, buffer.shape[-1] - channels, channels)

    def __len__(self) -> int:
        return self.buffer.shape[0]

    @cached_property
    def channel_count(self) -> Tensor:
        """The count of each channel's layer."""
        return per_channel(self.count, self.layer_of_channel)

    def merged_with(self, other: "FlatMoments") -> "FlatMoments":
        """These moments and the other's, layer by layer."""
        merged = merge(self.channel_count, self.mean, self.m2, other.channel_count, other.mean, other.m2)
        return self._of(self.count + other.count, *merged)

    def merged(self) -> "FlatMoments":
        """The mini-batches as one."""
        if len(self) == 1:
            return FlatMoments(self.buffer[0], self.layer_of_channel)
        return self._of(self.count.sum(0), *merge_rows(self.channel_count, self.mean, self.m2))

    def merged_pairs(self) -> "FlatMoments":
        """Mini-batches 0 and 1 as one, 2 and 3 as one, ...; an odd last one is left out."""
        even, odd = (
            FlatMoments(self.buffer[first : len(self) - len(self) % 2 : 2], self.layer_of_channel) for first in (0, 1)
        )
        return even.merged_with(odd)

    def followed_by(self, others: "FlatMoments") -> "FlatMoments":
        """These mini-batches and then others."""
        return FlatMoments(torch.cat([self.buffer, others.buffer]), self.layer_of_channel)

    def last(self) -> "FlatMoments":
        """A copy of the last mini-batch, still in a row of its own."""
        return FlatMoments(self.buffer[-1:].clone(), self.layer_of_channel)

    def _of(self, count: Tensor, mean: Tensor, m2: Tensor) -> "FlatMoments":
        return FlatMoments(torch.cat([count, mean, m2], dim=-1), self.layer_of_channel)


def per_channel(per_layer: Tensor, layer_of_channel: Tensor) -> Tensor:
    """Each channel's entry of ``(..., L)``, as ``(..., S)``.

    Of a vector index_select takes a third of the time of indexing; of rows gather a fifth of that of index_select.
    """
    if per_layer.dim() == 1:
        return per_layer.index_select(0, layer_of_channel)
    return per_layer.gather(-1, layer_of_channel.expand(*per_layer.shape[:-1], -1))
