"""Which prior, for how many target samples? ``adapt_bn_stats`` on digits under shifts, by its test error.

The network is that of ``examples/digits.py``, with exact statistics of its training data. The images are shifted
(contrast cut, darkened, brightened, noise, blur), and statistics adapted on some of them, in one mini-batch or several;
the test error is that on all of them. A prior counts the source statistics as so many samples (Schneider et al. 2020).

Ways to take several mini-batches are compared by how far their result lies from that of all data in one mini-batch,
where the paper's formula is exact: *ours* mixes each mini-batch's own statistics at the final weight; *so far* mixes
the Moments of all mini-batches so far, at their weight; *two passes* normalizes a second time by the result of the
first; *after* measures under the target alone, and mixes in the end.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import precisebn
from benchmarks.harness import Question, Result, goal
from examples.digits import (
    BATCH_SIZE,
    LEARNING_RATE,
    cut_contrast,
    digits,
    error_percent,
    shuffled,
    small_resnet,
    train_one_epoch,
)

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "Which prior, for how many target samples?",
    against="no adaptation; other ways to mix a prior in",
    devices=("cpu",),
    threads=1,
)

NUM_EPOCHS = 10
SAMPLES: dict[int, int] = {16: 16, 64: 16, 256: 32}
"""Target samples, and in mini-batches of how many."""
PRIORS = (0, 4, 16, 64, 256)
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": cut_contrast,
    "dark": lambda x: 0.3 * x,
    "bright": lambda x: x + 0.5,
    "noise": lambda x: x + 0.25 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    "blur": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1),
}
WAYS = ("ours", "so far", "two passes", "after")


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Test errors in percent, means over seeds; and distances of means, in standard deviations, the worst layer's."""
    networks = [_trained(seed) for seed in range(1 if quick else 3)]
    rows = []
    distances: dict[str, list[float]] = {way: [] for way in WAYS}
    for name, shift in list(SHIFTS.items())[: 2 if quick else None]:
        images, labels = digits()[1].tensors
        images = shift(images)
        source = mean(error_percent(model, images, labels) for model in networks)
        for samples, size in SAMPLES.items():
            row: dict[str, Any] = {
                "shift": name,
                "not adapted": source,
                "target samples": samples,
                "a mini-batch": size,
            }
            for prior in PRIORS:
                errors = []
                for seed, model in enumerate(networks):
                    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
                    batches = list(images[chosen].split(size))
                    adapted = _ours(model, batches, prior)
                    errors.append(error_percent(adapted, images, labels))
                    if prior and len(batches) > 1:
                        whole = _ours(model, [images[chosen]], prior)
                        for way, adapt in _ADAPT.items():
                            distances[way].append(_distance(adapt(model, batches, prior), whole))
                row[f"prior {prior}"] = mean(errors)
            rows.append(row)
    worst = {way: max(found) for way, found in distances.items()}
    summary = {
        "distance from one mini-batch of all, in standard deviations: mean (worst)": ", ".join(
            f"{way} {mean(distances[way]):.4f} ({worst[way]:.3f})" for way in WAYS
        ),
        "goals": [
            goal("distance of ours over that of the Moments so far", worst["ours"] / worst["so far"], at_most=0.5)
        ],
    }
    return {"rows": rows, "summary": summary}


def _trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    data, model = digits()[0], small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loader = shuffled(data, BATCH_SIZE, seed, drop_last=True)
    for _ in range(NUM_EPOCHS):
        train_one_epoch(model, loader, optimizer)
    precisebn.update_bn_stats(model, shuffled(data, 100, seed), num_iters=None)
    return model.eval()


def _ours(model: nn.Module, batches: list[Tensor], prior: float) -> nn.Module:
    adapted = copy.deepcopy(model)
    precisebn.adapt_bn_stats(adapted, batches, prior)
    return adapted


def _mixed(model: nn.Module, batches: list[Tensor], prior: float, way: str) -> nn.Module:
    """The other ways, in plain PyTorch."""
    adapted = copy.deepcopy(model)
    fixed: dict[nn.BatchNorm2d, Tensor] = {}
    for _ in range(2 if way == "two passes" else 1):
        fixed = _Pass(way, prior, {layer: _running(layer) for layer in _layers(adapted)}, fixed).run(adapted, batches)
    for layer, statistics in fixed.items():
        _set(layer, statistics)
    return adapted


@dataclass
class _Pass:
    """One pass over the data: what each layer has seen, and what it normalizes by."""

    way: str
    prior: float
    source: dict[nn.BatchNorm2d, Tensor]
    fixed: dict[nn.BatchNorm2d, Tensor]
    """Of the pass before: what layers normalize by all the time."""
    seen: dict[nn.BatchNorm2d, precisebn.Moments] = field(default_factory=dict)
    samples: int = 0

    @torch.no_grad()
    def run(self, model: nn.Module, batches: list[Tensor]) -> dict[nn.BatchNorm2d, Tensor]:
        """The mixture of each layer's source with all that it has seen."""
        handles = [layer.register_forward_pre_hook(self._normalize) for layer in self.source]
        for batch in batches:
            self.samples += len(batch)
            model(batch)
        for handle in handles:
            handle.remove()
        for layer, source in self.source.items():
            _set(layer, source)
        return {layer: self._mixture(layer) for layer in self.source}

    def _normalize(self, layer: Any, inputs: tuple[Tensor]) -> None:
        own = precisebn.Moments.of(inputs[0])
        self.seen[layer] = own if layer not in self.seen else self.seen[layer] + own
        if self.way == "after":
            _set(layer, _pair(own))
        else:
            _set(layer, self.fixed[layer] if layer in self.fixed else self._mixture(layer))

    def _mixture(self, layer: nn.BatchNorm2d) -> Tensor:
        return torch.lerp(_pair(self.seen[layer]), self.source[layer], self.prior / (self.prior + self.samples))


def _layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _pair(moments: precisebn.Moments) -> Tensor:
    return torch.stack([moments.mean, moments.var()])


def _running(layer: nn.BatchNorm2d) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.stack([layer.running_mean, layer.running_var]).double()


def _set(layer: nn.BatchNorm2d, statistics: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(statistics[0])
    layer.running_var.copy_(statistics[1])


def _distance(a: nn.Module, b: nn.Module) -> float:
    """Root mean square over the channels of a layer, the worst layer's."""
    distances = []
    for x, y in zip(_layers(a), _layers(b), strict=True):
        (mean_x, _), (mean_y, var_y) = _running(x), _running(y)
        distances.append(float(((mean_x - mean_y).square() / (var_y + y.eps)).mean().sqrt()))
    return max(distances)


_ADAPT: dict[str, Callable[[nn.Module, list[Tensor], float], nn.Module]] = {
    "ours": _ours,
    **{way: partial(_mixed, way=way) for way in WAYS[1:]},
}
