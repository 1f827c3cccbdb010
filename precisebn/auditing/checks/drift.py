"""Drift: running statistics that are far from those of the data."""

from collections.abc import Iterator

from precisebn.auditing.averages import averages_in
from precisebn.auditing.check import Problem, check
from precisebn.auditing.norms import is_fresh
from precisebn.auditing.observations.normalization import Distance, Statistics
from precisebn.auditing.observations.population import recalibration
from precisebn.auditing.observations.training import TrainingStep
from precisebn.auditing.remedies import adapt, measure
from precisebn.auditing.subject import Subject, Unobservable
from precisebn.models.families import is_batch_norm, populations_of

__all__ = ["far_from_the_data", "far_layers"]


@check(
    "PBN251", "warning", "running statistics far from the data",
    source="Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 3", needs=("batch",),
)  # fmt: skip
def far_from_the_data(subject: Subject) -> Iterator[Problem]:
    """Of trained layers: fresh ones are far from everything. Averages of weights have a check of their own."""
    if averages_in(subject.model):
        return
    try:
        everywhere = far_layers(subject)
        left_alone = subject.observe(recalibration).skipped  # layers that freeze() holds, for one
        everywhere |= {name: by for name, by in _far_of_one_batch(subject).items() if name in left_alone}
        data = "the loader's data"
    except Unobservable:
        everywhere = _far_of_one_batch(subject)
        data = "the mini-batch"
    held = {call.layer for call in subject.observe(TrainingStep).calls if not call.by_batch}
    for is_held in (False, True):
        far = {
            name: by for name, by in everywhere.items()
            if (name in held) == is_held and not is_fresh(subject.norms[name])
        }  # fmt: skip
        if not far:
            continue
        first, worst = next(iter(far)), max(far, key=lambda name: far[name].mean)
        yield Problem(
            f"their running statistics are far from those of {data}, from {first!r} on; in {worst!r} by {far[worst]}.",
            f"{measure(subject, far)} for data as in training; {adapt(subject, far)} for another domain; or give the "
            "model what it was trained on, normalized in the same way.",
            list(far),
            "note" if is_held else None,  # those of a frozen backbone may be meant to be others
        )


def far_layers(subject: Subject) -> dict[str, Distance]:
    """Layers whose statistics a recalibration on the loader would move far, further than by chance.

    Raises:
        Unobservable: there is no loader, or one with too few mini-batches.
    """
    far: dict[str, Distance] = {}
    for layer in subject.observe(recalibration).layers:
        drift = Distance(layer.mean_drift, layer.var_drift, layer.mean_error, layer.var_error)
        if drift.is_far:
            name = layer.name.split("[")[0]  # of one with several populations
            far[name] = max(far.get(name, drift), drift)
    return far


def _far_of_one_batch(subject: Subject) -> dict[str, Distance]:
    """The same by one mini-batch, of layers that are called once."""
    far: dict[str, Distance] = {}
    for name, calls in subject.observe(TrainingStep).completed_calls().items():
        layer, seen = subject.norms[name], calls[0].statistics
        populations = populations_of(layer) if is_batch_norm(layer) else ()
        if len(calls) > 1 or len(populations) != 1 or seen is None:
            continue
        drift = Distance.between(seen, Statistics.certain(populations[0].mean, populations[0].var, seen.eps))
        if drift.is_far:
            far[name] = drift
    return far
