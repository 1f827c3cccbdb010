"""normalize_batch: a whole forward of batch normalization, ``moments``, ``coefficients`` and ``normalize``."""

import torch
from torch import Tensor

from precisebn.ops.coefficients import coefficients
from precisebn.ops.moments import fallback as moments
from precisebn.ops.normalize import fallback as normalize
from precisebn.ops.operator import Operator

__all__ = ["OPERATOR"]


def normalize_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize every group by its own mean and biased variance. Not differentiable.

    Args:
        x: ``(N, C, *)``, as in ``moments``.
        weight: ``(C,)`` or ``(G, C)``, floating point; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance.
        group: as in ``moments``.
        num_groups: G.

    Returns:
        The normalized tensor; count, mean and m2, as of ``moments``, but ``()`` and ``(C,)`` where ``group`` is None.

    >>> y, count, mean, m2 = normalize_batch(torch.tensor([[1.0], [3.0]]), None, None, 0.0)
    >>> y.flatten().tolist(), count.item(), mean.tolist(), m2.tolist()
    ([-1.0, 1.0], 2.0, [2.0], [2.0])
    """
    count, mean, m2 = moments(x, group, num_groups)
    var = m2 / count.clamp(min=1.0).unsqueeze(-1)
    affine = coefficients(mean, var, weight, bias, eps, x.dtype == torch.float64)
    y = normalize(x, *affine, group)
    if group is None:
        count, mean, m2 = (t.squeeze(0).clone() for t in (count, mean, m2))
    return y, count, mean, m2


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = () if group is None else (num_groups,)
    count, mean, m2 = (x.new_empty(shape, dtype=torch.float64) for shape in (groups, *[(*groups, x.shape[1])] * 2))
    return torch.empty_like(x), count, mean, m2


OPERATOR = Operator(
    "normalize_batch(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? group=None, int num_groups=1) "
    "-> (Tensor y, Tensor count, Tensor mean, Tensor m2)",
    fallback=normalize_batch,
    fake=_fake,
)
