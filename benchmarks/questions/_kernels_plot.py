"""The picture of ``kernels``: bytes/s over the size of a tensor, operator by operator, under the memory's own speed."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import Result

OPERATORS = ["moments", "accumulate", "normalize", "backward_reduce", "backward_apply"]
COLORS = {"contiguous": "#0072B2", "channels_last": "#D55E00"}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "D"}
PEER_MARKERS = "x+1234"


def plot(result: Result, path: Path) -> None:
    """A panel for each operator: ours by layout, its peers in gray, and the line that no one can be far above."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(14, 8), layout="constrained", sharex=True)
    for axes, operator in zip(grid.flat, OPERATORS, strict=False):
        _panel(axes, operator, [row for row in result["rows"] if row["operator"] == operator])
    for axes in grid[:, 0]:
        axes.set_ylabel("GB/s, read and written")
    for axes in grid[1]:
        axes.set_xlabel("size of the tensor, MiB")
    _legend(grid.flat[-1], result)
    figure.suptitle(f"Bytes per second of every operator, {result.get('machine', {}).get('device', 'cpu')}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Any, operator: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogFormatter

    for i, peer in enumerate(dict.fromkeys(peer for row in rows for peer in row["_peers"])):
        compared = [row for row in rows if peer in row["_peers"]]
        rates = [row["GB/s"] / row["_peers"][peer][1] for row in compared]
        marker = PEER_MARKERS[i % len(PEER_MARKERS)]
        axes.plot(_sizes(compared), rates, marker, color="gray", markersize=5, label=peer)
    for layout, color in COLORS.items():
        for dtype, marker in MARKERS.items():
            mine = [row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)]
            if mine:
                rates = [row["GB/s"] for row in mine]
                axes.plot(_sizes(mine), rates, marker, color=color, markersize=5)
    axes.plot(*_roof(rows), color="black", linewidth=1.2, label="the floor's bandwidth")
    axes.set(xscale="log", yscale="log", title=operator)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=6)


def _legend(axes: Any, result: Result) -> None:
    """What the colored markers are, and what the line is."""
    axes.axis("off")
    for layout, color in COLORS.items():
        for dtype, marker in MARKERS.items():
            axes.plot([], [], marker, color=color, label=f"ours, {layout} {dtype}")
    axes.legend(loc="lower left")
    axes.text(0, 0.9, _caption(result), va="top", transform=axes.transAxes)


def _sizes(rows: list[dict[str, Any]]) -> list[float]:
    return [row["MiB"] for row in rows]


def _roof(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """The bandwidth that floors are reckoned with: one for all on CUDA, by size on the CPU."""
    by_size: dict[float, list[float]] = {}
    for row in rows:
        by_size.setdefault(row["MiB"], []).append(row["_floor GB/s"])
    sizes = sorted(by_size)
    return sizes, [statistics.median(by_size[size]) for size in sizes]


def _caption(result: Result) -> str:
    copy = result["summary"].get("bandwidth of a device-to-device copy, GB/s")
    if copy is not None:
        return f"The line is a device-to-device copy of 1 GiB in the same run:\n{copy:.0f} GB/s, read and written."
    return (
        "The line is the plainest operator of torch that reads\nand writes as many bytes, in the same rounds:\n"
        "x.sum(), torch.dot or torch.add. It falls where a new\ntensor is so large that its pages come from the system."
    )
