"""PopulationEstimator: exact statistics of many layers, and standard errors against formulas and against reality."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from precisebn import Moments, PopulationEstimator, ops
from precisebn.statistics.estimator import MIN_BLOCKS

NO_EPS = torch.zeros(1, dtype=torch.float64)


def feed(estimator: PopulationEstimator, batches: list[list[torch.Tensor]]) -> None:
    """Mini-batches of one list of inputs a layer."""
    for batch in batches:
        for layer, x in enumerate(batch):
            ops.accumulate(x, *estimator.slot(layer))
        estimator.end_batch()


def blocked_errors(batches: list[np.ndarray], blocks_of: int) -> tuple[float, float]:
    """Standard errors of mean [std] and variance [relative] from blocks of mini-batches, straight from the formula."""
    whole = np.concatenate(batches)
    mean, var = whole.mean(0), whole.var(0)
    blocks = [np.concatenate(batches[i : i + blocks_of]) for i in range(0, len(batches) - blocks_of + 1, blocks_of)]
    n = np.array([len(b) for b in blocks])[:, None]
    m = np.array([b.mean(0) for b in blocks])
    u = np.array([((b - mean) ** 2).mean(0) for b in blocks])
    factor = len(blocks) / (len(blocks) - 1) / (n.sum() * len(whole))
    mean_error2 = factor * (n**2 * (m - mean) ** 2).sum(0) / var
    var_error2 = factor * (n**2 * (u - var) ** 2).sum(0) / var**2
    return float(np.sqrt(mean_error2.mean())), float(np.sqrt(var_error2.mean()))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.floats(-1e4, 1e4), st.integers(0, 2**32 - 1))
def test_equals_numpy_on_all_data_for_any_batch_sizes(sizes, location, seed):
    rng = np.random.default_rng(seed)
    data = [[torch.from_numpy(location + rng.standard_normal((n, c))) for c in (3, 2)] for n in sizes]
    estimator = PopulationEstimator([3, 2])
    feed(estimator, data)
    population = estimator.result(NO_EPS.expand(2))
    assert population.count.tolist() == [sum(sizes)] * 2
    assert population.num_batches.tolist() == [sum(n > 0 for n in sizes)] * 2
    for layer, (mean, var) in enumerate(zip(population.mean.split([3, 2]), population.var.split([3, 2]), strict=True)):
        whole = torch.cat([batch[layer] for batch in data]).numpy()
        if len(whole):
            assert_allclose(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
            assert_allclose(var, whole.var(0), rtol=1e-9, atol=1e-12)
            assert_allclose(estimator.moments(layer).var(), var, rtol=1e-15)


def test_a_layer_reached_several_times_or_not_at_all_in_a_batch():
    estimator = PopulationEstimator([1, 1])
    x, y, z = torch.randn(4, 1), torch.randn(3, 1), torch.randn(5, 1)
    for inputs in ([x, y], [z]):
        for value in inputs:
            ops.accumulate(value, *estimator.slot(0))
        estimator.end_batch()
    population = estimator.result(NO_EPS.expand(2))
    expected = Moments.of(torch.cat([x, y, z]))
    assert_allclose(population.mean[0], expected.mean[0], atol=1e-7)  # float32 input of standard deviation 1
    assert_allclose(population.var[0], expected.var()[0], rtol=1e-6)
    assert population.count.tolist() == [12, 0]
    assert population.num_batches.tolist() == [2, 0]


def test_batch_mean_averages_means_and_unbiased_variances_whatever_the_sizes():
    batches = [torch.randn(n, 2, dtype=torch.float64) for n in (2, 5, 9)]
    estimator = PopulationEstimator([2], kind="batch-mean")
    feed(estimator, [[x] for x in batches])
    population = estimator.result(NO_EPS)
    assert_allclose(population.mean, torch.stack([x.mean(0) for x in batches]).mean(0), rtol=1e-12)
    assert_allclose(population.var, torch.stack([x.var(0) for x in batches]).mean(0), rtol=1e-12)


@pytest.mark.parametrize("num_batches", [8, 15, 16, 23, 40, 64, 300])  # more than are taken in at once
def test_standard_errors_are_the_largest_over_block_sizes(num_batches):
    rng = np.random.default_rng(num_batches)
    batches = [1e3 + rng.standard_normal((rng.integers(2, 9), 3)) * (1 + i % 2) for i in range(num_batches)]
    estimator = PopulationEstimator([3])
    feed(estimator, [[torch.from_numpy(b)] for b in batches])
    population = estimator.result(NO_EPS)
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if num_batches // size >= MIN_BLOCKS]
    expected = np.array([blocked_errors(batches, size) for size in sizes]).max(0)
    assert_allclose([population.mean_error.item(), population.var_error.item()], expected, rtol=1e-9)


def test_no_standard_error_from_too_few_batches():
    estimator = PopulationEstimator([1])
    feed(estimator, [[torch.randn(4, 1)]] * (MIN_BLOCKS - 1))
    assert estimator.result(NO_EPS).mean_error.isnan().all()
    feed(estimator, [[torch.randn(4, 1)]])
    assert estimator.result(NO_EPS).mean_error.isfinite().all()


def error_over_reported(batches: list[np.ndarray]) -> tuple[float, float]:
    """True over reported error of mean and variance, for independent channels of mean 0 and variance 1: 1 is honest.

    The channels are as many repetitions of the experiment; their root mean square is what is reported for the layer.
    """
    estimator = PopulationEstimator([batches[0].shape[1]])
    feed(estimator, [[torch.from_numpy(batch)] for batch in batches])
    p = estimator.result(NO_EPS)
    mean_error, var_error = p.mean.square().mean().sqrt(), (p.var - 1).square().mean().sqrt()
    return (mean_error / p.mean_error).item(), (var_error / p.var_error).item()


def independent_batches(num_batches, channels=1000):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((16, channels)) for _ in range(num_batches)]


def correlated_batches(num_batches, channels=1000, rho=0.8):
    """The means of mini-batches follow an AR(1) process, as frames of a video do; it makes half of the variance 1."""
    rng = np.random.default_rng(0)
    state, batches = rng.standard_normal(channels), []
    for _ in range(num_batches):
        state = rho * state + np.sqrt(1 - rho**2) * rng.standard_normal(channels)
        batches.append(np.sqrt(0.5) * (state + rng.standard_normal((16, channels))))
    return batches


@pytest.mark.parametrize("num_batches", [16, 64])
def test_standard_errors_are_honest_for_independent_batches(num_batches):
    for ratio in error_over_reported(independent_batches(num_batches)):
        assert ratio == pytest.approx(1.0, abs=0.1)  # 1000 channels know it to 1 / sqrt(2000) = 2%


@pytest.mark.parametrize(
    ("num_batches", "left"),
    [
        (64, 1.32),  # blocks of 8: sqrt(8.4 / 4.8), the variances of sums of 64 and of 8 steps, a step, of AR(1)
        (512, 1.04),  # blocks of 64
    ],
)
def test_standard_errors_do_not_fall_for_correlated_batches(num_batches, left):
    """Naive batch means would be off by 2.9 here, however long the run."""
    mean, _ = error_over_reported(correlated_batches(num_batches))
    assert mean == pytest.approx(left, abs=0.1)


def test_merging_ranks_equals_one_rank_with_all_data():
    rng = np.random.default_rng(1)
    data = [
        [torch.from_numpy(30 + rng.standard_normal((n, c))) for c in (2, 3)] for n in (4, 1, 7, 3, 2, 8, 5, 6, 2, 9)
    ]
    for kind in ("population", "batch-mean"):
        data_of_kind = [batch for batch in data if kind == "population" or len(batch[0]) > 1]
        one = PopulationEstimator([2, 3], kind=kind)
        feed(one, data_of_kind)
        ranks = [PopulationEstimator([2, 3], kind=kind) for _ in range(3)]  # the third has no data
        for rank, part in zip(ranks, (data_of_kind[:6], data_of_kind[6:], []), strict=True):
            feed(rank, part)
        for result in reduce_in_lockstep(ranks, NO_EPS.expand(2)):
            expected = one.result(NO_EPS.expand(2))
            assert_allclose(result.mean, expected.mean, rtol=1e-12)
            assert_allclose(result.var, expected.var, rtol=1e-9)
            assert torch.equal(result.count, expected.count)
            assert torch.equal(result.num_batches, expected.num_batches)
            # Mini-batches themselves are the blocks both times; pairs across ranks are not formed.
            assert_allclose(result.mean_error, expected.mean_error, rtol=1e-9)
            assert_allclose(result.var_error, expected.var_error, rtol=1e-9)


def reduce_in_lockstep(ranks, eps):
    """Run every rank's result() with an all_reduce that sums over them: replay until both sums are known."""
    levels = max(rank.num_levels for rank in ranks)
    sums: list[torch.Tensor] = []
    for round_index in range(2):
        contributions = []
        for rank in ranks:
            seen: list[torch.Tensor] = []

            def replay(flat, seen=seen):
                seen.append(flat.clone())
                if len(seen) <= len(sums):
                    flat.copy_(sums[len(seen) - 1])

            rank.result(eps, all_reduce=replay, num_levels=levels)
            contributions.append(seen[round_index])
        sums.append(torch.stack(contributions).sum(0))
    results = []
    for rank in ranks:
        known = iter(sums)
        results.append(
            rank.result(eps, all_reduce=lambda flat, known=known: flat.copy_(next(known)), num_levels=levels)
        )
    return results


def test_remembers_the_batch_in_which_a_channel_first_met_nan():
    estimator = PopulationEstimator([2, 1])
    x = torch.ones(3, 2)
    x[1, 1] = float("nan")
    feed(estimator, [[torch.ones(3, 2), torch.ones(3, 1)], [x, torch.ones(3, 1)], [x, torch.ones(3, 1)]])
    assert estimator.first_nonfinite.tolist() == [-1, 1, -1]


@pytest.mark.parametrize("when", [0, 255, 256, 299])
def test_remembers_it_also_of_mini_batches_that_have_long_been_taken_in(when):
    estimator = PopulationEstimator([1])
    for batch in range(300):
        feed(estimator, [[torch.full((3, 1), float("nan") if batch == when else 1.0)]])
        if batch == 100:
            assert estimator.met_nonfinite() == (when <= 100)
    assert estimator.met_nonfinite()
    assert estimator.first_nonfinite.tolist() == [when]


def test_no_channel_has_met_nan_where_there_is_none():
    estimator = PopulationEstimator([0])
    feed(estimator, [[torch.ones(3, 0)]])
    assert not estimator.met_nonfinite()


@pytest.mark.parametrize("kind", ["population", "batch-mean"])
def test_a_result_does_not_change_when_more_data_comes(kind):
    estimator = PopulationEstimator([1], kind=kind)
    feed(estimator, [[torch.randn(4, 1)], [torch.randn(4, 1)]])
    result = estimator.result(NO_EPS)
    mean, var = result.mean.clone(), result.var.clone()
    feed(estimator, [[torch.randn(4, 1) + 9]])
    estimator.result(NO_EPS)
    assert torch.equal(result.mean, mean)
    assert torch.equal(result.var, var)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def _bytes(estimator: PopulationEstimator) -> int:
    """All memory of the tensors that it holds, views counted once."""
    storages, todo, seen = {}, [estimator], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            todo += value
        elif hasattr(value, "__dict__"):
            todo += vars(value).values()
    return sum(storages.values())


@pytest.mark.parametrize("channels", [[1], [64], [64] * 50, [512] * 64])
def test_mini_batches_that_wait_take_half_a_mebibyte_or_sixteen_rows(channels):
    estimator = PopulationEstimator(channels)
    row = 8 * (len(channels) + 2 * sum(channels))
    waiting = []
    for _ in range(257):
        estimator.end_batch()
        waiting.append(estimator._num_waiting)
        assert estimator._waiting.nbytes <= max(2**19, 16 * row)
    assert 15 <= max(waiting) <= 255  # with one more they are taken in
    assert estimator._num_taken_in + estimator._num_waiting == 257


def test_memory_grows_with_the_logarithm_of_the_number_of_mini_batches():
    estimator, x = PopulationEstimator([64]), torch.randn(2, 64)
    taken = {}
    for number in range(1, 4097):
        ops.accumulate(x, *estimator.slot(0))
        estimator.end_batch()
        if number in (1024, 4096):
            estimator.result(NO_EPS)
            taken[number] = _bytes(estimator)
    # Of two more block sizes: their sums, and the block that waits for its neighbour.
    assert 0 < taken[4096] - taken[1024] <= 2 * 8 * ((3 + 6 * 64) + (1 + 2 * 64))
