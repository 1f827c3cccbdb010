"""Calls: layers that are called more than once in a forward."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

from precisebn.auditing.check import Problem, check
from precisebn.auditing.observations.normalization import Distance, NormCall
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
    alike: dict[int, list[str]] = defaultdict(list)
    for name, calls in subject.observe(TrainingStep).completed_calls().items():
        layer = subject.norms[name]
        if not is_batch_norm(layer) or not populations_of(layer) or not calls[0].by_batch or len(calls) < 2:
            continue
        if farthest := _farthest(calls):
            yield Problem(
                f"it is called {len(calls)} times in a forward, on values that lie up to {farthest} apart: each call "
                "is normalized by its own statistics in training, and all by their average in eval mode.",
                f"convert_shared_head(head, ...), or convert_cycle(model, length={len(calls)}, include={name!r}).",
                [name],
            )
        else:
            alike[len(calls)].append(name)
    for number, names in alike.items():
        yield Problem(
            f"each is called {number} times in a forward, on values of one distribution as far as can be told; its "
            "running statistics move as often.",
            f"nothing, or a momentum divided by {number}, for an average as long as that of other layers.",
            names,
            "note",
        )


def _farthest(calls: list[NormCall]) -> Distance | None:
    """The largest distance of any two calls that are far apart; None where no two are."""
    known = [call.statistics for call in calls if call.statistics is not None]
    far = [pair for a, b in combinations(known, 2) if (pair := Distance.between(a, b)).is_far]
    return max(far, key=lambda pair: pair.mean + pair.log_var, default=None)
