"""backward_batch: the whole backward of ``normalize_batch``."""

import torch
from torch import Tensor

from precisebn.ops.backward_apply import fallback as backward_apply
from precisebn.ops.backward_coefficients import backward_coefficients
from precisebn.ops.backward_reduce import fallback as backward_reduce
from precisebn.ops.operator import Operator

__all__ = ["OPERATOR"]


def backward_batch(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward_reduce``, ``backward_coefficients`` and ``backward_apply`` in one call. Not differentiable.

    Args:
        dy: the gradient of what was normalized.
        x: ``(N, C, *)``, as it was before.
        count: of ``normalize_batch``, as are the next two.
        mean: float64.
        m2: float64.
        weight: ``(C,)`` or ``(G, C)``, floating point; None is 1.
        eps: added to the variance.
        group: as in ``moments``.

    Returns:
        The gradients of x, and of weight and bias as of ``backward_coefficients``.

    >>> from precisebn.ops.normalize_batch import normalize_batch
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> _, *statistics = normalize_batch(x, None, None, 0.0)
    >>> [t.flatten().tolist() for t in backward_batch(torch.tensor([[1.0], [2.0]]), x, *statistics, None, 0.0)]
    [[0.0, 0.0], [1.0], [3.0]]
    """
    about = torch.atleast_2d(mean)
    sum_dy, sum_dy_xmu = (s.reshape(mean.shape) for s in backward_reduce(dy, x, about, group, len(about)))
    var = m2 / count.clamp(min=1.0).unsqueeze(-1)
    center, a, b, c, grad_weight, grad_bias = backward_coefficients(
        count, mean, var, sum_dy, sum_dy_xmu, weight, eps, x.dtype == torch.float64
    )
    return backward_apply(dy, x, center, a, b, c, group), grad_weight, grad_bias


def _fake(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    affine = mean if weight is None else weight
    return torch.empty_like(x), affine.new_empty(affine.shape), affine.new_empty(affine.shape)


OPERATOR = Operator(
    "backward_batch(Tensor dy, Tensor x, Tensor count, Tensor mean, Tensor m2, Tensor? weight, float eps, "
    "Tensor? group=None) -> (Tensor dx, Tensor grad_weight, Tensor grad_bias)",
    fallback=backward_batch,
    fake=_fake,
)
