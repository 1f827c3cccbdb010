"""What ranks add up: Moments of any values merge, within the error that the code states."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precisebn import ops
from precisebn.functional.synchronized import pack, unpack

LARGE = 1e4
"""Means in standard deviations, up to which the library promises 1e-6 in the variance."""


def merged(parts: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """As ranks do it, each of which has one of the parts ``(n, C)``."""
    return unpack(torch.stack([pack(*ops.moments(torch.from_numpy(part))) for part in parts]).sum(0))


def exact(parts: list[np.ndarray]) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and m2, in NumPy's longest numbers."""
    values = np.concatenate(parts).astype(np.longdouble)
    mean = values.mean(0) if len(values) else np.zeros(values.shape[1], np.longdouble)
    return len(values), mean, np.square(values - mean).sum(0)


@st.composite
def ranks(draw: st.DrawFn) -> list[np.ndarray]:
    """Mini-batches of ranks: empty, of one sample, of many; each with another mean, beside one that all have."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 50, 1000]), min_size=1, max_size=16))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    common = draw(st.sampled_from([0.0, 1.0, 100.0, LARGE])) * generator.choice([-1, 1])
    apart = draw(st.sampled_from([0.0, 1.0, 100.0]))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return [
        scale * (common + apart * generator.standard_normal(2) + generator.standard_normal((size, 2))) for size in sizes
    ]


@given(ranks())
def test_moments_of_ranks_merge_within_the_stated_error(parts):
    count, mean, m2 = merged(parts)
    n, exact_mean, exact_m2 = exact(parts)
    assert count.item() == n
    assert (m2 >= 0).all()
    unit = len(parts) * 2.0**-52
    np.testing.assert_allclose(mean[0], exact_mean.astype(np.float64), rtol=0, atol=unit * max(map(_largest, parts)))
    if n < 2:
        assert (m2[0].numpy() <= unit * exact_mean.astype(np.float64) ** 2).all()
        return
    ratio = exact_mean**2 * n / exact_m2
    bound = (3 * len(parts) + 8) * 2.0**-53 * (1 + ratio)
    error = np.abs(m2[0].numpy() - exact_m2) / exact_m2
    assert (error <= bound).all(), (error / bound).max()
    assert (error[np.sqrt(ratio) <= LARGE] <= 1e-6).all()


def _largest(part: np.ndarray) -> float:
    return float(np.abs(part).max(initial=0.0))


def test_one_rank_that_has_all_samples_keeps_its_moments_and_empty_ones_change_no_bit():
    part = np.random.default_rng(0).standard_normal((50, 3))
    alone = merged([part])
    nothing = np.empty((0, 3))
    assert all(torch.equal(a, b) for a, b in zip(alone, merged([nothing, part, nothing]), strict=True))
    for ours, theirs in zip(alone, ops.moments(torch.from_numpy(part)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_no_values_at_all():
    count, mean, m2 = merged([np.empty((0, 2))] * 3)
    assert (count.item(), mean.tolist(), m2.tolist()) == (0.0, [[0.0, 0.0]], [[0.0, 0.0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_reaches_all_ranks(bad):
    _, mean, m2 = merged([np.ones((2, 2)), np.array([[1.0, bad]])])
    assert mean.isfinite().tolist() == [[True, False]]
    assert m2.isfinite().tolist() == [[True, False]]
