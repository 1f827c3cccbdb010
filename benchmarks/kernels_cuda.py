"""The five operators on a GPU against torch's own batch norm kernels, cuDNN and the memory's own speed.

Every row is one ResNet-50 activation in one dtype and layout. Inputs and outputs rotate among buffers that together are
several times the L2 cache; results are checked against float64 before anything is timed; contestants of a row run in
turns, and figures are medians over rounds. The calls of a round are enqueued while the GPU still sleeps, so the time
between the events is that of the kernels, not of Python. ``floor`` is the bytes that must move over the bandwidth of a
device-to-device copy measured in the same run.

``python -m benchmarks.kernels_cuda [--quick] [--budget SECONDS] [--json FILE]``
"""

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from precisebn import functional, ops, update_bn_stats

# Channels and edge of the inputs of ResNet-50's BatchNorm layers, and how many layers have them.
RESNET50 = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
PEERS = {
    "moments": "torch stats",
    "normalize": "torch elemt",
    "backward_reduce": "torch backward_reduce",
    "backward_apply": "torch backward_elemt",
    "forward": "cudnn forward",
    "forward+backward": "cudnn forward+backward",
}
"""What each of ours is compared with."""
PASSES = {"moments": 1, "accumulate": 1, "normalize": 2, "backward_reduce": 2, "backward_apply": 3}
"""How often each byte of the activation must be read or written."""
EPS = 1e-5

Call = Callable[[int], Any]


def run(quick: bool = False, budget: float = math.inf) -> dict[str, Any]:
    """All rows, and the project's goals for them. After ``budget`` seconds no further activation is begun."""
    deadline = time.perf_counter() + budget
    update = update_row(iterations=5 if quick else 30, rounds=2 if quick else 5)
    bandwidth = copy_bandwidth()
    configurations = [
        (batch, shape, layout, dtype)
        for batch in ((32,) if quick else (32, 256))
        for shape in (list(RESNET50)[::5] if quick else RESNET50)
        for layout in LAYOUTS
        for dtype in (["bfloat16"] if quick else DTYPES)
    ]
    rows: list[dict[str, Any]] = []
    left_out = 0
    for configuration in configurations:
        if time.perf_counter() > deadline:
            left_out += 1
            continue
        rows += activation(*configuration, bandwidth, rounds=3 if quick else 5)
        torch.cuda.empty_cache()
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "backend": str(ops.backend()),
        "copy GB/s": bandwidth / 1e9,
        "update_bn_stats": update,
        "activations left out": left_out,
        "goals": goals(rows, update),
    }
    return {"name": "kernels_cuda", "rows": rows, "summary": summary}


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, reads and writes."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    (times,) = measure({"copy": lambda _: y.copy_(x)}, buffers=3, rounds=7).values()
    return 2 * x.nbytes / statistics.median(times)


def activation(
    batch: int, shape: tuple[int, int], layout: str, dtype: str, bandwidth: float, rounds: int
) -> list[dict[str, Any]]:
    """Ours and the peers on one activation."""
    channels, edge = shape
    bytes_each = batch * channels * edge * edge * DTYPES[dtype].itemsize
    buffers = max(2, math.ceil(4 * l2_bytes() / bytes_each))

    def make() -> Tensor:
        x = torch.randn(batch, channels, edge, edge, device="cuda").mul_(2).add_(3)
        return x.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    x0, dy0 = make(), make()
    calls = contestants(x0, dy0, [x0.clone() for _ in range(buffers)], [dy0.clone() for _ in range(buffers)])
    error = check(x0, dy0)
    times = {name: statistics.median(t) for name, t in measure(calls, buffers, rounds).items()}
    rows = []
    for name in [*PASSES, "forward", "forward+backward"]:
        row: dict[str, Any] = {
            "operator": name,
            "batch": batch,
            "channels": channels,
            "edge": edge,
            "layout": layout,
            "dtype": dtype,
            "MB": bytes_each / 1e6,
            "us": times[name] * 1e6,
        }
        if name in PASSES:
            floor = PASSES[name] * bytes_each / bandwidth
            row |= {"floor us": floor * 1e6, "of copy": floor / times[name], "error": error[name]}
        if name in PEERS:
            peer = times[PEERS[name]]
            row |= {"peer": PEERS[name], "peer us": peer * 1e6, "speedup": peer / times[name]}
        rows.append(row)
    return rows


def contestants(x0: Tensor, dy0: Tensor, xs: list[Tensor], dys: list[Tensor]) -> dict[str, Call]:
    """Everything that is timed, as functions of the number of a buffer."""
    channels = x0.shape[1]
    (count,), (mean64,), (m2,) = ops.moments(x0)
    mean, inverse_std = mean64.float(), (m2 / count + EPS).rsqrt().float()
    weight, bias = torch.rand(channels, device="cuda"), torch.rand(channels, device="cuda")
    total, total_mean, total_m2 = torch.zeros(1 + 2 * channels, dtype=torch.float64, device="cuda").split(
        [1, channels, channels]
    )
    batch_mean, batch_var = torch.empty(2, channels, device="cuda")
    scale = (weight * inverse_std)[None]
    shift = bias[None] - mean * scale
    sum_dy, sum_dy_xmu = torch.rand(2, channels, device="cuda")
    counts = torch.tensor([x0.numel() // channels], dtype=torch.int32, device="cuda")
    leaves = [x.detach().requires_grad_() for x in xs]
    weight_leaf, bias_leaf = weight.clone().requires_grad_(), bias.clone().requires_grad_()

    def ours(i: int) -> Tensor:
        return functional.batch_norm(leaves[i], weight_leaf, bias_leaf, eps=EPS)[0]

    def cudnn(i: int) -> Tensor:
        return nn.functional.batch_norm(leaves[i], None, None, weight_leaf, bias_leaf, training=True, eps=EPS)

    def gradients(forward: Callable[[int], Tensor], i: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(i), (leaves[i], weight_leaf, bias_leaf), dys[i])

    return {
        "moments": lambda i: ops.moments(xs[i]),
        "torch stats": lambda i: torch.batch_norm_stats(xs[i], EPS),
        "accumulate": lambda i: ops.accumulate(xs[i], total, total_mean, total_m2, batch_mean, batch_var),
        "normalize": lambda i: ops.normalize(xs[i], scale, shift),
        "torch elemt": lambda i: torch.batch_norm_elemt(xs[i], weight, bias, mean, inverse_std, EPS),
        "backward_reduce": lambda i: ops.backward_reduce(dys[i], xs[i], mean64[None]),
        "torch backward_reduce": lambda i: torch.batch_norm_backward_reduce(
            dys[i], xs[i], mean, inverse_std, weight, True, True, True
        ),
        "backward_apply": lambda i: ops.backward_apply(dys[i], xs[i], scale, shift, shift),
        "torch backward_elemt": lambda i: torch.batch_norm_backward_elemt(
            dys[i], xs[i], mean, inverse_std, weight, sum_dy, sum_dy_xmu, counts
        ),
        "forward": ours,
        "cudnn forward": cudnn,
        "forward+backward": lambda i: gradients(ours, i),
        "cudnn forward+backward": lambda i: gradients(cudnn, i),
    }


def check(x: Tensor, dy: Tensor) -> dict[str, float]:
    """Relative errors against float64; an error of more than rounding stops the benchmark."""
    x64, dy64 = x.double(), dy.double()
    true_var, true_mean = torch.var_mean(x64, (0, 2, 3), correction=0)
    n = x.numel() / x.shape[1]
    (count,), (mean,), (m2,) = ops.moments(x)
    channels = x.shape[1]
    total = torch.zeros(1 + 2 * channels, dtype=torch.float64, device="cuda").split([1, channels, channels])
    ops.accumulate(x, *total)
    a, b, c = (torch.rand(1, channels, device="cuda") + 0.5 for _ in range(3))
    wide = [t.double()[..., None, None] for t in (a, b, c)]
    centered = x64 - true_mean[:, None, None]
    sums = ops.backward_reduce(dy, x, true_mean[None])
    rounding = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[x.dtype]
    errors = {
        "moments": (max(_error(mean, true_mean), _error(m2 / count, true_var)), 1e-6),
        "accumulate": (max(_error(total[1], true_mean), _error(total[2] / n, true_var)), 1e-6),
        "normalize": (_error(ops.normalize(x, a, b), wide[0] * x64 + wide[1]), rounding),
        "backward_reduce": (
            max(
                _error(sums[0][0], dy64.sum((0, 2, 3))),
                _error(sums[1][0], (dy64 * centered).sum((0, 2, 3)), (dy64 * centered).abs().sum((0, 2, 3))),
            ),
            1e-5,
        ),
        "backward_apply": (
            _error(ops.backward_apply(dy, x, a, b, c), wide[0] * dy64 + wide[1] * x64 + wide[2]),
            rounding,
        ),
    }
    for name, (error, limit) in errors.items():
        if not error <= limit:
            raise AssertionError(f"{name} of {tuple(x.shape)} {x.dtype}: relative error {error:.1e} > {limit:.0e}")
    return {name: error for name, (error, _) in errors.items()}


def _error(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    size = expected if size is None else size
    return float((actual.double() - expected).norm() / size.norm())


def measure(calls: dict[str, Call], buffers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each contestant in each round, by CUDA events."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, float] = {}
    for name, call in calls.items():
        call(0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = [call(i) for i in range(buffers)]
        host[name] = time.perf_counter() - start
        torch.cuda.synchronize()
        del kept
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(2e6 + 4e9 * host[name]))  # about 2e9 cycles a second: twice what enqueuing takes
            begin.record()
            kept = [calls[name](i) for i in range(buffers)]  # kept: a result's memory must not be used again at once
            end.record()
            torch.cuda.synchronize()
            del kept
            times[name].append(begin.elapsed_time(end) / 1e3 / buffers)
    return times


def l2_bytes() -> int:
    """The size of the L2 cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


# ---- update_bn_stats ------------------------------------------------------------------------------------------------


def update_row(iterations: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per mini-batch of ResNet-50, bfloat16, channels-last, batch 32; null where a package is missing."""
    if importlib.util.find_spec("torchvision") is None:
        return {"ms": None, "forward ms": None, "fvcore ms": None}
    from torchvision.models import resnet50

    model = resnet50().to(device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last).train()
    image = torch.randn(32, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    images = [image.contiguous(memory_format=torch.channels_last)] * iterations

    @torch.no_grad()
    def forward() -> None:
        for batch in images:
            model(batch)

    contestants: dict[str, Callable[[], Any]] = {
        "forward ms": forward,
        "ms": lambda: update_bn_stats(model, images, iterations),
    }
    if importlib.util.find_spec("fvcore") is not None:
        from fvcore.nn import update_bn_stats as fvcore_update

        contestants["fvcore ms"] = lambda: fvcore_update(model, images, iterations)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if turn > 0:  # the first is warm-up
                times[name].append((time.perf_counter() - start) / iterations * 1e3)
    result: dict[str, Any] = {"ms": None, "forward ms": None, "fvcore ms": None}
    return result | {name: statistics.median(t) for name, t in times.items()}


# ---- Goals and tables -----------------------------------------------------------------------------------------------


def goals(rows: list[dict[str, Any]], update: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project wants, and what was measured."""

    def goal(what: str, measured: float, least: float) -> dict[str, Any]:
        return {"what": what, "goal": f">= {least:g}", "measured": measured, "met": measured >= least}

    entries = []
    for name in PASSES:
        large = [row["of copy"] for row in rows if row["operator"] == name and row["MB"] >= 64]
        if large:
            least = 0.85 if name.startswith("backward") else 0.9
            entries.append(goal(f"{name}: of the copy's bytes/s, from 64 MB up, worst", min(large), least))
    for name in PEERS:
        ratios = [row["speedup"] for row in rows if row["operator"] == name]
        entries.append(goal(f"{name}: against {PEERS[name]}, worst", min(ratios), 1.0))
        mean = statistics.geometric_mean(ratios)
        entries.append(goal(f"{name}: against {PEERS[name]}, geometric mean", mean, 1.2 if name == "moments" else 1.0))
    if update["ms"]:
        entries.append(goal("plain forward / update_bn_stats", update["forward ms"] / update["ms"], 1 / 1.03))
        if update["fvcore ms"]:
            entries.append(goal("fvcore / update_bn_stats", update["fvcore ms"] / update["ms"], 1.3))
    return entries


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result as text."""
    head = ("operator", "batch", "channels", "edge", "layout", "dtype", "MB", "us", "floor us", "of copy", "peer us")
    widths = (17, 6, 9, 5, 7, 9, 7, 8, 9, 8, 8)

    def line(cells: list[str]) -> str:
        return "".join(cell.rjust(width) for cell, width in zip(cells, (*widths, 8), strict=True))

    yield line([*head, "speedup"])
    for row in result["rows"]:
        values = [row.get(name, "") for name in (*head, "speedup")]
        yield line([f"{value:.3g}" if isinstance(value, float) else str(value) for value in values])
    for name, value in result["summary"].items():
        if name != "goals":
            yield f"{name}: {value}"
    for entry in result["summary"]["goals"]:
        verdict = "met   " if entry["met"] else "MISSED"
        yield f"{verdict} {entry['what']}: {entry['measured']:.3g} (goal {entry['goal']})"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: to see that all runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no row after that")
    arguments = parser.parse_args()
    result = run(quick=arguments.quick, budget=arguments.budget)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for text in lines(result):
        print(text)


if __name__ == "__main__":
    main()
