"""backward_apply: ``a * dy + b * (x - center) + c`` per (group, channel)."""

from typing import Any

import torch
from torch import Tensor

from precisebn.ops.checks import cast, check_coefficients, check_dy, check_group, check_x, compute_dtype
from precisebn.ops.grouping import per_sample
from precisebn.ops.normalize import products
from precisebn.ops.operator import Derivative, Operator, differentiable

__all__ = ["OPERATOR", "backward_apply", "fallback"]


def backward_apply(
    dy: Tensor, x: Tensor, center: Tensor, a: Tensor, b: Tensor, c: Tensor, group: Tensor | None = None
) -> Tensor:
    """``a * dy + b * (x - center) + c`` per (group, channel): the gradient of batch normalization in its input.

    Computed in float64 for float64 ``x`` and in float32 otherwise. Differentiable twice in every tensor but ``group``.

    Args:
        dy: the shape, dtype and device of ``x``, any strides.
        x: ``(N, C, *)``, as in :func:`normalize`.
        center: ``(G, C)`` of any floating dtype, converted to the dtype of the computation, as are the next three. A
            mean that the conversion rounds needs a ``c`` that makes up for it.
        a: ``(G, C)``.
        b: ``(G, C)``.
        c: ``(G, C)``.
        group: int64 ``(N,)``, as in :func:`moments`; ``G`` must be 1 without it.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> one = torch.ones(1, 1)
    >>> backward_apply(torch.tensor([[1.0]]), torch.tensor([[3.0]]), one, 2 * one, one, one)
    tensor([[5.]])
    """
    check_x("backward_apply", x)
    check_dy("backward_apply", dy, x)
    num_groups = check_coefficients("backward_apply", x, group, center=center, a=a, b=b, c=c)
    check_group("backward_apply", x, group, num_groups)
    coefficients = [cast(t, compute_dtype(x)) for t in (center, a, b, c)]
    result: Tensor = differentiable.backward_apply(dy, x, *coefficients, group)
    return result


def fallback(
    dy: Tensor, x: Tensor, center: Tensor, a: Tensor, b: Tensor, c: Tensor, group: Tensor | None = None
) -> Tensor:
    """Computed in the dtype of ``a``, returned in that of ``x``."""
    dx = torch.empty_like(x)
    difference = x - per_sample(center, x, group)
    of_x = torch.addcmul(per_sample(c, x, group), per_sample(b, x, group), difference)
    return torch.addcmul(of_x, per_sample(a, x, group), dy, out=dx)


def _fake(
    dy: Tensor, x: Tensor, center: Tensor, a: Tensor, b: Tensor, c: Tensor, group: Tensor | None = None
) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, center, a, b, _, ctx.group = (*inputs, None)[:7]  # torch leaves out trailing defaults
    ctx.save_for_backward(dy, x, center, a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, center, a, b = ctx.saved_tensors
    need_dy, need_x, need_center, need_a, need_b, need_c = ctx.needs_input_grad[:6]
    grad_dy = differentiable.normalize(grad, None, a, None, ctx.group) if need_dy else None
    grad_x = differentiable.normalize(grad, None, b, None, ctx.group) if need_x else None
    grad_c, grad_a = products(grad, dy, None, a, ctx.group) if need_a or need_c or need_center else (None, None)
    grad_b = products(grad, x, center, b, ctx.group)[1] if need_b else None
    grad_center = -b * grad_c if need_center and grad_c is not None else None
    return grad_dy, grad_x, grad_center, grad_a, grad_b, grad_c, None


OPERATOR = Operator(
    "backward_apply(Tensor dy, Tensor x, Tensor center, Tensor a, Tensor b, Tensor c, Tensor? group=None) -> Tensor",
    fallback=fallback,
    fake=_fake,
    derivative=Derivative(_save, _backward),
)
