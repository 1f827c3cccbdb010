"""Random generators that a model holds in its attributes: torch's, Python's and NumPy's; not those of everybody."""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from precisebn.auditing.reach import objects_held

__all__ = ["generators_in", "setter_and_state", "state_of"]


def generators_in(value: object) -> list[Any]:
    """Random generators that a value is or holds, but for the global ones."""
    numpy_random = sys.modules.get("numpy.random")  # where it was never imported, nobody has one
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    everybodys: list[object] = [torch.default_generator, *torch.cuda.default_generators]
    if numpy_random is not None:
        kinds += (numpy_random.Generator, numpy_random.RandomState)
        everybodys.append(getattr(numpy_random.mtrand, "_rand", None))
    return [held for held in objects_held(value) if isinstance(held, kinds) and all(held is not g for g in everybodys)]


def setter_and_state(one: object) -> tuple[Callable[[Any], object], Any] | None:
    """How to set the state of a random generator, and the state; None for anything else, or where it has none."""
    if isinstance(one, torch.Generator):
        return one.set_state, one.get_state()
    if isinstance(one, random.Random):
        return None if isinstance(one, random.SystemRandom) else (one.setstate, one.getstate())
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None and isinstance(one, numpy_random.RandomState):
        return one.set_state, one.get_state()
    if numpy_random is not None and isinstance(one, numpy_random.Generator):
        # Not its pickle, which has the seed as well, and a deep copy has another (numpy issue 27727).
        bits = one.bit_generator
        return (lambda state: setattr(bits, "state", state)), bits.state
    return None


def state_of(generator: object) -> object:
    """The state of a random generator, in what can be compared."""
    found = setter_and_state(generator)
    return None if found is None else _plain(found[1])


def _plain(state: Any) -> object:
    """A state with lists in the place of tensors and arrays, which are neither equal nor not."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return [_plain(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state
