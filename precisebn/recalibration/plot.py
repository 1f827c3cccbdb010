"""The picture of an UpdateReport. Importing this needs matplotlib; only ``UpdateReport.plot`` does."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from precisebn._reports import counted

if TYPE_CHECKING:
    from precisebn.recalibration.report import UpdateReport

__all__ = ["draw"]

_ROW = 0.15  # inches that a layer takes: a line of the smallest legible type
_SMALLEST = 1e-4  # what is below is nothing to act upon, and stands at the edge, as 0 does

_DRIFT, _ERROR = "tab:blue", "tab:orange"


def draw(report: "UpdateReport") -> Figure:
    """One row for each layer, from the model's input down; the mean on the left, the variance on the right.

    Values beyond the axis (0, which a logarithm has not, and Inf) are drawn as arrowheads at its edge.
    """
    names = [layer.name for layer in report.layers]
    figure = Figure(figsize=(11.0, 2.0 + _ROW * max(len(names), 8)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, unit in zip(panels, ("mean", "var"), ("standard deviations", "|log ratio|"), strict=True):
        # NaN among the old statistics is as far off as can be; among errors it means that they are not known.
        drift = [math.inf if math.isnan(d := getattr(layer, f"{what}_drift")) else d for layer in report.layers]
        error = [getattr(layer, f"{what}_error") for layer in report.layers]
        limits = _limits([*drift, *error, report.tolerance or math.nan])
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        _points(axes, drift, limits, _DRIFT)
        _points(axes, error, limits, _ERROR)
        if report.tolerance is not None:
            axes.axvline(report.tolerance, color=_ERROR, linestyle="--", linewidth=1)
        axes.set_title("mean" if what == "mean" else "variance", fontsize=10)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    dead = f", {counted(report.dead_channels, 'dead channel')} left out" if report.dead_channels else ""
    data = f"{counted(len(names), 'layer')}, {counted(report.num_samples, 'sample')}"
    figure.suptitle(f"BatchNorm statistics: {data}{dead}", fontsize=11)
    figure.legend(handles=_legend(report), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A range that holds every value that can be drawn, with room for the points at its edges."""
    drawn = [max(value, _SMALLEST) for value in values if math.isfinite(value)] or [1e-3, 1.0]
    return 10.0 ** math.floor(math.log10(min(drawn))), 10.0 ** math.ceil(math.log10(max(drawn)) + 0.15)


def _points(axes: Axes, values: Sequence[float], limits: tuple[float, float], color: str) -> None:
    """The values, by row; those not known (NaN) are left out."""
    marks: dict[str, list[tuple[float, int]]] = {}
    for row, value in enumerate(values):
        if not math.isnan(value):
            mark = "<" if value < limits[0] else ">" if value > limits[1] else "o"
            marks.setdefault(mark, []).append((min(max(value, limits[0]), limits[1]), row))
    for mark, points in marks.items():
        size = 4 if mark == "o" else 6
        axes.plot([x for x, _ in points], [y for _, y in points], mark, color=color, markersize=size, clip_on=False)


def _legend(report: "UpdateReport") -> list[Line2D]:
    points = [("drift of the old statistics", _DRIFT)]
    if not math.isnan(report.max_error):
        points.append(("standard error of the new", _ERROR))
    lines = [Line2D([], [], color=color, marker="o", markersize=4, linestyle="", label=what) for what, color in points]
    if report.tolerance is not None:
        lines.append(Line2D([], [], color=_ERROR, linestyle="--", linewidth=1, label=f"tolerance {report.tolerance:g}"))
    return lines
