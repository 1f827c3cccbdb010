"""The bound of 1e-6 on the variance, for the data that is hardest on sums: of equal values, all round the same way."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from precisebn import ops


def exact_m2(x: Tensor) -> np.ndarray:
    values = x.double().numpy()
    values = np.moveaxis(values, 1, 0).reshape(x.shape[1], -1).astype(np.longdouble)
    deviation = values - values.mean(1, keepdims=True)
    m2: np.ndarray = (deviation**2).sum(1) - deviation.sum(1) ** 2 / values.shape[1]
    return m2.astype(np.float64)


def assert_within_1e_6(x: Tensor, channels_last: bool) -> None:
    laid_out = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    _, _, m2 = ops.moments(laid_out)
    np.testing.assert_allclose(m2[0].numpy(), exact_m2(x), rtol=1e-6)


# Lengths around every way that the kernels take planes: held in registers, four at a time, by blocks.
lengths = st.one_of(st.integers(1, 600), st.sampled_from([2047, 2048, 2049, 4096, 5000]))


@given(
    seed=st.integers(0, 2**32 - 1),
    length=lengths,
    batch=st.integers(1, 5),
    log_density=st.floats(-3.5, -0.3),
    values=st.tuples(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32)),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@example(0, 2048, 1, -3.0, (0.0, 1.7), False, torch.float32)
@example(0, 2048, 1, -3.0, (0.0, 1.7), True, torch.float32)
@settings(max_examples=150, deadline=None)
def test_variance_of_two_values(seed, length, batch, log_density, values, channels_last, dtype):
    generator = torch.Generator().manual_seed(seed)
    rare = torch.rand(batch, 33, length, generator=generator) < 10**log_density
    assert_within_1e_6(torch.where(rare, values[1], values[0]).to(dtype), channels_last)


@given(
    seed=st.integers(0, 2**32 - 1),
    length=lengths,
    log_density=st.floats(-3.5, -0.3),
    center=st.sampled_from([0.0, 1.0, -300.0]),
    channels_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_variance_of_sparse_values(seed, length, log_density, center, channels_last):
    """Mostly one value, as behind a ReLU, and now and then anything."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 17, length)
    present = torch.rand(shape, generator=generator) < 10**log_density
    assert_within_1e_6(center + torch.randn(shape, generator=generator).abs() * present, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("lead", [1 / 32, 1 / 16, 1 / 8, 1 / 2])
def test_variance_of_one_value_and_then_another(lead, channels_last):
    """A centre taken from the first values of a chunk is as far from the mean of all as it can be."""
    position = torch.arange(4096) % 512
    x = torch.where(position < 512 * lead, 0.1, 0.7).expand(3, 5, 4096).clone()
    assert_within_1e_6(x, channels_last)
