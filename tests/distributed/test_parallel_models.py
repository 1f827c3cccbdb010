"""Models that ranks share in one way or another: DDP, FSDP2, pipelines, tensor parallelism, distributed checkpoints."""

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import state_of, values_of
from processes import HANG_S, Outcome, Result, raised
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

from precisebn import (
    InputError,
    Moments,
    check_ranks,
    convert_batch_stat,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_to_batchnorm,
    merge_rank_statistics,
    shard_batchnorm,
    update_bn_stats,
)
from precisebn.nn import use_domain

WORLD = 3
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SHORT_TIMEOUT_S = 6.0


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)),
    )


def share(rank: int, number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [rank + (1 + rank) * torch.randn(4, 3, 8, 8, generator=generator) for _ in range(number)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.removeprefix("module."): value.clone()
        for key, value in model.state_dict().items()
        if "running" in key or "tracked" in key
    }


def sharded(model: nn.Module, policy: MixedPrecisionPolicy | None = None, **options: Any) -> nn.Module:
    """Each block a unit, and the model."""
    options |= {} if policy is None else {"mp_policy": policy}
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def trained(model: nn.Module, rank: int, steps: int = 2) -> list[Tensor]:
    """Some steps of SGD; the whole parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in share(rank, steps):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [getattr(parameter, "full_tensor", lambda p=parameter: p)().detach() for parameter in model.parameters()]


# ---- Scenarios: FSDP2 -----------------------------------------------------------------------------------------------


def fsdp(rank: int, world: int) -> Result:
    model = sharded(net())
    report = update_bn_stats(model, share(rank), None)
    values = statistics(model)
    trained(model, rank)  # and it goes on
    return {"statistics": values, "report": report, "equal": check_ranks(model).equal}


def torch_alone_in_bfloat16(rank: int, world: int) -> Result:
    return {
        "batch norm inside": raised(lambda: sharded(net(), BFLOAT16)(share(rank)[0])),
        "float32 put out": raised(lambda: with_units_of_float32()(share(rank)[0])),
    }


def with_units_of_float32() -> nn.Module:
    model = net()
    for block in model:
        fully_shard(block[1], mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    return fully_shard(model, mp_policy=BFLOAT16)


def fsdp_in_bfloat16(rank: int, world: int) -> Result:
    model = sharded(shard_batchnorm(net(), mp_policy=BFLOAT16), BFLOAT16)
    seen: list[torch.dtype] = []
    model[0][1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model[0][1].register_forward_hook(lambda layer, *_: seen.append(layer.weight.dtype))
    model[0][2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model(share(rank)[0]).sum().backward()
    gradient = model[0][1].weight.grad.dtype
    report = update_bn_stats(model, share(rank), None)
    with_gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    merge_rank_statistics(model)
    return {
        "statistics": statistics(model), "report": report, "seen": seen[:3], "gradient": gradient,
        "with gradients": with_gradients,
        "equal": check_ranks(model).equal, "parameters": trained(model, rank),
    }  # fmt: skip


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ghost": lambda model: convert_ghost(model, 2),
    "batch statistics": convert_batch_stat,
    "frozen": convert_frozen_batchnorm,
    "frozen statistics": lambda model: convert_frozen_batchnorm(model, trainable_affine=True),
    "domains": lambda model: convert_domain_specific(model, 2),
    "cycle": lambda model: convert_cycle(model, 1),
}


def fsdp_of_converted_models(rank: int, world: int) -> Result:
    results = {}
    for kind, convert in CONVERSIONS.items():
        model = sharded(shard_batchnorm(convert(net()), mp_policy=BFLOAT16), BFLOAT16)
        with use_domain(1):
            before = statistics(model)
            trained(model, rank)
            if "frozen" not in kind:
                update_bn_stats(model, share(rank), None)
        after = statistics(model)
        moved = {key for key in after if "running" in key and not torch.equal(after[key], before[key])}
        dtypes = {value.dtype for key, value in after.items() if "running" in key}
        results[kind] = {"moved": len(moved), "dtypes": dtypes, "equal": check_ranks(model).equal}
    return results


def fsdp_with_uneven_data(rank: int, world: int) -> Result:
    model = sharded(net())
    results = {}
    for what, number, options in (
        ("whole loaders", 2 if rank == 1 else 3, {"num_iters": None}),
        ("num_iters", 2 if rank == 1 else 3, {"num_iters": 3}),
        ("tolerance", 30 if rank == 1 else 40, {"num_iters": None, "tolerance": 1e-9}),
        ("no data", 0 if rank == 1 else 3, {"num_iters": None}),
    ):
        model(share(rank)[0]).sum().backward()
        before, start = values_of_whole(model), time.monotonic()
        error = raised(lambda number=number, options=options: update_bn_stats(model, share(rank, number), **options))
        results[what] = {
            "error": error,
            "seconds": time.monotonic() - start,
            "unchanged": values_of_whole(model) == before,
        }
    update_bn_stats(model, share(rank), 3)
    return results | {"after that": check_ranks(model).equal}


def values_of_whole(model: nn.Module) -> dict[str, Any]:
    return {key: getattr(value, "full_tensor", value.clone)().tolist() for key, value in statistics(model).items()}


def shard_units_twice(rank: int, world: int) -> Result:
    model = net()
    shard_batchnorm(model, include="0")
    return {
        "twice": raised(lambda: shard_batchnorm(model)),
        "too late": raised(lambda: shard_batchnorm(sharded(net()))),
        "untouched": type(model[1][1]) is nn.BatchNorm2d,
        "wrong": [
            raised(lambda: shard_batchnorm(net(), mp_policy=torch.bfloat16))[1],
            raised(lambda: shard_batchnorm(net(), mesh=dist.group.WORLD))[1],
            raised(lambda: shard_batchnorm(nn.Sequential(nn.LazyBatchNorm2d())))[1],
        ],
    }


class FailsOnRank1(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("on purpose")
        return x


def fsdp_forward_that_fails(rank: int, world: int) -> Result:
    """Others wait in the gathering of the next block, where only the backend can notice: by its timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=SHORT_TIMEOUT_S))
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    model = net()
    model[0].append(FailsOnRank1())
    sharded(model, mesh=mesh)
    dist.barrier()
    before, start = values_of_whole(model), time.monotonic()
    error = raised(lambda: update_bn_stats(model, share(rank), None, process_group=group))
    return {
        "error": error,
        "seconds": time.monotonic() - start,
        "unchanged": values_of_whole(model) == before,
    }


# ---- Scenarios: DDP -------------------------------------------------------------------------------------------------


def ddp(rank: int, world: int) -> Result:
    results = {}
    for broadcast in (True, False):
        for group in (None, False):
            model = DistributedDataParallel(net(), broadcast_buffers=broadcast)
            update_bn_stats(model, share(rank), None, process_group=group)
            measured = statistics(model)
            model.eval()(share(rank)[0])
            evaluated = statistics(model)
            model.train()(share(rank)[0]).sum().backward()
            results[broadcast, group] = {
                "measured": measured,
                "evaluated": evaluated,
                "trained": statistics(model),
            }
    return results


# ---- Scenarios: some ranks hold a layer -----------------------------------------------------------------------------


def pipeline(rank: int, world: int) -> Result:
    """Ranks 0 and 1 have the first stage, rank 2 the second."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    stage = net()[0] if rank < 2 else nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    before, calls = state_of(stage), []
    forward = lambda model, batch: calls.append(model(batch))  # noqa: E731
    wrong = raised(lambda: update_bn_stats(stage, share(rank), None, forward=forward))
    wrong_merge = raised(lambda: merge_rank_statistics(stage))
    unchanged = state_of(stage) == before
    report = check_ranks(stage)
    own = groups[0 if rank < 2 else 1]
    update_bn_stats(stage, share(rank), None, process_group=own)
    return {
        "wrong": wrong, "wrong_merge": wrong_merge, "unchanged": unchanged, "calls": len(calls),
        "different": {difference.name for difference in report.differences},
        "statistics": statistics(stage), "equal": check_ranks(stage, own).equal,
    }  # fmt: skip


def two_dimensions(rank: int, world: int) -> Result:
    """Data parallel along one dimension of a mesh; along the other, ranks hold other channels of the same layer."""
    mesh = dist.init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))
    model = net()
    update_bn_stats(model, share(rank), None, process_group=mesh["dp"])
    merge_rank_statistics(model, mesh["dp"])
    return {
        "equal": check_ranks(model, mesh["dp"]).equal,
        "alone": check_ranks(model, mesh["tp"]).world_size,
        "error": raised(lambda: check_ranks(model, mesh)),
    }


def statistics_in_pieces(rank: int, world: int) -> Result:
    mesh = dist.init_device_mesh("cpu", (world,))
    model = distribute_module(net(), mesh)
    before = values_of_whole(model)
    return {
        "update": raised(lambda: update_bn_stats(model, share(rank), None)),
        "merge": raised(lambda: merge_rank_statistics(model)),
        "unchanged": values_of_whole(model) == before,
        "equal": check_ranks(model).equal,
    }


# ---- Scenarios: checkpoints -----------------------------------------------------------------------------------------


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(layer.weight)
    return model


def all_of(path: str) -> dict[str, Tensor]:
    """Everything that a distributed checkpoint holds, as whole tensors, as docs/distributed.md does it."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in metadata.items()}
    dcp.load(state, checkpoint_id=path)
    return state


def checkpoints(rank: int, world: int) -> Result:
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    try:
        return {kind: round_trip(convert, kind, folders[0]) for kind, convert in CONVERSIONS.items()}
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folders[0])


def round_trip(convert: Callable[[nn.Module], nn.Module], kind: str, folder: str) -> bool:
    """Whether a plain model comes back bit by bit that has gone into a converted one and a sharded one."""
    plain = with_statistics(net())
    path, saved = f"{folder}/plain for {kind}", f"{folder}/{kind}"
    dcp.save(plain.state_dict(), checkpoint_id=path)
    if kind in ("domains", "cycle"):  # which have other shapes: what the checkpoint has goes into all of them
        whole = convert(net())
        whole.load_state_dict(all_of(path))
        return values_of(convert_to_batchnorm(whole, domain=0)) == values_of(plain)
    converted = sharded(shard_batchnorm(convert(net())))
    state = converted.state_dict()
    dcp.load(state, checkpoint_id=path)
    converted.load_state_dict(state)
    dcp.save(converted.state_dict(), checkpoint_id=saved)
    back = net()
    state = back.state_dict()
    dcp.load(state, checkpoint_id=saved)
    back.load_state_dict(state)
    return values_of(back) == values_of(plain)


SCENARIOS = [
    fsdp, torch_alone_in_bfloat16, fsdp_in_bfloat16, fsdp_of_converted_models, fsdp_with_uneven_data, shard_units_twice,
    ddp, pipeline, two_dimensions, statistics_in_pieces, checkpoints, fsdp_forward_that_fails,
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, WORLD, tmp_path_factory.mktemp("parallel"), limit_s=240.0)


# ---- Tests: FSDP2 ---------------------------------------------------------------------------------------------------


def of_one_process(batches: list[Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    model = net() if model is None else model
    update_bn_stats(model, batches, None)
    return statistics(model)


EVERYTHING = [batch for rank in range(WORLD) for batch in share(rank)]


def test_statistics_of_a_sharded_model_are_those_of_one_process(ranks):
    expected = of_one_process(EVERYTHING)
    for result in ranks.of(fsdp):
        torch.testing.assert_close(result["statistics"], expected, rtol=1e-6, atol=1e-6)
        assert result["report"].world_size == WORLD
        assert values_equal(result["statistics"], ranks.of(fsdp)[0]["statistics"])


def values_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_why_batch_norm_needs_units_of_its_own(ranks):
    """What torch does by itself: see shard_batchnorm."""
    for result in ranks.of(torch_alone_in_bfloat16):
        assert "BFloat16 but found Float" in result["batch norm inside"][1]
        assert "should be the same" in result["float32 put out"][1]


def test_units_of_batch_norm_compute_in_float32_between_others_in_bfloat16(ranks):
    for result in ranks.of(fsdp_in_bfloat16):
        assert result["seen"] == [torch.float32, torch.float32, torch.bfloat16]
        assert result["gradient"] == torch.float32
        assert result["equal"]
        floating = [value for key, value in result["statistics"].items() if "running" in key]
        assert {value.dtype for value in floating} == {torch.float32}


def test_their_statistics_are_those_of_what_comes_in(ranks):
    """Of the convolution's output in bfloat16, to float32's last places."""
    convolution = net()[0][0].bfloat16()
    with torch.no_grad():
        moments = sum(Moments.of(convolution(batch.bfloat16()).float()) for batch in EVERYTHING)
    for result in ranks.of(fsdp_in_bfloat16):
        values = result["statistics"]
        torch.testing.assert_close(values["0.1.running_mean"].double(), moments.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(values["0.1.running_var"].double(), moments.var(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_converted_models_are_sharded(ranks, kind):
    for result in ranks.of(fsdp_of_converted_models):
        outcome = result[kind]
        assert outcome["equal"] or kind in ("ghost", "batch statistics", "domains", "cycle")
        assert outcome["dtypes"] == {torch.float32}
        assert outcome["moved"] == (0 if "frozen" in kind else 4)


@pytest.mark.parametrize("what", ["whole loaders", "num_iters", "tolerance", "no data"])
def test_a_rank_of_a_sharded_model_that_runs_out_of_data_makes_all_raise(ranks, what):
    left = {"tolerance": 30, "no data": 0}.get(what, 2)
    for result in ranks.of(fsdp_with_uneven_data):
        name, text = result[what]["error"]
        assert name == "InsufficientDataError"
        assert f"rank(s) 1 of {WORLD} have no mini-batch after {left}, and others have one" in text
        assert result[what]["unchanged"]
        assert result[what]["seconds"] < HANG_S / 2
        assert result["after that"]


def test_a_forward_that_fails_between_two_units_ends_all_ranks_by_the_timeout(ranks):
    for rank, result in enumerate(ranks.of(fsdp_forward_that_fails)):
        assert result["error"][0] == ("ZeroDivisionError" if rank == 1 else "RuntimeError"), result
        assert result["unchanged"]
        assert result["seconds"] < 3 * SHORT_TIMEOUT_S


def test_gradients_are_still_there_after_a_recalibration(ranks):
    """Parameters that FSDP has gathered for a forward, and not freed, stand in the places of those that have them."""
    for result in ranks.of(fsdp_in_bfloat16):
        assert result["with gradients"] == [name for name, _ in net().named_parameters()]


def test_what_is_sharded_already_is_not_sharded_again(ranks):
    for result in ranks.of(shard_units_twice):
        assert "layer '0.1' (FSDPBatchNorm2d) is sharded already" in result["twice"][1]
        assert "call shard_batchnorm before fully_shard" in result["too late"][1]
        assert result["untouched"]
        for text, part in zip(
            result["wrong"], ("a torch.distributed.fsdp.Mixed", "a DeviceMesh", "is lazy"), strict=True
        ):
            assert part in text


def test_sharding_takes_ranks():
    with pytest.raises(InputError, match=r"torch.distributed is not initialized"):
        shard_batchnorm(net())
    with pytest.raises(InputError, match=r"model must be an nn.Module, not list"):
        shard_batchnorm([])
    with pytest.raises(InputError, match="matches no BatchNorm layer"):
        shard_batchnorm(net(), include="9")


# ---- Tests: DDP and DataParallel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", [True, False])
def test_statistics_of_all_ranks_stay_what_they_are_in_the_next_forward_of_ddp(ranks, broadcast):
    results = [result[broadcast, None] for result in ranks.of(ddp)]
    expected = of_one_process(EVERYTHING)
    for result in results:
        torch.testing.assert_close(result["measured"], expected, rtol=1e-6, atol=1e-6)
        assert values_equal(result["measured"], results[0]["measured"])
        assert values_equal(result["evaluated"], result["measured"])
    assert not values_equal(results[0]["trained"], results[1]["trained"])  # until they train on


@pytest.mark.parametrize("broadcast", [True, False])
def test_statistics_of_one_rank_are_overwritten_where_ddp_broadcasts_buffers(ranks, broadcast):
    """As the page says of process_group=False: the next forward gives all ranks those of rank 0."""
    results = [result[broadcast, False] for result in ranks.of(ddp)]
    assert not values_equal(results[0]["measured"], results[1]["measured"])
    for result in results:
        kept = results[0] if broadcast else result
        assert values_equal(result["evaluated"], kept["measured"])


def test_data_parallel_runs_the_module_itself():
    model = nn.DataParallel(net())
    update_bn_stats(model, EVERYTHING, None)
    assert values_equal(statistics(model), of_one_process(EVERYTHING))
    assert check_ranks(model).num_tensors == check_ranks(net()).num_tensors
    assert merge_rank_statistics(model).world_size == 1


# ---- Tests: some ranks hold a layer ---------------------------------------------------------------------------------


def test_stages_of_a_pipeline_are_refused_before_anything_runs_and_work_as_groups(ranks):
    results = ranks.of(pipeline)
    for result in results:
        for error in (result["wrong"], result["wrong_merge"]):
            assert error[0] == "InputError"
            assert "layer '1' is 6 channels in float32, eps=1e-05 on rank 0, but not there on rank 2" in error[1]
            assert "pass those that hold the same ones as process_group=" in error[1]
        assert result["unchanged"]
        assert result["calls"] == 0
        assert {"0.weight", "1.running_mean", "2.running_mean"} <= result["different"]
        assert result["equal"]
    first = [batch for rank in (0, 1) for batch in share(rank)]
    expected = of_one_process(first, net()[0])
    torch.testing.assert_close(results[0]["statistics"], expected, rtol=1e-6, atol=1e-6)
    assert values_equal(results[0]["statistics"], results[1]["statistics"])


def test_one_dimension_of_a_mesh_is_a_group(ranks):
    for result in ranks.of(two_dimensions):
        assert result["equal"]
        assert result["alone"] == 1
        assert "DeviceMesh of 2 dimensions; pass one of them: mesh['dp']" in result["error"][1]


def test_statistics_that_are_dtensors_are_refused(ranks):
    for result in ranks.of(statistics_in_pieces):
        assert result["update"][0] == result["merge"][0] == "InputError"
        assert "running statistics of layer '0.1' (BatchNorm2d) are DTensors" in result["update"][1]
        assert "are cut into parts (DTensor)" in result["merge"][1]
        assert result["unchanged"]
        assert result["equal"]


# ---- Tests: checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_distributed_checkpoints_load_into_converted_models_and_back(ranks, kind):
    assert [result[kind] for result in ranks.of(checkpoints)] == [True] * WORLD
