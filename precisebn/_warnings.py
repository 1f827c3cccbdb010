"""Warnings that point at the line of the user's code that has called the library, however deep inside it they arise."""

import contextlib
import inspect
import os
import warnings
from pathlib import Path

import torch.nn.modules

__all__ = ["warn"]

# The way to a user's line also leads through nn.Module.__call__, through containers such as nn.Sequential, and, where
# one of our functions is a context manager, through contextlib.
_FOLDERS = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.nn.modules.__file__))
_INSIDE = (*_FOLDERS, contextlib.__file__)


def warn(message: str) -> None:
    """Issue a UserWarning at the innermost line that is neither this package's nor between it and the user's."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
