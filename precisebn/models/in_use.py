"""Which modules something is at work on that stands in their forwards: nothing else of the kind may begin meanwhile.

Two recalibrations at a time, of two threads or one inside the other, would take each other's scratch buffers for the
layer's own.
"""

import threading
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from precisebn.errors import InputError

__all__ = ["check_free", "claim", "release", "why_not_free"]


class _Claim(NamedTuple):
    owner: object
    doing: str


_lock = threading.Lock()
_claims: dict[nn.Module, _Claim] = {}


def claim(owner: object, modules: Iterable[nn.Module], *, name: str, doing: str) -> None:
    """Claim modules until :func:`release`.

    Args:
        owner: who claims them.
        modules: all of them, or none if one is not free.
        name: what they are, for the message of who comes too late.
        doing: what is done with them and what to do instead, for the message of who comes later.

    Raises:
        InputError: one of them is claimed already.
    """
    modules = list(modules)
    with _lock:
        for module in modules:
            if module in _claims:
                raise InputError(f"{name}, or a part of it, {_claims[module].doing}")
        _claims.update(dict.fromkeys(modules, _Claim(owner, doing)))


def why_not_free(module: nn.Module) -> str | None:
    """What is done with a module, for messages; None where nothing is."""
    held = _claims.get(module)  # without the lock, which an interrupt may leave locked where it is not held back
    return None if held is None else held.doing


def check_free(model: nn.Module) -> None:
    """Raise where something stands in the forwards of a model, whose statistics are then not its own.

    Raises:
        InputError: it is so.
    """
    doing = next(filter(None, map(why_not_free, model.modules())), None)
    if doing is not None:
        raise InputError(f"{type(model).__name__}, or a part of it, {doing}")


def release(owner: object) -> None:
    """Give back what an owner has claimed, if anything."""
    with _lock:
        for module in [module for module, held in _claims.items() if held.owner is owner]:
            del _claims[module]
