"""Checksums of tensors: equal where all bits are, computed where the tensors lie.

What goes over the wire to compare ranks is a checksum and not the values. It must tell any two tensors apart that
training on two ranks may bring about: a NaN from another NaN, 0 from -0, and values that have changed places, which a
sum (or ``torch.hash_tensor``, an exclusive or) does not see. So every word of 8 bytes is mixed with a key of its
position, by the finalizer of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"),
a bijection without structure; the results are added modulo 2^64, which is the same in every order, so that any device
gives the same checksum. Two tensors that differ have equal ones with a chance of 2^-64.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["CHUNK", "checksums"]

CHUNK = 2**18
"""Words that are mixed at once: temporary memory is some copies of 2 MiB, whatever the tensor."""

_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_GOLDEN = 0x9E3779B97F4A7C15


@torch.no_grad()
def checksums(parts: Iterable[Sequence[Tensor] | None]) -> list[str | None]:
    """One checksum for each of several tensors, as 16 hexadecimal digits; each device is waited for once.

    Args:
        parts: the bytes of each tensor: flat uint8 tensors, see :func:`precisebn.models.tensor_pictures.bytes_of`;
            None has none. They are asked for one after the other: of a tensor that is not contiguous they are a copy.

    Example:
        >>> checksums([[torch.zeros(3, dtype=torch.uint8)], [torch.zeros(4, dtype=torch.uint8)], []])
        ['b7d48157e821f5e5', '8eb1a5d11d7309c9', '0000000000000000']
    """
    keys: dict[torch.device, Tensor] = {}
    results: list[str | None] = []
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, tensors in enumerate(parts):
        results.append(None if tensors is None else f"{0:016x}")
        if tensors:
            device = tensors[0].device
            total = torch.zeros((), dtype=torch.int64, device=device)
            for flat in tensors:
                total = _fold(total, flat, keys)
            sums.setdefault(device, []).append((index, total))
    for found in sums.values():
        for (index, _), word in zip(found, torch.stack([total for _, total in found]).tolist(), strict=True):
            results[index] = f"{word % 2**64:016x}"
    return results


def _fold(total: Tensor, flat: Tensor, keys: dict[torch.device, Tensor]) -> Tensor:
    """The checksum of what came before and of some more bytes, whose number counts too."""
    number = min(-(-flat.numel() // 8), CHUNK)
    if flat.device not in keys or keys[flat.device].numel() < number:
        keys[flat.device] = _mix(torch.arange(1, number + 1, device=flat.device).mul_(_signed(_GOLDEN)))
    total = _mix(total ^ flat.numel())
    for chunk in flat.split(8 * CHUNK):
        padded = chunk.new_zeros(-(-chunk.numel() // 8) * 8)
        padded[: chunk.numel()] = chunk
        words = padded.view(torch.int64)
        mixed = _mix(words ^ keys[flat.device][: words.numel()])
        total = _mix(total ^ mixed.sum())
    return total


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finalizer, of every word, in place; products wrap around, as int64 does."""
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, _SHIFTS[2]))


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (words >> by).bitwise_and_(2 ** (64 - by) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
