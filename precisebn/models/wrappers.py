"""What stands around a model or runs it in another form, set aside for as long as the model runs for itself."""

import sys
import threading
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from precisebn._torch import join_disabled
from precisebn.models.transaction import Transaction

__all__ = ["run_eagerly", "set_wrappers_aside"]


def set_wrappers_aside(modules: list[nn.Module], changes: Transaction) -> None:
    """Keep data-parallel wrappers from touching buffers, until the changes are undone.

    DDP would broadcast rank 0's over everyone's at every forward, and hang where ranks have different numbers of
    mini-batches; after ``with ddp.join()`` it goes on to expect other ranks in every forward. DataParallel would run
    replicas, whose buffers are copies.
    """
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            changes.put(vars(module), "require_forward_param_sync", False)
            for name, value in join_disabled().items():
                changes.put(vars(module), name, value)
        elif isinstance(module, DataParallel):
            changes.put(vars(module), "device_ids", [])


def run_eagerly(changes: Transaction) -> None:
    """Run torch.compile'd code eagerly, where forwards are those of the modules; its compiled form stays for later.

    The stance of the compiler is one for the whole process, so that it is taken by the first thread that asks and given
    back by the last. Nothing can have been compiled before torch._dynamo is imported, and importing it takes seconds.
    """
    if "torch._dynamo" in sys.modules:
        user = object()
        changes.on_undo(_stance.leave, user)
        _stance.take(user)


class _EagerStance:
    """``torch.compiler.set_stance("force_eager")`` for as long as anyone needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[object] = set()
        self._stance: Any = None

    def take(self, user: object) -> None:
        with self._lock:
            if not self._users:
                self._stance = torch.compiler.set_stance("force_eager")  # from now on; and it knows what was before
            self._users.add(user)

    def leave(self, user: object) -> None:
        with self._lock:
            if user in self._users:
                self._users.remove(user)
                if not self._users:
                    self._stance.__exit__(None, None, None)


_stance = _EagerStance()
