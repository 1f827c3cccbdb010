"""Shuffles of the samples of all ranks: the same permutation on every rank, from a seed, without a broadcast.

What ranks have to know of each other is how many samples each has. One all-gather of a few integers tells, and whether
all are about to do the same; where the sizes are known, nothing but samples is exchanged.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from precisebn._reports import counted
from precisebn.distributed.exchange import Routes, exchange_rows, other_ranks_may_fail
from precisebn.distributed.groups import ProcessGroup, group_of, wire_device
from precisebn.errors import InputError

__all__ = ["Shuffle", "Sizes", "local_shuffle", "permutation_of", "shuffle_over_ranks"]

Sizes = Literal["equal"] | Sequence[int] | None
"""How many samples each rank has: as many as this one, these, or (None) to be asked."""

NUMBER = "the number of the shuffle"


@dataclass(slots=True, eq=False)  # not frozen: torch.compile takes the values of frozen ones for constants of a graph
class Shuffle:
    """One shuffle, seen from this rank: what :func:`precisebn.nn.batch_unshuffle` takes it back by.

    Attributes:
        permutation: of the samples of all ranks, one rank after the other, int64 ``(total,)`` on the CPU: place j is
            taken by sample ``permutation[j]``. The same on all ranks.
        routes: where the samples of this rank go, and where those come from that it has then.
        group: the ranks; None for a shuffle of this process alone.
        over_ranks: whether it was asked to be one over ranks.
    """

    permutation: Tensor
    routes: Routes
    group: ProcessGroup
    over_ranks: bool

    @property
    def num_sent(self) -> int:
        """Samples that this rank sends to others, and no others are on the wire: about (W - 1) / W of its own."""
        return len(self.routes.leaving)

    def shuffle(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors with a row for each sample of this rank, to those it has after the shuffle."""
        return exchange_rows(tensors, self.routes, self.group)

    def unshuffle(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The exact inverse."""
        return exchange_rows(tensors, self.routes.inverse(), self.group)


def permutation_of(total: int, seed: int, number: int = 0) -> Tensor:
    """A permutation, int64 ``(total,)`` on the CPU: the same wherever the numbers are, with the same version of torch.

    The generator takes the lower 32 bits of a seed, and neighbouring seeds begin alike; hence the hash.
    """
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=7).digest()
    return torch.randperm(total, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")), device="cpu")


def local_shuffle(num_samples: int, permutation: Tensor, *, over_ranks: bool = False) -> Shuffle:
    """A shuffle in which nothing leaves this process."""
    return Shuffle(permutation, Routes.of(permutation, [num_samples], [num_samples], 0), None, over_ranks)


def shuffle_over_ranks(
    who: str,
    num_samples: int,
    *,
    seed: int | None,
    number: int,
    sizes: Sizes,
    process_group: ProcessGroup | Literal[False] | None,
    device: torch.device,
    alike: Mapping[str, object],
) -> Shuffle:
    """The ``number``-th shuffle of a seed over the ranks of a group; each then has as many samples as any, or one less.

    Args:
        who: what to call the caller in a message.
        num_samples: of this rank.
        seed: the same on all ranks; None for a number of rank 0's, which it draws from torch's generator.
        number: which shuffle of that seed, the same on all ranks.
        sizes: how many samples each rank has; None asks, and makes sure that ranks are in step, by one all-gather of
            three integers.
        process_group: the ranks; None for the default group.
        device: where the samples are, for backends that work nowhere else.
        alike: what must be the same on all ranks, in words, by what it is of.

    Raises:
        InputError: on all ranks, where ``alike`` differs; on this one, where its number of samples is not that of
            ``sizes``, or it cannot draw a seed without asking.
    """
    group = group_of(process_group)
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    drawn = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    if world == 1:
        return local_shuffle(num_samples, permutation_of(num_samples, drawn, number), over_ranks=True)
    if sizes is None:
        facts = {**alike, "the seed": seed, NUMBER: number, "the version of torch": torch.__version__}
        rows = _gathered([num_samples, drawn, _digest(facts)], group, device)
        if len({digest for _, _, digest in rows}) > 1:
            raise InputError(f"{who}: ranks are about to shuffle different things: {_difference(facts, group)}")
        sizes, drawn = [size for size, _, _ in rows], rows[0][1]
    elif seed is None:
        raise InputError(f"{who}: with sizes= ranks ask each other nothing, so pass seed=, the same on all")
    else:
        sizes = _checked(who, sizes, num_samples, world, rank)
    total = sum(sizes)
    permutation = permutation_of(total, drawn, number)
    share, more = divmod(total, world)
    after = [share + (other < more) for other in range(world)]
    return Shuffle(permutation, Routes.of(permutation, sizes, after, rank), group, over_ranks=True)


def _checked(who: str, sizes: Literal["equal"] | Sequence[int], num_samples: int, world: int, rank: int) -> list[int]:
    """The sizes of all ranks, as far as this rank can tell that they are right."""
    found = [num_samples] * world if isinstance(sizes, str) else list(sizes)
    if len(found) != world:
        numbers = counted(len(found), "number")
        raise InputError(f"{who}: sizes= holds {numbers} for {counted(world, 'rank')}; pass one for each")
    if found[rank] != num_samples:
        raise InputError(
            f"{who}: sizes= says that rank {rank} has {counted(found[rank], 'sample')}, but it has {num_samples}; "
            "pass sizes=None, and ranks ask each other, or drop the data's last samples (drop_last=True)"
        )
    return found


def _gathered(numbers: Sequence[int], group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """The integers of every rank, by one all-gather: through the host where the backend can, so that no GPU waits."""
    own = torch.tensor(numbers, device="cpu")
    on_wire = own.to(wire_device(str(dist.get_backend_config(group)), own.device, device))
    every = [torch.empty_like(on_wire) for _ in range(dist.get_world_size(group))]
    with other_ranks_may_fail("asking each other for their numbers of samples", len(every)):
        dist.all_gather(every, on_wire, group=group)
    rows: list[list[int]] = torch.stack(every).tolist()
    return rows


def _digest(facts: Mapping[str, object]) -> int:
    text = "\n".join(f"{key}: {value}" for key, value in facts.items())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _difference(facts: Mapping[str, object], group: ProcessGroup) -> str:
    """What differs, in words; every rank knows already that something does, and asks for the facts themselves."""
    every: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(every, {key: str(value) for key, value in facts.items()}, group=group)
    for rank, other in enumerate(every):
        for key, value in every[0].items():
            if other.get(key) != value:
                remedy = "; set its attribute `calls` to the same on all" if key == NUMBER else ""
                return f"{key} is {value} on rank 0, but {other.get(key, 'not there')} on rank {rank}{remedy}"
    return "what they are is the same in words, but in another order"
