"""Checksums: equal just where all bits are, on any device, in any memory layout."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precisebn.models import checksums as module
from precisebn.models.checksums import checksums
from precisebn.models.tensor_pictures import bytes_of

BIG = 2**64


def mix(z: int) -> int:
    """SplitMix64's finalizer, as its authors write it."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % BIG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % BIG
    return z ^ (z >> 31)


def expected(data: bytes) -> str:
    total = mix(len(data))
    for start in range(0, len(data), 8 * module.CHUNK):
        chunk = data[start : start + 8 * module.CHUNK]
        words = struct.unpack(f"<{-(-len(chunk) // 8)}Q", chunk + bytes(-len(chunk) % 8))
        added = sum(mix(word ^ mix((i + 1) * 0x9E3779B97F4A7C15 % BIG)) for i, word in enumerate(words))
        total = mix(total ^ added % BIG)
    return f"{total:016x}"


def checksum(tensor: torch.Tensor) -> str | None:
    return checksums([bytes_of(tensor)])[0]


@given(st.binary(min_size=1, max_size=200))
def test_they_are_what_the_formula_says_in_pythons_own_integers(data):
    assert checksums([[torch.tensor(list(data), dtype=torch.uint8)]]) == [expected(data)]


def test_pieces_of_large_tensors_count_in_their_order(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    data = bytes(range(100))
    assert checksums([[torch.tensor(list(data), dtype=torch.uint8)]]) == [expected(data)]
    swapped = data[32:64] + data[:32] + data[64:]
    assert expected(swapped) != expected(data)
    assert checksums([[torch.tensor(list(swapped), dtype=torch.uint8)]]) == [expected(swapped)]


NAN_1, NAN_2 = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
ONES = torch.arange(1.0, 9.0)
DIFFERENT = {
    "0 and -0": (torch.zeros(9), torch.cat([torch.zeros(8), -torch.zeros(1)])),
    "two NaNs": (torch.stack([NAN_1, NAN_1]), torch.stack([NAN_1, NAN_2])),
    "values that have changed places": (ONES, ONES.flip(0)),
    "pairs, which cancel in an exclusive or": (torch.tensor([1.0, 1, 3]).double(), torch.tensor([2.0, 2, 3]).double()),
    "a permutation of rows": (torch.eye(16), torch.eye(16).roll(1, 0)),
    "one bit": (ONES.double(), torch.cat([ONES[:-1].double(), torch.nextafter(ONES[-1:].double(), ONES[:1].double())])),
    "more zeros": (torch.zeros(8), torch.zeros(10)),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_tensors_that_differ_have_other_checksums(case):
    a, b = DIFFERENT[case]
    assert checksum(a) != checksum(b)
    assert checksum(a) == checksum(a.clone())


def test_no_two_of_many_simple_tensors_have_the_same():
    """One-hot vectors, constants, permutations: what a sum or an exclusive or of words takes for the same."""
    tensors = [*torch.eye(200), *(torch.full((200,), float(k)) for k in range(200))]
    tensors += [torch.arange(200.0).roll(k) for k in range(200)]
    assert len(set(checksums(bytes_of(tensor) for tensor in tensors))) == len(tensors)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_values_count_and_not_how_they_lie_in_memory(dtype):
    x = torch.randint(2, (2, 3, 5, 7)).to(dtype)
    assert checksum(x) == checksum(x.contiguous(memory_format=torch.channels_last))
    assert checksum(x[:, 1]) == checksum(x[:, 1].clone())  # begins in the middle of a word
    assert checksum(x) != checksum(x.transpose(2, 3))


def test_what_has_no_bytes_has_one_too():
    assert checksums([[], None, bytes_of(torch.empty(0))]) == ["0" * 16, None, expected(b"")]


CONJUGATE = torch.tensor([1 + 2j, 3 - 1j]).conj()


@pytest.mark.filterwarnings("ignore:.*quantize:")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
def test_of_quantized_tensors_integers_and_scales_count(dtype):
    """(To view one of qint8 as bytes kills the process.)"""
    ones = torch.ones(2, 2)
    same, scaled, shifted = (
        torch.quantize_per_tensor(ones, scale, zero, dtype) for scale, zero in ((0.5, 1), (0.25, 1), (0.5, 3))
    )
    assert checksum(same) == checksum(torch.quantize_per_tensor(ones, 0.5, 1, dtype))
    assert len({checksum(same), checksum(scaled), checksum(shifted)}) == 3
    channels = [torch.quantize_per_channel(ones, s, torch.zeros(2).long(), 0, dtype) for s in (ones[0], ones[0] / 2)]
    assert checksum(channels[0]) != checksum(channels[1])


def test_conjugated_and_negated_views_are_what_they_show():
    assert checksum(CONJUGATE) == checksum(CONJUGATE.resolve_conj())
    assert checksum(CONJUGATE.imag) == checksum(CONJUGATE.imag.clone())
