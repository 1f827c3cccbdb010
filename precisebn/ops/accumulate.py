"""accumulate: the moments of a mini-batch, merged into running accumulators."""

import torch
from torch import Tensor

from precisebn.ops.chan import merge
from precisebn.ops.moments import fallback as moments
from precisebn.ops.operator import Operator, raw

__all__ = ["OPERATOR", "accumulate", "fallback"]


def accumulate(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
) -> None:
    """Merge the moments of ``x`` into running accumulators, in place; optionally write the statistics of ``x`` alone.

    The fused form of :func:`moments` and Chan's merge for a hook that runs once per layer and iteration; it therefore
    checks next to nothing. Not differentiable. An empty ``x`` changes nothing.

    Args:
        x: ``(N, C, *)``, as in :func:`moments`.
        count: float64 ``(1,)``, contiguous, on the device of ``x``, as are the next two.
        mean: float64 ``(C,)``.
        m2: float64 ``(C,)``.
        batch_mean: ``(C,)`` of any floating dtype: receives the mean of ``x`` per channel.
        batch_var: ``(C,)`` of any floating dtype: receives the biased variance (divided by n) of ``x`` per channel.

    >>> import torch
    >>> count, mean, m2 = torch.zeros(7, dtype=torch.float64).split([1, 3, 3])
    >>> accumulate(torch.ones(2, 3), count, mean, m2)
    >>> accumulate(torch.zeros(2, 3), count, mean, m2)
    >>> count.item(), mean.tolist(), m2.tolist()
    (4.0, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    """
    raw.accumulate(x, count, mean, m2, batch_mean, batch_var)


@torch.no_grad()  # a forward may have asked for gradients, which views made without refuse to be written with
def fallback(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
) -> None:
    batch_count, (x_mean,), (x_m2,) = moments(x)
    if x.numel() == 0:
        return
    if batch_mean is not None:
        batch_mean.copy_(x_mean)
    if batch_var is not None:
        batch_var.copy_(x_m2 / batch_count)
    merged = merge(count, mean, m2, batch_count, x_mean, x_m2)
    mean.copy_(merged.mean)
    m2.copy_(merged.m2)
    count.add_(batch_count)


def _fake(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
) -> None:
    return None


OPERATOR = Operator(
    "accumulate(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor(d!)? batch_mean=None, "
    "Tensor(e!)? batch_var=None) -> ()",
    fallback=fallback,
    fake=_fake,
)
