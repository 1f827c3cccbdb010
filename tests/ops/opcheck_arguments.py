"""Arguments for torch.library.opcheck of every operator, on any device: float64, small, with groups and without."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def opcheck_arguments(name: str, place: Callable[[Tensor], Tensor]) -> Iterator[tuple[Any, ...]]:
    """The arguments of each check of an operator.

    Args:
        name: of the operator.
        place: puts a tensor where it is to be, on another device or in another layout.
    """
    x, dy = (place(_normal(4, 3, 2, 3, seed=seed)).requires_grad_() for seed in (0, 1))
    for make in OPCHECK_ARGUMENTS[name]:
        arguments = make(x, dy, torch.tensor([0, 1, 1, 0]), _normal(2, 3, seed=2))
        yield tuple(a.to(x.device) if isinstance(a, Tensor) and a.device != x.device else a for a in arguments)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _accumulators() -> tuple[Tensor, ...]:
    return torch.zeros(7, dtype=torch.float64).split([1, 3, 3])


OPCHECK_ARGUMENTS = {
    "moments": [lambda x, d, g, a: (x,), lambda x, d, g, a: (x, g, 2)],
    "normalize": [lambda x, d, g, a: (x, None, a[:1], a[:1]), lambda x, d, g, a: (x, a, a, None, g)],
    "backward_reduce": [lambda x, d, g, a: (d, x, a[:1]), lambda x, d, g, a: (d, x, a, g, 2)],
    "backward_apply": [lambda x, d, g, a: (d, x, *[a[:1]] * 4), lambda x, d, g, a: (d, x, a, a, a, a, g)],
    "accumulate": [
        lambda x, d, g, a: (x.detach(), *_accumulators()),
        lambda x, d, g, a: (x.detach(), *_accumulators(), torch.zeros(3), torch.zeros(3)),
    ],
    "coefficients": [
        lambda x, d, g, a: (a[0], a[0] ** 2, None, a, 1e-3, False),
        lambda x, d, g, a: (a, a**2, a[0].float(), None, 1e-3, True),
    ],
    "track": [
        lambda x, d, g, a: (a[0, 0] ** 2 + 2, a[0], a[0] ** 2, torch.zeros(3), torch.ones(3), torch.tensor(0), None),
        lambda x, d, g, a: (a[:, 0] ** 2, a, a**2, torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2).long(), 0.1),
    ],
    "backward_coefficients": [
        lambda x, d, g, a: (None, a[0], a[0] ** 2, a[0], a[0], None, 1e-3, False),
        lambda x, d, g, a: (a[:, 0] ** 2, a, a**2, a, a, a[0].bfloat16(), 1e-3, True),
    ],
    "normalize_batch": [
        lambda x, d, g, a: (x.detach(), None, a[0].float(), 1e-3),
        lambda x, d, g, a: (x.detach(), a, None, 1e-3, g, 2),
    ],
    "normalize_and_track": [
        lambda x, d, g, a: (x.detach(), None, a[0], 1e-3, torch.zeros(3), torch.ones(3), torch.tensor(0), None),
        lambda x, d, g, a: (
            *(x.detach(), a, None, 1e-3),
            *(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2).long(), 0.1, g, 2),
        ),
    ],
    "backward_batch": [
        lambda x, d, g, a: (d.detach(), x.detach(), a[0, 0] ** 2, a[0], a[0] ** 2, None, 1e-3),
        lambda x, d, g, a: (d.detach(), x.detach(), a[:, 0] ** 2, a, a**2, a.float(), 1e-3, g),
    ],
    "backward_frozen": [
        lambda x, d, g, a: (d.detach(), x.detach(), a[0], a[0] ** 2, None, 1e-3),
        lambda x, d, g, a: (d.detach(), x.detach(), a, a**2, a.float(), 1e-3, g),
    ],
}
