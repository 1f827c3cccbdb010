"""Ctrl-C held back while something is half done.

Python turns SIGINT into KeyboardInterrupt between any two instructions of the main thread: also between a change and
the note of how to undo it, or inside the very code that undoes. So for the whole of a transaction the signal is taken
by a handler of ours. It lets an interrupt through where the code says that it may come (:meth:`HeldBack.let_through`,
around the user's own code: the model, the loader), once; at all other times it keeps it until the end.

A context manager whose body is the user's has the same need at its beginning and at its end, and none in between: the
body has the handler that the user has installed, as asyncio.run must see it (:class:`Undisturbed`). Nothing can be
installed before the first instruction of ``__exit__``, though, and there no ``try`` helps against an interrupt. So what
the ``with`` statement calls at the end is an object that nobody else holds. Where an interrupt keeps ``__exit__`` from
its work, the statement lets go of that object when it is left, and this ends the block.
"""

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import partial
from types import FrameType, MethodType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

__all__ = ["HeldBack", "Undisturbed"]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


class HeldBack(AbstractContextManager["HeldBack"]):
    """From ``with`` to its end SIGINT interrupts nothing but what runs inside :meth:`let_through`.

    What is held back is delivered at the end, to the handler that was there before, unless a KeyboardInterrupt is on
    its way already. Only the main thread gets signals, and only a handler written in Python can be stood in for:
    elsewhere this does nothing. Blocks nest: an inner one hands on to the outer; and one object serves for several, one
    after the other. A handler that somebody installs inside of one stays.
    """

    def __init__(self) -> None:
        self.pending = False
        """Whether an interrupt waits."""
        self._lets_through = False
        self._previous: Any = None
        self._is_over = False

    def __enter__(self) -> "HeldBack":
        previous = signal.getsignal(signal.SIGINT)
        self.pending = self._is_over = False
        if threading.current_thread() is threading.main_thread() and callable(previous):
            if previous != self._handle:  # kept by somebody since an earlier time
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
            signal.signal(signal.SIGINT, self._previous)
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


class _EndsIfUncalled:
    """The method by which a block ends; the end comes, too, if a ``with`` statement goes by it.

    The statement looks it up before the block begins, and holds what it gets until the statement is left. A function
    written in Python would hold it, too, by its frame, in the traceback of an interrupt: a partial is held by nobody.
    """

    def __init__(self, end: Callable[..., bool | None]) -> None:
        self._end = end

    def __get__(self, block: "Undisturbed[Any] | None", owner: type) -> Callable[..., bool | None]:
        if block is None:
            return self._end
        if block._is_open:
            return MethodType(self._end, block)
        end = partial(self._end, block)
        block._uncalled = weakref.ref(end, block._was_let_go)
        return end


def _ends_if_uncalled(end: F) -> F:
    return cast(F, _EndsIfUncalled(cast(Any, end)))


class Undisturbed(ContextDecorator, AbstractContextManager[T], Generic[T]):
    """What ``contextlib.contextmanager`` makes of a generator; but Ctrl-C interrupts only the body of the ``with``.

    One that comes while the block begins is raised when it has begun, and ends it at once; one that comes while it
    ends is raised when it has ended. So what the generator does before and after its ``yield`` is done, or undone.
    (``ExitStack``, which has no ``with`` statement of its own for a block, may be interrupted before it ends one.)

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
        self._interrupts = HeldBack()
        self._block = contextmanager(generator)(self._interrupts, *args, **kwargs)
        self._is_open = False
        self._uncalled: weakref.ref[Callable[..., object]] | None = None

    def __enter__(self) -> T:
        try:
            with self._interrupts:
                value = self._block.__enter__()
                self._is_open = True
            return value
        except BaseException as error:  # the body never begins, and so nobody else calls this
            self.__exit__(type(error), error, error.__traceback__)
            raise

    @_ends_if_uncalled
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        with self._interrupts:
            self._uncalled = None
            if not self._is_open:
                return None
            self._is_open = False
            return self._block.__exit__(kind, error, traceback)

    def _was_let_go(self, uncalled: object) -> None:
        """An interrupt, which is on its way already, has come before the first instructions of ``__exit__``."""
        if uncalled is self._uncalled:
            self.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def _recreate_cm(self) -> "Undisturbed[T]":
        """For every call of a function that is decorated with it."""
        again: Undisturbed[T] = self._again()
        return again
