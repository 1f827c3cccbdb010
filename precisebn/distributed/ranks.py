"""Ranks: those that work on one set of statistics, and the steps that they take together."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from precisebn._torch import group_store, group_timeout
from precisebn._version import __version__
from precisebn.distributed.groups import ProcessGroup, group_of, wire_device
from precisebn.distributed.steps import Steps
from precisebn.errors import InputError, RankFailedError

__all__ = ["Ranks", "Tally"]


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
        call: what every rank is to call, for messages; :meth:`agree` makes sure that all have called the same.

    Raises:
        InputError: a group that this process does not belong to, or that has no store.
    """

    def __init__(
        self,
        process_group: ProcessGroup | Literal[False] | None = None,
        *,
        let_through: Callable[[], AbstractContextManager[Any]] = nullcontext,
        call: str,
    ) -> None:
        self.group = group_of(process_group)
        self._call = call
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
                timeout_s=group_timeout(self.group, store), let_through=let_through, call=call,
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

    def agree(self, description: Mapping[str, object], advice: str = "") -> None:
        """The first step: make sure that all ranks are about to do the same, with the same version of this library.

        Args:
            description: what must be the same on all ranks, in words, by what it is of; the order counts too.
            advice: what to tell the user where it is not.

        Raises:
            InputError: on every rank, naming what differs.
            RankFailedError: another rank has failed.
        """
        if self._steps is None:
            return
        own = {
            "the call": self._call,
            "the version of precisebn": __version__,
            **{key: str(value) for key, value in description.items()},
        }
        difference = self._steps.take(own, _difference)
        if difference is not None:
            raise InputError(
                f"ranks chose different BatchNorm layers, or have different arguments or versions: {difference}. "
                + advice
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

    def gather(self, payload: object, combine: Callable[[list[Any]], Any]) -> Any:
        """A step at which every rank brings something small, and all get what one of them makes of it.

        It goes through the store, which takes some MiB from each rank.

        Args:
            payload: what this rank brings, made of what JSON knows.
            combine: makes one result of what all bring, in the order of the ranks.

        Raises:
            RankFailedError: another rank has failed.
        """
        if self._steps is None:
            return json.loads(json.dumps(combine([payload])))  # as it comes out of the store
        return self._steps.take(payload, combine)

    def broadcast(self, flat: Tensor, source: int) -> None:
        """Make a flat tensor what it is on one rank, bit for bit, in place, wherever it lives.

        Args:
            flat: of the same size and dtype on all ranks.
            source: the rank, as the group counts.

        Raises:
            RankFailedError: another rank has failed; or has ended meanwhile.
        """
        self._collective(
            flat, lambda tensor: dist.broadcast(tensor, group=self.group, group_src=source), "sending values to"
        )

    def all_reduce(self, flat: Tensor, operation: Literal["sum", "max"] = "sum") -> None:
        """Add a flat tensor up over all ranks, or take the maxima, in place, wherever it lives.

        Raises:
            RankFailedError: another rank has failed; or has ended while ranks were adding up.
        """

        def reduce(tensor: Tensor) -> None:  # not before: a torch without torch.distributed has no ReduceOp
            dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=self.group)

        self._collective(flat, reduce, "merging the statistics of")

    def _collective(self, flat: Tensor, collective: Callable[[Tensor], object], doing: str) -> None:
        """Run a collective of torch.distributed that writes into a tensor, when all ranks stand before it."""
        if self._steps is None:
            return
        on_wire = flat.to(wire_device(str(dist.get_backend_config(self.group)), flat.device, self.device))
        sizes = self._steps.take(f"{on_wire.numel()} of {on_wire.dtype}", _distinct)
        if len(sizes) > 1:
            raise InputError(f"ranks cannot merge statistics of different sizes: {', '.join(sizes)}")
        # All ranks stand here, and nothing that could fail lies between their saying so and this call.
        try:
            collective(on_wire)
        except Exception as error:
            raise RankFailedError(
                f"{doing} {self.size} ranks failed, as it does where a process has ended; this rank's model is as it "
                f"was: {error}"
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
