"""Disagreement: a model that gives one thing in training mode and another in eval mode."""

from collections.abc import Iterator

from precisebn.auditing.check import Problem, check
from precisebn.auditing.norms import is_fresh
from precisebn.auditing.observations.agreement import Agreement
from precisebn.auditing.observations.normalization import FAR
from precisebn.auditing.remedies import measure
from precisebn.auditing.subject import Subject

__all__ = ["train_and_eval_disagree"]

_MUCH = 1.0
"""From where on outputs are much apart, in their standard deviations: as far as those of different samples are."""


@check(
    "PBN252", "warning", "train and eval outputs disagree",
    source="https://github.com/pytorch/pytorch/issues/4741", needs=("batch",),
)  # fmt: skip
def train_and_eval_disagree(subject: Subject) -> Iterator[Problem]:
    """By BatchNorm alone: dropout is off both times. Models that were never trained disagree by nature."""
    agreement = subject.observe(Agreement)
    apart = agreement.outputs_apart
    starts = [one for one in agreement.layers if one.statistics.is_far and one.outputs.is_far]
    if not starts and apart is not None and apart >= _MUCH:  # each is off by little, and all of them by much
        starts = [one for one in agreement.layers if one.outputs.is_far][:1]
    fresh = [name for name, layer in subject.norms.items() if is_fresh(layer)]
    if not starts or len(fresh) == len(subject.norms):
        return
    first = starts[0]
    mild = first.layer in fresh or (apart is not None and apart < FAR)
    model = "" if apart is None else f"; the model's outputs differ by {apart:.2f} of their standard deviation"
    yield Problem(
        f"by the mini-batch and by running statistics, dropout apart, outputs begin to differ at {first.layer!r}: by "
        f"{first.outputs}{model}.",
        f"{measure(subject, [one.layer for one in starts])} makes the running statistics those of the data under these "
        "weights.",
        [one.layer for one in starts],
        "note" if mild else None,
    )
