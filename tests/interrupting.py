"""Ctrl-C at lines of one's choice: real signals, raised before the line runs."""

import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import precisebn

PACKAGE = str(Path(precisebn.__file__).parent)


class Lines:
    """Runs an action with SIGINT, really raised, at some of the lines of precisebn that it runs.

    Args:
        wanted: tells of a line, by its number as lines run (from 0) and by where it stands, whether to raise it there.

    Attributes:
        ran: the lines, as often as they ran.
        interrupted: whether KeyboardInterrupt came out.
    """

    def __init__(self, wanted: Callable[[int, tuple[str, int]], bool] = lambda number, where: False) -> None:
        self.wanted = wanted
        self.ran: list[tuple[str, int]] = []
        self.interrupted = False

    def run(self, action: Callable[[], object]) -> "Lines":
        outer = sys.gettrace()
        sys.settrace(self._trace)
        try:
            action()
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            sys.settrace(outer)
        return self

    def _trace(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.ran.append((frame.f_code.co_filename, frame.f_lineno))
            if self.wanted(len(self.ran) - 1, self.ran[-1]):
                signal.raise_signal(signal.SIGINT)
        return self._trace


class Nth:
    """At the n-th line that is run of one file, counted from 0."""

    def __init__(self, file: str, n: int) -> None:
        self.file = file
        self.left = n

    def __call__(self, number: int, where: tuple[str, int]) -> bool:
        if not where[0].endswith(self.file):
            return False
        self.left -= 1
        return self.left == -1
