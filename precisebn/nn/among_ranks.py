"""What modules share that work among the ranks of a process group."""

from typing import Any, Literal

from torch import nn

from precisebn.distributed import ProcessGroup
from precisebn.distributed.groups import Carried

__all__ = ["AmongRanks"]


class AmongRanks(nn.Module):
    """Mix-in, named before the class that it is mixed with: copies and pickles of a module with a process group.

    A process group can be neither copied nor pickled. A deep copy of the module has the same one; an unpickled module
    has lost it, and says so where it would need it.
    """

    process_group: ProcessGroup | Literal[False] | None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "process_group": Carried(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "process_group": state["process_group"].group})  # type: ignore[no-untyped-call]
