"""The cases of the benchmark ``modules``: a module of precisebn, its peers, and the plain reference for both.

All layers of a case have the same statistics, weight and bias.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.inputs import LAYOUTS, PYRAMID, RESNET50, Setting, Shape, dtype_name, shape_name
from benchmarks.peers.modules import (
    CycleOfLayers,
    FixedAffine,
    FlattenedLevels,
    LoopOverDomains,
    chunk_by_chunk,
    torchvision_frozen,
)
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm2d,
    GhostBN,
)

NUM_DOMAINS = 4
GHOST_SIZE = 8
EPS = 1e-5
TORCHVISION, FORMULA, EVALUATION = "torchvision", "detectron2's formula", "nn.BatchNorm2d.eval()"
FLATTEN = "flatten, cat, BatchNorm, split"
FROZEN, CONCATENATED = "FrozenBatchNorm2d", "ConcatSharedBN, 5 levels"

Tensors = list[Tensor]


@dataclass(frozen=True)
class Layer:
    """A contestant: from all inputs to all outputs, and the parameters that get gradients."""

    forward: Callable[[Tensors], Tensors]
    parameters: Sequence[Tensor]

    def step(self, xs: Tensors, dys: Tensors) -> tuple[Tensors, tuple[Tensor, ...]]:
        """Forward and backward."""
        ys = self.forward(xs)
        return ys, torch.autograd.grad(ys, [*xs, *self.parameters], dys)


@dataclass(frozen=True)
class Case:
    """A module, its peers, and the tensors that they get."""

    module: str
    settings: list[Setting]
    ours: Layer
    peers: dict[str, Layer]
    reference: Callable[..., Tensors]
    """Of the inputs, weight and bias in float64."""
    every: list[Setting] = field(default_factory=list)
    """All settings that share a pool of memory with the only one of this case."""
    memory: bool = True

    def columns(self) -> dict[str, str]:
        """What a row says of it."""
        first = self.settings[0]
        more = f" and {len(self.settings) - 1} more" if len(self.settings) > 1 else ""
        return {
            "module": self.module,
            "shape": shape_name(first.shape) + more,
            "layout": first.layout,
            "dtype": dtype_name(first.dtype),
        }


# ---- The cases ------------------------------------------------------------------------------------------------------


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of all cases, so that none holds memory before its turn."""
    dtypes = [torch.bfloat16, torch.float32] if device == "cuda" else [torch.float32]
    pyramid: list[Shape] = [(n, c, h // 4, w // 4) for n, c, h, w in PYRAMID] if quick else list(PYRAMID)
    shapes: list[Shape] = [(8, 64, 28, 28)] if quick else list(RESNET50)
    for dtype in dtypes[:1] if quick else dtypes:
        for layout in LAYOUTS:
            levels = [Setting(shape, layout, dtype) for shape in pyramid]
            every = [Setting(shape, layout, dtype) for shape in shapes]
            some = every if quick else every[2::4]
            yield partial(_concatenated, levels, device)
            for setting in every:
                yield partial(_frozen, setting, device, False, every)
            for setting in some:
                yield partial(_frozen, setting, device, True, every)
                for make in (_mixed_domains, _one_domain, _ghost, _batch_stat):
                    yield partial(make, setting, device, every)
            yield partial(_domain_by_domain, some[-1], device)
            yield partial(_cycle, levels, device)


def _frozen(setting: Setting, device: str, trainable: bool, every: list[Setting]) -> Case:
    channels = setting.shape[1]
    ours = FrozenBatchNorm2d(channels, trainable_affine=trainable, device=device)
    batch_norm = nn.BatchNorm2d(channels, device=device).eval().requires_grad_(trainable)
    layers: dict[str, nn.Module] = {EVALUATION: batch_norm}
    if not trainable:
        torchvisions = torchvision_frozen(channels, setting.dtype, device)
        layers |= {} if torchvisions is None else {TORCHVISION: torchvisions}
        layers[FORMULA] = FixedAffine(channels, device=device)
    for layer in (ours, *layers.values()):
        _set(layer, running_mean=_values(channels, 1), running_var=_values(channels, 2) + 1)

    def reference(xs: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        mean, var = _values(channels, 1).to(xs[0]), _values(channels, 2).to(xs[0]) + 1
        scale = weight * (var + EPS).rsqrt()
        return [xs[0] * scale[:, None, None] + (bias - mean * scale)[:, None, None]]

    name = f"{FROZEN}, trainable affine" if trainable else FROZEN
    peers = {peer: _single(layer) for peer, layer in layers.items()}
    return Case(name, [setting], _single(ours), peers, reference, every, memory=setting.shape == RESNET50[2])


def _concatenated(levels: list[Setting], device: str) -> Case:
    channels = levels[0].shape[1]
    ours, theirs = ConcatSharedBN(channels, device=device), FlattenedLevels(channels, device)

    def reference(xs: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        flat = _normalized(torch.cat([x.flatten(2) for x in xs], dim=2), weight, bias)
        sizes = [x[0, 0].numel() for x in xs]
        return [y.view(x.shape) for y, x in zip(flat.split(sizes, dim=2), xs, strict=True)]

    return Case(CONCATENATED, levels, _listed(ours), {FLATTEN: _listed(theirs)}, reference)


def _cycle(levels: list[Setting], device: str) -> Case:
    channels = levels[0].shape[1]
    ours = CycleBatchNormList(len(levels), num_features=channels, device=device)
    theirs = CycleOfLayers(len(levels), channels, device)

    def one_by_one(layer: nn.Module) -> Layer:
        return Layer(lambda xs: [layer(x) for x in xs], _affine_of(layer))

    return Case("CycleBatchNormList, 5 levels", levels, one_by_one(ours), {FORMULA: one_by_one(theirs)}, _each)


def _mixed_domains(setting: Setting, device: str, every: list[Setting]) -> Case:
    channels = setting.shape[1]
    domain = torch.arange(setting.shape[0], device=device) % NUM_DOMAINS
    ours = DomainSpecificBN(channels, NUM_DOMAINS, affine="shared", device=device)
    theirs = LoopOverDomains(channels, NUM_DOMAINS, device)

    def reference(xs: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        y = torch.empty_like(xs[0])
        for k in range(NUM_DOMAINS):
            y[domain == k] = _normalized(xs[0][domain == k], weight, bias)
        return [y]

    def told(layer: nn.Module) -> Layer:
        return Layer(lambda xs: [layer(xs[0], domain)], _affine_of(layer))

    name = f"DomainSpecificBN, {NUM_DOMAINS} domains mixed"
    return Case(name, [setting], told(ours), {"a layer for each domain": told(theirs)}, reference, every)


def _one_domain(setting: Setting, device: str, every: list[Setting]) -> Case:
    channels = setting.shape[1]
    layer = DomainSpecificBN(channels, NUM_DOMAINS, affine="shared", device=device)
    ours = Layer(lambda xs: [layer(xs[0], domain=1)], _affine_of(layer))
    peers = {"nn.BatchNorm2d": _single(nn.BatchNorm2d(channels, device=device))}
    return Case("DomainSpecificBN, one domain", [setting], ours, peers, _each, every, memory=False)


def _domain_by_domain(setting: Setting, device: str) -> Case:
    channels = setting.shape[1]
    parts = [setting._replace(shape=(setting.shape[0] // NUM_DOMAINS, *setting.shape[1:]))] * NUM_DOMAINS
    ours = DomainSpecificBN(channels, NUM_DOMAINS, affine="shared", device=device)
    theirs = LoopOverDomains(channels, NUM_DOMAINS, device)
    loop = Layer(
        lambda xs: [layer(x) for layer, x in zip(theirs.layers, xs, strict=True)], _affine_of(theirs.layers[0])
    )
    name = f"DomainSpecificBN, a list of {NUM_DOMAINS} domains"
    return Case(name, parts, _listed(ours), {"a layer for each domain": loop}, _each, memory=False)


def _ghost(setting: Setting, device: str, every: list[Setting]) -> Case:
    channels, size = setting.shape[1], min(GHOST_SIZE, setting.shape[0] // 2)
    theirs = nn.BatchNorm2d(channels, device=device)
    loop = chunk_by_chunk(theirs, size)

    def reference(xs: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
        return [torch.cat([_normalized(chunk, weight, bias) for chunk in xs[0].split(size)])]

    peers = {"chunk by chunk": Layer(lambda xs: [loop(xs[0])], _affine_of(theirs))}
    return Case(f"GhostBN, {size}", [setting], _single(GhostBN(channels, size, device=device)), peers, reference, every)


def _batch_stat(setting: Setting, device: str, every: list[Setting]) -> Case:
    channels = setting.shape[1]
    layer = BatchStatBN(channels, device=device)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in _affine_of(layer))
    functional = Layer(lambda xs: [F.batch_norm(xs[0], None, None, weight, bias, training=True)], [weight, bias])
    return Case("BatchStatBN", [setting], _single(layer), {"F.batch_norm": functional}, _each, every, memory=False)


# ---- Layers and their references ------------------------------------------------------------------------------------


def _single(layer: nn.Module) -> Layer:
    return Layer(lambda xs: [layer(xs[0])], _affine_of(layer))


def _listed(layer: nn.Module) -> Layer:
    return Layer(layer, _affine_of(layer))


def _affine_of(layer: nn.Module) -> Sequence[Tensor]:
    """Weight and bias, if they are trained; either way they get the values that all contestants have."""
    for name, values in (("weight", weight_of), ("bias", bias_of)):
        for owner in layer.modules():
            own = getattr(owner, name, None)
            if isinstance(own, Tensor):
                own.data.copy_(values(own.shape[-1]))
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _set(layer: nn.Module, **buffers: Tensor) -> None:
    for name, value in buffers.items():
        layer.get_buffer(name).copy_(value)


def _values(channels: int, seed: int) -> Tensor:
    """In [0, 1); of few bits, so that every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, (channels,), generator=generator) / 64


def weight_of(channels: int) -> Tensor:
    """The weight of every layer."""
    return _values(channels, 3) + 0.5


def bias_of(channels: int) -> Tensor:
    """Its bias."""
    return _values(channels, 4) - 0.5


def _normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain batch normalization, in the plainest way."""
    values = x.transpose(0, 1).reshape(x.shape[1], -1)
    centered = values - values.mean(1, keepdim=True)
    y = centered * (centered.square().mean(1, keepdim=True) + EPS).rsqrt() * weight[:, None] + bias[:, None]
    return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def _each(xs: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
    return [_normalized(x, weight, bias) for x in xs]
