"""Ctrl-C is held back, let through where the code says so, and never lost."""

import asyncio
import contextlib
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest

from precisebn.models import interrupts
from precisebn.models.interrupts import HeldBack, Undisturbed

pytestmark = [
    pytest.mark.usefixtures("pythons_own_handler"),
    pytest.mark.skipif(
        threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's"
    ),
]


def test_a_held_back_interrupt_comes_at_the_end_or_where_it_is_let_through():
    seen = []

    def work(lets_through: bool) -> None:
        with HeldBack() as held:
            signal.raise_signal(signal.SIGINT)
            seen.append("held")
            if lets_through:
                with held.let_through():
                    seen.append("never")
                seen.append("never")

    for lets_through in (False, True):
        with pytest.raises(KeyboardInterrupt):
            work(lets_through)
    assert seen == ["held", "held"]


def test_an_interrupt_that_waits_is_not_lost_behind_another_exception():
    def work() -> None:
        with HeldBack():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("waits", [False, True])
def test_the_first_interrupt_that_is_let_through_closes_the_gate_behind_it(waits):
    cleaned = []

    def work() -> None:
        with HeldBack() as held:
            if waits:
                signal.raise_signal(signal.SIGINT)
            try:
                with held.let_through():
                    signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert cleaned == [True]


def test_in_other_threads_nothing_is_held_back():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with HeldBack() as held, held.let_through():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


# ---- Undisturbed ----------------------------------------------------------------------------------------------------


def noted(interrupts: HeldBack, notes: list[str]) -> Iterator[list[str]]:
    notes.append("begins")
    try:
        notes.append("has begun")
        yield notes
    finally:
        notes.append("ends")
        notes.append("has ended")


FILES = {interrupts.__file__, contextlib.__file__, noted.__code__.co_filename}


class Instants:
    """Raises SIGINT at the n-th instant of a block's code: before a function's first instruction, or before a line."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen = 0

    def __call__(self, frame: types.FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in FILES or code.co_name == "block":
            return None
        if event in ("call", "line"):
            self.seen += 1
            if self.seen == self.n + 1:
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_at_any_instant_of_its_beginning_or_end_leaves_a_block_done_or_undone(fails):
    """``finally: with HeldBack():`` did not do: it came before the handler was there, and layers stayed paused."""

    def block(notes: list[str]) -> None:
        with Undisturbed(noted, notes):
            notes.append("body")
            if fails:
                raise ZeroDivisionError

    outcomes = set()
    for n in range(10_000):
        notes: list[str] = []
        instants, caught, outcome, tracer = Instants(n), None, None, sys.gettrace()
        sys.settrace(instants)
        try:
            block(notes)
        except (KeyboardInterrupt, ZeroDivisionError) as error:  # whose traceback holds the frames
            caught, outcome = type(error), tuple(notes)
        finally:
            sys.settrace(tracer)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if instants.seen <= n:
            break
        assert caught is KeyboardInterrupt
        outcomes.add(outcome)
    begins, ends = ("begins", "has begun"), ("ends", "has ended")
    assert outcomes == {(), begins + ends, (*begins, "body", *ends)}


def test_the_body_has_the_handler_of_the_user():
    """asyncio.run cancels its task on Ctrl-C, but only where the handler is Python's own."""

    async def kind_of_handler() -> type:
        return type(signal.getsignal(signal.SIGINT))

    kind = asyncio.run(kind_of_handler())
    with Undisturbed(noted, []), Undisturbed(noted, []):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert asyncio.run(kind_of_handler()) is kind


def test_an_interrupt_on_the_way_into_exit_ends_the_block_as_any_exception_does():
    """Not as if all had gone well: statistics that were gathered in the block are dropped."""
    ends: list[str] = []

    def tells(interrupts: HeldBack) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            ends.append("by an interrupt")
            raise
        ends.append("well")

    def interrupt_exit(frame: types.FrameType, event: str, argument: object) -> None:
        if frame.f_code is Undisturbed.__exit__.__code__:
            sys.settrace(tracer)
            signal.raise_signal(signal.SIGINT)

    tracer = sys.gettrace()
    with pytest.raises(KeyboardInterrupt), Undisturbed(tells):
        sys.settrace(interrupt_exit)
    assert ends == ["by an interrupt"]


def test_the_method_may_be_looked_up_and_called_by_hand():
    notes: list[str] = []
    block = Undisturbed(noted, notes)
    assert hasattr(block, "__exit__")
    block.__enter__()
    assert hasattr(block, "__exit__")
    assert notes == ["begins", "has begun"]
    block.__exit__(None, None, None)
    block.__exit__(None, None, None)
    assert notes == ["begins", "has begun", "ends", "has ended"]
    with contextlib.ExitStack() as stack:
        notes = stack.enter_context(Undisturbed(noted, []))
        assert notes == ["begins", "has begun"]
    assert notes == ["begins", "has begun", "ends", "has ended"]


def test_ctrl_c_comes_in_the_body_as_often_as_it_is_sent():
    caught = 0
    with Undisturbed(noted, []) as notes:
        for _ in range(3):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                caught += 1
    assert caught == 3
    assert notes[-1] == "has ended"


def test_a_block_that_ends_after_a_later_one_began_leaves_the_handler_from_before_both():
    first, second = Undisturbed(noted, []), Undisturbed(noted, [])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    second.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_is_installed_inside_of_a_block_stays():
    seen: list[int] = []
    with Undisturbed(noted, []):
        kept = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, kept)  # as who put it there does when he is done
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_inner_block_may_let_an_interrupt_through_at_its_end():
    """As where ranks wait for each other."""

    def waits(interrupts: HeldBack) -> Iterator[None]:
        yield
        with interrupts.let_through():
            signal.raise_signal(signal.SIGINT)
            outcome.append("never")

    outcome: list[str] = []
    with Undisturbed(noted, outcome), contextlib.suppress(KeyboardInterrupt):
        with Undisturbed(waits):
            pass
        outcome.append("never")
    assert outcome == ["begins", "has begun", "ends", "has ended"]


def test_a_block_that_nobody_holds_any_more_ends():
    """As one of an ExitStack does that was interrupted before it had taken hold of it."""
    notes: list[str] = []
    Undisturbed(noted, notes).__enter__()
    assert notes[-1] == "has ended"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_it_decorates_functions():
    notes: list[str] = []

    @Undisturbed(noted, notes)
    def body() -> None:
        notes.append("body")

    body()
    body()
    assert notes == ["begins", "has begun", "body", "ends", "has ended"] * 2
