"""Real processes over gloo for tests of several ranks. One start of processes runs a list of scenarios.

A scenario runs on every rank, and what it returns is written to a file. So a rank that hangs or dies shows as a file
that is missing, in the scenario where it happened. Every wait has a limit, and processes are ended one by one.
"""

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import state_of
from torch import nn

SLOWEST_START_S = 120
HANG_S = 30  # what waits longer than this raises, so that a hang is a failure and not a wait

Result = dict[str, Any]
Scenario = Callable[[int, int], Result]


class Outcome:
    """Results of scenarios on some number of ranks.

    Args:
        scenarios: functions of a module, called in this order with a rank and the number of ranks.
        world: how many ranks.
        folder: where results go.
        timeout_s: the timeout of the process group.
        limit_s: the processes are ended after that.
        init_method: ``"file"`` or ``"tcp"``: where the group keeps its store; in a file, or in the process of rank 0.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        world: int,
        folder: Path,
        *,
        timeout_s: float = HANG_S,
        limit_s: float = SLOWEST_START_S,
        init_method: str = "file",
    ) -> None:
        self.world, self.folder = world, folder
        first, others = _starts()
        processes = [
            (others if rank else first).Process(
                target=_run, args=(scenarios, rank, world, str(folder), timeout_s, init_method)
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + limit_s
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            self.exitcodes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()

    def of_rank(self, scenario: Scenario, rank: int) -> Result:
        """What one rank returned."""
        path = self.folder / f"{scenario.__name__}.{rank}"
        if not path.exists():
            trouble = "\n".join(log.read_text() for log in sorted(self.folder.glob("*.error")))
            code = self.exitcodes[rank]
            ended = "was still running" if code is None else f"ended with {code}"
            pytest.fail(f"rank {rank} did not get through {scenario.__name__}: it {ended}\n{trouble}")
        result: Result = torch.load(path, weights_only=False)
        return result

    def of(self, scenario: Scenario) -> list[Result]:
        """What each rank returned."""
        return [self.of_rank(scenario, rank) for rank in range(self.world)]


@cache
def _starts() -> tuple[Any, Any]:
    """How rank 0 starts, and how the others do.

    These are forked by a server that has imported what takes seconds, torch above all, once for all tests. Rank 0 is a
    new interpreter: its sets have another order, and its objects other addresses, than those of the other ranks, as it
    is with all ranks of a user.
    """
    new = multiprocessing.get_context("spawn")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return new, new
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["pytest", "hypothesis", "torch", "torch.distributed.fsdp"])
    return new, forked


def _run(scenarios: Sequence[Scenario], rank: int, world: int, folder: str, timeout_s: float, init_method: str) -> None:
    torch.set_num_threads(1)
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        store = _tcp_store(rank, world, folder) if init_method == "tcp" else dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        for scenario in scenarios:
            torch.save(scenario(rank, world), f"{folder}/{scenario.__name__}.{rank}.part")
            Path(f"{folder}/{scenario.__name__}.{rank}.part").rename(f"{folder}/{scenario.__name__}.{rank}")
        dist.destroy_process_group()
        os._exit(0)  # a process that has used DDP hangs now and then in the interpreter's own clean-up, or aborts there
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def _tcp_store(rank: int, world: int, folder: str) -> Any:
    """A store in the process of rank 0, at a port that is free; which one, the others read in a file."""
    start = datetime.timedelta(seconds=SLOWEST_START_S)
    note = Path(f"{folder}/port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, timeout=start, wait_for_workers=False)
        Path(f"{folder}/port.part").write_text(str(store.port))
        Path(f"{folder}/port.part").rename(note)
        return store
    while not note.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(note.read_text()), world, timeout=start, wait_for_workers=False)


def skip_without_gloo() -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    """The name and the text of what a call raises, notes included; empty if it raises nothing."""
    try:
        call()
    except BaseException as error:
        return type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "", ""


def unchanged(
    call: Callable[[nn.Module], Any], build: Callable[[], nn.Module], prepare: Callable[[nn.Module], Any] | None = None
) -> Result:
    """What a call raises, how long it took, and whether the model is as before."""
    model = build()
    if prepare is not None:
        prepare(model)
    before, start = state_of(model), time.monotonic()
    error = raised(lambda: call(model))
    return {"error": error, "seconds": time.monotonic() - start, "unchanged": state_of(model) == before}
