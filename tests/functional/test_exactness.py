"""Outputs and gradients keep float32's digits: 1e-6 of their largest value, with means of up to 1e4 deviations.

``scale * x + shift`` rounds at the size of x, and is off by 1e-3 there. Against float64 NumPy, on every way that the
two functions take. Both backends: run with PRECISEBN_BACKEND=native and with PRECISEBN_BACKEND=fallback.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from precisebn.functional import batch_norm, frozen_batch_norm

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

BOUND = 1e-6
EPS = 1e-5
CHANNELS = 3


def as_rows(x: Tensor) -> np.ndarray:
    """``(N, C, *)`` as float64 ``(N, C, L)``."""
    return x.detach().double().reshape(*x.shape[:2], -1).numpy()


def assert_exact(actual: Tensor, exact: np.ndarray) -> None:
    """Every channel within the bound of its largest value."""
    error = np.abs(as_rows(actual) - exact).max((0, 2))
    assert (error <= BOUND * np.abs(exact).max((0, 2))).all(), error / np.abs(exact).max((0, 2))


def data(num_samples: int, spatial: tuple[int, ...], log_ratio: float, std: float, seed: int) -> tuple[Tensor, Tensor]:
    """Values whose mean is ``10**log_ratio`` deviations, of either sign; and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, num_samples, CHANNELS, *spatial, generator=generator, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64).reshape(1, -1, *(1 for _ in spatial))
    return (std * (draw[0] + sign * 10**log_ratio)).float(), draw[1].float()


def affine(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator) + 0.5, torch.randn(shape, generator=generator)


def exact_batch_norm(
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]], weight: Tensor, bias: Tensor, shared: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Y and dx of pieces ``x, dy (N, C, L)`` and ``group (N,)``, by the definition, in float64."""
    w, b = (np.atleast_2d(t.double().numpy()) for t in (weight, bias))
    results = [(np.empty_like(x), np.empty_like(x)) for x, _, _ in pieces]
    groups = np.unique(np.concatenate([group for *_, group in pieces]))
    for together in [groups] if shared else [[g] for g in groups]:
        inside = [np.isin(group, together) for *_, group in pieces]

        def flat(arrays: list[np.ndarray], inside: list[np.ndarray] = inside) -> np.ndarray:
            """The values of the samples inside, ``(C, n)``."""
            chosen = [np.moveaxis(a[i], 1, 0).reshape(CHANNELS, -1) for a, i in zip(arrays, inside, strict=True)]
            return np.concatenate(chosen, 1)

        values = flat([x for x, *_ in pieces])
        mean = values.mean(1)
        mean = (mean + (values - mean[:, None]).mean(1))[:, None]
        inverse_std = 1 / np.sqrt(((values - mean) ** 2).mean(1, keepdims=True) + EPS)
        rows = [group if len(w) > 1 else 0 * group for *_, group in pieces]
        wdy = flat([w[r][..., None] * dy for (_, dy, _), r in zip(pieces, rows, strict=True)])
        hat = (values - mean) * inverse_std
        mean_wdy, mean_wdy_hat = wdy.mean(1, keepdims=True), (wdy * hat).mean(1, keepdims=True)
        for (x, dy, _), r, i, (y, dx) in zip(pieces, rows, inside, results, strict=True):
            w_, b_ = w[r[i]][..., None], b[r[i] if len(b) > 1 else 0 * r[i]][..., None]
            hat_i = (x[i] - mean) * inverse_std
            y[i] = hat_i * w_ + b_
            dx[i] = (w_ * dy[i] - mean_wdy - hat_i * mean_wdy_hat) * inverse_std
    return results


log_ratios = st.floats(0, 4)
stds = st.floats(0.1, 10)
seeds = st.integers(0, 10**6)
sizes = st.tuples(st.integers(4, 9), st.integers(4, 13))


@given(size=sizes, log_ratio=log_ratios, std=stds, seed=seeds, channels_last=st.booleans(), again=st.booleans())
@settings(max_examples=60)
def test_a_single_tensor(size, log_ratio, std, seed, channels_last, again):
    x, dy = data(size[0], (size[1], 2), log_ratio, std, seed)
    weight, bias = affine(CHANNELS)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    ((exact_y, exact_dx),) = exact_batch_norm(
        [(as_rows(x), as_rows(dy), np.zeros(len(x), dtype=int))], weight, bias, False
    )
    y, _ = batch_norm(x, weight, bias)
    assert_exact(y, exact_y)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=again)
    assert_exact(dx, exact_dx)
    with torch.no_grad():
        assert torch.equal(batch_norm(x, weight, bias)[0], y)


@given(
    sizes=st.lists(sizes, min_size=1, max_size=3),
    log_ratio=log_ratios,
    std=stds,
    seed=seeds,
    num_groups=st.integers(1, 3),
    shared=st.booleans(),
    own_affine=st.booleans(),
)
@settings(max_examples=60)
def test_groups_lists_and_shared_statistics(sizes, log_ratio, std, seed, num_groups, shared, own_affine):
    drawn = [data(num_groups * n, (length, 2), log_ratio, std, seed + i) for i, (n, length) in enumerate(sizes)]
    groups = [torch.arange(len(x)) % num_groups for x, _ in drawn]
    weight, bias = affine(num_groups, CHANNELS) if own_affine else affine(CHANNELS)
    xs, dys = [x.requires_grad_() for x, _ in drawn], [dy for _, dy in drawn]
    ys, _ = batch_norm(xs, weight, bias, group=groups, num_groups=num_groups, shared_statistics=shared)
    pieces = [(as_rows(x), as_rows(dy), g.numpy()) for x, dy, g in zip(xs, dys, groups, strict=True)]
    dxs = torch.autograd.grad(ys, xs, dys)
    for y, dx, (exact_y, exact_dx) in zip(ys, dxs, exact_batch_norm(pieces, weight, bias, shared), strict=True):
        assert_exact(y, exact_y)
        assert_exact(dx, exact_dx)


@given(
    size=sizes,
    log_ratio=log_ratios,
    std=stds,
    seed=seeds,
    num_groups=st.integers(1, 3),
    statistics_dtype=st.sampled_from([torch.float32, torch.float64]),
    trained=st.booleans(),
)
@settings(max_examples=60)
def test_frozen(size, log_ratio, std, seed, num_groups, statistics_dtype, trained):
    x, dy = data(num_groups * size[0], (size[1], 2), log_ratio, std, seed)
    group = torch.arange(len(x)) % num_groups
    weight, bias = affine(num_groups, CHANNELS)
    mean, var = (
        torch.stack([getattr(x[group == g].double(), name)((0, 2, 3)) for g in range(num_groups)]).to(statistics_dtype)
        for name in ("mean", "var")
    )
    w, b = (t.clone().requires_grad_(trained) for t in (weight, bias))
    x.requires_grad_()
    y = frozen_batch_norm(x, mean, var, w, b, eps=EPS, group=group)
    m, v, w_, b_ = (t.double().numpy()[group][..., None] for t in (mean, var, weight, bias))
    inverse_std = 1 / np.sqrt(v + EPS)
    assert_exact(y, (as_rows(x) - m) * inverse_std * w_ + b_)
    assert_exact(torch.autograd.grad(y, x, dy)[0], as_rows(dy) * inverse_std * w_)


def by_compilation(f: Callable[..., Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    return y, torch.autograd.grad(y, x, dy)[0]


def by_torch_func(f: Callable[..., Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    y, backward = torch.func.vjp(f, x)
    return y, backward(dy)[0]


def by_forward_mode(f: Callable[..., Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, None]:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, dy))).primal, None


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("way", [by_compilation, by_torch_func, by_forward_mode])
@pytest.mark.parametrize("statistics", ["batch", "shared", torch.float32, torch.float64])
def test_graphs_and_transformations(way, statistics):
    x, dy = data(8, (5, 5), 4.0, 2.0, 0)
    group = torch.arange(8) % 2
    weight, bias = affine(CHANNELS)
    if isinstance(statistics, torch.dtype):
        mean, var = (t.to(statistics) for t in (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))))
        m, v, w, b = (t.double().numpy()[:, None] for t in (mean, var, weight, bias))
        scale = w / np.sqrt(v + EPS)
        exact_y, exact_dx = (as_rows(x) - m) * scale + b, as_rows(dy) * scale

        def f(x: Tensor) -> Tensor:
            return frozen_batch_norm(x, mean, var, weight, bias, eps=EPS)
    else:
        shared = statistics == "shared"
        ((exact_y, exact_dx),) = exact_batch_norm([(as_rows(x), as_rows(dy), group.numpy())], weight, bias, shared)

        def f(x: Tensor) -> Tensor:
            return batch_norm(x, weight, bias, eps=EPS, group=group, num_groups=2, shared_statistics=shared)[0]

    y, dx = way(f, x, dy)
    assert_exact(y, exact_y)
    if dx is not None:
        assert_exact(dx, exact_dx)


def test_gradients_of_the_moments_too():
    """Which take another way to the coefficients: dx = dmean / n + 2 dm2 (x - mean)."""
    x, dy = data(8, (5, 5), 4.0, 1.0, 0)
    x.requires_grad_()
    y, moments = batch_norm(x)
    dx = torch.autograd.grad([y, moments.m2], x, [dy, torch.full((CHANNELS,), 0.01, dtype=torch.float64)])[0]
    ones = torch.ones(CHANNELS)
    values = as_rows(x)
    pieces = [(values, as_rows(dy), np.zeros(8, dtype=int))]
    ((_, exact_dx),) = exact_batch_norm(pieces, ones, 0 * ones, False)
    assert_exact(dx, exact_dx + 0.02 * (values - values.mean((0, 2), keepdims=True)))
