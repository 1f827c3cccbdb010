"""Timing on either device: contestants in turns, what one is compared with, and memory at its peak.

A figure is only comparable with one taken beside it, so the contestants of one row run in turns, round by round, and
a ratio is taken within a round; what is reported is the median over rounds, with the quartiles.
"""

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[..., Any]
Times = dict[str, list[float]]
"""Seconds of each contestant in each round."""


def clock(device: str = "cpu") -> str:
    """Which clock contestants are timed by: on the CPU, ``"CPU time"`` with one thread, ``"wall time"`` with several.

    On an idle machine they agree for one thread, and CPU time is not disturbed by what else runs. With several threads
    it would count the waiting of threads for each other as work.
    """
    if device == "cuda":
        return "CUDA events (update: wall time)"
    return "CPU time" if torch.get_num_threads() == 1 else "wall time"


def now(device: str = "cpu") -> float:
    """Seconds, for differences: by :func:`clock` on the CPU; on CUDA wall time when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


# ---- Contestants in turns -------------------------------------------------------------------------------------------


def interleave(
    contestants: Mapping[str, Callable[[], float]], rounds: int, budget: float = float("inf"), least: int = 3
) -> Times:
    """Let contestants measure themselves in turns, after one warm-up round.

    Every round has another order: what the allocator and the caches hold depends on who came before.

    Args:
        contestants: each does its work once and returns how long that took.
        rounds: how many rounds, at most.
        budget: seconds after which no further round starts.
        least: how many rounds there are whatever the budget.
    """
    names = list(contestants)
    times: Times = {name: [] for name in names}
    deadline = time.perf_counter() + budget
    for name in names:
        contestants[name]()
    for turn in range(rounds):
        if turn >= least and time.perf_counter() > deadline:
            break
        for name in random.Random(turn).sample(names, len(names)):
            times[name].append(contestants[name]())
    return times


def rounds_of(device: str, quick: bool) -> int:
    """How many rounds, at most: on CUDA of several calls each; on the CPU of one, which differs by tens of percent."""
    return 3 if quick else 15 if device == "cuda" else 61


def measure(
    contestants: Mapping[str, Work],
    feed: Iterable[tuple[Any, ...]],
    device: str,
    rounds: int,
    budget: float,
    calls: int,
    before: Work | None = None,
) -> Times:
    """Time what each contestant takes for one call, in turns.

    Args:
        contestants: each is called with one item of ``feed``; its result is thrown away inside the measurement.
        feed: arguments, drawn outside the measurement, round and round.
        device: "cpu" or "cuda".
        rounds: how many rounds, at most.
        budget: seconds after which no further round starts.
        calls: on CUDA, how many calls are measured together, see :class:`_OnCuda`; on the CPU it is always one.
        before: is called with the same arguments before each call, outside the measurement; on the CPU only.
    """
    arguments = itertools.cycle(feed)
    if device == "cuda":
        assert before is None, "calls are enqueued together"
        timed: dict[str, Callable[[], float]] = {
            name: _OnCuda(work, arguments, calls) for name, work in contestants.items()
        }
    else:
        timed = {name: _on_cpu(work, arguments, before) for name, work in contestants.items()}
    return interleave(timed, rounds, budget)


def _on_cpu(work: Work, feed: Iterator[tuple[Any, ...]], before: Work | None) -> Callable[[], float]:
    def once() -> float:
        arguments = next(feed)
        if before is not None:
            before(*arguments)
        start = now()
        work(*arguments)
        return now() - start

    return once


class _OnCuda:
    """Several calls between two CUDA events, enqueued while the GPU sleeps: the time is the kernels', not Python's.

    The results are kept until the end, so that no output lands in memory that a call before has just written and the
    cache still holds. ``calls`` times the kernels of one call should stay below the 1024 launches that the driver
    queues, or the host waits for the GPU and the sleep hides nothing.
    """

    CYCLES_PER_SECOND = 2e9  # of the GPU's clock, roughly: the sleep is to last twice as long as enqueuing
    LONGEST_SLEEP = 0.05  # seconds; work that itself waits for the GPU would otherwise be timed with its own sleep

    def __init__(self, work: Work, feed: Iterator[tuple[Any, ...]], calls: int) -> None:
        self.work, self.feed, self.calls = work, feed, calls
        self.sleep: float | None = None

    def __call__(self) -> float:
        if self.sleep is None:
            self._enqueue()  # loads and plans what is loaded and planned once
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._enqueue()
            self.sleep = min(2 * (time.perf_counter() - start), self.LONGEST_SLEEP)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.CYCLES_PER_SECOND * self.sleep))
        begin.record()
        kept = self._enqueue()
        end.record()
        torch.cuda.synchronize()
        del kept
        return float(begin.elapsed_time(end)) / 1e3 / self.calls

    def _enqueue(self) -> list[Any]:
        return [self.work(*arguments) for arguments in itertools.islice(self.feed, self.calls)]


def in_time(settings: Iterable[Any], deadline: float) -> Iterator[Any]:
    """The settings until :func:`time.perf_counter` reaches ``deadline``: what is begun then is finished."""
    for setting in settings:
        if time.perf_counter() > deadline:
            return
        yield setting


def copy_bandwidth(quick: bool = False) -> float:
    """Bytes per second of a device-to-device copy of 1 GiB, reads and writes."""
    x = torch.randn((1 << 28) // (8 if quick else 1), device="cuda")
    y = torch.empty_like(x)
    times = measure({"copy": lambda: y.copy_(x)}, [()], "cuda", rounds=15, budget=5, calls=3)["copy"]
    return 2 * x.nbytes / statistics.median(times)


# ---- Comparing ------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, mid, high


def ratios(slower: Iterable[float], faster: Iterable[float]) -> list[float]:
    """How many times as fast the second is, round by round."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


def comparison(times: Times, ours: str, peers: Iterable[str], floor: Sequence[float] | None = None) -> dict[str, Any]:
    """The columns of a row: how long ``ours`` takes, over the floor, and how many times as fast as its peers it is.

    Args:
        times: from :func:`measure` or :func:`interleave`.
        ours: whose row it is.
        peers: those that did not run are left out.
        floor: seconds that it takes at least, in each round.
    """
    low, middle, high = quartiles(times[ours])
    row: dict[str, Any] = {"us": 1e6 * middle, "quartiles": [1e6 * low, 1e6 * high]}
    if floor is not None:
        row |= {"floor us": 1e6 * statistics.median(floor), "x floor": quartiles(ratios(times[ours], floor))[1]}
    against = {peer: quartiles(ratios(times[peer], times[ours])) for peer in peers if peer in times}
    texts = [f"{peer} {middle:.3g} ({low:.3g} to {high:.3g})" for peer, (low, middle, high) in against.items()]
    return row | {"times as fast as (quartiles)": ", ".join(texts), "_peers": against}


def speeds(rows: Iterable[Mapping[str, Any]], peer: str) -> list[float]:
    """How many times as fast as ``peer`` each row is that was compared with it."""
    return [row["_peers"][peer][1] for row in rows if peer in row["_peers"]]


# ---- Memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(work: Work, arguments: tuple[Any, ...], device: str) -> int:
    """The most bytes that tensors hold during one call, beyond what they hold before it."""
    work(*arguments)  # what is set up once is not counted
    return _peak_on_cuda(work, arguments) if device == "cuda" else _peak_on_cpu(work, arguments)


def _peak_on_cuda(work: Work, arguments: tuple[Any, ...]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Work, arguments: tuple[Any, ...]) -> int:
    """From the profiler's record of every allocation by torch, those inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)
