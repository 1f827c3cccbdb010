"""The prior: present running statistics that count as so many samples beside those of the target data.

Schneider et al. 2020 ("Improving robustness against common corruptions by covariate shift adaptation", section 3) mix
source and target statistics *in the forward*: a layer normalizes by what will be deployed, and the layers behind it are
measured under that. For the statistics of one mini-batch this is exact, layer by layer. Of several, each is normalized
by the mixture of the source with its own statistics, at the weight that all of them together will have in the end: then
the result hardly depends on how the data was cut into mini-batches, and without a prior it is that of PreciseBN.
(Mixing with the Moments of all mini-batches so far, or a second pass under the result of the first, depends on the cut
ten times as much, and costs more: ``python -m benchmarks --only prior``.)
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from precisebn.distributed import Ranks
from precisebn.errors import InputError, NonFiniteStatisticsError
from precisebn.models.families import populations_of

__all__ = ["Mixture", "Prior"]


class Prior:
    """How much the present statistics weigh against those of the data.

    Args:
        size: as how many samples they count; ``math.inf`` for nothing but them.

    Attributes:
        samples: of the data, over all ranks: all that will be seen; or, where that is not known, those seen so far.
    """

    def __init__(self, size: float) -> None:
        self.size = size
        self.samples = 0.0

    def weight(self, share: float) -> float:
        """The weight of the present statistics beside those of a share of the data."""
        if self.size == 0 or not math.isfinite(self.size):
            return 0.0 if self.size == 0 else 1.0
        return self.size / (self.size + share * self.samples)

    def mixtures(self, layers: Mapping[str, nn.Module], ranks: Ranks, *, averages: bool) -> "dict[str, Mixture]":
        """One for each layer, by name; none without a prior.

        Ranks that trained together have slightly different running statistics: their average is the prior of all.

        Args:
            layers: with running statistics, the same on all ranks.
            ranks: those that work together.
            averages: whether unbiased variances are what will be deployed.

        Raises:
            NonFiniteStatisticsError: present statistics of NaN or Inf.
            InputError: a present variance below zero.
        """
        if self.size == 0:
            return {}
        present = {
            name: torch.stack([torch.stack([one.mean, one.var]).double() for one in populations_of(layer)])
            for name, layer in layers.items()
        }
        flat = torch.cat([statistics.flatten().cpu() for statistics in present.values()])
        ranks.all_reduce(flat.div_(ranks.size))
        parts = flat.split([statistics.numel() for statistics in present.values()])
        for (name, statistics), part in zip(present.items(), parts, strict=True):
            if not bool(part.isfinite().all()):
                raise NonFiniteStatisticsError(
                    f"the present statistics of layer {name!r} hold NaN or Inf: no prior; pass prior=0"
                )
            if bool((part.view_as(statistics)[:, 1] < 0).any()):
                raise InputError(
                    f"the present variance of layer {name!r} is negative in some channels: no prior; pass prior=0, "
                    "which replaces it"
                )
            statistics.copy_(part.view_as(statistics))
        return {name: Mixture(self, statistics, averages) for name, statistics in present.items()}


class Mixture:
    """Of one layer: its statistics in a mini-batch, mixed with the present ones, for each of its populations.

    A layer with several populations weighs each against its own part of the data, as far as that has been seen.

    Args:
        prior: how much the present statistics weigh.
        present: mean and variance of each population, float64 ``(K, 2, C)``.
        averages: whether unbiased variances are what will be deployed.

    Attributes:
        present: as given.
    """

    def __init__(self, prior: Prior, present: Tensor, averages: bool) -> None:
        self._prior = prior
        self.present = present
        self._counts = [0.0] * len(present)
        self._averages = averages

    def of(self, counts: Sequence[float], means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """What normalizes a mini-batch.

        Args:
            counts: values per channel of each population in it.
            means: ``(K, C)``.
            variances: biased, ``(K, C)``.

        Returns:
            Mean and variance, float64 ``(K, C)``; the present ones of populations without values.
        """
        self._counts = [seen + count for seen, count in zip(self._counts, counts, strict=True)]
        total = max(sum(self._counts), 1.0)
        weights = [
            self._prior.weight(seen / total) if count > 0 else 1.0
            for seen, count in zip(self._counts, counts, strict=True)
        ]
        unbiased = [count / max(count - 1.0, 1.0) if self._averages else 1.0 for count in counts]
        weight, factor = means.new_tensor([weights, unbiased], dtype=torch.float64).unsqueeze(-1)
        return (
            torch.lerp(means.double(), self.present[:, 0], weight),
            torch.lerp(variances.double() * factor, self.present[:, 1], weight),
        )
