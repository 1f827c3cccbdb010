"""Warnings that point at the line of the user's code that has called the library, however deep inside it they arise."""

import inspect
import os
import warnings
from pathlib import Path

__all__ = ["warn"]

_PACKAGE = str(Path(__file__).parent) + os.sep


def warn(message: str) -> None:
    """Issue a UserWarning at the innermost line outside of this package, be it a script, a callback or a helper's."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
