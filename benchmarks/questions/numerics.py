"""How exact are statistics, outputs and gradients? Data of N(mu, 1) in float32, for mu from 1 to 1e5.

The variance: everyone recalibrates one BatchNorm2d on the same 20 mini-batches; the reference is float64 NumPy on these
float32 values. ``precisebn`` and ``fvcore`` estimate the variance of all values together. ``swa_utils`` averages the
mini-batches' unbiased variances, so it is held against that average.

Outputs and gradients: ``precisebn.functional``'s batch_norm and frozen_batch_norm beside ``F.batch_norm``, in both
memory formats, against the definition in float64 on the same values; errors relative to the largest value.

It runs on either device: so the kernels of both are judged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.peers import installed, missing
from precisebn.functional import batch_norm, frozen_batch_norm

__all__ = ["QUESTION", "page", "plot", "run"]

QUESTION = Question(
    "How exact are statistics, outputs and gradients, for mean / std from 1 to 1e5?",
    against="fvcore, swa_utils and `F.batch_norm`, all against float64",
)

NUM_BATCHES, SHAPE = 20, (32, 16, 8, 8)
LAYER_SHAPE = (16, 8, 14, 14)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
EPS = 1e-5
BOUND = 1e-6  # up to mean / std = 1e4
Update = Callable[[nn.Module, list[Tensor], int], object]
PEERS = ("precisebn", "fvcore", "swa_utils")
QUANTITIES = ("output", "dx", "frozen output")


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Relative errors: of the variance, the worst of 16 channels, and of outputs and gradients."""
    means = [1e0, 1e3, 1e5] if quick else [10 ** (i / 2) for i in range(11)]
    variances = [_variance_row(mean, device) for mean in means]
    layers = [_layer_row(mean, layout, device) for mean in means for layout in LAYOUTS]
    goals = [
        goal("relative error of the variance, mean / std up to 1e4", _worst(variances, "precisebn"), at_most=BOUND)
    ]
    for quantity in QUANTITIES:
        what = f"{quantity}: error over the largest value, mean / std up to 1e4"
        goals.append(goal(what, _worst(layers, quantity), at_most=BOUND))
    return {"rows": variances + layers, "summary": {"goals": goals, "peers": missing(["fvcore"])}}


def page(result: Result) -> dict[str, list[dict[str, Any]]]:
    """A table of the variance, and one of the layers."""
    variances, layers = _tables(result)
    return {
        "Relative error of the variance": variances,
        "Errors of outputs and gradients over their largest value, `precisebn.functional` and `F.batch_norm`": layers,
    }


def plot(result: Result, path: Path) -> None:
    """Error over mean / std: left the variance, right outputs and gradients."""
    import matplotlib.pyplot as plt

    variances, layers = _tables(result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    _plot_variance(left, variances)
    _plot_layers(right, layers)
    for axes in (left, right):
        axes.plot([1, 1e4], [BOUND, BOUND], color="gray", linestyle=":", label="goal up to 1e4")
        axes.set_xlabel("mean / std of the data")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_variance(axes: Any, rows: list[dict[str, Any]]) -> None:
    x = [row["mean / std"] for row in rows]
    for peer, marker in zip(PEERS, "os^", strict=True):
        if peer not in rows[0]:
            continue
        axes.loglog(x, [max(row[peer], 1e-9) for row in rows], marker=marker, label=peer)
        negative = [row for row in rows if row["_negative"][peer]]
        axes.loglog(
            [row["mean / std"] for row in negative], [row[peer] for row in negative], "kx", markersize=11, zorder=3
        )
    axes.plot([], [], "kx", markersize=11, label="negative variance")
    axes.set_ylabel("relative error of the worst channel")
    axes.set_title("Variance of 20 float32 mini-batches, against float64")


def _plot_layers(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The worse of both memory formats."""
    x = sorted({row["mean / std"] for row in rows})
    for quantity, marker in zip(QUANTITIES, "os^", strict=True):
        for suffix, color, name in (("", "C0", "precisebn"), (", torch", "C1", "F.batch_norm")):
            worst = [max(row[quantity + suffix] for row in rows if row["mean / std"] == mean) for mean in x]
            axes.loglog(x, worst, marker=marker, color=color, label=f"{name}: {quantity}")
    axes.tick_params(labelleft=True)
    axes.set_ylabel("error over the largest value")
    axes.set_title("Outputs and gradients in float32, against float64")


def _tables(result: Result) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the variance, and those of the layers."""
    rows = result["rows"]
    return [row for row in rows if "layout" not in row], [row for row in rows if "layout" in row]


def _worst(rows: list[dict[str, Any]], column: str) -> float:
    """The largest error up to mean / std = 1e4."""
    return max(float(row[column]) for row in rows if row["mean / std"] <= 1.001e4)


def _variance_row(mean: float, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(SHAPE, generator=generator) + mean for _ in range(NUM_BATCHES)]
    values = np.stack([batch.numpy().astype(np.float64) for batch in batches])
    population = values.var(axis=(0, 1, 3, 4))
    average = values.var(axis=(1, 3, 4), ddof=1).mean(axis=0)
    batches = [batch.to(device) for batch in batches]
    found = {"precisebn": (_variance(precisebn.update_bn_stats, batches), population)}
    fvcore = installed("fvcore.nn")
    if fvcore is not None:
        found["fvcore"] = (_variance(fvcore.update_bn_stats, batches), population)
    found["swa_utils"] = (_variance(lambda model, loader, _: update_bn(loader, model), batches), average)
    errors = {peer: float(np.max(np.abs(var / expected - 1))) for peer, (var, expected) in found.items()}
    negative = {peer: bool((var < 0).any()) for peer, (var, _) in found.items()}
    return {
        "mean / std": mean,
        **errors,
        "negative": ", ".join(peer for peer in negative if negative[peer]) or "none",
        "_negative": negative,
    }


def _variance(update: Update, batches: list[Tensor]) -> "npt.NDArray[np.float64]":
    norm = nn.BatchNorm2d(SHAPE[1], device=batches[0].device)
    update(nn.Sequential(norm).train(), batches, len(batches))
    assert norm.running_var is not None
    return norm.running_var.double().cpu().numpy()


# ---- Outputs and gradients ------------------------------------------------------------------------------------------


def _layer_row(mean: float, layout: str, device: str) -> dict[str, Any]:
    """One layer on data of this mean: errors of ours and of torch's, for each quantity."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(LAYER_SHAPE, generator=generator) for _ in range(2))
    x, dy = ((t + shift).contiguous(memory_format=LAYOUTS[layout]) for t, shift in ((x, mean), (dy, 0.0)))
    weight = torch.rand(LAYER_SHAPE[1], generator=generator) + 0.5
    bias = torch.randn(LAYER_SHAPE[1], generator=generator)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    running = exact_mean.float(), exact_var.float()

    # The definition, in float64: centred, so that it has digits to spare.
    exact = _with_gradient(lambda x: _by_definition(x, weight, bias, *_two_pass(x)), x.double(), dy.double())
    exact_frozen = _by_definition(x.double(), weight, bias, *(t.double() for t in running))

    x, dy, weight, bias = (t.to(device) for t in (x, dy, weight, bias))
    means, var = (t.to(device) for t in running)
    ours = _with_gradient(lambda x: batch_norm(x, weight, bias, eps=EPS)[0], x, dy)
    torchs = _with_gradient(lambda x: F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS), x, dy)
    frozen = frozen_batch_norm(x, means, var, weight, bias, eps=EPS)
    torchs_frozen = F.batch_norm(x, means, var, weight, bias, eps=EPS)
    row: dict[str, Any] = {"mean / std": mean, "layout": layout}
    found = zip(QUANTITIES, (*ours, frozen), (*torchs, torchs_frozen), (*exact, exact_frozen), strict=True)
    for quantity, mine, theirs, truth in found:
        row |= {quantity: _error(mine, truth), f"{quantity}, torch": _error(theirs, truth)}
    return row


def _with_gradient(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output and dx."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def _two_pass(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


def _by_definition(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    mean, inverse_std, weight, bias = (t.double()[:, None, None] for t in (mean, (var + EPS).rsqrt(), weight, bias))
    return (x - mean) * inverse_std * weight + bias


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).abs().max() / exact.abs().max())
