"""Ranks: the only file that calls torch.distributed.

A run over several ranks has a few sync points, the same number on every rank. Each begins with one small all-reduce in
which every rank says whether it has failed, so that a failure anywhere becomes an exception everywhere, never a hang;
then the statistics merge by two all-reduces of one flat float64 buffer each, so that memory does not grow with the
number of ranks and all ranks end with the same bits.
"""

import logging
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from precisebn.errors import InputError, RankFailedError

__all__ = ["ProcessGroup", "Ranks", "Tally"]

_logger = logging.getLogger(__name__)

ProcessGroup = Any
"""``torch.distributed.ProcessGroup``, which not every build of torch has."""


class Tally(NamedTuple):
    """What ranks tell each other at a sync point."""

    layers: int = 0
    """BatchNorm layers chosen."""
    channels: int = 0
    """Their channels."""
    fingerprint: int = 0
    """A checksum of what must be the same on all ranks, below 2^32 so that sums of it are exact in float64."""
    samples: int = 0
    """Samples seen so far."""
    levels: int = 0
    """Block sizes that the estimator keeps."""
    unfinished: int = 0
    """1 while there is data left."""


class Ranks:
    """The ranks that work on one set of statistics.

    Args:
        process_group: None for the default group where torch.distributed is initialized, and this process alone
            otherwise; False for this process alone in any case; or a group that this process belongs to.

    Raises:
        InputError: a group that this process does not belong to.
    """

    def __init__(self, process_group: ProcessGroup | Literal[False] | None = None) -> None:
        available = dist.is_available() and dist.is_initialized()
        if process_group not in (None, False) and not available:
            raise InputError("process_group was given, but torch.distributed is not initialized: init_process_group")
        self.group: ProcessGroup = None
        self.device: torch.device | None = None
        """An accelerator of this rank, for backends that reduce nothing else; whoever knows the model sets it."""
        self.size, self.rank = 1, 0
        if process_group is False or not available:
            return
        self.group = dist.group.WORLD if process_group is None else process_group
        if dist.get_rank(self.group) < 0:
            raise InputError("this rank does not belong to the process_group it was given; call only on its members")
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def all_reduce(self, flat: Tensor) -> None:
        """Add a flat tensor up over all ranks, in place, wherever it lives."""
        if self.size == 1:
            return
        on_wire = flat.to(self._wire_device(flat.device))
        dist.all_reduce(on_wire, group=self.group)
        if on_wire is not flat:
            flat.copy_(on_wire)

    def meet(self, tally: Tally, *, failed: bool = False) -> tuple[Tally, Tally]:
        """A sync point: learn whether any rank has failed, and what the ranks have counted.

        Args:
            tally: what this rank has counted.
            failed: this rank is about to raise. It calls this all the same, once, so that the others learn of it.

        Returns:
            The sum and the maximum of each number over the ranks.

        Raises:
            RankFailedError: another rank has failed.
        """
        if self.size == 1:
            return tally, tally
        # Every rank fills its own row, so that one sum tells every rank everything.
        table = torch.zeros(self.size, 1 + len(tally), dtype=torch.float64)
        table[self.rank] = torch.tensor([float(failed), *map(float, tally)], dtype=torch.float64)
        self.all_reduce(table)
        failures = [rank for rank, flag in enumerate(table[:, 0].tolist()) if flag]
        if failures and not failed:
            raise RankFailedError(
                f"rank(s) {', '.join(map(str, failures))} of {self.size} failed, so this rank stopped too and its "
                "model is as it was; the traceback of the failed rank says why"
            )
        numbers = table[:, 1:]
        return Tally(*map(int, numbers.sum(0).tolist())), Tally(*map(int, numbers.amax(0).tolist()))

    def tell_failure(self) -> None:
        """Let the other ranks, which wait at their next sync point, know that this one is about to raise."""
        if self.size == 1:
            return
        _logger.exception("rank %d of %d failed; telling the others", self.rank, self.size)
        try:
            self.meet(Tally(), failed=True)
        except Exception:  # they are gone, or too slow for the group's timeout: the failure itself matters more
            _logger.warning("rank %d could not tell the other ranks of its failure", self.rank)

    def _wire_device(self, device: torch.device) -> torch.device:
        """Where the backend can reduce: the tensor's own device if it can, else what the backend works on."""
        backends = str(dist.get_backend_config(self.group))
        if f"{device.type}:" in backends:
            return device
        if "cpu:" in backends or self.device is None:
            return torch.device("cpu")
        return self.device
