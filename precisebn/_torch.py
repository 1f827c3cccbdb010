"""What the library asks torch that has no public name there, or none that type checkers see; all of it."""

import torch
from torch import Tensor
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

__all__ = ["is_batched", "is_exporting", "is_scripting", "is_tracing"]


def is_exporting() -> bool:
    """Whether torch.export is at work.

    Not torch.compiler.is_exporting, which Dynamo takes to be true in torch.compile as well (seen in torch 2.10).
    """
    return bool(torch.compiler._is_exporting_flag)


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor inside torch.func stands for several, by torch.vmap, at any depth."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
