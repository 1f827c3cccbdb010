"""Training-mode batch norm, forward and backward: ``functional.batch_norm`` against torch's and others' layers.

The shapes are those of ResNet-50 at batch 32, in one group and in four (every fourth sample is of the same group, which
is how domains lie in a mixed mini-batch); besides, five levels of a feature pyramid normalized together, against
flattening, concatenating, normalizing and splitting them; and on CUDA layers so small that launches take longer than
their values. The floor is the time of the passes over memory that cannot be avoided (forward: read x twice, write y;
backward: read x and dy twice, write dx), each taken from the plainest operator of torch in the same round; on CUDA,
where torch uses cuDNN, it is these bytes over a device-to-device copy's bandwidth.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Question, Result, goal
from benchmarks.harness.inputs import (
    LAYOUTS,
    PYRAMID,
    RESNET50,
    SMALL,
    Pair,
    Setting,
    Shape,
    dtype_name,
    laid_out,
    pairs,
    random_pool,
    shape_name,
)
from benchmarks.harness.timing import Times, comparison, copy_bandwidth, in_time, measure, rounds_of, speeds
from benchmarks.peers import missing
from benchmarks.peers.batch_norm import batch_norm_peers, right_ones
from precisebn.functional import batch_norm

__all__ = ["QUESTION", "concatenated_batch_norm", "run"]

QUESTION = Question(
    "Is the batch norm over groups as fast in training as torch's?",
    against="`F.batch_norm` (on CUDA with and without cuDNN), `nn.BatchNorm2d`, timm's BatchNormAct2d, "
    "apex's SyncBatchNorm; flatten, concatenate, normalize, split",
    share=5,
)

NUM_GROUPS = 4
FORWARD, TRAINING, GROUPED, PYRAMID_LEVELS = (
    "forward",
    "forward + backward",
    f"forward + backward, {NUM_GROUPS} groups",
    "forward + backward, 5 levels together",
)
PASSES = {FORWARD: 3, TRAINING: 8, GROUPED: 8}
WITHOUT_CUDNN = "F.batch_norm without cuDNN"
FLATTEN = "flatten, cat, F.batch_norm, split"


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Time of ours in every row, and how many times as fast as each peer it is."""
    groups = _settings(device, quick)
    copy = copy_bandwidth(quick) if device == "cuda" else None
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    done = 0
    for settings in groups:  # of one dtype each: one pool at a time
        pool = random_pool(settings, device, quick)
        for setting in in_time(settings, deadline):
            more, not_able = _rows(setting, pool, device, quick, copy)
            rows += more
            failed |= not_able
            done += 1
    pyramid: list[Shape] = [(n, c, h // 4, w // 4) for n, c, h, w in PYRAMID] if quick else list(PYRAMID)
    rows += [_pyramid_row(pyramid, layout, device, quick) for layout in LAYOUTS]
    summary = {
        "goals": _goals(rows, device),
        "tensors left out for lack of time": sum(map(len, groups)) - done,
        "peers": missing(["timm", "apex"]),
        "peers that do not run": "; ".join(f"{name}: {why}" for name, why in failed.items()) or "none",
    }
    return {"rows": rows, "summary": summary}


def _settings(device: str, quick: bool) -> list[list[Setting]]:
    if quick:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return [[Setting((8, 64, 28, 28), layout, dtype) for layout in LAYOUTS]]
    if device == "cuda":
        shapes = dict.fromkeys((torch.bfloat16, torch.float32, torch.float16), RESNET50 + SMALL)
    else:
        shapes = {torch.float32: RESNET50, torch.bfloat16: RESNET50[2::4]}
    return [[Setting(s, layout, dtype) for layout in LAYOUTS for s in some] for dtype, some in shapes.items()]


def _rows(
    setting: Setting, pool: Tensor, device: str, quick: bool, copy: float | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    feed = [pair._replace(x=pair.x.detach().requires_grad_()) for pair in pairs(setting, pool)]
    group = torch.arange(setting.shape[0], device=device) % NUM_GROUPS
    _check([feed[0]], None)
    _check([feed[0]], group)
    calls = max(2, min(16, (1 << 30) // setting.bytes))
    layers, failed = right_ones(
        batch_norm_peers(setting.shape[1], setting.layout, device), feed[0].x, _tolerance(setting.dtype) * 10
    )
    contestants = _contestants(setting, group, device, layers)
    times = measure(contestants, feed, device, rounds_of(device, quick), 3 if device == "cuda" else 6, calls)
    against_others = [name for name in contestants if name not in (*PASSES, *_passes(), "F.batch_norm forward")]
    rows = []
    for what, against in {
        FORWARD: ["F.batch_norm forward"],
        TRAINING: against_others,
        GROUPED: ["nn.BatchNorm2d"],
    }.items():
        bytes_moved = PASSES[what] * setting.bytes
        floor = _floor_on_cpu(what, times) if copy is None else [bytes_moved / copy] * len(times[what])
        row = {"what": what, **setting.columns(), **comparison(times, what, against, floor)}
        row.pop("MiB")
        rows.append(row)
    return rows, failed


def _contestants(
    setting: Setting, group: Tensor, device: str, layers: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, Callable[..., Any]]:
    """Called with the fields of a :class:`Pair`; gradients are those of the input, weight and bias, as in training."""
    channels = setting.shape[1]
    weight = torch.ones(channels, device=device, requires_grad=True)
    bias = torch.zeros(channels, device=device, requires_grad=True)

    def training(forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Callable[..., Any]:
        def step(x: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(x), [x, *parameters], dy)

        return step

    def inference(forward: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def step(x: Tensor, *_: Tensor) -> Tensor:
            with torch.no_grad():
                return forward(x)

        return step

    def ours(x: Tensor) -> Tensor:
        return batch_norm(x, weight, bias)[0]

    def ours_grouped(x: Tensor) -> Tensor:
        return batch_norm(x, weight, bias, group=group, num_groups=NUM_GROUPS)[0]

    def torchs(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def torchs_without_cudnn(x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return torchs(x)

    parameters = [weight, bias]
    found = {
        FORWARD: inference(ours),
        TRAINING: training(ours, parameters),
        GROUPED: training(ours_grouped, parameters),
        "F.batch_norm forward": inference(torchs),
        "F.batch_norm": training(torchs, parameters),
    }
    if device == "cuda":
        found[WITHOUT_CUDNN] = training(torchs_without_cudnn, parameters)
    else:
        found |= _passes()
    for name, layer in layers.items():
        own = list(layer.parameters()) if isinstance(layer, nn.Module) else []
        found[name] = training(layer, own)
    return found


def _passes() -> dict[str, Callable[..., Any]]:
    """The memory's speed, as in ``kernels``."""

    def without_gradient(pass_over: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
        return lambda x, dy, raw_x, raw_dy: pass_over(raw_x, raw_dy)

    return {
        "read": without_gradient(lambda x, dy: x.sum()),
        "read two": without_gradient(torch.dot),
        "write": without_gradient(lambda x, dy: torch.add(x, 1)),
        "write from two": without_gradient(torch.add),
    }


def _floor_on_cpu(what: str, times: Times) -> list[float]:
    """Seconds in each round."""
    passes = ["read", "write"] if what == FORWARD else ["read", "write", "read two", "write from two"]
    return [sum(parts) for parts in zip(*(times[name] for name in passes), strict=True)]


# ---- Levels of a pyramid --------------------------------------------------------------------------------------------


def _pyramid_row(shapes: list[Shape], layout: str, device: str, quick: bool) -> dict[str, Any]:
    channels = shapes[0][1]
    parameters = [torch.ones(channels, device=device), torch.zeros(channels, device=device)]
    weight, bias = (parameter.requires_grad_() for parameter in parameters)
    batches = [_levels(shapes, layout, device) for _ in range(4)]
    _check(batches[0], None)

    def training(forward: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., Any]:
        def step(*levels: Pair) -> tuple[Tensor, ...]:
            xs = [pair.x for pair in levels]
            return torch.autograd.grad(forward(xs), [*xs, weight, bias], [pair.dy for pair in levels])

        return step

    contestants = {
        "ours": training(lambda xs: batch_norm(xs, weight, bias)[0]),
        FLATTEN: training(lambda xs: concatenated_batch_norm(xs, weight, bias)),
    }
    times = measure(contestants, [tuple(batch) for batch in batches], device, rounds_of(device, quick), 10, calls=8)
    row = {"what": PYRAMID_LEVELS, "shape": f"{channels} channels", "layout": layout, "dtype": "float32"}
    return row | comparison(times, "ours", [FLATTEN])


def _levels(shapes: list[Shape], layout: str, device: str) -> list[Pair]:
    settings = [Setting(shape, layout, torch.float32) for shape in shapes]
    tensors = [[laid_out(torch.randn(s.bytes // 4, device=device), s) for s in settings] for _ in range(2)]
    return [Pair(x.requires_grad_(), dy, x, dy) for x, dy in zip(*tensors, strict=True)]


def concatenated_batch_norm(xs: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """What users write to share statistics between feature levels: flatten, concatenate, normalize, split."""
    flat = torch.cat([x.flatten(2) for x in xs], dim=2)
    normalized = F.batch_norm(flat, None, None, weight, bias, training=True)
    pieces = normalized.split([x[0, 0].numel() for x in xs], dim=2)
    return [piece.view(x.shape) for piece, x in zip(pieces, xs, strict=True)]


# ---- Correct before fast, and the goals -----------------------------------------------------------------------------


def _check(levels: list[Pair], group: Tensor | None) -> None:
    """Refuse to time a wrong result: forward and backward against float64, group by group."""
    exact = [pair.x.detach().double().requires_grad_() for pair in levels]
    channels, device = exact[0].shape[1], exact[0].device
    weight, bias = (torch.randn(channels, dtype=torch.float64, device=device) for _ in range(2))
    if group is None:
        ys, _ = batch_norm([pair.x for pair in levels], weight.float(), bias.float())
        expected = concatenated_batch_norm(exact, weight, bias)
    else:
        y, _ = batch_norm(levels[0].x, weight.float(), bias.float(), group=group, num_groups=NUM_GROUPS)
        parts = [concatenated_batch_norm([exact[0][group == g]], weight, bias)[0] for g in range(NUM_GROUPS)]
        order = torch.cat([torch.nonzero(group == g).flatten() for g in range(NUM_GROUPS)]).argsort()
        ys, expected = [y], [torch.cat(parts)[order]]
    grads = torch.autograd.grad(ys, [pair.x for pair in levels], [pair.dy for pair in levels])
    true_grads = torch.autograd.grad(expected, exact, [pair.dy.double() for pair in levels])
    tolerance = _tolerance(ys[0].dtype)
    for ours, truth in zip((*ys, *grads), (*expected, *true_grads), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance * 10)


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 4e-2


def _goals(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    goals = []
    for layout in LAYOUTS:
        for dtype in map(dtype_name, (torch.float32, torch.bfloat16, torch.float16)):
            alike = [row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)]
            mine, small = _apart(alike)
            times = speeds([row for row in mine if row["what"] == TRAINING], "F.batch_norm")
            if not times:
                continue
            what = f"forward + backward, ResNet-50 {dtype} {layout}: x F.batch_norm"
            goals.append(goal(f"{what}, slowest shape", min(times), at_least=1.0))
            goals.append(goal(f"{what}, geometric mean", statistics.geometric_mean(times), at_least=1.0))
            grouped = speeds([row for row in mine if row["what"] == GROUPED], "nn.BatchNorm2d")
            what = f"{GROUPED}, ResNet-50 {dtype} {layout}: x nn.BatchNorm2d, slowest shape"
            goals.append(goal(what, min(grouped), at_least=1.0))
            if device == "cuda":  # where F.batch_norm is cuDNN's
                forward = speeds([row for row in mine if row["what"] == FORWARD], "F.batch_norm forward")
                what = f"forward, ResNet-50 {dtype} {layout}: x F.batch_norm, slowest shape"
                goals.append(goal(what, min(forward), at_least=1.0))
            for way, theirs in ((FORWARD, "F.batch_norm forward"), (TRAINING, "F.batch_norm")):
                if of_small := speeds([row for row in small if row["what"] == way], theirs):
                    what = f"{way}, small layers {dtype} {layout}: x F.batch_norm, slowest shape"
                    goals.append(goal(what, min(of_small), at_least=1.0))
    pyramid = speeds([row for row in rows if row["what"] == PYRAMID_LEVELS], FLATTEN)
    goals.append(goal("five feature levels together: x flatten-cat-BN-split, slower layout", min(pyramid), at_least=2))
    return goals


def _apart(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of large layers and of small ones."""
    names = {shape_name(shape) for shape in SMALL}
    return [row for row in rows if row["shape"] not in names], [row for row in rows if row["shape"] in names]
