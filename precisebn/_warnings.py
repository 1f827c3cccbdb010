"""Warnings that point at the line of the user's code that has called the library, however deep inside it they arise."""

import inspect
import os
import warnings
from pathlib import Path

import torch.nn.modules

__all__ = ["warn"]

# The way to a user's line also leads through nn.Module.__call__, and through containers such as nn.Sequential.
_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.nn.modules.__file__))


def warn(message: str) -> None:
    """Issue a UserWarning at the innermost line that is neither this package's nor of torch's own modules."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
