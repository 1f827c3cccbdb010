"""coefficients: statistics and affine in the form that ``normalize`` takes."""

import torch
from torch import Tensor

from precisebn.ops.operator import Operator

__all__ = ["OPERATOR"]


def coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics and affine as ``center``, ``scale`` and ``shift``: ``y = (x - center) * scale + shift``.

    ``center`` is the mean in the dtype of the computation, ``scale = weight / sqrt(var + eps)``, and ``shift = bias +
    (center - mean) * scale`` makes up for what the mean lost in rounding. So no digit of x is lost where the mean is
    large against the standard deviation: the difference is exact, or rounds at the size of the difference, where
    ``scale * x + (bias - mean * scale)`` rounds at the size of x. Computed in float64. Not differentiable.

    Args:
        mean: ``(C,)`` or ``(G, C)``, floating point, as are the next three.
        var: the biased variance, in the shape of ``mean``.
        weight: None is 1.
        bias: None is 0.
        eps: added to the variance.
        double: whether the result is float64, for float64 ``x``; else it is float32.

    Returns:
        Three tensors ``(G, C)``; operands of one group apply to all groups.

    >>> coefficients(torch.tensor([3.0]), torch.tensor([4.0]), None, torch.tensor([1.0]), 0.0, False)
    (tensor([[3.]]), tensor([[0.5000]]), tensor([[1.]]))
    """
    dtype = torch.float64 if double else torch.float32
    mean, var = mean.double(), var.double()
    center = mean.to(dtype)
    scale = (var + eps).rsqrt() if weight is None else weight.double() * (var + eps).rsqrt()
    shift = (center.double() - mean) * scale
    shift = shift if bias is None else bias.double() + shift
    # An operator returns none of its inputs, and no tensor twice.
    center, scale = (t.expand_as(shift).to(dtype, copy=True) for t in (center, scale))
    return torch.atleast_2d(center), torch.atleast_2d(scale), torch.atleast_2d(shift.to(dtype))


def _fake(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [t.shape[0] for t in (mean, var, weight, bias) if t is not None and t.dim() == 2]
    shape = next((r for r in rows if r != 1), 1), mean.shape[-1]
    center, scale, shift = (mean.new_empty(shape, dtype=torch.float64 if double else torch.float32) for _ in range(3))
    return center, scale, shift


OPERATOR = Operator(
    "coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, bool double) "
    "-> (Tensor center, Tensor scale, Tensor shift)",
    fallback=coefficients,
    fake=_fake,
)
