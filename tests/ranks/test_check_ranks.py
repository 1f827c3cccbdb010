"""check_ranks on several ranks: real processes over gloo, each of which drifts in its own way."""

import time
import warnings
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import state_of
from processes import HANG_S, Outcome, Result, raised
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from precisebn import (
    __version__,
    adapt_bn_stats,
    check_ranks,
    convert_domain_specific,
    merge_rank_statistics,
    recalibrated,
    update_bn_stats,
)
from precisebn.distributed.ranks import Ranks
from precisebn.ranks import values

WORLD = 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(4, 4))


def checked(model: nn.Module, **arguments) -> Result:
    """The report, and whether the model is as before."""
    before = state_of(model)
    report = check_ranks(model, **arguments)
    return {"report": report, "unchanged": state_of(model) == before}


# ---- Scenarios ------------------------------------------------------------------------------------------------------


def equal(rank: int, world: int) -> Result:
    model = net()
    model[1].running_mean[0] = float("nan")
    model[1].running_mean[1] = -0.0
    sent: list[int] = []
    with mock.patch.object(Ranks, "_collective", side_effect=lambda flat, *_: sent.append(flat.numel())):
        return {**checked(model), "sent": sent}


def drifted(rank: int, world: int) -> Result:
    """Rank 2 in everything; rank 1 and 3 in one buffer."""
    model = net()
    if rank == 2:
        model[1].running_mean[3] += 1
        model[1].running_var.mul_(2)
        model[1].num_batches_tracked += 3
        model[3].weight.data[0, 0] += 0.5
        model[1].eval()
        model[0].weight.requires_grad_(False)
    if rank in (1, 3):
        model[3].bias.data[0] = float("nan")
    shown: list[str] = []
    return {**checked(model, log=shown.append), "shown": shown}


def only_the_sign_of_zero(rank: int, world: int) -> Result:
    model = net()
    model[1].bias.data.fill_(-0.0 if rank == 3 else 0.0)
    return checked(model)


def every_rank_its_own_averages(rank: int, world: int) -> Result:
    model = net()
    model[1].running_mean.fill_(float(rank))
    return checked(model)


def other_structure(rank: int, world: int) -> Result:
    model = net()
    if rank == 0:
        model.register_buffer("extra", torch.ones(2))
    if rank == 1:
        model[3].bias = None
    if rank == 2:
        model[1].running_var = torch.ones(5)
    if rank == 3:
        model[1].running_mean = model[1].running_mean.double()
        model[1].bias = model[1].weight
    return checked(model)


def several_pieces(rank: int, world: int) -> Result:
    model = net()
    for parameter in model.parameters():
        parameter.data += rank / 8
    with mock.patch.object(values, "MOST_BYTES", 100):
        return checked(model)


def sharded(rank: int, world: int) -> Result:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (world,))
    model = net()
    fully_shard(model[0], mesh=mesh)
    model.register_parameter("same", nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Replicate()])))
    own = torch.ones(2) + (rank == 3)
    model.register_parameter("other", nn.Parameter(DTensor.from_local(own, mesh, [Replicate()], run_check=False)))
    model.register_parameter("cut", nn.Parameter(DTensor.from_local(torch.ones(2) * rank, mesh, [Shard(0)])))
    return {"report": check_ranks(model, mesh)}


def ddp_and_plain(rank: int, world: int) -> Result:
    model = nn.parallel.DistributedDataParallel(net())
    with torch.no_grad():
        model.module[1].running_mean += rank
    return checked(model if rank % 2 else model.module)


def domains(rank: int, world: int) -> Result:
    model = convert_domain_specific(net(), num_domains=2)
    model[1].running_mean[1, 2] = 0.25 * rank
    return checked(model)


def some_ranks(rank: int, world: int) -> Result:
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return {"error": raised(lambda: check_ranks(net(), group))}
    model = net()
    model[1].running_mean += rank
    return checked(model, process_group=group)


def alone(rank: int, world: int) -> Result:
    model = net()
    model[1].running_mean += rank
    return checked(model, process_group=False)


def another_call_on_rank_1(rank: int, world: int) -> Result:
    call = merge_rank_statistics if rank == 1 else check_ranks
    return {"error": raised(lambda: call(net()))}


def an_update_on_rank_1(rank: int, world: int) -> Result:
    model = net()
    if rank == 1:
        return {"error": raised(lambda: update_bn_stats(model[:2], [torch.randn(4, 3, 8, 8)], None))}
    return {"error": raised(lambda: check_ranks(model))}


def another_recalibration_on_each_rank(rank: int, world: int) -> Result:
    def call() -> None:
        arguments = (net()[:2], [torch.randn(4, 3, 8, 8)])
        if rank == 0:
            adapt_bn_stats(*arguments)
        elif rank == 1:
            update_bn_stats(*arguments, num_iters=None)
        else:
            with recalibrated(*arguments, num_iters=None):
                raise AssertionError("ranks do not agree")

    return {"error": raised(call)}


def odd_buffers(rank: int, world: int) -> Result:
    """Of kinds that torch does not show as bytes, or kills the process if it is asked to."""
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are going away
        model.register_buffer("quantized", torch.quantize_per_tensor(torch.ones(2), 0.5, rank % 2, torch.qint8))
    model.register_buffer("conjugate", torch.tensor([1 + rank % 2 * 1j, 2.0]).conj())
    return checked(model)


def another_version_on_rank_1(rank: int, world: int) -> Result:
    with mock.patch("precisebn.distributed.ranks.__version__", "0.0.1" if rank == 1 else __version__):
        return {"error": raised(lambda: check_ranks(net()))}


class Broken(nn.Module):
    """Whose tensors cannot be listed."""

    def named_parameters(self, *_, **__):
        raise ZeroDivisionError("on purpose")


def failure_on_rank_1(rank: int, world: int) -> Result:
    start = time.monotonic()
    error = raised(lambda: check_ranks(Broken() if rank == 1 else net()))
    return {"error": error, "seconds": time.monotonic() - start}


def a_late_rank(rank: int, world: int) -> Result:
    if rank == 2:
        time.sleep(2)
    return checked(net())


SCENARIOS = [
    equal, drifted, only_the_sign_of_zero, every_rank_its_own_averages, other_structure, several_pieces, sharded,
    ddp_and_plain, domains, some_ranks, alone, another_call_on_rank_1, an_update_on_rank_1, another_version_on_rank_1,
    failure_on_rank_1, a_late_rank, another_recalibration_on_each_rank, odd_buffers,
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, WORLD, tmp_path_factory.mktemp("check"), limit_s=240.0, init_method="tcp")


# ---- Tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scenario",
    [
        equal,
        drifted,
        only_the_sign_of_zero,
        other_structure,
        several_pieces,
        sharded,
        ddp_and_plain,
        domains,
        odd_buffers,
    ],
)
def test_every_rank_returns_the_same_report_and_nothing_has_changed(ranks, scenario):
    results = ranks.of(scenario)
    assert all(result["report"] == results[0]["report"] for result in results)
    assert all(result.get("unchanged", True) for result in results)


def test_equal_ranks_send_no_value(ranks):
    for result in ranks.of(equal):
        assert result["report"].equal
        assert result["sent"] == []


def differing(report) -> dict[str, list[tuple[int, ...]]]:
    return {f"{d.name} {d.kind}": [variant.ranks for variant in d.variants] for d in report.differences}


def test_what_differs_is_named_with_the_ranks(ranks):
    report = ranks.of_rank(drifted, 0)["report"]
    assert report.reference == 1  # as rank 3: no two others agree in everything
    assert differing(report) == {
        "0.weight requires_grad": [(0, 1, 3), (2,)],
        "1 training": [(0, 1, 3), (2,)],
        "1.running_mean statistic": [(0, 1, 3), (2,)],
        "1.running_var statistic": [(0, 1, 3), (2,)],
        "1.num_batches_tracked statistic": [(0, 1, 3), (2,)],
        "3.weight parameter": [(0, 1, 3), (2,)],
        "3.bias parameter": [(1, 3), (0, 2)],
    }


def test_by_how_much_is_said(ranks):
    report = ranks.of_rank(drifted, 0)["report"]
    mean, var = (report[f"1.running_{what}"].variants[1] for what in ("mean", "var"))
    assert mean.max_difference == 1.0
    assert mean.rms_difference == pytest.approx((1 / 6) ** 0.5)
    assert mean.max_drift == pytest.approx(1 / (1 + 1e-5) ** 0.5)
    assert mean.rms_drift == pytest.approx((1 / 6 / (1 + 1e-5)) ** 0.5)
    assert var.max_drift == pytest.approx(torch.log(torch.tensor(2.00001 / 1.00001).double()).item(), rel=1e-4)
    assert report["1.num_batches_tracked"].max_difference == 3.0
    assert report["3.weight"].variants[1].max_difference == pytest.approx(0.5)
    assert report["3.weight"].variants[1].max_drift is None
    assert report["3.bias"].max_difference == float("inf")  # a NaN
    assert report["1"].variants[1].text == "eval mode"


def test_rank_0_alone_shows_it(ranks):
    first, *others = ranks.of(drifted)
    assert first["shown"] == [str(first["report"])]
    assert all(result["shown"] == [] for result in others)


def test_the_sign_of_zero_is_a_difference_of_0(ranks):
    report = ranks.of_rank(only_the_sign_of_zero, 1)["report"]
    assert differing(report) == {"1.bias parameter": [(0, 1, 2), (3,)]}
    assert report["1.bias"].max_difference == 0.0


def test_where_all_ranks_differ_each_is_compared_with_rank_0(ranks):
    [mean] = ranks.of_rank(every_rank_its_own_averages, 2)["report"].differences
    assert [variant.ranks for variant in mean.variants] == [(0,), (1,), (2,), (3,)]
    assert [variant.max_difference for variant in mean.variants] == [None, 1.0, 2.0, 3.0]


def test_other_tensors_are_named_in_words(ranks):
    report = ranks.of_rank(other_structure, 0)["report"]
    texts = {d.name: {rank: v.text for v in d.variants for rank in v.ranks} for d in report.differences}
    assert texts["extra"] == {0: "float32 (2,)", 1: "not there", 2: "not there", 3: "not there"}
    assert texts["3.bias"][1] == "not there"
    assert texts["1.running_var"][2] == "float32 (5,)"
    assert texts["1.running_mean"][3] == "float64 (6,)"
    assert texts["1.bias"][3] == "the same tensor as 1.weight"
    assert all(d.max_difference != d.max_difference for d in report.differences)  # NaN: nothing to compare
    assert "extra" in str(report)
    assert "not there" in str(report)


def test_values_that_do_not_fit_into_one_piece(ranks):
    report = ranks.of_rank(several_pieces, 3)["report"]
    assert {d.name for d in report.differences} == {name for name, _ in net().named_parameters()}
    for difference in report.differences:
        assert [variant.max_difference for variant in difference.variants[1:]] == pytest.approx([1 / 8, 2 / 8, 3 / 8])


def test_of_sharded_parameters_only_those_are_compared_that_ranks_have_as_a_whole(ranks):
    report = ranks.of_rank(sharded, 1)["report"]
    assert differing(report) == {"other parameter": [(0, 1, 2), (3,)]}
    assert report["other"].max_difference == 1.0
    assert set(report.skipped) == {"0.weight", "0.bias", "cut"}
    assert "3 tensors not compared: sharded: every rank holds a part of it" in str(report)


def test_buffers_of_odd_kinds(ranks):
    report = ranks.of_rank(odd_buffers, 2)["report"]
    assert differing(report) == {"quantized buffer": [(0, 2), (1, 3)], "conjugate buffer": [(0, 2), (1, 3)]}
    assert report["conjugate"].max_difference == 1.0


def test_a_wrapped_model_is_compared_with_a_plain_one(ranks):
    assert differing(ranks.of_rank(ddp_and_plain, 0)["report"]) == {
        "1.running_mean statistic": [(0,), (1,), (2,), (3,)]
    }


def test_drift_of_several_populations(ranks):
    [mean] = ranks.of_rank(domains, 0)["report"].differences
    assert mean.name == "1.running_mean"
    assert [variant.max_drift for variant in mean.variants[1:]] == pytest.approx([0.25, 0.5, 0.75], rel=1e-4)


def test_a_group_of_some_ranks_and_no_group(ranks):
    for rank in (1, 3):
        report = ranks.of_rank(some_ranks, rank)["report"]
        assert report.world_size == 2
        assert differing(report) == {"1.running_mean statistic": [(0,), (1,)]}
    assert "does not belong to the process_group" in ranks.of_rank(some_ranks, 0)["error"][1]
    assert all(result["report"].equal for result in ranks.of(alone))


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (another_call_on_rank_1, "the call is check_ranks on rank 0, but merge_rank_statistics on rank 1"),
        (an_update_on_rank_1, "the call is check_ranks on rank 0, but update_bn_stats on rank 1"),
        (another_recalibration_on_each_rank, "the call is adapt_bn_stats on rank 0, but update_bn_stats on rank 1"),
        (another_version_on_rank_1, f"the version of precisebn is {__version__} on rank 0, but 0.0.1 on rank 1"),
    ],
)
def test_ranks_that_call_something_else_all_raise(ranks, scenario, message):
    for result in ranks.of(scenario):
        assert result["error"][0] == "InputError"
        assert message in result["error"][1]


def test_a_rank_that_fails_makes_all_raise(ranks):
    for rank, result in enumerate(ranks.of(failure_on_rank_1)):
        assert result["seconds"] < HANG_S / 2
        assert result["error"][0] == ("ZeroDivisionError" if rank == 1 else "RankFailedError")
        assert "on purpose" in result["error"][1]


def test_a_rank_that_comes_late_is_waited_for(ranks):
    assert all(result["report"].equal for result in ranks.of(a_late_rank))
