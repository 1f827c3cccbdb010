"""Batches: normalization batches that are too small for their statistics."""

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from precisebn._reports import counted
from precisebn.auditing.check import Problem, check
from precisebn.auditing.finding import Severity
from precisebn.auditing.observations.normalization import NormCall
from precisebn.auditing.observations.training import TrainingStep
from precisebn.auditing.subject import Subject
from precisebn.distributed import number_of_ranks
from precisebn.models.families import family_of, is_batch_norm

__all__ = ["one_sample", "one_value", "too_few_samples"]

_GROUP_NORM = "Group Normalization, arXiv 1803.08494, figure 1"


@check(
    "PBN411", "warning", "normalization batch too small", source=_GROUP_NORM, needs=("batch",),
)  # fmt: skip
def too_few_samples(subject: Subject) -> Iterator[Problem]:
    """The statistics of a few samples are far from those of the data, in training and in the running average of few."""
    found: dict[Severity, list[tuple[float, NormCall]]] = defaultdict(list)
    for call in _calls_by_batch(subject):
        if call.statistics is None or call.num_samples < 2:
            continue
        error = call.statistics.relative_error / _ranks(subject.norms[call.layer]) ** 0.5
        if error > 0.5:  # as of 5 independent values
            found["warning"].append((error, call))
        elif error > 0.25:  # as of 17
            found["note"].append((error, call))
    for severity, worst in found.items():
        error, call = max(worst, key=lambda one: one[0])
        values = counted(call.values // call.num_samples, "value")
        yield Problem(
            f"the standard error of their means is up to {error:.2f} standard deviations (in {call.layer!r}, which "
            f"normalizes {counted(call.num_samples, 'sample')} of {values} each per channel).",
            _LARGER,
            list(dict.fromkeys(call.layer for _, call in worst)),
            severity,
        )


@check(
    "PBN412", "warning", "normalization batch of one sample",
    source="Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 4", needs=("batch",),
)  # fmt: skip
def one_sample(subject: Subject) -> Iterator[Problem]:
    """Then BatchNorm is instance normalization in training, and something else at test time."""
    layers = [
        call.layer
        for call in _calls_by_batch(subject)
        if call.num_samples == 1 and call.values > 1 and _ranks(subject.norms[call.layer]) == 1
    ]
    if layers:
        yield Problem(
            "they normalize a single sample by its own statistics in training, and by those of all data in eval mode.",
            _LARGER,
            list(dict.fromkeys(layers)),
        )


@check(
    "PBN413", "error", "one value per channel", source="https://github.com/pytorch/pytorch/issues/7716",
    needs=("batch",),
)  # fmt: skip
def one_value(subject: Subject) -> Iterator[Problem]:
    """A single value has no variance: torch raises."""
    layers = [
        call.layer for call in _calls_by_batch(subject) if call.values == 1 and _ranks(subject.norms[call.layer]) == 1
    ]
    if layers:
        yield Problem(
            "they are given one value per channel in training, which has no variance; BatchNorm raises ValueError.",
            "train on mini-batches of two samples and more, DataLoader(..., drop_last=True); or freeze them.",
            list(dict.fromkeys(layers)),
        )


_LARGER = (
    "larger mini-batches; convert_sync_batchnorm(model) on several ranks; freeze(model, ..., affine=True); or another "
    "normalization by replace_batchnorm(model, ...)."
)


def _calls_by_batch(subject: Subject) -> Iterator[NormCall]:
    """The calls that normalize by the mini-batch, also of a forward that did not end."""
    for call in subject.observe(TrainingStep).calls:
        if call.by_batch and is_batch_norm(subject.norms[call.layer]):
            yield call


def _ranks(layer: nn.Module) -> int:
    """How many ranks a layer normalizes over."""
    family = family_of(layer)
    return number_of_ranks() if family is not None and family.synchronized else 1
