"""Fresh layers: whose running statistics are still, wholly or in part, those that they began with."""

from torch import nn

from precisebn.models.families import populations_of
from precisebn.nn.population import RunningStatistics

__all__ = ["is_fresh", "trains_statistics"]


def is_fresh(layer: nn.Module) -> bool:
    """Whether the initial values (mean 0, variance 1) make up more than 5% of the running statistics of a layer."""
    return any(_is_initial(one) or _weight_of_initial(layer, one) > 0.05 for one in populations_of(layer))


def _is_initial(one: RunningStatistics) -> bool:
    return not bool(one.mean.any()) and bool((one.var == 1).all())


def _weight_of_initial(layer: nn.Module, one: RunningStatistics) -> float:
    """What is left of them in the moving average. A count of 0 beside other values is that of an old checkpoint."""
    momentum = getattr(layer, "momentum", None)
    number = float(one.num_batches) if one.num_batches is not None else 0.0
    return (1.0 - momentum) ** number if isinstance(momentum, float) and number else 0.0


def trains_statistics(layer: nn.Module) -> bool:
    """Whether a layer keeps running statistics, in the mode in which they move."""
    return layer.training and len(populations_of(layer)) > 0
