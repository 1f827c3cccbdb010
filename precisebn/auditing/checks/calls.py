"""Calls: layers that are called more than once in a forward."""

from collections.abc import Iterator
from itertools import combinations

from precisebn.auditing.check import Problem, check
from precisebn.auditing.observations.normalization import NormCall, distance, is_far
from precisebn.auditing.observations.training import TrainingStep
from precisebn.auditing.subject import Subject
from precisebn.models.families import is_batch_norm, populations_of

__all__ = ["shared_population"]


@check(
    "PBN401", "warning", "one population for several distributions",
    source="Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 5.2, table 5, row 3", needs=("batch",),
)  # fmt: skip
def shared_population(subject: Subject) -> Iterator[Problem]:
    """Each call normalizes by its own statistics in training, and all by their average at test time."""
    for name, calls in subject.observe(TrainingStep).completed_calls().items():
        layer = subject.norms[name]
        if not is_batch_norm(layer) or not populations_of(layer) or not calls[0].by_batch or len(calls) < 2:
            continue
        apart, log_ratio, far = _farthest(calls)
        if far:
            yield Problem(
                f"it is called {len(calls)} times in a forward, on values whose means lie up to {apart:.2f} standard "
                f"deviations apart and whose variances differ up to {_factor(log_ratio)}: each is normalized by its own "
                "in training, and all by their average in eval mode.",
                f"convert_shared_head(head, ...), or convert_cycle(model, length={len(calls)}, include={name!r}).",
                [name],
            )
        else:
            yield Problem(
                f"it is called {len(calls)} times in a forward, on values of one distribution as far as can be told; its "
                "running statistics move as often.",
                f"nothing; a momentum divided by {len(calls)} gives the average the length that it has in other layers.",
                [name],
                "note",
            )


def _farthest(calls: list[NormCall]) -> tuple[float, float, bool]:
    """The largest distance of means and log ratio of variances of any two calls, and whether any two are far apart."""
    known = [call.statistics for call in calls if call.statistics is not None]
    pairs = [distance(a, b) for a, b in combinations(known, 2)]
    far = [(apart, ratio) for apart, error, ratio in pairs if is_far(apart, ratio, error)]
    return max((a for a, _ in far), default=0.0), max((ratio for _, ratio in far), default=0.0), bool(far)


def _factor(log_ratio: float) -> str:
    return f"{2.718281828459045**log_ratio:.1f}-fold"
