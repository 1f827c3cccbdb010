"""What users write, or take from elsewhere, where precisebn has a module: the peers of the benchmark ``modules``.

Each does the same work by its documented behaviour; torchvision's own class is used where it is installed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import installed


def torchvision_frozen(channels: int, dtype: torch.dtype, device: str) -> nn.Module | None:
    """The class of torchvision, converted with its network to the dtype of its input."""
    ops = installed("torchvision.ops")
    return None if ops is None else ops.FrozenBatchNorm2d(channels).to(device=device, dtype=dtype)


class FixedAffine(nn.Module):
    """The formula of detectron2's FrozenBatchNorm2d.

    Where a gradient is wanted it is ``x * scale + bias``, the statistics folded into both, so that no gradient of
    parameters is computed; otherwise ``F.batch_norm`` in evaluation mode.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, device: str = "cpu", eps: float = 1e-5) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the fixed statistics."""
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class CycleOfLayers(nn.Module):
    """The formula of detectron2's CycleBatchNormList: layers without affine in turn, then a shared weight and bias."""

    def __init__(self, length: int, channels: int, device: str = "cpu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm2d(channels, affine=False, device=device) for _ in range(length))
        self.weight = nn.Parameter(torch.ones(channels, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, device=device))
        self.position = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the next layer."""
        normalized: Tensor = self.layers[self.position](x)
        self.position = (self.position + 1) % len(self.layers)
        return normalized * self.weight.to(x.dtype)[:, None, None] + self.bias.to(x.dtype)[:, None, None]


class FlattenedLevels(nn.Module):
    """Flatten, concatenate, normalize, split: statistics shared between levels, with torch's own layer."""

    def __init__(self, channels: int, device: str = "cpu") -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, device=device)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Normalize all levels together."""
        normalized = self.norm(torch.cat([x.flatten(2) for x in xs], dim=2))
        pieces = normalized.split([x[0, 0].numel() for x in xs], dim=2)
        return [piece.view(x.shape) for piece, x in zip(pieces, xs, strict=True)]


class LoopOverDomains(nn.Module):
    """A layer for each domain, called on the samples that are of it; they share weight and bias."""

    def __init__(self, channels: int, num_domains: int, device: str = "cpu") -> None:
        super().__init__()
        layers = [nn.BatchNorm2d(channels, device=device) for _ in range(num_domains)]
        for layer in layers[1:]:
            layer.weight, layer.bias = layers[0].weight, layers[0].bias
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        """Normalize every sample by the layer of its domain."""
        y = torch.empty_like(x)
        for k, layer in enumerate(self.layers):
            own = domain == k
            y[own] = layer(x[own])
        return y


def chunk_by_chunk(layer: nn.Module, size: int) -> Callable[[Tensor], Tensor]:
    """A layer called on ghost batches, one after the other."""
    return lambda x: torch.cat([layer(chunk) for chunk in x.split(size)])
