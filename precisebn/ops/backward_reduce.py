"""backward_reduce: ``sum dy`` and ``sum dy * (x - mean)`` per (group, channel)."""

from typing import Any

import torch
from torch import Tensor

from precisebn.ops.checks import cast, check_coefficients, check_dy, check_group, check_x, compute_dtype
from precisebn.ops.grouping import chunks, sum_by_group
from precisebn.ops.normalize import centered
from precisebn.ops.operator import Derivative, Operator, differentiable

__all__ = ["OPERATOR", "backward_reduce", "fallback"]


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, group: Tensor | None = None, num_groups: int = 1
) -> tuple[Tensor, Tensor]:
    """``sum dy`` and ``sum dy * (x - mean)`` of every (group, channel): the sums of batch normalization's backward.

    Args:
        dy: the shape, dtype and device of ``x``, any strides.
        x: ``(N, C, *)``, as in :func:`moments`.
        mean: ``(G, C)``, what to subtract from ``x``; converted to float64.
        group: int64 ``(N,)``, as in :func:`moments`.
        num_groups: the number of groups, ``G``.

    Returns:
        Two float64 tensors ``(G, C)``.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> backward_reduce(torch.ones(2, 1), x, torch.tensor([[1.0]]))
    (tensor([[2.]], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """
    check_x("backward_reduce", x)
    check_dy("backward_reduce", dy, x)
    check_coefficients("backward_reduce", x, group, num_groups, mean=mean)
    check_group("backward_reduce", x, group, num_groups)
    result: tuple[Tensor, Tensor] = differentiable.backward_reduce(dy, x, cast(mean, torch.float64), group, num_groups)
    return result


def fallback(
    dy: Tensor, x: Tensor, mean: Tensor, group: Tensor | None = None, num_groups: int = 1
) -> tuple[Tensor, Tensor]:
    sum_dy = x.new_zeros(num_groups, x.shape[1], dtype=torch.float64)
    sum_dy_xmu = torch.zeros_like(sum_dy)
    for (dy_values, x_values), index in chunks((dy, x), group):
        deviation = x_values - mean[index].unsqueeze(-1)
        sum_dy += sum_by_group(dy_values.sum(2), index, num_groups)
        sum_dy_xmu += sum_by_group((dy_values * deviation).sum(2), index, num_groups)
    return sum_dy, sum_dy_xmu


def _fake(
    dy: Tensor, x: Tensor, mean: Tensor, group: Tensor | None = None, num_groups: int = 1
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, mean, ctx.group, _ = inputs
    ctx.save_for_backward(dy, x, mean, output[0])


def _backward(
    ctx: Any, grad_sum: Tensor, grad_product: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    dy, x, mean, sum_dy = ctx.saved_tensors
    need_dy, need_x, need_mean = ctx.needs_input_grad[:3]
    grad_dy = centered(x, mean, grad_product, grad_sum, ctx.group) if need_dy else None
    slope = grad_product.to(compute_dtype(dy))
    grad_x = differentiable.normalize(dy, None, slope, None, ctx.group) if need_x else None
    return grad_dy, grad_x, -grad_product * sum_dy if need_mean else None, None, None


OPERATOR = Operator(
    "backward_reduce(Tensor dy, Tensor x, Tensor mean, Tensor? group=None, int num_groups=1) "
    "-> (Tensor sum_dy, Tensor sum_dy_xmu)",
    fallback=fallback,
    fake=_fake,
    derivative=Derivative(_save, _backward),
)
