"""The commit: the new running statistics of all layers, checked, and then written in place.

All layers of a device are worked on together, as flat tensors: a small network has as many layers as a large one, and a
handful of operations on each of them would cost more than its forward.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from precisebn.distributed import Ranks, Tally
from precisebn.errors import NonFiniteStatisticsError
from precisebn.recalibration.drift import Drift
from precisebn.recalibration.forwards import REASONS
from precisebn.recalibration.loop import merged_over_ranks
from precisebn.recalibration.recording import RecordedPopulation, Recording
from precisebn.recalibration.report import LayerReport
from precisebn.statistics.estimator import Population, PopulationEstimator
from precisebn.statistics.flat_moments import per_channel

__all__ = ["Changes", "Commit"]

SET_ASIDE = "put into eval mode or paused by the model's own forward (modules='all' takes any mode)"


class Changes(NamedTuple):
    """Populations that are to be written, what to say of each, and the standard errors of all."""

    populations: Sequence[RecordedPopulation] = ()
    reports: Callable[[], tuple[LayerReport, ...]] = tuple
    errors: Sequence[float] = ()


class Commit:
    """What is to be written, and what is not; nothing has been written yet.

    Args:
        recording: with all mini-batches in it, and stopped.
        ranks: those that work together.
        total: sums over the ranks.
        most: maxima over the ranks.
        prior: as how many samples the present statistics count.

    Attributes:
        changes: the populations that are to be written.
        skipped: layers that are left alone, with the reason.

    Raises:
        NonFiniteStatisticsError: new statistics that do not fit the dtype of their buffers.
    """

    def __init__(self, recording: Recording, ranks: Ranks, total: Tally, most: Tally, prior: float) -> None:
        self._tracked, refused = _facts_of_all_ranks(recording, ranks)
        self._populations = recording.populations
        merged = dict(zip(recording.estimators, merged_over_ranks(recording, ranks, most), strict=True))
        groups = {}
        for estimator in recording.estimators:
            members = [one for one in recording.populations if one.estimator is estimator]
            groups[estimator] = _Group(members, merged[estimator].cpu(), estimator.layer_of_channel.cpu())

        reached = {estimator: group.population.num_batches.tolist() for estimator, group in groups.items()}
        self._reached = [int(reached[one.estimator][one.position]) for one in recording.populations]
        self.skipped: dict[str, str] = {}
        self._changed: list[int] = []
        for index, one in enumerate(recording.populations):
            if refused[index]:
                self.skipped[one.name] = REASONS[refused[index]]
            elif self._reached[index] > 0:
                self._changed.append(index)
            elif one.layer in recording.set_aside:
                self.skipped[one.name] = SET_ASIDE
            elif one.statistics.index is not None:
                self.skipped[one.name] = "no sample of the domain was seen"
            elif recording.was_called(index):
                self.skipped[one.name] = "mini-batches without a sample"
            else:
                self.skipped[one.name] = "no mini-batch came through __call__"

        changed = [recording.populations[index] for index in self._changed]
        for estimator, group in groups.items():
            group.update([one for one in changed if one.estimator is estimator], total.samples, prior)
        self.changes = Changes(changed, _reports_of(changed, groups), _errors_of(changed, groups))
        self._new = [groups[one.estimator].new(one) for one in changed]

    def write(self) -> None:
        """Overwrite the running statistics in place. Whoever holds a snapshot of the model can undo it."""
        with torch.no_grad():
            for index, (mean, var) in zip(self._changed, self._new, strict=True):
                statistics = self._populations[index].statistics
                statistics.mean.copy_(mean)
                statistics.var.copy_(var)
                if statistics.num_batches is not None:
                    statistics.num_batches.fill_(self._tracked[index] + self._reached[index])


def _facts_of_all_ranks(recording: Recording, ranks: Ranks) -> tuple[list[float], list[int]]:
    """Of each population: how many mini-batches it has tracked until now, and the reason to refuse it, or 0.

    Both are the largest of any rank. Ranks that trained together have counted the same mini-batches, so that a sum
    would count them several times; and a layer with a forward of its own may have been reached on one rank only.
    """
    tracked: list[float] = [0] * len(recording.populations)
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}  # averages of counts are no integers
    for index, one in enumerate(recording.populations):
        counter = one.statistics.num_batches
        if counter is not None:
            kinds.setdefault((counter.device, counter.dtype), []).append((index, counter))
    for of_kind in kinds.values():
        numbers = torch.stack([counter.reshape(()) for _, counter in of_kind]).tolist()
        for (index, _), number in zip(of_kind, numbers, strict=True):
            tracked[index] = number
    reasons = [recording.refused.get(index, 0) for index in range(len(recording.populations))]
    if ranks.size == 1:
        return tracked, reasons
    tracked, reasons = ranks.gather([tracked, reasons], _largest)
    return tracked, reasons


def _largest(facts: list[list[list[float]]]) -> list[list[float]]:
    return [[max(of_one) for of_one in zip(*of_kind, strict=True)] for of_kind in zip(*facts, strict=True)]


class _Group:
    """The populations of one device, float64 on the CPU: L of them, with S channels in all.

    Args:
        members: in the order of their estimator.
        population: their statistics in the data.
        layer_of_channel: ``(S,)``.
    """

    def __init__(self, members: Sequence[RecordedPopulation], population: Population, layer_of_channel: Tensor) -> None:
        self.members = members
        self.population = population
        self.layer_of_channel = layer_of_channel
        self.sizes = [one.statistics.mean.numel() for one in members]
        with torch.no_grad():
            self.old = (
                torch.cat([one.present[0] for one in members]).to("cpu", torch.float64),
                torch.cat([one.present[1] for one in members]).to("cpu", torch.float64),
            )

    def update(self, changed: Sequence[RecordedPopulation], samples: int, prior: float) -> None:
        """Work out the new statistics of some of the members, the old ones counting as ``prior`` samples."""
        mean, var = self.population.mean, self.population.var
        if prior > 0:
            weight = per_channel(self._prior_weights(samples, prior), self.layer_of_channel)
            mean, var = torch.lerp(mean, self.old[0], weight), torch.lerp(var, self.old[1], weight)
        self.mean, self.var = mean, var
        self._rounded = {
            dtype: [
                (a, b) for a, b in zip(mean.to(dtype).split(self.sizes), var.to(dtype).split(self.sizes), strict=True)
            ]
            for dtype in {buffer.dtype for one in self.members for buffer in (one.statistics.mean, one.statistics.var)}
        }
        for dtype in self._rounded:
            of_dtype = [one for one in changed if dtype in (one.statistics.mean.dtype, one.statistics.var.dtype)]
            fits = mean.to(dtype).isfinite() & var.to(dtype).isfinite()
            if not bool(fits.all()):
                self._refuse_overflow(fits.split(self.sizes), of_dtype)

    def new(self, one: RecordedPopulation) -> tuple[Tensor, Tensor]:
        """New mean and variance, ``(C,)``, rounded to the dtype of the buffers."""
        statistics, position = one.statistics, one.position
        return self._rounded[statistics.mean.dtype][position][0], self._rounded[statistics.var.dtype][position][1]

    def drift(self) -> Drift:
        """The new statistics against the old, to be worked out later."""
        names, eps = [one.name for one in self.members], [one.statistics.eps for one in self.members]
        new = self.mean, self.var
        return Drift(names, self.sizes, eps, self.layer_of_channel, self.old, new, self.population)

    def _prior_weights(self, samples: int, prior: float) -> Tensor:
        """The share of the old statistics in the new, ``(L,)``.

        Where a layer has several populations, each has its part of the samples, by numbers of values.
        """
        count = self.population.count
        layers: dict[object, int] = {}
        layer = self.layer_of_channel.new_tensor([layers.setdefault(one.layer, len(layers)) for one in self.members])
        of_layer = count.new_zeros(len(layers)).index_add(0, layer, count)
        own = samples * count / of_layer[layer].clamp(min=1.0)
        return prior / (prior + own) if math.isfinite(prior) else torch.ones_like(own)

    def _refuse_overflow(self, fits: Sequence[Tensor], changed: Sequence[RecordedPopulation]) -> None:
        """Raise for the first of these that has a channel that does not fit."""
        for one in changed:
            if not bool(fits[one.position].all()):
                largest = self.var.split(self.sizes)[one.position].max().item()
                raise NonFiniteStatisticsError(
                    f"the new statistics of layer {one.name!r} overflow its {one.statistics.var.dtype} buffers "
                    f"(largest variance {largest:.3g}); keep BatchNorm layers in float32. The model is as it was"
                )


def _reports_of(
    changed: Sequence[RecordedPopulation], groups: Mapping[PopulationEstimator, _Group]
) -> Callable[[], tuple[LayerReport, ...]]:
    """What says of each population how far the old statistics are from the new, and holds on to no layer."""
    drifts = [group.drift() for group in groups.values()]
    numbers = {estimator: number for number, estimator in enumerate(groups)}
    places = [(numbers[one.estimator], one.position) for one in changed]

    def reports() -> tuple[LayerReport, ...]:
        of_groups = [drift.reports() for drift in drifts]
        return tuple(of_groups[number][position] for number, position in places)

    return reports


def _errors_of(changed: Sequence[RecordedPopulation], groups: Mapping[PopulationEstimator, _Group]) -> list[float]:
    """The standard errors of the means and of the variances of some populations."""
    errors = {
        estimator: torch.stack([group.population.mean_error, group.population.var_error], 1).tolist()
        for estimator, group in groups.items()
    }
    return [error for one in changed for error in errors[one.estimator][one.position]]
