"""Ctrl-C held back while something is half done.

Python turns SIGINT into KeyboardInterrupt between any two instructions of the main thread: also between a change and
the note of how to undo it, or inside the very code that undoes. So for the whole of a transaction the signal is taken
by a handler of ours. It lets an interrupt through where the code says that it may come (:meth:`HeldBack.let_through`,
around the user's own code: the model, the loader), once; at all other times it keeps it until the end.
"""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["HeldBack"]


class HeldBack(AbstractContextManager["HeldBack"]):
    """From ``with`` to its end SIGINT interrupts nothing but what runs inside :meth:`let_through`.

    What is held back is delivered at the end, to the handler that was there before, unless a KeyboardInterrupt is on
    its way already. Only the main thread gets signals, and only a handler written in Python can be stood in for:
    elsewhere this does nothing. Blocks nest: an inner one hands on to the outer.
    """

    def __init__(self) -> None:
        self.pending = False
        """Whether an interrupt waits."""
        self._lets_through = False
        self._previous: Any = None

    def __enter__(self) -> "HeldBack":
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(previous):
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lets_through = False
        if self._previous is None:
            return
        signal.signal(signal.SIGINT, self._previous)
        if not isinstance(error, KeyboardInterrupt):
            self.deliver()

    def let_through(self) -> "_LetThrough":
        """Within this block an interrupt may come at once; the first that does closes the block for others.

        So the clean-up behind an interrupt is not interrupted by the next one.
        """
        return _LetThrough(self)

    def deliver(self) -> None:
        """Hand a held-back interrupt to the handler that was there before, which raises KeyboardInterrupt as a rule.

        To be called where nothing is half done, and before what cannot be undone.
        """
        if self.pending:
            self.pending = False
            self._previous(signal.SIGINT, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._lets_through:
            self.pending = True
            return
        self._lets_through = False
        self._previous(number, frame)
        self._lets_through = True  # it did not raise: the program goes on, and so may the next interrupt


class _LetThrough:
    """Not a generator: those can be interrupted in the code of contextlib, before the first line of their own."""

    def __init__(self, gate: HeldBack) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate._lets_through = True
        if self._gate.pending:
            self._gate._lets_through = False  # if it raises, nobody will come to close the gate behind it
            self._gate.deliver()
            self._gate._lets_through = True

    def __exit__(self, *_: object) -> None:
        self._gate._lets_through = False
