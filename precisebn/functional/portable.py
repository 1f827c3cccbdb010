"""Batch normalization in torch's own operators alone, for graphs that run where this library is not.

That is what torch.export, torch.onnx, torch.jit.trace, torch.jit.script and torch.fx make. With given statistics it is
torch's own batch norm in evaluation: one node, which deployment tools know, and merge with the convolution before it.
(They do so as ``scale * x + shift``; the digits that the library's own kernels keep at large means are theirs to lose.)
By batch statistics it is arithmetic in the dtype of the computation, float32 where the input is not float64, because
some runtimes have no float64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from precisebn._torch import is_exporting, is_tracing
from precisebn.ops.checks import cast, compute_dtype

__all__ = ["batch_norm", "batch_norm_operator", "frozen_batch_norm", "is_portable", "row"]


def is_portable() -> bool:
    """Whether a graph is being made that is to run elsewhere; torch.compile's are not."""
    return is_tracing() or is_exporting()


def frozen_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, all of them ``(C,)``, as torch's batch norm in evaluation."""
    if not isinstance(x, Proxy):  # of which no dtype is known
        values = (mean, var, weight, bias)
        if any(value is not None and value.dtype != x.dtype for value in values):
            # The one mixture that torch's operator takes: all of them in the dtype of the computation.
            dtype = compute_dtype(x)
            mean, var = cast(mean, dtype), cast(var, dtype)
            weight, bias = (None if value is None else cast(value, dtype) for value in (weight, bias))
    return batch_norm_operator(x, mean, var, weight, bias, False, eps)


def batch_norm_operator(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    """Torch's own batch norm, with ``eps=0`` too, as torchvision's detectors have it.

    The operator takes that everywhere. The function before it refuses it: in evaluation in torch 2.10 (and not in
    2.13), in training in both. It stands first, because it is what tools look for in the graphs of torch.fx.
    """
    if eps != 0:
        return F.batch_norm(x, mean, var, weight, bias, training=training, eps=eps)
    return torch.batch_norm(x, weight, bias, mean, var, training, 0.0, eps, torch.backends.cudnn.enabled)


def row(x: Tensor, values: Tensor, index: int) -> Tensor:
    """``values[index]``, for a call on ``x``; where torch.fx traces, an operator of its graph and not a constant."""
    if isinstance(x, Proxy):
        node: Any = x.tracer.create_arg(values)  # of other types in each release of torch
        traced: Any = Proxy(node, x.tracer)
        one: Tensor = traced[index]
        return one
    return values[index]


def batch_norm(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: Sequence[Tensor],
    num_groups: int,
    shared: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Normalize by batch statistics; see :func:`precisebn.functional.batch_norm`.

    Returns:
        The outputs; count ``(G,)``, mean and m2 ``(G, C)`` of the values, float64.
    """
    pieces = [_Piece(x, groups[i] if groups else None, num_groups) for i, x in enumerate(xs)]
    count, center, rest, m2 = _statistics(pieces)
    moments = count.flatten().double(), center.double() + rest.double(), m2.double()
    if shared and groups:
        together = [_Piece(x, None, 1) for x in xs]
        count, center, rest, m2 = (t.expand(num_groups, -1) for t in _statistics(together))
    scale = (m2 / count.clamp(min=1.0) + eps).rsqrt()
    if weight is not None:
        scale = scale * cast(weight, scale.dtype)
    ys = []
    for piece in pieces:
        y = (piece.values - piece.per_sample(center) - piece.per_sample(rest)) * piece.per_sample(scale)
        if bias is not None:
            y = y + piece.per_sample(torch.atleast_2d(cast(bias, scale.dtype)).expand_as(scale))
        ys.append(cast(y, piece.dtype))
    return ys, *moments


class _Piece:
    """One of the tensors that are normalized together, and its groups as a matrix ``(N, G)`` of ones and zeros.

    Sizes are asked of tensors, never of Python: a graph that was traced serves every batch size.
    """

    def __init__(self, x: Tensor, group: Tensor | None, num_groups: int) -> None:
        self.dtype, self.group = x.dtype, group
        self.values = cast(x, compute_dtype(x))
        self.spatial = list(range(2, x.dim()))
        self.members: Tensor | None = None
        if group is not None:
            ids = torch.arange(num_groups, device=x.device)
            self.members = (group.unsqueeze(-1) == ids).to(self.values.dtype)

    def sum_by_group(self, values: Tensor) -> Tensor:
        """The sums ``(G, C)`` of values ``(N, C, *)``."""
        of_samples = values.sum(self.spatial) if self.spatial else values
        return of_samples.sum(0, keepdim=True) if self.members is None else self.members.T @ of_samples

    def per_sample(self, of_groups: Tensor) -> Tensor:
        """``(G, C)`` as ``(N, C, 1, ...)``, or ``(1, C, 1, ...)``."""
        rows = of_groups if self.group is None else of_groups[self.group]
        return rows.reshape(rows.shape + (1,) * len(self.spatial))


def _statistics(pieces: list[_Piece]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count ``(G, 1)``, mean in two parts and m2 ``(G, C)``.

    The sum of float32 values that lie far from 0 is off by more than their standard deviation may be;
    what is left about that first mean is small, and its own mean puts right what was lost (corrected two-pass: Chan et
    al. 1983).
    """

    def total(values: list[Tensor]) -> Tensor:
        first, *others = (piece.sum_by_group(v) for piece, v in zip(pieces, values, strict=True))
        return sum(others, first)

    count = total([torch.ones_like(piece.values[:, :1]) for piece in pieces])
    center = total([piece.values for piece in pieces]) / count.clamp(min=1.0)
    about = [piece.values - piece.per_sample(center) for piece in pieces]
    rest = total(about) / count.clamp(min=1.0)
    m2 = total([(v - piece.per_sample(rest)).square() for piece, v in zip(pieces, about, strict=True)])
    return count, center, rest, m2
