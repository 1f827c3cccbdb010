"""track: running statistics, moved towards those of a mini-batch."""

import torch
from torch import Tensor

from precisebn._torch import is_batched, is_tracing
from precisebn.ops.operator import Operator, raw

__all__ = ["OPERATOR", "fallback", "track"]


def track(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
) -> None:
    """Update running statistics as torch does: ``running = (1 - momentum) * running + momentum * batch``, in place.

    Computed in float64; the mini-batch's variance is unbiased, ``m2 / (count - 1)``. A group whose count is below two
    has no variance, and is left alone. Checks next to nothing. Not differentiable. In a graph it is plain arithmetic,
    which compilers fuse.

    Args:
        count: float64 ``()`` or ``(G,)``, of the mini-batch, as are the next two.
        mean: float64 ``(C,)`` or ``(G, C)``.
        m2: likewise.
        running_mean: of the shape of ``mean``, floating point, any strides.
        running_var: likewise.
        num_batches: int64 ``()`` or ``(G,)``: grows by one.
        momentum: None is the average over all mini-batches.

    >>> from precisebn.ops import moments
    >>> mean, var, batches = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor(0)
    >>> batch = moments(torch.tensor([[0.0], [1.0], [5.0]]))
    >>> track(*(t[0] for t in batch), mean, var, batches, 0.5)
    >>> mean.item(), var.item(), batches.item()
    (1.0, 4.0, 1)
    """
    # An averaged state dict may have made a floating-point number of mini-batches; nn.BatchNorm counts on in it.
    in_a_graph = torch.compiler.is_compiling() or is_tracing()
    if in_a_graph or num_batches.dtype != torch.int64 or is_batched(running_mean):
        fallback(count, mean, m2, running_mean, running_var, num_batches, momentum)
        return
    raw.track(count, mean, m2, running_mean, running_var, num_batches, momentum)
    # A backward may need what they were, and who keeps buffers looks here for whether they have changed.
    torch.autograd.graph.increment_version((running_mean, running_var, num_batches))


@torch.no_grad()
def fallback(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
) -> None:
    tracked = count > 1
    num_batches.add_(tracked)
    share = 1.0 / num_batches.double().clamp(min=1.0) if momentum is None else torch.full_like(count, momentum)
    unbiased = m2 / (count - 1.0).clamp(min=1.0).unsqueeze(-1)
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        moved = running.double().lerp(batch, share.unsqueeze(-1))
        running.copy_(moved.to(running.dtype).where(tracked.unsqueeze(-1), running))


def _fake(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
) -> None:
    return None


OPERATOR = Operator(
    "track(Tensor count, Tensor mean, Tensor m2, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!) num_batches, float? momentum) -> ()",
    fallback=fallback,
    fake=_fake,
)
