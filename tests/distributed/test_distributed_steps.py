"""The vote behind every step of ranks: threads over one store, where a moment can be chosen exactly."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from precisebn import InputError, RankFailedError
from precisebn.distributed.steps import Steps

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")

TIMEOUT_S = 20.0


def on_all_ranks(size: int, rank_does: Callable[[int], Any]) -> list[Any]:
    """What each rank returns, or the exception that it raises."""

    def result(rank: int) -> Any:
        try:
            return rank_does(rank)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(result, range(size), timeout=3 * TIMEOUT_S))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_all_ranks_get_the_same_result_of_all_payloads_in_their_order(size):
    store = dist.HashStore()

    def rank_does(rank: int) -> list[Any]:
        steps = Steps(store, rank, size, timeout_s=TIMEOUT_S, call="take")
        results = [steps.take([rank, step], list) for step in range(20)]
        steps.leave()
        return results

    expected = [[[rank, step] for rank in range(size)] for step in range(20)]
    assert on_all_ranks(size, rank_does) == [expected] * size


def test_a_run_leaves_no_key_behind_but_how_many_runs_there_were():
    store = dist.HashStore()

    def rank_does(rank: int) -> None:
        for _ in range(3):
            steps = Steps(store, rank, 3, timeout_s=TIMEOUT_S, call="take")
            for _ in range(4):
                steps.take(None, len)
            steps.leave()

    assert on_all_ranks(3, rank_does) == [None] * 3
    assert sorted(store.list_keys()) == ["runs/0", "runs/1", "runs/2"]


def test_a_rank_that_fails_does_not_wait_and_the_others_hear_of_it_at_their_next_step():
    store = dist.HashStore()
    first = Steps(store, 0, 2, timeout_s=TIMEOUT_S, call="take")
    first.fail(ZeroDivisionError("on purpose"))  # nobody else is there
    with pytest.raises(RankFailedError, match=r"rank\(s\) 0 of 2 failed.*ZeroDivisionError: on purpose"):
        Steps(store, 1, 2, timeout_s=TIMEOUT_S, call="take").take(None, len)


def test_what_is_raised_too_late_to_stop_a_step_is_raised_before_the_next():
    store = dist.HashStore()
    second = Steps(store, 1, 2, timeout_s=TIMEOUT_S, call="take")

    @contextmanager
    def interrupted() -> Iterator[None]:
        assert second.take("b", list) == ["a", "b"]  # the other comes, and the step is taken
        raise KeyboardInterrupt
        yield

    first = Steps(store, 0, 2, timeout_s=TIMEOUT_S, call="take", let_through=interrupted)
    assert first.take("a", list) == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        first.take("a", list)
    first.fail(KeyboardInterrupt())  # as Ranks does with what leaves its block
    with pytest.raises(RankFailedError, match="KeyboardInterrupt"):
        second.take("b", list)


def test_what_is_raised_too_late_to_stop_the_last_step_is_raised_after_it():
    store = dist.HashStore()
    second = Steps(store, 1, 2, timeout_s=TIMEOUT_S, call="take")

    @contextmanager
    def interrupted() -> Iterator[None]:
        second.take(None, len)
        second.leave()
        raise KeyboardInterrupt
        yield

    first = Steps(store, 0, 2, timeout_s=TIMEOUT_S, call="take", let_through=interrupted)
    assert first.take(None, len) == 2
    with pytest.raises(KeyboardInterrupt):
        first.leave()


def test_an_error_in_making_the_result_is_an_error_on_all_ranks():
    def fails(payloads: list[Any]) -> None:
        raise ZeroDivisionError("on purpose")

    store = dist.HashStore()
    results = on_all_ranks(3, lambda rank: Steps(store, rank, 3, timeout_s=TIMEOUT_S, call="take").take(None, fails))
    assert sorted(type(result).__name__ for result in results) == ["RankFailedError"] * 2 + ["ZeroDivisionError"]


def test_a_rank_that_does_not_come_is_named_by_all_others_and_told_when_it_comes():
    store = dist.HashStore()
    results = on_all_ranks(
        4, lambda rank: None if rank == 2 else Steps(store, rank, 4, timeout_s=0.2, call="take").take(None, len)
    )
    with pytest.raises(RankFailedError) as late:
        Steps(store, 2, 4, timeout_s=0.2, call="take").take(None, len)
    for error in (*results[:2], results[3], late.value):
        assert isinstance(error, RankFailedError)
        assert "rank(s) 2 of 4 did not come in the 0.2 s that ranks wait" in str(error)
        assert ("this rank comes too late" in str(error)) == (error is late.value)


def test_calls_belong_together_by_their_number_also_after_failures():
    store = dist.HashStore()

    def rank_does(rank: int) -> list[Any]:
        outcomes: list[Any] = []
        for call in range(6):
            steps = Steps(store, rank, 3, timeout_s=TIMEOUT_S, call="take")
            if call % 2 and rank == call % 3:
                steps.fail(ZeroDivisionError("on purpose"))
                outcomes.append("failed")
                continue
            try:
                outcomes.append(steps.take(call, list))
                steps.leave()
            except RankFailedError:
                outcomes.append("failed")
        return outcomes

    expected = ["failed" if call % 2 else [call] * 3 for call in range(6)]
    assert on_all_ranks(3, rank_does) == [expected] * 3


def test_more_can_be_told_than_a_store_takes_in_one_piece():
    """8 MiB, behind which torch's TCPStore ends the connection."""
    stores = [dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)]
    stores.append(dist.TCPStore("127.0.0.1", stores[0].port, 2, is_master=False, wait_for_workers=False))
    payload = [f"layers.{index}.weight" for index in range(500_000)]

    def rank_does(rank: int) -> bool:
        steps = Steps(stores[rank], rank, 2, timeout_s=TIMEOUT_S, call="take")
        same = steps.take(payload, list) == [payload, payload]
        steps.leave()
        return same

    assert on_all_ranks(2, rank_does) == [True, True]


def test_what_no_store_takes_is_an_error_on_all_ranks():
    store = dist.HashStore()
    noise = random.Random(0).randbytes(2**23).hex()

    def rank_does(rank: int) -> None:
        steps = Steps(store, rank, 2, timeout_s=TIMEOUT_S, call="take")
        try:
            steps.take(noise if rank == 0 else "", len)
        except InputError as error:
            steps.fail(error)
            raise

    first, second = on_all_ranks(2, rank_does)
    assert isinstance(first, InputError)
    assert "more than a store takes" in str(first)
    assert isinstance(second, RankFailedError)


@pytest.mark.parametrize("seed", range(20))
def test_interrupted_at_random_all_ranks_take_the_same_steps(seed):
    """And where none is interrupted outside of a wait, they end together but for those that raise their own."""
    store, size, num_steps = dist.HashStore(), 4, 12
    generators = [random.Random(size * seed + rank) for rank in range(size)]

    def rank_does(rank: int) -> tuple[int, str]:
        chance = generators[rank]

        @contextmanager
        def interruptible() -> Iterator[None]:
            if chance.random() < 0.01:
                raise KeyboardInterrupt
            yield

        steps = Steps(store, rank, size, timeout_s=TIMEOUT_S, call="take", let_through=interruptible)
        taken = 0
        try:
            for step in range(num_steps):
                time.sleep(0.002 * chance.random())
                assert steps.take([rank, step], list) == [[other, step] for other in range(size)]
                taken += 1
            steps.leave()
        except (KeyboardInterrupt, RankFailedError) as error:
            if taken < num_steps:
                steps.fail(error)
            return taken, type(error).__name__
        return taken, ""

    results = on_all_ranks(size, rank_does)
    assert len({taken for taken, _ in results}) == 1, results
    if results[0][0] < num_steps:
        assert all(error for _, error in results), results
        assert "KeyboardInterrupt" in {error for _, error in results}, results
    else:
        assert {error for _, error in results} <= {"", "KeyboardInterrupt"}, results
