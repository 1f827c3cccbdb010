"""The picture of a StateDiff. Importing this needs matplotlib; only ``StateDiff.plot`` does."""

import math
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from precisebn._reports import counted

if TYPE_CHECKING:
    from precisebn.state.diff import StateDiff, TensorDiff

__all__ = ["draw"]

_ROW = 0.15  # inches that a layer takes: a line of the smallest legible type

_PANELS = (
    ("parameters and buffers", "rms change, relative", ""),
    ("running means", "standard deviations before", "std"),
    ("running variances", "|log ratio|", "log"),
)


def draw(diff: "StateDiff") -> Figure:
    """One row for each layer in which something has changed, from the input down; on logarithmic axes.

    What has no place there (a change of 0 as from 0.0 to -0.0, Inf) is an arrowhead at the edge.
    """
    layers = list(dict.fromkeys(row.layer for row in diff.changed))
    figure = Figure(figsize=(12.0, 2.0 + _ROW * max(len(layers), 8)), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (title, label, unit) in zip(panels, _PANELS, strict=True):
        points = [
            (value, layers.index(row.layer), row.kind)
            for row in diff.changed
            if row.unit == unit and (value := _value(row)) is not None
        ]
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        _points(axes, points)
    panels[0].set_yticks(range(len(layers)), [layer or "(the model)" for layer in layers], fontsize=7)
    panels[0].set_ylim(max(len(layers), 1) - 0.5, -0.5)
    figure.suptitle(f"{len(diff.changed)} of {counted(len(diff.rows), 'tensor')} changed", fontsize=11)
    return figure


def _value(row: "TensorDiff") -> float | None:
    return row.drift if row.unit else row.relative


_COLORS = {"parameter": "tab:blue", "statistic": "tab:orange", "buffer": "tab:green"}


def _points(axes: Axes, points: list[tuple[float, int, str]]) -> None:
    """The values of some rows, by kind, with a legend where there are several."""
    drawn = [value for value, _, _ in points if value > 0 and math.isfinite(value)] or [1e-3, 1.0]
    low, high = 10.0 ** math.floor(math.log10(min(drawn))), 10.0 ** math.ceil(math.log10(max(drawn)) + 0.15)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    named = set()
    for value, row, kind in points:
        mark = "<" if value < low else ">" if value > high or math.isnan(value) else "o"
        label = kind if kind not in named and mark == "o" else None
        named.update([kind] if label else [])
        at = min(max(value, low), high) if not math.isnan(value) else high
        axes.plot([at], [row], mark, color=_COLORS.get(kind, "black"), markersize=4, clip_on=False, label=label)
    if len(named) > 1:
        axes.legend(fontsize=7, frameon=False)
