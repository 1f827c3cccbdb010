"""What the library asks torch that has no public name there: each in one small function.

A change of torch then shows in one place, and fails the test of that function.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["assert_async", "in_backward", "is_transformed"]


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know torch's own operators alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether this runs inside a backward; never while being traced."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def assert_async(condition: Tensor, message: str) -> None:
    """Raise RuntimeError unless a tensor of one element is true; on a GPU later, without waiting for it now."""
    torch._assert_async(condition, message)
