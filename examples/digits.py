"""PreciseBN and AdaBN on handwritten digits, with nothing but the public names of precisebn.

A small ResNet learns scikit-learn's digits in large mini-batches at a high learning rate. The weights move faster than
BatchNorm's running averages (EMA) can follow, so that for many epochs the test error says more about stale statistics
than about the network ("Rethinking 'Batch' in BatchNorm", Wu & Johnson 2021, section 3). After each epoch this script
measures the same weights twice: with the EMA statistics, and with those of ``precisebn.update_bn_stats``. At the end
it washes out the test images, and repairs the damage with ``precisebn.adapt_bn_stats``, without labels.

Run: ``python examples/digits.py``, or ``make demo``.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

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


class Epoch(NamedTuple):
    """What one set of weights scores under two sets of statistics; errors in percent of the test images."""

    ema_error: float
    precise_error: float
    ema_drift: float  # of the EMA mean from the exact one, in standard deviations, in the worst channel of all


class Shift(NamedTuple):
    """Test error of the trained network on shifted images, in percent, before and after adaptation."""

    source_error: float
    adapted_error: float


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
    """1,437 training and 360 test images, (1, 8, 8) with values from 0 to 1, and their labels; always the same split."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def shuffled(data: TensorDataset, batch_size: int, seed: int, drop_last: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """A loader with a random generator of its own: how often others are used does not change its order."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=True, drop_last=drop_last, generator=generator)


def wash_out(images: Tensor) -> Tensor:
    """Shift the contrast: a quarter of it is left, upon a grey ground."""
    return 0.5 + 0.25 * images


def train_one_epoch(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], optimizer: torch.optim.Optimizer) -> None:
    """Plain supervised training; leaves the model in training mode."""
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def test_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of wrong answers in eval mode, that is, with whatever statistics the model holds."""
    model.eval()
    return 100 * (model(images).argmax(dim=1) != labels).double().mean().item()


def run(num_epochs: int, seed: int) -> tuple[list[Epoch], Shift, precisebn.UpdateReport]:
    """Train, compare EMA with PreciseBN after each epoch, then adapt to washed-out images."""
    torch.manual_seed(seed)
    train_data, test_data = digits()
    test_images, test_labels = test_data.tensors
    train_loader = shuffled(train_data, BATCH_SIZE, seed, drop_last=True)
    calibration_loader = shuffled(train_data, CALIBRATION_BATCH_SIZE, seed)
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    epochs: list[Epoch] = []
    for _ in (bar := tqdm(range(num_epochs), desc="training", unit="epoch")):
        train_one_epoch(model, train_loader, optimizer)

        # PreciseBN, on a copy: the training goes on as if nobody had looked.
        precise = copy.deepcopy(model)
        report = precisebn.update_bn_stats(precise, calibration_loader, num_iters=None)

        epochs.append(
            Epoch(
                ema_error=test_error(model, test_images, test_labels),
                precise_error=test_error(precise, test_images, test_labels),
                ema_drift=max(layer.max_mean_drift for layer in report.layers),
            )
        )
        bar.set_postfix_str(f"test error: EMA {epochs[-1].ema_error:.1f}%, PreciseBN {epochs[-1].precise_error:.1f}%")

    # AdaBN: the images of the new domain are all it takes; nobody has labelled them.
    shifted = wash_out(test_images)
    source_error = test_error(precise, shifted, test_labels)
    report = precisebn.adapt_bn_stats(precise, shifted.split(40))
    return epochs, Shift(source_error, test_error(precise, shifted, test_labels)), report


def print_results(epochs: list[Epoch], shift: Shift, report: precisebn.UpdateReport) -> None:
    """Tables for the terminal."""
    console = Console(highlight=False)
    table = Table("epoch", "EMA", "PreciseBN", "EMA off by", title="Test error, same weights", caption_justify="left")
    table.caption = "off by: worst channel's mean, in standard deviations"
    for number, epoch in enumerate(epochs, start=1):
        table.add_row(
            str(number), f"{epoch.ema_error:.1f}%", f"{epoch.precise_error:.1f}%", f"{epoch.ema_drift:.2f}"
        )
    for column in table.columns:
        column.justify = "right"
    console.print(table)

    table = Table("source statistics", "adapted statistics", title="Test error, washed-out images")
    table.add_row(f"{shift.source_error:.1f}%", f"{shift.adapted_error:.1f}%")
    console.print(table)
    print("What adapt_bn_stats reports:")
    print(report)


def draw(epochs: list[Epoch], shift: Shift, path: Path) -> None:
    """Both results side by side, in the colours of Okabe & Ito, which colour-blind readers can tell apart."""
    orange, blue, green = "#D55E00", "#0072B2", "#009E73"
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    numbers = range(1, len(epochs) + 1)
    left.plot(numbers, [e.ema_error for e in epochs], "o-", color=orange, label="EMA statistics")
    left.plot(numbers, [e.precise_error for e in epochs], "s-", color=blue, label="PreciseBN statistics")
    left.set(title="Same weights, two sets of statistics", xlabel="epoch", xticks=numbers)
    left.legend(frameon=False)

    names = ("clean", "washed out", "washed out,\nadapted without labels")
    bars = right.bar(names, (epochs[-1].precise_error, *shift), color=(blue, orange, green), width=0.6)
    right.bar_label(bars, fmt="%.1f%%", padding=3)
    right.set(title="Same weights, shifted test images")

    for axes in (left, right):
        axes.set_ylim(0, 100)
        axes.set_ylabel("test error [%]")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, run, and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="how long to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and mini-batches (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"), help="picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: three epochs")
    arguments = parser.parse_args()

    epochs, shift, report = run(3 if arguments.quick else arguments.epochs, arguments.seed)
    print_results(epochs, shift, report)
    draw(epochs, shift, arguments.output)
    print(f"Picture: {arguments.output}")


if __name__ == "__main__":
    main()
