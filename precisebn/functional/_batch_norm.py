"""Batch normalization of a tensor, or of several that share statistics, over groups, with its gradient.

Ioffe & Szegedy 2015, arXiv 1502.03167; the gradient is that of algorithm 1. Several tensors are not concatenated: their
Moments merge. Forward reads each input twice and writes the output; backward reads input and gradient twice and writes
one gradient; besides the inputs only tensors of size (groups, channels) are kept for it.

The mean is subtracted before anything is scaled, forward and backward, so that both keep float32's digits where the
mean is large against the standard deviation.

The same function takes six ways, of which :func:`batch_norm` chooses: in a graph that is to run elsewhere, torch's own
operators alone; in another graph, one operator; under torch.func and in forward mode, plain arithmetic; of a single
tensor, whose groups each have their own statistics, one operator forward and one backward; of anything else the
operators one by one, with autograd or without.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from precisebn._torch import is_tracing, is_transformed
from precisebn.errors import InputError
from precisebn.functional import portable
from precisebn.functional.parameters import Form, form_of, in_form, needs_gradient, shares_form
from precisebn.ops.chan import merge
from precisebn.ops.checks import check_input, compute_dtype
from precisebn.ops.operator import Derivative, Operator, differentiable, raw
from precisebn.ops.registry import register
from precisebn.statistics.moments import Moments

__all__ = [
    "Gradients",
    "Kept",
    "Running",
    "batch_norm",
    "batch_norm_and_track",
    "gradient_coefficients",
    "tracks_in_one_call",
    "laid_out_as",
]


class Running(NamedTuple):
    """Running statistics that a mini-batch moves, as the operator ``track`` takes them."""

    mean: Tensor
    var: Tensor
    num_batches: Tensor
    momentum: float | None


class Call(NamedTuple):
    """The arguments of the operator ``batch_norm``, checked, in the order of its schema."""

    xs: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    groups: list[Tensor]
    """One vector a tensor; or empty."""
    num_groups: int
    shared: bool

    @property
    def group_of(self) -> list[Tensor | None]:
        """The groups of each tensor's samples, or None."""
        return [*self.groups] or [None] * len(self.xs)

    @property
    def double(self) -> bool:
        """Whether coefficients are float64."""
        return self.xs[0].dtype == torch.float64


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
    call = Call(tensors, weight, bias, eps, groups, num_groups, shared_statistics)
    tracing = is_tracing()
    if not tracing:  # its graph would be of these very sizes; torch's own operators check
        _check(call)
    if tracing or torch.compiler.is_compiling():  # torch.export compiles, too
        run_graph = portable.batch_norm if portable.is_portable() else torch.ops.precisebn.batch_norm
        ys, *statistics = run_graph(*call)
    elif is_transformed():
        ys, *statistics = _plain(call)
    elif len(tensors) == 1 and (num_groups == 1 or (groups and not shared_statistics)):
        group_of = groups[0] if groups else None
        y, *statistics = _one_tensor(tensors[0], weight, bias, eps, group_of, num_groups, None)
        return (y if isinstance(xs, Tensor) else [y]), Moments(*statistics)
    elif needs_gradient(weight, bias, *tensors):
        *ys, count, mean, m2 = _Tensors.apply(call, weight, bias, *tensors)  # type: ignore[no-untyped-call]
        statistics = [count, mean, m2]
    else:
        ys, *statistics = _forward(*call)
    moments = Moments(*(statistics if groups else (t[0] for t in statistics)))
    return (ys[0] if isinstance(xs, Tensor) else ys), moments


def tracks_in_one_call() -> bool:
    """Whether ``batch_norm_and_track`` may be called here: eagerly, and outside of torch.func."""
    return not (torch.compiler.is_compiling() or is_tracing() or is_transformed())


def batch_norm_and_track(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, running: Running
) -> Tensor:
    """``batch_norm`` of one tensor in one group, whose statistics move the running statistics in the same call.

    Args:
        x: ``(N, C, *)``.
        weight: ``(C,)``; None is 1.
        bias: ``(C,)``; None is 0.
        eps: added to the variance.
        running: ``(C,)`` and an int64 ``()``, updated in place.

    Returns:
        The normalized tensor, differentiable as that of ``batch_norm``.

    Raises:
        InputError: what ``batch_norm`` refuses.
    """
    _check(Call([x], weight, bias, eps, [], 1, False))
    y, *_ = _one_tensor(x, weight, bias, eps, None, 1, running)
    torch.autograd.graph.increment_version(running[:3])  # see precisebn.ops.track
    return y


def _check(call: Call) -> None:
    tensors, num_groups = call.xs, call.num_groups
    if not tensors:
        raise InputError("batch_norm: xs is an empty list; pass at least one tensor")
    first, values = tensors[0], 0
    for i, x in enumerate(tensors):
        check_input(f"batch_norm: xs[{i}]", x, call.groups[i] if call.groups else None, num_groups)
        if i and (x.shape[1], x.dtype, x.device) != (first.shape[1], first.dtype, first.device):
            raise InputError(
                f"batch_norm: tensors normalized together must agree in channels, dtype and device, but xs[{i}] is "
                f"{tuple(x.shape)} {x.dtype} on {x.device} and xs[0] {tuple(first.shape)} {first.dtype} on "
                f"{first.device}"
            )
        values += x.numel()
    channels, device = first.shape[1], first.device
    if channels and values == channels:
        raise InputError(
            f"batch_norm: one value per channel has no variance to normalize by; xs is {tuple(first.shape)}"
        )
    for name, parameter in (("weight", call.weight), ("bias", call.bias)):
        if parameter is None:
            continue
        # Number by number: of a tuple of sizes that a graph leaves open Dynamo finds that it is in no other.
        shape = parameter.shape
        if len(shape) not in (1, 2) or shape[-1] != channels or (len(shape) == 2 and shape[0] != num_groups):
            raise InputError(
                f"batch_norm: {name} must be ({channels},) or ({num_groups}, {channels}), is {tuple(shape)}"
            )
        if parameter.device != device:
            raise InputError(f"batch_norm: {name} is on {parameter.device}, but xs on {device}")


def _groups_of(tensors: list[Tensor], group: Tensor | Sequence[Tensor], single: bool) -> list[Tensor]:
    """The group vectors, one a tensor."""
    groups = [group] if isinstance(group, Tensor) else list(group)
    if len(groups) != len(tensors) or isinstance(group, Tensor) != single:
        raise InputError(
            f"batch_norm: group must be None, or one int64 vector for each of the {len(tensors)} tensors of xs"
        )
    return groups


def _forward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Outputs, and count, mean and m2 of every group, from the fields of a Call."""
    call = Call(*arguments)
    moments = _moments(call)
    used = _together(moments) if call.shared else moments
    coefficients = raw.coefficients(used.mean, _variance(used, call.xs), call.weight, call.bias, call.eps, call.double)
    of_all = len(coefficients[0]) == 1
    ys = [
        raw.normalize(x, *coefficients, None if of_all else group)
        for x, group in zip(call.xs, call.group_of, strict=True)
    ]
    return ys, moments.count, moments.mean, moments.m2


def _moments(call: Call) -> Moments:
    """Of each group, over all tensors."""
    (x, group), *others = zip(call.xs, call.group_of, strict=True)
    count, mean, m2 = raw.moments(x, group, call.num_groups)
    for x, group in others:
        if call.num_groups == 1:
            raw.accumulate(x, count, mean[0], m2[0])
        else:
            more, more_mean, more_m2 = raw.moments(x, group, call.num_groups)
            mean, m2 = merge(count.unsqueeze(-1), mean, m2, more.unsqueeze(-1), more_mean, more_m2)
            count = count + more
    return Moments(count, mean, m2)


def _together(moments: Moments) -> Moments:
    """The Moments of all groups together, as those of one group."""
    if len(moments.count) == 1:
        return moments
    total = moments.sum()
    return Moments(total.count.unsqueeze(0), total.mean.unsqueeze(0), total.m2.unsqueeze(0))


def _variance(moments: Moments, xs: Sequence[Tensor] = ()) -> Tensor:
    """The biased variance; 0 of a group without values.

    Args:
        moments: ``(G, C)``.
        xs: what they are of. How many values one group has, these tell without asking the Moments, which takes longer.
    """
    if xs and len(moments.count) == 1:
        channels = max(moments.mean.shape[1], 1)
        return moments.m2 / max(sum(x.numel() for x in xs) // channels, 1)
    n = moments.count.clamp(min=1.0)
    return moments.m2 / (n if len(n) == 1 else n.unsqueeze(-1))


def _fake(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    call = Call(*arguments)
    mean = call.xs[0].new_empty(call.num_groups, call.xs[0].shape[1], dtype=torch.float64)
    return [torch.empty_like(x) for x in call.xs], mean.new_empty(call.num_groups), mean, torch.empty_like(mean)


def _plain(call: Call) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The same in terms that every transformation knows: groups as matrices ``(N, G)`` of ones and zeros."""
    values = [x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(-1) for x in call.xs]
    ids = torch.arange(call.num_groups, device=call.xs[0].device)
    members = [(g.unsqueeze(-1) == ids).double() for g in call.groups] or [v.new_ones(len(v), 1) for v in values]
    pieces = list(zip(values, members, strict=True))

    count = torch.stack([m.sum(0) * v.shape[2] for v, m in pieces]).sum(0)
    total = torch.stack([m.T @ v.sum(2) for v, m in pieces]).sum(0)
    mean = total / count.clamp(min=1.0).unsqueeze(-1)
    m2 = torch.stack([m.T @ (v - (m @ mean).unsqueeze(-1)).square().sum(2) for v, m in pieces]).sum(0)

    moments = Moments(count, mean, m2)
    used = _together(moments) if call.shared else moments
    scale = (_variance(used) + call.eps).rsqrt()
    scale = (scale if call.weight is None else scale * call.weight.double()).expand_as(mean)
    center = used.mean.expand_as(mean)
    offset = (torch.zeros_like(mean) if call.bias is None else call.bias.double()).expand_as(mean)
    ys = [
        ((v - (m @ center).unsqueeze(-1)) * (m @ scale).unsqueeze(-1) + (m @ offset).unsqueeze(-1))
        .to(x.dtype)
        .reshape(x.shape)
        for x, (v, m) in zip(call.xs, pieces, strict=True)
    ]
    return ys, count, mean, m2


class Kept(NamedTuple):
    """What a backward works from: of the call, all but the bias, and the Moments ``(G, C)`` that it returned."""

    xs: tuple[Tensor, ...]
    groups: tuple[Tensor | None, ...]
    weight: Tensor | None
    bias_form: Form | None
    eps: float
    shared: bool
    moments: Moments


class Gradients(NamedTuple):
    """Of the outputs of a call; None is 0."""

    ys: Sequence[Tensor | None]
    mean: Tensor | None
    m2: Tensor | None


def _gradients(kept: Kept, grads: Gradients, needed: Sequence[bool]) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Gradients by the chain rule through the batch's own mean and variance, in terms of the operators.

    With x^ = (x - mean) / std: ``dx = (w * dy - avg(w * dy) - x^ * avg(w * dy * x^)) / std``, averages being taken over
    what was normalized together, which is ``a*dy + b*(x - center) + c``. Where no one differentiates this again, and
    there is nothing special about the statistics, one operator works out a, b and c.

    Returns:
        The gradients of those inputs that are ``needed``; and of weight and bias, for each group, ``(G, C)``, or summed
        over the groups already.
    """
    again = torch.is_grad_enabled()
    run = differentiable if again else raw
    moments, num_groups = kept.moments, len(kept.moments.count)
    used = _together(moments) if kept.shared else moments
    dys = [laid_out_as(x, dy) for x, dy in zip(kept.xs, grads.ys, strict=True)]
    pieces = list(zip(dys, kept.xs, kept.groups, strict=True))
    about = moments.mean if used is moments else used.mean.expand_as(moments.mean)
    sums = [run.backward_reduce(dy, x, about, group, num_groups) for dy, x, group in pieces]
    sum_dy, sum_dy_xmu = sums[0]
    for more_dy, more_dy_xmu in sums[1:]:
        sum_dy, sum_dy_xmu = sum_dy + more_dy, sum_dy_xmu + more_dy_xmu

    special = grads.mean is not None or grads.m2 is not None or used is not moments
    if again or special or not shares_form(kept.weight, kept.bias_form):
        coefficients, grad_weight = gradient_coefficients(kept, used, sum_dy, sum_dy_xmu, grads)
        grad_bias = sum_dy
    else:
        *coefficients, grad_weight, grad_bias = raw.backward_coefficients(
            moments.count,
            moments.mean,
            _variance(moments, kept.xs),
            sum_dy,
            sum_dy_xmu,
            kept.weight,
            kept.eps,
            kept.xs[0].dtype == torch.float64,
        )
    grad_xs = [
        run.backward_apply(dy, x, *coefficients, group) if need else None
        for (dy, x, group), need in zip(pieces, needed, strict=True)
    ]
    return grad_xs, grad_weight, grad_bias


def laid_out_as(x: Tensor, dy: Tensor | None) -> Tensor:
    """The gradient, 0 where there is none, in the memory layout of ``x``: two operators would otherwise copy it."""
    if dy is None:
        return torch.zeros_like(x)
    return dy if dy.stride() == x.stride() or torch.is_grad_enabled() else torch.empty_like(x).copy_(dy)


def gradient_coefficients(
    kept: Kept, used: Moments, sum_dy: Tensor, sum_dy_xmu: Tensor, grads: Gradients
) -> tuple[list[Tensor], Tensor]:
    """What ``backward_coefficients`` works out, differentiable, in all cases; the gradient of weight for each group.

    Gradients of the returned mean and m2 add 1/n and 2 (x - mean) times themselves. Being made of differentiable
    operators and of the returned statistics, this can be differentiated again.

    Args:
        kept: by the forward.
        used: the Moments that normalized: those of all groups together, where these share them.
        sum_dy: of every group, about the mean that was used, as is the next.
        sum_dy_xmu: likewise.
        grads: of the outputs.
    """
    count, mean = kept.moments.count, kept.moments.mean
    dtype = compute_dtype(kept.xs[0])
    center = used.mean.detach().to(dtype)  # a constant: what it is not of the mean is in c
    n = used.count.clamp(min=1.0).unsqueeze(-1)
    inverse_std = (_variance(used) + kept.eps).rsqrt()
    grad_weight = sum_dy_xmu * inverse_std
    total_w, total_b = (g if kept.weight is None else kept.weight * g for g in (grad_weight, sum_dy))
    if used is not kept.moments:
        total_w, total_b = total_w.sum(0, keepdim=True), total_b.sum(0, keepdim=True)
    a = inverse_std if kept.weight is None else inverse_std * kept.weight
    b = -inverse_std * inverse_std * total_w / n
    c = -inverse_std * total_b / n + b * (center - used.mean)
    if grads.m2 is not None:
        b, c = b + 2.0 * grads.m2, c + 2.0 * grads.m2 * (center - mean)
    if grads.mean is not None:
        c = c + grads.mean / count.clamp(min=1.0).unsqueeze(-1)
    return [t.expand_as(mean).to(dtype) for t in (center, a, b, c)], grad_weight


def _one_tensor(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None,
    num_groups: int,
    running: Running | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The eager way of a single tensor, every group by its own statistics.

    Takes what ``normalize_batch`` takes, and the running statistics to move, or None; gives what it gives.
    """
    others = (eps, group, num_groups, running)  # together: torch looks at each argument of a function in Python
    run: Any = _OneTensor.apply if needs_gradient(x, weight, bias) else _without_gradient
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = run(x, weight, bias, others)
    return outputs


def _without_gradient(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, others: tuple[float, Tensor | None, int, Running | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    eps, group, num_groups, running = others
    outputs: tuple[Tensor, Tensor, Tensor, Tensor]
    if running is None:
        outputs = raw.normalize_batch(x, weight, bias, eps, group, num_groups)
    else:
        outputs = raw.normalize_and_track(x, weight, bias, eps, *running, group, num_groups)
    return outputs


class _OneTensor(torch.autograd.Function):
    """The same with a gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = _without_gradient(*arguments)
        x, weight, bias, (ctx.eps, group, *_) = arguments
        ctx.bias_form = form_of(bias)
        ctx.save_for_backward(x, group, weight, *outputs[1:])
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, group, weight, count, mean, m2 = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if (
            dy is None
            or not need_x
            or grad_mean is not None
            or grad_m2 is not None
            or torch.is_grad_enabled()
            or not shares_form(weight, ctx.bias_form)
        ):
            grad_mean, grad_m2 = (None if g is None else torch.atleast_2d(g) for g in (grad_mean, grad_m2))
            moments = Moments(torch.atleast_1d(count), torch.atleast_2d(mean), torch.atleast_2d(m2))
            (dx,), grad_weight, grad_bias = _gradients(
                Kept((x,), (group,), weight, ctx.bias_form, ctx.eps, False, moments),
                Gradients((dy,), grad_mean, grad_m2),
                (need_x,),
            )
        else:
            dx, grad_weight, grad_bias = raw.backward_batch(dy, x, count, mean, m2, weight, ctx.eps, group)
        return (
            dx,
            in_form(grad_weight, form_of(weight)) if need_weight else None,
            in_form(grad_bias, ctx.bias_form) if need_bias else None,
            None,
        )


class _Tensors(torch.autograd.Function):
    """The eager way of any. The one through torch.library, for graphs, costs half a millisecond to take lists apart."""

    @staticmethod
    def forward(ctx: Any, call: Call, *_: Tensor | None) -> tuple[Tensor, ...]:
        # Weight, bias and tensors stand beside the call so that autograd sees them.
        ys, *statistics = _forward(*call)
        _save(ctx, call, statistics)
        ctx.set_materialize_grads(False)
        return (*ys, *statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *grad_ys, _, grad_mean, grad_m2 = grads
        grad_xs, *affine = _backward_of(ctx, Gradients(grad_ys, grad_mean, grad_m2), ctx.needs_input_grad[3:])
        return None, *affine, *grad_xs


def _save(ctx: Any, call: Call, statistics: Sequence[Tensor]) -> None:
    """Keep what backward needs: the inputs, and tensors of the size of the statistics."""
    ctx.mark_non_differentiable(statistics[0])
    ctx.eps, ctx.shared, ctx.num_tensors = call.eps, call.shared, len(call.xs)
    ctx.bias_form = form_of(call.bias)
    ctx.save_for_backward(*call.xs, *call.groups, call.weight, *statistics)


def _backward_of(
    ctx: Any, grads: Gradients, needed: Sequence[bool]
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """The gradients of inputs, weight and bias from what :func:`_save` kept."""
    saved = ctx.saved_tensors
    xs, groups = saved[: ctx.num_tensors], saved[ctx.num_tensors : -4] or (None,) * ctx.num_tensors
    weight, *statistics = saved[-4:]
    kept = Kept(xs, groups, weight, ctx.bias_form, ctx.eps, ctx.shared, Moments(*statistics))
    grad_xs, grad_weight, grad_bias = _gradients(kept, grads, needed)
    return (
        grad_xs,
        in_form(grad_weight, form_of(weight)),
        in_form(grad_bias, ctx.bias_form),
    )


def _library_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, Call(*inputs), output[1:])


def _library_backward(
    ctx: Any, grad_ys: list[Tensor | None], _: Tensor | None, grad_mean: Tensor, grad_m2: Tensor
) -> tuple[Any, ...]:
    grad_xs, *affine = _backward_of(ctx, Gradients(grad_ys, grad_mean, grad_m2), (True,) * ctx.num_tensors)
    num_group_vectors = len(ctx.saved_tensors) - 4 - ctx.num_tensors
    return grad_xs, *affine, None, [None] * num_group_vectors, None, None


register(
    Operator(
        "batch_norm(Tensor[] xs, Tensor? weight, Tensor? bias, float eps, Tensor[] group, int num_groups, "
        "bool shared_statistics) -> (Tensor[] ys, Tensor count, Tensor mean, Tensor m2)",
        fallback=_forward,
        fake=_fake,
        derivative=Derivative(_library_setup_context, _library_backward),
    )
)
