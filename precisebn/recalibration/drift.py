"""Drift: how far the old statistics are from the new, worked out when somebody asks for it.

All layers of a device at once, and after everything else: a report that nobody reads costs no comparison, which of a
run of one mini-batch would be felt. What it is made of are values alone, so that a report keeps no layer alive.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from precisebn.recalibration.report import LayerReport
from precisebn.statistics.estimator import Population, is_dead
from precisebn.statistics.flat_moments import per_channel

__all__ = ["Drift"]


class Drift(NamedTuple):
    """Of L populations of one device with S channels in all: the statistics before and after, on the CPU.

    Attributes:
        names: of the populations.
        num_channels: of each.
        eps: what each adds to its variance.
        layer_of_channel: ``(S,)``.
        old: mean and variance before, ``(S,)`` each, float64.
        new: the same after.
        population: what is known of the data.
    """

    names: list[str]
    num_channels: list[int]
    eps: list[float]
    layer_of_channel: Tensor
    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    population: Population

    def reports(self) -> list[LayerReport]:
        """What to say of each population."""
        (old_mean, old_var), (mean, var) = self.old, self.new
        eps = per_channel(mean.new_tensor(self.eps), self.layer_of_channel)
        scale = var + eps
        drifts = torch.stack(
            [(old_mean - mean).abs() / scale.sqrt(), ((old_var.clamp(min=0.0) + eps) / scale).log().abs()]
        )
        # Of dead channels they would say how far the old mean is in units of eps, which is nothing of the data's.
        alive = ~is_dead(var, eps)
        drifts = drifts.where(alive, 0.0)
        zeros = drifts.new_zeros(3, len(self.names))
        layers = self.layer_of_channel.expand(3, -1)
        *squares, living = zeros.scatter_add(1, layers, torch.cat([drifts.square(), alive.double().unsqueeze(0)]))
        mean_drift, var_drift = (torch.stack(squares) / living.clamp(min=1.0)).sqrt().tolist()
        max_mean_drift, max_var_drift = zeros[:2].scatter_reduce(1, layers[:2], drifts, "amax").tolist()
        dead = (number - int(alive) for number, alive in zip(self.num_channels, living.tolist(), strict=True))
        population = self.population
        columns = (
            self.names, self.num_channels, dead,
            map(int, population.num_batches.tolist()), map(int, population.count.tolist()),
            mean_drift, max_mean_drift, var_drift, max_var_drift,
            population.mean_error.tolist(), population.var_error.tolist(),
        )  # fmt: skip
        return [LayerReport(*row) for row in zip(*columns, strict=True)]
