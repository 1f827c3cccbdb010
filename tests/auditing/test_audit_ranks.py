"""Checks of ranks: in two real processes, and in one."""

from pathlib import Path

import pytest
import torch
from processes import Outcome, Result
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from precisebn import check_copy, convert_sync_batchnorm, freeze
from precisebn.auditing.run import audit


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def severities(some: nn.Module, code: str = "PBN551", samples: int | None = None) -> list[str]:
    batch = None if samples is None else torch.randn(samples, 3, 8, 8)
    return [one.severity for one in audit(some, batch, only=code)[code]]


def of_two_ranks(rank: int, world: int) -> Result:
    ddp = DistributedDataParallel(model())
    [finding] = audit(ddp, torch.randn(32, 3, 8, 8), only="PBN551")
    return {
        "plain": severities(model()),
        "few samples": severities(model(), samples=4),
        "many samples": severities(model(), samples=32),
        "wrapped": (finding.layers, finding.what),
        "frozen": severities(freeze(model())),
        "in eval mode": severities(model().eval()),
        "synchronized": severities(convert_sync_batchnorm(model())),
        "synchronized by ours": severities(convert_sync_batchnorm(model(), implementation="precisebn")),
        "instance norm": severities(nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True))),
        "synchronized, and nobody there": severities(convert_sync_batchnorm(model()), "PBN552"),
    }


def of_a_sharded_model(rank: int, world: int) -> Result:
    some, other = model(), model()
    fully_shard(some, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1, momentum=0.9)
    report = audit(some, optimizer=optimizer, other=other, num_steps=1000)
    twin = model()
    fully_shard(twin, mesh=init_device_mesh("cpu", (world,)))
    twin.load_state_dict(some.state_dict())
    same = [one.code for one in check_copy(some, twin)]
    with torch.no_grad():
        twin[0].weight.add_(1)
    return {
        "found": [(one.code, one.severity) for one in report],
        "same": same,
        "other": [(one.code, one.layers) for one in check_copy(some, twin)],
    }


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return Outcome([of_two_ranks, of_a_sharded_model], 2, folder)


def test_plain_batch_norm_on_two_ranks(outcome):
    result = outcome.of_rank(of_two_ranks, 0)
    assert (result["plain"], result["few samples"], result["many samples"]) == (["note"], ["warning"], ["note"])
    assert result["wrapped"] == (
        ("1",),
        "Each of 2 ranks normalizes by its own mini-batch of 32 samples and tracks its own statistics; rank 0's are "
        "broadcast to all.",
    )


def test_on_two_ranks_and_nothing_to_say(outcome):
    result = outcome.of_rank(of_two_ranks, 1)
    fine = ("frozen", "in eval mode", "synchronized", "synchronized by ours", "instance norm")
    fine += ("synchronized, and nobody there",)
    assert [name for name in fine if result[name]] == []


def test_a_sharded_model(outcome):
    result = outcome.of_rank(of_a_sharded_model, 0)
    assert result["found"] == [("PBN203", "note"), ("PBN551", "note"), ("PBN601", "note")]
    assert result["same"] == []
    assert result["other"] == [("PBN511", ("0.weight",))]


def test_synchronized_batch_norm_on_one_rank():
    assert severities(convert_sync_batchnorm(model()), "PBN552") == ["note"]
    assert severities(convert_sync_batchnorm(model(), implementation="precisebn"), "PBN552") == ["note"]
    assert severities(model(), "PBN552") == []


def test_plain_batch_norm_on_one_rank():
    assert severities(model(), samples=1) == []
