"""Batch normalization by statistics that are given: at test time, or of frozen layers, with its gradient.

Forward reads the input and writes the output once, and the input is kept only for the gradient of ``weight``. The mean
is subtracted before anything is scaled, so that the output keeps float32's digits where the mean is large against the
standard deviation.
"""

from typing import Any

import torch
from torch import Tensor

from precisebn._reports import counted
from precisebn._torch import is_tracing, is_transformed
from precisebn.errors import InputError
from precisebn.functional import portable
from precisebn.functional.parameters import form_of, in_form, needs_gradient, shares_form
from precisebn.ops.checks import cast, check_input, compute_dtype
from precisebn.ops.operator import differentiable, raw

__all__ = ["frozen_batch_norm", "frozen_batch_norm_unchecked"]


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
        InputError: unsupported shapes, dtypes, devices or groups.

    Example:
        >>> frozen_batch_norm(torch.tensor([[5.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
        tensor([[2.]])
    """
    if not is_tracing():  # whose graph would be of these very sizes; torch's own operators check
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
    if torch.compiler.is_compiling() or is_tracing() or is_transformed():
        if group is None and portable.is_portable():
            return portable.frozen_batch_norm(x, mean, var, weight, bias, eps)
        return _plain(x, mean, var, weight, bias, eps, group)
    if needs_gradient(x, weight, bias):
        constants = (mean, var, eps, group)  # together: torch looks at each argument of a function in Python
        y: Tensor = _FrozenBatchNorm.apply(x, weight, bias, constants)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, mean, var, weight, bias, eps, group)[0]


def _check_frozen(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, group: Tensor | None
) -> None:
    rows, sizes, device = 1, x.shape, x.device
    for name, value in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        if value is None:
            continue
        shape = value.shape
        if len(shape) not in (1, 2) or len(sizes) < 2 or shape[-1] != sizes[1]:
            raise InputError(
                f"frozen_batch_norm: {name} is {tuple(shape)}, must be (C,) or (G, C) for x (N, C, *), which is "
                f"{tuple(sizes)}"
            )
        if value.device != device:
            raise InputError(f"frozen_batch_norm: {name} is on {value.device}, but x on {device}")
        if len(shape) == 2:
            if group is None or rows not in (1, shape[0]):
                but = "but group is not given" if group is None else f"others have {rows}"
                raise InputError(f"frozen_batch_norm: {name} {tuple(shape)} has {counted(shape[0], 'group')}, {but}")
            rows = shape[0]
    check_input("frozen_batch_norm", x, group if rows > 1 else None, rows)


def _forward(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output; and, for a backward, the scale ``(G, C)`` and the groups, None where there is one."""
    center, scale, shift = raw.coefficients(mean, var, weight, bias, eps, x.dtype == torch.float64)
    if group is not None and scale.shape[0] == 1:
        group = None
    return raw.normalize(x, center, scale, shift, group), scale, group


def _plain(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Tensor | None
) -> Tensor:
    """The same in terms that every compiler and transformation knows."""

    def per_sample(t: Tensor) -> Tensor:
        rows = t[group] if group is not None and t.dim() == 2 else t
        return rows.reshape(-1, x.shape[1], *(1 for _ in x.shape[2:]))

    # Coefficients not in float64: a compiler may work them out anew for every value of x.
    dtype = compute_dtype(x)
    center, scale = cast(mean, dtype), (cast(var, dtype) + eps).rsqrt()
    scale = scale if weight is None else scale * cast(weight, dtype)
    shift = None if bias is None else cast(bias, dtype)
    if mean.dtype == torch.float64 and dtype != torch.float64:
        lost = (cast(center, mean.dtype) - mean).to(dtype) * scale
        shift = lost if shift is None else shift + lost
    y = (cast(x, dtype) - per_sample(center)) * per_sample(scale)
    return cast(y if shift is None else y + per_sample(shift), x.dtype)


class _FrozenBatchNorm(torch.autograd.Function):
    """The eager way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: tuple[Tensor, Tensor, float, Tensor | None],
    ) -> Tensor:
        mean, var, eps, group = constants
        y, scale, group = _forward(x, mean, var, weight, bias, eps, group)
        _, need_weight, need_bias, _ = ctx.needs_input_grad
        if need_weight or need_bias:
            ctx.eps, ctx.num_groups, ctx.bias_form = eps, scale.shape[0], form_of(bias)
            ctx.save_for_backward(group, None, x, mean, var, weight)
        else:
            ctx.save_for_backward(group, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group, scale, *rest = ctx.saved_tensors
        if not rest:
            run = differentiable if torch.is_grad_enabled() else raw
            return run.normalize(dy, None, scale, None, group), None, None, None
        return *_gradients(ctx, dy, group, *rest), None


def _gradients(
    ctx: Any, dy: Tensor, group: Tensor | None, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, where they are needed."""
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    mean = mean.double()
    if ctx.num_groups > 1:
        mean, var = mean.expand(ctx.num_groups, -1), var.expand(ctx.num_groups, -1)
    if need_x and not torch.is_grad_enabled() and shares_form(weight, ctx.bias_form):
        dx, grad_weight, grad_bias = raw.backward_frozen(dy, x, mean, var, weight, ctx.eps, group)
    else:
        about = torch.atleast_2d(mean)
        sum_dy, sum_dy_xmu = differentiable.backward_reduce(dy, x, about, group, ctx.num_groups)
        inverse_std = (torch.atleast_2d(var).double() + ctx.eps).rsqrt()
        scale = (inverse_std if weight is None else inverse_std * weight).to(compute_dtype(dy))
        dx = differentiable.normalize(dy, None, scale, None, group) if need_x else None
        grad_weight, grad_bias = sum_dy_xmu * inverse_std, sum_dy
    return (
        dx,
        in_form(grad_weight, form_of(weight)) if need_weight else None,
        in_form(grad_bias, ctx.bias_form) if need_bias else None,
    )
