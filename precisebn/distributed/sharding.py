"""Sharded parameters: tensors of which every rank holds a part."""

import sys
from collections.abc import Iterable

import torch

__all__ = ["is_sharded", "reshard"]


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is this rank's part of one that ranks share; none is before torch's module for it is there."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reshard(modules: Iterable[torch.nn.Module]) -> None:
    """Let FSDP (``fully_shard``) free the whole parameters that a forward without a backward has left in place.

    They come and go as it needs them; the sharded ones are what a model has, and what a picture of it shows.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()
