"""Running statistics: that they are numbers, that they have been measured, and that they will be."""

import math
from collections.abc import Callable, Iterator

import torch

from precisebn._reports import counted
from precisebn.auditing.check import Problem, check
from precisebn.auditing.finding import Severity
from precisebn.auditing.norms import is_at_initial_values, is_training, keepers, keeps_moving, kept, trains
from precisebn.auditing.optimizers import optimizers_of
from precisebn.auditing.remedies import MEASURE, measure
from precisebn.auditing.subject import Subject
from precisebn.nn.population import RunningStatistics

__all__ = [
    "cumulative_average_that_starts_over",
    "domains_never_measured",
    "layers_never_measured",
    "momentum_for_this_many_steps",
    "negative_variances",
    "not_finite",
    "useless_momentum",
]


@check(
    "PBN201", "error", "running statistics that are NaN or infinite",
    source="https://github.com/pytorch/pytorch/issues/1206",
)  # fmt: skip
def not_finite(subject: Subject) -> Iterator[Problem]:
    """One mini-batch with a NaN is enough: a moving average never forgets it."""
    broken = _where(subject, lambda one: not (_all_finite(one.mean) and _all_finite(one.var)))
    if broken:
        yield Problem(
            "Their running mean or variance holds NaN or infinity, and in eval mode so does every output.",
            f"{measure(subject, broken)} measures them anew, and names the layer where data has NaN.",
            broken,
        )


@check(
    "PBN202", "error", "negative running variances",
    source="https://github.com/shicai/MobileNet-Caffe/issues/87",
)  # fmt: skip
def negative_variances(subject: Subject) -> Iterator[Problem]:
    """From ``E[x^2] - E[x]^2``, from averages with negative weights, from other libraries' rescaling."""
    negative = _where(subject, lambda one: bool(torch.any(one.var < 0)))
    if negative:
        yield Problem(
            "Their running variance is negative in places, where an output is NaN, or far too large.",
            f"{measure(subject, negative)} measures them anew, exactly.",
            negative,
        )


@check(
    "PBN203", "warning", "running statistics never measured",
    source="https://github.com/LaurentMazare/tch-rs/issues/628",
)  # fmt: skip
def layers_never_measured(subject: Subject) -> Iterator[Problem]:
    """Mean 0 and variance 1: in a new model all of them; if only some, a part was never run, or never loaded."""
    layers = keepers(subject)
    initial = [name for name, layer in layers.items() if is_at_initial_values(kept(layer))]
    if initial and len(initial) == len(layers) and any(one.state for one in optimizers_of(subject.optimizer)):
        yield Problem(
            "The optimizer has made steps, and all running statistics are still those of a new model, mean 0 and "
            "variance 1: it was trained in eval mode, or the statistics of a copy have moved.",
            "model.train() before training, or freeze(model, affine=True), if they are meant to stand still; "
            f"{measure(subject, initial)} measures them.",
            initial,
        )
    elif initial and len(initial) == len(layers):
        yield Problem(
            "All running statistics are those of a new model, mean 0 and variance 1.",
            f"{measure(subject, initial)} measures them, if the model is not to be trained.",
            initial,
            "note",
        )
    elif initial:
        yield Problem(
            "Their running statistics are those of a new layer, mean 0 and variance 1, while those of other layers "
            "have been measured: they were left out of a checkpoint, or of every forward.",
            "update_bn_stats(model, loader, None, modules=[...]) measures those that it is given; look into what "
            "load_state_dict returns.",
            initial,
        )


@check(
    "PBN204", "warning", "domains never measured",
    source="Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 5",
)  # fmt: skip
def domains_never_measured(subject: Subject) -> Iterator[Problem]:
    """A population of a layer that no mini-batch came to, beside others that were measured."""
    never = []
    for name, layer in keepers(subject).items():
        populations = kept(layer)
        initial = [one for one in populations if is_at_initial_values([one]) and _is_new(one)]
        if len(initial) < len(populations):
            never += [one.named(name) for one in initial if one.index is not None]
    if never:
        yield Problem(
            "No mini-batch of these domains was ever seen, and at test time they are normalized by mean 0 and "
            "variance 1.",
            "update_bn_stats(model, loader, None, modules='all', forward=...) with mini-batches of these domains "
            "measures them.",
            never,
        )


@check(
    "PBN205", "warning", "a cumulative average that starts over",
    source="https://github.com/pytorch/pytorch/pull/5766",
)  # fmt: skip
def cumulative_average_that_starts_over(subject: Subject) -> Iterator[Problem]:
    """With ``momentum=None`` mini-batch n has the weight 1/n: the first one replaces whatever was loaded."""
    forgetful = [
        name
        for name, layer in subject.norms.items()
        if keeps_moving(layer) and getattr(layer, "momentum", 0.1) is None
        and any(one.num_batches is not None and _is_new(one) and not is_at_initial_values([one]) for one in kept(layer))
    ]  # fmt: skip
    if forgetful:
        yield Problem(
            "momentum is None and num_batches_tracked is 0, so that the first mini-batch in training mode replaces "
            "statistics that have been measured, or loaded, before.",
            "layer.num_batches_tracked.fill_(n) says how many mini-batches they stand for; or layer.momentum = 0.1.",
            forgetful,
        )


# A moving average of independent mini-batches with weights m (1-m)^k has m / (2-m) of the variance of one, as the mean
# of (2-m) / m mini-batches has: at the default of 0.1 of 19, from 0.5 on of fewer than 3.
_LARGE = 0.5


@check(
    "PBN206", "note", "a momentum at which the moving average averages nothing",
    source="https://github.com/pytorch/vision/issues/8250",
)  # fmt: skip
def useless_momentum(subject: Subject) -> Iterator[Problem]:
    """Torch's momentum is the weight of the new value; TensorFlow's 0.99 is 0.01 here. It matters only in training."""
    by_momentum = _by_momentum(subject)
    severity: Severity | None = "warning" if trains(subject) else None
    for momentum, names in by_momentum.items():
        if momentum is None or 0 < momentum <= _LARGE:
            continue
        if momentum == 0:
            yield Problem(
                "momentum is 0, so that the running statistics never move.",
                "layer.momentum = 0.1, torch's default; freeze(model, ...), if they are to stand still.",
                names,
                severity,
            )
        elif not 0 < momentum <= 1:
            yield Problem(
                f"momentum is {momentum:g}: outside of 0 to 1 the moving average is none, and variances get negative.",
                "layer.momentum = 0.1, torch's default.",
                names,
                "error",
            )
        else:
            better = f"{1 - momentum:.4g}, if it is meant as TensorFlow means it" if momentum < 1 else "0.1"
            yield Problem(
                f"momentum is {momentum:g}, the weight of the new mini-batch: the statistics are as noisy as those of "
                f"{_mini_batches((2 - momentum) / momentum)}, whatever came before.",
                f"layer.momentum = {better}; or call {MEASURE} after training.",
                names,
                severity,
            )


# What a running mean began with still has the weight (1-m)^steps in it. Where that is more than a tenth, a mean that
# began 1 standard deviation off ends more than 0.1 off, more than the noise of the mean of 100 mini-batches' means.
_REMEMBERED = 0.1


@check(
    "PBN207", "warning", "a momentum too small, or too long a memory, for this many steps", needs=("num_steps",),
    source="Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 3",
)  # fmt: skip
def momentum_for_this_many_steps(subject: Subject) -> Iterator[Problem]:
    """How much of what the statistics began with is left at the end, ``(1 - momentum) ** num_steps``."""
    steps = subject.num_steps
    assert steps is not None  # needed
    for momentum, names in _by_momentum(subject).items():
        if momentum is None:
            yield Problem(
                f"momentum is None, so that all of {counted(steps, 'mini-batch')} count alike: those of the first "
                "weights as much as those of the last.",
                f"layer.momentum = 0.1, torch's default; or call {MEASURE} after training.",
                names,
                "note",
            )
        elif 0 < momentum <= _LARGE and (left := (1 - momentum) ** steps) > _REMEMBERED:
            enough = 1 - _REMEMBERED ** (1 / steps)
            yield Problem(
                f"With momentum {momentum:g}, after {counted(steps, 'step')} the running statistics are still "
                f"{left:.0%} of what they began with.",
                f"layer.momentum = {_rounded_up(enough):g} or more; or call {MEASURE} after training.",
                names,
            )


def _by_momentum(subject: Subject) -> dict[float | None, list[str]]:
    """Names of layers whose running statistics a training would move, by momentum."""
    found: dict[float | None, list[str]] = {}
    for name, layer in subject.norms.items():
        # A layer in eval mode in a model in training mode is meant to stand still.
        if keeps_moving(layer) and (layer.training or not is_training(subject)):
            found.setdefault(getattr(layer, "momentum", 0.1), []).append(name)
    return found


def _where(subject: Subject, is_wrong: Callable[[RunningStatistics], bool]) -> list[str]:
    """Names of layers with a population of which this is true, the population named where there are several."""
    return [one.named(name) for name, layer in keepers(subject).items() for one in kept(layer) if is_wrong(one)]


def _all_finite(statistics: torch.Tensor) -> bool:
    return bool(torch.isfinite(statistics).all())


def _is_new(population: RunningStatistics) -> bool:
    """Whether it has counted no mini-batch; true where it does not count."""
    return population.num_batches is None or int(population.num_batches) == 0


def _mini_batches(number: float) -> str:
    return "a single mini-batch" if round(number, 1) <= 1 else f"{number:.2g} mini-batches"


def _rounded_up(momentum: float) -> float:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(momentum))
    return min(math.ceil(momentum / unit) * unit, 1.0)
