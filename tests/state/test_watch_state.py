"""watch_state: what a block of code changes. Here stands the story of the frozen encoder that moved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Outcome, skip_without_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from precisebn import InputError, freeze, pause_tracking, update_bn_stats, watch_state

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(encoder, head)


def images() -> torch.Tensor:
    return 2 + torch.randn(4, 3, 8, 8)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()


def test_an_encoder_that_was_frozen_moved():
    """requires_grad=False does not touch buffers, and eval() is undone by the next train()."""
    model = network()
    encoder = model[0].requires_grad_(False).eval()
    with watch_state(encoder) as watch:
        train(model)
    diff = watch.diff
    assert {row.name for row in diff.changed} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert diff["1.num_batches_tracked"].rows[0].remark == "0 to 3"
    assert diff["1"].rows[2].drift > 0.1
    assert diff.training[""] == (False, True)  # and that is why
    assert "training mode is now True in 4" in str(diff)

    freeze(model, "0")
    with watch_state(encoder) as watch:
        train(model)
    assert watch.diff.is_empty, str(watch.diff)


def test_the_diff_is_there_after_an_exception():
    model = network()
    watch = watch_state(model)

    def step() -> None:
        with watch:
            model(images())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert len(watch.diff.changed) == 3


def test_inside_of_the_block_it_says_what_has_changed_so_far():
    model = network()
    with watch_state(model) as watch:
        assert watch.diff.is_empty
        model(images())
        assert len(watch.diff.changed) == 3
        model(images())
    counts = watch.diff["0.1.num_batches_tracked"].rows[0].remark
    model(images())
    assert watch.diff["0.1.num_batches_tracked"].rows[0].remark == counts == "0 to 2"


def test_before_the_block_there_is_nothing():
    watch = watch_state(network())
    assert "not begun" in repr(watch)
    with pytest.raises(InputError, match=r"with watch_state\(model\) as watch"):
        watch.diff  # noqa: B018
    with watch:
        assert "watching" in repr(watch)
    assert "0 of 9 tensors differ" in repr(watch)


def test_wrong_calls():
    with pytest.raises(InputError, match="takes a module, not dict"):
        watch_state({})
    with pytest.raises(InputError, match="kinds='bn'"):
        watch_state(network(), kinds="bn")


def test_statistics_alone_are_watched_where_asked():
    model = network()
    with watch_state(model, kinds="statistic") as watch:
        train(model, 1)
    assert {row.kind for row in watch.diff.rows} == {"statistic"}
    with watch_state(model, kinds="parameter") as watch, torch.no_grad():
        model(images())
    assert watch.diff.is_empty


def test_modules_that_come_and_go():
    model = network()
    with watch_state(model) as watch:
        model[1][2] = nn.Linear(4, 3)
        model.append(nn.BatchNorm1d(3))
        model[0][0].bias = None
    diff = watch.diff
    assert [row.name for row in diff.only_before] == ["0.0.bias"]
    assert {row.layer for row in diff.only_after} == {"2"}
    assert {row.name for row in diff.other_shape} == {"1.2.weight", "1.2.bias"}
    with watch_state(model) as watch:
        for name in list(model._modules):
            del model._modules[name]
        model.append(nn.PReLU())
    assert len(watch.diff.only_after) == 1  # nothing in common is no mistake here


def test_one_bit_of_any_tensor_shows():
    model = network()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with watch_state(model) as watch:
            tensor.data.view(-1)[-1:].view(torch.uint8)[0] ^= 1
        assert [row.name for row in watch.diff.changed] == [name]


def test_a_compiled_model():
    model = network()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with watch_state(compiled) as watch:
        compiled(images())
    assert len(watch.diff["0.1"].changed) == 3
    with watch_state(compiled) as watch, pause_tracking(compiled):
        compiled(images())
    assert watch.diff.is_empty


def test_a_recalibration_changes_statistics_by_its_own_report():
    model = network()
    with watch_state(model) as watch:
        report = update_bn_stats(model, [images() for _ in range(4)], None)
    mean, var = watch.diff["0.1"].changed[:2]
    assert var.drift == pytest.approx(report["0.1"].var_drift, rel=1e-6)
    # The report divides by the new standard deviation, and the diff by that of before.
    assert mean.unit == "std"
    assert mean.max_drift > 0.5
    assert set(watch.diff.counts()["parameter"]) == {"unchanged"}


# ---- Ranks -----------------------------------------------------------------------------------------------------------


def data_parallel(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = DistributedDataParallel(network())
    with watch_state(model) as watch:
        train(model, 1)
    return {"changed": [row.name for row in watch.diff.changed]}


def sharded(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = network()
    whole = copy.deepcopy(model)
    fully_shard(model)
    torch.manual_seed(1)
    with watch_state(model) as idle:
        pass
    with watch_state(model) as watch:
        train(model, 1)
    from precisebn import diff_state

    other = diff_state(whole, model)
    return {
        "idle": idle.diff.is_empty,
        "changed": sorted({row.layer for row in watch.diff.changed}),
        "remark": sorted({row.remark for row in other.not_compared}),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    skip_without_gloo()
    folder: Path = tmp_path_factory.mktemp("ranks")
    return Outcome([data_parallel, sharded], 2, folder)


def test_under_ddp_names_are_those_of_the_model(two_ranks):
    for result in two_ranks.of(data_parallel):
        assert {"0.1.running_mean", "0.1.num_batches_tracked", "1.2.weight"} <= set(result["changed"])


def test_of_sharded_parameters_each_rank_compares_its_part(two_ranks):
    assert dist.is_available()
    for result in two_ranks.of(sharded):
        assert result["idle"]
        assert {"0.1", "1.2"} <= set(result["changed"])
        assert result["remark"] == ["sharded over ranks in after alone"]
