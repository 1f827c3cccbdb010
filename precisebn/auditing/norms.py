"""What checks ask of normalization layers: which statistics they keep, whether those move, whether anything is trained.

Of layers of any library: what is known of a class stands in :mod:`precisebn.models.families`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from precisebn.auditing.averages import averages_in
from precisebn.auditing.subject import Subject
from precisebn.models.families import PAUSED, class_family, is_batch_norm, is_frozen, populations_of
from precisebn.nn.frozen import FrozenNorm
from precisebn.nn.population import RunningStatistics

__all__ = [
    "batch_norms",
    "is_at_initial_values",
    "is_fresh",
    "is_live",
    "is_training",
    "keepers",
    "keeps_moving",
    "kept",
    "trains",
]


def kept(layer: nn.Module) -> Sequence[RunningStatistics]:
    """The populations of a layer of any class that have values; none of a lazy layer, nor on the meta device."""
    return [one for one in populations_of(layer) if not (is_lazy(one.mean) or one.mean.is_meta or one.var.is_meta)]


def keepers(subject: Subject) -> dict[str, nn.Module]:
    """Layers with running statistics, those among them that never write them, of whatever library, included."""
    return {
        name: layer
        for name, layer in subject.modules.items()
        if (name in subject.norms or ((family := class_family(layer)) is not None and family.frozen)) and kept(layer)
    }


def is_live(layer: nn.Module) -> bool:
    """Whether a forward of this layer, as it is, moves its running statistics."""
    return layer.training and keeps_moving(layer)


def keeps_moving(layer: nn.Module) -> bool:
    """Whether a forward in training mode moves its running statistics."""
    return (
        len(kept(layer)) > 0
        and not isinstance(layer, FrozenNorm)
        and not is_frozen(layer)
        and PAUSED not in vars(layer)
        and bool(getattr(layer, "track_running_stats", True))
    )


def is_at_initial_values(populations: Iterable[RunningStatistics]) -> bool:
    """Whether every one is at the mean 0 and the variance 1 of a new layer."""
    return all(not torch.any(one.mean) and bool(torch.all(one.var == 1)) for one in populations)


def is_fresh(layer: nn.Module) -> bool:
    """Whether the initial values (mean 0, variance 1) make up more than 5% of the running statistics of a layer.

    How many mini-batches have been counted does not tell: a recalibration on three of them (``update_bn_stats``,
    ``torch.optim.swa_utils.update_bn``) counts three, and leaves nothing of the initial values. But a moving average
    still holds its part of the initial variance, for no mini-batch takes away of a variance; so where a channel has
    less than that part, the statistics have been measured. (Where none has, it is taken for fresh, and not complained
    of: variances of a network's layers that are all near 1 or above are rare.)
    """
    return any(is_at_initial_values([one]) or _is_moving_average_of_initial(layer, one) for one in kept(layer))


def _is_moving_average_of_initial(layer: nn.Module, one: RunningStatistics) -> bool:
    momentum = getattr(layer, "momentum", None)
    # A count of 0 beside other values is that of an old checkpoint.
    number = float(one.num_batches) if one.num_batches is not None else 0.0
    weight = (1.0 - momentum) ** number if isinstance(momentum, float) and number else 0.0
    if weight <= 0.05:
        return False
    rounding = number * torch.finfo(one.var.dtype).eps  # relative, of as many updates
    return bool(one.var.min() >= weight * (1.0 - rounding))


def is_training(subject: Subject) -> bool:
    """Whether the model as a whole is in training mode; not a wrapper around it, which is made in training mode."""
    model = subject.modules[""]
    if model in averages_in(subject.model).values():  # timm's, which keeps the model as any other child
        model = model.get_submodule("module")
    return model.training


def trains(subject: Subject) -> bool:
    """Whether what was given with the model says that it is about to be trained."""
    return subject.optimizer is not None or subject.num_steps is not None or subject.loss is not None


def batch_norms(subject: Subject) -> dict[str, nn.Module]:
    """The layers among them that normalize over a mini-batch."""
    return {name: layer for name, layer in subject.norms.items() if is_batch_norm(layer)}
