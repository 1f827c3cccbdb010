"""PopulationEstimator: the Moments of many layers in one flat float64 buffer, and how far to trust them.

Every layer owns a slice of the same few flat tensors, so that taking in mini-batches, measuring the standard errors and
merging ranks are a handful of operations on whole tensors, however many layers there are. Mini-batches are taken in
several at a time: for a small network on a small mini-batch, even a handful of operations would be felt.

The standard errors come from batch means: mini-batches, not values, are the independent observations, because the
values inside one (neighbouring pixels, above all) are correlated. Where mini-batches themselves are correlated (frames
of one video, an unshuffled loader), neighbouring ones are merged into blocks of 2, 4, 8, ... and the largest error
over those block sizes that still have enough blocks is reported (Flyvbjerg & Petersen, "Error estimates on averages of
correlated data", 1989). So the assumption left is that correlation dies out within a fraction of the run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from precisebn.statistics.block_moments import BlockDeviations, BlockMoments, Level
from precisebn.statistics.flat_moments import FlatMoments, per_channel
from precisebn.statistics.moments import Moments

__all__ = ["ESTIMATORS", "MIN_BLOCKS", "EstimatorName", "Population", "PopulationEstimator", "is_dead"]

EstimatorName = Literal["population", "batch-mean"]
ESTIMATORS: tuple[EstimatorName, ...] = ("population", "batch-mean")


MIN_BLOCKS = 8
"""Fewest blocks from which a standard error is computed; below, its own relative error would exceed 1/4."""


def _max_waiting(size: int) -> int:
    """How many mini-batches of ``size`` numbers are taken in at once.

    To take some in costs as many operations, however many they are: enough that a network of a few small layers would
    feel it after every 16. So there up to 256 wait, within half a mebibyte; of a large one the memory counts.
    """
    return min(max(16, (1 << 16) // size), 256)


def is_dead(var: Tensor, eps: Tensor | float) -> Tensor:
    """Which channels are constant, as far as a layer can tell that adds ``eps`` to their variances.

    What a layer puts out has variance ``var / (var + eps)``: nearly 1, or nearly 0 where ``eps`` is all it divides by.
    A channel is dead where the standard deviation of its output is at most 1/100. In units of ``sqrt(var + eps)``,
    which there is ``sqrt(eps)``, errors of a dead channel mean nothing: they tell of ``eps`` and not of the data.
    """
    return var <= 1e-4 * eps


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
            mean square over the layer's channels but dead ones (:func:`is_dead`), ``(L,)``; NaN where fewer than
            ``MIN_BLOCKS`` mini-batches were seen.
        var_error: standard error of the variance relative to ``var + eps``, likewise.
    """

    count: Tensor
    num_batches: Tensor
    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor

    def cpu(self) -> "Population":
        """The same on the CPU."""
        return Population(*(getattr(self, field.name).cpu() for field in fields(self)))


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
        ...     is_finite = estimator.end_batch()
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
            torch.arange(len(self.num_channels), device="cpu"),
            torch.tensor(self.num_channels, dtype=torch.int64, device="cpu"),
        ).to(device if device is not None else torch.get_default_device())
        size = len(self.num_channels) + 2 * self.layer_of_channel.numel()
        self._current = torch.zeros(size, dtype=torch.float64, device=device)
        self._waiting = self._current.new_empty(_max_waiting(size), size)  # rows are written before they are read
        self._num_waiting = 0
        self._num_merged = 0  # of those that wait
        self._slots = self._slots_of(FlatMoments(self._current, self.layer_of_channel))

        self._population = FlatMoments(torch.zeros_like(self._current), self.layer_of_channel)
        self.num_batches = torch.zeros_like(self._population.count)
        # The plain averages of the mini-batches' means and variances, where these are asked for.
        averaged = self._population.mean if kind == "batch-mean" else self._population.mean[:0]
        self._average_mean, self._average_var = torch.zeros_like(averaged), torch.zeros_like(averaged)
        self._first_nonfinite: Tensor | None = None  # made when there is something to look for
        self._is_suspicious = False  # whether any that is not merged yet may hold NaN or Inf
        self._levels: list[Level] = []
        self._num_taken_in = 0

    def slot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the moments of the current mini-batch at one layer are merged: count ``(1,)``, mean and m2 ``(C,)``.

        Views of the flat buffer, the same ones every time: writing to them in place is the interface.
        """
        return self._slots[layer]

    def slots(self, first: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same for M consecutive layers, ``number``, of C channels each: count ``(M,)``, mean and m2 ``(M, C)``."""
        flat = FlatMoments(self._current, self.layer_of_channel)
        offset, channels = sum(self.num_channels[:first]), self.num_channels[first]
        mean, m2 = (part.narrow(0, offset, number * channels).view(number, channels) for part in (flat.mean, flat.m2))
        return flat.count.narrow(0, first, number), mean, m2

    def end_batch(self) -> bool:
        """Close the current mini-batch and start the next from nothing.

        Returns:
            Whether it is free of NaN and Inf, as far as that can be told without waiting for a device: on the CPU.
        """
        is_finite = self._current.device.type == "cpu" and math.isfinite(self._current.sum().item())
        self._is_suspicious |= not is_finite
        self._waiting.select(0, self._num_waiting).copy_(self._current)
        self._current.zero_()
        self._num_waiting += 1
        if self._num_waiting == len(self._waiting):
            self._take_in_blocks()
        return is_finite

    def moments(self, layer: int) -> Moments:
        """Moments of all values that one layer has seen."""
        population = self.population
        return Moments(
            population.count[layer],
            population.mean.split(self.num_channels)[layer],
            population.m2.split(self.num_channels)[layer],
        )

    @property
    def device(self) -> torch.device:
        """Where the buffers live."""
        return self._current.device

    @property
    def population(self) -> FlatMoments:
        """Moments of all values of all mini-batches that have ended."""
        self._merge_waiting()
        return self._population

    @property
    def first_nonfinite(self) -> Tensor:
        """The mini-batch, counted from 0, in which each channel first met NaN or Inf; -1 if none did. ``(S,)``."""
        self._merge_waiting()
        if self._first_nonfinite is None:
            return torch.full_like(self._population.mean, -1, dtype=torch.int64)
        return self._first_nonfinite.where(self._first_nonfinite.isfinite(), -1.0).long()

    def met_nonfinite(self) -> bool:
        """Whether any channel has met NaN or Inf in a mini-batch that has ended. Waits for the device."""
        self._merge_waiting()
        return self._first_nonfinite is not None and bool(self._first_nonfinite.isfinite().any())

    @property
    def num_levels(self) -> int:
        """How many block sizes there are; ranks must agree on the largest before :meth:`result`."""
        return (self._num_taken_in + self._num_waiting).bit_length()

    def result(
        self, eps: Tensor, *, all_reduce: Callable[[Tensor], None] | None = None, num_levels: int | None = None
    ) -> Population:
        """The statistics of all mini-batches so far, and their standard errors. Changes nothing: more may follow.

        Args:
            eps: what each layer adds to its variance, ``(L,)``.
            all_reduce: adds a flat float64 tensor up over all ranks, in place; called twice. None: there is one rank.
            num_levels: the largest ``num_levels`` of any rank; None: this rank's.
        """
        if all_reduce is None:  # blocks of other sizes are too few for an error, and are not looked at
            num_levels = ((self._num_taken_in + self._num_waiting) // MIN_BLOCKS).bit_length()
        elif num_levels is None:
            num_levels = self.num_levels
        if num_levels > 0:
            self._take_in_blocks()
        count, mean, within, num_batches, average = self._merge_counts_and_means(all_reduce)
        channel_count = per_channel(count, self.layer_of_channel).clamp(min=1.0)

        # Second sum over ranks: now that all know the mean, deviations from it, of values and of blocks. The blocks'
        # variances deviate from the mean variance within ranks, which all know by now as well: the variance itself is
        # what this very sum brings.
        reference = within / channel_count
        own_m2 = self.population.m2
        blocks = self._deviations(num_levels, mean, reference)
        if all_reduce is not None:
            own_m2 = own_m2 + self.population.channel_count * (self.population.mean - mean).square()
            flat = torch.cat([own_m2, *(part.flatten() for part in blocks)])
            all_reduce(flat)
            own_m2, *parts = flat.split([own_m2.numel(), *(part.numel() for part in blocks)])
            blocks = BlockDeviations(*(part.view_as(old) for part, old in zip(parts, blocks, strict=True)))
        var = own_m2 / channel_count
        if num_levels > 0:
            mean_error, var_error = self._layer_errors(blocks, channel_count, var, var - reference, eps)
        else:
            mean_error, var_error = torch.full_like(count, math.nan).expand(2, -1)
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
            average = (self._average_mean.clone(), self._average_var.clone()) if averaging else None
            return own.count, own.mean, own.m2, self.num_batches.clone(), average
        num_batches = per_channel(self.num_batches, self.layer_of_channel)
        averages = (num_batches * self._average_mean, num_batches * self._average_var) if averaging else ()
        flat = torch.cat([own.count, self.num_batches, own.channel_count * own.mean, own.m2, *averages])
        all_reduce(flat)
        num_layers, num_flat = own.count.numel(), own.mean.numel()
        count, batches, total, m2, *sums = flat.split([num_layers] * 2 + [num_flat] * (2 + len(averages)))
        num_batches = per_channel(batches, self.layer_of_channel).clamp(min=1.0)
        average = (sums[0] / num_batches, sums[1] / num_batches) if averaging else None
        return count, total / per_channel(count, self.layer_of_channel).clamp(min=1.0), m2, batches, average

    def _deviations(self, num_levels: int, mean: Tensor, reference_var: Tensor) -> BlockDeviations:
        """How far the blocks of so many sizes lie apart, a size in a row; 0 where there are none yet."""
        levels = [level.moments for level in self._levels[:num_levels]]
        layers, channels = len(self.num_channels), mean.numel()
        shapes = [(num_levels, 3, layers), *[(num_levels, channels)] * 3]
        if not levels:
            return BlockDeviations(*map(mean.new_zeros, shapes))
        found = BlockMoments.stacked(levels).about(mean, reference_var)
        if len(levels) == num_levels:
            return found
        return BlockDeviations(*(
            torch.cat([part, part.new_zeros(num_levels - len(levels), *part.shape[1:])]) for part in found
        ))  # fmt: skip

    def _layer_errors(
        self, blocks: BlockDeviations, channel_count: Tensor, var: Tensor, var_offset: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Standard errors per layer, in the layer's own units: the largest of the block sizes with enough blocks."""
        number, covered, weight = blocks.of_layers.unbind(1)
        factor = per_channel(number / (number - 1.0).clamp(min=1.0) / covered.clamp(min=1.0), self.layer_of_channel)
        factor = factor / channel_count
        about_var = blocks.u_square - 2.0 * var_offset * blocks.u
        about_var = about_var + per_channel(weight, self.layer_of_channel) * var_offset.square()
        eps = per_channel(eps, self.layer_of_channel)
        scale, alive = var + eps, ~is_dead(var, eps)
        squares = torch.stack([blocks.m_square * factor / scale, about_var.clamp(min=0.0) * factor / scale.square()])
        sums = self._layer_sums(torch.cat([squares.where(alive, 0.0).flatten(0, 1), alive.double().unsqueeze(0)]))
        errors = (sums[:-1] / sums[-1].clamp(min=1.0)).sqrt().view(2, *number.shape)
        worst = errors.where(number >= MIN_BLOCKS, -1.0).amax(1)
        mean_error, var_error = worst.where(worst >= 0.0, math.nan)
        return mean_error, var_error

    def _layer_sums(self, values: Tensor) -> Tensor:
        """Sums over the channels of each layer, of ``(..., S)``, the same bits every time: no atomics."""
        of_layers: tuple[Tensor, ...] = values.split(self.num_channels, -1)
        return torch.stack([layer.sum(-1) for layer in of_layers], -1)

    def _take_in_blocks(self) -> None:
        """Take the mini-batches that wait into the blocks as well; none waits any more."""
        if self._num_waiting == 0:
            return
        self._merge_waiting()
        self._push(FlatMoments(self._waiting[: self._num_waiting], self.layer_of_channel))
        self._num_taken_in += self._num_waiting
        self._num_waiting = self._num_merged = 0

    def _merge_waiting(self) -> None:
        """Merge the mini-batches that wait into the population and the averages.

        They go on waiting: a run of fewer than ``MIN_BLOCKS`` has no use for blocks, which take as long as the rest.
        """
        if self._num_waiting == self._num_merged:
            return
        batches = FlatMoments(self._waiting[self._num_merged : self._num_waiting], self.layer_of_channel)
        if self._is_suspicious:
            self._note_nonfinite(batches)
            self._is_suspicious = False
        if self.kind == "batch-mean":
            self._average(batches)
        merged = batches.merged()
        if self._num_taken_in + self._num_merged == 0:  # nothing to merge with, which is half of a short run's time
            self._population = FlatMoments(merged.buffer.clone(), self.layer_of_channel)
        else:
            self._population = self._population.merged_with(merged)
        self.num_batches.add_((batches.count > 0).sum(0))
        self._num_merged = self._num_waiting

    def _note_nonfinite(self, batches: FlatMoments) -> None:
        """Remember the mini-batch in which a channel first met NaN or Inf, without asking the device for it."""
        bad = batches.m2 - batches.m2 != 0  # 0 but for NaN and Inf; in half the time of isfinite
        first = self._num_taken_in + self._num_merged
        numbers = torch.arange(first, first + len(batches), dtype=torch.float64, device=self.device)
        # In float64, of which amin takes a tenth of the time of int64's or of argmax.
        own = numbers.unsqueeze(1).where(bad, math.inf).amin(0)
        self._first_nonfinite = own if self._first_nonfinite is None else torch.minimum(self._first_nonfinite, own)

    def _average(self, batches: FlatMoments) -> None:
        """Add mini-batches to the plain averages, all that reached a layer weighing the same."""
        channel_count = batches.channel_count
        reached = channel_count > 0
        unbiased = batches.m2 / (channel_count - 1.0).clamp(min=1.0)
        seen = per_channel(self.num_batches, self.layer_of_channel) + reached.sum(0)
        for average, values in ((self._average_mean, batches.mean), (self._average_var, unbiased)):
            average.add_(((values - average) * reached).sum(0).div_(seen.clamp(min=1.0)))

    def _push(self, blocks: FlatMoments) -> None:
        """Record blocks of mini-batches at their level; pairs of neighbours go, merged, a level up."""
        for i in range(64):
            if i == len(self._levels):
                self._levels.append(Level(BlockMoments(self.layer_of_channel, len(self.num_channels))))
            level = self._levels[i]
            level.moments.add(blocks, self._population.mean)
            if level.pending is not None:
                blocks = level.pending.followed_by(blocks)
            level.pending = blocks.last() if len(blocks) % 2 else None
            if len(blocks) < 2:
                return
            blocks = blocks.merged_pairs()

    def _slots_of(self, moments: FlatMoments) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Views of each layer's part."""
        mean, m2 = moments.mean.split(self.num_channels), moments.m2.split(self.num_channels)
        return list(zip(moments.count.split(1), mean, m2, strict=True))
