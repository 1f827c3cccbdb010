"""RankReport: what differs between ranks, by how much, and on which of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from precisebn._reports import aligned, by_reason, counted, few, plain
from precisebn.errors import RanksDifferError

__all__ = ["NOT_THERE", "Difference", "RankReport", "Variant"]

NOT_THERE = "not there"
"""What ranks hold that have no tensor of that name."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What some of the ranks hold, all of them the same.

    Attributes:
        ranks: these, as the process group counts them.
        text: what it is: dtype and shape of a tensor, or the flag; "not there" where they have none.
        max_difference: the largest difference of a value from that of the reference, infinite where one of the two is
            NaN or infinite; None of the reference itself, and where there is nothing to compare with.
        rms_difference: the root mean square of the differences.
        max_drift: of a running mean the largest difference in standard deviations (``sqrt(var + eps)`` of the
            reference), of a running variance the largest ``|log((var + eps) / (var + eps of the reference))|``; None of
            anything else.
        rms_drift: its root mean square.
    """

    ranks: tuple[int, ...]
    text: str
    max_difference: float | None = None
    rms_difference: float | None = None
    max_drift: float | None = None
    rms_drift: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor, or one flag, that is not the same on all ranks.

    Attributes:
        name: of the parameter or buffer; of the module, for the flag ``training``.
        kind: "parameter", "statistic" (running statistics), "buffer" (others), "requires_grad" or "training" (flags).
        variants: what ranks hold; the first is the reference's.
    """

    name: str
    kind: str
    variants: tuple[Variant, ...]

    @property
    def max_difference(self) -> float:
        """The largest of any rank; NaN where values were not compared."""
        return _largest(variant.max_difference for variant in self.variants)

    @property
    def max_drift(self) -> float:
        """The largest of any rank; NaN where there is none."""
        return _largest(variant.max_drift for variant in self.variants)


@dataclass(frozen=True, slots=True, repr=False)
class RankReport:
    """What :func:`precisebn.check_ranks` found; the same on every rank. ``str()`` is a table.

    Attributes:
        world_size: how many ranks were compared.
        reference: the rank that the others are compared with: the first of the most that agree in everything.
        differences: what is not the same on all ranks, in the order of the model.
        skipped: tensors whose values were not compared, with the reason.
        num_tensors: tensors whose values were compared, on the reference.

    Example:
        >>> import precisebn
        >>> from torch import nn
        >>> report = precisebn.check_ranks(nn.BatchNorm1d(3))
        >>> report.equal, report.num_tensors
        (True, 5)
        >>> print(report)
        5 tensors, on 1 rank: all equal, bit for bit
    """

    world_size: int
    reference: int
    differences: tuple[Difference, ...]
    skipped: dict[str, str]
    num_tensors: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs, among what was compared."""
        return not self.differences

    def __bool__(self) -> bool:
        """Neither: a diff of states is true where something differs, and this might be meant the other way."""
        raise TypeError("ask report.equal, whether nothing differs between ranks")

    @property
    def max_drift(self) -> float:
        """The largest drift of any running mean or variance; 0 where none differs."""
        drift = _largest(difference.max_drift for difference in self.differences)
        return 0.0 if math.isnan(drift) else drift

    def __getitem__(self, name: str) -> Difference:
        """The difference of that name, of values rather than of a flag.

        Raises:
            KeyError: nothing of that name differs.
        """
        found = [difference for difference in self.differences if difference.name == name]
        if not found:
            raise KeyError(f"{name!r} does not differ between ranks, or is not there")
        return min(found, key=lambda difference: difference.kind in ("requires_grad", "training"))

    # Without this, iter() would ask for report[0], report[1], ...: what to loop over is `differences`.
    __iter__ = None

    def raise_if_different(self) -> None:
        """Raise where anything differs: on every rank, for the report is the same on all.

        Raises:
            RanksDifferError: with the report in its message.
        """
        if not self.equal:
            raise RanksDifferError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN and Inf, which JSON has not, become None)."""
        return {**plain(asdict(self)), "equal": self.equal}

    def __repr__(self) -> str:
        numbers = {"difference": len(self.differences), "tensor": self.num_tensors, "rank": self.world_size}
        return f"<RankReport: {', '.join(counted(number, what) for what, number in numbers.items())}>"

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self._table(), *self._remarks()])

    def _headline(self) -> str:
        what = f"{counted(self.num_tensors, 'tensor')}, on {counted(self.world_size, 'rank')}"
        if self.equal:
            return f"{what}: all equal, bit for bit"
        kinds = dict.fromkeys(difference.kind for difference in self.differences)
        numbers = {kind: sum(difference.kind == kind for difference in self.differences) for kind in kinds}
        shown = ", ".join(counted(number, _TITLES.get(kind, kind)) for kind, number in numbers.items())
        return f"{what}: NOT equal; from rank {self.reference} differ: {shown}"

    def _table(self) -> list[str]:
        if not self.differences:
            return []
        rows: list[tuple[str, ...]] = [("name", "kind", "ranks", "what", "max", "rms", "drift")]
        for difference in self.differences[:MOST_ROWS]:
            for variant in difference.variants[1 : 1 + MOST_VARIANTS]:
                numbers = (variant.max_difference, variant.rms_difference, variant.max_drift)
                what = _contrast(variant, difference.variants[0])
                ranks = _shown_ranks(variant.ranks)
                rows.append((difference.name, difference.kind, ranks, what, *map(_number, numbers)))
            if len(difference.variants) > 1 + MOST_VARIANTS:
                more = len(difference.variants) - 1 - MOST_VARIANTS
                rows.append((difference.name, difference.kind, "...", counted(more, "more variant"), "", "", ""))
        lines = aligned(rows, left=("kind", "ranks", "what"))
        if len(self.differences) > MOST_ROWS:
            lines.append(f"... and {len(self.differences) - MOST_ROWS} more")
        if not math.isnan(_largest(difference.max_drift for difference in self.differences)):
            lines.append("(drift: of a running mean in standard deviations, of a running variance as |log ratio|)")
        return lines

    def _remarks(self) -> list[str]:
        return [
            f"{counted(len(names), 'tensor')} not compared: {reason}: {few(names)}"
            for reason, names in by_reason(self.skipped).items()
        ]


_TITLES = {"statistic": "running statistic", "requires_grad": "requires_grad flag", "training": "training flag"}

MOST_ROWS, MOST_VARIANTS = 40, 8
"""How many differences, and variants of each, the table shows; ``differences`` has all."""


def _shown_ranks(ranks: Sequence[int]) -> str:
    """Some ranks in short: ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:5], "..."])


def _contrast(variant: Variant, reference: Variant) -> str:
    """What a variant is where the reference is something else."""
    if variant.text == reference.text:
        return "other values"
    if NOT_THERE in (variant.text, reference.text):
        return variant.text if variant.text == NOT_THERE else f"{variant.text}, there only"
    return f"{variant.text}, not {reference.text}"


def _largest(numbers: Iterable[float | None]) -> float:
    return max((number for number in numbers if number is not None and not math.isnan(number)), default=math.nan)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
