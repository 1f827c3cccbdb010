"""What every normalization layer normalizes in a forward, and how certain the statistics of that are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from precisebn import ops
from precisebn._torch import is_transformed
from precisebn.models.families import normalizes_its_input
from precisebn.nn.ghost import GhostBN
from precisebn.statistics.estimator import is_dead
from precisebn.statistics.moments import Moments

__all__ = ["FAR", "FAR_LOG", "Distance", "NormCall", "Statistics", "can_be_measured", "records_calls"]

FAR = 0.25
"""From how many standard deviations on a mean counts as far off: behind it ReLU passes 60% of values and not 50%."""

FAR_LOG = 0.5
"""The same for the log of a ratio of variances: a factor of 1.65."""

_CERTAIN = 3.0  # standard errors
_MOST_BLOCKS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Of what one call of a layer was given; per channel, float64, on the CPU.

    Samples are the independent observations, as values inside one (neighbouring pixels) are correlated: standard errors
    are those of the averages, over samples (blocks of samples, where there are more than 256), of their means and of
    their mean squared deviations from the common mean.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``.
        mean_error: standard error of the mean, ``(C,)``, in the units of the mean; NaN for a single sample.
        var_error: the same of the variance.
        eps: what the layer adds to the variance.
    """

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor
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
        deviations = parts.mean - whole.mean
        squares = parts.m2 / parts.count.unsqueeze(-1) + deviations.square()

        def error(of_blocks: Tensor) -> Tensor:
            total = (weight * of_blocks).square().sum(0)
            return (total * blocks / (blocks - 1)).sqrt() if blocks > 1 else torch.full_like(total, float("nan"))

        mean_error, var_error = error(deviations), error(squares - whole.var())
        return Statistics(whole.mean.cpu(), whole.var().cpu(), mean_error.cpu(), var_error.cpu(), eps)

    @staticmethod
    def certain(mean: Tensor, var: Tensor, eps: float) -> "Statistics":
        """Given ones, ``(C,)`` each, of a population: without error."""
        mean, var = mean.detach().double().cpu(), var.detach().double().cpu().clamp(min=0.0)
        return Statistics(mean, var, torch.zeros_like(mean), torch.zeros_like(mean), eps)

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
        return _rms(self.mean_error / self.scale, self.alive)


@dataclass(frozen=True, slots=True, eq=False)
class NormCall:
    """One call of a normalization layer.

    Attributes:
        layer: its qualified name.
        num_samples: N of the normalization batch (of a ghost batch, where it is cut into such).
        values: values per channel in the normalization batch.
        by_batch: whether it normalizes by the statistics of its input.
        statistics: of its input; None where it is not known to normalize that.
    """

    layer: str
    num_samples: int
    values: int
    by_batch: bool
    statistics: Statistics | None


class Distance(NamedTuple):
    """How far two sets of statistics are apart, root mean square over channels that vary in either.

    Attributes:
        mean: of the means, in common standard deviations.
        log_var: the log of the ratio of variances.
        mean_error: standard error of ``mean``.
        log_var_error: standard error of ``log_var``; at least that of normal values, for samples too few to show tails.
    """

    mean: float
    log_var: float
    mean_error: float = 0.0
    log_var_error: float = 0.0

    @staticmethod
    def between(a: Statistics, b: Statistics) -> "Distance":
        """Of two sets of statistics."""
        alive = a.alive | b.alive
        scale = ((a.var + b.var) / 2 + a.eps).sqrt()
        mean_error = (a.mean_error.square() + b.mean_error.square()).sqrt() / scale
        relative = [(one.var_error / (one.var + one.eps)).square() for one in (a, b)]
        log_var_error = torch.maximum((relative[0] + relative[1]).sqrt(), 2**0.5 * mean_error)
        return Distance(
            _rms((a.mean - b.mean) / scale, alive),
            _rms(((a.var + a.eps) / (b.var + b.eps)).log(), alive),
            _rms(mean_error, alive),
            _rms(log_var_error, alive),
        )

    @property
    def is_far(self) -> bool:
        """Whether they are far apart, and further than by chance; errors of NaN prove nothing."""
        return (self.mean > FAR and self.mean > _CERTAIN * self.mean_error) or (
            self.log_var > FAR_LOG and self.log_var > _CERTAIN * self.log_var_error
        )

    def __str__(self) -> str:
        return f"{self.mean:.2f} standard deviations in the mean and {self.log_var:.2f} in log variance"


def _rms(values: Tensor, where: Tensor) -> float:
    """Root mean square of some of the values; 0 of none."""
    return float(values[where].square().mean().sqrt()) if bool(where.any()) else 0.0


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


def can_be_measured(x: Tensor) -> bool:
    """Whether :meth:`Statistics.of` can be taken; not inside of torch.func, whose tensors are none outside of it."""
    return x.dim() >= 2 and x.dtype in ops.DTYPES and x.numel() > 0 and not x.is_meta and not is_transformed()


@torch.no_grad()
def _call(name: str, layer: nn.Module, x: Tensor) -> NormCall:
    spatial = x[0, 0].numel() if x.shape[0] and x.shape[1] else 0
    num_samples = min(x.shape[0], layer.ghost_size) if isinstance(layer, GhostBN) else x.shape[0]
    known = normalizes_its_input(layer) and can_be_measured(x)
    by_batch = layer.training or getattr(layer, "running_mean", None) is None
    statistics = Statistics.of(x, layer.eps) if known and isinstance(layer.eps, float) else None
    return NormCall(name, num_samples, num_samples * spatial, by_batch, statistics)
