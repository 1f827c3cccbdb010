"""The operators of :mod:`precisebn.ops` in plain PyTorch: the specification, and what runs where no kernel does.

Statistics are taken in float64, chunk by chunk, each chunk in several passes (mean first, then squared deviations from
it), and the chunks are merged exactly: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979. A chunk is a few MB of float64, so memory does not grow with the input. ``E[x^2] - E[x]^2``
appears nowhere: it cancels catastrophically once the mean is large against the standard deviation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from precisebn.ops.chan import merge

Moments = tuple[Tensor, Tensor, Tensor]  # count [G], mean [G, C], m2 [G, C], all float64

_CHUNK_VALUES = 2**19


def moments(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> Moments:
    """Count, mean and sum of squared deviations from the mean, per (group, channel), in float64."""
    zeros = x.new_zeros(num_groups, x.shape[1], dtype=torch.float64)
    total = (zeros[:, 0].clone() if x.shape[1] else zeros.new_zeros(num_groups), zeros, zeros)
    for (values,), index in _chunks((x,), group):
        total = _merge(total, _moments_of_chunk(values, index, num_groups))
    return total[0].clone(), total[1].clone(), total[2].clone()


def accumulate(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
) -> None:
    """Merge the moments of ``x`` into ``count [1]``, ``mean [C]``, ``m2 [C]``; write its mean and biased variance."""
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


def fold(
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics and affine as ``scale`` and ``shift (R, C)``; ``spread`` is m2 with a count, else the variance."""
    mean, var = mean.double(), spread.double()
    if count is not None:
        var = var / count.clamp(min=1.0).unsqueeze(-1)
    scale = (var + eps).rsqrt() if weight is None else weight.double() * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    dtype = torch.float64 if double else torch.float32
    scale, shift = (torch.atleast_2d(t.to(dtype)) for t in (scale.expand_as(shift), shift))
    return scale.clone(), shift.clone()


@torch.no_grad()
def track(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
) -> None:
    """Move running statistics towards those of a mini-batch, ``(C,)`` or ``(R, C)``; rows of one value or none stay."""
    tracked = count > 1
    num_batches.add_(tracked)
    share = 1.0 / num_batches.double().clamp(min=1.0) if momentum is None else torch.full_like(count, momentum)
    unbiased = m2 / (count - 1.0).clamp(min=1.0).unsqueeze(-1)
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        moved = running.double().lerp(batch, share.unsqueeze(-1))
        running.copy_(moved.to(running.dtype).where(tracked.unsqueeze(-1), running))


def normalize(x: Tensor, scale: Tensor, shift: Tensor | None = None, group: Tensor | None = None) -> Tensor:
    """``scale * x + shift`` per (group, channel), computed in the dtype of ``scale``, returned in that of ``x``."""
    y = torch.empty_like(x)
    if shift is None:
        return torch.mul(_per_sample(scale, x, group), x, out=y)
    return torch.addcmul(_per_sample(shift, x, group), _per_sample(scale, x, group), x, out=y)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, group: Tensor | None = None, num_groups: int = 1
) -> tuple[Tensor, Tensor]:
    """``sum dy`` and ``sum dy * (x - mean)`` per (group, channel), in float64."""
    sum_dy = x.new_zeros(num_groups, x.shape[1], dtype=torch.float64)
    sum_dy_xmu = torch.zeros_like(sum_dy)
    for (dy_values, x_values), index in _chunks((dy, x), group):
        centered = x_values - mean[index].unsqueeze(-1)
        sum_dy += _sum_by_group(dy_values.sum(2), index, num_groups)
        sum_dy_xmu += _sum_by_group((dy_values * centered).sum(2), index, num_groups)
    return sum_dy, sum_dy_xmu


def backward_fold(
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    weight: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The coefficients of ``backward_apply`` from the sums of ``backward_reduce``; gradients of weight and bias."""
    var = spread.double() if count is None else spread / count.clamp(min=1.0).unsqueeze(-1)
    inverse_std = (var + eps).rsqrt()
    grad_weight, grad_bias = sum_dy_xmu * inverse_std, sum_dy
    a = inverse_std if weight is None else weight.double() * inverse_std
    if count is None:
        b = c = torch.zeros_like(a)
    else:
        per_value = -a / count.clamp(min=1.0).unsqueeze(-1)
        b = per_value * inverse_std * grad_weight
        c = per_value * grad_bias - b * mean
    if weight is not None:
        grad_weight, grad_bias = (
            torch.atleast_2d(g).sum_to_size(weight.shape).to(weight.dtype) for g in (grad_weight, grad_bias)
        )
    dtype = torch.float64 if double else torch.float32
    # An operator returns none of its inputs, and no tensor twice.
    a, b, c = (torch.atleast_2d(t.to(dtype, copy=True)) for t in (a, b, c))
    return a, b, c, grad_weight.clone(), grad_bias.clone()


def backward_apply(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
    """``a * dy + b * x + c`` per (group, channel), computed in the dtype of ``a``, returned in that of ``x``."""
    dx = torch.empty_like(x)
    bx_plus_c = torch.addcmul(_per_sample(c, x, group), _per_sample(b, x, group), x)
    return torch.addcmul(bx_plus_c, _per_sample(a, x, group), dy, out=dx)


def normalize_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalized tensor; count, mean and m2, without a dimension for groups where there is no ``group``."""
    count, mean, m2 = moments(x, group, num_groups)
    if group is None:
        count, mean, m2 = (t.squeeze(0).clone() for t in (count, mean, m2))
    scale, shift = fold(count, mean, m2, weight, bias, eps, x.dtype == torch.float64)
    return normalize(x, scale, shift, group), count, mean, m2


def backward_batch(
    dy: Tensor,
    x: Tensor,
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    about = torch.atleast_2d(mean)
    sum_dy, sum_dy_xmu = (s.reshape(mean.shape) for s in backward_reduce(dy, x, about, group, len(about)))
    a, b, c, grad_weight, grad_bias = backward_fold(
        count, mean, spread, sum_dy, sum_dy_xmu, weight, eps, x.dtype == torch.float64
    )
    if count is None:
        return normalize(torch.empty_like(x).copy_(dy), a, None, group), grad_weight, grad_bias
    return backward_apply(dy, x, a, b, c, group), grad_weight, grad_bias


def _merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint samples, group by group."""
    return a[0] + b[0], *merge(a[0].unsqueeze(-1), a[1], a[2], b[0].unsqueeze(-1), b[1], b[2])


def _moments_of_chunk(values: Tensor, index: Tensor, num_groups: int) -> Moments:
    """The moments of float64 ``values (n, C, L)`` whose sample ``i`` is of group ``index[i]``."""
    length = values.new_full((len(values),), values.shape[2])
    count = _sum_by_group(length, index, num_groups)
    divisor = count.clamp(min=1).unsqueeze(-1)
    mean = _sum_by_group(values.sum(2), index, num_groups) / divisor
    # The sum above rounds. What it missed is itself a mean, so a second step makes the mean exact to the last bits (and
    # the m2 of a constant channel exactly 0); the term in residual**2 corrects m2 for what is still left.
    mean = mean + _sum_by_group((values - mean[index].unsqueeze(-1)).sum(2), index, num_groups) / divisor
    deviation = values - mean[index].unsqueeze(-1)
    residual = _sum_by_group(deviation.sum(2), index, num_groups)
    m2 = _sum_by_group((deviation * deviation).sum(2), index, num_groups) - residual * (residual / divisor)
    return count, mean, m2.clamp(min=0)


def _sum_by_group(per_sample: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Add the rows of ``per_sample`` that share a group."""
    # index_put_ adds in a fixed order. On CUDA index_add_ does not: it uses atomics.
    if num_groups == 1:
        return per_sample.sum(0, keepdim=True)
    total = per_sample.new_zeros(num_groups, *per_sample.shape[1:])
    return total.index_put_((index,), per_sample, accumulate=True)


def _per_sample(per_group: Tensor, x: Tensor, group: Tensor | None) -> Tensor:
    """``per_group [G, C]`` as it applies to ``x (N, C, *)``, broadcastable against it."""
    rows = per_group if group is None else per_group[group]
    return rows.reshape(rows.shape + (1,) * (x.dim() - 2))


def _chunks(tensors: tuple[Tensor, ...], group: Tensor | None) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Cut tensors ``(N, C, *)`` into float64 pieces ``(n, C, L)``, each with the groups of its ``n`` samples."""
    x = tensors[0]
    if x.numel() == 0:
        return
    if group is None:
        group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    flat = [t.flatten(2) if t.dim() > 2 else t.unsqueeze(2) for t in tensors]
    channels, length = flat[0].shape[1:]
    columns = min(length, max(1, _CHUNK_VALUES // channels))
    rows = max(1, _CHUNK_VALUES // (channels * columns))
    for sample in range(0, len(x), rows):
        for start in range(0, length, columns):
            pieces = [t[sample : sample + rows, :, start : start + columns].double() for t in flat]
            yield pieces, group[sample : sample + rows]
