"""Ctrl-C held back while something is half done.

Python turns SIGINT into KeyboardInterrupt between any two instructions of the main thread: also between a change and
the note of how to undo it, or inside the very code that undoes. So for the whole of a transaction the signal is taken
by a handler of ours. It lets an interrupt through where the code says that it may come (:meth:`HeldBack.let_through`,
around the user's own code: the model, the loader), once; at all other times it keeps it until the end.

A context manager whose body is the user's has the same need at its beginning and at its end. There no ``try`` helps:
the interrupt may come before the first instruction of ``__exit__``. So the handler stays for the body, too, where it
hands every interrupt on at once, unless it comes in that very method (:class:`Undisturbed`).
"""

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

__all__ = ["HeldBack", "Undisturbed"]

P = ParamSpec("P")
T = TypeVar("T")


class HeldBack(AbstractContextManager["HeldBack"]):
    """From ``with`` to its end SIGINT interrupts nothing but what runs inside :meth:`let_through`.

    What is held back is delivered at the end, to the handler that was there before, unless a KeyboardInterrupt is on
    its way already. Only the main thread gets signals, and only a handler written in Python can be stood in for:
    elsewhere this does nothing. Blocks nest: an inner one hands on to the outer. A handler that somebody installs
    inside of one stays.
    """

    def __init__(self) -> None:
        self.pending = False
        """Whether an interrupt waits."""
        self._lets_through = False
        self._previous: Any = None
        self._is_over = False

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
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, _that_still_counts(self._previous))
        self._is_over = True
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
        if self._is_over:  # somebody has kept it
            self._previous(number, frame)
            return
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


class Undisturbed(ContextDecorator, AbstractContextManager[T], Generic[T]):
    """What ``contextlib.contextmanager`` makes of a generator; but Ctrl-C interrupts only the body of the ``with``.

    One that comes while the block begins is raised when it has begun, and ends it at once; one that comes while it
    ends is raised when it has ended. So what the generator does before and after its ``yield`` is done, or undone.

    Args:
        generator: called with a :class:`HeldBack`, for code that may be interrupted in it, and the other arguments.

    Example:
        >>> def _noted(interrupts, notes):
        ...     notes.append("begins")
        ...     try:
        ...         yield notes
        ...     finally:
        ...         notes.append("ends")
        >>> with Undisturbed(_noted, []) as notes:
        ...     pass
        >>> notes
        ['begins', 'ends']
    """

    def __init__(self, generator: Callable[Concatenate[HeldBack, P], Iterator[T]], *args: P.args, **kwargs: P.kwargs):
        self._again = partial(Undisturbed, generator, *args, **kwargs)
        self._interrupts = _AroundBody(self)
        self._block = contextmanager(generator)(self._interrupts, *args, **kwargs)

    def __enter__(self) -> T:
        interrupts = self._interrupts
        interrupts.__enter__()
        try:
            value = self._block.__enter__()
        except BaseException as error:
            interrupts.__exit__(type(error), error, error.__traceback__)
            raise
        try:
            interrupts.in_body = True
            interrupts.deliver()
            return value
        except BaseException as error:  # the body never begins, and so nobody else calls this
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        interrupts = self._interrupts
        interrupts.in_body = False  # until here they are told by this method's frame
        try:
            suppressed = self._block.__exit__(kind, error, traceback)
        except BaseException as failure:
            interrupts.__exit__(type(failure), failure, failure.__traceback__)
            raise
        interrupts.__exit__(kind, error, traceback)
        return suppressed

    def _recreate_cm(self) -> "Undisturbed[T]":
        """For every call of a function that is decorated with it."""
        again: Undisturbed[T] = self._again()
        return again


class _AroundBody(HeldBack):
    """Of an :class:`Undisturbed`: while its body runs, interrupts come at once, and as many as there are."""

    def __init__(self, block: Undisturbed[Any]) -> None:
        super().__init__()
        self.in_body = False
        self._block = weakref.ref(block)  # a block that nobody holds any more ends, though its handler be installed

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.in_body and not self._is_ending(frame):
            self._previous(number, frame)
        else:
            super()._handle(number, frame)

    def _is_ending(self, frame: FrameType | None) -> bool:
        """Whether an interrupt has come in the end of the block: before the first instruction of ``__exit__``, say."""
        while frame is not None:
            if frame.f_code is Undisturbed.__exit__.__code__ and frame.f_locals.get("self") is self._block():
                return True
            frame = frame.f_back
        return False


def _that_still_counts(handler: Any) -> Any:
    """A handler; or, of a block that is over, the one from before: ends need not come in the order of starts."""
    while isinstance(held := getattr(handler, "__self__", None), HeldBack) and held._is_over:
        handler = held._previous
    return handler
