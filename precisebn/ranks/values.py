"""By how much the values of a tensor differ between ranks: the reference sends its own, every rank compares."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from precisebn.distributed import Ranks
from precisebn.models.tensor_pictures import bytes_of
from precisebn.ranks.facts import Facts, Scale

__all__ = ["Comparable", "Numbers", "differences_of_values"]

Numbers = tuple[float, float] | tuple[float, float, float, float]
"""Largest and root mean square difference; of running means and variances the same as drift."""

MOST_BYTES = 2**26
"""So many bytes are sent at once: the memory that this takes beside the model, but for a single larger tensor."""


class Comparable(NamedTuple):
    """A tensor that differs, and that some ranks have in the reference's dtype and shape."""

    number: int
    name: str
    size: int


def differences_of_values(
    comparable: Sequence[Comparable], facts: Facts, ranks: Ranks, reference: int
) -> dict[int, Numbers]:
    """How far this rank's tensors are from the reference's, by their numbers.

    Args:
        comparable: the same on all ranks, as the next step of every rank depends on it.
        facts: this rank's.
        ranks: those that work together.
        reference: the rank whose values are sent.
    """
    results: dict[int, Numbers] = {}
    received: dict[str, Tensor] = {}
    pending: list[tuple[Comparable, Tensor, Scale]] = []  # running statistics, whose variances may come later
    for together in _batches(comparable):
        sizes = [one.size for one in together]
        flat = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
        if ranks.rank == reference:
            flat = torch.cat([bytes_of(facts.tensors[one.name])[0].cpu() for one in together])  # plain: of one part
        ranks.broadcast(flat, reference)
        for one, part in zip(together, flat.split(sizes), strict=True):
            own = facts.tensors.get(one.name)
            if own is None or [flat.numel() for flat in bytes_of(own)] != [one.size]:
                continue
            theirs = part.clone().view(own.dtype).view(own.shape)
            results[one.number] = _sizes(_difference(own.cpu(), theirs))
            scale = facts.scales.get(one.name)
            if scale is not None:
                received[one.name] = theirs
                pending.append((one, own, scale))
    for one, own, scale in pending:
        var = received.get(scale.var_name, scale.var).cpu()  # the reference's; where it did not come it is our own
        drift = _drift(own.cpu(), received[one.name], var, scale)
        results[one.number] = (*results[one.number][:2], *_sizes(drift))
    return results


def _batches(comparable: Sequence[Comparable]) -> Iterator[list[Comparable]]:
    together: list[Comparable] = []
    for one in comparable:
        if together and sum(other.size for other in together) + one.size > MOST_BYTES:
            yield together
            together = []
        together.append(one)
    if together:
        yield together


@torch.no_grad()
def _difference(own: Tensor, theirs: Tensor) -> Tensor:
    """Absolute differences in float64: 0 where both are the same, NaN included; infinite where one is not finite."""
    own, theirs = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (own.detach(), theirs))
    a, b = own.double().view(-1), theirs.double().view(-1)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), math.inf))


@torch.no_grad()
def _drift(own: Tensor, theirs: Tensor, var: Tensor, scale: Scale) -> Tensor:
    """Of a running mean in the reference's standard deviations, of a running variance as ``|log ratio|``."""
    difference, spread = _difference(own, theirs), (var.double() + scale.eps).view(-1)
    if scale.of == "mean":
        drift = difference / spread.sqrt()
    else:
        drift = ((own.double().view(-1).clamp(min=0.0) + scale.eps) / spread).log().abs()
    return torch.where(difference == 0, 0.0, drift.nan_to_num(nan=math.inf, posinf=math.inf))


def _sizes(differences: Tensor) -> tuple[float, float]:
    """The largest, and the root mean square."""
    if differences.numel() == 0:
        return 0.0, 0.0
    return differences.max().item(), differences.square().mean().sqrt().item()
