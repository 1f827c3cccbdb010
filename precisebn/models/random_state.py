"""RandomState: the states of all random generators that a step of training draws from."""

import random
import sys
from typing import Any

import torch

__all__ = ["RandomState"]


class RandomState:
    """The states of Python's, NumPy's and torch's global generators, on all devices in use, to put back.

    Example:
        >>> before = RandomState()
        >>> first = torch.rand(2)
        >>> before.put_back()
        >>> torch.equal(torch.rand(2), first)
        True
    """

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._numpy: Any = _numpy_random().get_state() if _numpy_random() else None

    def put_back(self) -> None:
        """Let every generator go on from where it was."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._numpy is not None:
            _numpy_random().set_state(self._numpy)


def _numpy_random() -> Any:
    """``numpy.random``, where it has been imported; nobody has drawn from it otherwise."""
    return sys.modules.get("numpy.random")
