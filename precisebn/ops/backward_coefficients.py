"""backward_coefficients: from the sums of ``backward_reduce`` to what ``backward_apply`` takes."""

import torch
from torch import Tensor

from precisebn.ops.operator import Operator

__all__ = ["OPERATOR"]


def backward_coefficients(
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    weight: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The coefficients of ``dx = a * dy + b * (x - center) + c``, and the gradients of weight and bias.

    The gradient of batch normalization, every group by its own mean and variance (Ioffe & Szegedy 2015, algorithm 1):
    ``dx = weight / std * (dy - sum_dy / n - (x - mean) / std^2 * sum_dy_xmu / n)``, with std^2 for ``var + eps``. Or,
    without a count, that of a normalization by given statistics: ``dx = weight / std * dy``. As in ``coefficients``,
    ``center`` is the rounded mean, and c makes up for the rounding. Computed in float64. Not differentiable.

    Args:
        count: float64 ``(G,)``, as of ``moments``, or ``()`` with a mean ``(C,)``; or None, where the statistics are
            constants.
        mean: ``(G, C)``, or ``(C,)`` of one group, floating point, as is the next.
        var: the biased variance.
        sum_dy: float64 ``(G, C)``, about ``mean``, as is the next.
        sum_dy_xmu: see ``backward_reduce``.
        weight: ``(C,)`` or ``(G, C)``, floating point; None is 1.
        eps: added to the variance.
        double: whether center, a, b and c are float64, for float64 ``x``; else they are float32.

    Returns:
        center, a, b and c, ``(G, C)``; and the gradients of weight and bias, both in the shape and dtype of ``weight``:
        summed over the groups where they share it. Without a weight, in the shape of ``mean`` and float64.

    >>> count, mean, var = (torch.tensor(v, dtype=torch.float64) for v in ([2.0], [[2.0]], [[1.0]]))
    >>> sums = (torch.tensor([[2.0]]).double(), torch.tensor([[0.0]]).double())
    >>> [t.item() for t in backward_coefficients(count, mean, var, *sums, None, 0.0, False)]
    [2.0, 1.0, -0.0, -1.0, 0.0, 2.0]
    """
    dtype = torch.float64 if double else torch.float32
    mean, inverse_std = mean.double(), (var.double() + eps).rsqrt()
    center = mean.to(dtype)
    grad_weight, grad_bias = sum_dy_xmu * inverse_std, sum_dy
    a = inverse_std if weight is None else weight.double() * inverse_std
    if count is None:
        b = c = torch.zeros_like(a)
    else:
        per_value = -a / count.clamp(min=1.0).unsqueeze(-1)
        b = per_value * inverse_std * grad_weight
        c = per_value * grad_bias + b * (center.double() - mean)
    if weight is not None:
        grad_weight, grad_bias = (
            torch.atleast_2d(g).sum_to_size(weight.shape).to(weight.dtype) for g in (grad_weight, grad_bias)
        )
    # An operator returns none of its inputs, and no tensor twice.
    center, a, b, c = (torch.atleast_2d(t.to(dtype, copy=True)) for t in (center, a, b, c))
    return center, a, b, c, grad_weight.clone(), grad_bias.clone()


def _fake(
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    weight: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = (1, *mean.shape)[-2:], torch.float64 if double else torch.float32
    center, a, b, c = (mean.new_empty(shape, dtype=dtype) for _ in range(4))
    affine = mean.new_empty(mean.shape, dtype=torch.float64) if weight is None else weight
    grad_weight, grad_bias = (affine.new_empty(affine.shape) for _ in range(2))
    return center, a, b, c, grad_weight, grad_bias


OPERATOR = Operator(
    "backward_coefficients(Tensor? count, Tensor mean, Tensor var, Tensor sum_dy, Tensor sum_dy_xmu, Tensor? weight, "
    "float eps, bool double) -> (Tensor center, Tensor a, Tensor b, Tensor c, Tensor grad_weight, Tensor grad_bias)",
    fallback=backward_coefficients,
    fake=_fake,
)
