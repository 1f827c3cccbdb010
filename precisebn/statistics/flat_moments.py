"""FlatMoments: the Moments of many layers in one flat tensor, so that merging all of them is a few operations."""

import torch
from torch import Tensor

from precisebn.ops.chan import merge, merge_rows

__all__ = ["FlatMoments", "per_channel"]


class FlatMoments:
    """Moments of all layers, of one or several mini-batches: counts, then all means, then all m2, in one tensor.

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

    def channel_count(self) -> Tensor:
        """The count of each channel's layer."""
        return per_channel(self.count, self.layer_of_channel)

    def merge_(self, other: "FlatMoments") -> None:
        """Merge the other's moments into these, layer by layer."""
        mean, m2 = merge(self.channel_count(), self.mean, self.m2, other.channel_count(), other.mean, other.m2)
        torch.cat([self.count + other.count, mean, m2], dim=-1, out=self.buffer)

    def merged(self) -> "FlatMoments":
        """The mini-batches as one."""
        if len(self) == 1:
            return FlatMoments(self.buffer[0], self.layer_of_channel)
        return self._of(self.count.sum(0), *merge_rows(self.channel_count(), self.mean, self.m2))

    def merged_pairs(self) -> "FlatMoments":
        """Mini-batches 0 and 1 as one, 2 and 3 as one, ...; an odd last one is left out."""
        even, odd = (
            FlatMoments(self.buffer[first : len(self) - len(self) % 2 : 2], self.layer_of_channel) for first in (0, 1)
        )
        merged = merge(even.channel_count(), even.mean, even.m2, odd.channel_count(), odd.mean, odd.m2)
        return self._of(even.count + odd.count, *merged)

    def followed_by(self, others: "FlatMoments") -> "FlatMoments":
        """These mini-batches and then others."""
        return FlatMoments(torch.cat([self.buffer, others.buffer]), self.layer_of_channel)

    def last(self) -> "FlatMoments":
        """A copy of the last mini-batch, still in a row of its own."""
        return FlatMoments(self.buffer[-1:].clone(), self.layer_of_channel)

    def _of(self, count: Tensor, mean: Tensor, m2: Tensor) -> "FlatMoments":
        return FlatMoments(torch.cat([count, mean, m2], dim=-1), self.layer_of_channel)


def per_channel(per_layer: Tensor, layer_of_channel: Tensor) -> Tensor:
    """Each channel's entry of ``(..., L)``, as ``(..., S)``; ``index_select`` takes a third of the time of indexing."""
    return per_layer.index_select(-1, layer_of_channel)
