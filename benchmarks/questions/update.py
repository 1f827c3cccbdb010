"""What does a recalibration cost? ``update_bn_stats`` against fvcore, swa_utils and the plain train-mode forward.

Everyone runs the same model, with the same weights, on the same mini-batch; set-up and finishing are not counted: an
iteration lasts from one request for a mini-batch to the next. "bfloat16" is autocast with float32 weights; "bfloat16
weights" is a model converted to it. "NCHW to NHWC" is a contiguous model on contiguous mini-batches, which precisebn
alone lays out anew, by ``memory_format=torch.channels_last``; without that it is one of its own peers, "NCHW".

On a CPU two columns count the pages of memory that the system hands out anew in an iteration, to precisebn and to
fvcore. The C library gives large outputs back and asks for them again, or it does not, as chance has it; where a page
costs a microsecond or more, as on a virtual machine, that decides what either takes.

On CUDA two columns say where time beyond the plain forward goes: how many more kernels, copies and fills are launched
for each layer, and how much longer the host takes for it (the GPU not waited for).
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.profiler import ProfilerActivity, profile

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.harness.machine import page_faults
from benchmarks.harness.timing import in_time, interleave, now, quartiles, ratios
from benchmarks.peers import installed, missing

__all__ = ["QUESTION", "plot", "run"]

QUESTION = Question(
    "What does a recalibration cost?",
    against="`fvcore.nn.update_bn_stats`, `torch.optim.swa_utils.update_bn`, the plain train-mode forward",
    share=4,
)

PEERS = ("fvcore", "swa_utils", "forward", "NCHW")
CONVERTED = "NCHW to NHWC"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MAX_ERROR = 1e-6  # of each layer's statistics: two roundings of float32 buffers, 6e-8 each, and room for the kernel
MAX_ERROR_BFLOAT16 = 1e-2  # of buffers that are bfloat16 themselves: two roundings of 2e-3 each

Update = Callable[[nn.Module, "Stopwatch"], object]


@dataclass(frozen=True)
class Setting:
    """One row: what runs, and how often."""

    model: str
    layout: str
    dtype: str
    batch: int
    size: int
    rounds: int
    budget: float
    iterations: int = 1
    device: str = "cpu"

    def memory_format(self) -> torch.memory_format:
        """Of the model and the mini-batches, as they come."""
        return LAYOUTS["NCHW"] if self.layout == CONVERTED else LAYOUTS[self.layout]

    def converted(self) -> torch.memory_format | None:
        """What precisebn lays mini-batches out in."""
        return LAYOUTS["NHWC"] if self.layout == CONVERTED else None

    def autocast(self) -> torch.autocast:
        """The context that everything of this setting runs in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def weights(self) -> torch.dtype:
        """The dtype of parameters, buffers and images."""
        return torch.bfloat16 if self.dtype == "bfloat16 weights" else torch.float32


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Time of an iteration, and how many times as fast as its peers ``precisebn`` is."""
    needed = missing(["torchvision"])
    chosen = [] if needed else list(_cuda_settings(quick) if device == "cuda" else _cpu_settings(quick))
    rows = [_row(setting) for setting in in_time(chosen, deadline)]
    summary = {
        "goals": _cuda_goals(rows) if device == "cuda" else _cpu_goals(rows),
        "rows left out for lack of time": len(chosen) - len(rows),
        "peers": missing(["fvcore"]),
        "models": needed,
    }
    return {"rows": rows, "summary": summary}


def _cpu_settings(quick: bool) -> Iterator[Setting]:
    """float32 at 224 x 224 as in practice, bfloat16 smaller, since few CPUs have instructions for it."""
    models = ("resnet18", "mobilenet_v2") if quick else ("resnet50", "resnet18", "mobilenet_v2")
    for model in ("mobilenet_v2",) if quick else ("resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121"):
        size, rounds = (64, 3) if quick else (128, 9)
        yield Setting(model, CONVERTED, "float32", batch=8, size=size, rounds=rounds, budget=10.0)
    for dtype, model, layout in itertools.product(("float32", "bfloat16"), models, LAYOUTS):
        if quick:
            yield Setting(model, layout, dtype, batch=4, size=64, rounds=3, budget=5.0)
        elif dtype == "bfloat16":
            yield Setting(model, layout, dtype, batch=8, size=224, rounds=9, budget=10.0)
        else:
            yield Setting(
                model, layout, dtype, batch=32, size=224, rounds=11, budget=45.0 if model == "resnet50" else 20.0
            )


def _cuda_settings(quick: bool) -> Iterator[Setting]:
    """The row that the goals are for first."""
    rows = [
        ("resnet50", "NHWC", "bfloat16 weights"),
        ("resnet50", "NHWC", "bfloat16"),
        ("resnet50", "NCHW", "float32"),
        ("mobilenet_v2", "NHWC", "bfloat16"),
    ]
    for model, layout, dtype in rows[:2] if quick else rows:
        size, rounds, iterations = (64, 3, 3) if quick else (224, 11, 20)
        yield Setting(model, layout, dtype, 32, size, rounds, budget=12.0, iterations=iterations, device="cuda")


def _cpu_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    mine = [row for row in rows if "x fvcore" in row]
    goals = [
        goal(f"update_bn_stats, ResNet-50 float32 {row['layout']}: x fvcore", row["x fvcore"], at_least=1.15)
        for row in mine
        if (row["model"], row["dtype"]) == ("resnet50", "float32")
    ]
    if mine:
        slowest = min(row["x fvcore"] for row in mine)
        goals.append(goal("update_bn_stats, the slowest row: x fvcore", slowest, at_least=1.0))
    return goals


def _cuda_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    goals = []
    for row in rows:
        if row["model"] == "resnet50" and row["dtype"].startswith("bfloat16"):
            what = f"update_bn_stats, ResNet-50 {row['dtype']} {row['layout']} batch 32"
            goals.append(goal(f"{what}: time over that of the plain forward", 1 / row["x forward"], at_most=1.03))
            if "x fvcore" in row:
                goals.append(goal(f"{what}: x fvcore", row["x fvcore"], at_least=1.3))
    return goals


def plot(result: Result, path: Path) -> None:
    """How many times as fast as each peer, per setting."""
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for i, peer in enumerate(PEERS):
        places = [j for j, row in enumerate(rows) if peer in row["_quartiles"]]
        position = [j + (i - 1.5) * 0.2 for j in places]
        middle = [rows[j][f"x {peer}"] for j in places]
        quarter = [rows[j]["_quartiles"][peer] for j in places]
        spread = [[m - q[0] for m, q in zip(middle, quarter, strict=True)]]
        spread += [[q[2] - m for m, q in zip(middle, quarter, strict=True)]]
        axes.barh(position, middle, height=0.19, xerr=spread, label=f"against {peer}", error_kw={"linewidth": 0.8})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['model']} {row['layout']} {row['dtype']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast per iteration; median and quartiles over rounds")
    axes.set_title("precisebn.update_bn_stats")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Stopwatch:
    """A loader of equal mini-batches that measures the time between requests for them.

    One tiny mini-batch more ends the last measurement, so that neither set-up nor finishing is in it.

    Args:
        batch: the mini-batch.
        iterations: how many times it comes.
        clock: seconds.
    """

    def __init__(self, batch: Tensor, iterations: int, clock: Callable[[], float]) -> None:
        self.batch = batch
        self.last = batch[:2, :, :64, :64].contiguous(memory_format=_format_of(batch))
        self.iterations = iterations
        self.clock = clock
        self.elapsed = 0.0  # seconds per iteration
        self.pages = 0.0  # that the system has handed out, per iteration

    def __len__(self) -> int:
        return self.iterations + 1

    def __iter__(self) -> Iterator[Tensor]:
        start, pages = self.clock(), page_faults()
        for _ in range(self.iterations):
            yield self.batch
        self.elapsed = (self.clock() - start) / self.iterations
        self.pages = (page_faults() - pages) / self.iterations
        yield self.last


def _row(setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    models = installed("torchvision.models")
    assert models is not None
    layout = setting.memory_format()
    model = getattr(models, setting.model)().train().to(setting.device, setting.weights(), memory_format=layout)
    batch = torch.randn(setting.batch, 3, setting.size, setting.size)
    batch = batch.to(setting.device, setting.weights(), memory_format=layout)

    pages: dict[str, list[float]] = {}

    def contestant(name: str, update: Update) -> Callable[[], float]:
        def measure() -> float:
            loader = Stopwatch(batch, setting.iterations, lambda: now(setting.device))
            update(model, loader)
            pages.setdefault(name, []).append(loader.pages)
            return loader.elapsed

        return measure

    updates = _updates(setting.converted())
    with setting.autocast():
        error = _largest_error(model, batch, setting.converted())
        times = interleave({name: contestant(name, u) for name, u in updates.items()}, setting.rounds, setting.budget)
        details = _beyond_forward(updates, model, batch) if setting.device == "cuda" else _pages(pages)
    own = times["precisebn"]
    against = {peer: quartiles(ratios(times[peer], own)) for peer in PEERS if peer in times}
    closest = "fvcore" if "fvcore" in against else "forward"
    return {
        "model": setting.model,
        "layout": setting.layout,
        "dtype": setting.dtype,
        "batch": f"{setting.batch} x {setting.size}^2",
        "rounds": len(own),
        "ms": quartiles(own)[1] * 1e3,
        **{f"x {peer}": against[peer][1] for peer in against},
        f"x {closest}, quartiles": [against[closest][0], against[closest][2]],
        **details,
        "error": error,
        "_quartiles": against,
    }


def _pages(taken: Mapping[str, list[float]]) -> dict[str, int]:
    """Medians of the pages of memory that the system handed out in an iteration, the warm-up left out."""
    return {f"pages, {name}": round(median(taken[name][1:])) for name in ("precisebn", "fvcore") if name in taken}


def _updates(converted: torch.memory_format | None) -> dict[str, Update]:
    """Everyone who takes part, under autocast or not."""

    def ours(memory_format: torch.memory_format | None) -> Update:
        return lambda model, loader: precisebn.update_bn_stats(model, loader, len(loader), memory_format=memory_format)

    found: dict[str, Update] = {
        "precisebn": ours(converted),
        "swa_utils": lambda model, loader: update_bn(loader, model),
        "forward": _forward,
    }
    fvcore = installed("fvcore.nn")
    if fvcore is not None:
        found["fvcore"] = lambda model, loader: fvcore.update_bn_stats(model, loader, len(loader))
    if converted is not None:
        found["NCHW"] = ours(None)
    return found


def _forward(model: nn.Module, loader: Stopwatch) -> None:
    with torch.no_grad():
        for batch in loader:
            model(batch)


# ---- Where the time goes on a GPU -----------------------------------------------------------------------------------


def _beyond_forward(updates: dict[str, Update], model: nn.Module, batch: Tensor) -> dict[str, float]:
    """What ours and fvcore add to the plain forward, for each BatchNorm layer: launches and time of the host."""
    layers = len(precisebn.get_bn_modules(model))
    names = [name for name in ("precisebn", "fvcore", "forward") if name in updates]
    launches = {name: _launches(updates[name], model, batch) for name in names}
    host = {name: 1e6 * _host_seconds(updates[name], model, batch) for name in names}
    found = {}
    for name in names[:-1]:
        found[f"{name}: launches a layer"] = (launches[name] - launches["forward"]) / layers
        found[f"{name}: host us a layer"] = (host[name] - host["forward"]) / layers
    return found


def _host_seconds(update: Update, model: nn.Module, batch: Tensor, repeats: int = 7) -> float:
    """What the host takes for a mini-batch where it need not wait: one alone, for which the driver's queue has room."""
    found = []
    for _ in range(repeats):
        now("cuda")
        loader = Stopwatch(batch, 1, time.perf_counter)
        update(model, loader)
        found.append(loader.elapsed)
    return quartiles(found)[1]


def _launches(update: Update, model: nn.Module, batch: Tensor) -> float:
    """How many kernels, copies and fills a mini-batch takes: the difference that three more make."""

    def total(iterations: int) -> int:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            update(model, Stopwatch(batch, iterations, lambda: now("cuda")))
            torch.cuda.synchronize()
        return sum(
            event.device_type.name == "CUDA" and not event.is_user_annotation for event in recorded.events() or ()
        )

    return (total(4) - total(1)) / 3


# ---- Correct before fast --------------------------------------------------------------------------------------------


def _largest_error(model: nn.Module, batch: Tensor, converted: torch.memory_format | None) -> float:
    """Check the statistics of every layer against float64 on the very tensors that the layer was given.

    Returns:
        The largest error of a mean, in standard deviations, or of a variance, relative.
    """
    model = copy.deepcopy(model)
    pieces = [piece.contiguous(memory_format=_format_of(batch)) for piece in batch[:4, :, :64, :64].chunk(2)]
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in precisebn.get_bn_modules(model)}

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[layer].append(args[0].double().transpose(0, 1).flatten(1))

    hooks = [layer.register_forward_pre_hook(keep) for layer in seen]
    precisebn.update_bn_stats(model, pieces, len(pieces), memory_format=converted)
    for hook in hooks:
        hook.remove()

    worst = 0.0
    for layer, inputs in seen.items():
        var, mean = torch.var_mean(torch.cat(inputs, 1), 1, correction=0)
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        # The mean is kept rounded: what that costs where it is large against the std is not the estimator's.
        scale = var.sqrt().maximum(mean.abs())
        errors = ((layer.running_mean - mean) / scale).abs(), ((layer.running_var - var) / var).abs()
        worst = max(worst, *(float(error.max()) for error in errors))
    limit = MAX_ERROR_BFLOAT16 if batch.dtype == torch.bfloat16 else MAX_ERROR
    if not worst <= limit:
        raise ArithmeticError(f"the statistics are off by {worst:.2g}; nothing is timed before they are right")
    return worst


def _format_of(batch: Tensor) -> torch.memory_format:
    nhwc = batch.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format
