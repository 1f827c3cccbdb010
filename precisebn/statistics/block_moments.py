"""Batch means: how far blocks of mini-batches lie apart, which standard errors are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from precisebn.statistics.flat_moments import FlatMoments, per_channel

__all__ = ["BlockDeviations", "BlockMoments", "Level"]


class BlockDeviations(NamedTuple):
    """Sums over the blocks of one size, which add up over ranks: see :class:`BlockMoments` for n, m and u.

    Attributes:
        num_blocks: per layer.
        covered: sum of n, per layer.
        weight: sum of n^2, per layer.
        m_square: sum of n^2 (m - mean)^2, per channel.
        u: sum of n^2 (u - reference_var), per channel.
        u_square: sum of n^2 (u - reference_var)^2, per channel.
    """

    num_blocks: Tensor
    covered: Tensor
    weight: Tensor
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
        self.num_blocks = flat.new_zeros(num_layers)
        self.count = flat.new_zeros(num_layers)
        self.weight = flat.new_zeros(num_layers)
        self.center, self.mean_a, self.mean_q = flat.clone(), flat.clone(), flat.clone()
        self.aa, self.aq, self.qq = flat.clone(), flat.clone(), flat.clone()

    def add(self, blocks: FlatMoments, known_mean: Tensor) -> None:
        """Add blocks; layers that a block did not reach stay as they are.

        Args:
            blocks: one or several.
            known_mean: ``(S,)``, the mean of all values so far, these included.
        """
        unseen = self.weight == 0
        self.center.addcmul_(known_mean, per_channel(unseen.double(), self.layer_of_channel))  # 0 so far

        weights = blocks.count.square()
        added = weights.sum(0)
        shares = per_channel(weights / added.clamp(min=1.0), self.layer_of_channel)
        a = blocks.mean - self.center
        q = a.square().addcdiv_(blocks.m2, blocks.channel_count().clamp(min=1.0))
        mean_a, mean_q = (a * shares).sum(0), (q * shares).sum(0)
        a.sub_(mean_a)
        q.sub_(mean_q)
        weighted_a, weighted_q = a * shares, q.mul(shares)

        total = self.weight + added
        added_channel = per_channel(added, self.layer_of_channel)
        step = per_channel(added / total.clamp(min=1.0), self.layer_of_channel)
        gain = step * per_channel(self.weight, self.layer_of_channel)
        delta_a, delta_q = mean_a.sub_(self.mean_a), mean_q.sub_(self.mean_q)
        self.mean_a.addcmul_(delta_a, step)
        self.mean_q.addcmul_(delta_q, step)
        for co_moment, within, between in (
            (self.aa, (a * weighted_a).sum(0), delta_a * delta_a),
            (self.aq, (a * weighted_q).sum(0), delta_a * delta_q),
            (self.qq, (q * weighted_q).sum(0), delta_q * delta_q),
        ):
            co_moment.addcmul_(within, added_channel).addcmul_(between, gain)
        self.weight = total
        self.count.add_(blocks.count.sum(0))
        self.num_blocks.add_((blocks.count > 0).sum(0))

    def about(self, mean: Tensor, reference_var: Tensor) -> BlockDeviations:
        """The sums over blocks that standard errors need, about a given mean and variance."""
        weight = per_channel(self.weight, self.layer_of_channel)
        d = mean - self.center
        m_square = self.aa + weight * (self.mean_a - d).square()
        offset = self.mean_q - 2.0 * d * self.mean_a + d.square() - reference_var
        u_square = (self.qq - 4.0 * d * self.aq + 4.0 * d.square() * self.aa).clamp(min=0.0)
        u_square = u_square + weight * offset.square()
        return BlockDeviations(self.num_blocks, self.count, self.weight, m_square, weight * offset, u_square)


class Level:
    """Blocks of one size, and the one of them that waits for its neighbour."""

    def __init__(self, moments: BlockMoments) -> None:
        self.moments = moments
        self.pending: FlatMoments | None = None
