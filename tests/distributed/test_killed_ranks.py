"""Ranks that are killed (SIGKILL) at chosen moments: every survivor raises in time and says what is known.

One start of processes serves all moments: ranks 0 and 1 survive, and each other rank is the victim of one moment, in a
process group of these three. The groups are used at the same time, in threads: most of it is waiting for the timeout.
"""

import datetime
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from processes import Outcome, Result, unchanged
from torch import Tensor, nn

from precisebn import check_ranks, merge_rank_statistics, update_bn_stats
from precisebn.distributed.ranks import Ranks
from precisebn.recalibration.commit import Commit

TIMEOUT_S = 8.0
SURVIVORS = (0, 1)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def net(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)  # so that check_ranks has values to send
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))


def update(rank: int, group: Any) -> Callable[[nn.Module], Any]:
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    return lambda model: update_bn_stats(model, batches, None, process_group=group)


def merge(rank: int, group: Any) -> Callable[[nn.Module], Any]:
    return lambda model: merge_rank_statistics(model, group)


def check(rank: int, group: Any) -> Callable[[nn.Module], Any]:
    return lambda model: check_ranks(model, group)


def first_sum_then_death() -> Any:
    """The victim takes part in the first all-reduce of statistics, and does not live to see the second."""
    all_reduce = dist.all_reduce

    def dies_after_a_sum(tensor: Tensor, operation: Any, **options: Any) -> None:
        all_reduce(tensor, operation, **options)
        if operation == dist.ReduceOp.SUM:
            die()

    return mock.patch.object(dist, "all_reduce", dies_after_a_sum)


def first_sum_is_death() -> Any:
    """Inside the step: the others are in the all-reduce."""
    return mock.patch.object(dist, "all_reduce", die)


def second_sum_is_death() -> Any:
    """The others are in the second all-reduce when the victim dies in front of it."""
    all_reduce, sums = dist.all_reduce, []

    def dies_in_the_second(tensor: Tensor, operation: Any, **options: Any) -> None:
        if operation == dist.ReduceOp.SUM:
            sums.append(tensor)
        if len(sums) == 2:
            die()
        all_reduce(tensor, operation, **options)

    return mock.patch.object(dist, "all_reduce", dies_in_the_second)


NOT_HERE = f"rank(s) 2 of 3 did not come in the {TIMEOUT_S:g} s that ranks wait"
BROKEN = "2 of 3 did not come|3 ranks failed, as it does where a process has ended"

# Which call, how the victim dies in it, and what the survivors know of it.
MOMENTS: dict[str, tuple[Callable[[int, Any], Callable[[nn.Module], Any]], Callable[[], Any], str]] = {
    "update, in a mini-batch": (update, lambda: mock.patch.object(nn.ReLU, "forward", die), NOT_HERE),
    "update, in the first all-reduce": (update, first_sum_is_death, BROKEN),
    "update, between the two all-reduces": (update, first_sum_then_death, NOT_HERE),
    "update, in the second all-reduce": (update, second_sum_is_death, BROKEN),
    "update, before the write": (update, lambda: mock.patch.object(Commit, "write", die), NOT_HERE),
    "update, after the write": (update, lambda: mock.patch.object(Ranks, "commit", die), NOT_HERE),
    "merge, in the broadcast": (merge, lambda: mock.patch.object(dist, "broadcast", die), BROKEN),
    "merge, between the two all-reduces": (merge, first_sum_then_death, NOT_HERE),
    "merge, after the write": (merge, lambda: mock.patch.object(Ranks, "commit", die), NOT_HERE),
    "check, in its checksums": (check, lambda: mock.patch("precisebn.ranks.facts.bytes_of", die), NOT_HERE),
    "check, where values are sent": (check, lambda: mock.patch.object(dist, "broadcast", die), BROKEN),
}
WORLD = len(SURVIVORS) + len(MOMENTS)


def killed_at_every_moment(rank: int, world: int) -> Result:
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    groups = [dist.new_group([*SURVIVORS, victim], timeout=timeout) for victim in range(len(SURVIVORS), world)]
    dist.barrier()

    def survive(number: int) -> Result:
        call, _, _ = list(MOMENTS.values())[number]
        return unchanged(call(rank, groups[number]), lambda: net(rank))

    if rank in SURVIVORS:
        with ThreadPoolExecutor(len(groups)) as pool:
            return dict(zip(MOMENTS, pool.map(survive, range(len(groups))), strict=True))
    number = rank - len(SURVIVORS)
    call, death, _ = list(MOMENTS.values())[number]
    with death():
        call(rank, groups[number])(net(rank))
    raise AssertionError("it was to be killed")


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome([killed_at_every_moment], WORLD, tmp_path_factory.mktemp("killed"), limit_s=240.0, init_method="tcp")


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_survivor_raises_in_time_and_its_model_is_as_it_was(survivors, moment):
    _, _, known = MOMENTS[moment]
    assert survivors.exitcodes[len(SURVIVORS) + list(MOMENTS).index(moment)] == -signal.SIGKILL
    for rank in SURVIVORS:
        outcome = survivors.of_rank(killed_at_every_moment, rank)[moment]
        name, text = outcome["error"]
        assert name == "RankFailedError", outcome
        assert any(part in text for part in known.split("|")), text
        assert outcome["unchanged"]
        assert outcome["seconds"] < 3 * TIMEOUT_S
