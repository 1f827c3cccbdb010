"""Checks of what users pass to the operators, and what all operators know of dtypes."""

import torch
from torch import Tensor

from precisebn.errors import InputError

__all__ = ["DTYPES", "cast", "check_coefficients", "check_dy", "check_group", "check_input", "check_x", "compute_dtype"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of coefficients for ``x``, and of the arithmetic on it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes a microsecond, and a node of an exported graph, also where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _shape(t: Tensor) -> str:
    return f"({', '.join(map(str, t.shape))})"


def check_input(operator: str, x: Tensor, group: Tensor | None, num_groups: int) -> None:
    """Raise InputError, opening with ``operator``, unless every operator takes ``x`` and ``group``."""
    check_x(operator, x)
    check_group(operator, x, group, num_groups)


def check_x(operator: str, x: Tensor) -> None:
    """Raise InputError unless every operator takes ``x``."""
    if x.dim() < 2:
        raise InputError(f"{operator}: x must be (N, C, *), at least 2 dimensions, but has shape {_shape(x)}")
    if x.dtype not in DTYPES:
        raise InputError(f"{operator}: x {_shape(x)} must be float32, float64, float16 or bfloat16, but is {x.dtype}")


def check_dy(operator: str, dy: Tensor, x: Tensor) -> None:
    """Raise InputError unless ``dy`` can be the gradient of what ``x`` became."""
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise InputError(
            f"{operator}: dy {_shape(dy)} {dy.dtype} on {dy.device} must have the shape, dtype and device of "
            f"x {_shape(x)} {x.dtype} on {x.device}"
        )


def check_group(operator: str, x: Tensor, group: Tensor | None, num_groups: int) -> None:
    """Raise InputError unless ``group`` tells the group of each sample of ``x``."""
    if num_groups < 1:
        raise InputError(f"{operator}: num_groups must be at least 1, but is {num_groups}")
    if group is None:
        return
    if group.dtype != torch.int64 or group.dim() != 1 or group.shape[0] != x.shape[0]:
        raise InputError(
            f"{operator}: group must be int64 of shape ({x.shape[0]},), one number per sample of x {_shape(x)}, "
            f"but is {group.dtype} of shape {_shape(group)}"
        )
    if group.device != x.device:
        raise InputError(f"{operator}: group is on {group.device}, but x is on {x.device}")
    if group.device.type == "cpu" and group.numel() and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in group.aminmax())
        if lowest < 0 or highest >= num_groups:
            raise InputError(
                f"{operator}: group must hold numbers from 0 to {num_groups - 1}, but holds {lowest} to {highest}"
            )


def check_coefficients(
    operator: str, x: Tensor, group: Tensor | None, num_groups: int | None = None, **coefficients: Tensor | None
) -> int:
    """Raise InputError unless all ``coefficients`` are (G, C), as x and group ask for; return G.

    Args:
        operator: what the message opens with.
        x: already checked.
        group: of each sample, or None; its contents are not looked at.
        num_groups: G; None: as many as the first coefficient has.
        coefficients: by the name that the user knows them by; None for one that is left out, which the first is not.
    """
    first_name, first = next(iter(coefficients.items()))
    assert first is not None
    rows = (first.shape[0] if first.dim() else 1) if num_groups is None else num_groups
    shape, device = (rows, x.shape[1]), x.device
    for name, value in coefficients.items():
        if value is not None and (value.shape != shape or value.device != device or not value.is_floating_point()):
            raise _wrong_coefficient(operator, name, value, x, rows)
    if group is None and num_groups is None and rows != 1:
        raise InputError(f"{operator}: {first_name} {_shape(first)} has {rows} groups, but group is not given")
    return rows


def _wrong_coefficient(operator: str, name: str, value: Tensor, x: Tensor, rows: int) -> InputError:
    if value.shape != (rows, x.shape[1]):
        return InputError(
            f"{operator}: {name} must have shape (G, C), here ({rows}, {x.shape[1]}): one row per group and one column "
            f"per channel of x {_shape(x)}, but has shape {_shape(value)}"
        )
    if value.device != x.device:
        return InputError(f"{operator}: {name} is on {value.device}, but x is on {x.device}")
    return InputError(f"{operator}: {name} must be floating point, but is {value.dtype}")
