"""What does a recalibration cost? ``update_bn_stats`` against fvcore, swa_utils and the plain train-mode forward.

Everyone runs the same model, with the same weights, on the same mini-batch; set-up and finishing are not counted: an
iteration lasts from one request for a mini-batch to the next. bfloat16 is autocast with float32 weights.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import update_bn_stats as fvcore_update_bn_stats  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import precisebn
from benchmarks.harness import Result, goal, interleave, now, quartiles, ratios, torchvision_models

PEERS = ("fvcore", "swa_utils", "forward")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MAX_ERROR = 1e-6  # of each layer's statistics: two roundings of float32 buffers, 6e-8 each, and room for the kernel


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

    @property
    def title(self) -> str:
        """Short name."""
        return f"{self.model} {self.layout} {self.dtype}"

    def autocast(self) -> torch.autocast:
        """The context that everything of this setting runs in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")


def settings(quick: bool) -> Iterator[Setting]:
    """Every row: float32 at 224 x 224 as in practice, bfloat16 smaller, since few CPUs have instructions for it."""
    models = ("resnet18", "mobilenet_v2") if quick else ("resnet50", "resnet18", "mobilenet_v2")
    for dtype, model, layout in itertools.product(("float32", "bfloat16"), models, LAYOUTS):
        if quick:
            yield Setting(model, layout, dtype, batch=4, size=64, rounds=3, budget=5.0)
        elif dtype == "bfloat16":
            yield Setting(model, layout, dtype, batch=8, size=224, rounds=9, budget=10.0)
        else:
            yield Setting(
                model, layout, dtype, batch=32, size=224, rounds=11, budget=45.0 if model == "resnet50" else 20.0
            )


def run(quick: bool = False) -> Result:
    """Time of an iteration, and how many times as fast as its peers ``precisebn`` is."""
    rows = [_row(setting) for setting in settings(quick)]
    resnet50 = [row["x fvcore"] for row in rows if row["model"] == "resnet50" and row["dtype"] == "float32"]
    goals = [goal("update_bn_stats, the slowest row: x fvcore", min(row["x fvcore"] for row in rows), at_least=1.0)]
    for layout, ratio in zip(LAYOUTS, resnet50, strict=False):
        goals.insert(-1, goal(f"update_bn_stats, ResNet-50 float32 {layout}: x fvcore", ratio, at_least=1.15))
    return {"name": "update", "rows": rows, "summary": {"goals": goals}}


def plot(result: Result, path: Path) -> None:
    """How many times as fast as each peer, per setting."""
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for i, peer in enumerate(PEERS):
        position = [j + (i - 1) * 0.25 for j in range(len(rows))]
        middle = [row[f"x {peer}"] for row in rows]
        quarter = [row["_quartiles"][peer] for row in rows]
        spread = [[m - q[0] for m, q in zip(middle, quarter, strict=True)]]
        spread += [[q[2] - m for m, q in zip(middle, quarter, strict=True)]]
        axes.barh(position, middle, height=0.23, xerr=spread, label=f"against {peer}", error_kw={"linewidth": 0.8})
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
    """

    def __init__(self, batch: Tensor, iterations: int) -> None:
        self.batch = batch
        self.last = batch[:2, :, :64, :64].contiguous(memory_format=_format_of(batch))
        self.iterations = iterations
        self.elapsed = 0.0  # seconds per iteration

    def __len__(self) -> int:
        return self.iterations + 1

    def __iter__(self) -> Iterator[Tensor]:
        start = now()
        for _ in range(self.iterations):
            yield self.batch
        self.elapsed = (now() - start) / self.iterations
        yield self.last


def _row(setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    layout = LAYOUTS[setting.layout]
    model = getattr(torchvision_models(), setting.model)().train().to(memory_format=layout)
    batch = torch.randn(setting.batch, 3, setting.size, setting.size).contiguous(memory_format=layout)

    def contestant(update: Callable[[nn.Module, Stopwatch], object]) -> Callable[[], float]:
        def measure() -> float:
            loader = Stopwatch(batch, setting.iterations)
            update(model, loader)
            return loader.elapsed

        return measure

    with setting.autocast():
        error = _largest_error(model, batch)
        times = interleave(
            {
                "precisebn": contestant(lambda model, loader: precisebn.update_bn_stats(model, loader, len(loader))),
                "fvcore": contestant(lambda model, loader: fvcore_update_bn_stats(model, loader, len(loader))),
                "swa_utils": contestant(lambda model, loader: update_bn(loader, model)),
                "forward": contestant(_forward),
            },
            setting.rounds,
            setting.budget,
        )
    own = times["precisebn"]
    against = {peer: quartiles(ratios(times[peer], own)) for peer in PEERS}
    return {
        "model": setting.model,
        "layout": setting.layout,
        "dtype": setting.dtype,
        "batch": f"{setting.batch} x {setting.size}^2",
        "rounds": len(own),
        "ms": quartiles(own)[1] * 1e3,
        **{f"x {peer}": against[peer][1] for peer in PEERS},
        "x fvcore, quartiles": [against["fvcore"][0], against["fvcore"][2]],
        "error": error,
        "_quartiles": against,
        "_seconds": times,
    }


def _forward(model: nn.Module, loader: Stopwatch) -> None:
    with torch.no_grad():
        for batch in loader:
            model(batch)


def _largest_error(model: nn.Module, batch: Tensor) -> float:
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
    precisebn.update_bn_stats(model, pieces, len(pieces))
    for hook in hooks:
        hook.remove()

    worst = 0.0
    for layer, inputs in seen.items():
        var, mean = torch.var_mean(torch.cat(inputs, 1), 1, correction=0)
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        # The mean is kept in float32: what its rounding costs where it is large against the std is not the estimator's.
        scale = var.sqrt().maximum(mean.abs())
        errors = ((layer.running_mean - mean) / scale).abs(), ((layer.running_var - var) / var).abs()
        worst = max(worst, *(float(error.max()) for error in errors))
    if not worst <= MAX_ERROR:
        raise ArithmeticError(f"the statistics are off by {worst:.2g}; nothing is timed before they are right")
    return worst


def _format_of(batch: Tensor) -> torch.memory_format:
    nhwc = batch.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format
