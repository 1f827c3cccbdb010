"""normalize_and_track: a whole forward of batch normalization in training, ``normalize_batch`` and ``track``."""

from torch import Tensor

from precisebn.ops.normalize_batch import OPERATOR as NORMALIZE_BATCH
from precisebn.ops.operator import Operator
from precisebn.ops.track import fallback as track

__all__ = ["OPERATOR"]


def fallback(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize every group by its own statistics, and move its running statistics towards these, in place.

    Args:
        x: ``(N, C, *)``, as in ``moments``.
        weight: as in ``normalize_batch``, as are the next two.
        bias: ``(C,)`` or ``(G, C)``; None is 0.
        eps: added to the variance.
        running_mean: ``(C,)``, or ``(G, C)`` where there is a group; as in ``track``, as are the next three.
        running_var: likewise.
        num_batches: int64 ``()`` or ``(G,)``.
        momentum: None is the average over all mini-batches.
        group: as in ``moments``.
        num_groups: G.

    Returns:
        What ``normalize_batch`` returns.

    >>> import torch
    >>> mean, var, batches = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor(0)
    >>> y, *_ = fallback(torch.tensor([[1.0], [3.0]]), None, None, 0.0, mean, var, batches, 0.5)
    >>> y.flatten().tolist(), mean.item(), var.item(), batches.item()
    ([-1.0, 1.0], 1.0, 1.5, 1)
    """
    y, count, mean, m2 = NORMALIZE_BATCH.fallback(x, weight, bias, eps, group, num_groups)
    track(count, mean, m2, running_mean, running_var, num_batches, momentum)
    return y, count, mean, m2


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, count, mean, m2 = NORMALIZE_BATCH.fake(x, weight, bias, eps, group, num_groups)
    return y, count, mean, m2


OPERATOR = Operator(
    "normalize_and_track(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, Tensor(c!) num_batches, float? momentum, Tensor? group=None, int num_groups=1) "
    "-> (Tensor y, Tensor count, Tensor mean, Tensor m2)",
    fallback=fallback,
    fake=_fake,
)
