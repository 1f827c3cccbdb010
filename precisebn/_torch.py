"""What the library asks torch that has no public name there, or none that type checkers see, one small function each.

A change of torch then shows in one place, and fails the test of that function.
"""

import datetime
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]
from torch.utils import _pytree

__all__ = [
    "assert_async",
    "flatten_tree",
    "flattened",
    "group_store",
    "group_timeout",
    "in_backward",
    "is_batched",
    "is_exporting",
    "is_scripting",
    "is_tracing",
    "is_transformed",
    "join_disabled",
    "outside_of_transforms",
    "unflatten_tree",
    "unwrapped",
]


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know torch's own operators alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor inside torch.func stands for several, by torch.vmap, at any depth."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def unwrapped(tensor: Tensor) -> Tensor:
    """What a tensor inside torch.func stands for, a plain tensor: of a batched one, all together."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def outside_of_transforms() -> AbstractContextManager[Any]:
    """A context for work on plain tensors in the midst of torch.func, of which torch.func then knows nothing."""
    context: AbstractContextManager[Any] = torch._C._DisableFuncTorch()
    return context


def is_exporting() -> bool:
    """Whether torch.export is at work.

    Not torch.compiler.is_exporting, which Dynamo takes to be true in torch.compile as well (seen in torch 2.10).
    """
    return bool(torch.compiler._is_exporting_flag)


def in_backward() -> bool:
    """Whether this runs inside a backward; never while being traced."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def assert_async(condition: Tensor, message: str) -> None:
    """Raise RuntimeError unless a tensor of one element is true; on a GPU later, without waiting for it now."""
    torch._assert_async(condition, message)


def flattened(tensors: list[Tensor]) -> Tensor:
    """A copy of some tensors of one dtype and device, one after the other: ``cat`` of flat views, in a single call."""
    if all(tensor.dim() == 1 for tensor in tensors):
        return torch.cat(tensors)  # which makes no views: a quarter of the time
    flat: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return flat.clone() if len(tensors) == 1 else flat  # of a single one torch makes a view


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


def join_disabled() -> dict[str, Any]:
    """The attribute of a DistributedDataParallel that ``with ddp.join()`` sets and leaves behind, as it was before."""
    from torch.distributed.algorithms.join import _JoinConfig  # not every build of torch has it

    return {"_join_config": _JoinConfig.construct_disabled_join_config()}


def flatten_tree(tree: Any) -> tuple[list[Any], Any]:
    """What lies in nested lists, tuples, named tuples, dicts and what else torch is told of, in order; and the form."""
    return _pytree.tree_flatten(tree)


def unflatten_tree(leaves: list[Any], form: Any) -> Any:
    """The nested structure again, with these in it."""
    return _pytree.tree_unflatten(leaves, form)
