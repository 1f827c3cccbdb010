"""How exact is the variance? 20 mini-batches of N(mu, 1) in float32, for mu from 1 to 1e5.

Everyone recalibrates one BatchNorm2d on the same data; the reference is float64 NumPy on these float32 values.
``precisebn`` and ``fvcore`` estimate the variance of all values together. ``swa_utils`` averages the mini-batches'
unbiased variances, so it is held against that average. It runs on either device: so the kernels of both are judged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.peers import installed, missing

__all__ = ["QUESTION", "plot", "run"]

QUESTION = Question(
    "How exact is the variance, for mean / std from 1 to 1e5?",
    against="fvcore and swa_utils, all against float64 NumPy",
)

NUM_BATCHES, SHAPE = 20, (32, 16, 8, 8)
Update = Callable[[nn.Module, list[Tensor], int], object]
PEERS = ("precisebn", "fvcore", "swa_utils")


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Relative error of the variance, the worst of 16 channels, and whether it is negative."""
    rows = [_row(mean, device) for mean in ([1e0, 1e3, 1e5] if quick else [10 ** (i / 2) for i in range(11)])]
    worst = max(row["precisebn"] for row in rows if row["mean / std"] <= 1.001e4)
    goals = [goal("relative error of the variance, mean / std up to 1e4", worst, at_most=1e-6)]
    summary = {"goals": goals, "peers": missing(["fvcore"])}
    return {"rows": rows, "summary": summary}


def plot(result: Result, path: Path) -> None:
    """Error over mean / std."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    x = [row["mean / std"] for row in result["rows"]]
    for peer, marker in zip(PEERS, "os^", strict=True):
        if peer not in result["rows"][0]:
            continue
        axes.loglog(x, [max(row[peer], 1e-9) for row in result["rows"]], marker=marker, label=peer)
        negative = [row for row in result["rows"] if row["_negative"][peer]]
        axes.loglog(
            [row["mean / std"] for row in negative], [row[peer] for row in negative], "kx", markersize=11, zorder=3
        )
    axes.plot([], [], "kx", markersize=11, label="negative variance")
    axes.axhline(1e-6, color="gray", linestyle=":", label="goal up to 1e4")
    axes.set(xlabel="mean / std of the data", ylabel="relative error of the variance, worst channel")
    axes.set_title("Variance of 20 float32 mini-batches, against float64")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _row(mean: float, device: str) -> dict[str, Any]:
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


def _variance(
    update: Callable[[nn.Module, list[Tensor], int], object], batches: list[Tensor]
) -> "npt.NDArray[np.float64]":
    norm = nn.BatchNorm2d(SHAPE[1], device=batches[0].device)
    update(nn.Sequential(norm).train(), batches, len(batches))
    assert norm.running_var is not None
    return norm.running_var.double().cpu().numpy()
