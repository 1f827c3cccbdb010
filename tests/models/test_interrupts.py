"""Ctrl-C is held back, let through where the code says so, and never lost."""

import signal
import threading

import pytest

from precisebn.models.interrupts import HeldBack

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
