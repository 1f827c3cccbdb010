"""Process groups: which one an argument stands for, and where its backend can reduce."""

from typing import Any, Literal

import torch
import torch.distributed as dist

from precisebn.errors import InputError

__all__ = ["Carried", "ProcessGroup", "group_of", "number_of_ranks", "sync_group", "wire_device"]

ProcessGroup = Any
"""``torch.distributed.ProcessGroup``, which not every build of torch has, or a DeviceMesh of one dimension."""


def group_of(process_group: ProcessGroup | Literal[False] | None) -> ProcessGroup:
    """The group itself, None for this process alone."""
    if process_group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is None:
            return None
        raise InputError(
            "process_group was given, but torch.distributed is not initialized: call "
            "torch.distributed.init_process_group() first"
        )
    from torch.distributed.device_mesh import DeviceMesh  # not every build of torch has it

    group = dist.group.WORLD if process_group is None else process_group
    if isinstance(group, _Lost):
        raise InputError(
            "the process_group has not come through pickling, which no process group does; set it anew "
            "(layer.process_group = ...; None: all ranks)"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(f"process_group is a DeviceMesh of {group.ndim} dimensions; pass one of them: mesh['dp']")
        group = None if group.get_coordinate() is None else group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError(
            f"process_group={process_group!r} must be a process group, a DeviceMesh of one dimension, None for all "
            "ranks, or False for this process alone"
        )
    if group is None or dist.get_rank(group) < 0:
        raise InputError("this rank does not belong to the process_group it was given; call only on its members")
    return group


def sync_group(size: int) -> ProcessGroup:
    """Cut the ranks, in their order, into groups of ``size``; return the process group that this rank is in.

    What ``apex.parallel.create_syncbn_process_group`` does, for statistics over some neighbours (say, the ranks of a
    machine) instead of all. All ranks call it, as often: make one group, and give it to every layer.

    Args:
        size: ranks in a group; divides their number.

    Raises:
        InputError: torch.distributed is not initialized, or ``size`` does not divide the number of ranks.

    Example:
        >>> sync_group(8)
        Traceback (most recent call last):
        ...
        precisebn.errors.InputError: sync_group(8): torch.distributed is not initialized: call its init_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(f"sync_group({size}): torch.distributed is not initialized: call its init_process_group()")
    world = dist.get_world_size()
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or world % size:
        raise InputError(f"sync_group({size!r}): groups must be of a whole number of ranks that divides their {world}")
    group, _ = dist.new_subgroups(size)
    return group


class Carried:
    """A process group on its way into a copy of what holds it: itself in a deep copy, lost in a pickle."""

    def __init__(self, group: ProcessGroup | Literal[False] | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> "Carried":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Carried, (self.group if self.group in (None, False) else _Lost(),)


class _Lost:
    """In the place of a process group that was pickled."""


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


def number_of_ranks() -> int:
    """How many processes there are in the default group; 1 where torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
