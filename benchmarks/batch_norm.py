"""Training-mode batch norm, forward and backward: ``functional.batch_norm`` against ``nn.functional.batch_norm``.

The shapes are those of ResNet-50 at batch 32; besides, five levels of a feature pyramid normalized together, against
flattening, concatenating, normalizing and splitting them. The floor is the bytes that have to move (forward: read x
twice, write y; backward: read x and dy twice, write dx; 8 passes) over the bandwidth of ``x.sum()`` in the same run.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Result, goal, interleave, now, quartiles, ratios
from benchmarks.moments import LAYOUTS, RESNET50
from precisebn.functional import batch_norm

PASSES = 8
POOL_BYTES = 560 << 20  # more than twice the largest last-level cache at hand
PYRAMID = [(4, 256, size, size) for size in (100, 50, 25, 13, 7)]
"""RetinaNet's five levels for an 800 x 800 image, batch 4."""


def run(quick: bool = False) -> Result:
    """Milliseconds of every contestant, and how many times as fast ours is."""
    rounds = 3 if quick else 15
    shapes = [(8, 64, 28, 28)] if quick else RESNET50
    settings = [(shape, layout, torch.float32) for layout in LAYOUTS for shape in shapes]
    if not quick:
        settings += [(shape, layout, torch.bfloat16) for layout in LAYOUTS for shape in RESNET50[2::4]]
    rows = [_row(shape, layout, dtype, rounds) for shape, layout, dtype in settings]
    pyramid = [(n, c, h // 4, w // 4) for n, c, h, w in PYRAMID] if quick else PYRAMID
    rows += [_pyramid_row(pyramid, layout, rounds) for layout in LAYOUTS]
    return {"name": "batch_norm", "rows": rows, "summary": _summary(rows)}


def _row(shape: tuple[int, ...], layout: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    one = _inputs([shape], layout, dtype)
    _check([one])
    size = one[0].numel() * dtype.itemsize
    pool = [one, *(_inputs([shape], layout, dtype) for _ in range(min(15, POOL_BYTES // (2 * size))))]
    feed = itertools.cycle(pool)
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    times = interleave(
        {
            "ours": _timed(feed, lambda x, dy: batch_norm(x, weight, bias)[0].backward(dy)),
            "torch": _timed(feed, lambda x, dy: F.batch_norm(x, None, None, weight, bias, training=True).backward(dy)),
            "x.sum()": _timed(feed, lambda x, dy: x.detach().sum()),
        },
        rounds=rounds,
        budget=20,
    )
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    speed = quartiles(ratios(times["torch"], times["ours"]))
    return {
        "shape": "x".join(map(str, shape)),
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "peer": "F.batch_norm",
        "ours ms": ms["ours"],
        "peer ms": ms["torch"],
        "floor ms": PASSES * ms["x.sum()"],
        "x faster": speed[1],
        "quartiles": [speed[0], speed[2]],
    }


def _pyramid_row(shapes: list[tuple[int, ...]], layout: str, rounds: int) -> dict[str, Any]:
    channels = shapes[0][1]
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    batches = [[_inputs([shape], layout, torch.float32) for shape in shapes] for _ in range(4)]
    _check(batches[0])
    feed = itertools.cycle(batches)

    def ours(pairs: list[tuple[Tensor, Tensor]]) -> None:
        ys, _ = batch_norm([x for x, _ in pairs], weight, bias)
        torch.autograd.backward(ys, [dy for _, dy in pairs])

    def concatenated(pairs: list[tuple[Tensor, Tensor]]) -> None:
        torch.autograd.backward(concatenated_batch_norm([x for x, _ in pairs], weight, bias), [dy for _, dy in pairs])

    def timed(work: Callable[[list[tuple[Tensor, Tensor]]], None]) -> Callable[[], float]:
        def once() -> float:
            pairs = next(feed)
            start = now()
            work(pairs)
            return now() - start

        return once

    times = interleave({"ours": timed(ours), "cat": timed(concatenated)}, rounds=rounds, budget=20)
    speed = quartiles(ratios(times["cat"], times["ours"]))
    return {
        "shape": f"{len(shapes)} levels, {channels} channels",
        "layout": layout,
        "dtype": "float32",
        "peer": "flatten, cat, F.batch_norm, split",
        "ours ms": 1e3 * statistics.median(times["ours"]),
        "peer ms": 1e3 * statistics.median(times["cat"]),
        "x faster": speed[1],
        "quartiles": [speed[0], speed[2]],
    }


def concatenated_batch_norm(xs: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """What users write to share statistics between feature levels: flatten, concatenate, normalize, split."""
    flat = torch.cat([x.flatten(2) for x in xs], dim=2)
    normalized = F.batch_norm(flat, None, None, weight, bias, training=True)
    pieces = normalized.split([x[0, 0].numel() for x in xs], dim=2)
    return [piece.view(x.shape) for piece, x in zip(pieces, xs, strict=True)]


def _inputs(shapes: list[tuple[int, ...]], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (torch.randn(shapes[0]).to(dtype).to(memory_format=memory_format) for _ in range(2))
    return x.requires_grad_(), dy


def _timed(feed: Iterator[tuple[Tensor, Tensor]], work: Callable[[Tensor, Tensor], Any]) -> Callable[[], float]:
    def once() -> float:
        x, dy = next(feed)
        x.grad = None
        start = now()
        work(x, dy)
        return now() - start

    return once


def _check(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Refuse to time a wrong result: forward and backward against float64."""
    exact = [x.detach().double().requires_grad_() for x, _ in pairs]
    weight, bias = (torch.randn(pairs[0][0].shape[1], dtype=torch.float64) for _ in range(2))
    expected = concatenated_batch_norm(exact, weight, bias)
    torch.autograd.backward(expected, [dy.double() for _, dy in pairs])
    ys, _ = batch_norm([x for x, _ in pairs], weight.float(), bias.float())
    torch.autograd.backward(ys, [dy for _, dy in pairs])
    tolerance = 2e-5 if pairs[0][0].dtype == torch.float32 else 4e-2
    for (x, _), y, reference, truth in zip(pairs, ys, expected, exact, strict=True):
        for ours, theirs in ((y, reference), (x.grad, truth.grad)):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * 10)
        x.grad = None


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    goals = []
    for layout in LAYOUTS:
        for dtype in ("float32", "bfloat16"):
            speeds = [
                row["x faster"]
                for row in rows
                if (row["layout"], row["dtype"], row["peer"]) == (layout, dtype, "F.batch_norm")
            ]
            if speeds:
                what = f"forward + backward, ResNet-50 {dtype} {layout}: x F.batch_norm"
                goals.append(goal(f"{what}, slowest shape", min(speeds), at_least=1.0))
                goals.append(goal(f"{what}, geometric mean", statistics.geometric_mean(speeds), at_least=1.0))
    pyramid = [row["x faster"] for row in rows if row["peer"] != "F.batch_norm"]
    goals.append(goal("five feature levels together: x flatten-cat-BN-split, slower layout", min(pyramid), at_least=2))
    return {"goals": goals}


def main() -> None:
    """Print the table and the goals."""
    from rich.console import Console

    result = run()
    console = Console(width=200)
    harness.print_table(console, result["name"], result["rows"])
    harness.print_table(console, "goals", result["summary"]["goals"])


if __name__ == "__main__":
    main()
