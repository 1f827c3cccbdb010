"""Several ranks: real processes over gloo. One start of them runs all scenarios; each test looks at one scenario."""

import contextlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import values_of
from processes import HANG_S, Outcome, Result, Scenario, raised
from torch import Tensor, nn

from precisebn import InputError, RankFailedError, __version__, adapt_bn_stats, update_bn_stats
from precisebn.distributed.groups import wire_device
from precisebn.distributed.ranks import Ranks, Tally


def net(dtype: torch.dtype = torch.float32, bn: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), bn(6), nn.ReLU(), nn.Conv2d(6, 4, 3), bn(4)).to(dtype)


def share(rank: int, sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The mini-batches of one rank, of another location and scale on each."""
    generator = torch.Generator().manual_seed(rank)
    return [(rank + (1 + rank) * torch.randn(n, 3, 8, 8, generator=generator)).to(dtype) for n in sizes]


# How many samples the mini-batches of each rank have; the last rank of two or three has none.
UNEVEN = [[8, 5, 8, 3], [4, 4, 16, 2, 2, 8, 1], []]
EVEN = [[8] * 4] * 3


def sizes_of(world: int, uneven: bool) -> list[list[int]]:
    return (UNEVEN[3 - world :] if uneven else EVEN)[:world]


def recalibrated(
    model: nn.Module, rank: int, world: int, uneven: bool = True, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Result:
    report = update_bn_stats(model, share(rank, sizes_of(world, uneven)[rank], dtype), None, **arguments)
    state_dict = {key.removeprefix("module."): value.clone() for key, value in model.state_dict().items()}
    return {"values": values_of(model), "state_dict": state_dict, "report": report}


# ---- Scenarios: what the processes do -----------------------------------------------------------------------------


def even(rank: int, world: int) -> Result:
    return recalibrated(net(), rank, world, uneven=False)


def uneven(rank: int, world: int) -> Result:
    return recalibrated(net(), rank, world)


def uneven_float64(rank: int, world: int) -> Result:
    return recalibrated(net(torch.float64), rank, world, dtype=torch.float64)


def uneven_batch_mean(rank: int, world: int) -> Result:
    return recalibrated(net(torch.float64), rank, world, dtype=torch.float64, estimator="batch-mean")


def uneven_ddp(rank: int, world: int) -> Result:
    ddp = nn.parallel.DistributedDataParallel(net())
    result = recalibrated(ddp, rank, world)
    ddp(torch.randn(2, 3, 8, 8)).sum().backward()  # in step again: gradients and buffers synchronize
    return result


def sync_batchnorm(rank: int, world: int) -> Result:
    return recalibrated(net(bn=nn.SyncBatchNorm), rank, world)


def adapted(rank: int, world: int) -> Result:
    collectives = {}
    for prior in (0.0, 20.0):
        model = net(torch.float64).eval()
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            report = adapt_bn_stats(model, share(rank, sizes_of(world, True)[rank], torch.float64), prior=prior)
        collectives[prior] = all_reduce.call_count
    return {"state_dict": model.state_dict(), "report": report, "collectives": collectives}


def shifted_by_rank(model: nn.Module, shift: float) -> None:
    model[1].running_mean.add_(shift)


def adapted_from_different_averages(rank: int, world: int) -> Result:
    model = net(torch.float64).eval()
    shifted_by_rank(model, float(rank))  # as training leaves them: each rank's own running averages
    adapt_bn_stats(model, share(rank, sizes_of(world, True)[rank], torch.float64), prior=20.0)
    return {"state_dict": model.state_dict()}


def nan_in_the_prior_of_rank_1(rank: int, world: int) -> Result:
    return unchanged(
        lambda model: adapt_bn_stats(model, share(rank, [8] * 3), prior=20.0),
        prepare=lambda model: shifted_by_rank(model, float("nan") if rank == 1 else 0.0),
    )


def this_process_alone(rank: int, world: int) -> Result:
    return recalibrated(net(), rank, world, uneven=False, process_group=False)


def sub_group(rank: int, world: int) -> Result:
    group = dist.new_group([0, 1])
    if rank > 1:
        return {"error": raised(lambda: recalibrated(net(), rank, world, uneven=False, process_group=group))}
    return recalibrated(net(), rank, world, uneven=False, process_group=group)


def tolerance(rank: int, world: int) -> Result:
    generator = torch.Generator().manual_seed(rank)
    endless = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(10_000))
    model = net()
    report = update_bn_stats(model, endless, 10_000, tolerance=0.05)
    return {"values": values_of(model), "report": report}


def tolerance_with_uneven_data(rank: int, world: int) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not reached
        return recalibrated(net(), rank, world, tolerance=1e-9)


def no_rank_has_data(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, [], None))


def bar_on_rank_0_only(rank: int, world: int) -> Result:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        recalibrated(net(), rank, world, uneven=False, progress=True)
    return {"shown": shown.getvalue()}


class Broken:
    """A forward= that fails on rank 1 in the second mini-batch."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, model: nn.Module, batch: Tensor) -> None:
        model(batch)
        self.calls += 1
        if self.rank == 1 and self.calls == 2:
            raise ZeroDivisionError("on purpose")


def model_fails_on_rank_1(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * 4), 4, forward=Broken(rank)))


def model_fails_on_rank_1_with_tolerance(rank: int, world: int) -> Result:
    return unchanged(
        lambda model: update_bn_stats(model, share(rank, [8] * 20), None, forward=Broken(rank), tolerance=1e-3)
    )


def short_loader_on_rank_0(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * (3 if rank == 0 else 5)), 5))


def nan_on_rank_1(rank: int, world: int) -> Result:
    batches = share(rank, [8] * 3)
    if rank == 1:
        batches[1][0, 0, 0, 0] = float("nan")
    return unchanged(lambda model: update_bn_stats(model, batches, 3))


def ctrl_c_on_rank_0(rank: int, world: int) -> Result:
    def batches() -> Any:
        yield from share(rank, [8] * 2)
        if rank == 0:
            raise KeyboardInterrupt

    return unchanged(lambda model: update_bn_stats(model, batches(), None))


def wrong_argument_on_rank_1(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * 3), 0 if rank == 1 else 3))


def other_modes(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, share(rank, [8]), 1), lambda model: model[4].train(rank != 0))


def other_layers_of_the_same_size(rank: int, world: int) -> Result:
    names = ["0", "1"] if rank == 0 else ["1", "2"]
    batches = [torch.randn(4, 3)]
    build = lambda: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))  # noqa: E731
    return unchanged(lambda model: update_bn_stats(model, batches, 1, modules=names), build=build)


def tolerance_on_one_rank_only(rank: int, world: int) -> Result:
    return unchanged(
        lambda model: update_bn_stats(model, share(rank, [8] * 9), 9, tolerance=None if rank == 0 else 0.1)
    )


def other_lengths_with_tolerance(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * 9), 9 + rank, tolerance=1e-9))


def other_version(rank: int, world: int) -> Result:
    with mock.patch("precisebn.distributed.ranks.__version__", "0.0.1" if rank == 1 else __version__):
        return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * 3), 3))


def other_dtype_of_buffers(rank: int, world: int) -> Result:
    return unchanged(
        lambda model: update_bn_stats(model, share(rank, [8] * 3), 3),
        lambda model: model[1]._buffers.update(running_var=torch.ones(6).half()) if rank == 1 else None,
    )


def other_eps(rank: int, world: int) -> Result:
    return unchanged(
        lambda model: update_bn_stats(model, share(rank, [8] * 3), 3),
        lambda model: setattr(model[4], "eps", 1e-3 if rank == 1 else 1e-5),
    )


def other_prior(rank: int, world: int) -> Result:
    return unchanged(lambda model: adapt_bn_stats(model, share(rank, [8] * 3), prior=20.0 + (rank == 1)))


def other_order_of_layers(rank: int, world: int) -> Result:
    layers = [("a", nn.BatchNorm1d(3)), ("b", nn.BatchNorm1d(3))]
    build = lambda: nn.Sequential(OrderedDict(layers[::-1] if rank == 1 else layers))  # noqa: E731
    return unchanged(lambda model: update_bn_stats(model, [torch.randn(4, 3)], 1), build=build)


MANY = 2**60 + 1
"""A number of mini-batches that no float64 holds."""


def counted_differently_before(rank: int, world: int) -> Result:
    model = net()
    model[1].num_batches_tracked.fill_(MANY + rank)
    return recalibrated(model, rank, world)


class OwnForward(nn.BatchNorm2d):
    """Not known to normalize its input; whether it writes statistics is seen where mini-batches reach it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def own_forward_reached_on_rank_1_only(rank: int, world: int) -> Result:
    model = net(bn=OwnForward)
    forward = None if rank == 1 else lambda model, batch: model[:4](batch)
    return recalibrated(model, rank, world, uneven=False, forward=forward)


def device_mesh(rank: int, world: int) -> Result:
    mesh = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("one", "all"))
    two = raised(lambda: recalibrated(net(), rank, world, uneven=False, process_group=mesh))
    return {"error": two, **recalibrated(net(), rank, world, uneven=False, process_group=mesh["all"])}


def no_group(rank: int, world: int) -> Result:
    return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * 3), 3, process_group=world))


def group_without_rank_0(rank: int, world: int) -> Result:
    group = dist.new_group(list(range(1, world)))
    if rank == 0:
        return {"error": raised(lambda: recalibrated(net(), rank, world, uneven=False, process_group=group))}
    return recalibrated(net(), rank, world, uneven=False, process_group=group)


def group_without_a_store(rank: int, world: int) -> Result:
    with mock.patch(
        "precisebn.distributed.ranks.group_store", return_value=None
    ):  # as MPI's, which no wheel of torch has
        return unchanged(lambda model: update_bn_stats(model, share(rank, [8] * 3), 3))


def undone_on_each_rank(rank: int, world: int) -> Result:
    model = net()
    shifted_by_rank(model, float(rank))  # each rank has statistics of its own to put back
    before = values_of(model)
    report = update_bn_stats(model, share(rank, sizes_of(world, True)[rank]), None)
    changed = values_of(model) != before
    report.undo()
    return {"changed": changed, "is back": values_of(model) == before}


def ranks_meet_again_after_failures(rank: int, world: int) -> Result:
    return even(rank, world)


SCENARIOS: list[Scenario] = [
    even, uneven, uneven_float64, uneven_batch_mean, uneven_ddp, sync_batchnorm, adapted,
    adapted_from_different_averages, nan_in_the_prior_of_rank_1, this_process_alone, sub_group, tolerance,
    tolerance_with_uneven_data, no_rank_has_data, bar_on_rank_0_only, model_fails_on_rank_1,
    model_fails_on_rank_1_with_tolerance, short_loader_on_rank_0, nan_on_rank_1, ctrl_c_on_rank_0,
    wrong_argument_on_rank_1, other_modes, other_layers_of_the_same_size, tolerance_on_one_rank_only,
    other_lengths_with_tolerance, other_version, other_dtype_of_buffers, other_eps, other_prior, other_order_of_layers,
    counted_differently_before, own_forward_reached_on_rank_1_only, device_mesh, group_without_rank_0,
    group_without_a_store, no_group, undone_on_each_rank, ranks_meet_again_after_failures,
]  # fmt: skip


def unchanged(
    call: Callable[[nn.Module], Any],
    prepare: Callable[[nn.Module], Any] | None = None,
    build: Callable[[], nn.Module] = net,
) -> Result:
    return processes.unchanged(call, build, prepare)


# ---- Tests: what came of it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, request.param, tmp_path_factory.mktemp(f"world{request.param}"))


def single_process(model: nn.Module, world: int, uneven: bool = True, **arguments: Any) -> nn.Module:
    """The model after one process has seen the mini-batches of all ranks."""
    dtype = next(model.parameters()).dtype
    batches = [b for rank, sizes in enumerate(sizes_of(world, uneven)) for b in share(rank, sizes, dtype)]
    update_bn_stats(model, batches, None, **arguments)
    return model


def statistics(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if "running" in key or "tracked" in key}


@pytest.mark.parametrize("scenario", [even, uneven, uneven_ddp, sync_batchnorm, tolerance, uneven_batch_mean])
def test_all_ranks_end_with_the_same_bits(ranks, scenario):
    results = ranks.of(scenario)
    assert all(result["values"] == results[0]["values"] for result in results)


@pytest.mark.parametrize("scenario", [even, uneven, uneven_ddp, sync_batchnorm])
def test_float32_statistics_are_those_of_one_process_to_the_last_place(ranks, scenario):
    """Sums in float64 differ in their order; rounded to float32 that is one unit in the last place at most."""
    expected = statistics(single_process(net(), ranks.world, scenario is not even).state_dict())
    got = ranks.of(scenario)[0]["state_dict"]
    for key, value in expected.items():
        ulp = torch.nextafter(value.abs(), torch.tensor(torch.inf)) - value.abs() if value.is_floating_point() else 0
        assert torch.all((got[key] - value).abs() <= ulp), key


@pytest.mark.parametrize(("scenario", "estimator"), [(uneven_float64, "population"), (uneven_batch_mean, "batch-mean")])
def test_float64_statistics_are_those_of_one_process_to_rounding(ranks, scenario, estimator):
    expected = statistics(single_process(net(torch.float64), ranks.world, estimator=estimator).state_dict())
    got = statistics(ranks.of(scenario)[0]["state_dict"])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_report_is_of_all_ranks(ranks):
    batches = sizes_of(ranks.world, uneven=True)
    for rank, result in enumerate(ranks.of(uneven)):
        report = result["report"]
        assert report.world_size == ranks.world
        assert report.num_iters == len(batches[rank])
        assert report.num_samples == sum(map(sum, batches))
        assert [layer.num_batches for layer in report.layers] == [sum(map(len, batches))] * 2
        assert report.to_dict()["layers"] == ranks.of(uneven)[0]["report"].to_dict()["layers"]
        assert f"on {ranks.world} ranks" in str(report)


def test_standard_errors_are_those_of_one_process_with_all_mini_batches(ranks):
    """Exactly so as long as single mini-batches are compared: larger blocks are of one rank, so other ones here."""
    model = net()
    batches = [b for rank, sizes in enumerate(sizes_of(ranks.world, False)) for b in share(rank, sizes)]
    one = update_bn_stats(model, batches, None)
    for layer, expected in zip(ranks.of(even)[0]["report"].layers, one.layers, strict=True):
        assert layer.mean_error == pytest.approx(expected.mean_error, rel=1e-9)
        assert layer.var_error == pytest.approx(expected.var_error, rel=1e-9)


def test_the_prior_is_weighed_against_the_samples_of_all_ranks(ranks):
    """In the forward too: as one process does that has the mini-batches of all."""
    sizes = sizes_of(ranks.world, uneven=True)
    batches = [batch for rank in range(ranks.world) for batch in share(rank, sizes[rank], torch.float64)]
    model = net(torch.float64).eval()
    adapt_bn_stats(model, batches, prior=20.0)
    expected = statistics(model.state_dict())
    for result in ranks.of(adapted):
        assert result["report"].num_samples == sum(map(sum, sizes))
        for key, value in statistics(result["state_dict"]).items():
            if "running" in key:
                torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


def test_present_statistics_are_averaged_over_ranks_once(ranks):
    for result in ranks.of(adapted):
        assert result["collectives"][20.0] == result["collectives"][0.0] + 1


def test_ranks_with_different_running_averages_end_with_the_same_statistics(ranks):
    expected = statistics(ranks.of(adapted)[0]["state_dict"])
    samples = sum(map(sum, sizes_of(ranks.world, uneven=True)))
    first, *others = (statistics(result["state_dict"]) for result in ranks.of(adapted_from_different_averages))
    for other in others:
        assert all(torch.equal(other[key], value) for key, value in first.items())
    average = sum(range(ranks.world)) / ranks.world
    moved = expected["1.running_mean"] + average * 20 / (20 + samples)
    torch.testing.assert_close(first["1.running_mean"], moved, rtol=1e-12, atol=1e-12)


def test_a_prior_that_is_nan_on_one_rank_is_an_error_on_all(ranks):
    for result in ranks.of(nan_in_the_prior_of_rank_1):
        assert result["error"][0] == "NonFiniteStatisticsError"
        assert "prior=0" in result["error"][1]
        assert result["unchanged"]


def test_process_group_false_is_this_process_alone(ranks):
    for rank, result in enumerate(ranks.of(this_process_alone)):
        alone = net()
        update_bn_stats(alone, share(rank, EVEN[rank]), None)
        assert result["values"] == values_of(alone)
        assert result["report"].world_size == 1


def test_a_group_of_some_ranks(ranks):
    first, second, *others = ranks.of(sub_group)
    assert first["values"] == second["values"]
    assert first["report"].world_size == 2
    expected = statistics(single_process(net(), 2, uneven=False).state_dict())
    torch.testing.assert_close(statistics(first["state_dict"]), expected, rtol=1e-6, atol=1e-6)
    for other in others:
        assert other["error"][0] == "InputError"
        assert "does not belong to the process_group" in other["error"][1]


def test_tolerance_stops_all_ranks_at_the_same_step(ranks):
    reports = [result["report"] for result in ranks.of(tolerance)]
    assert len({report.num_iters for report in reports}) == 1
    assert 8 <= reports[0].num_iters < 10_000
    assert all(report.converged and report.max_error <= 0.05 for report in reports)


def test_tolerance_with_uneven_data_uses_all_of_it(ranks):
    for rank, result in enumerate(ranks.of(tolerance_with_uneven_data)):
        assert result["values"] == ranks.of(uneven)[0]["values"]
        assert result["report"].num_iters == len(sizes_of(ranks.world, uneven=True)[rank])
        assert result["report"].converged is False


def test_only_rank_0_shows_a_bar(ranks):
    first, *others = [result["shown"] for result in ranks.of(bar_on_rank_0_only)]
    assert "samples=32" in first
    assert others == [""] * (ranks.world - 1)


FAILURES = {
    model_fails_on_rank_1: (1, "ZeroDivisionError", "on purpose"),
    model_fails_on_rank_1_with_tolerance: (1, "ZeroDivisionError", "on purpose"),
    short_loader_on_rank_0: (0, "InsufficientDataError", "ended after 3 mini-batches"),
    nan_on_rank_1: (1, "NonFiniteStatisticsError", "layer '1'"),
    ctrl_c_on_rank_0: (0, "KeyboardInterrupt", ""),
    wrong_argument_on_rank_1: (1, "InputError", "num_iters=0"),
}


@pytest.mark.parametrize("scenario", FAILURES, ids=lambda scenario: scenario.__name__)
def test_a_rank_that_fails_makes_every_rank_raise_and_no_model_changes(ranks, scenario):
    failing, error, message = FAILURES[scenario]
    for rank, result in enumerate(ranks.of(scenario)):
        assert result["unchanged"]
        assert result["seconds"] < HANG_S / 2
        if rank == failing:
            assert result["error"][0] == error
            assert message in result["error"][1]
        else:
            assert result["error"][0] == "RankFailedError"
            assert f"rank(s) {failing} of {ranks.world} failed" in result["error"][1]


DISAGREEMENTS = {
    other_modes: "layer '4' is not there on rank 0, but 4 channels in float32, eps=1e-05 on rank 1",
    other_layers_of_the_same_size: "layer '0' is 3 channels in float32, eps=1e-05 on rank 0, but not there on rank 1",
    tolerance_on_one_rank_only: "tolerance= is None on rank 0, but 0.1 on rank 1",
    other_lengths_with_tolerance: "num_iters= with a tolerance is 9 on rank 0, but 10 on rank 1",
    other_version: f"the version of precisebn is {__version__} on rank 0, but 0.0.1 on rank 1",
    other_dtype_of_buffers: "layer '1' is 6 channels in float32, eps=1e-05 on rank 0, but 6 channels in float32 and "
    "float16, eps=1e-05 on rank 1",
    other_eps: "layer '4' is 4 channels in float32, eps=1e-05 on rank 0, but 4 channels in float32, eps=0.001 on",
    other_prior: "prior= is 20.0 on rank 0, but 21.0 on rank 1",
    other_order_of_layers: "their order is another on rank 0 than on rank 1",
}


@pytest.mark.parametrize("scenario", DISAGREEMENTS, ids=lambda scenario: scenario.__name__)
def test_ranks_that_do_not_agree_all_raise_and_say_in_what(ranks, scenario):
    for result in ranks.of(scenario):
        assert result["error"][0] == "InputError"
        assert "ranks chose different BatchNorm layers, or have different arguments" in result["error"][1]
        assert DISAGREEMENTS[scenario] in result["error"][1]
        assert result["unchanged"]
        assert result["seconds"] < HANG_S / 2


def test_num_batches_tracked_ends_equal_at_the_largest_of_any_rank_and_the_mini_batches_of_all(ranks):
    seen = sum(map(len, sizes_of(ranks.world, uneven=True)))
    for result in ranks.of(counted_differently_before):
        assert result["state_dict"]["1.num_batches_tracked"].item() == MANY + (ranks.world - 1) + seen
        assert result["state_dict"]["4.num_batches_tracked"] == seen
        assert result["values"] == ranks.of(counted_differently_before)[0]["values"]


def test_a_layer_with_a_forward_of_its_own_that_one_rank_reached_is_recalibrated_on_all(ranks):
    results = ranks.of(own_forward_reached_on_rank_1_only)
    for result in results:
        assert result["values"] == results[0]["values"]
        assert [(layer.name, layer.num_batches) for layer in result["report"].layers] == [
            ("1", 4 * ranks.world),
            ("4", 4),
        ]


def test_a_device_mesh_of_one_dimension_is_a_group(ranks):
    for result in ranks.of(device_mesh):
        assert result["error"][0] == "InputError"
        assert "DeviceMesh of 2 dimensions; pass one of them: mesh['dp']" in result["error"][1]
        assert result["values"] == ranks.of(even)[0]["values"]


def test_a_group_without_rank_0(ranks):
    outside, *inside = ranks.of(group_without_rank_0)
    assert "does not belong to the process_group" in outside["error"][1]
    batches = [batch for rank in range(1, ranks.world) for batch in share(rank, EVEN[rank])]
    alone = net()
    update_bn_stats(alone, batches, None)
    expected = statistics(alone.state_dict())
    for result in inside:
        assert result["values"] == inside[0]["values"]
        assert result["report"].world_size == ranks.world - 1
        torch.testing.assert_close(statistics(result["state_dict"]), expected, rtol=1e-6, atol=1e-6)


def test_a_group_without_a_store_is_refused(ranks):
    for result in ranks.of(group_without_a_store):
        assert result["error"][0] == "InputError"
        assert "backend 'gloo' has no store" in result["error"][1]
        assert result["unchanged"]


def test_each_rank_puts_its_own_statistics_back(ranks):
    assert ranks.of(undone_on_each_rank) == [{"changed": True, "is back": True}] * ranks.world


def test_a_number_is_no_group(ranks):
    for result in ranks.of(no_group):
        assert result["error"][0] == "InputError"
        assert f"process_group={ranks.world} must be a process group, a DeviceMesh of one dim" in result["error"][1]
        assert result["unchanged"]


def test_no_data_on_any_rank_is_an_error_on_every_rank(ranks):
    for result in ranks.of(no_rank_has_data):
        assert result["error"][0] == "InsufficientDataError"
        assert result["unchanged"]


def test_after_failures_the_ranks_are_still_in_step(ranks):
    for result in ranks.of(ranks_meet_again_after_failures):
        assert result["values"] == ranks.of(even)[0]["values"]


# ---- Without processes --------------------------------------------------------------------------------------------


def test_one_process_without_torch_distributed_is_one_rank():
    alone = Ranks(call="update_bn_stats")
    assert (alone.size, alone.rank) == (1, 0)
    tally = Tally(samples=5)
    assert alone.tally(tally) == (tally, tally)
    flat = torch.ones(3)
    alone.all_reduce(flat)
    assert torch.equal(flat, torch.ones(3))


def test_one_rank_asks_nothing_of_torch_distributed():
    """As where torch was built without it."""
    with mock.patch("precisebn.distributed.ranks.dist", None):
        alone = Ranks(False, call="update_bn_stats")
        alone.agree({"anything": 1})
        alone.all_reduce(torch.ones(3), "max")
        alone.broadcast(torch.ones(3), 0)
        assert alone.gather((1, "two"), list) == [[1, "two"]]
        alone.commit()


@pytest.mark.parametrize(
    ("config", "device", "accelerator", "expected"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", None, "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda:1", "cuda:1"),  # float64 that lies on the CPU, with a model on an accelerator
        ("cuda:nccl", "cpu", None, "cuda"),
        ("xpu:xccl", "cpu", "xpu:2", "xpu:2"),
        ("cuda:nccl", "cpu", "xpu:0", "cuda"),
        ("cpu:gloo", "cuda:0", "cuda:0", "cpu"),
    ],
)
def test_tensors_travel_on_a_device_that_the_backend_reduces(config, device, accelerator, expected):
    of = torch.device
    assert wire_device(config, of(device), None if accelerator is None else of(accelerator)) == of(expected)


def test_errors_are_what_code_that_knows_torch_expects():
    assert issubclass(RankFailedError, RuntimeError)
    assert issubclass(InputError, ValueError)
