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
    if torch.compiler.is_compiling():
        ys, count, mean, m2 = torch.ops.precisebn.batch_norm(tensors, weight, bias, eps, groups, num_groups)
    else:
        outputs: tuple[Tensor, ...] = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            eps, num_groups, len(tensors), weight, bias, *tensors, *groups
        )
        *ys, count, mean, m2 = outputs
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


def _gradients(
    xs: Sequence[Tensor],
    groups: Sequence[Tensor | None],
    statistics: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    eps: float,
    grad_ys: Sequence[Tensor | None],
    grad_moments: tuple[Tensor | None, Tensor | None],
    needed: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Gradients by the chain rule through the batch's own mean and variance, in terms of the operators.

    With x^ = (x - mean) / std: ``dx = weight / std * (dy - avg(dy) - x^ * avg(dy * x^))``, which is ``a*dy + b*x + c``;
    gradients of the returned mean and m2 add 1/n and 2 (x - mean) times themselves. Being made of differentiable
    operators and of the returned statistics, this can be differentiated again.

    Returns:
        The gradients of those inputs that are ``needed``; and of weight and bias for each group, ``(G, C)``.
    """
    count, mean, m2 = statistics
    grad_mean, grad_m2 = grad_moments
    dys = [torch.zeros_like(x) if dy is None else dy for x, dy in zip(xs, grad_ys, strict=True)]
    pieces = list(zip(dys, xs, groups, strict=True))
    sums = [ops.unchecked.backward_reduce(dy, x, mean, g, count.shape[0]) for dy, x, g in pieces]
    sum_dy, sum_dy_xmu = sums[0]
    for more_dy, more_dy_xmu in sums[1:]:
        sum_dy, sum_dy_xmu = sum_dy + more_dy, sum_dy_xmu + more_dy_xmu

    inverse_std = _inverse_std(count, m2, eps)
    n = count.clamp(min=1.0).unsqueeze(-1)
    grad_weight = sum_dy_xmu * inverse_std
    a = inverse_std if weight is None else inverse_std * weight
    b = -a * inverse_std * grad_weight / n
    c = -a * sum_dy / n
    if grad_m2 is not None:
        b = b + 2.0 * grad_m2
    if grad_mean is not None:
        c = c + grad_mean / n
    c = c - b * mean

    dtype = ops.compute_dtype(xs[0])
    a, b, c = a.to(dtype), b.to(dtype), c.to(dtype)
    grad_xs = [
        ops.unchecked.backward_apply(dy, x, a, b, c, g) if need else None
        for (dy, x, g), need in zip(pieces, needed, strict=True)
    ]
    return grad_xs, grad_weight, sum_dy


class _BatchNorm(torch.autograd.Function):
    """The eager way. The one through torch.library, for graphs, costs half a millisecond a call to take lists apart."""

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        num_groups: int,
        num_tensors: int,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        xs, groups = list(tensors[:num_tensors]), list(tensors[num_tensors:])
        ys, count, mean, m2 = _forward(xs, weight, bias, eps, groups, num_groups)
        _save(ctx, xs, groups, weight, bias, eps, (count, mean, m2))
        ctx.set_materialize_grads(False)
        return (*ys, count, mean, m2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *grad_ys, _, grad_mean, grad_m2 = grads
        needed = ctx.needs_input_grad[5 : 5 + len(grad_ys)]
        grad_xs, grad_weight, grad_bias = _backward_of(ctx, grad_ys, (grad_mean, grad_m2), needed)
        no_groups = (None,) * (len(ctx.needs_input_grad) - 5 - len(grad_ys))
        return None, None, None, grad_weight, grad_bias, *grad_xs, *no_groups


def _save(
    ctx: Any,
    xs: Sequence[Tensor],
    groups: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Keep what backward needs: the inputs, and tensors of the size of the statistics."""
    ctx.mark_non_differentiable(statistics[0])
    ctx.eps, ctx.num_tensors = eps, len(xs)
    ctx.bias_is_like = None if bias is None else (bias.dim(), bias.dtype)
    ctx.save_for_backward(*xs, *groups, weight, *statistics)


def _backward_of(
    ctx: Any,
    grad_ys: Sequence[Tensor | None],
    grad_moments: tuple[Tensor | None, Tensor | None],
    needed: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """The gradients of inputs, weight and bias from what :func:`_save` kept."""
    saved = ctx.saved_tensors
    xs, groups = saved[: ctx.num_tensors], saved[ctx.num_tensors : -4] or (None,) * ctx.num_tensors
    weight, *statistics = saved[-4:]
    grad_xs, grad_weight, grad_bias = _gradients(
        xs, groups, tuple(statistics), weight, ctx.eps, grad_ys, grad_moments, needed
    )
    return (
        grad_xs,
        None if weight is None else _like(grad_weight, weight.dim(), weight.dtype),
        None if ctx.bias_is_like is None else _like(grad_bias, *ctx.bias_is_like),
    )


def _library_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    xs, weight, bias, eps, groups, _ = inputs
    _save(ctx, xs, groups, weight, bias, eps, output[1:])


def _library_backward(
    ctx: Any, grad_ys: list[Tensor | None], _: Tensor | None, grad_mean: Tensor, grad_m2: Tensor
) -> tuple[Any, ...]:
    needed = (True,) * ctx.num_tensors
    grad_xs, grad_weight, grad_bias = _backward_of(ctx, grad_ys, (grad_mean, grad_m2), needed)
    num_groups = len(ctx.saved_tensors) - 4 - ctx.num_tensors
    return grad_xs, grad_weight, grad_bias, None, [None] * num_groups, None


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
torch.library.register_autograd("precisebn::batch_norm", _library_backward, setup_context=_library_setup_context)
