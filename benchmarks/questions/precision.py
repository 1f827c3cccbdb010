"""How long until the statistics are precise enough? ``tolerance=`` against fvcore's 200 mini-batches, in seconds.

Two networks, mini-batches of 32: that of ``tolerance``, on digits, and a ResNet-50 with random weights on synthetic
images. Everyone starts from the same weights and draws shuffled mini-batches from the same data; swa_utils goes through
the data once, which is all that it offers. ``tolerance=`` runs both ways: on mini-batches without end, where the same
images come again and again; and on a loader that ends with the data, as users have it, where it uses all of that at
most. A time is that of the whole call, with loading, set-up and finishing; what it bought is the largest error of the
statistics of any layer: of means in standard deviations, of variances relative, root mean square over channels. The
truth is five times the whole data, in mini-batches of the same size.
"""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.harness.timing import Times, in_time, now, quartiles, ratios
from benchmarks.peers import installed, missing
from benchmarks.questions._digits import distance, endless, trained
from examples.digits import error_percent

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "How long until the statistics are precise enough?",
    against="fvcore's 200 mini-batches, `torch.optim.swa_utils.update_bn` over the whole data",
    devices=("cpu",),
    share=4,
)
BATCH_SIZE, FVCORE_ITERS, EPOCHS_OF_TRUTH = 32, 200, 5
GOALS = {0.05: 8.0, 0.02: 3.0}
"""Tolerances, and how many times as fast as fvcore they are to be."""
FVCORE = f"fvcore, {FVCORE_ITERS} mini-batches"


@dataclass(frozen=True)
class Task:
    """A network whose statistics are wanted."""

    name: str
    model: nn.Module
    data: TensorDataset
    test_error: Callable[[nn.Module], float | None]
    """In percent; None where nothing was learnt."""
    rounds: int


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Seconds, samples, and what they bought."""
    makers = [_digits, _resnet] if installed("torchvision.models") is not None else [_digits]
    rows = [row for make in in_time(makers, deadline) for row in _rows(make(quick))]
    goals = []
    for row in rows:
        for tolerance, least in GOALS.items():
            if row["statistics"] in (_without_end(tolerance), _once(tolerance)) and "x fvcore" in row:
                what = f"{row['network']}, {row['statistics']}: seconds, x fvcore's {FVCORE_ITERS} mini-batches"
                goals.append(goal(what, row["x fvcore"], at_least=least))
    return {"rows": rows, "summary": {"goals": goals, "peers": missing(["fvcore", "torchvision"])}}


def _rows(task: Task) -> list[dict[str, Any]]:
    truth = copy.deepcopy(task.model)
    epochs = endless(task.data, BATCH_SIZE, seed=0)
    precisebn.update_bn_stats(truth, epochs, EPOCHS_OF_TRUTH * (len(task.data) // BATCH_SIZE))
    contestants = _contestants()
    times: Times = {name: [] for name in contestants}
    samples: dict[str, list[int]] = {name: [] for name in contestants}
    found: dict[str, list[nn.Module]] = {name: [] for name in contestants}
    for turn in range(task.rounds):
        for name in random.Random(turn).sample(list(contestants), len(contestants)):
            model, loader = copy.deepcopy(task.model), Counted(task.data, seed=1 + turn)
            start = now()
            contestants[name](model, loader)
            times[name].append(now() - start)
            samples[name].append(loader.samples)
            found[name].append(model)
    return [_row(task, name, times, samples[name], found[name], truth) for name in contestants]


def _row(
    task: Task, name: str, times: Times, samples: list[int], found: list[nn.Module], truth: nn.Module
) -> dict[str, Any]:
    low, middle, high = quartiles(times[name])
    test_errors = [error for error in map(task.test_error, found) if error is not None]
    row: dict[str, Any] = {
        "network": task.name,
        "statistics": name,
        "seconds": middle,
        "seconds, quartiles": [low, high],
        "samples": samples[0] if min(samples) == max(samples) else [min(samples), max(samples)],
        "error of the statistics": quartiles([distance(model, truth) for model in found])[1],
        "test error [%]": sum(test_errors) / len(test_errors) if test_errors else None,
    }
    if FVCORE in times and name != FVCORE:
        row["x fvcore"] = quartiles(ratios(times[FVCORE], times[name]))[1]
    return row


class Counted:
    """Shuffled mini-batches of images without end, or once through the data; counts what is taken."""

    def __init__(self, data: TensorDataset, seed: int) -> None:
        self.data, self.seed = data, seed
        self.samples = 0

    def __iter__(self) -> Iterator[Tensor]:
        for images in endless(self.data, BATCH_SIZE, self.seed):
            self.samples += len(images)
            yield images

    def once(self) -> Iterator[Tensor]:
        """The whole data, but for a last mini-batch that is not full."""
        for _, images in zip(range(len(self.data) // BATCH_SIZE), self, strict=False):
            yield images


def _without_end(tolerance: float) -> str:
    return f"tolerance={tolerance:g}"


def _once(tolerance: float) -> str:
    return f"tolerance={tolerance:g}, the data once at most"


def _contestants() -> dict[str, Callable[[nn.Module, Counted], object]]:
    def ours(tolerance: float, once: bool) -> Callable[[nn.Module, Counted], object]:
        def update(model: nn.Module, loader: Counted) -> None:
            with warnings.catch_warnings():  # where the data ends first
                warnings.filterwarnings("ignore", "tolerance=.* was not reached")
                batches = loader.once() if once else loader
                precisebn.update_bn_stats(model, batches, None if once else FVCORE_ITERS, tolerance=tolerance)

        return update

    found: dict[str, Callable[[nn.Module, Counted], object]] = {}
    for tolerance in GOALS:
        found[_without_end(tolerance)] = ours(tolerance, once=False)
        found[_once(tolerance)] = ours(tolerance, once=True)
    fvcore = installed("fvcore.nn")
    if fvcore is not None:
        found[FVCORE] = lambda model, loader: fvcore.update_bn_stats(model, loader, FVCORE_ITERS)
    found["swa_utils, the whole data"] = lambda model, loader: update_bn(loader.once(), model)
    return found


# ---- The networks ---------------------------------------------------------------------------------------------------


def _digits(quick: bool) -> Task:
    model, train_data, test_data = trained(seed=0)
    images, labels = test_data.tensors
    return Task(
        "digits", model.train(), train_data, lambda model: error_percent(model, images, labels), 2 if quick else 7
    )


def _resnet(quick: bool) -> Task:
    models = installed("torchvision.models")
    assert models is not None
    torch.manual_seed(0)
    name, number, size = ("resnet18", 128, 32) if quick else ("resnet50", 1024, 64)
    model = getattr(models, name)().train()
    data = TensorDataset(_images(number, size), torch.zeros(number))
    return Task(f"{name}, {size}^2", model, data, lambda model: None, 1 if quick else 2)


def _images(number: int, size: int) -> Tensor:
    """Noise at four scales, from a colour for the whole image to single pixels, as large at each: far from white."""
    scales = (1, size // 16, size // 4, size)
    return sum(
        (F.interpolate(torch.randn(number, 3, side, side), size=size) for side in scales),
        torch.zeros(number, 3, size, size),
    )
