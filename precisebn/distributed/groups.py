"""Process groups: which one an argument stands for, and where its backend can reduce."""

from typing import Any, Literal

import torch
import torch.distributed as dist

from precisebn.errors import InputError

__all__ = ["ProcessGroup", "group_of", "wire_device"]

ProcessGroup = Any
"""``torch.distributed.ProcessGroup``, which not every build of torch has, or a DeviceMesh of one dimension."""


def group_of(process_group: ProcessGroup | Literal[False] | None) -> ProcessGroup:
    """The group itself, None for this process alone."""
    if process_group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is None:
            return None
        raise InputError("process_group was given, but torch.distributed is not initialized: init_process_group")
    from torch.distributed.device_mesh import DeviceMesh  # not every build of torch has it

    group = dist.group.WORLD if process_group is None else process_group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(f"process_group is a DeviceMesh of {group.ndim} dimensions; pass one of them: mesh['dp']")
        group = None if group.get_coordinate() is None else group.get_group()
    if group is None or dist.get_rank(group) < 0:
        raise InputError("this rank does not belong to the process_group it was given; call only on its members")
    return group


def wire_device(config: str, device: torch.device, accelerator: torch.device | None) -> torch.device:
    """Where a backend can reduce: on the tensor's own device if it can, else what the backend works on.

    Args:
        config: the backend of each type of device, such as ``"cpu:gloo,cuda:nccl"``.
        device: of the tensor.
        accelerator: of the model.
    """
    types = [entry.partition(":")[0] for entry in config.split(",")]
    if device.type in types:
        return device
    if "cpu" in types:
        return torch.device("cpu")
    if accelerator is not None and accelerator.type in types:
        return accelerator
    return torch.device(types[0])  # the current one of its kind
