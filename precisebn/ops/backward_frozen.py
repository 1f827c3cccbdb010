"""backward_frozen: the whole backward of a normalization by given statistics."""

import torch
from torch import Tensor

from precisebn.ops.backward_coefficients import backward_coefficients
from precisebn.ops.backward_reduce import fallback as backward_reduce
from precisebn.ops.normalize import fallback as normalize
from precisebn.ops.operator import Operator

__all__ = ["OPERATOR"]


def backward_frozen(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, the statistics being constants. Not differentiable.

    Args:
        dy: the gradient of what was normalized.
        x: ``(N, C, *)``, as it was before.
        mean: ``(C,)`` or ``(G, C)``, floating point.
        var: in the shape of ``mean``, floating point.
        weight: ``(C,)`` or ``(G, C)``, floating point; None is 1.
        eps: added to the variance.
        group: as in ``moments``.

    Returns:
        The gradients of x, and of weight and bias as of ``backward_coefficients``.

    >>> x, one = torch.tensor([[1.0], [3.0]]), torch.ones(1)
    >>> [t.flatten().tolist() for t in backward_frozen(torch.tensor([[1.0], [2.0]]), x, one, one, 2 * one, 0.0)]
    [[2.0, 4.0], [4.0], [3.0]]
    """
    about = torch.atleast_2d(mean).double()
    sum_dy, sum_dy_xmu = (s.reshape(mean.shape) for s in backward_reduce(dy, x, about, group, len(about)))
    _, a, _, _, grad_weight, grad_bias = backward_coefficients(
        None, mean, var, sum_dy, sum_dy_xmu, weight, eps, x.dtype == torch.float64
    )
    like_x = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    return normalize(like_x, None, a, None, group), grad_weight, grad_bias


def _fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    affine = mean.new_empty(mean.shape, dtype=torch.float64) if weight is None else weight
    return torch.empty_like(x), affine.new_empty(affine.shape), affine.new_empty(affine.shape)


OPERATOR = Operator(
    "backward_frozen(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, float eps, Tensor? group=None) "
    "-> (Tensor dx, Tensor grad_weight, Tensor grad_bias)",
    fallback=backward_frozen,
    fake=_fake,
)
