"""The checks, one file a subject, one function a check. A new one is a function there and a name in ``CHECKS``."""

from precisebn.auditing.check import Check
from precisebn.auditing.checks import modes

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (modes.frozen_parameters_with_live_statistics,)
"""All checks, in the order of their codes."""
