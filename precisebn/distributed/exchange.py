"""Rows that change ranks: each goes where a permutation sends it, by one all-to-all; gradients go back the same way.

Only the rows that move are on the wire: of rows that a permutation spreads evenly over W ranks, (W - 1) / W. All
tensors travel together, row by row as bytes, so that a direction is one collective however many tensors there are, of
whatever dtypes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precisebn.distributed.groups import ProcessGroup, wire_device
from precisebn.errors import RankFailedError

__all__ = ["Routes", "exchange_rows", "other_ranks_may_fail"]


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Where the rows of this rank go, and where those come from that it has afterwards.

    Attributes:
        rows: how many it has before.
        rows_after: and afterwards.
        leaving: which of its own go to other ranks, int64 on the CPU, in the order of these ranks.
        sent: how many to each rank; none to itself.
        arriving: which places those from other ranks take, in the order of these ranks.
        received: how many from each rank.
        staying: which of its own stay.
        stay_at: which places these take.
    """

    rows: int
    rows_after: int
    leaving: Tensor
    sent: list[int]
    arriving: Tensor
    received: list[int]
    staying: Tensor
    stay_at: Tensor

    @classmethod
    def of(cls, permutation: Tensor, before: Sequence[int], after: Sequence[int], rank: int) -> "Routes":
        """Those of one rank.

        Args:
            permutation: of the rows of all ranks, one rank after the other, int64 on the CPU: place j is taken by row
                ``permutation[j]``.
            before: how many rows each rank has.
            after: how many places.
            rank: this one.
        """
        source, origin = _located(permutation, before)
        place, target = _located(torch.arange(len(permutation), device="cpu"), after)
        own, here = origin == rank, target == rank
        # By rank, and within a rank by place: the order on both ends of a route.
        others = (here & ~own).nonzero().flatten()
        others = others[origin[others].argsort(stable=True)]
        return cls(
            rows=before[rank],
            rows_after=after[rank],
            leaving=source[own & ~here],
            sent=_counts(target[own & ~here], len(before)),
            arriving=place[others],
            received=_counts(origin[others], len(before)),
            staying=source[own & here],
            stay_at=place[own & here],
        )

    def inverse(self) -> "Routes":
        """The way back."""
        return Routes(
            self.rows_after,
            self.rows,
            self.arriving,
            self.received,
            self.leaving,
            self.sent,
            self.stay_at,
            self.staying,
        )


def exchange_rows(tensors: Sequence[Tensor], routes: Routes, group: ProcessGroup) -> list[Tensor]:
    """Send rows along their routes. Differentiable, also twice; every rank must then call backward, too.

    Args:
        tensors: ``(rows, *)``, of any dtypes and devices; on all ranks the same number, with the same dtypes and shapes
            of a row, and of the same ones gradients are asked for.
        routes: of this rank.
        group: the ranks; None where there are no others.

    Returns:
        Tensors ``(rows_after, *)``, each of the memory format of the one given.

    Raises:
        RankFailedError: another rank has failed, or did not come in the group's timeout.
    """
    moved: tuple[Tensor, ...] = _Exchange.apply(routes, group, *tensors)  # type: ignore[no-untyped-call]
    return list(moved)


@contextmanager
def other_ranks_may_fail(doing: str, num_ranks: int) -> Iterator[None]:
    """Around a collective, which knows nothing of why another rank is not there.

    Raises:
        RankFailedError: for whatever the backend raises.
    """
    try:
        yield
    except Exception as error:
        raise RankFailedError(
            f"{num_ranks} ranks failed in {doing}, as it happens where one has ended, or has not come; every rank must "
            f"make this call, and call backward through it: {error}"
        ) from error


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, routes: Routes, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way_back, ctx.group = routes.inverse(), group
        moved = _move(tensors, routes, group)
        ctx.mark_non_differentiable(*(y for y in moved if not (y.is_floating_point() or y.is_complex())))
        return tuple(moved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Zeros have been put where an output has no gradient, so that all ranks exchange as many.
        needed = ctx.needs_input_grad[2:]
        asked = [gradient for gradient, is_needed in zip(gradients, needed, strict=True) if is_needed]
        moved = iter(exchange_rows(asked, ctx.way_back, ctx.group))
        return None, None, *(next(moved) if is_needed else None for is_needed in needed)


def _move(tensors: Sequence[Tensor], routes: Routes, group: ProcessGroup) -> list[Tensor]:
    results = [_empty_like(x, routes.rows_after) for x in tensors]
    tensors, outputs = [_bits_of(x) for x in tensors], [_bits_of(y) for y in results]
    for x, y in zip(tensors, outputs, strict=True):
        y.index_copy_(0, routes.stay_at.to(x.device), x.index_select(0, routes.staying.to(x.device)))
    if group is None:
        return results
    rows = [_bytes_of(x.index_select(0, routes.leaving.to(x.device))) for x in tensors]
    received = _all_to_all(rows, routes, group)
    for y, part in zip(outputs, received, strict=True):
        arrived = y.new_empty((len(part), *y.shape[1:]))
        _bytes_of(arrived).copy_(part)
        y.index_copy_(0, routes.arriving.to(y.device), arrived)
    return results


def _all_to_all(rows: Sequence[Tensor], routes: Routes, group: ProcessGroup) -> Sequence[Tensor]:
    """The bytes of rows, side by side on the wire, and again apart."""
    widths = [part.shape[1] for part in rows]
    device = wire_device(str(dist.get_backend_config(group)), rows[0].device, rows[0].device)
    on_wire = torch.cat([part.to(device) for part in rows], dim=1)
    received = on_wire.new_empty(sum(routes.received), sum(widths))
    with other_ranks_may_fail("exchanging samples", len(routes.sent)):
        dist.all_to_all_single(received, on_wire, routes.received, routes.sent, group=group)
    parts: Sequence[Tensor] = received.split(widths, dim=1)
    return parts


def _located(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of rows counted over all ranks: which row of its rank each is, and of which rank."""
    ends = torch.tensor(list(accumulate(sizes)), device="cpu")
    ranks = torch.searchsorted(ends, rows, right=True)
    return rows - (ends - torch.tensor(sizes, device="cpu"))[ranks], ranks


def _counts(ranks: Tensor, num_ranks: int) -> list[int]:
    counts: list[int] = torch.bincount(ranks, minlength=num_ranks).tolist()
    return counts


def _empty_like(x: Tensor, rows: int) -> Tensor:
    """Memory for so many rows in the layout of ``x``, channels_last say; ranks need not agree on it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    keeps = x.is_contiguous(memory_format=last) and not x.is_contiguous()
    memory_format = last if keeps else torch.contiguous_format
    return torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format)


def _bits_of(x: Tensor) -> Tensor:
    """The same memory as integers of the same size: torch can index these on every device, float8 for one it cannot."""
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.element_size())
    x = x.resolve_conj().resolve_neg()
    return x if dtype is None else x.view(dtype)


def _bytes_of(rows: Tensor) -> Tensor:
    """Rows as bytes ``(n, bytes of a row)``: a view where they are contiguous."""
    flat = rows.reshape(len(rows), prod(rows.shape[1:]))
    return flat.view(torch.uint8)
