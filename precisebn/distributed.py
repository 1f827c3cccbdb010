"""Ranks: the only file that knows torch.distributed.

A run over several ranks is a row of steps, the same on every rank. All ranks take a step, or none does: that is decided
in the key-value store that every process group has, outside its collectives (:class:`Steps`). A rank that fails says so
in the store, where a notice can meet nothing else; and a collective is entered only when every rank stands before it
with a tensor of the same size. So a failure anywhere becomes an exception everywhere, never a hang, and the group stays
fit for use. The statistics themselves merge by all-reduces of one flat float64 buffer: memory does not grow with the
number of ranks, and all ranks end with the same bits. docs/design.md, "Ranks", has the protocol as a whole.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from precisebn._torch import group_store, group_timeout
from precisebn._version import __version__
from precisebn._warnings import warn
from precisebn.errors import InputError, RankFailedError, add_note

__all__ = ["ProcessGroup", "Ranks", "Steps", "Tally", "is_sharded", "reshard"]

_logger = logging.getLogger(__name__)

ProcessGroup = Any
"""``torch.distributed.ProcessGroup``, which not every build of torch has, or a DeviceMesh of one dimension."""

WAIT_WARNING_S = 30.0
"""A rank that has waited so long for others to begin says so."""

FAREWELL_S = 10.0
"""So long rank 0, whose process may keep the store, stays at the end until all others have read the last decision."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 2e-2
_CHECKS_A_SECOND = 20_000
"""What a store answers easily: the pauses of many ranks are longer, so that all of them together ask no more often."""

_ALONE = "waiting for the other ranks to call update_bn_stats; process_group=False updates this rank alone"


class Tally(NamedTuple):
    """What ranks tell each other of their data."""

    samples: int = 0
    """Samples seen so far."""
    levels: int = 0
    """Block sizes that the estimator keeps."""
    unfinished: int = 0
    """1 while there is data left."""


class Ranks(AbstractContextManager["Ranks"]):
    """The ranks that work on one set of statistics, from ``with`` to its end.

    Every rank makes the same calls in the same order. An exception that leaves the block on one rank is told to the
    others, whose next call raises RankFailedError; the rank itself waits for nobody. What :meth:`commit` has let pass
    is final on every rank.

    Args:
        process_group: None for the default group where torch.distributed is initialized, and this process alone
            otherwise; False for this process alone in any case; or a group that this process belongs to, also as a
            DeviceMesh of one dimension.
        let_through: gives the context in which this rank waits for others. With
            :meth:`precisebn.models.interrupts.HeldBack.let_through` Ctrl-C ends a wait, and interrupts nothing else.

    Raises:
        InputError: a group that this process does not belong to, or that has no store.
    """

    def __init__(
        self,
        process_group: ProcessGroup | Literal[False] | None = None,
        *,
        let_through: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.group = _group_of(process_group)
        self.device: torch.device | None = None
        """An accelerator of this rank, for backends that reduce nothing else; whoever knows the model sets it."""
        self.size, self.rank = 1, 0
        self._steps: Steps | None = None
        if self.group is None:
            return
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        if self.size > 1:
            from torch.distributed.distributed_c10d import PrefixStore  # not every build of torch has it

            store = group_store(self.group)
            if store is None:
                raise InputError(
                    f"the process_group of backend {dist.get_backend(self.group)!r} has no store, through which ranks "
                    "tell each other of failures; pass a group of gloo or nccl, or process_group=False"
                )
            self._steps = Steps(
                PrefixStore("precisebn", store), self.rank, self.size,
                timeout_s=group_timeout(self.group, store), let_through=let_through,
            )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._steps is None:
            return
        if error is not None:
            self._steps.fail(error)
        else:
            self._steps.leave()

    def agree(self, description: Mapping[str, object]) -> None:
        """The first step: make sure that all ranks are about to do the same, with the same version of this library.

        Args:
            description: what must be the same on all ranks, in words, by what it is of; the order counts too.

        Raises:
            InputError: on every rank, naming what differs.
            RankFailedError: another rank has failed.
        """
        if self._steps is None:
            return
        own = {"the version of precisebn": __version__, **{key: str(value) for key, value in description.items()}}
        difference = self._steps.take(own, _difference)
        if difference is not None:
            raise InputError(
                f"ranks chose different BatchNorm layers, or have different arguments or versions: {difference}. "
                "Every rank must pass the same model in the same mode, and the same estimator=, prior=, tolerance= "
                "and, with a tolerance, num_iters="
            )

    def tally(self, own: Tally) -> tuple[Tally, Tally]:
        """Tell the others what this rank has counted.

        Returns:
            The sum and the maximum of each number over the ranks.

        Raises:
            RankFailedError: another rank has failed.
        """
        if self._steps is None:
            return own, own
        total, most = self._steps.take(own, _sums_and_maxima)
        return Tally(*total), Tally(*most)

    def all_reduce(self, flat: Tensor, operation: Literal["sum", "max"] = "sum") -> None:
        """Add a flat tensor up over all ranks, or take the maxima, in place, wherever it lives.

        Raises:
            RankFailedError: another rank has failed; or has ended while ranks were adding up.
        """
        if self._steps is None:
            return
        on_wire = flat.to(_wire_device(str(dist.get_backend_config(self.group)), flat.device, self.device))
        sizes = self._steps.take(f"{on_wire.numel()} of {on_wire.dtype}", _distinct)
        if len(sizes) > 1:
            raise InputError(f"ranks cannot merge statistics of different sizes: {', '.join(sizes)}")
        # All ranks stand here, and nothing that could fail lies between their saying so and this call.
        try:
            dist.all_reduce(on_wire, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=self.group)
        except Exception as error:
            raise RankFailedError(
                f"merging the statistics of {self.size} ranks failed, as it does where a process has ended; this "
                f"rank's model is as it was: {error}"
            ) from error
        if on_wire is not flat:
            flat.copy_(on_wire)

    def commit(self) -> None:
        """The last step, for when this rank has made its changes and can still undo them: all ranks keep theirs.

        Raises:
            RankFailedError: another rank has failed, so this one must undo its changes.
        """
        if self._steps is not None:
            self._steps.take(None, _nothing)


class Steps:
    """A row of steps, each of which all ranks take or none: decided in a key-value store, outside of collectives.

    For each step every rank puts its payload into the store and counts itself; the last to come makes of all payloads
    one result, and writes: go. A rank that fails, or has waited for too long, writes instead who failed and why. The
    first to write stands (``compare_set``), and that decision is what every rank reads. So a notice of failure comes
    before a step or after it, never into it: what fails while it waits and is told "go" takes the step with the others
    and fails before the next one.

    The n-th run of each rank belongs together: every rank counts its runs, in the store as well.

    Args:
        store: a ``torch.distributed.Store`` that all ranks share.
        rank: this one.
        size: how many there are.
        timeout_s: how long to wait for a rank.
        let_through: the context to wait in: an interrupt may come in it.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        let_through: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._timeout_s = timeout_s
        self._let_through = let_through
        self._longest_pause_s = max(_LONGEST_PAUSE_S, size / _CHECKS_A_SECOND)
        self._step = 0
        self._late: BaseException | None = None
        """What was raised in a wait for a step that all ranks were taking already."""
        try:
            self._run: int = store.add(f"runs/{rank}", 1)
        except dist.DistError as error:
            raise self._store_lost() from error

    def take(self, payload: object, combine: Callable[[list[Any]], Any]) -> Any:
        """Wait until all ranks are here.

        Args:
            payload: what this rank brings, made of what JSON knows.
            combine: makes one result of the payloads of all ranks, in their order. Runs on one of them.

        Returns:
            The result, the same on all ranks.

        Raises:
            RankFailedError: a rank has failed, has not come in time, or the process has ended that keeps the store.
        """
        self._raise_late()
        try:
            decision = self._come(payload, combine)
        except dist.DistError as error:
            raise self._store_lost() from error
        except BaseException as error:
            # Unless all others have come in the meantime: then they go on, and this rank with them.
            decision = {}
            with suppress(dist.DistError):
                decision = self._decide(self._notice_of(error))
            if "go" not in decision:
                raise
            self._late = error
        if "go" not in decision:
            raise self._failure(decision)
        self._step += 1
        return decision["go"]

    def fail(self, error: BaseException) -> None:
        """Let the others know, at the next step that they come to, that this rank is about to raise."""
        _logger.info("rank %d of %d failed (%r); telling the others", self._rank, self._size, error)
        try:
            while "go" in self._decide(self._notice_of(error)):
                self._step += 1
        except Exception:  # the store is gone, and the others notice that; the failure itself matters more
            _logger.warning("rank %d could not tell the other ranks of its failure", self._rank)

    def leave(self) -> None:
        """After the last step: nothing that happens to another rank concerns this one any more.

        The process of rank 0 may keep the store, and may end now; so it stays until all have read the decision.
        """
        with suppress(dist.DistError):
            self._store.add(f"{self._run}/left", 1)
            deadline, pause = time.monotonic() + FAREWELL_S, _SHORTEST_PAUSE_S
            while self._rank == 0 and time.monotonic() < deadline:
                if self._store.add(f"{self._run}/left", 0) == self._size:
                    self._sweep(self._step - 1)
                    self._store.delete_key(f"{self._run}/left")
                    break
                time.sleep(pause)
                pause = min(2.0 * pause, _LONGEST_PAUSE_S)
        self._raise_late()

    def _come(self, payload: object, combine: Callable[[list[Any]], Any]) -> dict[str, Any]:
        """Bring a payload to the step; the last to come decides, the others wait for that."""
        self._store.set(self._key(self._rank), json.dumps(payload))
        if self._store.add(self._key("here"), 1) < self._size:
            return self._wait()
        payloads = self._store.multi_get([self._key(rank) for rank in range(self._size)])
        decision = self._decide({"go": combine([json.loads(text) for text in payloads])})
        if self._step > 0:  # whoever is here has read what was decided before
            self._sweep(self._step - 1)
        return decision

    def _wait(self) -> dict[str, Any]:
        """Wait for the decision, asking with pauses: a blocking wait would keep Ctrl-C and others from the store."""
        start, pause, quiet = time.monotonic(), _SHORTEST_PAUSE_S, self._step == 0
        while not self._store.check([self._key("decision")]):
            waited = time.monotonic() - start
            if waited > self._timeout_s and (missing := self._missing()):
                return self._decide({"missing": missing})
            if waited > self._timeout_s + FAREWELL_S:  # the last to come has ended while it decided
                return self._decide({"missing": list(range(self._size))})
            if quiet and waited > WAIT_WARNING_S:
                quiet = False
                names = ", ".join(map(str, self._missing()))
                warn(f"{_ALONE} (not here after {waited:.0f} s: rank(s) {names} of {self._size})")
            with self._let_through():
                time.sleep(pause)
            pause = min(2.0 * pause, self._longest_pause_s)
        decision: dict[str, Any] = json.loads(self._store.get(self._key("decision")))
        return decision

    def _decide(self, proposal: dict[str, Any]) -> dict[str, Any]:
        """What is decided for this step: the proposal, unless another was there before it."""
        decision: dict[str, Any] = json.loads(self._store.compare_set(self._key("decision"), "", json.dumps(proposal)))
        return decision

    def _notice_of(self, error: BaseException) -> dict[str, Any]:
        return {"failed": self._rank, "error": f"{type(error).__name__}: {error}"[:1000].rstrip(": ")}

    def _missing(self) -> list[int]:
        """The ranks that have not come to this step."""
        return [rank for rank in range(self._size) if not self._store.check([self._key(rank)])]

    def _failure(self, decision: dict[str, Any]) -> RankFailedError:
        outcome = "so this rank stopped too and its model is as it was"
        if "missing" not in decision:
            return RankFailedError(
                f"rank(s) {decision['failed']} of {self._size} failed, {outcome}; the traceback of the failed rank "
                f"says why: {decision['error']}"
            )
        names = ", ".join(map(str, decision["missing"]))
        error = RankFailedError(
            f"rank(s) {names} of {self._size} did not come in the {self._timeout_s:g} s that ranks wait, {outcome}"
        )
        if self._step == 0:
            add_note(error, _ALONE)
        return error

    def _store_lost(self) -> RankFailedError:
        return RankFailedError(
            f"rank {self._rank} of {self._size} cannot reach the store of its process group: the process that keeps "
            "it, rank 0 as a rule, has ended; this rank's model is as it was"
        )

    def _raise_late(self) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            raise late

    def _sweep(self, step: int) -> None:
        """Remove what a step has left in the store, once every rank has read its decision."""
        for name in ("here", "decision", *range(self._size)):
            self._store.delete_key(f"{self._run}/{step}/{name}")

    def _key(self, name: str | int) -> str:
        return f"{self._run}/{self._step}/{name}"


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is this rank's part of one that ranks share; none is before torch's module for it is there."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reshard(modules: Iterable[torch.nn.Module]) -> None:
    """Let FSDP (``fully_shard``) free the whole parameters that a forward without a backward has left in place.

    They come and go as it needs them; the sharded ones are what a model has, and what a picture of it shows.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()


def _group_of(process_group: ProcessGroup | Literal[False] | None) -> ProcessGroup:
    """The group itself, None for this process alone."""
    if process_group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is None:
            return None
        raise InputError("process_group was given, but torch.distributed is not initialized: init_process_group")
    from torch.distributed.device_mesh import DeviceMesh  # not every build of torch has it

    group = dist.group.WORLD if process_group is None else process_group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(f"process_group is a DeviceMesh of {group.ndim} dimensions; pass one of them: mesh['dp']")
        group = None if group.get_coordinate() is None else group.get_group()
    if group is None or dist.get_rank(group) < 0:
        raise InputError("this rank does not belong to the process_group it was given; call only on its members")
    return group


def _wire_device(config: str, device: torch.device, accelerator: torch.device | None) -> torch.device:
    """Where a backend can reduce: on the tensor's own device if it can, else what the backend works on.

    Args:
        config: the backend of each type of device, such as ``"cpu:gloo,cuda:nccl"``.
        device: of the tensor.
        accelerator: of the model.
    """
    types = [entry.partition(":")[0] for entry in config.split(",")]
    if device.type in types:
        return device
    if "cpu" in types:
        return torch.device("cpu")
    if accelerator is not None and accelerator.type in types:
        return accelerator
    return torch.device(types[0])  # the current one of its kind


def _difference(descriptions: list[dict[str, str]]) -> str | None:
    """The first few points in which the first rank that differs from rank 0 does so; None if none does."""
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        if list(other.items()) == list(first.items()):
            continue
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        points = [
            f"{key} is {first.get(key, 'not there')} on rank 0, but {other.get(key, 'not there')} on rank {rank}"
            for key in keys[:3]
        ]
        more = [f"and {len(keys) - 3} more"] if len(keys) > 3 else []
        return "; ".join(points + more) or f"their order is another on rank 0 than on rank {rank}"
    return None


def _sums_and_maxima(rows: list[list[int]]) -> list[list[int]]:
    columns = list(zip(*rows, strict=True))
    return [[sum(column) for column in columns], [max(column) for column in columns]]


def _distinct(payloads: list[str]) -> list[str]:
    return sorted(set(payloads))


def _nothing(payloads: list[None]) -> None:
    return None
