"""The inputs that benchmarks share: the shapes of ResNet-50, odd ones, and random tensors in more memory than caches.

Every call gets another buffer out of a pool that is at least three times as large as the last cache and as the largest
tensor, so what is measured is memory, as it is inside a network: a layer's input has left the cache when its gradient
comes.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RESNET50 = [
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 56, 56), (32, 128, 56, 56), (32, 128, 28, 28), (32, 512, 28, 28),
    (32, 256, 28, 28), (32, 256, 14, 14), (32, 1024, 14, 14), (32, 512, 14, 14), (32, 512, 7, 7), (32, 2048, 7, 7),
]  # fmt: skip
"""The inputs of the BatchNorm layers of ResNet-50 at batch 32."""
ODD = [
    (32, 3, 224, 224),
    (8, 1, 512, 512),
    (256, 1024),
    (4096, 100),
    (64, 512, 1, 1),
    (4, 64, 8, 28, 28),
    (64, 96, 3, 3),
]
SMALL = [(4, 64, 8, 8), (8, 256, 7, 7)]
"""Layers of which a GPU has more work with launches than with values."""
PYRAMID = [(4, 256, size, size) for size in (100, 50, 25, 13, 7)]
"""RetinaNet's five levels for an 800 x 800 image, batch 4."""
LAYOUTS = ["contiguous", "channels_last"]

Shape = tuple[int, ...]


class Setting(NamedTuple):
    """The tensors of one row."""

    shape: Shape
    layout: str
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def columns(self) -> dict[str, str | float]:
        """What a row says of it."""
        return {
            "shape": shape_name(self.shape),
            "layout": self.layout,
            "dtype": dtype_name(self.dtype),
            "MiB": self.bytes / 2**20,
        }

    def is_resnet50(self) -> bool:
        """Whether ResNet-50 has such an input, in a batch of 32 or a larger one."""
        return len(self.shape) == 4 and self.shape[0] >= 32 and (32, *self.shape[1:]) in RESNET50


def shape_name(shape: Shape) -> str:
    """``"32x64x56x56"``."""
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``."""
    return str(dtype).removeprefix("torch.")


# ---- Memory to take tensors from ------------------------------------------------------------------------------------


def cache_bytes(device: str) -> int:
    """The size of the last cache, 32 MiB where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    return max((int(text[:-1]) * units[text[-1]] for text in (p.read_text().strip() for p in sizes)), default=32 << 20)


def random_pool(settings: list[Setting], device: str, quick: bool = False) -> Tensor:
    """Normal values of mean 1 for all these settings, which have one dtype; if ``quick``, within the cache."""
    cache = cache_bytes(device) // (16 if quick else 1)
    dtype = settings[0].dtype
    length = 3 * max(cache, *(setting.bytes for setting in settings)) // dtype.itemsize
    return torch.randn(length + 3 * _ALIGNMENT, dtype=torch.float32, device=device).add_(1).to(dtype)


class Pair(NamedTuple):
    """Two tensors of a setting, as input and gradient; ``raw_`` is their memory as a vector, of float32 at least."""

    x: Tensor
    dy: Tensor
    raw_x: Tensor
    raw_dy: Tensor


def pairs(setting: Setting, pool: Tensor) -> list[Pair]:
    """All tensors of the setting that lie in the pool side by side; each is the x of one pair and the dy of another."""
    size = math.prod(setting.shape)
    step = math.ceil(size / _ALIGNMENT) * _ALIGNMENT
    pieces = [pool[start : start + size] for start in range(0, len(pool) - size + 1, step)]
    views = [(laid_out(piece, setting), _raw(piece)) for piece in pieces]
    half = len(views) // 2
    partners = views[half:] + views[:half]
    return [Pair(x, dy, raw_x, raw_dy) for (x, raw_x), (dy, raw_dy) in zip(views, partners, strict=True)]


def laid_out(values: Tensor, setting: Setting) -> Tensor:
    """A vector of values as a tensor of the setting's shape and layout, without a copy."""
    if setting.layout == "contiguous":
        return values.view(setting.shape)
    first, channels, *rest = setting.shape
    return values.view(first, *rest, channels).movedim(-1, 1)


def _raw(values: Tensor) -> Tensor:
    """The same memory as float32 where the dtype is narrower: what converts nothing shows the memory's speed."""
    return values if values.dtype.itemsize >= 4 else values[: len(values) // 2 * 2].view(torch.float32)


_ALIGNMENT = 64  # values: every tensor of a pool begins at a multiple of at least 128 bytes
