"""Batch normalization over groups: the two differentiable functions that all modules are made of.

:func:`batch_norm` normalizes a tensor, or several tensors that share statistics, each (group, channel) with its own
mean and variance (Ioffe & Szegedy 2015, arXiv 1502.03167; its gradient is that of algorithm 1). Several tensors are not
concatenated: their Moments merge. Forward reads each input twice and writes the output; backward reads input and
gradient twice and writes one gradient; besides the inputs only tensors of size (groups, channels) are kept for it.

:func:`frozen_batch_norm` normalizes with statistics that are given: batch normalization at test time, or with frozen
layers. Forward reads the input and writes the output once, and the input is kept only for the gradient of ``weight``.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from precisebn import ops
from precisebn._torch import is_tracing
from precisebn.errors import InputError
from precisebn.functional import portable
from precisebn.ops.chan import merge, merge_rows
from precisebn.statistics.moments import Moments

__all__ = ["batch_norm", "frozen_batch_norm"]

Like = tuple[int, torch.dtype]
"""The number of dimensions and the dtype of a parameter that backward does not need itself."""


@overload
def batch_norm(
    xs: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    group: Tensor | Sequence[Tensor] | None = ...,
    num_groups: int = ...,
    shared_statistics: bool = ...,
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
    shared_statistics: bool = ...,
) -> tuple[list[Tensor], Moments]: ...
def batch_norm(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group: Tensor | Sequence[Tensor] | None = None,
    num_groups: int = 1,
    shared_statistics: bool = False,
) -> tuple[Tensor | list[Tensor], Moments]:
    """Normalize every (group, channel) by the mean and biased variance of its values; return also their Moments.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``. With one group and one tensor this is
    ``torch.nn.functional.batch_norm(..., training=True)``. Differentiable, twice, in the inputs, weight and bias; under
    torch.func and in forward-mode derivatives it is plain arithmetic, which is slow.

    Args:
        xs: ``(N, C, *)``, or several such with the same C, dtype and device, normalized together as if concatenated
            (their other dimensions may differ).
        weight: ``(C,)``, or ``(G, C)`` for an own one per group; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance.
        group: int64 ``(N,)``, the group of each sample, for each tensor of ``xs``; None puts all in group 0.
        num_groups: G.
        shared_statistics: normalize all groups together, by the mean and variance of all values; the groups then only
            tell weights, biases and the returned Moments apart.

    Returns:
        The normalized tensor, or a list of them as ``xs`` is one, of the inputs' dtype and memory format; and the
        Moments of the values, ``(C,)``, or ``(G, C)`` where ``group`` is given, to update running statistics from.
        The Moments are differentiable too.

    Raises:
        InputError: unsupported shapes, dtypes, groups, or a single value per channel in all. (A group of a single value
            per channel has variance 0: it is normalized to its bias.)

    Example:
        >>> y, moments = batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0)
        >>> y.flatten().tolist(), moments.mean.item(), moments.var().item()
        ([-1.0, 1.0], 2.0, 1.0)
        >>> (a, b), _ = batch_norm([torch.tensor([[1.0]]), torch.tensor([[3.0]])], eps=0.0)
        >>> a.item(), b.item()
        (-1.0, 1.0)
    """
    tensors = [xs] if isinstance(xs, Tensor) else list(xs)
    groups = [] if group is None else _groups_of(tensors, group, isinstance(xs, Tensor))
    if not is_tracing():  # whose graph would be of these very sizes; torch's own operators check
        _check(tensors, weight, bias, groups, num_groups)
    if portable.is_portable():
        ys, count, mean, m2 = portable.batch_norm(tensors, weight, bias, eps, groups, num_groups, shared_statistics)
    elif torch.compiler.is_compiling():
        ys, count, mean, m2 = torch.ops.precisebn.batch_norm(
            tensors, weight, bias, eps, groups, num_groups, shared_statistics
        )
    elif _is_transformed():
        ys, count, mean, m2 = _plain_batch_norm(tensors, weight, bias, eps, groups, num_groups, shared_statistics)
    elif len(tensors) == 1 and (num_groups == 1 or (groups and not shared_statistics)):
        y, count, mean, m2 = _one_batch_norm(tensors[0], weight, bias, eps, groups[0] if groups else None, num_groups)
        return (y if isinstance(xs, Tensor) else [y]), Moments(count, mean, m2)
    elif _needs_gradient(weight, bias, *tensors):
        outputs: tuple[Tensor, ...] = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            eps, num_groups, shared_statistics, len(tensors), weight, bias, *tensors, *groups
        )
        *ys, count, mean, m2 = outputs
    else:
        ys, count, mean, m2 = _forward(tensors, weight, bias, eps, groups, num_groups, shared_statistics)
    moments = Moments(count, mean, m2) if groups else Moments(count[0], mean[0], m2[0])
    return (ys[0] if isinstance(xs, Tensor) else ys), moments


def _check(
    tensors: list[Tensor], weight: Tensor | None, bias: Tensor | None, groups: list[Tensor], num_groups: int
) -> None:
    if not tensors:
        raise InputError("batch_norm: xs is an empty list; pass at least one tensor")
    first = tensors[0]
    for i, x in enumerate(tensors):
        ops.check_input(f"batch_norm: xs[{i}]", x, groups[i] if groups else None, num_groups)
        if i and (x.shape[1], x.dtype, x.device) != (first.shape[1], first.dtype, first.device):
            raise InputError(
                f"batch_norm: tensors normalized together must agree in channels, dtype and device, but xs[{i}] is "
                f"{tuple(x.shape)} {x.dtype} on {x.device} and xs[0] {tuple(first.shape)} {first.dtype} on "
                f"{first.device}"
            )
    channels = first.shape[1]
    if channels and sum(x.numel() for x in tensors) == channels:
        raise InputError(
            f"batch_norm: one value per channel has no variance to normalize by; xs is {tuple(first.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape not in ((channels,), (num_groups, channels)):
            raise InputError(
                f"batch_norm: {name} must be ({channels},) or ({num_groups}, {channels}), is {tuple(parameter.shape)}"
            )
        if parameter.device != first.device:
            raise InputError(f"batch_norm: {name} is on {parameter.device}, but xs on {first.device}")


def _one_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a single tensor, every group by its own statistics: forward and backward are one operator each."""
    if _needs_gradient(x, weight, bias):
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _OneBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, eps, group, num_groups
        )
    else:
        outputs = ops.bare.normalize_batch(x, weight, bias, eps, group, num_groups)
    return outputs


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # any() of a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


def _groups_of(tensors: list[Tensor], group: Tensor | Sequence[Tensor], single: bool) -> list[Tensor]:
    """The group vectors, one a tensor."""
    groups = [group] if isinstance(group, Tensor) else list(group)
    if len(groups) != len(tensors) or isinstance(group, Tensor) != single:
        raise InputError(
            f"batch_norm: group must be None, or one int64 vector for each of the {len(tensors)} tensors of xs"
        )
    return groups


def _forward(
    xs: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: list[Tensor],
    num_groups: int,
    shared: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    groups_or_none: list[Tensor | None] = list(groups) or [None] * len(xs)
    statistics = _statistics(xs, groups_or_none, num_groups)
    count, mean, m2 = _together(*statistics) if shared else statistics
    scale, shift = ops.bare.fold(count, mean, m2, weight, bias, eps, xs[0].dtype == torch.float64)
    if shift.shape[0] == 1:
        groups_or_none = [None] * len(xs)
    ys = [ops.bare.normalize(x, scale, shift, g) for x, g in zip(xs, groups_or_none, strict=True)]
    return ys, *statistics


def _statistics(xs: list[Tensor], groups: list[Tensor | None], num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and m2 of each group over all tensors."""
    count, mean, m2 = ops.bare.moments(xs[0], groups[0], num_groups)
    for x, group in zip(xs[1:], groups[1:], strict=True):
        if num_groups == 1:
            ops.bare.accumulate(x, count, mean[0], m2[0])
        else:
            more, more_mean, more_m2 = ops.bare.moments(x, group, num_groups)
            mean, m2 = merge(count.unsqueeze(-1), mean, m2, more.unsqueeze(-1), more_mean, more_m2)
            count = count + more
    return count, mean, m2


def _together(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all groups together, as those of one group."""
    if count.shape[0] == 1:
        return count, mean, m2
    merged = merge_rows(count.unsqueeze(-1), mean, m2)
    return count.sum(0, keepdim=True), merged.mean.unsqueeze(0), merged.m2.unsqueeze(0)


def _fake(
    xs: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: list[Tensor],
    num_groups: int,
    shared: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    mean = xs[0].new_empty(num_groups, xs[0].shape[1], dtype=torch.float64)
    return [torch.empty_like(x) for x in xs], mean.new_empty(num_groups), mean, torch.empty_like(mean)


def _gradients(
    xs: Sequence[Tensor],
    groups: Sequence[Tensor | None],
    statistics: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    bias_is_like: Like | None,
    eps: float,
    shared: bool,
    grad_ys: Sequence[Tensor | None],
    grad_moments: tuple[Tensor | None, Tensor | None],
    needed: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Gradients by the chain rule through the batch's own mean and variance, in terms of the operators.

    With x^ = (x - mean) / std: ``dx = (w * dy - avg(w * dy) - x^ * avg(w * dy * x^)) / std``, averages being taken over
    what was normalized together, which is ``a*dy + b*x + c``. Where no one differentiates this again, and there is
    nothing special about the statistics, one operator works out a, b and c.

    Returns:
        The gradients of those inputs that are ``needed``; and of weight and bias, for each group, ``(G, C)``, or summed
        over the groups already.
    """
    count, mean, m2 = statistics
    again = torch.is_grad_enabled()
    run = ops.unchecked if again else ops.bare
    shared = shared and count.shape[0] > 1
    dys = [_laid_out_as(x, dy) for x, dy in zip(xs, grad_ys, strict=True)]
    pieces = list(zip(dys, xs, groups, strict=True))
    about = _together(count, mean, m2)[1].expand_as(mean) if shared else mean
    sums = [run.backward_reduce(dy, x, about, g, count.shape[0]) for dy, x, g in pieces]
    sum_dy, sum_dy_xmu = sums[0]
    for more_dy, more_dy_xmu in sums[1:]:
        sum_dy, sum_dy_xmu = sum_dy + more_dy, sum_dy_xmu + more_dy_xmu

    if again or shared or not _alike(weight, bias_is_like) or any(g is not None for g in grad_moments):
        coefficients, grad_weight = _coefficients(statistics, (sum_dy, sum_dy_xmu), weight, eps, shared, grad_moments)
        a, b, c = (t.expand_as(mean).to(ops.compute_dtype(xs[0])) for t in coefficients)
        grad_bias = sum_dy
    else:
        a, b, c, grad_weight, grad_bias = ops.bare.backward_fold(
            count, mean, m2, sum_dy, sum_dy_xmu, weight, eps, xs[0].dtype == torch.float64
        )
    grad_xs = [
        run.backward_apply(dy, x, a, b, c, g) if need else None for (dy, x, g), need in zip(pieces, needed, strict=True)
    ]
    return grad_xs, grad_weight, grad_bias


def _laid_out_as(x: Tensor, dy: Tensor | None) -> Tensor:
    """The gradient, 0 where there is none, in the memory layout of ``x``: two operators would otherwise copy it."""
    if dy is None:
        return torch.zeros_like(x)
    return dy if dy.stride() == x.stride() or torch.is_grad_enabled() else torch.empty_like(x).copy_(dy)


def _coefficients(
    statistics: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    weight: Tensor | None,
    eps: float,
    shared: bool,
    grad_moments: tuple[Tensor | None, Tensor | None],
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """What ``ops.backward_fold`` works out, differentiable, in all cases; the gradient of weight for each group.

    Gradients of the returned mean and m2 add 1/n and 2 (x - mean) times themselves. Being made of differentiable
    operators and of the returned statistics, this can be differentiated again.
    """
    count, mean, m2 = statistics
    sum_dy, sum_dy_xmu = sums
    grad_mean, grad_m2 = grad_moments
    n, center, spread = _together(count, mean, m2) if shared else statistics
    n = n.clamp(min=1.0).unsqueeze(-1)
    inverse_std = (spread / n + eps).rsqrt()
    grad_weight = sum_dy_xmu * inverse_std
    total_w, total_b = (grad_weight, sum_dy) if weight is None else (weight * grad_weight, weight * sum_dy)
    if shared:
        total_w, total_b = total_w.sum(0, keepdim=True), total_b.sum(0, keepdim=True)
    a = inverse_std if weight is None else inverse_std * weight
    b = -inverse_std * inverse_std * total_w / n
    c = -inverse_std * total_b / n - b * center
    if grad_m2 is not None:
        b, c = b + 2.0 * grad_m2, c - 2.0 * grad_m2 * mean
    if grad_mean is not None:
        c = c + grad_mean / count.clamp(min=1.0).unsqueeze(-1)
    return (a, b, c), grad_weight


def _plain_batch_norm(
    xs: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: list[Tensor],
    num_groups: int,
    shared: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The same in terms that every transformation knows: groups as matrices ``(N, G)`` of ones and zeros."""
    values = [x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(-1) for x in xs]
    ids = torch.arange(num_groups, device=xs[0].device)
    members = [(g.unsqueeze(-1) == ids).double() for g in groups] or [v.new_ones(len(v), 1) for v in values]
    pieces = list(zip(values, members, strict=True))

    count = torch.stack([m.sum(0) * v.shape[2] for v, m in pieces]).sum(0)
    total = torch.stack([m.T @ v.sum(2) for v, m in pieces]).sum(0)
    mean = total / count.clamp(min=1.0).unsqueeze(-1)
    m2 = torch.stack([m.T @ (v - (m @ mean).unsqueeze(-1)).square().sum(2) for v, m in pieces]).sum(0)

    n, center, spread = _together(count, mean, m2) if shared else (count, mean, m2)
    scale = (spread / n.clamp(min=1.0).unsqueeze(-1) + eps).rsqrt()
    scale = (scale if weight is None else scale * weight.double()).expand_as(mean)
    center = center.expand_as(mean)
    offset = (torch.zeros_like(mean) if bias is None else bias.double()).expand_as(mean)
    ys = [
        ((v - (m @ center).unsqueeze(-1)) * (m @ scale).unsqueeze(-1) + (m @ offset).unsqueeze(-1))
        .to(x.dtype)
        .reshape(x.shape)
        for x, (v, m) in zip(xs, pieces, strict=True)
    ]
    return ys, count, mean, m2


class _OneBatchNorm(torch.autograd.Function):
    """The eager way of a single tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Tensor | None,
        num_groups: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = ops.bare.normalize_batch(
            x, weight, bias, eps, group, num_groups
        )
        ctx.eps, ctx.bias_is_like = eps, None if bias is None else (bias.dim(), bias.dtype)
        ctx.save_for_backward(x, group, weight, *outputs[1:])
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, group, weight, count, mean, m2 = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if (
            dy is None
            or not need_x
            or grad_mean is not None
            or grad_m2 is not None
            or torch.is_grad_enabled()
            or not _alike(weight, ctx.bias_is_like)
        ):
            grad_mean, grad_m2 = (None if g is None else torch.atleast_2d(g) for g in (grad_mean, grad_m2))
            (dx,), grad_weight, grad_bias = _gradients(
                (x,),
                (group,),
                (torch.atleast_1d(count), torch.atleast_2d(mean), torch.atleast_2d(m2)),
                weight,
                ctx.bias_is_like,
                ctx.eps,
                False,
                (dy,),
                (grad_mean, grad_m2),
                (need_x,),
            )
        else:
            dx, grad_weight, grad_bias = ops.bare.backward_batch(dy, x, count, mean, m2, weight, ctx.eps, group)
        return (
            dx,
            _like(grad_weight, weight.dim(), weight.dtype) if need_weight else None,
            _like(grad_bias, *ctx.bias_is_like) if need_bias else None,
            None,
            None,
            None,
        )


class _BatchNorm(torch.autograd.Function):
    """The eager way of any. The one through torch.library, for graphs, costs half a millisecond to take lists apart."""

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        num_groups: int,
        shared: bool,
        num_tensors: int,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        xs, groups = list(tensors[:num_tensors]), list(tensors[num_tensors:])
        ys, count, mean, m2 = _forward(xs, weight, bias, eps, groups, num_groups, shared)
        _save(ctx, xs, groups, weight, bias, eps, shared, (count, mean, m2))
        ctx.set_materialize_grads(False)
        return (*ys, count, mean, m2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *grad_ys, _, grad_mean, grad_m2 = grads
        needed = ctx.needs_input_grad[6 : 6 + len(grad_ys)]
        grad_xs, grad_weight, grad_bias = _backward_of(ctx, grad_ys, (grad_mean, grad_m2), needed)
        no_groups = (None,) * (len(ctx.needs_input_grad) - 6 - len(grad_ys))
        return None, None, None, None, grad_weight, grad_bias, *grad_xs, *no_groups


def _save(
    ctx: Any,
    xs: Sequence[Tensor],
    groups: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shared: bool,
    statistics: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Keep what backward needs: the inputs, and tensors of the size of the statistics."""
    ctx.mark_non_differentiable(statistics[0])
    ctx.eps, ctx.shared, ctx.num_tensors = eps, shared, len(xs)
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
        xs, groups, tuple(statistics), weight, ctx.bias_is_like, ctx.eps, ctx.shared, grad_ys, grad_moments, needed
    )
    return (
        grad_xs,
        None if weight is None else _like(grad_weight, weight.dim(), weight.dtype),
        None if ctx.bias_is_like is None else _like(grad_bias, *ctx.bias_is_like),
    )


def _library_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    xs, weight, bias, eps, groups, _, shared = inputs
    _save(ctx, xs, groups, weight, bias, eps, shared, output[1:])


def _library_backward(
    ctx: Any, grad_ys: list[Tensor | None], _: Tensor | None, grad_mean: Tensor, grad_m2: Tensor
) -> tuple[Any, ...]:
    needed = (True,) * ctx.num_tensors
    grad_xs, grad_weight, grad_bias = _backward_of(ctx, grad_ys, (grad_mean, grad_m2), needed)
    num_groups = len(ctx.saved_tensors) - 4 - ctx.num_tensors
    return grad_xs, grad_weight, grad_bias, None, [None] * num_groups, None, None


def _alike(weight: Tensor | None, bias_is_like: Like | None) -> bool:
    """Whether the operators' gradient of bias, which is in the form of that of weight, can be bias's."""
    return weight is None or bias_is_like is None or bias_is_like == (weight.dim(), weight.dtype)


def _like(gradient: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a parameter from gradients per group: a parameter that all groups share gets their sum."""
    if gradient.dim() != dim:
        gradient = gradient.unsqueeze(0) if gradient.dim() < dim else gradient.sum(0)
    return _cast(gradient, dtype)


def frozen_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group: Tensor | None = None,
) -> Tensor:
    """Normalize by a given mean and variance: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    ``torch.nn.functional.batch_norm(..., training=False)``, in one pass over memory forward and, where only ``x`` needs
    a gradient, one backward that does not need ``x``. In torch.compile it is plain arithmetic, so that compilers fuse
    it with what stands beside it; under torch.func and in forward-mode derivatives too. Where torch.export, torch.onnx
    or torch.jit make a graph that is to run elsewhere, it is torch's own operator.
    Differentiable, twice, in x, weight and bias.

    Args:
        x: ``(N, C, *)``.
        mean: ``(C,)``, or ``(G, C)`` for an own one per group; a constant, as are the variance and eps.
        var: likewise.
        weight: ``(C,)`` or ``(G, C)``; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance.
        group: int64 ``(N,)``, the group of each sample; needed where any of the others has groups.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``. The arithmetic is that of float32, or of float64 for
        float64 ``x``.

    Raises:
        InputError: unsupported shapes, dtypes or groups.

    Example:
        >>> frozen_batch_norm(torch.tensor([[5.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
        tensor([[2.]])
    """
    if not is_tracing():
        _check_frozen(x, mean, var, weight, bias, group)
    return frozen_batch_norm_unchecked(x, mean, var, weight, bias, eps, group)


def frozen_batch_norm_unchecked(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> Tensor:
    """:func:`frozen_batch_norm` of arguments that are known to be right."""
    if torch.compiler.is_compiling() or is_tracing() or _is_transformed():
        if group is None and portable.is_portable():
            return portable.frozen_batch_norm(x, mean, var, weight, bias, eps)
        return _plain(x, mean, var, weight, bias, eps, group)
    if _needs_gradient(x, weight, bias):
        y: Tensor = _FrozenBatchNorm.apply(x, mean, var, weight, bias, eps, group)  # type: ignore[no-untyped-call]
        return y
    scale, shift = ops.bare.fold(None, mean, var, weight, bias, eps, x.dtype == torch.float64)
    normalized: Tensor = ops.bare.normalize(x, scale, shift, group if shift.shape[0] > 1 else None)
    return normalized


def _check_frozen(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, group: Tensor | None
) -> None:
    rows = 1
    for name, value in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        if value is None:
            continue
        shape = value.shape
        if len(shape) not in (1, 2) or x.dim() < 2 or shape[-1] != x.shape[1]:
            raise InputError(
                f"frozen_batch_norm: {name} is {tuple(shape)}, must be (C,) or (G, C) for x (N, C, *), which is "
                f"{tuple(x.shape)}"
            )
        if value.device != x.device:
            raise InputError(f"frozen_batch_norm: {name} is on {value.device}, but x on {x.device}")
        if len(shape) == 2:
            if group is None or rows not in (1, shape[0]):
                but = "but group is not given" if group is None else f"others have {rows}"
                raise InputError(f"frozen_batch_norm: {name} {tuple(shape)} has {shape[0]} groups, {but}")
            rows = shape[0]
    ops.check_input("frozen_batch_norm", x, group if rows > 1 else None, rows)


def _scale_and_shift(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The two coefficients, in the dtype of the arithmetic, each ``(C,)`` or ``(G, C)``."""
    dtype = ops.compute_dtype(x)
    mean, var = _cast(mean, dtype), _cast(var, dtype)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * _cast(weight, dtype)
    return scale, -mean * scale if bias is None else torch.addcmul(_cast(bias, dtype), mean, scale, value=-1)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which an exported graph keeps even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know torch's own operators alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _plain(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Tensor | None
) -> Tensor:
    """The same in terms that every compiler and transformation knows."""

    def per_sample(t: Tensor) -> Tensor:
        rows = t[group] if group is not None and t.dim() == 2 else t
        return rows.reshape(-1, x.shape[1], *(1 for _ in x.shape[2:]))

    scale, shift = _scale_and_shift(x, mean, var, weight, bias, eps)
    y = _cast(x, scale.dtype)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        # Of scale * x + shift, the gradient of weight would be the difference of two sums that cancel.
        y = (y - per_sample(_cast(mean, scale.dtype))) * per_sample(scale)
        y = y if bias is None else y + per_sample(_cast(bias, scale.dtype))
    else:
        y = y * per_sample(scale) + per_sample(shift)
    return _cast(y, x.dtype)


class _FrozenBatchNorm(torch.autograd.Function):
    """The eager way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Tensor | None,
    ) -> Tensor:
        scale, shift = ops.bare.fold(None, mean, var, weight, bias, eps, x.dtype == torch.float64)
        num_groups = shift.shape[0]
        group = group if num_groups > 1 else None
        y: Tensor = ops.bare.normalize(x, scale, shift, group)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            ctx.eps, ctx.num_groups = eps, num_groups
            ctx.bias_is_like = None if bias is None else (bias.dim(), bias.dtype)
            ctx.save_for_backward(group, None, x, mean, var, weight)
        else:
            ctx.save_for_backward(group, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        group, scale, *rest = ctx.saved_tensors
        if not rest:
            run = ops.unchecked if torch.is_grad_enabled() else ops.bare
            return run.normalize(dy, scale, None, group), None, None, None, None, None, None
        dx, grad_weight, grad_bias = _frozen_gradients(ctx, dy, group, *rest)
        return dx, None, None, grad_weight, grad_bias, None, None


def _frozen_gradients(
    ctx: Any, dy: Tensor, group: Tensor | None, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, where they are needed."""
    need_x, _, _, need_weight, need_bias = ctx.needs_input_grad[:5]
    mean = mean.double()
    if ctx.num_groups > 1:
        mean, var = mean.expand(ctx.num_groups, -1), var.expand(ctx.num_groups, -1)
    if need_x and not torch.is_grad_enabled() and _alike(weight, ctx.bias_is_like):
        dx, grad_weight, grad_bias = ops.bare.backward_batch(dy, x, None, mean, var, weight, ctx.eps, group)
    else:
        about = torch.atleast_2d(mean)
        sum_dy, sum_dy_xmu = ops.unchecked.backward_reduce(dy, x, about, group, ctx.num_groups)
        inverse_std = (torch.atleast_2d(var).double() + ctx.eps).rsqrt()
        scale = (inverse_std if weight is None else inverse_std * weight).to(ops.compute_dtype(dy))
        dx = ops.unchecked.normalize(dy, scale, None, group) if need_x else None
        grad_weight, grad_bias = sum_dy_xmu * inverse_std, sum_dy
    return (
        dx,
        _like(grad_weight, weight.dim(), weight.dtype) if weight is not None and need_weight else None,
        _like(grad_bias, *ctx.bias_is_like) if need_bias else None,
    )


_library = torch.library.Library("precisebn", "FRAGMENT")
_library.define(
    "batch_norm(Tensor[] xs, Tensor? weight, Tensor? bias, float eps, Tensor[] group, int num_groups, "
    "bool shared_statistics) "
    "-> (Tensor[] ys, Tensor count, Tensor mean, Tensor m2)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("batch_norm", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("precisebn::batch_norm", _fake)
torch.library.register_autograd("precisebn::batch_norm", _library_backward, setup_context=_library_setup_context)
