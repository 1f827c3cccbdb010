"""How fast `moments` reads, against what torch offers for the same statistics and against the read bandwidth.

The shapes are the inputs of the BatchNorm layers of ResNet-50 at batch 32, and some odd ones. Every call gets another
buffer out of more memory than the last-level cache holds, so what is measured is memory. `x.sum()` stands for the read
bandwidth, `torch.add(x, 1)` for a pass that reads once and writes a new tensor once.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Result, goal, interleave, now, quartiles, ratios
from precisebn import ops

RESNET50 = [
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 56, 56), (32, 128, 56, 56), (32, 128, 28, 28), (32, 512, 28, 28),
    (32, 256, 28, 28), (32, 256, 14, 14), (32, 1024, 14, 14), (32, 512, 14, 14), (32, 512, 7, 7), (32, 2048, 7, 7),
]  # fmt: skip
ODD = [
    (32, 3, 224, 224),
    (8, 1, 512, 512),
    (256, 1024),
    (4096, 100),
    (64, 512, 1, 1),
    (4, 64, 8, 28, 28),
    (64, 96, 3, 3),
]
LAYOUTS = ["contiguous", "channels_last"]
OTHER_DTYPES = [torch.float64, torch.bfloat16, torch.float16]
POOL_BYTES = 560 << 20  # more than twice the largest last-level cache at hand


class Setting(NamedTuple):
    """One row of the benchmark."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype


def settings(quick: bool) -> list[Setting]:
    """What is measured; a handful if ``quick``."""
    if quick:
        shapes = [(32, 64, 56, 56), (32, 512, 7, 7)]
        return [Setting(shape, layout, torch.float32) for layout in LAYOUTS for shape in shapes]
    chosen = [Setting(shape, layout, torch.float32) for layout in LAYOUTS for shape in RESNET50]
    for dtype in [torch.float32, *OTHER_DTYPES]:
        chosen += [Setting(shape, "contiguous", dtype) for shape in ODD]
    for dtype in OTHER_DTYPES:
        chosen += [Setting(shape, layout, dtype) for layout in LAYOUTS for shape in RESNET50[2::4]]
    return chosen


def run(quick: bool = False) -> Result:
    """GB/s of every contestant, and how many times as fast `moments` and `normalize` are."""
    rows = []
    # One pool at a time: settings are grouped by dtype.
    for dtype, group in itertools.groupby(sorted(settings(quick), key=lambda s: str(s.dtype)), lambda s: s.dtype):
        pool = torch.randn(POOL_BYTES // dtype.itemsize // (8 if quick else 1), dtype=torch.float32).to(dtype).add_(1)
        rows += [_row(setting, pool, rounds=5 if quick else 31) for setting in group]
    return {"name": "moments", "rows": rows, "summary": _summary(rows)}


def main() -> None:
    """Print the table and the goals."""
    from rich.console import Console

    result = run()
    console = Console(width=200)
    harness.print_table(console, result["name"], result["rows"])
    harness.print_table(console, "goals", result["summary"]["goals"])


def plot(result: Result, path: Path) -> None:
    """Read rate over the shapes of ResNet-50, as a share of that of ``x.sum()``."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for layout in LAYOUTS:
        rows = [row for row in _resnet(result["rows"]) if row["layout"] == layout]
        for name, style in (("moments", "o-"), ("batch_norm_update_stats", "x--"), ("var_mean", "+:")):
            share = [row[f"{name} GB/s"] / row["x.sum() GB/s"] for row in rows]
            axes.plot([row["shape"] for row in rows], share, style, label=f"{name}, {layout}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("bytes/s, in units of x.sum()")
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", rotation=45)
    axes.legend(fontsize="small", ncols=2)
    axes.set_title("Batch statistics of ResNet-50's layers, batch 32, float32")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _row(setting: Setting, pool: Tensor, rounds: int) -> dict[str, Any]:
    buffers = _buffers(setting, pool)
    _check(next(buffers))
    dims = (0, *range(2, len(setting.shape)))
    channels = setting.shape[1]
    scale, shift = torch.full((2, 1, channels), 0.5, dtype=torch.promote_types(setting.dtype, torch.float32))
    bytes_read = math.prod(setting.shape) * setting.dtype.itemsize

    def timed(function: Callable[[Tensor], Any]) -> Callable[[], float]:
        def once() -> float:
            x = next(buffers)
            start = now()
            function(x)
            return now() - start

        return once

    with torch.no_grad():
        times = interleave(
            {
                "moments": timed(ops.moments),
                "x.sum()": timed(torch.sum),
                "batch_norm_update_stats": timed(lambda x: torch.batch_norm_update_stats(x, None, None, 0.1)),
                "var_mean": timed(lambda x: torch.var_mean(x, dims)),
                "normalize": timed(lambda x: ops.normalize(x, scale, shift)),
                "add(x, 1)": timed(lambda x: torch.add(x, 1)),
            },
            rounds=rounds,
            budget=20,
        )
    row: dict[str, Any] = {
        "shape": "x".join(map(str, setting.shape)),
        "layout": setting.layout,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    row |= {f"{name} GB/s": bytes_read / statistics.median(values) / 1e9 for name, values in times.items()}
    quarter = {}
    for ours, peer in [("moments", name) for name in ("x.sum()", "batch_norm_update_stats", "var_mean")] + [
        ("normalize", "add(x, 1)")
    ]:
        quarter[peer] = quartiles(ratios(times[peer], times[ours]))
        row[f"{ours} x {peer}"] = quarter[peer][1]
    return row | {"_quartiles": quarter}


def _buffers(setting: Setting, pool: Tensor) -> Iterator[Tensor]:
    """Tensors of the setting, one after the other through the pool and round again."""
    size = math.prod(setting.shape)
    last = (setting.shape[0], *setting.shape[2:], setting.shape[1])
    for start in itertools.cycle(range(0, max(len(pool) - size, 0) + 1, size)):
        values = pool[start : start + size]
        yield values.view(setting.shape) if setting.layout == "contiguous" else values.view(last).movedim(-1, 1)


def _check(x: Tensor) -> None:
    """Refuse to time a wrong result."""
    dims = (0, *range(2, x.dim()))
    count, mean, m2 = ops.moments(x)
    var, true_mean = torch.var_mean(x.double(), dims, correction=0)
    torch.testing.assert_close(m2[0] / count, var, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean[0], true_mean, rtol=0, atol=1e-6 * var.sqrt().max().item())
    scale, shift = var.rsqrt()[None], -(true_mean * var.rsqrt())[None]
    y = ops.normalize(x, scale, shift)
    expected = torch.addcmul(_expand(shift, x), _expand(scale, x), x.double())
    torch.testing.assert_close(y, expected.to(x.dtype), atol=1e-4 if x.dtype != torch.float64 else 1e-10, rtol=1e-2)


def _expand(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.reshape(1, -1, *(1 for _ in x.shape[2:]))


def _resnet(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"x".join(map(str, shape)) for shape in RESNET50}
    return [row for row in rows if row["dtype"] == "float32" and row["shape"] in names]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    resnet = _resnet(rows)
    goals = []
    for layout, times in zip(LAYOUTS, (4.0, 2.0), strict=True):
        mine = [row for row in resnet if row["layout"] == layout]
        share = [row["moments x x.sum()"] for row in mine]
        peer = [row["moments x batch_norm_update_stats"] for row in mine]
        write = [row["normalize x add(x, 1)"] for row in mine]
        label = f"ResNet-50 float32 {layout}"
        goals += [
            goal(f"moments, {label}, geometric mean: x x.sum()", statistics.geometric_mean(share), at_least=0.85),
            goal(f"moments, {label}, slowest: x x.sum()", min(share), at_least=0.65),
            goal(f"moments, {label}, geometric mean: x update_stats", statistics.geometric_mean(peer), at_least=times),
            goal(f"normalize, {label}, geometric mean: x add", statistics.geometric_mean(write), at_least=0.9),
        ]
    slowest = min(row["moments x batch_norm_update_stats"] for row in rows)
    goals.append(goal("moments, slowest of all rows: x batch_norm_update_stats", slowest, at_least=1.0))
    return {"goals": goals}


if __name__ == "__main__":
    main()
