"""moments: count, mean and sum of squared deviations per (group, channel)."""

from typing import Any

import torch
from torch import Tensor

from precisebn.ops.chan import merge
from precisebn.ops.checks import check_input
from precisebn.ops.grouping import chunks, sum_by_group
from precisebn.ops.normalize import centered
from precisebn.ops.operator import Derivative, Operator, differentiable

__all__ = ["OPERATOR", "fallback", "moments"]

Moments = tuple[Tensor, Tensor, Tensor]  # count [G], mean [G, C], m2 [G, C], all float64


def moments(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> Moments:
    """Count, mean and sum of squared deviations of every (group, channel) of ``x``.

    At least as accurate as a float64 Welford recurrence to 1e-6 relative in the variance, for float32 input with
    ``|mean| / std`` up to 1e4; never negative; exactly 0 for a constant channel. Differentiable twice in ``x``.

    Args:
        x: ``(N, C, *)``, float32, float64, float16 or bfloat16, any strides. Empty is allowed.
        group: int64 ``(N,)`` on the device of ``x``, the group of each sample, ``0 <= group < num_groups``. The range
            is checked on CPU only (on CUDA the check would wait for the device). None puts every sample in group 0.
        num_groups: the number of groups, ``G``.

    Returns:
        ``count (G,)``, the number of values per channel; ``mean (G, C)``; ``m2 (G, C)``, the sum of squared deviations
        from the mean. All float64. A group without samples has zeros.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    >>> count, mean, m2 = moments(x)
    >>> count.tolist(), mean.tolist(), m2.tolist()
    ([2.0], [[2.0, 10.0]], [[2.0, 0.0]])
    """
    check_input("moments", x, group, num_groups)
    result: Moments = differentiable.moments(x, group, num_groups)
    return result


def fallback(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> Moments:
    """In float64, chunk by chunk, each chunk in several passes, the chunks merged exactly.

    ``E[x^2] - E[x]^2`` appears nowhere: it cancels catastrophically once the mean is large against the standard
    deviation.
    """
    zeros = x.new_zeros(num_groups, x.shape[1], dtype=torch.float64)
    total = (zeros[:, 0].clone() if x.shape[1] else zeros.new_zeros(num_groups), zeros, zeros)
    for (values,), index in chunks((x,), group):
        total = _merge(total, _moments_of_chunk(values, index, num_groups))
    return total[0].clone(), total[1].clone(), total[2].clone()


def _merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint samples, group by group."""
    return a[0] + b[0], *merge(a[0].unsqueeze(-1), a[1], a[2], b[0].unsqueeze(-1), b[1], b[2])


def _moments_of_chunk(values: Tensor, index: Tensor, num_groups: int) -> Moments:
    """The moments of float64 ``values (n, C, L)`` whose sample ``i`` is of group ``index[i]``."""
    length = values.new_full((len(values),), values.shape[2])
    count = sum_by_group(length, index, num_groups)
    divisor = count.clamp(min=1).unsqueeze(-1)
    mean = sum_by_group(values.sum(2), index, num_groups) / divisor
    # The sum above rounds. What it missed is itself a mean, so a second step makes the mean exact to the last bits (and
    # the m2 of a constant channel exactly 0); the term in residual**2 corrects m2 for what is still left.
    mean = mean + sum_by_group((values - mean[index].unsqueeze(-1)).sum(2), index, num_groups) / divisor
    deviation = values - mean[index].unsqueeze(-1)
    residual = sum_by_group(deviation.sum(2), index, num_groups)
    m2 = sum_by_group((deviation * deviation).sum(2), index, num_groups) - residual * (residual / divisor)
    return count, mean, m2.clamp(min=0)


def _fake(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> Moments:
    count = x.new_empty(num_groups, dtype=torch.float64)
    mean = x.new_empty(num_groups, x.shape[1], dtype=torch.float64)
    return count, mean, torch.empty_like(mean)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.group, _ = inputs
    count, mean, _ = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(x, count, mean)


def _backward(ctx: Any, _: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Tensor, None, None]:
    """``dx = grad_mean / n + 2 grad_m2 (x - mean)``; the count has no derivative."""
    x, count, mean = ctx.saved_tensors
    return centered(x, mean, 2 * grad_m2, grad_mean / count.clamp(min=1).unsqueeze(-1), ctx.group), None, None


OPERATOR = Operator(
    "moments(Tensor x, Tensor? group=None, int num_groups=1) -> (Tensor count, Tensor mean, Tensor m2)",
    fallback=fallback,
    fake=_fake,
    derivative=Derivative(_save, _backward),
)
