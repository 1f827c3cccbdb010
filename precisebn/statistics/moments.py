"""Moments: the sufficient statistics that every feature of precisebn groups and merges.

Values are summarized per channel by their count, mean and sum of squared deviations from the mean (m2). Two summaries
merge exactly, without going back to the data (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances", 1979), so Moments form a commutative monoid: ``Moments.zero(C)`` is the identity and ``+``
is associative. Nothing here subtracts a squared mean from a mean square, so a variance is never negative and keeps
its digits however far the mean is from zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from precisebn import ops
from precisebn.errors import InputError
from precisebn.ops.chan import merge, merge_rows

__all__ = ["Moments"]


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations, per channel; optionally of several groups.

    Attributes:
        count: number of values per channel, float64, shape ``()`` or ``(G,)``.
        mean: their mean, float64, shape ``(C,)`` or ``(G, C)``; 0 where the count is 0.
        m2: sum of squared deviations from the mean, float64, same shape as ``mean``; never negative.

    Example:
        >>> a = Moments.of(torch.tensor([[1.0], [3.0]]))
        >>> b = Moments.of(torch.tensor([[8.0]]))
        >>> a + b == Moments.of(torch.tensor([[1.0], [3.0], [8.0]]))
        True
        >>> (a + b).mean.item(), (a + b).var().item()
        (4.0, 8.666666666666666)
        >>> sum([a, b]) == Moments.zero(1) + a + b
        True
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def zero(
        num_channels: int, num_groups: int | None = None, *, device: torch.device | str | None = None
    ) -> "Moments":
        """Moments of no values: the identity of ``+``.

        Args:
            num_channels: C.
            num_groups: G, or None for Moments without a group dimension.
            device: where the tensors live.
        """
        groups = () if num_groups is None else (num_groups,)
        return Moments(
            count=torch.zeros(groups, dtype=torch.float64, device=device),
            mean=torch.zeros((*groups, num_channels), dtype=torch.float64, device=device),
            m2=torch.zeros((*groups, num_channels), dtype=torch.float64, device=device),
        )

    @staticmethod
    def of(x: Tensor, group: Tensor | None = None, num_groups: int | None = None) -> "Moments":
        """Moments of a tensor over all its dimensions but the channel.

        Args:
            x: ``(N, C, *)``, floating point, any layout.
            group: int64 ``(N,)``, the group of each sample; absent, there is one group and no group dimension.
            num_groups: G; required with ``group``.

        Raises:
            InputError: unsupported dtype or shape, or a group that does not fit.

        Example:
            >>> m = Moments.of(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1]), num_groups=2)
            >>> m.mean
            tensor([[2.],
                    [8.]], dtype=torch.float64)
            >>> m.sum().mean
            tensor([4.], dtype=torch.float64)
        """
        if group is None:
            if num_groups is not None:
                raise InputError(f"num_groups={num_groups} was given without group; pass the group of each sample too")
            count, mean, m2 = ops.moments(x)
            return Moments(count[0], mean[0], m2[0])
        if num_groups is None:
            raise InputError("group was given without num_groups; pass how many groups there are")
        return Moments(*ops.moments(x, group, num_groups))

    def __add__(self, other: object) -> "Moments":
        """Moments of both sets of values together."""
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise InputError(
                f"cannot merge Moments of shapes {tuple(self.mean.shape)} and {tuple(other.mean.shape)}: "
                "both must have the same channels and groups; call .sum() to merge the groups of one first"
            )
        na, nb = self.count.unsqueeze(-1), other.count.unsqueeze(-1)
        return Moments(self.count + other.count, *merge(na, self.mean, self.m2, nb, other.mean, other.m2))

    def __radd__(self, other: object) -> "Moments":
        """Let the built-in ``sum`` start from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Same values bit for bit, as ``torch.equal``."""
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            torch.equal(self.count, other.count)
            and torch.equal(self.mean, other.mean)
            and torch.equal(self.m2, other.m2)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by value, and tensors are mutable

    def sum(self) -> "Moments":
        """Merge the groups into one: ``(G, C)`` becomes ``(C,)``; without a group dimension, the same Moments.

        All groups merge at once about the common mean, which is the formula for two groups carried to G.
        """
        if self.count.dim() == 0:
            return self
        return Moments(self.count.sum(), *merge_rows(self.count.unsqueeze(-1), self.mean, self.m2))

    def var(self, unbiased: bool = False) -> Tensor:
        """Variance per channel, ``m2 / n``; with ``unbiased=True``, ``m2 / (n - 1)`` (Bessel's correction).

        NaN where there are too few values to define it, as ``torch.var``.
        """
        return self.m2 / (self.count - int(unbiased)).unsqueeze(-1).clamp(min=0.0)

    def std(self, unbiased: bool = False) -> Tensor:
        """Square root of :meth:`var`."""
        return self.var(unbiased).sqrt()
