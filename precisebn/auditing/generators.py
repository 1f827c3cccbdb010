"""Random generators that a model holds in its attributes: torch's, Python's and NumPy's; not those of everybody."""

import random
import sys
from typing import Any

import torch

from precisebn.auditing.reach import objects_held

__all__ = ["generators_in", "state_of"]


def generators_in(value: object) -> list[Any]:
    """Random generators that a value is or holds, but for the global ones."""
    numpy_random = sys.modules.get("numpy.random")  # where it was never imported, nobody has one
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    everybodys: list[object] = [torch.default_generator, *torch.cuda.default_generators]
    if numpy_random is not None:
        kinds += (numpy_random.Generator, numpy_random.RandomState)
        everybodys.append(getattr(numpy_random.mtrand, "_rand", None))
    return [held for held in objects_held(value) if isinstance(held, kinds) and all(held is not g for g in everybodys)]


def state_of(generator: Any) -> object:
    """Its state, in what can be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    # NumPy's. Not its pickle, which has the seed as well, and a deep copy has another (numpy issue 27727).
    return _plain(generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state())


def _plain(state: Any) -> object:
    """A state with lists in the place of arrays, which are neither equal nor not."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return [_plain(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state
