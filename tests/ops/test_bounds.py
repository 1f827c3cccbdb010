"""The bounds of 1e-6 on statistics, outputs and gradients in float32, for the data that is hardest on them.

Hard on sums is what is mostly equal, because equal values all round the same way; hard on outputs and gradients is a
mean that is large against the standard deviation.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from precisebn import ops
from precisebn.ops import raw


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
@settings(max_examples=150)
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
@settings(max_examples=60)
def test_variance_of_sparse_values(seed, length, log_density, center, channels_last):
    """Mostly one value, as behind a ReLU, and now and then anything."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 17, length)
    present = torch.rand(shape, generator=generator) < 10**log_density
    assert_within_1e_6(center + torch.randn(shape, generator=generator).abs() * present, channels_last)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 700),
    first=st.integers(1, 400),
    channels=st.sampled_from([3, 17, 64, 300, 1100]),
    log_spread=st.floats(-8, 0),
    step=st.sampled_from([1.0, -300.0, 2.0**-12]),
    again=st.booleans(),
)
@example(0, 64, 32, 300, -6.0, 1.0, False)
@example(0, 700, 218, 300, -6.0, 1.0, False)
@example(0, 300, 218, 300, -8.0, 0.7, False)
@example(0, 300, 218, 300, -8.0, -300.1, False)
@settings(max_examples=100)
def test_variance_where_the_first_rows_tell_nothing_of_the_rest(seed, rows, first, channels, log_spread, step, again):
    """The mean of the rows so far is the centre of the next block, and cancels most if they are unlike it."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(rows)
    raised = (position // first % 2 if again else (position >= first).long())[:, None] * step
    x = (raised + torch.randn(rows, channels, generator=generator) * 10**log_spread).float()
    assert_within_1e_6(x.T.reshape(1, channels, rows), channels_last=True)


@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([17, 49, 64, 100, 196, 319, 320, 511, 512, 784, 3136]),
    first=st.integers(1, 32),
    log_spread=st.floats(-8, 0),
    step=st.sampled_from([1.0, -300.0, 2.0**-12]),
)
@example(0, 196, 4, -6.0, 1.0)
@example(0, 511, 9, -8.0, -300.1)
@example(0, 784, 4, -6.0, 0.7)
@example(0, 196, 32, -3.0, 1.0)
@settings(max_examples=60, deadline=None)
def test_variance_where_the_first_planes_tell_nothing_of_the_rest(seed, length, first, log_spread, step):
    generator = torch.Generator().manual_seed(seed)
    raised = (torch.arange(32) < first)[:, None, None] * step
    assert_within_1e_6((raised + torch.randn(32, 7, length, generator=generator) * 10**log_spread).float(), False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("lead", [1 / 32, 1 / 16, 1 / 8, 1 / 2])
def test_variance_of_one_value_and_then_another(lead, channels_last):
    """A centre taken from the first values of a chunk is as far from the mean of all as it can be."""
    position = torch.arange(4096) % 512
    x = torch.where(position < 512 * lead, 0.1, 0.7).expand(3, 5, 4096).clone()
    assert_within_1e_6(x, channels_last)


def reference(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Batch normalization and its gradient in x, in float64, centred before anything else."""
    x, dy, weight, bias = (t.double() for t in (x, dy, weight, bias))
    over = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, -1, *(1 for _ in x.shape[2:])]
    centered = x - x.mean(over, keepdim=True)
    centered = centered - centered.mean(over, keepdim=True)
    std = (centered.square().mean(over, keepdim=True) + eps).sqrt()
    normalized, slope = centered / std, weight.reshape(per_channel) / std
    dx = slope * (dy - dy.mean(over, keepdim=True) - normalized * (dy * normalized).mean(over, keepdim=True))
    return normalized * weight.reshape(per_channel) + bias.reshape(per_channel), dx


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest value, of the worst channel."""
    actual, expected = (t.double().movedim(1, 0).flatten(1) for t in (actual, expected))
    return ((actual - expected).abs().amax(1) / expected.abs().amax(1)).max().item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(16, 8, 14, 14), (32, 40, 7, 7), (300, 33), (4, 3, 65, 41)])
@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e3, 1e4])
def test_outputs_and_gradients_keep_their_digits_where_the_mean_is_large(ratio, shape, channels_last):
    generator = torch.Generator().manual_seed(3)
    std = 10 ** torch.linspace(-3, 3, shape[1], dtype=torch.float64).reshape(1, -1, *(1 for _ in shape[2:]))
    x = ((torch.randn(shape, generator=generator, dtype=torch.float64) - ratio) * std).float()
    dy = torch.randn(shape, generator=generator)
    weight, bias = torch.rand(2, shape[1], generator=generator).add(0.5)
    y_exact, dx_exact = reference(x, dy, weight, bias, 1e-9)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y, count, mean, m2 = raw.normalize_batch(x, weight, bias, 1e-9)
    dx, _, _ = raw.backward_batch(dy, x, count, mean, m2, weight, 1e-9)
    assert error(y, y_exact) < 1e-6
    assert error(dx, dx_exact) < 1e-6
    # The same with given statistics, whose mean no float32 can hold.
    center, scale, shift = raw.coefficients(mean, m2 / count, weight, bias, 1e-9, False)
    assert error(raw.normalize(x, center, scale, shift), y_exact) < 1e-6


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_groups_of_their_own_means_keep_their_digits(ratio):
    generator = torch.Generator().manual_seed(4)
    group = torch.tensor([0, 1, 0, 2, 1, 2, 2, 0])
    x = torch.randn(8, 20, 9, 9, generator=generator) + ratio * (group.reshape(-1, 1, 1, 1) + 1)
    dy = torch.randn(x.shape, generator=generator)
    weight, bias = torch.rand(2, 20, generator=generator).add(0.5)
    y, count, mean, m2 = raw.normalize_batch(x, weight, bias, 0.0, group, 3)
    dx, _, _ = raw.backward_batch(dy, x, count, mean, m2, weight, 0.0, group)
    for g in range(3):
        y_exact, dx_exact = reference(x[group == g], dy[group == g], weight, bias, 0.0)
        assert error(y[group == g], y_exact) < 1e-6
        assert error(dx[group == g], dx_exact) < 1e-6
