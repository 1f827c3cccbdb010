"""Drift: running statistics that are far from those of the data."""

from collections.abc import Iterator
from math import isnan

from precisebn.auditing.averages import averages_in
from precisebn.auditing.check import Problem, check
from precisebn.auditing.fresh import is_fresh
from precisebn.auditing.observations.loader import LoaderLook
from precisebn.auditing.observations.normalization import Statistics, distance, is_far
from precisebn.auditing.observations.population import recalibration
from precisebn.auditing.observations.training import TrainingStep
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
        far = far_layers(subject)
        data = "the loader's first mini-batches"
    except Unobservable:
        far = _far_of_one_batch(subject)
        data = "the mini-batch"
    far = {name: by for name, by in far.items() if not is_fresh(subject.norms[name])}
    if far:
        first, worst = next(iter(far)), max(far, key=lambda name: far[name][0])
        yield Problem(
            f"their running statistics are far from those of {data}, from {first!r} on; in {worst!r} by "
            f"{far[worst][0]:.2f} standard deviations in the mean and {far[worst][1]:.2f} in log variance.",
            "update_bn_stats(model, loader) for data as in training; adapt_bn_stats(model, loader) for another domain; "
            "or give the model what it was trained on, normalized in the same way.",
            list(far),
        )


def far_layers(subject: Subject) -> dict[str, tuple[float, float]]:
    """Layers whose statistics a recalibration on the loader would move far: by how much, in mean and log variance.

    Raises:
        Unobservable: there is no loader, or one with too few mini-batches.
    """
    subject.observe(LoaderLook)
    far: dict[str, tuple[float, float]] = {}
    for layer in subject.observe(recalibration).layers:
        drifts = layer.mean_drift, layer.var_drift
        certain = (drifts[0] > 3 * layer.mean_error, drifts[1] > 3 * layer.var_error)
        if any(isnan(drift) for drift in drifts):
            continue  # running statistics of NaN have a check of their own
        if (certain[0] and is_far(drifts[0], 0.0, 0.0)) or (certain[1] and is_far(0.0, drifts[1], 0.0)):
            name = layer.name.split("[")[0]  # of one with several populations
            far[name] = max(far.get(name, (0.0, 0.0)), drifts)
    return far


def _far_of_one_batch(subject: Subject) -> dict[str, tuple[float, float]]:
    """The same by one mini-batch, of layers that are called once."""
    far: dict[str, tuple[float, float]] = {}
    for name, calls in subject.observe(TrainingStep).completed_calls().items():
        layer, seen = subject.norms[name], calls[0].statistics
        populations = populations_of(layer) if is_batch_norm(layer) else ()
        if len(calls) > 1 or len(populations) != 1 or seen is None:
            continue
        mean, var = (t.detach().double().cpu() for t in (populations[0].mean, populations[0].var))
        running = Statistics(mean, var.clamp(min=0.0), mean.new_zeros(mean.shape), seen.eps)
        apart, error, log_ratio = distance(seen, running)
        if is_far(apart, log_ratio, error):
            far[name] = apart, log_ratio
    return far
