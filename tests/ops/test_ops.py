"""The operators: laws first, then accuracy against float64 NumPy, then shapes, layouts, derivatives and tracing.

All hold for either backend: run with PRECISEBN_BACKEND=native and with PRECISEBN_BACKEND=fallback.
"""

import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opcheck_arguments import OPCHECK_ARGUMENTS, opcheck_arguments
from torch import Tensor

from precisebn import Moments, ops
from precisebn.errors import InputError
from precisebn.ops.grouping import per_sample
from precisebn.ops.operator import differentiable, raw
from precisebn.ops.registry import NAMES, OPERATORS

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (6, 5),
    (256, 70),
    (40, 1),
    (4, 3, 1, 1),
    (33, 1, 5),
    (5, 7, 3),
    (3, 4, 7, 7),
    (2, 33, 4, 5),
    (2, 3, 40, 40),
    (2, 17, 56, 56),
    (3, 130, 14, 14),
    (70, 3, 2, 2),
    (2, 2, 3, 20, 30),
    (2, 5, 2, 2, 2, 3),
    (1, 1, 9, 9000),
    (0, 5, 3, 3),
    (4, 5, 0, 3),
    (4, 0, 3, 3),
]
LAYOUTS_AND_DTYPES = [(layout, dtype) for layout in ("contiguous", "channels_last") for dtype in DTYPES]
LAYOUTS_AND_DTYPES += [(layout, torch.float32) for layout in ("strided", "swapped", "expanded")]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (for "expanded": of its first sample), in another memory layout."""
    match layout:
        case "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "strided":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        case "swapped":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case "expanded":
            return x[:1].expand(x.shape)
    return x.contiguous()


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(shape[1], dtype=torch.float64).reshape(1, -1, *(1 for _ in shape[2:]))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + channel) + mean * channel).to(dtype)


def groups_of(x: Tensor, num_groups: int = 3) -> Tensor:
    return (torch.arange(len(x)) * 7 // 3) % num_groups


def reference(x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and m2 per channel, by NumPy in extended precision where there is one, the mean in two steps."""
    values = np.moveaxis(x.detach().double().numpy(), 1, 0).reshape(x.shape[1], -1 if x.numel() else 0)
    values = values.astype(np.longdouble)
    mean = values.sum(1) / max(values.shape[1], 1)
    mean += (values - mean[:, None]).sum(1) / max(values.shape[1], 1)
    m2 = ((values - mean[:, None]) ** 2).sum(1)
    return np.float64(values.shape[1]), mean.astype(np.float64), m2.astype(np.float64)


def assert_moments(actual: tuple[Tensor, ...], expected: tuple[np.ndarray, ...], rtol: float) -> None:
    (count, mean, m2), (n, true_mean, true_m2) = actual, expected
    assert count.item() == n
    np.testing.assert_allclose(m2.numpy(), true_m2, rtol=rtol)
    deviation = np.sqrt(true_m2 / max(n, 1))
    error = np.abs(mean.numpy() - true_mean)
    assert (error <= rtol * deviation + 1e-14 * np.abs(true_mean)).all()
    assert (m2 >= 0).all()


def rtol_of(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


def channel_of(x: Tensor, group: int, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result[0][group], result[1][group], result[2][group]


# ---- moments: laws ------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 60))


@given(shape=shapes, log_ratio=st.floats(0, 4), seed=st.integers(0, 99), channels_last=st.booleans())
@settings(max_examples=60)
def test_variance_is_accurate_for_large_means(shape, log_ratio, seed, channels_last):
    x = tensor(shape, mean=0.0, seed=seed) + 10**log_ratio
    x = laid_out(x, "channels_last") if channels_last else x
    assert_moments(channel_of(x, 0, ops.moments(x)), reference(x), 1e-6)


@given(shape=shapes, cut=st.floats(0, 1), seed=st.integers(0, 99), axis=st.sampled_from([0, 2, 3]))
@settings(max_examples=40)
def test_merging_the_parts_gives_the_whole(shape, cut, seed, axis):
    x = tensor(shape, mean=100.0, seed=seed)
    at = round(cut * x.shape[axis])
    parts = x.narrow(axis, 0, at), x.narrow(axis, at, x.shape[axis] - at)
    merged = Moments.of(parts[0]) + Moments.of(parts[1])
    assert_moments((merged.count, merged.mean, merged.m2), reference(x), 1e-6)


@given(shape=shapes, num_groups=st.integers(1, 5), seed=st.integers(0, 99), channels_last=st.booleans())
@settings(max_examples=40)
def test_a_group_is_the_moments_of_its_samples(shape, num_groups, seed, channels_last):
    x = tensor(shape, seed=seed)
    x = laid_out(x, "channels_last") if channels_last else x
    group = torch.randint(num_groups, (len(x),), generator=torch.Generator().manual_seed(seed))
    count, mean, m2 = ops.moments(x, group, num_groups)
    for g in range(num_groups):
        if (group == g).any():
            assert_moments((count[g], mean[g], m2[g]), reference(x[group == g]), 1e-6)
        else:
            assert count[g] == 0
            assert not mean[g].any()
            assert not m2[g].any()


@given(
    shape=shapes,
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    value=st.floats(-(2.0**15), 2.0**15, width=16),
    power=st.integers(-100, 80),
)
@settings(max_examples=60)
def test_a_constant_channel_has_no_variance(shape, channels_last, dtype, value, power):
    if dtype != torch.float16:
        value *= 2.0**power
    x = torch.full(shape, value).to(dtype)
    x = laid_out(x, "channels_last") if channels_last else x
    _, mean, m2 = ops.moments(x)
    assert (m2 == 0).all()
    assert (mean == x.double().flatten()[0]).all()


@given(shape=shapes, channels_last=st.booleans(), log_size=st.floats(4, 6), whole_row=st.booleans())
@settings(max_examples=40)
def test_an_outlier_in_front_does_no_harm(shape, channels_last, log_size, whole_row):
    x = tensor(shape, mean=0.0)
    if whole_row:
        x[0, :, 0] = 10**log_size
    else:
        x[0, :, 0, 0] = 10**log_size
    x = laid_out(x, "channels_last") if channels_last else x
    assert_moments(channel_of(x, 0, ops.moments(x)), reference(x), 1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-18, 1e18, 1e30, 3e37])
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (2, 3, 60, 60), (70, 18)])
def test_magnitudes_beyond_float32_squares(shape, scale, layout):
    x = laid_out((tensor(shape, torch.float64, mean=0.0) / 20 * scale).float(), layout)
    x[:, 1] = tensor(shape)[:, 1]  # next to a channel of ordinary size
    assert_moments(channel_of(x, 0, ops.moments(x)), reference(x), 1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (3, 5, 2, 2), (2, 3, 60, 60), (70, 18)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_channel(shape, bad, layout, dtype):
    x = tensor(shape, dtype)
    clean = channel_of(x, 0, ops.moments(laid_out(x, layout)))
    x[1, 1] = bad
    _, mean, m2 = channel_of(x, 0, ops.moments(laid_out(x, layout)))
    assert not mean[1].isfinite()
    assert not m2[1].isfinite()
    others = [c for c in range(shape[1]) if c != 1]
    assert torch.equal(mean[others], clean[1][others])
    assert torch.equal(m2[others], clean[2][others])


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_every_shape_layout_and_dtype(shape, layout, dtype):
    x = laid_out(tensor(shape, dtype), layout)
    assert_moments(channel_of(x, 0, ops.moments(x)), reference(x), rtol_of(dtype))
    if x.numel():
        group = groups_of(x)
        result = ops.moments(x, group, 3)
        for g in set(group.tolist()):
            assert_moments(channel_of(x, g, result), reference(x[group == g]), rtol_of(dtype))


@pytest.mark.parametrize("ratio", [1e4, 1e5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 6, 56, 56), (8, 64, 7, 7), (512, 40)])
def test_float32_variance_with_a_mean_of_many_deviations(shape, layout, ratio):
    x = laid_out(tensor(shape, torch.float64, mean=0.0).add(ratio).float(), layout)
    assert_moments(channel_of(x, 0, ops.moments(x)), reference(x), 1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_valued_data_meets_the_bound(layout):
    """Equal squares round the same way at every addition: the worst case for a float32 chain."""
    x = torch.full((4, 6, 64, 64), 1.1)
    x[:, :, ::2] = -1.3
    assert_moments(channel_of(x, 0, ops.moments(laid_out(x, layout))), reference(x), 1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 20, 56, 56), (64, 300, 7, 7), (3000, 100), (2, 3, 700, 300), (64, 5, 3, 3)])
def test_the_same_bits_on_any_number_of_threads(shape, layout):
    x = laid_out(tensor(shape), layout)
    group = groups_of(x)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((*ops.moments(x), *ops.moments(x, group, 3), *ops.backward_reduce(x, x, ops.moments(x)[1])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- accumulate ---------------------------------------------------------------------------------------------------


def accumulators(channels: int) -> list[Tensor]:
    return list(torch.zeros(1 + 2 * channels, dtype=torch.float64).split([1, channels, channels]))


@pytest.mark.parametrize("statistic_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_accumulate_merges_batches_and_reports_each(layout, dtype, statistic_dtype):
    total, batches = accumulators(6), [tensor((n, 6, 5, 5), dtype, seed=n) for n in (4, 1, 9)]
    for batch in batches:
        mean, var = torch.empty(6, dtype=statistic_dtype), torch.empty(6, dtype=statistic_dtype)
        ops.accumulate(laid_out(batch, layout), *total, mean, var)
        n, true_mean, true_m2 = (torch.as_tensor(v) for v in reference(batch))
        rtol = max(2 * torch.finfo(statistic_dtype).eps, rtol_of(dtype))
        torch.testing.assert_close(mean, true_mean.to(statistic_dtype), rtol=rtol, atol=rtol)
        torch.testing.assert_close(var, (true_m2 / n).to(statistic_dtype), rtol=rtol, atol=0)
    assert_moments(tuple(total), reference(torch.cat(batches)), rtol_of(dtype))


def test_accumulate_ignores_an_empty_batch():
    total, mean = accumulators(3), torch.full((3,), 7.0)
    ops.accumulate(torch.ones(2, 3), *total)
    before = [t.clone() for t in total]
    ops.accumulate(torch.ones(0, 3, 4, 4), *total, mean, mean.clone())
    assert all(torch.equal(a, b) for a, b in zip(total, before, strict=True))
    assert (mean == 7).all()


# ---- normalize and the backward operators -------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise_operators_match_float64(shape, layout, dtype):
    x, dy = laid_out(tensor(shape, dtype), layout), tensor(shape, dtype, seed=1)
    num_groups = 3
    group = groups_of(x, num_groups)
    a, b, c, center = (tensor((num_groups, shape[1]), torch.float32, mean=0, seed=s) for s in range(4))
    # One rounding of the difference, of each product, of their sum, and of the result in its dtype.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)

    def check(actual: Tensor, terms: list[Tensor]) -> None:
        assert actual.dtype == dtype
        assert actual.stride() == torch.empty_like(x).stride()
        bound = 2 * eps * sum(term.abs() for term in terms) + torch.finfo(dtype).tiny
        expected = sum(terms).to(dtype).double()
        assert ((actual.double() - expected).abs() <= bound).logical_or(actual.double() == expected).all()

    for index, k in ((None, 1), (group, num_groups)):
        a_, b_, c_, center_ = (per_sample(t[:k].double(), x, index) for t in (a, b, c, center))
        difference = x.double() - center_
        check(ops.normalize(x, center[:k], a[:k], b[:k], index), [a_ * difference, b_.expand_as(x)])
        check(ops.normalize(x, center[:k], a[:k], None, index), [a_ * difference])
        check(ops.normalize(x, None, a[:k], b[:k], index), [a_ * x.double(), b_.expand_as(x)])
        check(ops.normalize(x, None, a[:k], group=index), [a_ * x.double()])
        check(
            ops.backward_apply(dy, x, center[:k], a[:k], b[:k], c[:k], index),
            [a_ * dy.double(), b_ * difference, c_.expand_as(x)],
        )


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_reduce_matches_float64(shape, layout, dtype):
    x, dy = laid_out(tensor(shape, dtype), layout), tensor(shape, dtype, seed=1)
    group = groups_of(x)
    for index, k in ((None, 1), (group, 3)):
        _, mean, _ = ops.moments(x, index, k)
        sum_dy, sum_product = ops.backward_reduce(dy, x, mean, index, k)
        for g in range(k):
            mine = slice(None) if index is None else index == g
            values = np.moveaxis(dy[mine].double().numpy(), 1, 0).reshape(shape[1], -1 if x.numel() else 0)
            centered = (x[mine].double() - mean[g].reshape(1, -1, *(1 for _ in shape[2:]))).numpy()
            products = values * np.moveaxis(centered, 1, 0).reshape(values.shape)
            bound = rtol_of(dtype) * 5
            assert (np.abs(sum_dy[g].numpy() - values.sum(1)) <= bound * np.abs(values).sum(1)).all()
            assert (np.abs(sum_product[g].numpy() - products.sum(1)) <= bound * np.abs(products).sum(1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_converts_exactly(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(2**12, 16)
    one, zero = torch.ones(1, 16), torch.zeros(1, 16)
    y = ops.normalize(x, zero, one)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])
    values = torch.cat([torch.randn(20000) * s for s in (1e-8, 1e-6, 1e-4, 1.0, 3e4, 1e38)])[None]
    rounded = ops.normalize(torch.ones(1, values.shape[1], dtype=dtype), None, torch.zeros_like(values), values)
    assert torch.equal(rounded, values.to(dtype))


def test_channels_last_and_contiguous_agree_in_values_and_keep_their_format():
    x = tensor((4, 24, 9, 9))
    coefficients = [tensor((1, 24), seed=seed) for seed in range(3)]
    y = ops.normalize(x, *coefficients)
    y_last = ops.normalize(x.to(memory_format=torch.channels_last), *coefficients)
    assert y.is_contiguous()
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, y_last)


# ---- coefficients, track, backward_coefficients: what is done with tensors (G, C) -----------------------------------

ROWS = [None, 1, 3]  # of a tensor (G, C); None: (C,)


def rows(rows: int | None, dtype: torch.dtype, seed: int, positive: bool = False) -> Tensor:
    """(C,) or (G, C), C = 5, not contiguous."""
    values = torch.randn((*(() if rows is None else (rows,)), 10), generator=torch.Generator().manual_seed(seed))
    return (values.abs() + 0.1 if positive else values).to(dtype)[..., ::2]


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """Within an ulp of the float64 result in the dtype at hand, and some of float64."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=max(eps, 1e-14), atol=eps * 2**-10 + 1e-14)


def assert_center(center: Tensor, shift: Tensor, about: Tensor, slope: Tensor, offset: Tensor | float) -> None:
    """That center is ``about`` rounded, and that shift is ``offset`` and what slope makes of the rounding."""
    assert torch.equal(center, about.to(center.dtype).expand_as(center))
    assert_rounded(shift, offset + (center.double() - about) * slope)


@pytest.mark.parametrize("statistics_dtype", DTYPES)
@pytest.mark.parametrize("affine_dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_coefficients_in_every_combination_of_rows_and_dtypes(statistics_dtype, affine_dtype, double):
    for of_mean, of_weight, of_bias in itertools.product(ROWS, ["absent", *ROWS], ["absent", *ROWS]):
        mean, var = rows(of_mean, statistics_dtype, 0), rows(of_mean, statistics_dtype, 1, positive=True)
        weight, bias = (None if r == "absent" else rows(r, affine_dtype, s) for s, r in ((2, of_weight), (3, of_bias)))
        center, scale, shift = raw.coefficients(mean, var, weight, bias, 1e-3, double)
        expected_rows = 3 if 3 in (of_mean, of_weight, of_bias) else 1
        exact = (var.double() + 1e-3).rsqrt() * (1.0 if weight is None else weight.double())
        for result in (center, scale, shift):
            assert result.shape == (expected_rows, 5)
            assert result.dtype == (torch.float64 if double else torch.float32)
        assert_rounded(scale, exact.expand_as(scale))
        assert_center(center, shift, mean.double(), exact.expand_as(scale), 0.0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("num_rows", ROWS)
def test_track_moves_rows_of_two_values_or_more(num_rows, momentum, dtype):
    counts = torch.tensor([9.0, 1.0, 2.0], dtype=torch.float64)[: num_rows or 1].reshape(() if num_rows is None else -1)
    mean, m2 = rows(num_rows, torch.float64, 0), rows(num_rows, torch.float64, 1, positive=True)
    running = [rows(num_rows, dtype, 2), rows(num_rows, dtype, 3, positive=True)]
    batches = torch.full(counts.shape, 4)
    before = [t.clone() for t in running]
    exact = [t.double() for t in running]
    OPERATORS["track"].fallback(counts, mean, m2, *exact, batches.clone(), momentum)
    ops.track(counts, mean, m2, *running, batches, momentum)
    assert torch.equal(batches, 4 + (counts > 1).long())
    for actual, expected, old in zip(running, exact, before, strict=True):
        assert_rounded(actual, expected)
        alone = counts <= 1
        assert torch.equal(actual[alone], old[alone])
    if momentum == 1.0:
        assert torch.equal(running[0][counts > 1], mean[counts > 1].to(dtype))


def test_track_writes_a_row_of_a_buffer_and_lets_autograd_know():
    running_mean, running_var, batches = torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    versions = running_mean._version, running_var._version
    count, mean, m2 = torch.tensor(3.0, dtype=torch.float64), torch.ones(4).double(), torch.full((4,), 4.0).double()
    ops.track(count, mean, m2, running_mean[1], running_var[1], batches[1], 0.5)
    assert running_mean.tolist() == [[0.0] * 4, [0.5] * 4, [0.0] * 4]
    assert running_var.tolist() == [[1.0] * 4, [1.5] * 4, [1.0] * 4]
    assert batches.tolist() == [0, 1, 0]
    assert (running_mean._version, running_var._version) > versions


def test_track_ignores_what_is_not_finite_in_a_row_that_stays():
    running_mean, running_var = torch.tensor([float("inf")]), torch.tensor([float("nan")])
    count, batch = torch.ones((), dtype=torch.float64), torch.full((1,), float("nan"), dtype=torch.float64)
    ops.track(count, batch, batch, running_mean, running_var, torch.tensor(0), 0.1)
    assert running_mean.item() == float("inf")
    assert running_var.isnan().all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_track_is_what_torch_does(momentum):
    theirs = torch.nn.BatchNorm1d(5, momentum=momentum)
    mean, var, batches = torch.zeros(5), torch.ones(5), torch.tensor(0)
    for seed in range(4):
        x = tensor((7, 5, 3), seed=seed)
        theirs(x)
        ops.track(*channel_of(x, 0, ops.moments(x)), mean, var, batches, momentum)
    torch.testing.assert_close(mean, theirs.running_mean)
    torch.testing.assert_close(var, theirs.running_var)
    assert batches == theirs.num_batches_tracked


def test_track_compiles_to_plain_arithmetic():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x, mean, var, batches):
        count, batch_mean, m2 = ops.moments(x)
        ops.track(count[0], batch_mean[0], m2[0], mean, var, batches, None)

    state, same = ([torch.zeros(5), torch.ones(5), torch.tensor(0)] for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(3):
        compiled(tensor((7, 5, 3), seed=seed), *state)
        step(tensor((7, 5, 3), seed=seed), *same)
    for one, other in zip(state, same, strict=True):
        torch.testing.assert_close(one, other)
    assert "precisebn.track" not in graphs[0].code


@pytest.mark.parametrize("affine_dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_backward_coefficients_in_every_combination_of_rows(affine_dtype, double):
    for num_rows, of_weight, has_count in itertools.product(ROWS, ["absent", None, "rows"], (0, 1)):
        if of_weight == "rows":
            of_weight = num_rows or 1
        count = torch.tensor([0.0, 1.0, 8.0], dtype=torch.float64)[: num_rows or 1]
        count = count.reshape(() if num_rows is None else -1) if has_count else None
        mean, sum_dy, product = (rows(num_rows, torch.float64, s) for s in range(3))
        var = rows(num_rows, torch.float64, 3, positive=True)
        weight = None if of_weight == "absent" else rows(of_weight, affine_dtype, 4)
        center, *results = raw.backward_coefficients(count, mean, var, sum_dy, product, weight, 1e-3, double)
        _, *exact = OPERATORS["backward_coefficients"].fallback(
            count, mean, var, sum_dy, product, None if weight is None else weight.double(), 1e-3, True
        )
        affine = torch.empty(mean.shape, dtype=torch.float64) if weight is None else weight
        coefficients = torch.empty(num_rows or 1, 5, dtype=torch.float64 if double else torch.float32)
        assert (center.shape, center.dtype) == (coefficients.shape, coefficients.dtype)
        assert_center(center, results[2], mean, exact[1], exact[2])
        exact[2] = exact[2] + (center.double() - mean) * exact[1]
        for actual, expected, like in zip(results, exact, [coefficients] * 3 + [affine] * 2, strict=True):
            assert (actual.shape, actual.dtype) == (like.shape, like.dtype)
            assert_rounded(actual, expected)


# ---- normalize_batch and backward_batch: several operators in one call -----------------------------------------------


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES)
@pytest.mark.parametrize(
    "shape", [(6, 5), (3, 4, 7, 7), (2, 33, 4, 5), (3, 130, 14, 14), (2, 5, 2, 2, 2, 3), (0, 5, 3)]
)
def test_several_operators_in_one_call_are_these_operators(shape, layout, dtype):
    x, dy = laid_out(tensor(shape, dtype), layout), tensor(shape, dtype, seed=1)
    channels, double = shape[1], dtype == torch.float64
    for group, k in ((None, 1), (groups_of(x), 3)):
        weight, bias = torch.rand(channels), torch.rand(k, channels)
        y, *statistics = raw.normalize_batch(x, weight, bias, 1e-3, group, k)
        apart = ops.moments(x, group, k)
        if group is None:
            assert statistics[0].dim() == 0
        assert all(torch.equal(one.reshape(other.shape), other) for one, other in zip(statistics, apart, strict=True))
        count, mean, m2 = apart
        var = m2 / count.clamp(min=1.0).unsqueeze(-1)
        assert torch.equal(y, ops.normalize(x, *raw.coefficients(mean, var, weight, bias, 1e-3, double), group))
        assert y.stride() == torch.empty_like(x).stride()

        for gradient in (dy, dy[:1, :1].expand_as(dy) if dy.numel() else dy):
            sums = ops.backward_reduce(gradient, x, mean, group, k)
            for of_count, results in (
                (count, raw.backward_batch(gradient, x, *statistics, weight, 1e-3, group)),
                (None, raw.backward_frozen(gradient, x, mean, var, weight, 1e-3, group)),
            ):
                dx, *affine = results
                *coefficients, grad_weight, grad_bias = raw.backward_coefficients(
                    of_count, mean, var, *sums, weight, 1e-3, double
                )
                assert torch.equal(dx, ops.backward_apply(gradient, x, *coefficients, group))
                assert dx.stride() == torch.empty_like(x).stride()
                assert torch.equal(affine[0], grad_weight)
                assert torch.equal(affine[1], grad_bias)


# ---- derivatives, tracing, registration ---------------------------------------------------------------------------


def double(*shape: int, seed: int = 0, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("group", [None, torch.tensor([0, 1, 1, 0])])
def test_first_and_second_derivatives(group, channels_last):
    k = 1 if group is None else 2
    x, dy = double(4, 2, 1, 3), double(4, 2, 1, 3, seed=1)
    if channels_last:
        x = laid_out(x.detach(), "channels_last").requires_grad_()
    a, b, c, e = (double(k, 2, seed=s) for s in (2, 3, 4, 5))
    for function, inputs in (
        (lambda x: ops.moments(x, group, k)[1:], (x,)),
        (lambda x, a, b, c: ops.normalize(x, a, b, c, group), (x, a, b, c)),
        (lambda x, a, b: ops.normalize(x, None, a, b, group), (x, a, b)),
        (lambda x, a, b: ops.normalize(x, a, b, None, group), (x, a, b)),
        (lambda dy, x, a: ops.backward_reduce(dy, x, a, group, k), (dy, x, a)),
        (lambda dy, x, a, b, c, e: ops.backward_apply(dy, x, a, b, c, e, group), (dy, x, a, b, c, e)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def batch_norm(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> Tensor:
    count, mean, m2 = ops.moments(x, group, num_groups)
    scale = (m2 / count[:, None] + 1e-5).rsqrt()
    return ops.normalize(x, mean, scale, None, group)


def test_batch_normalization_and_its_gradient_are_torchs():
    x, y = tensor((6, 4, 5, 5)).requires_grad_(), tensor((6, 4, 5, 5)).requires_grad_()
    weight = tensor((6, 4, 5, 5), seed=2)
    ours = batch_norm(x)
    theirs = torch.nn.functional.batch_norm(y, None, None, training=True)
    torch.testing.assert_close(ours, theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    compiled = torch.compile(batch_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for channels_last in (False, True):
        x = tensor((6, 4, 5, 5))
        x = (laid_out(x, "channels_last") if channels_last else x).requires_grad_()
        y = compiled(x, torch.tensor([0, 1, 0, 1, 1, 1]), 2)
        expected = batch_norm(x, torch.tensor([0, 1, 0, 1, 1, 1]), 2)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(gradient, expected_gradient)


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return batch_norm(x)

    x = tensor((6, 4, 5, 5))
    program = torch.export.export(Model(), (x,))
    assert torch.equal(program.module()(x), batch_norm(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("name", OPCHECK_ARGUMENTS)
def test_opcheck(name, layout):
    for args in opcheck_arguments(name, lambda x: laid_out(x, layout)):
        torch.library.opcheck(getattr(torch.ops.precisebn, name).default, args)


def parameters(signature: inspect.Signature) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_the_file_of_an_operator_agrees_with_its_schema(name):
    """Names, order and defaults of the arguments: of the fallback, the shapes, and the wrapper for users, if any."""
    schema = getattr(torch.ops.precisebn, name).default._schema
    expected = [
        (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in schema.arguments
    ]
    operator = OPERATORS[name]
    assert operator.name == schema.name.removeprefix("precisebn::")
    given = [operator.fallback, operator.fake, *([getattr(ops, name)] if name in ops.__all__ else [])]
    for function in given:
        assert parameters(inspect.signature(function)) == expected, function


def test_every_operator_has_a_file_and_every_file_of_an_operator_is_registered():
    folder = Path(ops.__file__).parent
    declaring = {path.stem for path in folder.glob("*.py") if "OPERATOR = Operator(" in path.read_text()}
    assert declaring == set(NAMES)
    assert set(vars(raw)) == set(OPERATORS)
    assert {name for name, operator in OPERATORS.items() if operator.derivative} == set(vars(differentiable))


def operands(name: str) -> tuple[object, ...]:
    """Of a call with groups."""
    x = double(4, 3, 2, 3, requires_grad=False)
    return OPCHECK_ARGUMENTS[name][1](x, x.flip(0), torch.tensor([0, 1, 1, 0]), double(2, 3, requires_grad=False))


@pytest.mark.parametrize("name", OPCHECK_ARGUMENTS)
def test_operators_of_meta_tensors_give_meta_tensors_of_the_right_shape(name):
    args = operands(name)
    on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    results, expected = (getattr(raw, name)(*a) for a in (on_meta, args))
    results, expected = ([t] if isinstance(t, Tensor) else t or [] for t in (results, expected))
    for result, like in zip(results, expected, strict=True):
        assert result.is_meta
        assert (result.shape, result.dtype, result.stride()) == (like.shape, like.dtype, like.stride())


@pytest.mark.parametrize("name", OPCHECK_ARGUMENTS)
def test_one_meta_operand_among_others_is_an_error_and_not_memory_that_nobody_wrote(name):
    args = operands(name)
    wrappers = [getattr(ops, name)] if name in ops.__all__ else []
    for i, argument in enumerate(args):
        if not isinstance(argument, Tensor):
            continue
        mixed = [*args[:i], argument.to("meta"), *args[i + 1 :]]
        for call in (*wrappers, getattr(raw, name), getattr(torch.ops.precisebn, name)):
            with pytest.raises(InputError, match=r"meta.*cpu|cpu.*meta"):
                call(*mixed)


def test_meta_tensors_keep_the_memory_format():
    x = torch.empty(4, 3, 5, 5, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    count, mean, m2 = torch.ops.precisebn.moments(x, None, 2)
    assert (count.shape, mean.shape, m2.shape) == ((2,), (2, 3), (2, 3))
    y = torch.ops.precisebn.normalize(x, mean[:1].float(), m2[:1].float())
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())


# ---- errors and backends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.moments(torch.ones(3)), r"at least 2 dimensions.*\(3\)"),
        (lambda: ops.moments(torch.ones(3, 2, dtype=torch.int32)), "int32"),
        (lambda: ops.moments(torch.ones(3, 2), num_groups=0), "num_groups"),
        (lambda: ops.moments(torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)), r"\(3,\).*\(2\)"),
        (lambda: ops.moments(torch.ones(3, 2), torch.zeros(3)), "int64"),
        (lambda: ops.moments(torch.ones(3, 2), torch.tensor([0, 2, 1]), 2), "0 to 1, but holds 0 to 2"),
        (lambda: ops.moments(torch.ones(3, 2), torch.tensor([0, -1, 1]), 2), "holds -1 to 1"),
        (lambda: ops.normalize(torch.ones(3, 2), None, torch.ones(2)), r"scale must have shape \(G, C\)"),
        (
            lambda: ops.normalize(torch.ones(3, 2), None, torch.ones(1, 2), torch.ones(1, 3)),
            r"shift.*\(1, 2\).*\(1, 3\)",
        ),
        (lambda: ops.normalize(torch.ones(3, 2), torch.ones(1, 3), torch.ones(1, 2)), r"center.*\(1, 2\).*\(1, 3\)"),
        (lambda: ops.normalize(torch.ones(3, 2), None, torch.ones(2, 2)), "group is not given"),
        (lambda: ops.backward_reduce(torch.ones(3, 1), torch.ones(3, 2), torch.ones(1, 2)), "dy"),
        (
            lambda: ops.backward_apply(torch.ones(3, 2).double(), torch.ones(3, 2), *[torch.ones(1, 2)] * 4),
            "float64.*float32",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_group_out_of_range_never_reaches_memory(layout):
    x, group = laid_out(tensor((3, 4, 5, 5)), layout), torch.tensor([0, 99, -5])
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.precisebn.moments(x, group, 2)
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.precisebn.normalize(x, torch.ones(2, 4), torch.ones(2, 4), None, group)


def run_with_backend(choice: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PRECISEBN_BACKEND": choice}
    code = "from precisebn import ops; print(ops.backend())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_the_backend():
    fallback = run_with_backend("fallback")
    assert "cpu: fallback (PRECISEBN_BACKEND=fallback)" in fallback.stdout
    assert fallback.stdout.count("\n") == 1
    wrong = run_with_backend("gpu")
    assert "PRECISEBN_BACKEND must be auto, native or fallback, but is 'gpu'" in wrong.stderr


def test_backend_tells_the_instruction_set():
    if ops.backend().cpu == "native":
        assert ops.backend().cpu_detail in ("avx512", "avx2", "baseline")
    else:
        assert ops.backend().cpu_detail
