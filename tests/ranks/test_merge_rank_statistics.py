"""merge_rank_statistics on several ranks: real processes over gloo, held against one process and the law."""

import copy
import datetime
import math
import time
import warnings
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import state_of, values_of
from processes import Outcome, Result, raised
from torch import Tensor, nn

import precisebn
from precisebn import (
    InputError,
    check_ranks,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    freeze,
    merge_rank_statistics,
    update_bn_stats,
)
from precisebn.models.tensor_pictures import same_bits
from precisebn.ranks.merge_report import MergedLayer, MergeReport

WORLD = 3
COUNTS = [5, 0, 20]
MANY = 2**60 + 1
"""A number of mini-batches that no float64 holds."""


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).to(
        dtype
    )


def data(rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [(rank + (1 + rank) * torch.randn(4, 3, 8, 8, generator=generator)).to(dtype) for _ in range(3)]


def own_statistics(rank: int, model: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with the exact statistics of its rank's data."""
    model = net(dtype) if model is None else model
    update_bn_stats(model, data(rank, dtype), None, process_group=False, modules="all")
    return model


def drifted(rank: int, model: nn.Module) -> nn.Module:
    """Every population another, by its rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(COUNTS[rank])
    return model


def result(model: nn.Module, **arguments) -> Result:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = merge_rank_statistics(model, **arguments)
    return {
        "before": before, "after": {key: value.clone() for key, value in model.state_dict().items()},
        "report": report, "equal": check_ranks(model).equal, "values": values_of(model),
    }  # fmt: skip


# ---- Scenarios ------------------------------------------------------------------------------------------------------


def statistics_of_the_data(rank: int, world: int) -> Result:
    together = net()
    update_bn_stats(together, data(rank), None)
    own = own_statistics(rank)
    own[4].num_batches_tracked.fill_(MANY + rank)
    return {**result(own), "expected": together.state_dict()}


def by_batches(rank: int, world: int) -> Result:
    model = drifted(rank, net())
    if rank == 1:  # which has counted none
        model[1].running_var.fill_(math.nan)
    return result(model, weights="batches")


def no_batches_anywhere(rank: int, world: int) -> Result:
    model = drifted(rank, net())
    for layer in (model[1], model[4]):
        layer.num_batches_tracked.zero_()
    equal = drifted(rank, net())
    merge_rank_statistics(equal)
    return {**result(model, weights="batches"), "expected": equal.state_dict()}


def one_has_none(rank: int, world: int) -> Result:
    """Rank 1 of layer 1 alone; then no rank at all."""
    texts = {}
    for layers in ((1,), ()):
        model = drifted(rank, net())
        for index, layer in ((1, model[1]), (4, model[4])):
            layer.num_batches_tracked.fill_(0 if not layers or (index in layers and rank == 1) else 7)
        for weights in ("equal", "batches"):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                merge_rank_statistics(copy.deepcopy(model), weights=weights)
            texts[layers, weights] = [str(warning.message) for warning in warned]
    return texts


def rank_0s(rank: int, world: int) -> Result:
    model = drifted(rank, net(torch.float32))
    if rank == 2:
        model[1].running_mean[0] = math.nan
    model[4].num_batches_tracked.fill_(MANY - rank)
    return result(model, reduce=False)


ODD = torch.tensor([-0.0, 0.1, 1e30, -1e-30, 3.3, 7.7]).double() / 3


def equal_before(rank: int, world: int) -> Result:
    model = net()
    model[1].running_mean.copy_(ODD)
    model[1].running_var.copy_(ODD.abs())
    return result(model)


KINDS = {
    "domains": lambda: convert_domain_specific(net(), num_domains=2),
    "cycle": lambda: convert_cycle(net(), length=2),
    "ghost": lambda: convert_ghost(net(), 2),
    "sync": lambda: precisebn.convert_sync_batchnorm(net()),
    "frozen by name": lambda: convert_frozen_batchnorm(net()),
    "half": lambda: net(torch.float16),
    "ddp": lambda: nn.parallel.DistributedDataParallel(net(), broadcast_buffers=False),
}


def of_every_kind(rank: int, world: int) -> Result:
    return {
        kind: result(drifted(rank, build()), modules="*" if kind == "frozen by name" else "all")
        for kind, build in KINDS.items()
    }


def some_layers(rank: int, world: int) -> Result:
    model = freeze(drifted(rank, net()), "4")
    eval_mode = drifted(rank, net()).train()
    eval_mode[1].eval()
    return {
        "frozen": result(model),
        "training": result(eval_mode, modules="training"),
        "excluded": result(drifted(rank, net()), exclude="1"),
    }


def some_ranks(rank: int, world: int) -> Result:
    mesh = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("one", "all"))
    group = dist.new_group([0, 2])
    outcome = {
        "mesh": result(drifted(rank, net()), process_group=mesh["all"]),
        "two dimensions": raised(lambda: merge_rank_statistics(net(), mesh)),
    }
    model = drifted(rank, net())
    if rank == 1:
        return outcome | {"error": raised(lambda: merge_rank_statistics(model, group))}
    merge_rank_statistics(model, group)
    return outcome | {"after": model.state_dict()}


def attempt(model: nn.Module, **arguments) -> Result:
    before = state_of(model)
    return {"error": raised(lambda: merge_rank_statistics(model, **arguments)), "unchanged": state_of(model) == before}


def nan_on_rank_1(rank: int, world: int) -> Result:
    model = drifted(rank, net())
    if rank == 1:
        model[4].running_mean[2] = math.nan
    return attempt(model)


def unwritable_on_rank_2(rank: int, world: int) -> Result:
    model = drifted(rank, net())
    if rank == 2:
        model[4]._buffers["running_var"] = torch.ones(1).double().expand(4)
    return attempt(model)


def overflow(rank: int, world: int) -> Result:
    model = net(torch.float16)
    model[1].running_mean.fill_(60_000.0 * (-1) ** rank)
    return attempt(model)


def ctrl_c_on_rank_0_after_writing(rank: int, world: int) -> Result:
    """At the very last moment before all ranks keep their changes."""
    from precisebn.models.interrupts import HeldBack

    with mock.patch.object(HeldBack, "deliver", side_effect=KeyboardInterrupt if rank == 0 else None):
        return attempt(drifted(rank, net()))


def other_layers(rank: int, world: int) -> Result:
    return attempt(drifted(rank, net() if rank else convert_frozen_batchnorm(net(), include="1")))


def other_arguments(rank: int, world: int) -> Result:
    return attempt(drifted(rank, net()), reduce=rank > 0)


def uncounted_batches(rank: int, world: int) -> Result:
    model = net()
    model[1].num_batches_tracked = None
    return attempt(model, weights="batches") | {"equal": result(drifted(rank, model))["equal"]}


def other_version(rank: int, world: int) -> Result:
    with mock.patch("precisebn.distributed.ranks.__version__", "0.0.1" if rank == 1 else precisebn.__version__):
        return attempt(drifted(rank, net()))


def rank_1_comes_too_late(rank: int, world: int) -> Result:
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    dist.barrier()
    if rank == 1:
        time.sleep(5)
    late = attempt(drifted(rank, net()), process_group=group)
    return late | {"together": result(drifted(rank, net()))["equal"]}


SCENARIOS = [
    statistics_of_the_data, by_batches, no_batches_anywhere, one_has_none, rank_0s, equal_before, of_every_kind,
    some_layers, some_ranks, nan_on_rank_1, unwritable_on_rank_2, overflow, ctrl_c_on_rank_0_after_writing,
    other_layers, other_arguments, uncounted_batches, other_version, rank_1_comes_too_late,
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, WORLD, tmp_path_factory.mktemp("merge"), limit_s=240.0)


# ---- What is merged -------------------------------------------------------------------------------------------------


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running" in key or "tracked" in key}


def merged(before: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The law of total variance, written down for each pair of buffers."""
    total, expected = sum(weights), {}
    states = [state for state, weight in zip(before, weights, strict=True) if weight]
    shares = [weight / total for weight in weights if weight]
    for key in before[0]:
        if key.endswith("running_mean"):
            var_key = key.removesuffix("mean") + "var"
            means, variances = ([state[k].double() for state in states] for k in (key, var_key))
            mean = sum(share * one for share, one in zip(shares, means, strict=True))
            within = sum(share * one for share, one in zip(shares, variances, strict=True))
            between = sum(share * (one - mean) ** 2 for share, one in zip(shares, means, strict=True))
            expected |= {key: mean, var_key: within + between}
        elif key.endswith("num_batches_tracked"):
            expected[key] = torch.stack([state[key] for state in before]).amax(0)
    return expected


def test_statistics_of_equal_shares_of_the_data_merge_into_those_of_all_of_it(ranks):
    """What update_bn_stats measures over all ranks: so merging is exact where the ranks have had as much data."""
    for one in ranks.of(statistics_of_the_data):
        expected = {key: value for key, value in statistics(one["expected"]).items() if "running" in key}
        got = {key: one["after"][key] for key in expected}
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_averaging_loses_the_variance_between_ranks_and_the_report_says_how_much(ranks):
    results = ranks.of(statistics_of_the_data)
    for key, name in (("1.running_var", "1"), ("4.running_var", "4")):
        averaged = sum(one["before"][key] for one in results) / WORLD
        new = results[0]["after"][key]
        share = (new - averaged) / (new + 1e-5)
        layer = results[0]["report"][name]
        assert layer.variance_lost == pytest.approx(share.mean().item(), rel=1e-9)
        assert layer.max_variance_lost == pytest.approx(share.max().item(), rel=1e-9)
    assert results[0]["report"]["1"].variance_lost > 0.05  # inputs with means of 0, 1 and 2


@pytest.mark.parametrize("scenario", [statistics_of_the_data, by_batches, rank_0s, equal_before])
def test_all_ranks_end_with_the_same_bits_and_the_same_report(ranks, scenario):
    results = ranks.of(scenario)
    assert all(one["equal"] for one in results)
    assert len({str(one["report"].to_dict()) for one in results}) == 1


def test_ranks_count_by_their_mini_batches_if_asked(ranks):
    before = [one["before"] for one in ranks.of(by_batches)]
    expected = merged(before, COUNTS)
    assert math.isnan(before[1]["1.running_var"][0])  # of a rank that does not count
    torch.testing.assert_close(statistics(ranks.of(by_batches)[0]["after"]), expected, rtol=1e-12, atol=1e-12)
    assert expected["1.num_batches_tracked"] == 20


def test_a_count_that_no_float_holds_stays_exact(ranks):
    for scenario, expected in ((statistics_of_the_data, MANY + WORLD - 1), (rank_0s, MANY)):
        assert [one["after"]["4.num_batches_tracked"].item() for one in ranks.of(scenario)] == [expected] * WORLD


def test_where_nobody_has_counted_a_mini_batch_all_ranks_count_the_same(ranks):
    for one in ranks.of(no_batches_anywhere):
        expected = {key: value for key, value in statistics(one["expected"]).items() if "running" in key}
        assert all(torch.equal(one["after"][key], value) for key, value in expected.items())


def test_a_rank_without_a_mini_batch_counts_with_a_warning_on_all_ranks(ranks):
    for texts in ranks.of(one_has_none):
        [text] = texts.pop(((1,), "equal"))
        assert "1 of the 2 sets of running statistics ('1') have seen no mini-batch on some rank" in text
        assert "weights='batches' leaves such ranks out" in text
        assert len(texts) == 3
        assert not any(texts.values())


def test_reduce_false_gives_all_what_rank_0_has(ranks):
    results = ranks.of(rank_0s)
    for one in results:
        for key, value in statistics(results[0]["before"]).items():
            assert torch.equal(one["after"][key], value), key
    assert results[0]["report"]["1"].max_mean_spread == math.inf  # a NaN on rank 2
    means = [one["before"]["4.running_mean"].double() for one in results]
    var = results[0]["before"]["4.running_var"].double()
    share = sum((mean - means[0]).square() for mean in means) / WORLD / (var + 1e-5)
    assert results[0]["report"]["4"].mean_spread == pytest.approx(share.mean().sqrt().item(), rel=1e-9)


def test_ranks_that_are_equal_keep_every_bit(ranks):
    for one in ranks.of(equal_before):
        for key, value in one["before"].items():
            assert same_bits(one["after"][key], value), key
        assert one["report"].max_variance_lost == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind(ranks, kind):
    results = [one[kind] for one in ranks.of(of_every_kind)]
    assert all(one["equal"] for one in results)
    expected = merged([one["before"] for one in results], [1.0] * WORLD)
    got = {key: results[0]["after"][key] for key in expected}
    dtype = next(value.dtype for key, value in got.items() if "running" in key)
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert len(expected) >= (4 if kind == "frozen by name" else 6)
    for key, value in expected.items():
        torch.testing.assert_close(got[key].double(), value.double(), rtol=tolerance, atol=tolerance)


def test_populations_have_a_line_each(ranks):
    report = ranks.of_rank(of_every_kind, 1)["domains"]["report"]
    assert [layer.name for layer in report.layers] == ["1[0]", "1[1]", "4[0]", "4[1]"]
    assert "1[0]" in str(report)


def test_layers_that_are_not_chosen_stay(ranks):
    for outcome, reasons in {
        "frozen": {"4": "frozen"},
        "training": {"1": "not chosen"},
        "excluded": {"1": "not chosen"},
    }.items():
        for one in (result[outcome] for result in ranks.of(some_layers)):
            assert one["report"].skipped == reasons
            [name] = reasons
            for key, value in one["before"].items():
                if key.startswith(name) or "running" in key:
                    assert torch.equal(one["after"][key], value) == key.startswith(name), key


def test_groups(ranks):
    results = ranks.of(some_ranks)
    assert all(one["mesh"]["equal"] for one in results)
    assert all("DeviceMesh of 2 dimensions" in one["two dimensions"][1] for one in results)
    assert "does not belong" in results[1]["error"][1]
    expected = merged([drifted(rank, net()).state_dict() for rank in (0, 2)], [1, 1])
    for rank in (0, 2):
        torch.testing.assert_close(statistics(results[rank]["after"]), expected, rtol=1e-12, atol=1e-12)


# ---- What fails -----------------------------------------------------------------------------------------------------

FAILURES = {
    nan_on_rank_1: (1, "NonFiniteStatisticsError", "layer '4' hold NaN or Inf on this rank"),
    unwritable_on_rank_2: (2, "RuntimeError", "unsupported operation"),
    ctrl_c_on_rank_0_after_writing: (0, "KeyboardInterrupt", ""),
}


@pytest.mark.parametrize("scenario", FAILURES, ids=lambda scenario: scenario.__name__)
def test_a_rank_that_fails_leaves_all_models_as_they_were(ranks, scenario):
    victim, error, message = FAILURES[scenario]
    for rank, outcome in enumerate(ranks.of(scenario)):
        assert outcome["unchanged"]
        assert outcome["error"][0] == (error if rank == victim else "RankFailedError")
        assert message in outcome["error"][1]


@pytest.mark.parametrize(
    ("scenario", "error", "message"),
    [
        (overflow, "NonFiniteStatisticsError", "layer '1' overflow its torch.float16 buffers"),
        (other_layers, "InputError", "layer '1' is not there on rank 0, but 6 channels in float64"),
        (other_arguments, "InputError", "reduce= is False on rank 0, but True on rank 1"),
        (other_version, "InputError", "the version of precisebn is"),
        (rank_1_comes_too_late, "RankFailedError", "rank(s) 1 of 3 did not come in the 3 s that ranks wait"),
        (uncounted_batches, "InputError", "layer '1' does not count its mini-batches"),
    ],
)
def test_what_cannot_be_merged_is_an_error_on_all_ranks(ranks, scenario, error, message):
    for outcome in ranks.of(scenario):
        assert outcome["unchanged"]
        assert outcome["error"][0] == error
        assert message in outcome["error"][1]
        assert outcome.get("equal", True)
        assert outcome.get("together", True)


# ---- One process ----------------------------------------------------------------------------------------------------


def test_one_process_keeps_what_it_has():
    model = drifted(0, net())
    before = state_of(model)
    report = merge_rank_statistics(model)
    assert state_of(model) == before
    assert (report.world_size, report.max_variance_lost) == (1, 0.0)
    assert [layer.name for layer in report.layers] == ["1", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduce": 1}, "reduce=1 must be True, to merge all ranks, or False"),
        ({"weights": "no"}, "weights='no' must be 'equal' or 'batches'"),
        ({"reduce": False, "weights": "batches"}, "has no meaning with reduce=False"),
        ({"modules": "9"}, "matches no BatchNorm layer"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(InputError, match=message):
        merge_rank_statistics(net(), **arguments)


def test_models_without_statistics():
    with pytest.raises(InputError, match=r"must be an nn.Module, not list"):
        merge_rank_statistics([])
    with pytest.raises(InputError, match=r"'0' \(BatchNorm1d\) are on the meta device"):
        merge_rank_statistics(nn.Sequential(nn.BatchNorm1d(3, device="meta")))
    with pytest.warns(UserWarning, match="Linear has no BatchNorm layer whose running statistics could be merged"):
        merge_rank_statistics(nn.Linear(1, 1))
    lazy = nn.Sequential(nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    assert set(merge_rank_statistics(lazy).skipped) == {"0", "1"}


def test_a_report_is_a_table():
    layers = (MergedLayer("features.bn", 8, 0.5, 1 / math.sqrt(2)),)
    report = MergeReport(4, True, "equal", layers, {"head": "frozen"})
    assert str(report).splitlines()[2] == "features.bn       0.5000         0.7071            25.00%"
    assert "1 layer left alone: frozen: head" in str(report)
    assert report["features.bn"].max_variance_lost == pytest.approx(0.5)
    assert report.max_variance_lost == pytest.approx(0.5)
    with pytest.raises(KeyError, match="'head' was not merged: frozen"):
        report["head"]
    assert report.to_dict()["layers"][0]["mean_spread"] == 0.5
    assert repr(report) == "<MergeReport: 1 layer, 4 ranks, max_variance_lost=0.5>"
