"""Weight and bias in a backward: whether anything asks for one, and gradients in the form of each parameter."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Form", "cast", "form_of", "needs_gradient", "shares_form"]


class Form(NamedTuple):
    """What backward knows of a parameter whose values it does not need, and keeps in the tensor's place."""

    dim: int
    dtype: torch.dtype

    def of(self, gradient: Tensor) -> Tensor:
        """The gradient of a parameter from gradients per group: a parameter that all groups share gets their sum."""
        if gradient.dim() != self.dim:
            gradient = gradient.unsqueeze(0) if gradient.dim() < self.dim else gradient.sum(0)
        return cast(gradient, self.dtype)


def form_of(parameter: Tensor | None) -> Form | None:
    """The form of a parameter, if there is one."""
    return None if parameter is None else Form(parameter.dim(), parameter.dtype)


def shares_form(weight: Tensor | None, bias_form: Form | None) -> bool:
    """Whether the operators' gradient of bias, which is in the form of that of weight, can be bias's."""
    return weight is None or bias_form is None or bias_form == (weight.dim(), weight.dtype)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record a function of these."""
    if torch.is_grad_enabled():
        for t in tensors:  # any() of a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which an exported graph keeps even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
