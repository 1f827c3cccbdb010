"""Batch normalization over groups: the differentiable function that training-mode modules are made of.

One function normalizes a tensor, or several tensors that share statistics, each (group, channel) with its own mean and
variance (Ioffe & Szegedy 2015, arXiv 1502.03167; its gradient is that of algorithm 1). Several tensors are not
concatenated: their Moments merge. Forward reads each input twice and writes the output; backward reads input and
gradient twice and writes one gradient; besides the inputs only tensors of size (groups, channels) are kept for it.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from precisebn import ops
from precisebn._merge import merge
from precisebn.errors import InputError
from precisebn.moments import Moments

__all__ = ["batch_norm"]


@overload
def batch_norm(
    xs: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    group: Tensor | Sequence[Tensor] | None = ...,
    num_groups: int = ...,
) -> tuple[Tensor, Moments]: ...
@overload
def batch_norm(
    xs: Sequence[Tensor],
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    group: Tensor | Sequence[Tensor] | None = ...,
    num_groups: int = ...,
) -> tuple[list[Tensor], Moments]: ...
def batch_norm(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group: Tensor | Sequence[Tensor] | None = None,
    num_groups: int = 1,
) -> tuple[Tensor | list[Tensor], Moments]:
    """Normalize every (group, channel) by the mean and biased variance of its values; return also their Moments.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``. With one group and one tensor this is
    ``torch.nn.functional.batch_norm(..., training=True)``. Differentiable, twice, in the inputs, weight and bias.

    Args:
        xs: ``(N, C, *)``, or several such with the same C, dtype and device, normalized together as if concatenated
            (their other dimensions may differ).
        weight: ``(C,)``, or ``(G, C)`` for an own one per group; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance.
        group: int64 ``(N,)``, the group of each sample, for each tensor of ``xs``; None puts all in group 0.
        num_groups: G.

    Returns:
        The normalized tensor, or a list of them as ``xs`` is one, of the inputs' dtype and memory format; and the
        Moments of the values, ``(C,)``, or ``(G, C)`` where ``group`` is given, to update running statistics from.
        The Moments are differentiable too.

    Raises:
        InputError: unsupported shapes, dtypes, groups, or a single value per channel without groups.

    Example:
        >>> y, moments = batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0)
        >>> y.flatten().tolist(), moments.mean.item(), moments.var().item()
        ([-1.0, 1.0], 2.0, 1.0)
        >>> (a, b), _ = batch_norm([torch.tensor([[1.0]]), torch.tensor([[3.0]])], eps=0.0)
        >>> a.item(), b.item()
        (-1.0, 1.0)
    """
    tensors = [xs] if isinstance(xs, Tensor) else list(xs)
    groups = _groups_of(tensors, group, isinstance(xs, Tensor))
    if not tensors:
        raise InputError("batch_norm: xs is an empty list; pass at least one tensor")
    for i, x in enumerate(tensors):
        ops.check_input(f"batch_norm: xs[{i}]", x, groups[i] if groups else None, num_groups)
        if (x.shape[1], x.dtype, x.device) != (tensors[0].shape[1], tensors[0].dtype, tensors[0].device):
            raise InputError(
                f"batch_norm: tensors normalized together must agree in channels, dtype and device, but xs[{i}] is "
                f"{tuple(x.shape)} {x.dtype} on {x.device} and xs[0] {tuple(tensors[0].shape)} {tensors[0].dtype} on "
                f"{tensors[0].device}"
            )
    channels = tensors[0].shape[1]
    if not groups and channels and sum(x.numel() for x in tensors) == channels:
        raise InputError(
            f"batch_norm: one value per channel has no variance to normalize by; xs is {tuple(tensors[0].shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape not in ((channels,), (num_groups, channels)):
            raise InputError(
                f"batch_norm: {name} must be ({channels},) or ({num_groups}, {channels}), is {tuple(parameter.shape)}"
            )
    ys, count, mean, m2 = torch.ops.precisebn.batch_norm(tensors, weight, bias, eps, groups, num_groups)
    moments = Moments(count, mean, m2) if groups else Moments(count[0], mean[0], m2[0])
    return (ys[0] if isinstance(xs, Tensor) else ys), moments


def _groups_of(tensors: list[Tensor], group: Tensor | Sequence[Tensor] | None, single: bool) -> list[Tensor]:
    """The group vectors, one a tensor; none where there are no groups."""
    if group is None:
        return []
    groups = [group] if isinstance(group, Tensor) else list(group)
    if len(groups) != len(tensors) or isinstance(group, Tensor) != single:
        raise InputError(
            f"batch_norm: group must be None, or one int64 vector for each of the {len(tensors)} tensors of xs"
        )
    return groups


def _forward(
    xs: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float, groups: list[Tensor], num_groups: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    groups_or_none: list[Tensor | None] = list(groups) or [None] * len(xs)
    (count, mean, m2), *rest = [
        ops.unchecked.moments(x, g, num_groups) for x, g in zip(xs, groups_or_none, strict=True)
    ]
    for more_count, more_mean, more_m2 in rest:
        mean, m2 = merge(count.unsqueeze(-1), mean, m2, more_count.unsqueeze(-1), more_mean, more_m2)
        count = count + more_count
    scale = _inverse_std(count, m2, eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    scale, shift = scale.to(ops.compute_dtype(xs[0])), shift.to(ops.compute_dtype(xs[0]))
    ys = [ops.unchecked.normalize(x, scale, shift, g) for x, g in zip(xs, groups_or_none, strict=True)]
    return ys, count, mean, m2


def _fake(
    xs: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float, groups: list[Tensor], num_groups: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    mean = xs[0].new_empty(num_groups, xs[0].shape[1], dtype=torch.float64)
    return [torch.empty_like(x) for x in xs], mean.new_empty(num_groups), mean, torch.empty_like(mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    xs, weight, bias, ctx.eps, groups, _ = inputs
    _, count, mean, m2 = output
    ctx.mark_non_differentiable(count)
    ctx.num_tensors, ctx.grouped = len(xs), bool(groups)
    ctx.has_bias_of = None if bias is None else (bias.dim(), bias.dtype)
    ctx.save_for_backward(*xs, *groups, weight, count, mean, m2)


def _backward(
    ctx: Any, grad_ys: list[Tensor | None], _: Tensor | None, grad_mean: Tensor, grad_m2: Tensor
) -> tuple[Any, ...]:
    """Gradients by the chain rule through the batch's own mean and variance, in terms of the operators.

    With x^ = (x - mean) / std: ``dx = weight / std * (dy - avg(dy) - x^ * avg(dy * x^))``, which is ``a*dy + b*x + c``;
    gradients of the returned mean and m2 add 1/n and 2 (x - mean) times themselves.
    """
    saved = ctx.saved_tensors
    xs = saved[: ctx.num_tensors]
    groups = saved[ctx.num_tensors : -4] if ctx.grouped else (None,) * ctx.num_tensors
    weight, count, mean, m2 = saved[-4:]
    num_groups = count.shape[0]
    dys = [torch.zeros_like(x) if dy is None else dy for x, dy in zip(xs, grad_ys, strict=True)]

    sums = [ops.unchecked.backward_reduce(dy, x, mean, g, num_groups) for dy, x, g in zip(dys, xs, groups, strict=True)]
    sum_dy, sum_dy_xmu = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    inverse_std = _inverse_std(count, m2, ctx.eps)
    n = count.clamp(min=1.0).unsqueeze(-1)
    a = inverse_std if weight is None else inverse_std * weight
    b = 2.0 * grad_m2 - a * inverse_std.square() * sum_dy_xmu / n
    c = (grad_mean - a * sum_dy) / n - b * mean

    dtype = ops.compute_dtype(xs[0])
    a, b, c = a.to(dtype), b.to(dtype), c.to(dtype)
    grad_xs = [ops.unchecked.backward_apply(dy, x, a, b, c, g) for dy, x, g in zip(dys, xs, groups, strict=True)]
    grad_weight = None if weight is None else _like(sum_dy_xmu * inverse_std, weight.dim(), weight.dtype)
    grad_bias = None if ctx.has_bias_of is None else _like(sum_dy, *ctx.has_bias_of)
    return grad_xs, grad_weight, grad_bias, None, [None] * len(xs) if ctx.grouped else [], None


def _inverse_std(count: Tensor, m2: Tensor, eps: float) -> Tensor:
    return (m2 / count.clamp(min=1.0).unsqueeze(-1) + eps).rsqrt()


def _like(per_group: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a parameter from gradients per group: a parameter that all groups share gets their sum."""
    return (per_group if dim == 2 else per_group.sum(0)).to(dtype)


_library = torch.library.Library("precisebn", "FRAGMENT")
_library.define(
    "batch_norm(Tensor[] xs, Tensor? weight, Tensor? bias, float eps, Tensor[] group, int num_groups) "
    "-> (Tensor[] ys, Tensor count, Tensor mean, Tensor m2)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("batch_norm", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("precisebn::batch_norm", _fake)
torch.library.register_autograd("precisebn::batch_norm", _backward, setup_context=_setup_context)
