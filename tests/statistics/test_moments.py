"""Moments: the laws of a commutative monoid, and float64 NumPy on the concatenated data as the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from precisebn import Moments
from precisebn.errors import InputError

# Merging is a few float64 operations per step; a hundred steps stay far inside this.
FLOAT64 = 1e-12


@st.composite
def samples(draw, max_size=24, channels=3):
    """Float64 values (n, C), n possibly 0, of any location and scale within 12 digits of each other."""
    n = draw(st.integers(0, max_size))
    location, scale = draw(st.floats(-1e6, 1e6)), draw(st.floats(1e-3, 1e3))
    seed = draw(st.integers(0, 2**32 - 1))
    return torch.from_numpy(location + scale * np.random.default_rng(seed).standard_normal((n, channels)))


def assert_close(a: Moments, b: Moments) -> None:
    """Equal to float64 rounding: of the count exactly, of the mean and of m2 relative to the size of the values."""
    assert torch.equal(a.count, b.count)
    size = 1.0 + max(a.mean.abs().max().item(), b.mean.abs().max().item())
    assert_allclose(a.mean, b.mean, rtol=0, atol=FLOAT64 * size)
    # A mean that is off by eps * size moves m2 by n * eps * size * (distance between the means merged) at most.
    std = (a.m2.max() / a.count.clamp(min=1)).sqrt().item() + 1.0
    assert_allclose(a.m2, b.m2, rtol=1e-9, atol=FLOAT64 * a.count.item() * size * std)


@given(samples(), samples(), samples())
def test_merging_is_associative(x, y, z):
    a, b, c = Moments.of(x), Moments.of(y), Moments.of(z)
    assert_close((a + b) + c, a + (b + c))


@given(samples(), samples())
def test_merging_is_commutative(x, y):
    assert_close(Moments.of(x) + Moments.of(y), Moments.of(y) + Moments.of(x))


@given(samples())
def test_zero_is_the_identity_bit_for_bit(x):
    moments, zero = Moments.of(x), Moments.zero(3)
    assert moments + zero == moments
    assert zero + moments == moments


@given(samples(max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_any_split_equals_numpy_on_the_whole(x, cuts):
    parts = torch.tensor_split(x, sorted(min(cut, len(x)) for cut in cuts))
    moments = sum((Moments.of(part) for part in parts), Moments.zero(3))
    assert moments.count == len(x)
    if len(x) == 0:
        assert moments == Moments.zero(3)
        return
    assert_allclose(moments.mean, x.numpy().mean(0), rtol=FLOAT64, atol=FLOAT64)
    # Every deviation, NumPy's too, carries the rounding of a mean as large as the values, and so does their size.
    rounding = 8 * np.finfo(np.float64).eps * np.abs(x.numpy()).max()
    assert_allclose(moments.std(), x.numpy().std(0), rtol=FLOAT64, atol=rounding)
    if len(x) > 1:
        assert_allclose(moments.std(unbiased=True), x.numpy().std(0, ddof=1), rtol=FLOAT64, atol=2 * rounding)


@given(samples(max_size=30), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_shift_moves_the_mean_and_scale_the_spread(x, shift, scale):
    before, after = Moments.of(x), Moments.of(x * scale + shift)
    size = 1.0 + abs(shift) + abs(scale) * (1.0 + x.abs().max().item() if len(x) else 1.0)
    assert torch.equal(before.count, after.count)
    if len(x):
        assert_allclose(after.mean, before.mean * scale + shift, rtol=1e-12, atol=1e-12 * size)
        # Rounding x * scale + shift moves every value by eps * size, and so the standard deviation by no more.
        assert_allclose(after.std(), before.std() * abs(scale), rtol=1e-9, atol=4 * 2.3e-16 * size)


@given(
    st.sampled_from([1.0, -1.0]),
    st.floats(0, 4),
    st.floats(-3, 3),
    st.integers(2, 2000),
    st.integers(1, 8),
    st.integers(0, 2**32 - 1),
)
def test_float32_variance_within_1e_6_up_to_mean_over_std_1e4(sign, log_ratio, log_std, n, parts, seed):
    std = 10.0**log_std
    data = np.random.default_rng(seed).standard_normal((n, 4)) * std + sign * std * 10.0**log_ratio
    x = torch.from_numpy(data.astype(np.float32))
    moments = sum(Moments.of(part) for part in x.chunk(parts))
    expected = x.double().numpy().var(0)  # of the rounded data: what is measured is our arithmetic, not float32's grid
    assert (moments.m2 >= 0).all()
    assert_allclose(moments.var(), expected, rtol=1e-6)
    assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-6, atol=1e-6 * std)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_groups_are_the_moments_of_their_samples_and_sum_to_the_whole(group, seed):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(group), 2, 3)) + 50.0)
    index = torch.tensor(group)
    grouped = Moments.of(x, index, num_groups=4)
    for g in range(4):
        alone = Moments.of(x[index == g]) if (index == g).any() else Moments.zero(2)
        assert_close(Moments(grouped.count[g], grouped.mean[g], grouped.m2[g]), alone)
    assert_close(grouped.sum(), Moments.of(x))


def test_grouped_moments_merge_group_by_group():
    x, index = torch.randn(9, 2), torch.tensor([0, 1, 2] * 3)
    both = Moments.of(x[:5], index[:5], 3) + Moments.of(x[5:], index[5:], 3)
    whole = Moments.of(x, index, 3)
    assert_allclose(both.mean, whole.mean, rtol=1e-6)
    assert_allclose(both.m2, whole.m2, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 5, 2), (6, 3, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_and_number_of_dimensions(shape, dtype):
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    values = x.double().movedim(1, 0).reshape(3, -1).numpy()
    moments = Moments.of(x)
    assert moments.count == values.shape[1]
    assert_allclose(moments.mean, values.mean(1), rtol=1e-6)
    assert_allclose(moments.var(), values.var(1), rtol=1e-6)


def test_variance_of_too_few_values_is_nan_as_in_torch():
    assert Moments.zero(2).var().isnan().all()
    one = Moments.of(torch.ones(1, 2))
    assert (one.var() == 0).all()
    assert one.var(unbiased=True).isnan().all()


def test_merging_different_channels_says_so():
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(3,\)"):
        Moments.zero(2) + Moments.zero(3)


def test_zero_of_groups_has_one_count_a_group():
    zero = Moments.zero(3, num_groups=2)
    assert zero.count.shape == (2,)
    assert zero.mean.shape == zero.m2.shape == (2, 3)
    assert zero.sum() == Moments.zero(3)
