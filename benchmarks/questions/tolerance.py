"""How many samples does a recalibration need? ``tolerance=`` against fvcore's fixed 200 mini-batches of 32.

The network and the training are those of ``examples/digits.py``, stopped after eight epochs, when it has learnt its
task and the running averages have not caught up yet. fvcore and precisebn draw shuffled mini-batches of 32 from the
training set, over and over, and the test error under their statistics is compared: means over seeds, each with several
shuffles.

What tolerance is enough follows from the training, without a look at test errors. A network trained in mini-batches of
B images has met, in every step, statistics with the sampling noise of B images: a mean's standard error is up to
1 / sqrt(B) standard deviations (reached where the pixels of an image are so correlated that they count as one). It
had to learn to answer right under that noise, so population statistics known as well are as good as exact ones.
For B = 350 that is 0.053; ``TOLERANCE`` is the next round figure below. Below eight mini-batches (256 samples) no
standard error is known, so no tolerance uses fewer; rows with one to four mini-batches, without tolerance, show what
too few samples cost.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from fvcore.nn import update_bn_stats as fvcore_update_bn_stats
from torch import nn

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.questions._digits import distance, endless, trained
from examples.digits import BATCH_SIZE, error_percent

QUESTION = Question(
    "How many samples are enough?",
    against="fvcore's 200 mini-batches of 32",
    devices=("cpu",),
    threads=1,  # 8x8 images keep one thread busy, and the figures do not depend on the machine's cores
)
CALIBRATION_BATCH_SIZE, FVCORE_ITERS = 32, 200
TOLERANCE = 0.05
TOLERANCES = (0.1, TOLERANCE, 0.035, 0.025)
TOO_FEW_ITERS = (1, 2, 4)
assert 1 / math.sqrt(BATCH_SIZE) >= TOLERANCE


@dataclass(frozen=True)
class Recalibration:
    """One set of statistics for one network."""

    statistics: str
    seed: int
    samples: int
    reported_error: float | None
    """Largest standard error that the report gives; None where there is none."""
    actual_error: float
    """Largest distance from fvcore's statistics, in the units of the standard errors."""
    test_error: float
    """In percent."""


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Test error, samples used and standard errors, by kind of statistics; means over seeds and shuffles."""
    seeds, shuffles = (2, 1) if quick else (5, 3)
    tolerances = (0.1, TOLERANCE) if quick else TOLERANCES
    runs = [run for seed in range(seeds) for run in _recalibrate(seed, shuffles, tolerances)]
    by_statistics = {name: [run for run in runs if run.statistics == name] for name in _names(runs)}
    rows = [_row(name, group, seeds) for name, group in by_statistics.items()]

    reference = by_statistics["fvcore"]
    chosen = by_statistics[f"tolerance={TOLERANCE:g}"]
    most = max(run.samples for run in chosen)
    excess = _test_error(chosen) - _test_error(reference)
    summary = {
        "tolerance": TOLERANCE,
        "why": f"a round figure below 1 / sqrt({BATCH_SIZE}), the noise of the statistics in training",
        "test error with EMA, with fvcore, with tolerance [%]": ", ".join(
            f"{_test_error(by_statistics[name]):.2f}" for name in ("EMA", "fvcore", f"tolerance={TOLERANCE:g}")
        ),
        "goals": [
            goal(f"test error with tolerance={TOLERANCE:g} beyond fvcore's, in points", excess, at_most=0.3),
            goal("fvcore's samples over the most that any run with tolerance used",
                 reference[0].samples / most, at_least=8),
        ],
    }  # fmt: skip
    return {"rows": rows, "summary": summary}


def plot(result: Result, path: Path) -> None:
    """Test error over samples: a curve over tolerances, with every seed, beside fvcore and EMA."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    ema, fvcore = rows[0], rows[1]
    ours = rows[2:]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    samples = [row["_mean samples"] for row in ours]
    errors = [row["test error [%]"] for row in ours]
    for key in (key for key in fvcore if key.startswith("seed ")):
        axes.plot(samples, [row[key] for row in ours], color="#0072B2", linewidth=0.8, alpha=0.35)
    axes.plot(samples, errors, "s-", color="#0072B2", label="precisebn (thin: each seed)")
    for x, row in zip(samples, ours, strict=True):
        lowest = min(error for key, error in row.items() if key.startswith("seed "))
        axes.annotate(row["statistics"], (x, lowest), (0, -6), textcoords="offset points", rotation=90,
                      ha="center", va="top")  # fmt: skip
    axes.plot(fvcore["_mean samples"], fvcore["test error [%]"], "o", color="#D55E00", markersize=8,
              label=f"fvcore, {FVCORE_ITERS} x {CALIBRATION_BATCH_SIZE}")  # fmt: skip
    axes.axhline(fvcore["test error [%]"], color="#D55E00", linestyle=":", linewidth=1)
    ticks = [32, 64, 128, 256, 512, 1024, 2048, 6400]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.4 * max(errors))
    axes.set(xlabel="samples used for the statistics", ylabel="test error [%]")
    axes.set_title(f"Digits: same weights, other statistics (EMA: {ema['test error [%]']:.1f}%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=150)


def _recalibrate(seed: int, shuffles: int, tolerances: tuple[float, ...]) -> list[Recalibration]:
    """Train one network, and give it statistics in every way."""
    model, train_data, test_data = trained(seed)
    images, labels = test_data.tensors

    reference = copy.deepcopy(model)
    fvcore_update_bn_stats(reference, endless(train_data, CALIBRATION_BATCH_SIZE, seed=1000 + seed), FVCORE_ITERS)

    def judged(
        name: str, candidate: nn.Module, samples: int, report: precisebn.UpdateReport | None = None
    ) -> Recalibration:
        actual_error = distance(candidate, reference)
        test_error = error_percent(copy.deepcopy(candidate), images, labels)
        reported_error = None if report is None or math.isnan(report.max_error) else report.max_error
        return Recalibration(name, seed, samples, reported_error, actual_error, test_error)

    results = [judged("EMA", model, 0), judged("fvcore", reference, FVCORE_ITERS * CALIBRATION_BATCH_SIZE)]
    budgets: list[tuple[int, float | None]] = [(num_iters, None) for num_iters in TOO_FEW_ITERS]
    budgets += [(FVCORE_ITERS, tolerance) for tolerance in tolerances]
    for num_iters, tolerance in budgets:
        name = f"num_iters={num_iters}" if tolerance is None else f"tolerance={tolerance:g}"
        for shuffle in range(shuffles):
            candidate = copy.deepcopy(model)
            batches = endless(train_data, CALIBRATION_BATCH_SIZE, seed=2000 + shuffles * seed + shuffle)
            report = precisebn.update_bn_stats(candidate, batches, num_iters, tolerance=tolerance)
            results.append(judged(name, candidate, report.num_samples, report))
    return results


def _row(name: str, group: list[Recalibration], seeds: int) -> dict[str, object]:
    reported = [run.reported_error for run in group if run.reported_error is not None]
    samples = [run.samples for run in group]
    by_seed = {f"seed {seed}": _test_error([run for run in group if run.seed == seed]) for seed in range(seeds)}
    return {
        "statistics": name,
        "samples": samples[0] if min(samples) == max(samples) else [min(samples), max(samples)],
        "standard error, reported": mean(reported) if reported else None,
        "actual": None if name == "fvcore" else mean(run.actual_error for run in group),
        "test error [%]": _test_error(group),
        **by_seed,
        "_mean samples": mean(samples),
    }


def _test_error(group: list[Recalibration]) -> float:
    return mean(run.test_error for run in group)


def _names(runs: list[Recalibration]) -> list[str]:
    return list(dict.fromkeys(run.statistics for run in runs))
