"""NormalizationBatches: what every normalization layer normalizes in a forward, and how certain its statistics are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precisebn import ops
from precisebn.models.families import normalizes_its_input
from precisebn.nn.ghost import GhostBN
from precisebn.statistics.estimator import is_dead
from precisebn.statistics.moments import Moments

__all__ = ["FAR", "FAR_LOG", "NormCall", "Statistics", "distance", "is_far", "records_calls", "rms"]

FAR = 0.25
"""From how many standard deviations on a mean counts as far off: behind it ReLU passes 60% of values and not 50%."""

FAR_LOG = 0.5
"""The same for the log of a ratio of variances: a factor of 1.65."""

_CERTAIN = 3.0  # standard errors
_MOST_BLOCKS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Of what one call of a layer was given; per channel, float64, on the CPU.

    Samples are the independent observations, as values inside one (neighbouring pixels) are correlated: the standard
    error is that of the mean of the means of samples (of blocks of samples, where there are more than 256).

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``.
        mean_error: standard error of the mean, ``(C,)``, in the units of the mean; NaN for a single sample.
        eps: what the layer adds to the variance.
    """

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    eps: float

    @staticmethod
    def of(x: Tensor, eps: float) -> "Statistics":
        """Of a tensor ``(N, C, *)``."""
        num_samples = x.shape[0]
        blocks = min(num_samples, _MOST_BLOCKS)
        group = torch.arange(num_samples, device=x.device) * blocks // num_samples
        parts = Moments(*ops.moments(x.detach(), group, blocks))
        whole = parts.sum()
        weight = (parts.count / parts.count.sum()).unsqueeze(-1)
        square = (weight * (parts.mean - whole.mean)).square().sum(0)
        error = (square * blocks / (blocks - 1)).sqrt() if blocks > 1 else torch.full_like(square, float("nan"))
        return Statistics(whole.mean.cpu(), whole.var().cpu(), error.cpu(), eps)

    @property
    def scale(self) -> Tensor:
        """What the layer divides by, ``(C,)``."""
        return (self.var + self.eps).sqrt()

    @property
    def alive(self) -> Tensor:
        """Channels that vary in the data, ``(C,)``."""
        return ~is_dead(self.var, self.eps)

    @property
    def relative_error(self) -> float:
        """Standard error of the mean in standard deviations, root mean square over channels; 0 if none varies."""
        return rms(self.mean_error / self.scale, self.alive)


@dataclass(frozen=True, slots=True, eq=False)
class NormCall:
    """One call of a normalization layer.

    Attributes:
        layer: its qualified name.
        shape: of its input.
        num_samples: N of the normalization batch (of a ghost batch, where it is cut into such).
        values: values per channel in the normalization batch.
        by_batch: whether it normalizes by the statistics of its input.
        statistics: of its input; None where it is not known to normalize that.
    """

    layer: str
    shape: tuple[int, ...]
    num_samples: int
    values: int
    by_batch: bool
    statistics: Statistics | None


def rms(values: Tensor, where: Tensor) -> float:
    """Root mean square of some of the values; 0 of none."""
    return float(values[where].square().mean().sqrt()) if bool(where.any()) else 0.0


def distance(a: Statistics, b: Statistics) -> tuple[float, float, float]:
    """How far two sets of statistics are apart, root mean square over channels that vary in either.

    Returns:
        The distance of the means in common standard deviations; its standard error; the log of the ratio of variances.
    """
    alive = a.alive | b.alive
    scale = ((a.var + b.var) / 2 + a.eps).sqrt()
    apart = rms((a.mean - b.mean) / scale, alive)
    error = rms((a.mean_error.square() + b.mean_error.square()).sqrt() / scale, alive)
    return apart, error, rms(((a.var + a.eps) / (b.var + b.eps)).log(), alive)


def is_far(apart: float, log_ratio: float, error: float) -> bool:
    """Whether statistics are far apart, and further than by chance.

    Args:
        apart: distance of the means in standard deviations.
        log_ratio: log of the ratio of variances.
        error: standard error of ``apart``; that of the log of a variance of normal values is sqrt(2) times as large.
    """
    return (apart > FAR and apart > _CERTAIN * error) or (log_ratio > FAR_LOG and log_ratio > _CERTAIN * 2**0.5 * error)


@contextmanager
def records_calls(
    norms: Mapping[str, nn.Module],
    calls: list[NormCall],
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[None]:
    """Within this block, every call of these layers is noted before it is made: one that fails, too.

    Args:
        norms: the layers, by name.
        calls: where to note them.
        around: what to look at the input inside of.
    """

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.dim() >= 2:
                with around():
                    calls.append(_call(name, layer, x))

        return hook

    handles = [norm.register_forward_pre_hook(note(name), with_kwargs=True) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _call(name: str, layer: nn.Module, x: Tensor) -> NormCall:
    spatial = x[0, 0].numel() if x.shape[0] and x.shape[1] else 0
    num_samples = min(x.shape[0], layer.ghost_size) if isinstance(layer, GhostBN) else x.shape[0]
    known = normalizes_its_input(layer) and x.dtype in ops.DTYPES and x.numel() > 0 and not x.is_meta
    by_batch = layer.training or getattr(layer, "running_mean", None) is None
    statistics = Statistics.of(x, layer.eps) if known and isinstance(layer.eps, float) else None
    return NormCall(name, tuple(x.shape), num_samples, num_samples * spatial, by_batch, statistics)
