"""How far two tensors are apart: against NumPy in float64, for every dtype, memory layout and cut into pieces."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precisebn.state import amounts
from precisebn.state.amounts import Amounts, NotComparable, amounts_between

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool]
COMPLEX = [torch.complex64, torch.complex128]


def backwards(x: Tensor) -> Tensor:
    return x.permute(list(range(x.dim()))[::-1])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: backwards(backwards(x).contiguous()),
    "every other": lambda x: torch.stack([x, x], -1)[..., 1],
    "with an offset": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape),
}


def random(dtype: torch.dtype, shape: tuple[int, ...], scale: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64) * scale
    if dtype is torch.bool:
        return x > 0
    if not dtype.is_floating_point and not dtype.is_complex:
        x = x.clamp(0 if not dtype.is_signed else -100, 100)
    return x.to(dtype)


def as_numpy(x: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    wide = torch.complex128 if x.is_complex() else torch.float64
    return x.to(wide).resolve_conj().numpy().ravel()


def bits(x: Tensor) -> list[bytes]:
    return [value.reshape(1).view(torch.uint8).numpy().tobytes() for value in x.resolve_conj().reshape(-1)]


def expected(before: Tensor, after: Tensor) -> Amounts:
    a, b = as_numpy(before), as_numpy(after)
    changed = np.array([x != y for x, y in zip(bits(before), bits(after), strict=True)], dtype=bool)
    known = np.isfinite(a) & np.isfinite(b)
    d = np.abs(b[known] - a[known])
    rms = math.sqrt(np.mean(d**2)) if d.size else 0.0
    sizes = np.abs(a[np.isfinite(a)])
    rms_before = math.sqrt(np.mean(sizes**2)) if sizes.size else 0.0
    relative = rms / rms_before if rms_before else math.inf if rms else 0.0
    largest = float(d.max()) if d.size else 0.0
    equal = not changed.any()
    return Amounts(equal, int(changed.sum()), int((changed & ~known).sum()), largest, rms, 0.0 if equal else relative)


def check(found: Amounts, right: Amounts, length: int) -> None:
    assert (found.equal, found.num_changed, found.non_finite) == (right.equal, right.num_changed, right.non_finite)
    # Differences of numbers of float64 are rounded once on either side; sums of n squares, n times at most.
    error = (length + 8) * 2**-52
    for name in ("max_abs", "rms", "relative"):
        assert getattr(found, name) == pytest.approx(getattr(right, name), rel=error, abs=0)


@given(
    dtype=st.sampled_from(FLOATS + INTEGERS + COMPLEX),
    shape=st.sampled_from([(), (1,), (7,), (0,), (3, 5), (2, 3, 4), (1, 11), (5, 1, 3)]),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    nbytes=st.sampled_from([1, 8, 24, 40, 1 << 20]),
    elements=st.sampled_from([1, 2, 3, 1 << 20]),
    part=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_amounts_are_those_of_numpy(dtype, shape, layouts, nbytes, elements, part, seed):
    before = random(dtype, shape, 10, seed)
    other = random(dtype, shape, 10, seed + 1)
    after = torch.where(torch.rand(shape) < part, as_wide(other), as_wide(before)).to(dtype)
    x, y = (LAYOUTS[layout](t) if t.numel() else t for layout, t in zip(layouts, (before, after), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amounts, "PIECE", nbytes)
        patch.setattr(amounts, "ELEMENTS", elements)
        check(amounts_between(x, y), expected(x, y), x.numel())


def as_wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


SPECIAL = [0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 1e-300, 5e-324, 1e300, -1.7e308, 1e-170, 3e160]


@given(
    values=st.lists(st.tuples(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL)), min_size=1, max_size=9),
    elements=st.sampled_from([1, 2, 1 << 20]),
)
def test_nan_infinity_zeros_and_the_ends_of_the_range(values, elements):
    before, after = (torch.tensor(side, dtype=torch.float64) for side in zip(*values, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amounts, "ELEMENTS", elements)
        found = amounts_between(before, after)
    a, b = before.numpy(), after.numpy()
    changed = a.view(np.int64) != b.view(np.int64)
    known = np.isfinite(a) & np.isfinite(b)
    assert found.equal == (not changed.any())
    assert found.num_changed == changed.sum()
    assert found.non_finite == (changed & ~known).sum()
    with np.errstate(all="ignore"):
        d = np.abs(b[known] - a[known]).astype(np.longdouble)  # whose range holds every square
        sizes = np.abs(a[np.isfinite(a)]).astype(np.longdouble)
        rms, rms_before = (float(np.sqrt(np.mean(x**2))) if x.size else 0.0 for x in (d, sizes))
    assert found.max_abs == (float(d.max()) if d.size else 0.0)
    # What lies below the smallest normal number of float64 has fewer digits than 52.
    assert found.rms == pytest.approx(rms, rel=1e-14, abs=1e-322)
    if not found.equal and rms_before > 1e-305 and math.isfinite(rms):
        assert found.relative == pytest.approx(rms / rms_before, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_change_in_the_last_bit_anywhere_is_found(dtype):
    before = torch.ones(1001, dtype=dtype)
    for place in (0, 499, 1000):
        after = before.clone()
        after.view(torch.uint8)[place * dtype.itemsize] ^= 1
        found = amounts_between(before, after)
        assert not found.equal
        assert found.num_changed == 1
        assert 0 < found.max_abs <= 2**-7


def test_equal_nan_is_equal_and_zero_is_not_minus_zero():
    nan = torch.tensor([math.nan, 1.0])
    assert amounts_between(nan, nan.clone()).equal
    zeros = amounts_between(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (zeros.equal, zeros.num_changed, zeros.max_abs) == (False, 1, 0.0)
    other = amounts_between(nan, torch.tensor([math.nan, 3.0]))
    assert (other.num_changed, other.non_finite, other.max_abs) == (1, 0, 2.0)


def test_two_dtypes_are_compared_by_value():
    before = torch.tensor([1.0, 2.0, 1 + 2**-20, math.nan])
    found = amounts_between(before, before.bfloat16())
    assert (found.equal, found.num_changed, found.max_abs) == (False, 1, 2**-20)


def test_memory_does_not_grow_with_the_tensor():
    """An expanded tensor of 2**40 values, of which two pieces are compared before the first difference."""
    before = torch.zeros(1).expand(1 << 40)
    pieces = amounts._pieces(before, torch.ones(1).expand(1 << 40), 1 << 16, (None, None))
    assert [len(x) for _, (x, _) in zip(range(2), pieces, strict=False)] == [1 << 14, 1 << 14]


def test_one_large_dimension_behind_small_ones_is_cut_too():
    x = torch.arange(24.0).view(1, 2, 12)[:, :, ::2]
    sizes = [len(a) for a, _ in amounts._pieces(x, x.clone(), 16, (None, None))]
    assert max(sizes) <= 4
    assert sum(sizes) == 12


def test_channels_last_is_read_without_copies():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    [(a, _)] = amounts._pieces(x, x.clone(), 1 << 20, (None, None))
    assert a.data_ptr() == x.data_ptr()
    other = torch.randn(2, 3, 4, 5)  # contiguous
    found = amounts_between(other, other.to(memory_format=torch.channels_last))
    assert found.equal


def test_conjugated_and_negated_views():
    x = torch.randn(5, dtype=torch.complex64)
    assert amounts_between(x.conj(), x.conj().resolve_conj()).equal
    assert not amounts_between(x, x.conj()).equal
    imag = x.conj().imag  # a view with the negative bit
    assert amounts_between(imag, imag.resolve_neg()).equal


# ---- Other kinds of tensors ------------------------------------------------------------------------------------------


def sparse(values: list[float], indices: list[int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([indices]), torch.tensor(values), (9,), check_invariants=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_tensors():
    before = sparse([1.0, 2.0], [0, 3])
    assert amounts_between(before, before.clone()).equal
    moved = amounts_between(before, sparse([1.0, 2.5], [0, 3]))
    assert (moved.num_changed, moved.max_abs) == (1, 0.5)
    elsewhere = amounts_between(before, sparse([1.0, 2.0], [0, 4]))
    assert (elsewhere.equal, elsewhere.max_abs) == (False, None)
    csr = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse_csr()
    assert amounts_between(csr, csr.clone()).equal
    assert amounts_between(csr, csr * 2).max_abs == 2.0
    with pytest.raises(NotComparable, match="sparse_coo"):
        amounts_between(before, before.to_dense())


@pytest.mark.filterwarnings("ignore:.*quantize:")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensors():
    x = torch.tensor([0.5, 1.0, -1.0])
    before = torch.quantize_per_tensor(x, 0.5, 10, torch.qint8)
    assert amounts_between(before, before.clone()).equal
    moved = amounts_between(before, torch.quantize_per_tensor(x + 1, 0.5, 10, torch.qint8))
    assert (moved.equal, moved.max_abs) == (False, 1.0)
    scaled = amounts_between(before, torch.quantize_per_tensor(x, 0.25, 10, torch.qint8))
    assert (scaled.equal, scaled.max_abs) == (False, 0.0)
    channels = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2).long(), 0, torch.qint8)
    assert amounts_between(channels, channels.clone()).equal


def test_nested_tensors():
    before = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert amounts_between(before, before.clone()).equal
    assert amounts_between(before, before * 3).max_abs == 2.0


def test_a_dtype_that_torch_cannot_compute_with():
    x = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    y = torch.ones(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert amounts_between(x, x.clone()).equal
    found = amounts_between(x, y)
    assert (found.equal, found.max_abs) == (False, None)
    assert "float4_e2m1fn_x2" in found.remark


def test_meta_tensors_have_no_values():
    with pytest.raises(NotComparable, match=r"meta device \(after\)"):
        amounts_between(torch.ones(2), torch.ones(2, device="meta"))
