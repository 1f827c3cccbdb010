"""Makes every operator known to torch. A new operator is a file of its name beside this one, and its name here."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from precisebn.errors import InputError
from precisebn.ops.operator import Operator, differentiable, raw

__all__ = ["NAMES", "OPERATORS", "register"]

NAMES = (
    "moments",
    "accumulate",
    "coefficients",
    "normalize",
    "track",
    "backward_reduce",
    "backward_coefficients",
    "backward_apply",
    "normalize_batch",
    "normalize_and_track",
    "backward_batch",
    "backward_frozen",
)

OPERATORS: dict[str, Operator] = {}
"""What has been registered, by name."""

_library = torch.library.Library("precisebn", "FRAGMENT")


def register(operator: Operator) -> None:
    """Define an operator in torch's namespace ``precisebn``, and make it callable through ``raw``.

    A differentiable one stands twice: as itself, and, with an underscore, without its derivative. The latter carries
    the kernels; see :data:`precisebn.ops.operator.raw` for why.
    """
    name, signature = operator.name, operator.schema.removeprefix(operator.name)
    fake = _on_one_device(name, operator.fake)
    kernel = name if operator.derivative is None else f"_{name}"
    _library.define(kernel + signature, tags=(torch.Tag.pt2_compliant_tag,))
    # A kernel of a backend (CPU, CUDA) takes precedence over this one, which serves all backends that have none.
    _library.impl(kernel, operator.fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"precisebn::{kernel}", fake)
    overload = getattr(torch.ops.precisebn, kernel).default
    setattr(raw, name, overload)
    if operator.derivative is not None:
        _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, overload, "CompositeExplicitAutograd")
        torch.library.register_fake(f"precisebn::{name}", fake)
        torch.library.register_autograd(
            f"precisebn::{name}", operator.derivative.backward, setup_context=operator.derivative.save
        )
        setattr(differentiable, name, _where_asked_for(getattr(torch.ops.precisebn, name).default, overload))
    OPERATORS[name] = operator


def _where_asked_for(with_derivative: Callable[..., Any], without: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for a in arguments:  # any() of a generator takes twice as long
                if isinstance(a, Tensor) and a.requires_grad:
                    return with_derivative(*arguments)
        return without(*arguments)

    return call


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operator refuse tensors of several devices.

    torch calls the fake as soon as any operand is a meta tensor. With others on the CPU it would hand back CPU tensors
    that nothing has written to.
    """

    def checked(*arguments: Any, **named: Any) -> Any:
        first: Tensor | None = None
        for argument in (*arguments, *named.values()):
            for t in argument if isinstance(argument, list | tuple) else (argument,):
                if not isinstance(t, Tensor):
                    continue
                first = t if first is None else first
                if t.device != first.device:
                    raise InputError(
                        f"precisebn::{name}: all tensors must be on one device, but some are on {first.device} and "
                        f"some on {t.device}; move them with .to()"
                    )
        return fake(*arguments, **named)

    return checked


for _name in NAMES:
    register(import_module(f"precisebn.ops.{_name}").OPERATOR)
