"""What the tests of modules compare with: batch normalization from its definition, in float64 and plain torch.

Errors are bounded by the arithmetic: a result of dtype d may be off by its own rounding, eps(d) relative, and by a few
roundings of the arithmetic, which is float64 for float64 inputs and float32 for all others, of the size of the terms
that it adds up. Terms are of the size of the largest result for the inputs used here, of mean and deviation around 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(6, 3), (5, 3, 4), (4, 3, 3, 2), (3, 3, 2, 3, 2)]
LAYOUTS = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in SHAPES[2:]]
"""Shapes, and whether in channels_last, a layout of 4 or 5 dimensions."""
ROUNDINGS = 32

Inputs = Tensor | Sequence[Tensor]
Reference = Callable[[list[Tensor], Tensor | None, Tensor | None], list[Tensor]]


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def values(xs: Sequence[Tensor]) -> Tensor:
    """All values of several ``(N, C, *)`` as one ``(n, C)``, float64."""
    return torch.cat([x.double().movedim(1, -1).reshape(-1, x.shape[1]) for x in xs])


def normalized(x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    def per_channel(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *(1 for _ in x.shape[2:]))

    y = (x - per_channel(mean)) / (per_channel(var) + eps).sqrt()
    y = y if w is None else y * per_channel(w)
    return y if b is None else y + per_channel(b)


def batch_normalized(xs: list[Tensor], w: Tensor | None, b: Tensor | None, eps: float = 1e-5) -> list[Tensor]:
    """Normalized together, as if concatenated."""
    v = values(xs)
    return [normalized(x, v.mean(0), v.var(0, correction=0), w, b, eps) for x in xs]


def population_normalized(bn: nn.Module) -> Reference:
    """Normalized by the running statistics that a layer has now."""
    mean, var = bn.running_mean.double(), bn.running_var.double()
    return lambda xs, w, b: [normalized(x, mean, var, w, b, bn.eps) for x in xs]


class Running:
    """Running statistics by their definition: ``(1 - momentum) * old + momentum * batch``, or the average of all."""

    def __init__(self, channels: int, momentum: float | None = 0.1) -> None:
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.ones(channels, dtype=torch.float64)
        self.momentum, self.batches = momentum, 0

    def see(self, *xs: Tensor) -> "Running":
        v = values(xs).detach()
        self.batches += 1
        share = 1 / self.batches if self.momentum is None else self.momentum
        self.mean = (1 - share) * self.mean + share * v.mean(0)
        self.var = (1 - share) * self.var + share * v.var(0, correction=1)
        return self

    def assert_in(self, bn: nn.Module, population: int | None = None) -> None:
        mean, var, batches = bn.running_mean, bn.running_var, bn.num_batches_tracked
        if population is not None:
            mean, var, batches = mean[population], var[population], batches[population]
        assert int(batches) == self.batches
        assert_rounded(mean, self.mean)
        assert_rounded(var, self.var)


def assert_rounded(
    actual: Tensor, exact: Tensor, arithmetic: torch.dtype | None = None, roundings: int = ROUNDINGS
) -> None:
    """``actual`` is ``exact`` but for its rounding and some of the arithmetic."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    arithmetic = arithmetic or (torch.float64 if actual.dtype == torch.float64 else torch.float32)
    atol = roundings * eps_of(arithmetic) * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(actual.detach().double(), exact.detach(), rtol=eps_of(actual.dtype), atol=atol)


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """Values of mean 1 and deviation 2, to which each channel adds its number."""
    x = torch.randn(shape) * 2 + 1 + torch.arange(shape[1]).reshape(-1, *(1 for _ in shape[2:]))
    if channels_last:
        x = x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    return x.to(dtype)


def with_random_affine(bn: nn.Module) -> Any:
    """The same module with weight and bias that are neither 1 and 0 nor alike."""
    with torch.no_grad():
        for parameter in (bn.weight, bn.bias):
            parameter.copy_(torch.randn(parameter.shape) + 1.5)
    return bn


def with_random_population(bn: nn.Module) -> Any:
    """The same module with running statistics that are neither 0 and 1 nor alike."""
    bn.running_mean.copy_(torch.randn(bn.running_mean.shape))
    bn.running_var.copy_(torch.rand(bn.running_var.shape) + 0.5)
    return bn


def assert_is(
    call: Callable[[Any], Any], bn: nn.Module, inputs: Inputs, reference: Reference, needs_grad: bool = True
) -> None:
    """A call of a module with ``weight`` and ``bias`` gives what a reference gives: output and all gradients.

    The gradients are those of random cotangents in the outputs' dtype.
    """
    single = isinstance(inputs, Tensor)
    ours = [x.detach().requires_grad_(needs_grad) for x in ([inputs] if single else inputs)]
    exact = [x.detach().double().requires_grad_(needs_grad) for x in ours]
    affine = [None if p is None else p.detach().double().requires_grad_() for p in (bn.weight, bn.bias)]
    outputs = call(ours[0] if single else ours)
    outputs = [outputs] if single else outputs
    expected = reference(exact, *affine)
    for x, y, z in zip(ours, outputs, expected, strict=True):
        assert y.dtype == x.dtype
        assert y.stride() == x.stride()
        assert_rounded(y, z)
    arithmetic = torch.float64 if ours[0].dtype == torch.float64 else torch.float32
    cotangents = [torch.randn(y.shape).to(y.dtype) for y in outputs]
    parameters = [p for p in (bn.weight, bn.bias) if p is not None and p.requires_grad]
    wanted = [*(ours if needs_grad else []), *parameters]
    exactly = [*(exact if needs_grad else []), *(p for p in affine if p is not None)][: len(wanted)]
    got = torch.autograd.grad(outputs, wanted, cotangents)
    right = torch.autograd.grad(expected, exactly, [c.double() for c in cotangents])
    for g, r, of in zip(got, right, wanted, strict=True):
        assert g.dtype == of.dtype
        if any(of is p for p in parameters) and eps_of(of.dtype) > eps_of(
            arithmetic
        ):  # autograd adds up those of several calls
            assert_rounded(g, r, of.dtype, roundings=2 * len(outputs))
        else:
            assert_rounded(g, r, arithmetic)


def trained_with_checkpointing(bn: nn.Module, inputs: Inputs, use_reentrant: bool | None) -> tuple[Any, ...]:
    """One forward and backward through an in-place ReLU, under activation checkpointing unless None.

    Returns:
        The gradients of inputs and parameters, and the buffers.
    """
    single = isinstance(inputs, Tensor)
    leaves = [x.detach().clone().requires_grad_() for x in ([inputs] if single else inputs)]

    def layers(*xs: Tensor) -> Any:
        y = bn(xs[0] if single else list(xs))
        return torch.relu_(y) if single else tuple(map(torch.relu_, y))

    y = layers(*leaves) if use_reentrant is None else checkpoint(layers, *leaves, use_reentrant=use_reentrant)
    sum((t**3).sum() for t in ([y] if single else y)).backward()
    return [x.grad for x in leaves], [p.grad for p in bn.parameters()], list(bn.buffers())


def assert_checkpointing_changes_nothing(build: Callable[[], nn.Module], inputs: Inputs, use_reentrant: bool) -> None:
    torch.testing.assert_close(
        trained_with_checkpointing(build(), inputs, use_reentrant),
        trained_with_checkpointing(build(), inputs, None),
        rtol=0,
        atol=0,
    )
