"""The CUDA kernels against the fallback in float64 on the CPU; then what only a GPU has: streams, graphs, large memory.

Without a GPU the former run on its emulation (tests/cuda_emulation). With one, ``PRECISEBN_BACKEND=native`` makes sure
that the kernels are what is tested; the tests named ``sanitizer`` are few and small enough for compute-sanitizer
(``-k sanitizer``).
"""

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_machine import DEVICE, EMULATED, needs_gpu, raw, set_up, why_not
from opcheck_arguments import OPCHECK_ARGUMENTS, opcheck_arguments
from torch import Tensor, nn

from precisebn import functional, ops, update_bn_stats
from precisebn.errors import InputError
from precisebn.nn import BatchStatBN, DomainSpecificBN, FrozenBatchNorm2d, GhostBN, SyncBN
from precisebn.ops import compute_dtype
from precisebn.ops.grouping import per_sample
from precisebn.ops.registry import OPERATORS

if why_not():
    pytest.skip(f"no CUDA device, and {why_not()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> None:
    """The device of the test, where it is emulated."""
    set_up(request.node.name)


fallback = SimpleNamespace(**{name: operator.fallback for name, operator in OPERATORS.items()})

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided", "swapped", "expanded", "misaligned", "sliced"]
SHAPES = [
    (6, 5),
    (1, 1),
    (1, 7),
    (300, 64),
    (40, 1),
    (5000, 3),
    (9, 4096),
    (4, 3, 1, 1),
    (33, 1, 5),
    (5, 7, 3),
    (16, 8, 2, 2),
    (64, 40, 7, 7),
    (3, 2048, 7, 7),
    (5, 30, 13, 13),
    (4, 24, 17, 17),
    (6, 33, 4, 5),
    (40, 96, 14, 14),
    (3, 20, 28, 28),
    (2, 3, 55, 55),
    (3, 4, 35, 35),
    (1, 64, 56, 56),
    (2, 17, 56, 56),
    (9, 12, 112, 112),
    (2, 6, 3, 20, 30),
    (2, 5, 2, 2, 2, 3),
    (1, 1, 9, 9000),
    (70, 2, 300),
    (0, 5, 3, 3),
    (4, 5, 0, 3),
    (4, 0, 3, 3),
]
SOME_SHAPES = [(300, 64), (64, 40, 7, 7), (5, 30, 13, 13), (6, 3, 55, 55), (9, 12, 56, 56), (33, 2, 4, 6, 10)]
SMALL_SHAPES = [(2, 64, 8, 8), (9, 24, 7, 7), (64, 40), (3, 5, 17, 17), (65, 7, 3), (3000, 20), (9, 2, 60, 60)]


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
        case "misaligned":  # dense, but not at a multiple of 16 bytes
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        case "sliced":  # channels of a wider channels-last tensor
            wide = torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)
            return wide[:, : x.shape[1]]
    return x.contiguous()


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 3.0, seed: int = 0) -> Tensor:
    """On the CPU: channels of different means and standard deviations, within the range of float16."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(shape[1], dtype=torch.float64).reshape(1, -1, *(1 for _ in shape[2:])) % 50
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + channel) + mean * channel).to(dtype)


def on_gpu(x: Tensor, layout: str = "contiguous") -> Tensor:
    return laid_out(x.to(DEVICE), layout)


def groups_of(x: Tensor, num_groups: int = 3) -> Tensor:
    return (torch.arange(len(x)) * 7 // 3) % num_groups


def rtol_of(dtype: torch.dtype) -> float:
    return 1e-11 if dtype == torch.float64 else 1e-6


def check_moments(actual: tuple[Tensor, ...], x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> None:
    count, mean, m2 = (t.cpu() for t in actual)
    n, true_mean, true_m2 = fallback.moments(x.cpu().double(), None if group is None else group.cpu(), num_groups)
    rtol = rtol_of(x.dtype)
    assert torch.equal(count, n)
    assert ((m2 - true_m2).abs() <= rtol * true_m2 + 1e-300).all()
    deviation = (true_m2 / n.clamp(min=1)[:, None]).sqrt()
    assert ((mean - true_mean).abs() <= rtol * deviation + 1e-14 * true_mean.abs()).all()
    assert (m2 >= 0).all()


def accumulators(channels: int) -> list[Tensor]:
    flat = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=DEVICE)
    return list(flat.split([1, channels, channels]))


# ---- Every operator, shape, layout and dtype ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, layout, dtype):
    x = on_gpu(tensor(shape, dtype), layout)
    check_moments(raw.moments(x), x)
    group = groups_of(x)
    check_moments(raw.moments(x, group.to(DEVICE), 3), x, group, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_and_backward_apply(shape, layout, dtype):
    x, dy = on_gpu(tensor(shape, dtype), layout), on_gpu(tensor(shape, dtype, seed=1))
    center, a, b, c = (tensor((3, shape[1]), torch.float32, mean=0, seed=s) for s in range(4))
    # One rounding of each difference and product, of their sum, and of the result in its dtype.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)

    def check(actual: Tensor, terms: list[Tensor]) -> None:
        assert actual.dtype == dtype
        assert actual.stride() == torch.empty_like(x).stride()
        result = actual.cpu().double()
        bound = 2 * eps * sum(term.abs() for term in terms) + torch.finfo(dtype).tiny
        expected = sum(terms).to(dtype).double()
        assert ((result - expected).abs() <= bound).logical_or(result == expected).all()

    x64, dy64 = x.cpu().double(), dy.cpu().double()
    for group, k in ((None, 1), (groups_of(x), 3)):
        center_, a_, b_, c_ = (per_sample(t[:k].double(), x64, group) for t in (center, a, b, c))
        on_device = None if group is None else group.to(DEVICE)
        center_gpu, a_gpu, b_gpu, c_gpu = (t[:k].to(DEVICE, compute_dtype(x)) for t in (center, a, b, c))
        check(raw.normalize(x, center_gpu, a_gpu, b_gpu, on_device), [a_ * (x64 - center_), b_.expand_as(x64)])
        check(raw.normalize(x, None, a_gpu, None, on_device), [a_ * x64])
        check(
            raw.backward_apply(dy, x, center_gpu, a_gpu, b_gpu, c_gpu, on_device),
            [a_ * dy64, b_ * (x64 - center_), c_.expand_as(x64)],
        )


def test_maps_of_few_samples():
    """A thread then walks along a sample, from plane to plane, on a device that has few blocks of them or many."""
    shapes = [(1, 30, 7, 7), (1, 9, 17, 17), (2, 3, 60, 60), (3, 4, 40, 50), (1, 2, 150, 150), (1, 1, 20000)]
    for number, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes)):
        set_up(f"{number}")
        x = tensor(shape, dtype)
        center, scale, shift = (tensor((3, shape[1]), torch.float64, mean=0, seed=s) for s in range(3))
        for group, k in ((None, 1), (groups_of(x, 3), 3)):
            on_device = None if group is None else group.to(DEVICE)
            coefficients = [t[:k].to(compute_dtype(x)) for t in (center, scale, shift)]
            y = raw.normalize(on_gpu(x), *(t.to(DEVICE) for t in coefficients), on_device)
            c, a, b = (per_sample(t.double(), x.double(), group) for t in coefficients)
            terms = a * (x.double() - c), b
            eps = max(torch.finfo(dtype).eps, torch.finfo(compute_dtype(x)).eps)
            assert ((y.cpu().double() - sum(terms)).abs() <= 2 * eps * sum(t.abs() for t in terms)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_reduce(shape, layout, dtype):
    x, dy = on_gpu(tensor(shape, dtype), layout), on_gpu(tensor(shape, dtype, mean=0.5, seed=1))
    x64, dy64 = x.cpu().double(), dy.cpu().double()
    for group, k in ((None, 1), (groups_of(x), 3)):
        on_device = None if group is None else group.to(DEVICE)
        _, mean, _ = fallback.moments(x64, group, k)
        actual = raw.backward_reduce(dy, x, mean.to(DEVICE), on_device, k)
        expected = fallback.backward_reduce(dy64, x64, mean, group, k)
        centered = x64 - per_sample(mean, x64, group)
        sizes = fallback.backward_reduce(dy64.abs(), centered.abs(), torch.zeros_like(mean), group, k)
        for one, other, size in zip(actual, expected, sizes, strict=True):
            assert ((one.cpu() - other).abs() <= 5 * rtol_of(dtype) * size).all()


ODD_PLANES = [(5, 3, 17, 17), (70, 2, 17, 17), (3, 4, 35, 35), (1, 3, 59, 59), (2, 2, 147, 147), (2, 1, 19, 23)]
ODD_PLANES += [(3, 5, 1, 257), (4, 2, 13, 20), (3, 2, 18, 35)]


def test_long_planes_that_begin_anywhere():
    """Whose vectors begin at another value in each plane; some values are in none of them."""
    for dtype, shape in itertools.product(DTYPES, ODD_PLANES):
        x, dy = on_gpu(tensor(shape, dtype)), on_gpu(tensor(shape, dtype, mean=0.5, seed=1))
        for group, k in ((None, 1), (groups_of(x), 3)):
            on_device = None if group is None else group.to(DEVICE)
            check_moments(raw.moments(x, on_device, k), x, group, k)
            x64, dy64 = x.cpu().double(), dy.cpu().double()
            _, mean, _ = fallback.moments(x64, group, k)
            expected = fallback.backward_reduce(dy64, x64, mean, group, k)
            sizes = fallback.backward_reduce(dy64.abs(), (x64 - per_sample(mean, x64, group)).abs(), 0 * mean, group, k)
            actual = raw.backward_reduce(dy, x, mean.to(DEVICE), on_device, k)
            for one, other, size in zip(actual, expected, sizes, strict=True):
                assert ((one.cpu() - other).abs() <= 5 * rtol_of(dtype) * size).all()


def test_the_edges_of_planes_overflow_alone():
    """What is in no vector is summed in float64; vectors that overflow are done again, and merge with it."""
    x = torch.ones(3, 2, 17, 17)
    for value, places in ((3e38, [0, 288, 289, 577]), (1e30, range(0, 578, 3)), (1e-30, range(0, 578, 5))):
        x.view(3, -1)[:, list(places)] = value
        check_moments(raw.moments(on_gpu(x)), x)


@pytest.mark.parametrize("statistic_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("shape", [(6, 5, 5), (40, 7, 7), (3, 56, 56), (600, 3, 3)])
def test_accumulate(shape, layout, dtype, statistic_dtype):
    channels = shape[0]
    total, batches = accumulators(channels), [tensor((n, *shape), dtype, seed=n) for n in (4, 1, 9)]
    for batch in batches:
        # One with a stride, as a view of somebody's buffer may have.
        mean = torch.full((2 * channels,), 7, dtype=statistic_dtype, device=DEVICE)[::2]
        var = torch.full((channels,), 7, dtype=statistic_dtype, device=DEVICE)
        raw.accumulate(on_gpu(batch, layout), *total, mean, var)
        n, (true_mean,), (true_m2,) = fallback.moments(batch.double())
        torch.testing.assert_close(mean.cpu(), true_mean.to(statistic_dtype))
        torch.testing.assert_close(var.cpu(), (true_m2 / n).to(statistic_dtype))
    count, mean, m2 = total
    check_moments((count, mean[None], m2[None]), torch.cat(batches))


def test_accumulate_ignores_an_empty_batch():
    total, mean = accumulators(3), torch.full((3,), 7.0, device=DEVICE)
    raw.accumulate(torch.ones(2, 3, device=DEVICE), *total)
    before = [t.clone() for t in total]
    raw.accumulate(torch.ones(0, 3, 4, 4, device=DEVICE), *total, mean, mean.clone())
    assert all(torch.equal(a, b) for a, b in zip(total, before, strict=True))
    assert (mean == 7).all()


@pytest.mark.parametrize("rounds", [2, 4, 16])
@pytest.mark.parametrize("shape", [(65536, 16), (256, 16, 16, 16), (4, 4, 128, 128)])
def test_moments_of_one_value_and_then_another(shape, rounds):
    """The first of a thread's batches, or an eighth or half of them, is of one value: the hardest on its shift."""
    per_channel = (2, 1, shape[1], *(1 for _ in shape[2:]))
    one, other = torch.randn(per_channel, generator=torch.Generator().manual_seed(rounds))
    for run in (2**n for n in range(3, 16)):
        position = torch.arange(torch.Size(shape).numel() // shape[1]) % (run * rounds)
        x = torch.where(position.reshape(shape[0], 1, *shape[2:]) < run, one, other)
        for layout in ("contiguous", "channels_last"):
            _, _, m2 = raw.moments(on_gpu(x, layout))
            _, _, exact = fallback.moments(x.double())
            assert ((m2.cpu() - exact).abs() <= 1e-6 * exact).all()


# ---- Tensors (G, C) alone --------------------------------------------------------------------------------------------

ROWS = [None, 1, 3]  # of a tensor (G, C); None: (C,)


def rows(rows: int | None, dtype: torch.dtype, seed: int, positive: bool = False) -> Tensor:
    """(C,) or (G, C) on the CPU, C = 300: more than a block of threads."""
    shape = (300,) if rows is None else (rows, 300)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values.abs() + 0.1 if positive else values).to(dtype)


def strided(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.repeat_interleave(2, dim=-1).to(DEVICE)[..., ::2]


def counts(rows: int | None) -> Tensor:
    return torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64)[: rows or 1].reshape(() if rows is None else -1)


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """Within an ulp of the float64 result in the dtype at hand, and some of float64."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=max(eps, 1e-14), atol=eps * 2**-10 + 1e-14)


@pytest.mark.parametrize("statistics_dtype", DTYPES)
@pytest.mark.parametrize("affine_dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_coefficients(statistics_dtype, affine_dtype, wide):
    for of_mean, of_weight, of_bias in itertools.product(ROWS, ["absent", *ROWS], ["absent", *ROWS]):
        statistics = rows(of_mean, statistics_dtype, 0), rows(of_mean, statistics_dtype, 1, positive=True)
        affine = [None if r == "absent" else rows(r, affine_dtype, s) for s, r in ((2, of_weight), (3, of_bias))]
        results = raw.coefficients(*map(strided, statistics), *map(strided, affine), 1e-3, wide)
        exact = fallback.coefficients(*map(double, statistics), *map(double, affine), 1e-3, wide)
        for actual, expected in zip(results, exact, strict=True):
            assert actual.dtype == (torch.float64 if wide else torch.float32)
            assert_rounded(actual, expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("num_rows", ROWS)
def test_track(num_rows, momentum, dtype):
    count, mean, m2 = counts(num_rows), rows(num_rows, torch.float64, 0), rows(num_rows, torch.float64, 1, True)
    running = [rows(num_rows, dtype, 2), rows(num_rows, dtype, 3, positive=True)]
    on_device, batches = [strided(t) for t in running], torch.full(count.shape, 4, device=DEVICE)
    exact = [t.double() for t in running]
    fallback.track(count, mean, m2, *exact, torch.full(count.shape, 4), momentum)
    raw.track(count.to(DEVICE), mean.to(DEVICE), m2.to(DEVICE), *on_device, batches, momentum)
    assert torch.equal(batches.cpu(), 4 + (count > 1).long())
    for actual, expected in zip(on_device, exact, strict=True):
        assert_rounded(actual, expected)


@pytest.mark.parametrize("affine_dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_backward_coefficients(affine_dtype, wide):
    for num_rows, of_weight, has_count in itertools.product(ROWS, ["absent", None, "rows"], (0, 1)):
        count = counts(num_rows) if has_count else None
        mean, sum_dy, product = (rows(num_rows, torch.float64, s) for s in range(3))
        var = rows(num_rows, torch.float64, 3, positive=True)
        weight = None
        if of_weight != "absent":
            weight = rows((num_rows or 1) if of_weight == "rows" else None, affine_dtype, 4)
        sums = [t.to(DEVICE) for t in (mean, var, sum_dy, product)]
        results = raw.backward_coefficients(
            None if count is None else count.to(DEVICE), *sums, strided(weight), 1e-3, wide
        )
        exact = fallback.backward_coefficients(count, mean, var, sum_dy, product, double(weight), 1e-3, wide)
        for actual, expected in zip(results, exact, strict=True):
            assert actual.shape == expected.shape
            assert_rounded(actual, expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SOME_SHAPES, (0, 5, 3, 3)])
def test_several_operators_in_one_call_are_these_operators(shape, layout, dtype):
    x, dy = on_gpu(tensor(shape, dtype), layout), on_gpu(tensor(shape, dtype, seed=1))
    for group, k in ((None, 1), (groups_of(x).to(DEVICE), 3)):
        weight, bias = torch.rand(shape[1], device=DEVICE), torch.rand(k, shape[1], device=DEVICE)
        y, *statistics = raw.normalize_batch(x, weight, bias, 1e-3, group, k)
        count, mean, m2 = apart = raw.moments(x, group, k)
        assert all(torch.equal(one.reshape(other.shape), other) for one, other in zip(statistics, apart, strict=True))
        var = m2 / count.clamp(min=1)[:, None]
        coefficients = raw.coefficients(mean, var, weight, bias, 1e-3, dtype == torch.float64)
        assert torch.equal(y, raw.normalize(x, *coefficients, group))
        dx, *affine = raw.backward_batch(dy, x, *statistics, weight, 1e-3, group)
        sums = raw.backward_reduce(dy, x, mean, group, k)
        *coefficients, grad_weight, grad_bias = raw.backward_coefficients(
            count, mean, var, *sums, weight, 1e-3, dtype == torch.float64
        )
        assert torch.equal(dx, raw.backward_apply(dy, x, *coefficients, group))
        assert torch.equal(affine[0], grad_weight)
        assert torch.equal(affine[1], grad_bias)
        dx, *_ = raw.backward_frozen(dy, x, mean, var, weight, 1e-3, group)
        _, scale, _ = raw.coefficients(mean, var, weight, None, 1e-3, dtype == torch.float64)
        assert torch.equal(dx, raw.normalize(dy, None, scale, None, group))
        assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, *SOME_SHAPES])
def test_normalize_and_track(shape, layout, dtype):
    """Is normalize_batch and then track: of a small tensor in one launch, of a large one in four."""
    x = on_gpu(tensor(shape, dtype), layout)
    weight = tensor((3, shape[1]), dtype, seed=2).to(DEVICE)
    for (group, k), momentum in itertools.product(((None, 1), (groups_of(x) - 1, 3)), (0.1, None)):
        on_device = None if group is None else group.to(DEVICE)
        num_rows = () if group is None else (k,)
        batches = [torch.full(num_rows, 4, device=DEVICE) for _ in range(2)]
        running = [[strided(torch.full((*num_rows, shape[1]), 0.5, dtype=dtype)) for _ in range(2)] for _ in range(2)]
        affine = (weight[0] if group is None else weight, None, 1e-3)
        together = raw.normalize_and_track(x, *affine, *running[0], batches[0], momentum, on_device, k)
        apart = raw.normalize_batch(x, *affine, on_device, k)
        raw.track(*apart[1:], *running[1], batches[1], momentum)
        for one, other in zip((*together, *running[0], batches[0]), (*apart, *running[1], batches[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, (300, 64), (9, 12, 56, 56)])
def test_outputs_of_a_mean_of_many_deviations(shape, layout, dtype):
    x = on_gpu((torch.randn(shape, dtype=torch.float64) + 1e4).to(dtype), layout)
    for group, k in ((None, 1), (groups_of(x), 4)):  # one of them without samples
        y, *statistics = raw.normalize_batch(x, None, None, 1e-3, None if group is None else group.to(DEVICE), k)
        exact = fallback.normalize_batch(x.cpu().double(), None, None, 1e-3, group, k)[0]
        assert ((y.cpu().double() - exact).abs() <= 1e-6 * exact.abs().max()).all()
        check_moments(
            tuple(t.reshape(k, -1)[:, 0] if i == 0 else t.reshape(k, -1) for i, t in enumerate(statistics)), x, group, k
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (7, 6), (3, 6, 17, 17)])
def test_small_tensors_of_all_kinds(shape, layout):
    """Not finite, constant, of one value per channel, empty: as in three launches, a channel at a time."""
    running = [torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE), torch.tensor(0, device=DEVICE)]
    x = tensor(shape)
    x[:, 0], x[:, 1], x[0, 2] = 1.1, 1e30, math.nan
    x[1, 3] = math.inf
    x[:, 4] *= 1e-30
    y, _, _, m2 = raw.normalize_and_track(on_gpu(x, layout), None, None, 1e-3, *running, 0.5)
    others = [0, 1, 4, 5]
    expected = fallback.normalize_batch(x.double(), None, None, 1e-3)
    torch.testing.assert_close(y.cpu()[:, others].double(), expected[0][:, others], rtol=1e-5, atol=1e-5)
    assert y[:, [2, 3]].isnan().all()
    assert torch.equal(running[0].cpu().isfinite(), torch.tensor([True, True, False, False, True, True]))
    assert m2[0] == 0
    assert running[2] == 1
    one = torch.ones(1, 6, *(1 for _ in shape[2:]), device=DEVICE)
    before = [t.clone() for t in running]
    y, count, *_ = raw.normalize_and_track(one, None, torch.full((6,), 3.0, device=DEVICE), 1e-3, *running, 0.5)
    assert count == 1
    assert (y == 3).all()
    y, count, *_ = raw.normalize_and_track(one[:0], None, None, 1e-3, *running, 0.5)
    assert y.shape == one[:0].shape
    assert count == 0
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(before, running, strict=True))
    assert running[2] == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (64, 6, 40, 40)])  # at once, and step by step
def test_several_groups_without_a_group_are_refused(shape, momentum):
    x = on_gpu(tensor(shape))
    running = [torch.zeros(2, 6, device=DEVICE), torch.ones(2, 6, device=DEVICE), torch.zeros(2, device=DEVICE).long()]
    with pytest.raises(RuntimeError, match="several groups need a group"):
        raw.normalize_batch(x, None, None, 1e-3, None, 2)
    with pytest.raises(RuntimeError, match="several groups need a group"):
        raw.normalize_and_track(x, None, None, 1e-3, *running, momentum, None, 2)
    assert not running[0].any()
    assert not running[2].any()


@needs_gpu
def test_operands_on_the_host_are_refused():
    mean, count = torch.ones(3, device=DEVICE).double(), torch.ones((), device=DEVICE).double()
    with pytest.raises(RuntimeError, match="weight must be"):
        raw.coefficients(mean, mean, torch.ones(3), None, 1e-3, False)
    with pytest.raises(RuntimeError, match="running_mean must be"):
        raw.track(count, mean, mean, torch.ones(3), torch.ones(3), torch.tensor(0, device=DEVICE), 0.1)
    x, group = torch.ones(4, 3, device=DEVICE), torch.zeros(4, dtype=torch.int64)
    for refused in (lambda: raw.moments(x, group, 1), lambda: raw.normalize(x, None, x[:1], None, group)):
        with pytest.raises(RuntimeError, match="group must be"):
            refused()
    for refused in (
        lambda: raw.normalize(x, None, torch.ones(1, 3)),
        lambda: raw.normalize(x, torch.ones(1, 3), x[:1]),
        lambda: raw.backward_reduce(x, x, torch.ones(1, 3).double()),
    ):
        with pytest.raises(RuntimeError, match="coefficients must have"):
            refused()
    with pytest.raises(RuntimeError, match="dy must have"):
        raw.backward_reduce(torch.ones(4, 3), x, mean[None])
    with pytest.raises(RuntimeError, match="dy must have"):
        raw.backward_apply(torch.ones(4, 3), x, *[x[:1]] * 4)


# ---- Groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("shape", [(200, 33), (129, 16, 7, 7), (70, 5, 3, 3), (50, 4, 40, 40)])
@pytest.mark.parametrize("num_groups", [1, 2, 17, 300])
def test_groups_of_any_order_and_number(num_groups, shape, layout):
    x = on_gpu(tensor(shape), layout)
    for group in (torch.randint(num_groups, shape[:1]), torch.arange(shape[0]) * num_groups // shape[0]):
        check_moments(raw.moments(x, group.to(DEVICE), num_groups), x, group, num_groups)
        a, b = (tensor((num_groups, shape[1]), seed=s).to(DEVICE) for s in (1, 2))
        expected = fallback.normalize(x.double(), None, a.double(), b.double(), group.to(DEVICE))
        torch.testing.assert_close(
            raw.normalize(x, None, a, b, group.to(DEVICE)).double(), expected, rtol=1e-5, atol=1e-2
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_numbers_out_of_range_touch_nothing(layout):
    x = on_gpu(tensor((8, 16, 6, 6)), layout)
    group = torch.tensor([0, 1, -1, 5, 1, 2**40, -(2**40), 0])
    valid = (group >= 0) & (group < 2)
    check_moments(raw.moments(x, group.to(DEVICE), 2), x[valid.to(DEVICE)], group[valid], 2)
    ones = torch.ones(2, 16, device=DEVICE)
    y = raw.normalize(x, None, ones, 0 * ones, group.to(DEVICE))
    assert torch.equal(y[valid.to(DEVICE)], x[valid.to(DEVICE)])
    assert y[~valid.to(DEVICE)].isnan().all()
    sum_dy, _ = raw.backward_reduce(torch.ones_like(x), x, ones.double(), group.to(DEVICE), 2)
    assert (sum_dy == 72).all()


def test_group_may_have_a_stride():
    x, group = on_gpu(tensor((8, 4, 5, 5))), torch.tensor([0, 1, 1, 0, 1, 0, 0, 0])
    strided = group.repeat_interleave(3).to(DEVICE)[::3]
    check_moments(raw.moments(x, strided, 2), x, group, 2)


# ---- Accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("shape", SOME_SHAPES)
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_variance_with_a_mean_of_many_deviations(ratio, shape, layout):
    x = on_gpu((torch.randn(shape, dtype=torch.float64) + ratio).float(), layout)
    check_moments(raw.moments(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("shape", SOME_SHAPES)
@pytest.mark.parametrize("value", [0.0, 1.1, -3.7e4, 1e-7, 3e38, 1e-40])
def test_a_constant_channel_has_no_variance(value, shape, layout, dtype):
    x = on_gpu(torch.full(shape, value, dtype=torch.float64).to(dtype), layout)
    if not x.isfinite().all():
        return
    for result in (raw.moments(x), raw.moments(x, groups_of(x).to(DEVICE), 3)):
        _, mean, m2 = result
        assert (m2 == 0).all()
        assert (mean == x.double().flatten()[0]).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SOME_SHAPES)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("where", ["value", "sample", "row"])
def test_an_outlier_in_front_does_no_harm(where, size, shape, layout):
    x = torch.randn(shape)
    view = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    view[{"value": (0, slice(None), 0), "sample": 0, "row": (slice(None), slice(None), 0)}[where]] = size
    x = on_gpu(x, layout)
    check_moments(raw.moments(x), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e18, 1e30, 3e37])
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (2, 3, 60, 60), (70, 18), (40, 64, 14, 14)])
def test_magnitudes_beyond_float32_squares(shape, scale, layout):
    x = (tensor(shape, torch.float64, mean=0.0) / 50 * scale).float()
    x[:, 1] = torch.randn(shape)[:, 1]  # next to a channel of ordinary size
    x[:, 2] = 0
    check_moments(raw.moments(on_gpu(x, layout)), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (3, 5, 2, 2), (2, 3, 60, 60), (70, 18), (9, 16, 30, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_channel(shape, bad, layout, dtype):
    x = tensor(shape, dtype)
    dirty = x.clone()
    dirty[1, 1] = bad
    others = [c for c in range(shape[1]) if c != 1]
    x, dirty, dy = on_gpu(x, layout), on_gpu(dirty, layout), on_gpu(tensor(shape, dtype, seed=1), layout)
    zeros = torch.zeros(1, shape[1], device=DEVICE, dtype=torch.float64)
    for clean, spoiled in (
        (raw.moments(x)[1:], raw.moments(dirty)[1:]),
        (raw.backward_reduce(dy, x, zeros)[1:], raw.backward_reduce(dy, dirty, zeros)[1:]),
    ):
        for one, other in zip(clean, spoiled, strict=True):
            assert not other[0, 1].isfinite()
            assert torch.equal(one[0, others], other[0, others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_converts_exactly(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(2**12, 16).to(DEVICE)
    one, zero = torch.ones(1, 16, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
    y = raw.normalize(x, None, one, zero)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])
    values = torch.cat([torch.randn(20000) * s for s in (1e-8, 1e-6, 1e-4, 1.0, 3e4, 1e38)])[None].to(DEVICE)
    rounded = raw.normalize(torch.ones_like(values, dtype=dtype), None, torch.zeros_like(values), values)
    assert torch.equal(rounded, values.to(dtype))


# ---- All operators at once ------------------------------------------------------------------------------------------


MANY_BLOCKS = [(64, 64, 28, 28), (33, 70, 7, 7), (32, 256, 7, 7), (5000, 40), (2, 3, 200, 200)]
if EMULATED:  # the device is as small as the test asks for
    MANY_BLOCKS = [(16, 32, 14, 14), (33, 70, 7, 7), (40, 64, 4, 4), (2000, 20), (2, 3, 80, 80)]


def all_operators(x: Tensor, dy: Tensor, group: Tensor) -> list[Tensor]:
    mean = raw.moments(x)[1]
    total = accumulators(x.shape[1])
    raw.accumulate(x, *total)
    coefficients = [tensor((3, x.shape[1]), seed=s).to(x.device, compute_dtype(x)) for s in range(4)]
    return [
        *raw.moments(x),
        *raw.moments(x, group, 3),
        *total,
        *raw.backward_reduce(dy, x, mean),
        *raw.backward_reduce(dy, x, mean.expand(3, -1), group, 3),
        raw.normalize(x, *coefficients[:3], group),
        raw.backward_apply(dy, x, *coefficients, group),
        *raw.normalize_batch(x, coefficients[0][0], None, 1e-3, group, 3),
        *raw.normalize_batch(x, coefficients[0][0], None, 1e-3),
        *raw.backward_batch(dy, x, *(t[0] for t in raw.moments(x)), coefficients[0][0], 1e-3),
        *raw.backward_batch(dy, x, *raw.moments(x, group, 3), coefficients[0][0], 1e-3, group),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", MANY_BLOCKS)
def test_the_same_bits_every_time(shape, layout, dtype):
    x, dy = on_gpu(tensor(shape, dtype), layout), on_gpu(tensor(shape, dtype, seed=1), layout)
    group = groups_of(x).to(DEVICE)
    first = all_operators(x, dy, group)
    for _ in range(2 if EMULATED else 20):
        for a, b in zip(first, all_operators(x, dy, group), strict=True):
            assert torch.equal(a, b)


# ---- What only a GPU has ---------------------------------------------------------------------------------------------


@needs_gpu
def test_several_streams_at_once():
    inputs = [on_gpu(tensor((16, 48, 28, 28), seed=s)) for s in range(4)]
    expected = [ops.moments(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[] for _ in inputs]
    for _ in range(50):
        for x, stream, result in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(ops.moments(x))
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        for one in result:
            assert all(torch.equal(a, b) for a, b in zip(one, right, strict=True))


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_graph_replays_beside_other_work(layout):
    shape = (32, 64, 28, 28)
    x, dy = on_gpu(tensor(shape), layout), on_gpu(tensor(shape, seed=1), layout)
    group = groups_of(x).cuda()
    total = accumulators(64)
    coefficients = [torch.randn(3, 64, device="cuda") for _ in range(4)]

    def run() -> list[Tensor]:
        ops.accumulate(x, *total)
        return [
            *ops.moments(x),
            *ops.moments(x, group, 3),
            *ops.backward_reduce(dy, x, coefficients[0].double(), group, 3),
            ops.normalize(x, *coefficients[:3], group),
            ops.backward_apply(dy, x, *coefficients, group),
        ]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for t in total:
        t.zero_()
    other = on_gpu(tensor(shape, seed=9), layout)
    other_moments = ops.moments(other)
    torch.cuda.synchronize()
    for seed in range(2, 5):
        fresh = tensor(shape, seed=seed)
        x.copy_(fresh)
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(side):  # on the stream whose buffers eager calls use
            beside = [ops.moments(other) for _ in range(5)]
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for m in beside for a, b in zip(m, other_moments, strict=True))
        check_moments(tuple(results[:3]), fresh)
        check_moments(tuple(results[3:6]), fresh, group, 3)
        expected = fallback.normalize(x, *coefficients[:3], group)
        torch.testing.assert_close(results[8], expected, rtol=1e-5, atol=1e-4)
    assert total[0].item() == 3 * 32 * 28 * 28


@needs_gpu
def test_a_stream_gets_memory_while_another_is_captured():
    x, total = on_gpu(tensor((64, 40, 7, 7))), accumulators(40)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def on_its_stream() -> None:  # asks torch for no memory
        with torch.cuda.stream(stream):
            raw.accumulate(x, *total)

    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = x + 1
        thread = threading.Thread(target=on_its_stream)
        thread.start()
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x + 1)
    assert total[0].item() == 64 * 49


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device only")
def test_a_device_that_is_not_the_current_one():
    x = tensor((8, 16, 14, 14))
    with torch.cuda.device(0):
        result = ops.moments(x.to("cuda:1"))
    assert result[1].device == torch.device("cuda:1")
    check_moments(result, x)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """The host waits for the device in no operator of torch."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


LAYERS: dict[str, Callable[[], tuple[Any, ...]]] = {  # and what they take besides x
    "BatchStatBN": lambda: (BatchStatBN(16),),
    "DomainSpecificBN": lambda: (DomainSpecificBN(16, 3), torch.arange(8) % 3),
    "FrozenBatchNorm2d": lambda: (FrozenBatchNorm2d(16, trainable_affine=True),),
    "GhostBN": lambda: (GhostBN(16, 4),),
    "SyncBN": lambda: (SyncBN(16),),
}
ABOUT_THAT_MODE = "ignore:Synchronization debug mode is a prototype feature:UserWarning"


@needs_gpu
@pytest.mark.filterwarnings(ABOUT_THAT_MODE)
def test_nothing_waits_for_the_device():
    x = on_gpu(tensor((8, 16, 14, 14)))
    dy, group, total = x.clone(), groups_of(x).cuda(), accumulators(16)
    a = torch.ones(3, 16, device="cuda")
    mean, var = torch.empty(16, device="cuda"), torch.empty(16, device="cuda")
    with waiting_is_an_error():
        ops.moments(x, group, 3)
        ops.accumulate(x, *total, mean, var)
        ops.normalize(x, a, a, a, group)
        ops.backward_reduce(dy, x, a, group, 3)
        ops.backward_apply(dy, x, a, a, a, a, group)
        _, *statistics = raw.normalize_batch(x, mean, var, 1e-3, group, 3)
        raw.backward_batch(dy, x, *statistics, mean, 1e-3, group)
        batches = torch.ones((), dtype=torch.int64, device="cuda")
        raw.normalize_and_track(x, mean, var, 1e-3, mean, var, batches, 0.1)
        ops.track(*(t[0] for t in statistics), mean, var, torch.ones((), dtype=torch.int64, device="cuda"), None)


@needs_gpu
@pytest.mark.filterwarnings(ABOUT_THAT_MODE)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_no_layer_waits_for_the_device(make):
    layer, *arguments = make()
    layer = layer.cuda()
    x, *arguments = (argument.cuda() for argument in (torch.randn(8, 16, 14, 14), *arguments))
    x.requires_grad_()
    for training in (True, False):
        layer.train(training)
        layer(x, *arguments).sum().backward()  # what is set up once may wait
        with waiting_is_an_error():
            layer(x, *arguments).sum().backward()


@needs_gpu
@pytest.mark.filterwarnings(ABOUT_THAT_MODE)
@pytest.mark.parametrize("estimator", ["population", "batch-mean"])
def test_a_recalibration_waits_for_the_device_in_the_end_only(estimator):
    """From the first mini-batch to the last, enough that some are taken in meanwhile; from pinned memory too."""
    model = nn.Sequential(*small_model(), BatchStatBN(40)).cuda().train()
    batches = [torch.randn(4, 3, 20, 20) for _ in range(300)]
    batches = [batch.cuda() if i % 2 else batch.pin_memory() for i, batch in enumerate(batches)]

    def watched() -> Iterator[Tensor]:
        yield batches[0]
        with waiting_is_an_error():
            yield from batches[1:]

    report = update_bn_stats(model, watched(), None, estimator=estimator)
    assert report.num_iters == 300


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout):
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    shape = (33, 64, 1024, 1024)  # 2^31 + 2^26
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    x.normal_(3.0, 2.0)
    count, mean, m2 = ops.moments(x)
    assert count.item() == 33 * 2**20
    sums = sum(sample.double().flatten(1).sum(1) for sample in x)
    true_mean = sums / count
    true_m2 = sum((sample.double() - true_mean[:, None, None]).square().flatten(1).sum(1) for sample in x)
    torch.testing.assert_close(mean[0], true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(m2[0], true_m2, rtol=1e-6, atol=0)
    y = ops.normalize(x, None, torch.full((1, 64), 0.5, device="cuda"), torch.arange(64.0, device="cuda")[None])
    for sample, result in ((x[0], y[0]), (x[-1], y[-1])):
        expected = torch.addcmul(torch.arange(64.0, device="cuda")[:, None, None], sample, torch.tensor(0.5).cuda())
        assert torch.equal(result, expected.bfloat16())


@needs_gpu
def test_a_plane_of_more_than_2_to_the_31_values():
    """Of which some, at both ends, are in no vector."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    x = torch.ones(2, 1, 2**30 + 5, dtype=torch.bfloat16, device="cuda")
    n = x.numel()
    x[0, 0, 0] = x[0, 0, 2**30] = x[1, 0, -1] = 4.0
    count, mean, m2 = ops.moments(x)
    assert count.item() == n
    torch.testing.assert_close((mean.item() - 1) * n, 9.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(m2.item(), 27 - 81 / n, rtol=1e-6, atol=0)
    y = ops.normalize(x, None, torch.full((1, 1), 2.0, device="cuda"), torch.ones(1, 1, device="cuda"))
    assert y[[0, 0, 1], 0, [0, 2**30, -1]].tolist() == [9.0, 9.0, 9.0]
    assert y[[0, 0, 1], 0, [1, 2**30 - 1, -2]].tolist() == [3.0, 3.0, 3.0]


@needs_gpu
def test_half_a_warp_of_blocks_over_the_end_of_the_grid():
    """More blocks than one dimension of a grid had before it was 2^31: very many channels of few values."""
    x = on_gpu(torch.randn(3, 70000, 24, 24))
    count, mean, m2 = ops.moments(x)
    assert count.item() == 3 * 576
    var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean[0], true_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(m2[0] / count, var, rtol=1e-6, atol=0)


# ---- torch around it ------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("name", OPCHECK_ARGUMENTS)
@pytest.mark.filterwarnings("ignore")
def test_opcheck(name):
    for args in opcheck_arguments(name, lambda x: x.cuda()):
        torch.library.opcheck(getattr(torch.ops.precisebn, name).default, args)


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph(mode):
    def batch_norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.batch_norm(x, weight)[0].relu()

    compiled = torch.compile(batch_norm, fullgraph=True, mode=mode)
    for layout in ("contiguous", "channels_last"):
        x, weight = on_gpu(tensor((6, 4, 5, 5)), layout), torch.rand(4, device="cuda")
        for _ in range(3):
            torch.testing.assert_close(compiled(x, weight).clone(), batch_norm(x, weight))


@needs_gpu
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (64, 64, 28, 28)])
def test_a_layer_moves_its_statistics_as_torchs_does(shape):
    """In one launch forward where it is small; also in a CUDA graph, which allocates and zeroes nothing for it."""
    ours, theirs = BatchStatBN(shape[1], device="cuda"), nn.BatchNorm2d(shape[1], device="cuda")
    x = on_gpu(tensor(shape))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(x)
    theirs(x)
    for seed in range(3):
        x.copy_(tensor(shape, seed=seed))
        graph.replay()
        torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-4)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (64, 64, 28, 28)])
def test_a_layer_trains_in_graphs_of_its_forward_and_backward(shape):
    ours, theirs = BatchStatBN(shape[1], device="cuda"), nn.BatchNorm2d(shape[1], device="cuda")
    torch.cuda.make_graphed_callables(ours, (on_gpu(tensor(shape)).requires_grad_(),))
    for seed in range(3):
        x, dy = on_gpu(tensor(shape, seed=seed)).requires_grad_(), torch.randn(shape, device="cuda")
        found = [(y, *torch.autograd.grad(y, [x, *bn.parameters()], dy)) for bn in (ours, theirs) for y in [bn(x)]]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_and_its_gradients_are_torchs(layout, dtype):
    x = on_gpu(torch.randn(16, 24, 14, 14).to(dtype), layout).requires_grad_()
    dy = on_gpu(torch.randn(16, 24, 14, 14).to(dtype), layout)
    weight, bias = (torch.rand(24, device="cuda", requires_grad=True) for _ in range(2))
    ours, _ = functional.batch_norm(x, weight, bias)
    theirs = nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    gradients = [torch.autograd.grad(y, (x, weight, bias), dy) for y in (ours, theirs)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(gradients[0][0], gradients[1][0], **tolerance)
    for one, other in zip(gradients[0][1:], gradients[1][1:], strict=True):  # sums of 3136 rounded values
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0.2)


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 40, 3), nn.BatchNorm2d(40)
    )


@needs_gpu
def test_update_bn_stats_agrees_with_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batches = [torch.randn(n, 3, 20, 20) * 2 + 5 for n in (8, 3, 8)]
    on_cpu = small_model().train()
    on_device = copy.deepcopy(on_cpu).cuda()
    update_bn_stats(on_cpu, batches, 3)
    update_bn_stats(on_device, batches, 3)
    for one, other in zip(on_cpu.buffers(), on_device.buffers(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-4, atol=1e-5)


@needs_gpu
def test_mixed_devices_are_refused():
    x = torch.ones(3, 2, device="cuda")
    with pytest.raises(InputError, match="group is on cpu"):
        ops.moments(x, torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(InputError, match="scale is on cpu"):
        ops.normalize(x, torch.ones(1, 2), torch.ones(1, 2))


# ---- For compute-sanitizer: every path of every kernel once, in little memory ---------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("shape", [(5, 3), (9, 16, 7, 7), (3, 4, 24, 24), (66, 8, 2, 2), (24, 40, 14, 14)])
def test_sanitizer(shape, layout, dtype):
    x, dy = on_gpu(tensor(shape, dtype), layout), on_gpu(tensor(shape, dtype, seed=1), layout)
    if shape[1] > 4:
        x[0, 2] = float("nan")  # the slow path
    group = groups_of(x, 5).to(DEVICE) - 1  # and samples of no group
    results = all_operators(x, dy, group)
    if not EMULATED:
        torch.cuda.synchronize()
    assert torch.equal(results[0], torch.tensor([x.numel() / shape[1]], dtype=torch.float64, device=DEVICE))
