"""What reports have in common: aligned tables, counts and names in short, values that JSON takes, and pictures."""

import math
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["aligned", "by_reason", "counted", "few", "needs_matplotlib", "plain", "quoted", "saved"]


def aligned(rows: Iterable[Sequence[str]], *, left: Collection[str] = (), least: int = 0) -> list[str]:
    """The lines of a table: the first column on the left, figures on the right; columns without content are left out.

    Args:
        rows: the cells, a row of titles first.
        left: titles of columns that go to the left as well.
        least: how wide each column on the right is at least.

    Example:
        >>> aligned([("layer", "kind", "drift", "dead"), ("stem.bn", "mean", "0.5", ""), ("bn", "var", "12.5", "")])
        ['layer    kind  drift', 'stem.bn  mean    0.5', 'bn        var   12.5']
    """
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    padded = []
    for index, column in enumerate(columns):
        width = max(map(len, column))
        if index == 0 or column[0] in left:
            padded.append([cell.ljust(width) for cell in column])
        else:
            padded.append([cell.rjust(max(width, least)) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def counted(number: int, what: str) -> str:
    """A number and what it is of.

    Example:
        >>> counted(1, "layer"), counted(2, "layer"), counted(0, "mini-batch")
        ('1 layer', '2 layers', '0 mini-batches')
    """
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number} {what}{ending}"


def few(names: Iterable[str]) -> str:
    """The names if they are few; else the first ones and the last."""
    names = list(names)
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])


def quoted(names: Sequence[str], most: int = 6) -> str:
    """The first names, in quotes.

    Example:
        >>> quoted(["stem", "body", "head"], 2)
        "'stem', 'body', ..."
    """
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by reason, of reasons by name."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def plain(value: Any) -> Any:
    """Containers of Python's own numbers, as JSON takes them: NumPy's are none to it, NaN and Inf become None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


@contextmanager
def needs_matplotlib(report: object) -> Iterator[None]:
    """Around the import of what draws a report: says what to install.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{type(report).__name__}.plot needs matplotlib: pip install matplotlib, or install precisebn with the "
            "extra that brings it, precisebn[plot]"
        ) from error


def saved(figure: "Figure", path: str | Path | None) -> "Figure":
    """The figure, which is saved, too, if a path is given."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
