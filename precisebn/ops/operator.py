"""What an operator is declared by, and the two namespaces through which the declared ones are called.

An operator's file holds its :class:`Operator`; :mod:`precisebn.ops.registry` makes all of them known to torch and fills
:data:`raw` and :data:`differentiable`. Wrappers and derivatives call operators through these two. Fallbacks call other
fallbacks, so that each is a specification that no kernel has a part in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

__all__ = ["Derivative", "Operator", "differentiable", "raw"]


@dataclass(frozen=True)
class Derivative:
    """The gradient of an operator, in the form that ``torch.library.register_autograd`` takes.

    Every derivative is one or two calls of :data:`differentiable` operators plus arithmetic on tensors ``(G, C)``, so
    that derivatives of any order exist.
    """

    save: Callable[..., None]
    """``setup_context``: keeps what backward needs."""
    backward: Callable[..., Any]
    """From the gradients of the outputs to those of the inputs."""


@dataclass(frozen=True)
class Operator:
    """One operator, but for its kernels: the one place where its schema stands."""

    schema: str
    """``name(...) -> ...`` in torch's notation. The shared libraries register kernels only, with
    ``STABLE_TORCH_LIBRARY_IMPL``: the operator exists with and without them, and no second copy can drift from this."""
    fallback: Callable[..., Any]
    """The operator in plain PyTorch: its specification, and what runs where no kernel does."""
    fake: Callable[..., Any]
    """The shapes of the results, for meta tensors and for tracing."""
    derivative: Derivative | None = None
    """None for an operator that gives no gradients."""

    @property
    def name(self) -> str:
        """The name in the namespace ``precisebn``."""
        return self.schema.partition("(")[0]


raw = SimpleNamespace()
"""Every operator without checks and without derivatives: for where none can be asked for, or an autograd function above
has them. torch runs derivatives that are written in Python in Python also where nobody asks for them, which costs small
tensors more than the work itself."""

differentiable = SimpleNamespace()
"""The operators that have derivatives, without checks: with derivative where one may be asked for, else as in
:data:`raw`."""
