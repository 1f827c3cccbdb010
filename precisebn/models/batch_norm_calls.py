"""BatchNormCalls: what a forward hands to batch_norm, seen from outside.

A subclass of nn.BatchNorm with a forward of its own may normalize part of its input, or something else altogether. What
it hands to ``batch_norm`` together with its running statistics is what it normalizes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from precisebn.models.interrupts import HeldBack

__all__ = ["BatchNormCalls"]


class BatchNormCalls(TorchFunctionMode):
    """While it lasts, sees what is handed to batch_norm in training mode.

    Args:
        running_mean: the buffer by which a layer's own calls are told from others.
        take: called with the input of each of these.

    Attributes:
        seen_own: whether there was any.
        others: inputs of calls without running statistics.
    """

    def __init__(self, running_mean: Tensor, take: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.running_mean = running_mean
        self.take = take
        self.seen_own = False
        self.others: list[Tensor] = []

    def of(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a forward, whose calls are to be seen; Ctrl-C may come while it runs, and leaves nothing switched on."""
        with HeldBack() as interrupts, self, interrupts.let_through():
            return forward(*args, **kwargs)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one call, and make it."""
        parameters = _BATCH_NORMS.get(func)
        if parameters is not None:
            given = {**dict(zip(parameters, args, strict=False)), **(kwargs or {})}
            if given.get("training"):
                if given.get("running_mean") is self.running_mean:
                    self.seen_own = True
                    self.take(given["input"])
                elif given.get("running_mean") is None:
                    self.others.append(given["input"])
        return func(*args, **(kwargs or {}))


_BATCH_NORMS: dict[Callable[..., Any], tuple[str, ...]] = {
    nn.functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
    torch.native_batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
}
