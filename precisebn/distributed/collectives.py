"""Collectives of a module's forward and backward: what ranks work out together from one mini-batch.

They go by the name of a process group, as torch's functional collectives do, so that they stand in the graphs of
torch.compile, where compilers know them; and they are differentiable, to any order. A result is the same on all ranks,
bit for bit.

Ranks do not agree beforehand that all are there, as they do before a step of a recalibration: that would cost a layer
more than its work. A rank that does not come is noticed by the process group, after its timeout.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from precisebn.distributed.groups import ProcessGroup, group_of
from precisebn.errors import RankFailedError

__all__ = ["all_reduce", "ranks_beside", "sum_over_ranks"]


def ranks_beside(process_group: ProcessGroup | Literal[False] | None) -> str | None:
    """The name of the group of ranks that this one works with; None where there is no other.

    Args:
        process_group: the ranks; None: all; False: this one alone. What it says does not matter where torch.distributed
            is not initialized.

    Raises:
        InputError: this rank does not belong to it.
    """
    # Not dist.is_initialized(), which torch.compile takes for a constant: a graph made before there were ranks would go
    # on without them. For another default group it makes another graph.
    if not dist.is_available() or dist.group.WORLD is None:
        return None
    group = group_of(process_group)
    return str(group.group_name) if group is not None and dist.get_world_size(group) > 1 else None


def sum_over_ranks(values: Tensor, group: str) -> Tensor:
    """The sum of the tensors that ranks bring, which have the same shape and dtype; not differentiable.

    Args:
        values: of this rank.
        group: the name of the process group.

    Raises:
        RankFailedError: a rank has ended, or has not come.
    """
    try:
        total: Tensor = torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(values, "sum", group)
        )
    except RuntimeError as error:
        raise RankFailedError(
            "adding up over ranks failed: a rank has ended or did not come, or the group's backend does not work on "
            f"{values.device.type}. All ranks must run the same layers, in the same mode, as often, forward and "
            f"backward: {error}"
        ) from error
    return total


def all_reduce(values: Tensor, group: str) -> Tensor:
    """The same, differentiable: what is to be minimized is the sum over ranks of what they minimize.

    So the gradient that arrives at a rank's ``values`` is the sum of the gradients of all ranks' results.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        total: Tensor = _AllReduce.apply(values, group)  # type: ignore[no-untyped-call]
        return total
    return sum_over_ranks(values, group)


class _AllReduce(torch.autograd.Function):
    """Is its own derivative. (Of torch's own functional all-reduce not every version of torch knows one.)"""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        ctx.group = group
        return sum_over_ranks(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None
