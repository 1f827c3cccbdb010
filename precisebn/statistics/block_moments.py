"""Batch means: how far blocks of mini-batches lie apart, which standard errors are made of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from precisebn.statistics.flat_moments import FlatMoments, per_channel

__all__ = ["BlockDeviations", "BlockMoments", "Level"]


class BlockDeviations(NamedTuple):
    """Sums over the blocks of several sizes, which add up over ranks: see :class:`BlockMoments` for n, m and u.

    Attributes:
        of_layers: number of blocks, sum of n and sum of n^2, of each layer: ``(..., 3, L)``.
        m_square: sum of n^2 (m - mean)^2, per channel, ``(..., S)``.
        u: sum of n^2 (u - reference_var), likewise.
        u_square: sum of n^2 (u - reference_var)^2, likewise.
    """

    of_layers: Tensor
    m_square: Tensor
    u: Tensor
    u_square: Tensor


class BlockMoments:
    """How far the means and variances of blocks of values lie apart: what standard errors are made of.

    For block i with n_i values, mean m_i and variance v_i, the population mean and variance are averages weighted by
    n_i: of m_i, and of u_i = v_i + (m_i - mean)^2. Their squared standard errors, for B blocks, are those of a ratio
    of sums (Cochran, Sampling Techniques, 1977, sec. 2.11):

        B / (B - 1) * sum n_i^2 (m_i - mean)^2 / (sum n_i)^2,    and the same with u_i and the variance.

    A block that still waits for its second half is not among the B; the error of the whole is then smaller by
    sum n_i over the count of all values.

    The final mean is not known while blocks arrive, so u_i cannot be summed directly. With a fixed ``center`` c per
    channel, a_i = m_i - c and q_i = v_i + a_i^2, and d = mean - c, it is u_i = q_i - 2 d a_i + d^2 exactly: the
    means and co-moments of (a, q), weighted by n_i^2, are enough, and they merge like any Moments. The center is the
    mean of what was known at the first block, so that no digits are lost to a large common mean.
    """

    def __init__(self, layer_of_channel: Tensor, num_layers: int) -> None:
        flat = torch.zeros(layer_of_channel.numel(), dtype=torch.float64, device=layer_of_channel.device)
        self.layer_of_channel = layer_of_channel
        self.sums = flat.new_zeros(3, num_layers)  # per layer: number of blocks, sums of n and of n^2
        self.center = flat
        self.means = flat.new_zeros(2, flat.numel())  # of a and of q
        self.co_moments = flat.new_zeros(3, flat.numel())  # aa, qq and aq

    def add(self, blocks: FlatMoments, known_mean: Tensor) -> None:
        """Add blocks; layers that a block did not reach stay as they are.

        Args:
            blocks: one or several.
            known_mean: ``(S,)``, the mean of all values so far, these included.
        """
        known_weight, weights = self.sums[2], blocks.count.square()
        added = weights.sum(0)
        step = added / (known_weight + added).clamp(min=1.0)
        unseen, added_channel, step_channel, gain = per_channel(
            torch.stack([(known_weight == 0).double(), added, step, step * known_weight]), self.layer_of_channel
        )
        shares = per_channel(weights / added.clamp(min=1.0), self.layer_of_channel)
        self.center.addcmul_(known_mean, unseen)  # 0 so far

        a = blocks.mean - self.center
        q = a.square().addcdiv_(blocks.m2, blocks.channel_count.clamp(min=1.0))
        mean_a, mean_q = (a * shares).sum(0), (q * shares).sum(0)
        a.sub_(mean_a)
        q.sub_(mean_q)
        weighted_q = q * shares
        within = torch.stack([(a.square() * shares).sum(0), (q * weighted_q).sum(0), (a * weighted_q).sum(0)])
        delta = torch.stack([mean_a, mean_q]).sub_(self.means)
        self.means.addcmul_(delta, step_channel)
        between = torch.stack([*delta.square(), delta[0] * delta[1]])
        self.co_moments.addcmul_(within, added_channel).addcmul_(between, gain)
        self.sums.add_(torch.stack([(blocks.count > 0).sum(0), blocks.count.sum(0), added]))

    @staticmethod
    def stacked(of_sizes: "Sequence[BlockMoments]") -> "BlockMoments":
        """Those of several block sizes as one, whose tensors have them as dimension 0; only to ask :meth:`about`."""
        result = BlockMoments.__new__(BlockMoments)
        result.layer_of_channel = of_sizes[0].layer_of_channel
        for name in ("sums", "center", "means", "co_moments"):
            setattr(result, name, torch.stack([getattr(one, name) for one in of_sizes]))
        return result

    def about(self, mean: Tensor, reference_var: Tensor) -> BlockDeviations:
        """The sums over blocks that standard errors need, about a given mean and variance."""
        mean_a, mean_q = self.means.unbind(-2)
        aa, qq, aq = self.co_moments.unbind(-2)
        weight = per_channel(self.sums[..., 2, :], self.layer_of_channel)
        d = mean - self.center
        m_square = aa + weight * (mean_a - d).square()
        offset = mean_q - 2.0 * d * mean_a + d.square() - reference_var
        u_square = (qq - 4.0 * d * aq + 4.0 * d.square() * aa).clamp(min=0.0)
        weighted = weight * offset
        return BlockDeviations(self.sums, m_square, weighted, u_square + weighted * offset)


class Level:
    """Blocks of one size, and the one of them that waits for its neighbour."""

    def __init__(self, moments: BlockMoments) -> None:
        self.moments = moments
        self.pending: FlatMoments | None = None
