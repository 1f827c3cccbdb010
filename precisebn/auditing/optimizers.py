"""Optimizers as they are given to an audit: one, several, or none; also in the wrappers of other libraries."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from precisebn.errors import InputError

__all__ = ["Optimizers", "checked_optimizers", "optimizers_of"]

Optimizers = Optimizer | Sequence[Optimizer] | None
"""What trains a model; several, where several do."""


def optimizers_of(given: Optimizers) -> tuple[Any, ...]:
    """Each of them, by what it has: wrappers (Accelerate's, apex's) need not be an Optimizer."""
    if given is None:
        return ()
    return (given,) if hasattr(given, "param_groups") else tuple(given)


def checked_optimizers(argument: str, given: Optimizers) -> Optimizers:
    """What was given, if it is one, several or none.

    Raises:
        InputError: something else.
    """
    if given is None or hasattr(given, "param_groups"):
        return given
    several = tuple(given) if isinstance(given, Iterable) else ()
    if not several or not all(hasattr(one, "param_groups") for one in several):
        raise InputError(f"{argument} must be an optimizer, or several in a list, not {type(given).__name__}")
    return several
