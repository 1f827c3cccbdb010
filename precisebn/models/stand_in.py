"""StandIn: what runs for a while in the place of a layer's forward, on the instance.

The forward of the instance is the one place that sees what hooks have made of the input, and that nothing goes past.
Copies of the layer that are made meanwhile, by deepcopy or pickle, have the layer's own forward and buffers.

A layer has one set of buffers and one mode, whoever runs it. So forwards of several threads come one after the other,
and the stand-in is taken out when the one under way has ended: what a forward has put aside it puts back before.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from precisebn.models.transaction import Transaction

__all__ = ["StandIn"]


class StandIn:
    """Takes the place of ``module.forward`` on the instance; to be given ``run``.

    Args:
        module: the layer.
        scratch: what lies in the place of some of its buffers meanwhile, by name.

    Attributes:
        original: the forward in whose place this runs.
        own: the buffers in whose place the scratch buffers lie.
        is_in_place: whether it is this that runs.
    """

    __slots__ = ("_lock", "is_in_place", "is_of_the_instance", "module", "original", "own", "scratch")

    def __init__(self, module: nn.Module, scratch: Mapping[str, Tensor]) -> None:
        self.module = module
        self.scratch = scratch
        self.original: Callable[..., Any] = module.forward
        self.is_of_the_instance = "forward" in vars(module)  # put there by a user, or by a library such as accelerate
        self.own = {name: buffer for name in scratch if (buffer := module._buffers[name]) is not None}
        self.is_in_place = False
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run, alone; or, where the call came too late, what stands there now."""
        with self.alone():
            if self.is_in_place:
                return self.run(*args, **kwargs)
        now: Any = vars(self.module).get("forward")
        return (now if isinstance(getattr(now, "__self__", None), StandIn) else self.original)(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in the place of the forward."""
        raise NotImplementedError

    def alone(self) -> AbstractContextManager[object]:
        """A block for one thread at a time; a graph of torch.compile has no locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def put(self, changes: Transaction) -> None:
        """From now on run in the place of the forward."""
        # A bound method: of other callables torch.compile takes each one for another, and would compile for every one.
        entries = {"forward": self.__call__, "__deepcopy__": self._deepcopy, "__reduce_ex__": self._reduce}
        own = Transaction()
        changes.on_undo(self.take_out, own)
        with self.alone():
            self.is_in_place = True
            own.update(vars(self.module), entries)
            own.update(self.module._buffers, self.scratch)

    def take_out(self, changes: Transaction) -> None:
        """Undo what :meth:`put` has changed, when the forward under way has ended; later ones are not of this."""
        with self.alone():
            self.is_in_place = False
            changes.undo()

    def _deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        with self._taken_out():
            return copy.deepcopy(self.module, memo)

    def _reduce(self, protocol: Any) -> Any:
        """For pickle, torch.save and multiprocessing."""
        with self._taken_out():
            reduced = self.module.__reduce_ex__(protocol)
            return tuple(self._kept(part) for part in reduced)

    def _kept(self, part: Any) -> Any:
        """A part of what is pickled, with what is taken out now and will have been put in again by then."""
        if not isinstance(part, dict) or part.get("_buffers") is not self.module._buffers:
            return part
        return {**part, "_buffers": self.module._buffers.copy()}

    @contextmanager
    def _taken_out(self) -> Iterator[None]:
        with self.alone():
            changes = Transaction()
            try:
                if self.is_in_place:
                    self._step_aside(changes)
                yield
            finally:
                changes.undo()

    def _step_aside(self, changes: Transaction) -> None:
        for name in ("forward", "__deepcopy__", "__reduce_ex__"):
            changes.on_undo(vars(self.module).__setitem__, name, vars(self.module).pop(name))
        if self.is_of_the_instance:
            vars(self.module)["forward"] = self.original
        for name, buffer in self.own.items():
            changes.put(self.module._buffers, name, buffer)
