"""How time depends on the number of ranks and of channels: a model, fitted where it was measured.

``T(W, n) = forward + max(1, W / cores) * (a + b hops(W) + c n)`` for W ranks and n numbers that grow with the channels:
what a rank does by itself; what a collective costs to begin; what each message costs that must wait for another one,
``log2(W)`` of them in a tree, ``W - 1`` in a ring each way; and the bytes, with the factor ``2 (W - 1) / W`` taken into
c. (The postal model, as of Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in
MPICH".) None of the three can be negative. Where ranks share the cores of a machine they wait for each other there too.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

__all__ = [
    "Model",
    "Point",
    "fit",
    "nccl_latency",
    "nonnegative_least_squares",
    "numbers_of_a_recalibration",
    "percent_off",
    "ring",
    "tree",
    "typical_and_worst",
]


class Point(NamedTuple):
    """A measurement of what the model is about, without the forward."""

    ranks: int
    channels: int
    seconds: float


def tree(ranks: int) -> float:
    """Hops of a tree, or of recursive doubling."""
    return math.log2(ranks)


def ring(ranks: int) -> float:
    """Hops of a ring, half of them: the other half brings the results."""
    return ranks - 1.0


class Model(NamedTuple):
    """Seconds of a collective: to begin, a hop, a channel; which hops, and how many cores the ranks share."""

    start: float
    hop: float
    channel: float
    hops: Callable[[int], float]
    cores: float = math.inf

    def seconds(self, ranks: int, channels: int) -> float:
        """What it takes over ``ranks`` ranks; nothing, where there is no other."""
        if ranks == 1:
            return 0.0
        return max(1.0, ranks / self.cores) * (self.start + self.hop * self.hops(ranks) + self.channel * channels)


def fit(points: Iterable[Point], hops: Callable[[int], float], cores: float = math.inf) -> Model:
    """The model of which the relative errors at the points have the least sum of squares; one rank says nothing.

    Example:
        >>> truth = Model(1e-3, 2e-3, 1e-6, ring, cores=2)
        >>> found = fit((Point(w, c, truth.seconds(w, c)) for w in (2, 8) for c in (100, 1000)), ring, cores=2)
        >>> [round(1e6 * each, 3) for each in found[:3]]
        [1000.0, 2000.0, 1.0]
    """
    points = [point for point in points if point.ranks > 1]
    shares = [max(1.0, point.ranks / cores) for point in points]
    rows = [
        (share, share * hops(point.ranks), share * point.channels) for share, point in zip(shares, points, strict=True)
    ]
    start, hop, channel = nonnegative_least_squares(rows, [point.seconds for point in points])
    return Model(start, hop, channel, hops, cores)


def nonnegative_least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 for which ``rows @ coefficients`` is nearest to the values, in relative terms.

    The best has zeros in some places, and elsewhere is a plain least-squares solution of the columns that are left. So
    the least of those solutions of all sets of columns that have no negative coefficient is the best.

    Args:
        rows: one for each value, as many numbers as there are coefficients: a handful.
        values: above 0.

    Raises:
        ValueError: no values, or one that is not above 0.
    """
    if not values or min(values) <= 0:
        raise ValueError("a relative fit needs values, and all above 0")
    # Every row over its value, so that what is to be met is 1 everywhere; every column over its largest, for rounding.
    matrix = torch.tensor(rows, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    scale = matrix.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    matrix, ones = matrix / scale, torch.ones(len(values), 1, dtype=torch.float64)
    width = matrix.shape[1]
    best, least = torch.zeros(width, dtype=torch.float64), float(len(values))
    for size in range(1, width + 1):
        for columns in itertools.combinations(range(width), size):
            chosen = matrix[:, list(columns)]
            solution = torch.linalg.lstsq(chosen, ones, driver="gelsd").solution
            squares = float((chosen @ solution - ones).square().sum())
            # Beyond rounding only: columns that say the same do not get a coefficient each.
            if float(solution.min()) >= 0.0 and squares < least - 1e-12:
                best, least = torch.zeros(width, dtype=torch.float64), squares
                best[list(columns)] = solution.flatten()
    return [float(value) for value in best / scale]


def numbers_of_a_recalibration(layers: int, channels: int, batches: int) -> int:
    """How many float64 numbers a recalibration adds up over ranks, in two all-reduces.

    First count, mini-batches, sums of means and m2 within ranks; then m2 about the common mean and, for each size of
    blocks (there are as many as the most ``batches`` of a rank have binary digits), three numbers a layer and three a
    channel, from which come the standard errors.
    """
    return 2 * (layers + channels) + channels + batches.bit_length() * 3 * (layers + channels)


def nccl_latency(nodes: int, per_node: int = 8, *, by_ring: bool = False) -> float:
    """Seconds that NCCL reckons with for an all-reduce of few bytes, by its tree or by its ring.

    Its own tuning model (NVIDIA/nccl, src/graph/tuning.cc, of 2024 and 2025; protocol LL): 0.6 us a step over NVLink;
    over the network 5 us a step of a tree, 2.7 us one of a ring; 6.8 us and 6.6 us to begin. Chains in the nodes and a
    binary tree between them, up and down, or a ring through all.
    """
    if by_ring:
        between = 2 * (nodes - 1)
        return 1e-6 * (6.6 + (2 * (nodes * per_node - 1) - between) * 0.6 + between * 2.7)
    return 1e-6 * (6.8 + 2 * ((per_node - 1) * 0.6 + int(math.log2(nodes)) * 5.0))


def percent_off(predicted: float, measured: float) -> float:
    """By how many percent of what was measured a prediction is too high."""
    return 100.0 * (predicted / measured - 1.0)


def typical_and_worst(errors: Iterable[float]) -> list[float]:
    """The median and the largest size of errors; nothing of none."""
    sizes = [abs(error) for error in errors]
    return [statistics.median(sizes), max(sizes)] if sizes else []
