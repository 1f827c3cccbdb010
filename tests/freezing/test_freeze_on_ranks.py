"""freeze under DistributedDataParallel and FSDP2: two real processes train, and what is frozen keeps its bits."""

import processes
import pytest
import torch
import torch.distributed as dist
from processes import Outcome, Result, Scenario, raised
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from precisebn import freeze, frozen, trainable_parameters, unfreeze

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(backbone, head)


def train(model: nn.Module, rank: int, parameters: list[Tensor] | None = None, steps: int = 3) -> None:
    """As training loops do, with data of its own on each rank."""
    generator = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(parameters or list(model.parameters()), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(2 + 3 * torch.randn(4, 3, 8, 8, generator=generator)).square().sum().backward()
        optimizer.step()
        model.eval()
        model(torch.randn(4, 3, 8, 8, generator=generator))


def values(model: nn.Module) -> dict[str, Tensor]:
    """Of the whole model on every rank, under the names that it has without wrappers."""
    whole = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        whole[name.removeprefix("module.")] = value.clone()
    return whole


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return sorted(name for name, value in values(model).items() if not torch.equal(value, before[name]))


def shard(model: nn.Module) -> nn.Module:
    """Layers of BatchNorm as units of their own, and the parts around them."""
    for part in model:
        fully_shard(part[1])
        fully_shard(part)
    fully_shard(model)
    return model


def data_parallel(rank: int, world: int) -> Result:
    results: Result = {}
    for name in ("not frozen", "frozen", "statistics alone, frozen behind"):
        model = net()
        if name == "frozen":
            freeze(model, "0")
        wrapped = DistributedDataParallel(model)
        if name == "statistics alone, frozen behind":
            freeze(wrapped, "0", affine=True)
        before = values(wrapped)
        train(wrapped, rank, trainable_parameters(wrapped))
        results[name] = moved(wrapped, before)
    return results


def fully_sharded(rank: int, world: int) -> Result:
    results: Result = {}
    for name in ("not frozen", "frozen before", "frozen behind", "statistics alone", "in a block"):
        model = net()
        if name == "frozen before":
            freeze(model, "0")
        shard(model)
        if name == "frozen behind":
            freeze(model, "0")
        if name == "statistics alone":
            freeze(model, "0", affine=True)
        before = values(model)
        if name == "in a block":
            with frozen(model, "0"):
                train(model, rank, trainable_parameters(model))
            results["requires_grad behind the block"] = all(p.requires_grad for p in model.parameters())
        else:
            train(model, rank, trainable_parameters(model))
        results[name] = moved(model, before)
    return results


def thawed_while_sharded(rank: int, world: int) -> Result:
    """What is thawed trains again, by an optimizer that has it; a checkpoint goes into a plain frozen model."""
    model = shard(freeze(net(), "0"))
    unfreeze(model)
    before = values(model)
    train(model, rank)
    checkpoint = values(model)
    plain = freeze(net(), "0")
    plain.load_state_dict(checkpoint)
    same = all(torch.equal(value, checkpoint[key]) for key, value in plain.state_dict().items())
    keys = list(get_model_state_dict(model))
    return {"moved": moved(model, before), "loads": same, "keys": keys == list(plain.state_dict())}


def freezing_in_data_parallel_is_refused(rank: int, world: int) -> Result:
    model = DistributedDataParallel(net())
    error = raised(lambda: freeze(model, "0"))
    train(model, rank)
    dist.barrier()
    return {"error": error}


SCENARIOS: list[Scenario] = [data_parallel, fully_sharded, thawed_while_sharded, freezing_in_data_parallel_is_refused]
EVERYTHING = sorted(net().state_dict())
HEAD = [name for name in EVERYTHING if name.startswith("1.")]
BUT_STATISTICS = [name for name in EVERYTHING if not (name.startswith("0.") and name.endswith(STATISTICS))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, 2, tmp_path_factory.mktemp("freeze"))


def test_under_data_parallel_what_is_frozen_keeps_its_bits_and_all_else_moves(ranks):
    for result in ranks.of(data_parallel):
        assert result == {
            "not frozen": EVERYTHING, "frozen": HEAD, "statistics alone, frozen behind": BUT_STATISTICS,
        }  # fmt: skip


def test_under_fsdp_too_whether_it_is_frozen_before_or_behind_the_sharding(ranks):
    for result in ranks.of(fully_sharded):
        assert result == {
            "not frozen": EVERYTHING, "frozen before": HEAD, "frozen behind": HEAD, "statistics alone": BUT_STATISTICS,
            "in a block": HEAD, "requires_grad behind the block": True,
        }  # fmt: skip


def test_a_sharded_model_is_thawed_and_its_checkpoint_loads_into_a_frozen_one(ranks):
    for result in ranks.of(thawed_while_sharded):
        assert result == {"moved": EVERYTHING, "loads": True, "keys": True}


def test_parameters_are_not_frozen_behind_data_parallel_s_back(ranks):
    for result in ranks.of(freezing_in_data_parallel_is_refused):
        assert result["error"][0] == "InputError"
        assert "freeze the model first, then wrap it" in result["error"][1]
