"""Chan's formula: how the moments of disjoint sets of values merge into those of their union.

Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979. The compiled
kernels have the same in ``csrc/moments.h``.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Merged", "merge", "merge_rows"]


class Merged(NamedTuple):
    """Mean and sum of squared deviations from it."""

    mean: Tensor
    m2: Tensor


def merge(count_a: Tensor, mean_a: Tensor, m2_a: Tensor, count_b: Tensor, mean_b: Tensor, m2_b: Tensor) -> Merged:
    """Merge two sets (equation 2.1); counts broadcast against means.

    With ``n = na + nb`` and ``d = mean_b - mean_a``: ``mean = mean_a + d * nb / n`` and
    ``m2 = m2_a + m2_b + d^2 * na * nb / n``. An empty set leaves the other's bits as they are.
    """
    share = count_b / (count_a + count_b).clamp(min=1.0)
    delta = mean_b - mean_a
    # The weight meets delta before delta is squared: where it is 0, the square may overflow.
    return Merged(mean_a + delta * share, m2_a + m2_b + delta * (share * count_a) * delta)


def merge_rows(count: Tensor, mean: Tensor, m2: Tensor) -> Merged:
    """Merge any number of sets at once, one a row of dimension 0, about their common mean; counts broadcast.

    Deviations are taken from the first row, so that a large common mean costs no digits. An empty set has mean 0.
    """
    weight = count / count.sum(0).clamp(min=1.0)
    anchor = mean[0]
    common = anchor + ((mean - anchor) * weight).sum(0)
    common = common.where(count.sum(0) > 0, 0.0)
    return Merged(common, m2.sum(0) + (count * (mean - common).square()).sum(0))
