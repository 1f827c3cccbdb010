"""Averaging: averages of weights, whose running statistics are not theirs."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from precisebn.auditing.averages import averages_in, number_averaged
from precisebn.auditing.check import Problem, check
from precisebn.auditing.checks.drift import far_layers
from precisebn.auditing.observations.population import recalibration
from precisebn.auditing.subject import Subject, Unobservable
from precisebn.models.families import populations_of
from precisebn.models.selection import named_modules
from precisebn.nn.population import STATISTICS
from precisebn.statistics.estimator import MIN_BLOCKS

__all__ = ["statistics_left_behind", "statistics_of_other_weights"]

_UPDATE_BN = "https://docs.pytorch.org/docs/stable/generated/torch.optim.swa_utils.AveragedModel.html"
_REMEDY = "update_bn_stats(average, loader, None, modules='all'), after the last average and before it is used."


@check("PBN721", "note", "statistics left behind by averaging", source=_UPDATE_BN)
def statistics_left_behind(subject: Subject) -> Iterator[Problem]:
    """Without ``use_buffers`` torch copies the buffers of the last model. With a loader PBN722 measures it."""
    for name, average in averages_in(subject.model).items():
        if not isinstance(average, AveragedModel) or average.use_buffers or number_averaged(average) < 2:
            continue
        layers = [n for n, layer in subject.norms.items() if layer in set(average.modules()) and populations_of(layer)]
        if layers and not _is_measured(subject):
            of = f" ({name!r})" if name else ""
            yield Problem(
                f"the average{of} of {number_averaged(average)} models, made with use_buffers=False, has been given "
                "the running statistics of the last of them, unless it was recalibrated since; a loader= of "
                f"{MIN_BLOCKS} mini-batches and more would tell.",
                _REMEDY,
                layers,
                "warning" if _are_those_of_other(subject) else None,
            )


@check(
    "PBN722", "warning", "statistics of other weights",
    source="https://github.com/huggingface/pytorch-image-models/issues/106", needs=("loader",),
)  # fmt: skip
def statistics_of_other_weights(subject: Subject) -> Iterator[Problem]:
    """Averaged or copied, the statistics of other weights are not those that averaged weights have on the data."""
    if not averages_in(subject.model):
        return
    if far := far_layers(subject):
        worst = max(far, key=lambda name: far[name].mean)
        yield Problem(
            "a recalibration on the loader moves their running statistics far, further than its standard errors: in "
            f"{worst!r} by {far[worst]}.",
            _REMEDY,
            list(far),
        )


def _is_measured(subject: Subject) -> bool:
    """Whether the loader tells what a recalibration would find."""
    try:
        subject.observe(recalibration)
    except Unobservable:
        return False
    return True


def _are_those_of_other(subject: Subject) -> bool:
    """Whether ``other``, the model that was averaged, has the very same running statistics, and other weights."""
    if subject.other is None:
        return False
    ours, theirs = _statistics(subject.model), _statistics(subject.other)
    return bool(ours) and ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n].to(ours[n])) for n in ours)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """All running statistics by name, without the names of wrappers."""
    return {
        f"{name}.{key}": buffer
        for name, layer in named_modules(model)
        for key in STATISTICS[:2]
        if (buffer := layer._buffers.get(key)) is not None
    }
