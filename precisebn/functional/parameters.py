"""Weight and bias in a backward: whether anything asks for one, and gradients in the form of each parameter."""

import torch
from torch import Tensor

from precisebn.ops.checks import cast

__all__ = ["Form", "form_of", "in_form", "needs_gradient", "shares_form"]


Form = tuple[int, torch.dtype]
"""Dimensions and dtype: what backward knows of a parameter whose values it does not need, in the tensor's place."""


def form_of(parameter: Tensor | None) -> Form | None:
    """The form of a parameter, if there is one."""
    return None if parameter is None else (parameter.dim(), parameter.dtype)


def in_form(gradient: Tensor, form: Form | None) -> Tensor | None:
    """The gradient of a parameter from gradients per group: one that all groups share gets their sum."""
    if form is None:  # there is no such parameter
        return None
    dim, dtype = form
    if gradient.dim() != dim:
        gradient = gradient.unsqueeze(0) if gradient.dim() < dim else gradient.sum(0)
    return cast(gradient, dtype)


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
