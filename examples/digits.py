"""PreciseBN and AdaBN on handwritten digits, with nothing but the public names of precisebn.

A small ResNet learns scikit-learn's digits in large mini-batches at a high learning rate. The weights move faster than
BatchNorm's running averages (EMA) can follow, so that for many epochs the test error says more about stale statistics
than about the network ("Rethinking 'Batch' in BatchNorm", Wu & Johnson 2021, section 3). After each epoch this script
measures the same weights twice: with the EMA statistics, and with those of ``precisebn.update_bn_stats``. At the end
it cuts the contrast of the test images, and repairs the damage with ``precisebn.adapt_bn_stats``, without labels. All
of that with several seeds, because one may be luck.

Run: ``python examples/digits.py``, or ``make demo``.
"""

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import precisebn

BATCH_SIZE, LEARNING_RATE = 350, 0.4  # four large steps an epoch: EMA, with its memory of ten steps, lags behind
CALIBRATION_BATCH_SIZE = 100  # the 1,437 training images in 15 mini-batches: enough of them for standard errors

Loader = DataLoader[tuple[Tensor, ...]]


class Training(NamedTuple):
    """What came of one seed. Errors are in percent of the test images."""

    ema_errors: list[float]  # after each epoch
    precise_errors: list[float]  # after each epoch, same weights
    ema_drifts: list[float]  # of the EMA means from the exact ones, in standard deviations, in the worst channel
    shifted_error: float  # of the trained network, with PreciseBN statistics, on images of low contrast
    adapted_error: float  # the same after adaptation
    adaptation: precisebn.UpdateReport


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, around which a shortcut leads: (N, C, H, W) to (N, D, H/s, W/s)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet(width: int = 16) -> nn.Sequential:
    """A ResNet with nine BatchNorm layers for digits: (N, 1, 8, 8) to logits (N, 10)."""
    stem = (nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = (Block(width, width), Block(width, 2 * width, stride=2), Block(2 * width, 4 * width, stride=2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 test images, (1, 8, 8), values from 0 to 1, and their labels; always the same split."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def shuffled(data: TensorDataset, batch_size: int, seed: int, drop_last: bool = False) -> Loader:
    """A loader with a random generator of its own: how often others are used does not change its order."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=True, drop_last=drop_last, generator=generator)


def cut_contrast(images: Tensor) -> Tensor:
    """The data shift: a quarter of the contrast is left, on a grey ground."""
    return 0.5 + 0.25 * images


def train_one_epoch(model: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer) -> None:
    """Plain supervised training; leaves the model in training mode."""
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def error_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of wrong answers in eval mode, that is, with whatever statistics the model holds."""
    model.eval()
    return 100 * float((model(images).argmax(dim=1) != labels).double().mean())


def run(seed: int, num_epochs: int, bar: "tqdm[Any]") -> Training:
    """Train, compare EMA with PreciseBN after each epoch, then adapt to images of low contrast."""
    torch.manual_seed(seed)
    train_data, test_data = digits()
    test_images, test_labels = test_data.tensors
    train_loader = shuffled(train_data, BATCH_SIZE, seed, drop_last=True)
    calibration_loader = shuffled(train_data, CALIBRATION_BATCH_SIZE, seed)
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    ema_errors: list[float] = []
    precise_errors: list[float] = []
    ema_drifts: list[float] = []
    for _ in range(num_epochs):
        train_one_epoch(model, train_loader, optimizer)

        # PreciseBN, on a copy: training goes on as if nobody had looked.
        precise = copy.deepcopy(model)
        report = precisebn.update_bn_stats(precise, calibration_loader, num_iters=None)

        ema_errors.append(error_percent(model, test_images, test_labels))
        precise_errors.append(error_percent(precise, test_images, test_labels))
        ema_drifts.append(report.max_drift)
        bar.set_postfix_str(f"test error: EMA {ema_errors[-1]:.1f}%, PreciseBN {precise_errors[-1]:.1f}%")
        bar.update()

    # AdaBN: unlabelled images of the new domain are all it takes. Here they are the test images themselves; adapted on
    # one half of them and tested on the other, the network does nearly as well.
    shifted = cut_contrast(test_images)
    shifted_error = error_percent(precise, shifted, test_labels)
    adaptation = precisebn.adapt_bn_stats(precise, shifted.split(40))
    adapted_error = error_percent(precise, shifted, test_labels)
    return Training(ema_errors, precise_errors, ema_drifts, shifted_error, adapted_error, adaptation)


def mean_and_range(values: Iterable[float]) -> str:
    """Such as ``5.0% (1.7 to 9.2)``."""
    values = list(values)
    return f"{mean(values):.1f}%" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def print_results(trainings: list[Training]) -> None:
    """Tables for the terminal."""
    console = Console()
    seeds = f"mean (range) of {len(trainings)} seeds" if len(trainings) > 1 else "one seed"

    table = Table("epoch", "EMA statistics", "PreciseBN statistics", "EMA off by (std)")
    table.title = f"Test error, same weights; {seeds}"
    by_epoch = zip(*(zip(*training[:3], strict=True) for training in trainings), strict=True)
    for number, of_seeds in enumerate(by_epoch, start=1):
        ema_errors, precise_errors, drifts = zip(*of_seeds, strict=True)
        table.add_row(str(number), mean_and_range(ema_errors), mean_and_range(precise_errors), f"{mean(drifts):.2f}")
    console.print(table)

    table = Table("clean images", "low contrast", "low contrast, adapted")
    table.title = f"Test error after training; {seeds}"
    table.add_row(
        mean_and_range(training.precise_errors[-1] for training in trainings),
        mean_and_range(training.shifted_error for training in trainings),
        mean_and_range(training.adapted_error for training in trainings),
    )
    console.print(table)
    print(f"What adapt_bn_stats reports (first seed):\n{trainings[0].adaptation}")


def draw(trainings: list[Training], path: Path) -> None:
    """Both results side by side, in colours of Okabe & Ito, which colour-blind readers can tell apart."""
    orange, blue, green = "#D55E00", "#0072B2", "#009E73"
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    epochs = range(1, len(trainings[0].ema_errors) + 1)
    for name, style, color, curves in (
        ("EMA statistics", "o-", orange, [training.ema_errors for training in trainings]),
        ("PreciseBN statistics", "s-", blue, [training.precise_errors for training in trainings]),
    ):
        by_epoch = list(zip(*curves, strict=True))
        left.plot(epochs, [mean(errors) for errors in by_epoch], style, color=color, label=name)
        lowest, highest = [min(errors) for errors in by_epoch], [max(errors) for errors in by_epoch]
        left.fill_between(epochs, lowest, highest, color=color, alpha=0.15, linewidth=0)
    left.set(title="The same weights under two sets of statistics", xlabel="epoch", xticks=epochs)
    left.legend(title=f"mean and range of {len(trainings)} seeds", alignment="left", edgecolor="none", framealpha=1)

    outcomes = [(training.precise_errors[-1], training.shifted_error, training.adapted_error) for training in trainings]
    names = ("clean\ntest images", "contrast cut\nto a quarter", "adapted,\nno labels")
    heights = [mean(errors) for errors in zip(*outcomes, strict=True)]
    right.bar_label(right.bar(names, heights, color=(blue, blue, green), width=0.6), fmt="%.1f%%", padding=3)
    right.set(title="The same weights on shifted data")

    for axes in (left, right):
        axes.set(ylim=(0, 100), ylabel="test error [%]")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, run, and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="how long to train (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"), help="picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, three epochs")
    arguments = parser.parse_args()
    num_seeds, num_epochs = (1, 3) if arguments.quick else (arguments.seeds, arguments.epochs)

    torch.set_num_threads(1)  # 8x8 images keep one thread busy, and the figures do not depend on the machine's cores
    with tqdm(total=num_seeds * num_epochs, desc="training", unit="epoch") as bar:
        trainings = [run(seed, num_epochs, bar) for seed in range(num_seeds)]
    print_results(trainings)
    draw(trainings, arguments.output)
    print(f"Picture: {arguments.output}")


if __name__ == "__main__":
    main()
