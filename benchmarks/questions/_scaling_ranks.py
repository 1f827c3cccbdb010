"""What each process of :mod:`benchmarks.questions.scaling` does, and what it watches: times, bytes, requests, memory.

The processes are started once, and work in groups of 1, 2, 4, ... of them while the others sleep. Of every subject
three things are timed in turns: the whole; each rank by itself, at the same time, so that cores are shared as in the
whole; and the communication alone, from the moment when all ranks are there.
"""

import contextlib
import datetime
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.timing import interleave, peak_bytes
from benchmarks.questions._scaling_model import numbers_of_a_recalibration
from precisebn import update_bn_stats
from precisebn.distributed import Ranks, Tally
from precisebn.distributed.collectives import sum_over_ranks
from precisebn.distributed.steps import Steps
from precisebn.nn import ShuffleBN, SyncBN

__all__ = ["Plan", "run_rank"]

LAYERS, BATCHES = 20, 16
"""Of the model that is recalibrated, and of its data: so few mini-batches that communication shows."""

SENT_CALLS = 3
"""Over which bytes are counted."""

LONGEST_WAIT = datetime.timedelta(minutes=20)
"""Of ranks that are not in a group, until those in it have done."""

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        worlds: numbers of ranks, the largest last: as many processes there are.
        sizes: of each subject, channels of a layer (numbers of a sample for ShuffleBN).
        rounds: of each measurement.
        virtual: numbers of ranks that are threads, for the steps in the store.
        seconds: of asking the store as often as possible.
    """

    worlds: Sequence[int]
    sizes: dict[str, Sequence[int]]
    rounds: int
    virtual: Sequence[int]
    seconds: float


@dataclass
class Log:
    """What ranks have done for each other."""

    seconds: float = 0.0
    """Of waits and collectives, each from when all ranks stood before it."""
    numbers: int = 0
    """That were added up over ranks."""
    requests: int = 0
    """To the key-value store."""


def run_rank(rank: int, port: int, folder: str, plan: Plan) -> None:
    """What each process does: the same measurements in the same order; what it finds is written to a file."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=LONGEST_WAIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.worlds[-1], timeout=LONGEST_WAIT)
    found: list[dict[str, Any]] = []
    for world in plan.worlds:
        group = dist.new_group(list(range(world)), backend="gloo", timeout=LONGEST_WAIT)
        if rank < world:
            for what, sizes in plan.sizes.items():
                found += [_measure(SUBJECTS[what](size, group), what, size, group, port, plan) for size in sizes]
            found.append(_ask_the_store(store, group, plan.seconds))
        dist.barrier()
    if rank == 0:
        found += [_steps_of_threads(number, port) for number in plan.virtual]
    dist.barrier()
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- The subjects ---------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """Three ways to call a thing: the whole, a rank by itself, and the communication, of which it returns the seconds.

    Attributes:
        numbers: float64 numbers that are added up over ranks in one call; None where samples travel.
        moved: bytes that a rank sends in one call; of a ring, where numbers are added up.
    """

    whole: Callable[[], Any]
    alone: Callable[[], Any]
    communication: Callable[[], float]
    numbers: int | None
    moved: float
    log: Log = field(default_factory=Log)


def _recalibration(size: int, group: Any) -> Subject:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(*(nn.BatchNorm1d(size) for _ in range(LAYERS)))
    data = [torch.randn(16, size) for _ in range(BATCHES)]
    log = Log()

    def recalibrate(process_group: Any) -> None:
        update_bn_stats(model, data, len(data), process_group=process_group)

    def communication() -> float:
        before = log.seconds
        with _watched(log):
            recalibrate(group)
        return log.seconds - before

    numbers = numbers_of_a_recalibration(LAYERS, LAYERS * size, BATCHES)
    return Subject(
        lambda: recalibrate(group), lambda: recalibrate(False), communication, numbers, _of_a_ring(numbers, group), log
    )


def _sync_bn(size: int, group: Any) -> Subject:
    torch.manual_seed(dist.get_rank())
    layers = {True: SyncBN(size, process_group=group), False: SyncBN(size, process_group=False)}
    x = torch.randn(8, size, 7, 7, requires_grad=True)
    dy = torch.randn_like(x)
    forward, backward = (torch.zeros(n, dtype=torch.float64) for n in (2 * size + 1, 2 * size))

    def step(together: bool) -> None:
        layer = layers[together]
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    def communication() -> float:
        if dist.get_world_size(group) == 1:
            return 0.0
        dist.barrier(group)
        start = time.perf_counter()
        for buffer in (forward, backward):
            sum_over_ranks(buffer, group.group_name)
        return time.perf_counter() - start

    numbers = 4 * size + 1
    return Subject(lambda: step(True), lambda: step(False), communication, numbers, _of_a_ring(numbers, group))


def _shuffle_bn(size: int, group: Any) -> Subject:
    torch.manual_seed(dist.get_rank())
    head = nn.BatchNorm1d(size)
    around, nothing = ShuffleBN(head, process_group=group), ShuffleBN(nn.Identity(), process_group=group)
    x = torch.randn(64, size, requires_grad=True)
    dy = torch.randn_like(x)

    def step(layer: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(layer(x), x, dy)

    def communication() -> float:
        if dist.get_world_size(group) == 1:
            return 0.0
        dist.barrier(group)
        start = time.perf_counter()
        step(nothing)
        return time.perf_counter() - start

    world = dist.get_world_size(group)
    moved = 4 * x.nbytes * (world - 1) / world  # there and back, forward and backward; of what changes ranks
    return Subject(lambda: step(around), lambda: step(head), communication, None, moved)


SUBJECTS: dict[str, Callable[[int, Any], Subject]] = {
    "update_bn_stats": _recalibration,
    "SyncBN": _sync_bn,
    "ShuffleBN": _shuffle_bn,
}


def _of_a_ring(numbers: int, group: Any) -> float:
    """Bytes that a rank sends in a ring all-reduce of float64 numbers: every other rank's share, twice."""
    world = dist.get_world_size(group)
    return 8 * numbers * 2 * (world - 1) / world


# ---- Measuring ------------------------------------------------------------------------------------------------------


def _measure(subject: Subject, what: str, size: int, group: Any, port: int, plan: Plan) -> dict[str, Any]:
    """One row of this rank."""
    calls = {
        "whole": _timed(subject.whole, group),
        "alone": _timed(subject.alone, group),
        "communication": subject.communication,
    }
    times = interleave(calls, plan.rounds)
    watched = plan.rounds + 1  # with the one for warming up
    if subject.log.numbers not in (0, watched * (subject.numbers or 0)):
        raise ArithmeticError(f"{what}: {subject.log.numbers / watched} numbers are added up, not {subject.numbers}")
    before = _bytes_sent(port)
    for _ in range(SENT_CALLS):
        subject.whole()
    sent = [(now - then) / SENT_CALLS for now, then in zip(_bytes_sent(port), before, strict=True)]
    row = {"what": what, "ranks": dist.get_world_size(group), "size": size, "times": times, "moved": subject.moved}
    row |= {"sent": sent[0], "to the store": sent[1], "requests": subject.log.requests / watched}
    if size == plan.sizes[what][-1]:
        row["tensors"] = peak_bytes(subject.whole, (), "cpu")
        row["process"] = _high_water_mark(subject.whole)
    return row


def _timed(work: Callable[[], Any], group: Any) -> Callable[[], float]:
    def once() -> float:
        dist.barrier(group)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return once


class _WatchedRanks(Ranks):
    """Ranks that note how long they are kept, from when all stand before a step: not how late the others are."""

    log: Log

    def agree(self, description: Mapping[str, object], advice: str = "") -> None:
        self._timed(lambda: super(_WatchedRanks, self).agree(description, advice))

    def tally(self, own: Tally) -> tuple[Tally, Tally]:
        return self._timed(lambda: super(_WatchedRanks, self).tally(own))

    def all_reduce(self, flat: Tensor, operation: Any = "sum") -> None:
        if self.size > 1:
            self.log.numbers += flat.numel()
        self._timed(lambda: super(_WatchedRanks, self).all_reduce(flat, operation))

    def commit(self) -> None:
        self._timed(lambda: super(_WatchedRanks, self).commit())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timed(lambda: super(_WatchedRanks, self).__exit__(kind, error, traceback))

    def _timed(self, call: Callable[[], T]) -> T:
        if self.size == 1:
            return call()
        dist.barrier(self.group)
        start = time.perf_counter()
        result = call()
        self.log.seconds += time.perf_counter() - start
        return result


class _CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self, store: Any, log: Log) -> None:
        self._store, self._log = store, log

    def __getattr__(self, name: str) -> Any:
        self._log.requests += 1
        return getattr(self._store, name)


@contextlib.contextmanager
def _watched(log: Log) -> Iterator[None]:
    """Recalibrations in it write into the log."""

    def counting(store: Any, *args: Any, **kwargs: Any) -> Steps:
        return Steps(_CountingStore(store, log), *args, **kwargs)

    watched = type("Watched", (_WatchedRanks,), {"log": log})
    with (
        mock.patch("precisebn.recalibration.update.Ranks", watched),
        mock.patch("precisebn.distributed.ranks.Steps", counting),
    ):
        yield


def _bytes_sent(port: int) -> tuple[int, int]:
    """What this process has sent so far over TCP, as the system counts it: to other ranks, and to the store.

    ``tcpi_bytes_sent`` of Linux' ``struct tcp_info``, 200 bytes into it: what other processes send does not count.
    """
    to_ranks = to_store = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # gone in the meantime; no socket; not connected
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                peer = connection.getpeername()
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                (sent,) = struct.unpack_from("<Q", info, 200)
                if peer[1] == port:
                    to_store += sent
                else:
                    to_ranks += sent
    return to_ranks, to_store


def _high_water_mark(work: Callable[[], Any]) -> int:
    """The most memory, in bytes, that the process has in the time of a call, with the library itself."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    work()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


# ---- The store ------------------------------------------------------------------------------------------------------


def _ask_the_store(store: Any, group: Any, seconds: float) -> dict[str, Any]:
    """How many requests it answers to all ranks, which ask at the same time, one after the other each."""
    store.set("asked", "")
    dist.barrier(group)
    start, asked, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        store.check(["asked"])
        asked, passed = asked + 1, time.perf_counter() - start
    return {"what": "requests", "ranks": dist.get_world_size(group), "a second": asked / passed}


def _steps_of_threads(number: int, port: int, steps: int = 5) -> dict[str, Any]:
    """What a step takes that so many ranks take, each of them a thread with a connection of its own to the store."""
    logs = [Log() for _ in range(number)]  # each thread its own: threads that add to the same number lose some
    together = threading.Barrier(number + 1, timeout=LONGEST_WAIT.total_seconds())

    def take_steps(rank: int) -> None:
        connection = TCPStore("127.0.0.1", port, is_master=False, timeout=LONGEST_WAIT)
        store = _CountingStore(PrefixStore(f"threads/{number}", connection), logs[rank])
        own = Steps(store, rank, number, timeout_s=LONGEST_WAIT.total_seconds(), call="take_steps")
        for _ in range(steps + 1):
            together.wait()
            own.take(None, len)
            together.wait()

    threads = [threading.Thread(target=take_steps, args=(rank,), daemon=True) for rank in range(number)]
    for thread in threads:
        thread.start()
    seconds, requests = [], []
    for _ in range(steps + 1):
        together.wait()
        start, before = time.perf_counter(), sum(log.requests for log in logs)
        together.wait()
        seconds.append(time.perf_counter() - start)
        requests.append(sum(log.requests for log in logs) - before)
    for thread in threads:
        thread.join(LONGEST_WAIT.total_seconds())
    # The first has nothing to sweep from a step before.
    return {"what": "step", "ranks": number, "seconds": seconds[1:], "requests": sum(requests[1:]) / steps}
