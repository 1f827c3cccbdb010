"""check_ranks: whether all ranks hold the same model, bit for bit, and if not, what differs.

Ranks drift apart without a word: running averages where DistributedDataParallel does not broadcast buffers, a layer
that one rank has in eval mode, an optimizer that skipped a step on one of them, a checkpoint that only rank 0 has
loaded. What is compared is a checksum of everything, one small text from each rank; only where these differ is a
checksum of every tensor, and only of those that differ are values sent.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from precisebn.distributed import ProcessGroup, Ranks
from precisebn.errors import InputError
from precisebn.models.interrupts import HeldBack
from precisebn.ranks.facts import Fact, Facts
from precisebn.ranks.report import NOT_THERE, Difference, RankReport, Variant
from precisebn.ranks.values import Comparable, Numbers, differences_of_values

__all__ = ["check_ranks"]


def check_ranks(
    model: nn.Module,
    process_group: ProcessGroup | Literal[False] | None = None,
    *,
    log: Callable[[str], object] | None = None,
) -> RankReport:
    """Compare a model with those of all other ranks, bit for bit; every rank gets the same report.

    Compared are parameters, running statistics and all other buffers (also those outside of the state dict), by name;
    whether parameters are trained (``requires_grad``) and modules are in training mode. NaN is equal to the same NaN, 0
    differs from -0. Nothing is changed. Wrappers (DistributedDataParallel, torch.compile) do not count in names. Of
    sharded parameters (FSDP, DTensor), of which every rank holds another part, dtype, shape and placement are compared;
    they are listed, as is what has no values (meta tensors, lazy parameters). Parameters that FSDP has gathered for a
    forward are freed before.

    Checksums of 64 bits are computed where tensors lie, at about a gigabyte a second on a CPU. Where all ranks are
    equal each sends one of 32 bytes; else one of each tensor, and the reference sends the values of what differs.

    Args:
        model: any module.
        process_group: ranks to compare: a group or a DeviceMesh of one dimension. None: all ranks, where
            torch.distributed is initialized; all of them must call. False, or a single rank, has nothing to compare
            with.
        log: what rank 0 is to call with the report as text, such as ``print`` or ``logger.info``.

    Raises:
        RankFailedError: another rank failed, or did not come within the timeout of the process group.
        InputError: no module; ranks that make another call, or have another version of this library.

    Example:
        >>> report = check_ranks(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), log=print)
        7 tensors, on 1 rank: all equal, bit for bit
        >>> report.raise_if_different()
    """
    with (
        HeldBack() as interrupts,
        Ranks(process_group, let_through=interrupts.let_through, call="check_ranks") as ranks,
    ):
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be an nn.Module, not {type(model).__name__}")
        if log is not None and not callable(log):
            raise InputError(f"log={log!r} must be what to call with a text, such as print")
        ranks.agree({}, "Every rank must call check_ranks.")
        facts = Facts(model)
        ranks.device = next((t.device for t in facts.tensors.values() if t.device.type != "cpu"), None)
        report = _compare(facts, ranks)
    if log is not None and ranks.rank == 0:
        log(str(report))
    return report


def _compare(facts: Facts, ranks: Ranks) -> RankReport:
    camps = _Camps(ranks.gather(facts.digest(), _camps))
    speaks = ranks.rank in camps.first_ranks
    rows, skipped, num_tensors = ranks.gather(
        list(facts.by_key.values()) if speaks else None, lambda bring: _differing(bring, camps)
    )
    differing = [_Differing(*row) for row in rows]
    comparable = [
        Comparable(number, one.name, one.size)
        for number, one in enumerate(differing)
        if one.size is not None and any(map(one.is_comparable, range(len(one.texts))))
    ]
    numbers = differences_of_values(comparable, facts, ranks, camps.reference)
    told: dict[str, Numbers] = ranks.gather(
        [(number, own) for number, own in numbers.items() if differing[number].is_told_by(ranks.rank, camps)],
        _by_tensor_and_rank,
    )
    return RankReport(
        world_size=ranks.size,
        reference=camps.reference,
        differences=tuple(_difference(number, one, camps, told) for number, one in enumerate(differing)),
        skipped=skipped,
        num_tensors=num_tensors,
    )


class _Camps:
    """Ranks that agree in everything are one camp.

    Attributes:
        of_rank: the camp of each rank; camps are numbered in the order of their first ranks.
        first_ranks: the first rank of each camp, who speaks for it.
        reference: the first rank of the camp with the most ranks.
    """

    def __init__(self, of_rank: list[int]) -> None:
        self.of_rank = of_rank
        self.first_ranks = [of_rank.index(camp) for camp in range(max(of_rank) + 1)]
        largest = max(range(len(self.first_ranks)), key=lambda camp: (of_rank.count(camp), -camp))
        self.reference = self.first_ranks[largest]
        self.order = [largest, *(camp for camp in range(len(self.first_ranks)) if camp != largest)]
        """The camps, the reference's first."""

    def ranks_of(self, camps: list[int]) -> tuple[int, ...]:
        """The ranks of some camps."""
        return tuple(rank for rank, camp in enumerate(self.of_rank) if camp in camps)


def _camps(digests: list[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(digest, len(numbers)) for digest in digests]


class _Differing(NamedTuple):
    """A fact that differs; made of what JSON knows.

    Attributes:
        kind: of the fact.
        name: of the tensor or the module.
        size: bytes of the reference's values, where they can be sent.
        texts: what ranks hold, in words; of the reference first.
        camps: of each of these, who holds it.
    """

    kind: str
    name: str
    size: int | None
    texts: list[str]
    camps: list[list[int]]

    def is_comparable(self, variant: int) -> bool:
        """Whether a variant can be compared with the reference's by its values: it has the same dtype and shape."""
        return variant > 0 and self.size is not None and self.texts[variant] == self.texts[0]

    def is_told_by(self, rank: int, camps: _Camps) -> bool:
        """Whether a rank tells by how much a variant differs: it is the first of those that hold it."""
        return any(
            self.is_comparable(variant) and rank == camps.ranks_of(own)[0] for variant, own in enumerate(self.camps)
        )


def _differing(bring: list[list[list[Any]] | None], camps: _Camps) -> tuple[list[_Differing], dict[str, str], int]:
    """What is not the same everywhere, of the facts that the first rank of each camp has brought.

    Returns:
        This; which tensors are not compared, and why; and how many the reference has that are.
    """
    of_camp: dict[int, dict[tuple[str, str], Fact]] = {}
    for camp in camps.order:
        facts = [Fact(*row) for row in bring[camps.first_ranks[camp]] or ()]
        of_camp[camp] = {(fact.kind, fact.name): fact for fact in facts}
    reference = of_camp[camps.order[0]]
    differing, skipped = [], {}
    for key in dict.fromkeys(key for facts_of in of_camp.values() for key in facts_of):
        variants: dict[tuple[str, str | None], list[int]] = {}
        for camp, facts_of in of_camp.items():
            fact = facts_of.get(key, Fact(*key, NOT_THERE))
            variants.setdefault((fact.text, fact.checksum), []).append(camp)
            if fact.skipped:
                skipped[fact.name] = fact.skipped
        if len(variants) > 1:
            size = reference[key].size if key in reference else None
            differing.append(_Differing(*key, size, [text for text, _ in variants], list(variants.values())))
    return differing, skipped, sum(fact.checksum is not None for fact in reference.values())


def _by_tensor_and_rank(bring: list[list[tuple[int, list[float]]]]) -> dict[str, list[float]]:
    return {f"{number} {rank}": numbers for rank, own in enumerate(bring) for number, numbers in own}


def _difference(number: int, one: _Differing, camps: _Camps, told: Mapping[str, Numbers]) -> Difference:
    variants = []
    for text, of_variant in zip(one.texts, one.camps, strict=True):
        ranks = camps.ranks_of(of_variant)
        variants.append(Variant(ranks, text, *told.get(f"{number} {ranks[0]}", ())))
    return Difference(one.name, one.kind, tuple(variants))
