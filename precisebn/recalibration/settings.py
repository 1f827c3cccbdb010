"""Settings: the arguments of a recalibration, and what is wrong with them."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from precisebn.distributed import ProcessGroup
from precisebn.errors import InputError
from precisebn.models.batches import CHANNELS_LAST, ForwardFn
from precisebn.models.selection import ModuleSelection
from precisebn.statistics.estimator import ESTIMATORS, EstimatorName

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :func:`precisebn.update_bn_stats` and :func:`precisebn.adapt_bn_stats`, under their names.

    Attributes:
        call: the function that the user has called, for messages; ranks must have called the same.
    """

    model: nn.Module
    data_loader: Iterable[Any]
    num_iters: int | None
    progress: str | bool | None
    forward: ForwardFn | None
    device: torch.device | str | None
    memory_format: torch.memory_format | None
    modules: ModuleSelection
    exclude: ModuleSelection | None
    estimator: EstimatorName
    tolerance: float | None
    process_group: ProcessGroup | Literal[False] | None
    early_exit: bool
    prior: float = 0.0
    call: str = "update_bn_stats"

    def check(self) -> None:
        """Raise InputError for what makes no sense; what selects nothing is told where layers are chosen."""
        self._check_model_and_loader()
        self._check_numbers()
        if self.modules is None:
            raise InputError("modules=None must be 'training', 'all', or modules, names and patterns, one or several")
        if self.progress not in (None, False, True, "tqdm"):
            raise InputError(f"progress={self.progress!r} must be 'tqdm', True, False or None")
        if self.estimator not in ESTIMATORS:
            raise InputError(f"estimator={self.estimator!r} must be one of {', '.join(map(repr, ESTIMATORS))}")
        if self.forward is not None and not callable(self.forward):
            raise InputError(f"forward={self.forward!r} must be a callable forward(model, batch)")
        if self.memory_format is not None and self.memory_format not in CHANNELS_LAST:
            formats = " or ".join(f"{format} (for tensors of {n} dimensions)" for format, n in CHANNELS_LAST.items())
            raise InputError(f"memory_format={self.memory_format!r} must be {formats}, or None")
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise InputError(f"device={self.device!r} is no device, such as 'cuda:0' or 'cpu': {error}") from error

    def _check_model_and_loader(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be an nn.Module, not {type(self.model).__name__}")
        if not isinstance(self.data_loader, Iterable) and not hasattr(self.data_loader, "__getitem__"):
            raise InputError(f"data_loader must yield mini-batches; {type(self.data_loader).__name__} is not iterable")

    def _check_numbers(self) -> None:
        number = self.num_iters
        if number is not None and (isinstance(number, bool) or not isinstance(number, numbers.Integral)):
            raise InputError(f"num_iters={number!r} must be a whole number, or None for the whole loader")
        if number is not None and number < 1:
            raise InputError(f"num_iters={number} must be at least 1; None uses the whole loader")
        if self.tolerance is not None and not (_is_number(self.tolerance) and 0 < self.tolerance < math.inf):
            raise InputError(f"tolerance={self.tolerance!r} must be a positive number, such as 0.01, or None")
        if not _is_number(self.prior) or not self.prior >= 0:  # NaN is not either
            raise InputError(f"prior={self.prior!r} must be a number of samples, 0 or more")
        for name, value in (("prior", self.prior), ("tolerance", self.tolerance)):
            try:
                float(value or 0.0)
            except OverflowError as error:
                raise InputError(f"{name}= is larger than any float; prior=math.inf leaves the statistics") from error

    def plain(self) -> "Settings":
        """The same with Python's own numbers: NumPy's are none to JSON, and ranks compare how numbers are written."""
        return replace(
            self,
            num_iters=None if self.num_iters is None else int(self.num_iters),
            tolerance=None if self.tolerance is None else float(self.tolerance),
            prior=float(self.prior),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
