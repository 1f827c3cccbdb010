"""The exceptions of precisebn. Every one derives from :class:`PreciseBNError` and, where code that is being
replaced catches a built-in exception at the same place, from that built-in too.
"""

import sys

__all__ = [
    "PreciseBNError",
    "InputError",
    "InsufficientDataError",
    "NonFiniteStatisticsError",
    "RankFailedError",
    "RanksDifferError",
    "BatchFormatError",
    "CycleError",
    "UndoError",
    "AuditError",
    "add_note",
]


class PreciseBNError(Exception):
    """Base of all exceptions that precisebn raises on purpose."""


class InputError(PreciseBNError, ValueError):
    """An argument has a wrong shape, dtype, device or value."""


class BatchFormatError(PreciseBNError, TypeError):
    """The model could not be called on what the data loader yields; pass ``forward=``."""


class InsufficientDataError(PreciseBNError, AssertionError):
    """The data loader ended before ``num_iters`` batches, or gave none at all.

    Also an ``AssertionError``, because that is what ``fvcore.nn.update_bn_stats`` raises here.
    """


class NonFiniteStatisticsError(PreciseBNError, ArithmeticError):
    """The input of a layer held NaN or Inf, or its statistics overflow the layer's dtype."""


class RankFailedError(PreciseBNError, RuntimeError):
    """Another rank failed, or did not come in time. A recalibration has then changed no rank's model."""


class RanksDifferError(PreciseBNError, RuntimeError):
    """Ranks do not hold the same model."""


class CycleError(PreciseBNError, RuntimeError):
    """A CycleBatchNormList was not called once on every domain."""


class UndoError(PreciseBNError, RuntimeError):
    """A recalibration cannot be undone: its statistics have changed since, or it has been undone already."""


class AuditError(PreciseBNError):
    """An audit has found something as grave as ``raise_if`` does not let pass; the message has the table."""


def add_note(error: BaseException, note: str) -> None:
    """Say more about an exception without changing its type or its message: tracebacks show the note below these.

    Python 3.10 has no notes. There the exception gets the note for its cause, which tracebacks show above it, unless it
    has one already; and carries it as ``__notes__``, where later Pythons keep them, in any case.
    """
    if sys.version_info >= (3, 11):
        error.add_note(note)
        return
    vars(error).setdefault("__notes__", []).append(note)
    if error.__cause__ is None:
        error.__cause__ = PreciseBNError(note)
