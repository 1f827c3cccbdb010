"""check_ranks: whether all ranks hold the same model, bit for bit, and if not, what differs.

Ranks drift apart without a word: running averages where DistributedDataParallel does not broadcast buffers, a layer
that one rank has in eval mode, an optimizer that skipped a step on one of them, a checkpoint that only rank 0 has
loaded. What is compared is a checksum of everything, one small text from each rank; only where these differ is a
checksum of every tensor, and only of those that differ are values sent.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

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
    kinds = _Kinds(ranks.gather(facts.digest(), _kinds))
    first = ranks.rank in kinds.first_ranks
    found: dict[str, Any] = ranks.gather(
        list(facts.by_key.values()) if first else None, lambda bring: _differing(bring, kinds)
    )
    differing: list[dict[str, Any]] = found["differing"]
    comparable = [
        Comparable(number, each["name"], each["size"])
        for number, each in enumerate(differing)
        if any(_is_comparable(each, kind) for kind in range(len(each["texts"])))
    ]
    numbers = differences_of_values(comparable, facts, ranks, kinds.reference)
    mine = {
        one.number: numbers[one.number]
        for one in comparable
        if one.number in numbers and _speaks(differing[one.number], ranks.rank, kinds)
    }
    told: dict[str, Numbers] = ranks.gather(list(mine.items()), _by_tensor_and_rank)
    return RankReport(
        world_size=ranks.size,
        reference=kinds.reference,
        differences=tuple(_difference(number, each, kinds, told) for number, each in enumerate(differing)),
        skipped=found["skipped"],
        num_tensors=found["num_tensors"],
    )


class _Kinds:
    """Ranks that agree in everything are of one kind.

    Attributes:
        of_rank: the kind of each rank; kinds are numbered in the order of their first ranks.
        first_ranks: the first rank of each kind, who speaks for it.
        reference: the first rank of the kind with the most ranks.
    """

    def __init__(self, of_rank: list[int]) -> None:
        self.of_rank = of_rank
        self.first_ranks = [of_rank.index(kind) for kind in range(max(of_rank) + 1)]
        largest = max(range(len(self.first_ranks)), key=lambda kind: (of_rank.count(kind), -kind))
        self.reference = self.first_ranks[largest]
        self.order = [largest, *(kind for kind in range(len(self.first_ranks)) if kind != largest)]
        """The kinds, the reference's first."""

    def ranks_of(self, kinds: list[int]) -> tuple[int, ...]:
        """The ranks of some kinds."""
        return tuple(rank for rank, kind in enumerate(self.of_rank) if kind in kinds)


def _kinds(digests: list[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(digest, len(numbers)) for digest in digests]


# What ranks send each other, in terms of JSON. Of each fact that differs: "kind" and "name" of it, the "size" that
# the reference has of it; and of every variant, the reference's first: "texts", and in "kinds" which kinds hold it.


def _differing(bring: list[list[list[Any]] | None], kinds: _Kinds) -> dict[str, Any]:
    """What is not the same everywhere, of the facts that one rank of each kind has brought."""
    of_kind: dict[int, dict[tuple[str, str], Fact]] = {}
    for kind in kinds.order:
        facts = [Fact(*row) for row in bring[kinds.first_ranks[kind]] or ()]
        of_kind[kind] = {(fact.kind, fact.name): fact for fact in facts}
    keys = {key: None for facts_of in of_kind.values() for key in facts_of}
    differing, skipped = [], {}
    for key in keys:
        variants: dict[tuple[str, str | None] | None, list[int]] = {}
        for kind, facts_of in of_kind.items():
            fact = facts_of.get(key)
            variants.setdefault(None if fact is None else (fact.text, fact.checksum), []).append(kind)
            if fact is not None and fact.skipped:
                skipped[fact.name] = fact.skipped
        if len(variants) > 1:
            fact = of_kind[kinds.order[0]].get(key)
            differing.append(
                {
                    "kind": key[0],
                    "name": key[1],
                    "size": None if fact is None else fact.size,
                    "texts": [NOT_THERE if variant is None else variant[0] for variant in variants],
                    "kinds": list(variants.values()),
                }
            )
    reference = of_kind[kinds.order[0]].values()
    compared = sum(fact.checksum is not None for fact in reference)
    return {"differing": differing, "skipped": skipped, "num_tensors": compared}


def _is_comparable(each: Mapping[str, Any], variant: int) -> bool:
    """Whether a variant can be compared with the reference's by its values: of the same dtype and shape."""
    return variant > 0 and each["size"] is not None and each["texts"][variant] == each["texts"][0]


def _speaks(each: Mapping[str, Any], rank: int, kinds: _Kinds) -> bool:
    """Whether a rank tells by how much a variant differs: it is the first of those that hold it."""
    return any(
        _is_comparable(each, variant) and rank == kinds.ranks_of(of_variant)[0]
        for variant, of_variant in enumerate(each["kinds"])
    )


def _by_tensor_and_rank(bring: list[list[tuple[int, list[float]]]]) -> dict[str, list[float]]:
    return {f"{number} {rank}": numbers for rank, own in enumerate(bring) for number, numbers in own}


def _difference(number: int, each: Mapping[str, Any], kinds: _Kinds, told: Mapping[str, Any]) -> Difference:
    variants = []
    for text, of_variant in zip(each["texts"], each["kinds"], strict=True):
        ranks = kinds.ranks_of(of_variant)
        variants.append(Variant(ranks, text, *told.get(f"{number} {ranks[0]}", ())))
    return Difference(each["name"], each["kind"], tuple(variants))
