"""A whole training step of ResNet-50 with frozen layers: what a layer's figure comes to where convolutions take part.

Forward, cross entropy, backward and SGD. Every contestant has the same weights and the same statistics, measured on the
mini-batch; the learning rate is 0, so that every step is the same.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import precisebn
from benchmarks.harness.inputs import LAYOUTS
from benchmarks.harness.timing import comparison, measure, peak_bytes
from benchmarks.peers import installed
from benchmarks.questions._modules_cases import EVALUATION, TORCHVISION

STEP = "a training step of ResNet-50, FrozenBatchNorm2d"
MAX_ERROR = 1e-8  # of the output and of the first layer's gradient, in float64

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def steps(device: str, quick: bool) -> Iterator[Callable[[], dict[str, Any]]]:
    """Makers of the rows; none without torchvision."""
    if installed("torchvision.models") is None:
        return
    for layout in LAYOUTS[:1] if quick else LAYOUTS:
        yield partial(_row, layout, device, quick)


def _row(layout: str, device: str, quick: bool) -> dict[str, Any]:
    shape = (2, 3, 64, 64) if quick else (8, 3, 224, 224)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, shape[:1], device=device)
    networks = _networks(images, device)
    _check(networks, images, labels)
    contestants = {name: _step(network) for name, network in networks.items()}
    feed = [(images, labels)]
    times = measure(contestants, feed, device, rounds=3 if quick else 15, budget=5 if quick else 60, calls=1)
    row: dict[str, Any] = {"module": STEP, "shape": "x".join(map(str, shape)), "layout": layout, "dtype": "float32"}
    row |= comparison(times, "ours", [TORCHVISION, EVALUATION])
    peaks = {name: peak_bytes(step, feed[0], device) for name, step in contestants.items()}
    row["peak MiB"] = peaks["ours"] / 2**20
    shares = {name: peaks["ours"] / peak for name, peak in peaks.items() if name != "ours"}
    row["of the peak of"] = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    return row


def _networks(images: Tensor, device: str) -> dict[str, nn.Module]:
    models, ops = installed("torchvision.models"), installed("torchvision.ops")
    assert models is not None
    assert ops is not None
    torch.manual_seed(0)
    network: nn.Module = models.resnet50().to(device)
    precisebn.update_bn_stats(network, [images], 1)
    theirs: nn.Module = models.resnet50(norm_layer=ops.FrozenBatchNorm2d).to(device)
    theirs.load_state_dict(network.state_dict(), strict=False)  # which has no num_batches_tracked
    evaluated = copy.deepcopy(network)
    for layer in precisebn.get_bn_modules(evaluated):
        layer.eval().requires_grad_(False)
    ours = precisebn.convert_frozen_batchnorm(network)
    return {"ours": ours, TORCHVISION: theirs, EVALUATION: evaluated}


def _step(network: nn.Module) -> Step:
    optimizer = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=0.0)
    first = next(network.parameters())

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        logits = network(images)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        assert first.grad is not None
        return logits.detach(), first.grad

    return step


def _check(networks: dict[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    """Refuse to time networks that do not compute the same, in float64: in float32, 53 layers may amplify roundings."""
    exact = {
        name: _step(copy.deepcopy(network).double())(images.double(), labels) for name, network in networks.items()
    }
    for name, found in exact.items():
        for what, actual, truth in zip(("output", "gradient"), found, exact[TORCHVISION], strict=True):
            error = float((actual - truth).abs().max() / truth.abs().max())
            if not error <= MAX_ERROR:
                raise ArithmeticError(f"{STEP}: {what} of {name} is off by {error:.1e}; nothing is timed before")
