"""normalize: ``(x - center) * scale + shift`` per (group, channel)."""

from typing import Any

import torch
from torch import Tensor

from precisebn.ops.checks import cast, check_coefficients, check_group, check_x, compute_dtype
from precisebn.ops.grouping import per_sample
from precisebn.ops.operator import Derivative, Operator, differentiable

__all__ = ["OPERATOR", "centered", "fallback", "normalize", "products"]


def normalize(
    x: Tensor, center: Tensor | None, scale: Tensor, shift: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """``(x - center) * scale + shift`` per (group, channel): batch normalization once its statistics are known.

    Computed in float64 for float64 ``x`` and in float32 otherwise. Differentiable twice in ``x`` and all coefficients.

    Args:
        x: ``(N, C, *)``, float32, float64, float16 or bfloat16, any strides.
        center: ``(G, C)`` of any floating dtype, converted to the dtype of the computation, as are the next two; None
            is 0. A mean that the conversion rounds needs a ``shift`` that makes up for it, ``(center - mean) * scale``.
        scale: ``(G, C)``.
        shift: ``(G, C)``; None is 0.
        group: int64 ``(N,)``, as in :func:`moments`; ``G`` must be 1 without it.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> one = torch.ones(1, 2)
    >>> normalize(torch.tensor([[1.0, 2.0]]), one, torch.tensor([[2.0, 3.0]]), 0.5 * one)
    tensor([[0.5000, 3.5000]])
    """
    check_x("normalize", x)
    num_groups = check_coefficients("normalize", x, group, scale=scale, center=center, shift=shift)
    check_group("normalize", x, group, num_groups)
    dtype = compute_dtype(x)
    center = None if center is None else cast(center, dtype)
    shift = None if shift is None else cast(shift, dtype)
    result: Tensor = differentiable.normalize(x, center, cast(scale, dtype), shift, group)
    return result


def centered(x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor, group: Tensor | None) -> Tensor:
    """``(x - mean) * slope + offset``, differentiable, of float64 coefficients that keep their digits.

    The center is the mean as the computation can hold it, a constant; the rest of the mean goes into the shift.
    """
    dtype = compute_dtype(x)
    center = mean.detach().to(dtype)
    shift = offset + (center.to(mean.dtype) - mean) * slope
    result: Tensor = differentiable.normalize(x, center, slope.to(dtype), shift.to(dtype), group)
    return result


def products(a: Tensor, b: Tensor, center: Tensor | None, like: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum a`` and ``sum a * (b - center)`` per (group, channel), differentiable, in the dtype of ``like (G, C)``."""
    about = torch.zeros_like(like, dtype=torch.float64) if center is None else center.double()
    sum_a, sum_ab = differentiable.backward_reduce(a, b, about, group, like.shape[0])
    return sum_a.to(like.dtype), sum_ab.to(like.dtype)


def fallback(
    x: Tensor, center: Tensor | None, scale: Tensor, shift: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """Computed in the dtype of ``scale``, returned in that of ``x``."""
    y = torch.empty_like(x)
    difference = x if center is None else x - per_sample(center, x, group)
    if shift is None:
        return torch.mul(difference, per_sample(scale, x, group), out=y)
    return torch.addcmul(per_sample(shift, x, group), difference, per_sample(scale, x, group), out=y)


def _fake(
    x: Tensor, center: Tensor | None, scale: Tensor, shift: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, center, scale, _, ctx.group = (*inputs, None, None)[:5]  # torch leaves out trailing defaults
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, center, scale)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, center, scale = ctx.saved_tensors
    need_x, need_center, need_scale, need_shift = (*ctx.needs_input_grad, False)[:4]
    dx = differentiable.normalize(dy, None, scale, None, ctx.group) if need_x else None
    dcenter = dscale = dshift = None
    if need_center or need_scale or need_shift:
        if x is None:
            dshift, _ = products(dy, dy, None, scale, ctx.group)
        else:
            dshift, dscale = products(dy, x, center, scale, ctx.group)
        dcenter = -scale * dshift if need_center else None
    return dx, dcenter, dscale if need_scale else None, dshift if need_shift else None, None


OPERATOR = Operator(
    "normalize(Tensor x, Tensor? center, Tensor scale, Tensor? shift=None, Tensor? group=None) -> Tensor",
    fallback=fallback,
    fake=_fake,
    derivative=Derivative(_save, _backward),
)
