"""What fails on one rank, at any moment, fails on all, and no model changes: real processes, signals and kills."""

import datetime
import hashlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import Refusing, state_of, values_of
from processes import HANG_S, Outcome, Result, raised
from torch import Tensor, nn

from precisebn import update_bn_stats
from precisebn._torch import group_store
from precisebn.distributed.steps import Steps
from precisebn.models.interrupts import HeldBack

WORLD = 3
SHORT_TIMEOUT_S = 3.0
TIMES = 40


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))


def share(rank: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [rank + torch.randn(4, 3, 8, 8, generator=generator) for _ in range(number)]


def trial(
    rank: int,
    model: nn.Module | None = None,
    number: int = 3,
    after: Callable[[], Any] = lambda: None,
    **arguments: Any,
) -> Result:
    """One recalibration: what it raised, how long it took, and what became of the model."""
    model = net() if model is None else model
    before, start = state_of(model), time.monotonic()
    loader = arguments.pop("loader", share(rank, number))

    def call() -> None:
        try:
            update_bn_stats(model, loader, None, **arguments)
        finally:
            after()

    error = raised(call)
    return {
        "error": error, "seconds": time.monotonic() - start, "unchanged": state_of(model) == before,
        "values": hashlib.sha256(repr(values_of(model)).encode()).hexdigest(),
    }  # fmt: skip


def with_tolerance(rank: int) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not reached
        return trial(rank, number=9, tolerance=1e-9)


RUNS: dict[str, Callable[[int], Result]] = {"plain": trial, "tolerance": with_tolerance}


# ---- Scenarios: Ctrl-C -----------------------------------------------------------------------------------------------


def number_of_steps(run: Callable[[], Any]) -> int:
    counts = []
    leave = Steps.leave

    def counting(self: Steps) -> None:
        counts.append(self._step)
        leave(self)

    with mock.patch.object(Steps, "leave", counting):
        run()
    return counts[0]


@contextmanager
def interrupted_at(step: int, *, victim: bool) -> Iterator[None]:
    """SIGINT to the victim while it waits at a step for the others, who come when that step has been decided."""
    wait, come = Steps._wait, Steps._come

    def interrupted(self: Steps) -> Any:
        if self._step == step:
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        return wait(self)

    def late(self: Steps, *arguments: Any) -> Any:
        while self._step == step and not self._store.check([self._key("decision")]):
            time.sleep(0.001)
        return come(self, *arguments)

    with mock.patch.object(Steps, *(("_wait", interrupted) if victim else ("_come", late))):
        yield


def ctrl_c_in_every_wait(rank: int, world: int) -> Result:
    results = {}
    for kind, run in RUNS.items():
        for step in range(number_of_steps(lambda run=run: run(rank))):
            for victim in (0, 1):
                with interrupted_at(step, victim=rank == victim):
                    results[kind, step, victim] = run(rank)
    return results


class AtLine:
    """Raises SIGINT at the n-th line of this library that runs while interrupts are held back."""

    def __init__(self, number: int) -> None:
        self.left, self.seen = number, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "/precisebn/" not in frame.f_code.co_filename or "/ops/" in frame.f_code.co_filename:
            return None
        if event == "line" and isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), HeldBack):
            self.seen += 1
            if self.seen == self.left:
                signal.raise_signal(signal.SIGINT)
        return self


def traced(rank: int, tracer: AtLine) -> Result:
    sys.settrace(tracer)
    try:
        result = trial(rank)
    finally:
        sys.settrace(None)
    return result | {"raised": 0 < tracer.left <= tracer.seen}  # a rank that waits less has fewer lines


def ctrl_c_at_any_line_of_rank_0(rank: int, world: int) -> Result:
    count = AtLine(0)
    traced(rank, count)
    end = count.seen - 60  # what follows the last step is short
    lines = [[*range(1, end, max(1, end // 120)), *range(end, count.seen)]]
    dist.broadcast_object_list(lines)
    return {line: traced(rank, AtLine(line if rank == 0 else 0)) for line in lines[0]}


def ctrl_c_at_any_time(rank: int, victim: bool) -> Result:
    """From the moment on that the rank has counted its call; before, it is one that calls too late."""
    durations = [trial(rank)["seconds"]]
    dist.broadcast_object_list(durations)
    start = Steps.__init__
    results = {}
    for k in range(TIMES):
        timer = threading.Timer(1.2 * durations[0] * k / TIMES, os.kill, (os.getpid(), signal.SIGINT))

        def started(self: Steps, *arguments: Any, timer: threading.Timer = timer, **options: Any) -> None:
            start(self, *arguments, **options)
            timer.start()

        if victim:
            with mock.patch.object(Steps, "__init__", started):
                results[k] = trial(rank, after=timer.join)  # the signal may come after the end
        else:
            results[k] = trial(rank)
    return results


def ctrl_c_at_any_time_on_rank_1(rank: int, world: int) -> Result:
    return ctrl_c_at_any_time(rank, victim=rank == 1)


def ctrl_c_at_any_time_on_all_ranks(rank: int, world: int) -> Result:
    """As a terminal sends it: to every process of the group, in no order."""
    return ctrl_c_at_any_time(rank, victim=True)


# ---- Scenarios: exceptions -------------------------------------------------------------------------------------------


class NoStart:
    def __iter__(self) -> Iterator[Any]:
        raise ZeroDivisionError("before the first mini-batch")


def broken(model: nn.Module, batch: Tensor) -> None:
    raise ZeroDivisionError("in a mini-batch")


def ends_badly(rank: int) -> Iterator[Tensor]:
    yield from share(rank, 3)
    raise ZeroDivisionError("after its data")


def unwritable() -> nn.Sequential:
    model = net()
    model[4]._buffers["running_var"] = torch.ones(1).expand(4)
    return model


def unwilling() -> nn.Sequential:
    model = net()
    model[4]._buffers["running_var"] = torch.ones(4).as_subclass(Refusing)
    return model


def report_fails(rank: int) -> Result:
    with mock.patch("precisebn.recalibration.update._report", side_effect=ZeroDivisionError("in the report")):
        return trial(rank)


def warning_is_an_error(rank: int) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return trial(rank, number=9, tolerance=1e-9)


def infinite(rank: int) -> list[Tensor]:
    return [batch / (2 - k) for k, batch in enumerate(share(rank, 3))]


# What fails on one rank: how, beside what the others do; and what the rank raises.
STAGES: dict[str, tuple[Callable[[int], Result], Callable[[int], Result], str]] = {
    "argument": (lambda rank: trial(rank, estimator="no"), trial, "InputError: estimator='no'"),
    "start": (lambda rank: trial(rank, loader=NoStart()), trial, "ZeroDivisionError: before the first mini-batch"),
    "mini-batch": (lambda rank: trial(rank, forward=broken), trial, "ZeroDivisionError: in a mini-batch"),
    "end of data": (lambda rank: trial(rank, loader=ends_badly(rank)), trial, "ZeroDivisionError: after its data"),
    "infinity": (
        lambda rank: trial(rank, loader=infinite(rank)),
        trial,
        "NonFiniteStatisticsError: the input of layer",
    ),
    "report": (report_fails, trial, "ZeroDivisionError: in the report"),
    "warning": (warning_is_an_error, with_tolerance, "UserWarning: tolerance=1e-09 was not reached"),
    "unwritable": (lambda rank: trial(rank, unwritable()), trial, "InputError: several elements of running_var of"),
    "writing": (lambda rank: trial(rank, unwilling()), trial, "RuntimeError: refused"),
}


def exception_at_every_stage(rank: int, world: int) -> Result:
    return {
        (stage, victim): (fails if rank == victim else works)(rank)
        for stage, (fails, works, _) in STAGES.items()
        for victim in (0, 2)
    }


def in_step_after_all_that(rank: int, world: int) -> Result:
    return trial(rank)


def keys_left_in_the_store(rank: int, world: int) -> Result:
    """How many keys 20 runs leave behind; counted by one rank while the others wait."""
    store = group_store(dist.group.WORLD)
    counts = []
    for runs in (1, 20):
        for _ in range(runs):
            trial(rank)
        dist.barrier()
        counts.append(store.num_keys())
        dist.barrier()
    return {"grown": counts[1] - counts[0]}


def rank_0_calls_alone(rank: int, world: int) -> Result:
    group = dist.new_group(timeout=datetime.timedelta(seconds=SHORT_TIMEOUT_S))
    store = group_store(group)
    if rank > 0:
        while not store.check(["rank 0 has given up"]):
            time.sleep(0.01)
        return {"alone": trial(rank, process_group=group), "together": trial(rank, process_group=group)}
    with warnings.catch_warnings(record=True) as warned, mock.patch("precisebn.distributed.steps.WAIT_WARNING_S", 0.1):
        warnings.simplefilter("always")
        alone = trial(rank, process_group=group)
    store.set("rank 0 has given up", "")
    messages = [str(warning.message) for warning in warned]
    return {"alone": alone, "together": trial(rank, process_group=group), "warnings": messages}


def rank_0_ends_first(rank: int, world: int) -> Result:
    """The process that keeps the store ends right after the run; the others look for the last decision later."""
    wait = Steps._wait

    def slow(self: Steps) -> Any:
        time.sleep(0.5)
        return wait(self)

    with mock.patch.object(Steps, "_wait", slow if rank > 0 else wait):
        return trial(rank)


def slow_in_a_mini_batch(rank: int, seconds: float, **arguments: Any) -> Result:
    def forward(model: nn.Module, batch: Tensor) -> None:
        if rank == 1:
            time.sleep(seconds / 3)
        model(batch)

    return trial(rank, forward=forward, **arguments)


def slow_rank(rank: int, world: int) -> Result:
    """Slower than others, but not than the timeout; and then slower than that, in a group of a short one."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=SHORT_TIMEOUT_S))
    return {
        "slow": slow_in_a_mini_batch(rank, 0.5 * SHORT_TIMEOUT_S, process_group=group),
        "too slow": slow_in_a_mini_batch(rank, 1.5 * SHORT_TIMEOUT_S, process_group=group),
        "after that": trial(rank, process_group=group),
    }


SCENARIOS = [
    ctrl_c_in_every_wait, ctrl_c_at_any_line_of_rank_0, ctrl_c_at_any_time_on_rank_1, ctrl_c_at_any_time_on_all_ranks,
    exception_at_every_stage, in_step_after_all_that, keys_left_in_the_store, rank_0_calls_alone, slow_rank,
    rank_0_ends_first,
]  # fmt: skip


# ---- Scenarios that a rank does not survive --------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rank_0_killed_in_a_mini_batch(rank: int, world: int) -> Result:
    return trial(rank, forward=die) if rank == 0 else trial(rank)


# ---- Tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, WORLD, tmp_path_factory.mktemp("failures"), limit_s=280.0, init_method="tcp")


def by_trial(results: list[Result]) -> Iterator[tuple[Any, list[Result]]]:
    """Each trial, with what came of it on every rank; all ranks have had the same ones."""
    assert len({tuple(result) for result in results}) == 1
    assert len(results[0]) > 0
    for key in results[0]:
        yield key, [result[key] for result in results]


def assert_failed_everywhere(outcomes: list[Result], victim: int, error: str, what: Any) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome["unchanged"], (what, rank, outcome)
        if rank == victim:
            assert ": ".join(outcome["error"]).startswith(error), (what, outcome)
        else:
            assert outcome["error"][0] == "RankFailedError", (what, rank, outcome)
            assert f"rank(s) {victim} of {WORLD} failed" in outcome["error"][1], (what, rank, outcome)
            assert error in outcome["error"][1], (what, rank, outcome)


def test_ctrl_c_while_waiting_ends_all_ranks_at_whatever_step(survivors):
    steps = set()
    for (kind, step, victim), outcomes in by_trial(survivors.of(ctrl_c_in_every_wait)):
        steps.add((kind, step))
        assert_failed_everywhere(outcomes, victim, "KeyboardInterrupt", (kind, step))
    assert {kind for kind, _ in steps} == set(RUNS)
    assert len(steps) >= 12


def assert_all_or_none(outcomes: list[Result], victim: int, what: Any) -> bool:
    """Whether the ranks have recalibrated: all of them, to the same bits, or none."""
    if any(outcome["unchanged"] for outcome in outcomes):
        assert_failed_everywhere(outcomes, victim, "KeyboardInterrupt", what)
        return False
    assert len({outcome["values"] for outcome in outcomes}) == 1, what
    for rank, outcome in enumerate(outcomes):
        assert outcome["error"][0] in ("", "KeyboardInterrupt" if rank == victim else ""), (what, rank, outcome)
    return True


def test_ctrl_c_at_any_line_changes_all_models_or_none(survivors):
    outcomes = dict(by_trial(survivors.of(ctrl_c_at_any_line_of_rank_0)))
    done = [assert_all_or_none(trials, 0, line) for line, trials in outcomes.items()]
    assert len(done) >= 100
    assert 0 < sum(done) < len(done)
    assert sum(trials[0]["raised"] for trials in outcomes.values()) >= 100
    for line, trials in outcomes.items():  # no interrupt is lost
        assert trials[0]["error"][0] == ("KeyboardInterrupt" if trials[0]["raised"] else ""), line


def test_ctrl_c_at_any_time_changes_all_models_or_none(survivors):
    trials = list(by_trial(survivors.of(ctrl_c_at_any_time_on_rank_1)))
    assert len(trials) == TIMES
    for number, outcomes in trials:
        assert_all_or_none(outcomes, 1, number)


def test_ctrl_c_to_all_ranks_changes_all_models_or_none(survivors):
    for number, outcomes in by_trial(survivors.of(ctrl_c_at_any_time_on_all_ranks)):
        errors = {outcome["error"][0] for outcome in outcomes}
        assert len({outcome["values"] for outcome in outcomes}) == 1, (number, outcomes)
        if outcomes[0]["unchanged"]:
            assert "KeyboardInterrupt" in errors, (number, outcomes)
            assert errors <= {"KeyboardInterrupt", "RankFailedError"}, (number, outcomes)
        else:
            assert errors <= {"KeyboardInterrupt", ""}, (number, outcomes)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_at_any_stage_ends_all_ranks(survivors, stage, victim):
    outcomes = [result[stage, victim] for result in survivors.of(exception_at_every_stage)]
    assert_failed_everywhere(outcomes, victim, STAGES[stage][2], stage)


def test_after_all_that_the_ranks_are_in_step(survivors):
    outcomes = survivors.of(in_step_after_all_that)
    assert [outcome["error"] for outcome in outcomes] == [("", "")] * WORLD
    assert len({outcome["values"] for outcome in outcomes}) == 1


def test_runs_leave_nothing_in_the_store(survivors):
    assert [result["grown"] for result in survivors.of(keys_left_in_the_store)] == [0] * WORLD


def test_the_end_of_rank_0_which_keeps_the_store_ends_the_others_at_once(tmp_path):
    """Other ranks, and other moments: test_killed_ranks.py."""
    processes.skip_without_gloo()
    scenario = rank_0_killed_in_a_mini_batch
    outcome = Outcome([scenario], WORLD, tmp_path, init_method="tcp")
    assert outcome.exitcodes[0] == -signal.SIGKILL
    for rank in (1, 2):
        result = outcome.of_rank(scenario, rank)
        assert result["error"][0] == "RankFailedError", result
        assert "cannot reach the store" in result["error"][1]
        assert result["unchanged"]
        assert result["seconds"] < HANG_S / 2  # the timeout of the group is not waited for


def test_a_rank_that_calls_alone_is_told_what_it_waits_for(survivors):
    results = survivors.of(rank_0_calls_alone)
    alone, *late = [result["alone"] for result in results]
    note = "waiting for the other ranks to call update_bn_stats; process_group=False is for this rank alone"
    (warning,) = results[0]["warnings"]
    assert warning.startswith(note)
    assert f"rank(s) 1, 2 of {WORLD}" in warning
    assert alone["error"][0] == "RankFailedError"
    assert note in alone["error"][1]
    assert SHORT_TIMEOUT_S <= alone["seconds"] < 2 * SHORT_TIMEOUT_S
    for result in late:
        assert result["error"][0] == "RankFailedError"
        assert f"rank(s) 1, 2 of {WORLD} did not come" in result["error"][1]
        assert result["unchanged"]
    together = [result["together"] for result in results]
    assert [result["error"] for result in together] == [("", "")] * WORLD
    assert len({result["values"] for result in together}) == 1


def test_a_slow_rank_is_waited_for_until_the_timeout(survivors):
    outcomes = dict(by_trial(survivors.of(slow_rank)))
    for what in ("slow", "after that"):
        assert [outcome["error"] for outcome in outcomes[what]] == [("", "")] * WORLD, what
        assert len({outcome["values"] for outcome in outcomes[what]}) == 1
    for rank, outcome in enumerate(outcomes["too slow"]):
        assert outcome["error"][0] == "RankFailedError"
        assert f"rank(s) 1 of {WORLD} did not come in the {SHORT_TIMEOUT_S:g} s" in outcome["error"][1]
        assert outcome["unchanged"]
        assert outcome["seconds"] < 2 * SHORT_TIMEOUT_S, rank


def test_all_ranks_hear_of_the_last_decision_although_rank_0_then_ends_and_the_store_with_it(survivors):
    assert [result["error"] for result in survivors.of(rank_0_ends_first)] == [("", "")] * WORLD
    assert len({result["values"] for result in survivors.of(rank_0_ends_first)}) == 1
