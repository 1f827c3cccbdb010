"""Sharded parameters: tensors of which every rank holds a part."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from precisebn.distributed.groups import ProcessGroup
from precisebn.errors import InputError

__all__ = [
    "communicates",
    "describe_shards",
    "dtype_of_policy",
    "is_sharded",
    "reshard",
    "shard_unit",
    "sharded_flat",
    "whole_of",
]


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is this rank's part of one that ranks share; none is before torch's module for it is there."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # not yet, while it is being imported
    return kind is not None and isinstance(tensor, kind)


def communicates(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether the forward of any of some modules waits for other ranks, to gather sharded parameters."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules)


def reshard(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Let FSDP (``fully_shard``) free the whole parameters that a forward without a backward has left in place.

    They come and go as it needs them; the sharded ones are what a model has, and what a picture of it shows.

    Returns:
        The modules that have such: all that a later call need be given.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    sharded: list[torch.nn.Module] = []
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
            sharded.append(module)
    return sharded


def describe_shards(tensor: Tensor) -> str:
    """How a sharded tensor is cut, in words that are the same on all ranks that hold a part of it."""
    placements = ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]
    return f"[{placements}] over {tuple(tensor.device_mesh.shape)} ranks"  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor | None:
    """All values of a tensor, where this rank has them: of a sharded one only if it is replicated on all ranks."""
    if not is_sharded(tensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):  # type: ignore[attr-defined]
        return None
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def sharded_flat(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that FullyShardedDataParallel, FSDP's first version, has cut: plain ones of another size each."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [p for module in modules if isinstance(module, FullyShardedDataParallel) for p in module.parameters()]


def dtype_of_policy(mp_policy: object) -> torch.dtype | None:
    """The dtype that a MixedPrecisionPolicy of FSDP lets modules compute in; None where it leaves that to them.

    Raises:
        InputError: it is neither such a policy nor None.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if mp_policy is None:
        return None
    if not isinstance(mp_policy, MixedPrecisionPolicy):
        raise InputError(f"mp_policy={mp_policy!r} must be a torch.distributed.fsdp.MixedPrecisionPolicy, or None")
    return mp_policy.param_dtype


def shard_unit(
    module: torch.nn.Module,
    *,
    mesh: ProcessGroup | None,
    output_dtype: torch.dtype | None,
    reshard_after_forward: bool,
    **options: Any,
) -> None:
    """Make a module a unit of FSDP (``fully_shard``) of its own that computes in float32, as its parameters are.

    Args:
        module: the module.
        mesh: a DeviceMesh; None for all ranks.
        output_dtype: of what it returns.
        reshard_after_forward: whether its parameters are freed between forward and backward.
        options: other arguments of ``fully_shard``.

    Raises:
        InputError: no mesh; or torch.distributed is not initialized, and none was given.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise InputError(f"mesh={mesh!r} must be a DeviceMesh, as of dist.init_device_mesh, or None for all ranks")
    if mesh is None and not dist.is_initialized():
        raise InputError(
            "sharding takes ranks, but torch.distributed is not initialized: call "
            "torch.distributed.init_process_group() first, under torchrun"
        )
    policy = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=output_dtype, cast_forward_inputs=True
    )
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, **options)
