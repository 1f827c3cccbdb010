"""Batch normalization by the statistics of all ranks, with its gradient: one all-reduce forward, one backward.

Ranks may bring any number of samples, none included: what they add up are counts and sums, never averages of averages.
The gradients are those of one process on the concatenated batch, where what is minimized is the sum of what the ranks
minimize; gradients of weight and bias are each rank's own share of that, as those of torch's SyncBatchNorm are:
DistributedDataParallel averages them.

Two ways, of which :func:`sync_batch_norm` chooses. In a graph of torch.compile: operators, and torch's functional
collectives between them, forward and backward. Otherwise an autograd function, whose backward can be differentiated
again: its collectives then have derivatives themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from precisebn._torch import is_transformed
from precisebn.distributed.collectives import all_reduce, sum_over_ranks
from precisebn.errors import InputError
from precisebn.functional import portable
from precisebn.functional._batch_norm import Gradients, Kept, gradient_coefficients, laid_out_as
from precisebn.functional.parameters import form_of, in_form, needs_gradient
from precisebn.ops.checks import check_x
from precisebn.ops.operator import Derivative, Operator, differentiable, raw
from precisebn.ops.registry import register
from precisebn.statistics.moments import Moments

__all__ = ["pack", "sync_batch_norm", "unpack"]


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Moments]:
    """Normalize by mean and biased variance of the values of all ranks; return also the Moments of these.

    All ranks call it, with as many channels. Differentiable in ``x``, weight and bias, twice outside of graphs.

    Args:
        x: ``(N, C, *)``, float32, float64, float16 or bfloat16; N and the sizes behind C may differ between ranks.
        weight: ``(C,)``; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance.
        group: the name of the process group.

    Returns:
        The normalized tensor; and the Moments ``(C,)``, the same bits on all ranks.

    Raises:
        InputError: unsupported shapes, dtypes or devices; a transformation or a graph that cannot hold a collective.
        RankFailedError: a rank has ended, or has not come.
    """
    _check(x, weight, bias)
    if torch.compiler.is_compiling():
        count, mean, m2 = unpack(sum_over_ranks(pack(*torch.ops.precisebn.moments(x.detach())), group))
        y = torch.ops.precisebn.sync_normalize(x, weight, bias, count, mean, m2, eps, group)
    elif needs_gradient(x, weight, bias):
        y, count, mean, m2 = _Synchronized.apply(x, weight, bias, eps, group)  # type: ignore[no-untyped-call]
    else:
        y, count, mean, m2 = _forward(x, weight, bias, eps, group)
    return y, Moments(count[0], mean[0], m2[0])


def pack(count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """Moments ``(1, C)`` as a vector ``(2 C + 1,)`` whose sum over ranks says all of their union: see :func:`unpack`.

    Chan's formula takes m2 about the common mean, which nobody knows before the sum. So each rank moves its own m2,
    which is exact, to a point that all know without a word, 0, and the sum is moved from there to the common mean. Both
    are done in float64, on numbers that are at most ``n (var + mean^2)``: the sum of squares rounds ``W + 2`` times on
    its way over W ranks, the square of the sum ``2 W + 3`` times. So the relative error of the variance is below
    ``(3 W + 8) * 2^-53 * (1 + (mean / std)^2)``, with the roundings of what ranks bring: 4e-7 at the worst for 8 ranks
    and a mean of 1e4 standard deviations, and float64's own rounding for a mean of a few. (A running mean would be
    nearer than 0; but where ranks had different ones, every result would be wrong, and nobody would notice.)
    """
    total = count.unsqueeze(-1) * mean
    return torch.cat([count, total.flatten(), torch.addcmul(m2, total, mean).flatten()])


def unpack(merged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count ``(1,)``, mean and m2 ``(1, C)`` of the values of all ranks, from the sum of their :func:`pack`."""
    channels = len(merged) // 2
    count, total, about_zero = (t.unsqueeze(0) for t in merged.split([1, channels, channels]))
    mean = total / count.clamp(min=1.0)
    return count.flatten(), mean, torch.addcmul(about_zero, total, mean, value=-1.0).clamp(min=0.0)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_x("SyncBN", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.device != x.device:
            raise InputError(f"SyncBN: {name} is on {parameter.device}, but x on {x.device}")
    if portable.is_portable() or (not torch.compiler.is_compiling() and is_transformed()):
        raise InputError(
            "SyncBN: torch.export, torch.onnx, torch.jit, torch.func and forward-mode differentiation cannot take "
            "statistics over ranks; call eval() before, or do it where torch.distributed is not initialized"
        )


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output; count ``(1,)``, mean and m2 ``(1, C)`` of all ranks."""
    statistics = unpack(sum_over_ranks(pack(*raw.moments(x, None, 1)), group))
    return _normalize(x, weight, bias, *statistics, eps, group), *statistics


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    eps: float,
    group: str,
) -> Tensor:
    """Normalize by given Moments ``(1, C)``, which are those of all ranks: the group is for the gradient."""
    var = m2 / count.clamp(min=1.0)
    y: Tensor = raw.normalize(x, *raw.coefficients(mean, var, weight, bias, eps, x.dtype == torch.float64), None)
    return y


class _Synchronized(torch.autograd.Function):
    """The eager way: takes what :func:`_forward` takes, and gives what it gives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = _forward(*arguments)
        x, weight, bias, ctx.eps, ctx.group = arguments
        ctx.bias_form = form_of(bias)
        ctx.save_for_backward(x, weight, *outputs[1:])
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        kept = Kept((x,), (None,), weight, ctx.bias_form, ctx.eps, False, Moments(*statistics))
        gradients = Gradients((dy,), grad_mean, grad_m2)
        return *_gradients(kept, gradients, ctx.group, ctx.needs_input_grad[:3]), None, None


def _gradients(
    kept: Kept, grads: Gradients, group: str, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias: those of ``batch_norm``, with sums over all ranks in that of x.

    Whether there are gradients of mean and m2, which only a second differentiation or a use of the Moments brings, is
    taken to be the same on all ranks, as the layers are that they run.
    """
    (x,), weight, (count, mean, m2) = kept.xs, kept.weight, (kept.moments.count, kept.moments.mean, kept.moments.m2)
    dy = laid_out_as(x, grads.ys[0])
    again = torch.is_grad_enabled()
    run, add_up = (differentiable, all_reduce) if again else (raw, sum_over_ranks)
    sum_dy, sum_dy_xmu = run.backward_reduce(dy, x, mean, None, 1)
    var = m2 / count.clamp(min=1.0)
    grad_x = None
    if needed[0]:
        of_statistics = [g for g in (grads.mean, grads.m2) if g is not None]
        total_dy, total_dy_xmu, *rest = add_up(torch.cat([sum_dy, sum_dy_xmu, *of_statistics]), group).split(1)
        if again or of_statistics:
            grad_mean = rest.pop(0) if grads.mean is not None else None
            grad_m2 = rest.pop(0) if grads.m2 is not None else None
            totals = Gradients(grads.ys, grad_mean, grad_m2)
            coefficients, _ = gradient_coefficients(kept, kept.moments, total_dy, total_dy_xmu, totals)
        else:
            coefficients = raw.backward_coefficients(
                count, mean, var, total_dy, total_dy_xmu, weight, kept.eps, x.dtype == torch.float64
            )[:4]
        grad_x = run.backward_apply(dy, x, *coefficients, None)
    # A rank's own share: whoever trains the parameter adds up, or averages, over ranks.
    grad_weight = grad_bias = None
    if needed[1]:
        grad_weight = in_form(sum_dy_xmu * (var + kept.eps).rsqrt(), form_of(weight))
    if needed[2]:
        grad_bias = in_form(sum_dy, kept.bias_form)
    return grad_x, grad_weight, grad_bias


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, count, mean, m2, ctx.eps, ctx.group = inputs
    ctx.bias_form = form_of(bias)
    ctx.save_for_backward(x, weight, count, mean, m2)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The whole gradient in x, also by way of the statistics, which therefore have none themselves."""
    x, weight, *statistics = ctx.saved_tensors
    kept = Kept((x,), (None,), weight, ctx.bias_form, ctx.eps, False, Moments(*statistics))
    gradients = Gradients((dy,), None, None)
    return *_gradients(kept, gradients, ctx.group, ctx.needs_input_grad[:3]), None, None, None, None, None


register(
    Operator(
        "sync_normalize(Tensor x, Tensor? weight, Tensor? bias, Tensor count, Tensor mean, Tensor m2, float eps, "
        "str group) -> Tensor",
        fallback=_normalize,
        fake=_fake,
        derivative=Derivative(_save, _backward),
    )
)
