"""PopulationEstimator: the Moments of many layers in one flat float64 buffer, and how far to trust them.

Every layer owns a slice of the same few flat tensors, so that closing a mini-batch, measuring the standard errors and
merging ranks are a handful of operations on whole tensors, however many layers there are.

The standard errors come from batch means: mini-batches, not values, are the independent observations, because the
values inside one (neighbouring pixels, above all) are correlated. Where mini-batches themselves are correlated (frames
of one video, an unshuffled loader), neighbouring ones are merged into blocks of 2, 4, 8, ... and the largest error
over those block sizes that still have enough blocks is reported (Flyvbjerg & Petersen, "Error estimates on averages of
correlated data", 1989). So the assumption left is that correlation dies out within a fraction of the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from precisebn.moments import Moments, merge_

__all__ = ["ESTIMATORS", "MIN_BLOCKS", "EstimatorName", "Population", "PopulationEstimator"]

EstimatorName = Literal["population", "batch-mean"]
ESTIMATORS: tuple[EstimatorName, ...] = ("population", "batch-mean")

MIN_BLOCKS = 8
"""Fewest blocks from which a standard error is computed; below, its own relative error would exceed 1/4."""


@dataclass(frozen=True, slots=True)
class Population:
    """What a :class:`PopulationEstimator` has found out, over all ranks.

    ``L`` layers with ``S`` channels in all; everything is float64.

    Attributes:
        count: values per channel, ``(L,)``; 0 for a layer never reached.
        num_batches: mini-batches that reached the layer, ``(L,)``.
        mean: population mean, ``(S,)``.
        var: population variance, ``(S,)``.
        mean_error: standard error of the mean in units of the layer's standard deviation ``sqrt(var + eps)``, root
            mean square over the layer's channels, ``(L,)``; NaN where fewer than ``MIN_BLOCKS`` mini-batches were seen.
        var_error: standard error of the variance relative to ``var + eps``, likewise.
    """

    count: Tensor
    num_batches: Tensor
    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor


class PopulationEstimator:
    """Population statistics of many layers, mini-batch by mini-batch.

    Use: for every mini-batch, merge what each layer sees into ``slot(i)`` (``ops.accumulate`` does), then call
    :meth:`end_batch`. A layer may be reached several times in a mini-batch, or not at all.

    Args:
        num_channels: channels of each layer.
        kind: ``"population"``, the mean and (biased) variance of all values of all mini-batches together, each
            mini-batch weighted by its size; or ``"batch-mean"``, the plain averages of the mini-batches' means and of
            their unbiased variances (Ioffe & Szegedy 2015, alg. 2; fvcore's ``_MeanOfBatchVarianceEstimator``).
        device: where the buffers live.

    Example:
        >>> from precisebn import ops
        >>> estimator = PopulationEstimator([2])
        >>> for batch in torch.arange(12.0).reshape(3, 2, 2):
        ...     ops.accumulate(batch, *estimator.slot(0))
        ...     estimator.end_batch()
        >>> population = estimator.result(eps=torch.tensor([1e-5]))
        >>> population.mean.tolist(), [round(v, 4) for v in population.var.tolist()]
        ([5.0, 6.0], [11.6667, 11.6667])
    """

    def __init__(
        self,
        num_channels: Sequence[int],
        *,
        kind: EstimatorName = "population",
        device: torch.device | str | None = None,
    ) -> None:
        self.num_channels = tuple(num_channels)
        self.kind = kind
        self.layer_of_channel = torch.repeat_interleave(
            torch.arange(len(self.num_channels)), torch.tensor(self.num_channels, dtype=torch.int64)
        ).to(device)
        self.population = _FlatMoments(self.layer_of_channel, len(self.num_channels))
        self.current = _FlatMoments(self.layer_of_channel, len(self.num_channels))
        self.num_batches = torch.zeros(len(self.num_channels), dtype=torch.float64, device=device)
        self.average_mean = torch.zeros_like(self.population.mean)
        self.average_var = torch.zeros_like(self.population.mean)
        self.first_nonfinite = torch.full_like(self.layer_of_channel, -1)
        self._levels: list[_Level] = []
        self._batches_ended = 0
        self._slots = self.current.slots(self.num_channels)

    def slot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the moments of the current mini-batch at one layer are merged: count ``(1,)``, mean and m2 ``(C,)``.

        Views of the flat buffer, the same ones every time: writing to them in place is the interface.
        """
        return self._slots[layer]

    def end_batch(self) -> None:
        """Close the current mini-batch: merge it into the population and start the next from nothing."""
        batch = self.current
        reached = batch.channel_count() > 0
        self._note_nonfinite(batch, reached)
        self._average(batch, reached)
        self.population.merge_(batch)
        self.num_batches.add_(batch.count > 0)
        self._push(batch)
        batch.zero_()
        self._batches_ended += 1

    def moments(self, layer: int) -> Moments:
        """Moments of all values that one layer has seen."""
        return Moments(
            self.population.count[layer],
            self.population.mean.split(self.num_channels)[layer],
            self.population.m2.split(self.num_channels)[layer],
        )

    @property
    def num_levels(self) -> int:
        """How many block sizes are kept; ranks must agree on the largest before :meth:`result`."""
        return len(self._levels)

    def result(
        self, eps: Tensor, *, all_reduce: Callable[[Tensor], None] | None = None, num_levels: int | None = None
    ) -> Population:
        """The statistics of all mini-batches so far, and their standard errors. Changes nothing: more may follow.

        Args:
            eps: what each layer adds to its variance, ``(L,)``.
            all_reduce: adds a flat float64 tensor up over all ranks, in place; called twice. None: there is one rank.
            num_levels: the largest ``num_levels`` of any rank; None: this rank's.
        """
        num_levels = self.num_levels if num_levels is None else num_levels
        count, mean, within, num_batches, average = self._merge_counts_and_means(all_reduce)
        channel_count = count[self.layer_of_channel].clamp(min=1.0)

        # Second sum over ranks: now that all know the mean, deviations from it, and the spread of the blocks. The
        # spread is taken about the mean variance within ranks, which all know by now as well, rather than about the
        # variance, which this very sum brings.
        reference = within / channel_count
        own_m2 = self.population.m2 + self.population.channel_count() * (self.population.mean - mean).square()
        spreads = [
            self._levels[i].spread.about(mean, reference) if i < self.num_levels else self._no_spread()
            for i in range(num_levels)
        ]
        flat = torch.cat([own_m2, *(part for spread in spreads for part in spread)])
        if all_reduce is not None:
            all_reduce(flat)
        num_layers, num_flat = count.numel(), mean.numel()
        m2, *parts = flat.split([num_flat] + ([num_layers] * 3 + [num_flat] * 3) * num_levels)
        var = m2 / channel_count
        mean_error, var_error = torch.full_like(count, float("nan")), torch.full_like(count, float("nan"))
        for i in range(num_levels):
            spread = SpreadSums(*parts[6 * i : 6 * i + 6])
            enough = spread.num_blocks >= MIN_BLOCKS
            errors = self._layer_errors(spread, channel_count, var, var - reference, eps)
            for worst, error in zip((mean_error, var_error), errors, strict=True):
                worst.copy_(torch.where(enough, torch.fmax(worst, error), worst))
        if average is not None:
            mean, var = average
        return Population(count, num_batches, mean, var, mean_error, var_error)

    def _merge_counts_and_means(
        self, all_reduce: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """First sum over ranks: count, mean, m2 within ranks, number of mini-batches, and the plain averages."""
        own = self.population
        averaging = self.kind == "batch-mean"
        if all_reduce is None:
            average = (self.average_mean, self.average_var) if averaging else None
            return own.count.clone(), own.mean.clone(), own.m2, self.num_batches.clone(), average
        num_batches = self.num_batches[self.layer_of_channel]
        averages = (num_batches * self.average_mean, num_batches * self.average_var) if averaging else ()
        flat = torch.cat([own.count, self.num_batches, own.channel_count() * own.mean, own.m2, *averages])
        all_reduce(flat)
        num_layers, num_flat = own.count.numel(), own.mean.numel()
        count, batches, total, m2, *sums = flat.split([num_layers] * 2 + [num_flat] * (2 + len(averages)))
        per_channel = batches[self.layer_of_channel].clamp(min=1.0)
        average = (sums[0] / per_channel, sums[1] / per_channel) if averaging else None
        return count, total / count[self.layer_of_channel].clamp(min=1.0), m2, batches, average

    def _layer_errors(
        self, spread: "SpreadSums", channel_count: Tensor, var: Tensor, var_offset: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Standard errors from the spread of one size of block, per layer, in the layer's own units."""
        weight = spread.weight[self.layer_of_channel]
        about_var = spread.u_square - 2.0 * var_offset * spread.u + weight * var_offset.square()
        blocks = spread.num_blocks[self.layer_of_channel]
        covered = spread.covered[self.layer_of_channel].clamp(min=1.0)
        factor = blocks / (blocks - 1.0).clamp(min=1.0) / (covered * channel_count)
        scale = var + eps[self.layer_of_channel]

        def layer_rms(squared: Tensor) -> Tensor:
            of_layers: tuple[Tensor, ...] = squared.split(self.num_channels)
            return torch.stack([layer.mean() for layer in of_layers]).sqrt()

        return layer_rms(spread.m_square * factor / scale), layer_rms(
            about_var.clamp(min=0.0) * factor / scale.square()
        )

    def _no_spread(self) -> "SpreadSums":
        zeros = torch.zeros_like(self.population.mean)
        none = torch.zeros_like(self.num_batches)
        return SpreadSums(none, none, none, zeros, zeros, zeros)

    def _note_nonfinite(self, batch: "_FlatMoments", reached: Tensor) -> None:
        """Remember the mini-batch in which a channel first met NaN or Inf, without asking the device for it."""
        bad = ~torch.isfinite(batch.m2) & reached & (self.first_nonfinite < 0)
        self.first_nonfinite.masked_fill_(bad, self._batches_ended)

    def _average(self, batch: "_FlatMoments", reached: Tensor) -> None:
        """Add a mini-batch to the plain averages, all mini-batches weighing the same."""
        if self.kind != "batch-mean":
            return
        step = reached / (self.num_batches[self.layer_of_channel] + 1.0)
        unbiased = batch.m2 / (batch.channel_count() - 1.0).clamp(min=1.0)
        self.average_mean.addcmul_(batch.mean - self.average_mean, step)
        self.average_var.addcmul_(unbiased - self.average_var, step)

    def _push(self, block: "_FlatMoments") -> None:
        """Record a block of mini-batches in the spread of its level; each second one goes, merged, a level up."""
        for level in self._levels:
            level.spread.add(block)
            if level.pending is None:
                level.pending = block.clone()
                return
            level.pending.merge_(block)
            block, level.pending = level.pending, None
        self._levels.append(_Level(BatchSpread(self.layer_of_channel, len(self.num_channels))))
        self._levels[-1].spread.add(block)
        self._levels[-1].pending = block.clone()


class _FlatMoments:
    """Moments of all layers: one count per layer, then all means, then all m2, in one float64 tensor."""

    def __init__(self, layer_of_channel: Tensor, num_layers: int, buffer: Tensor | None = None) -> None:
        num_channels = layer_of_channel.numel()
        if buffer is None:
            size = num_layers + 2 * num_channels
            buffer = torch.zeros(size, dtype=torch.float64, device=layer_of_channel.device)
        self.buffer = buffer
        self.layer_of_channel = layer_of_channel
        self.count: Tensor
        self.mean: Tensor
        self.m2: Tensor
        self.count, self.mean, self.m2 = buffer.split([num_layers, num_channels, num_channels])

    def channel_count(self) -> Tensor:
        """The count of each channel's layer."""
        return self.count[self.layer_of_channel]

    def slots(self, num_channels: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Views of each layer's part."""
        sizes = list(num_channels)
        return list(zip(self.count.split(1), self.mean.split(sizes), self.m2.split(sizes), strict=True))

    def merge_(self, other: "_FlatMoments") -> None:
        """Merge the other's moments into these, layer by layer."""
        merge_(self.mean, self.m2, self.channel_count(), other.mean, other.m2, other.channel_count())
        self.count.add_(other.count)

    def zero_(self) -> None:
        self.buffer.zero_()

    def clone(self) -> "_FlatMoments":
        return _FlatMoments(self.layer_of_channel, self.count.numel(), self.buffer.clone())


class SpreadSums(NamedTuple):
    """Sums over the blocks of one size, which add up over ranks: see :class:`BatchSpread` for n, m and u.

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


class BatchSpread:
    """How far the means and variances of blocks of values lie apart: what standard errors are made of.

    For block i with n_i values, mean m_i and variance v_i, the population mean and variance are averages weighted by
    n_i: of m_i, and of u_i = v_i + (m_i - mean)^2. Their squared standard errors, for K blocks, are those of a ratio
    of sums (Cochran, Sampling Techniques, 1977, sec. 2.11):

        K / (K - 1) * sum n_i^2 (m_i - mean)^2 / (sum n_i)^2,    and the same with u_i and the variance.

    A block that still waits for its second half is not among the K; the error of the whole is then smaller by
    sum n_i over the count of all values.

    The final mean is not known while blocks arrive, so u_i cannot be summed directly. With a fixed ``center`` c per
    channel, a_i = m_i - c and q_i = v_i + a_i^2, and d = mean - c, it is u_i = q_i - 2 d a_i + d^2 exactly: the
    weighted means and co-moments of (a, q) are enough, and they update like any Moments. The center is the first
    block's mean, so that no digits are lost to a large common mean.
    """

    def __init__(self, layer_of_channel: Tensor, num_layers: int) -> None:
        flat = torch.zeros(layer_of_channel.numel(), dtype=torch.float64, device=layer_of_channel.device)
        self.layer_of_channel = layer_of_channel
        self.num_blocks = flat.new_zeros(num_layers)
        self.count = flat.new_zeros(num_layers)
        self.weight = flat.new_zeros(num_layers)
        self.center, self.mean_a, self.mean_q = flat.clone(), flat.clone(), flat.clone()
        self.aa, self.aq, self.qq = flat.clone(), flat.clone(), flat.clone()

    def add(self, block: _FlatMoments) -> None:
        """Add one block; layers it did not reach stay as they are."""
        weight = block.count.square()
        total = self.weight + weight
        step = (weight / total.clamp(min=1.0))[self.layer_of_channel]
        gain = (self.weight * weight / total.clamp(min=1.0))[self.layer_of_channel]
        first = (self.weight == 0)[self.layer_of_channel]
        self.center.copy_(torch.where(first, block.mean, self.center))

        a = block.mean - self.center
        q = a.square().addcdiv_(block.m2, block.channel_count().clamp(min=1.0))
        delta_a, delta_q = a.sub_(self.mean_a), q.sub_(self.mean_q)
        self.mean_a.addcmul_(delta_a, step)
        self.mean_q.addcmul_(delta_q, step)
        self.aa.addcmul_(delta_a.square(), gain)
        self.aq.addcmul_(delta_a * delta_q, gain)
        self.qq.addcmul_(delta_q.square(), gain)
        self.weight = total
        self.count.add_(block.count)
        self.num_blocks.add_(block.count > 0)

    def about(self, mean: Tensor, reference_var: Tensor) -> "SpreadSums":
        """The sums over blocks that standard errors need, about a given mean and variance."""
        weight = self.weight[self.layer_of_channel]
        d = mean - self.center
        m_square = self.aa + weight * (self.mean_a - d).square()
        offset = self.mean_q - 2.0 * d * self.mean_a + d.square() - reference_var
        u_square = (self.qq - 4.0 * d * self.aq + 4.0 * d.square() * self.aa).clamp(min=0.0)
        u_square = u_square + weight * offset.square()
        return SpreadSums(self.num_blocks, self.count, self.weight, m_square, weight * offset, u_square)


class _Level:
    """Blocks of one size: their spread, and the block that waits for its neighbour."""

    def __init__(self, spread: BatchSpread) -> None:
        self.spread = spread
        self.pending: _FlatMoments | None = None
