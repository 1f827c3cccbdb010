"""Private names of torch that nothing public stands in for: each in one small function, so that a change of torch shows
in one place.
"""

import datetime
from typing import Any

import torch.distributed as dist

__all__ = ["group_store", "group_timeout"]


def group_store(group: Any) -> Any:
    """The key-value store that a process group was set up over; None for a group without one, as MPI's are.

    ``ProcessGroup.get_group_store`` is public, but of torch 2.12 and later only.
    """
    _, store = dist.distributed_c10d._world.pg_map.get(group, (None, None))
    return store


def group_timeout(group: Any, store: Any) -> float:
    """How long a collective of the group waits for a rank, in seconds; the store's, where the backend hides it."""
    try:
        timeout = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        timeout = store.timeout
    return (timeout if isinstance(timeout, datetime.timedelta) else store.timeout).total_seconds()
