"""accumulate_statistics on several ranks: DistributedDataParallel, and layers that are synchronized; real processes."""

import processes
import pytest
import torch
from conftest import values_of
from processes import Outcome, Result, Scenario, raised
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precisebn import accumulate_statistics
from precisebn.models.families import class_family
from precisebn.nn import SyncBN


class SyncBatchNorm(nn.SyncBatchNorm):
    """Stands for torch's on a machine without GPUs, where that refuses to run: known by the name of its forward."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, training=True)

    forward.__module__, forward.__qualname__ = "torch.nn.modules.batchnorm", "SyncBatchNorm.forward"


def batches(rank: int) -> list[Tensor]:
    """Of another location, scale, size and number on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return [rank + (k + 1) * torch.randn(2 + rank + k, 3, 4, 4, generator=generator) for k in range(2 + rank)]


def net(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm(3))


def data_parallel(rank: int, world: int) -> Result:
    """Two optimizer steps, gradients synchronized in the last micro-batch of each."""
    results = {}
    for broadcast in (False, True):
        model = DistributedDataParallel(net(), broadcast_buffers=broadcast)
        for _ in range(2):
            with accumulate_statistics(model):
                first, second = batches(rank)[:2]
                with model.no_sync():
                    model(first).square().sum().backward()
                model(second).square().sum().backward()
        results[broadcast] = model.module[1].state_dict()
    return results


def synchronized(rank: int, world: int) -> Result:
    model = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3))
    with accumulate_statistics(model):
        for x in batches(rank):
            model[0](x)
        if rank == 0:
            model[1](batches(0)[0])  # which the other rank does not reach
    return model.state_dict()


def synchronized_by_ours(rank: int, world: int) -> Result:
    """SyncBN hands over Moments of all ranks, which are not to be merged again."""
    model = nn.Sequential(SyncBN(3))
    with accumulate_statistics(model):
        for x in batches(rank)[:2]:
            model(x)
    return model[0].state_dict()


def a_rank_raises(rank: int, world: int) -> Result:
    model = nn.Sequential(SyncBatchNorm(3))

    def block(model: nn.Module) -> None:
        with accumulate_statistics(model):
            model(batches(rank)[0])
            if rank == 1:
                raise ZeroDivisionError

    return processes.unchanged(block, lambda: model)


def after_that(rank: int, world: int) -> Result:
    return synchronized(rank, world)


def not_all_layers_on_all_ranks(rank: int, world: int) -> Result:
    model = nn.Sequential(*[SyncBatchNorm(3) for _ in range(1 + rank)])

    def block() -> None:
        with accumulate_statistics(model):
            model(batches(rank)[0])

    before = values_of(model)
    return {"error": raised(block), "unchanged": values_of(model) == before}


SCENARIOS: list[Scenario] = [
    data_parallel, synchronized, synchronized_by_ours, a_rank_raises, after_that, not_all_layers_on_all_ranks,
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    return Outcome(SCENARIOS, 2, tmp_path_factory.mktemp("accumulate"))


def test_under_data_parallel_each_rank_accumulates_its_own_as_it_tracks_its_own_without(ranks):
    for rank in range(2):
        for broadcast in (False, True):
            reference = net()
            reference(torch.cat(batches(0 if broadcast else rank)[:2]))  # rank 0's buffers come with the next forward
            reference(torch.cat(batches(rank)[:2]))
            result = ranks.of_rank(data_parallel, rank)[broadcast]
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                torch.testing.assert_close(result[name], reference[1].state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scenario", [synchronized, after_that], ids=lambda scenario: scenario.__name__)
def test_a_synchronized_layer_tracks_the_micro_batches_of_all_ranks(ranks, scenario):
    assert class_family(SyncBatchNorm(3)).synchronized
    references = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    references[0](torch.cat([*batches(0), *batches(1)]))
    references[1](batches(0)[0])
    one, other = ranks.of(scenario)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    for index, reference in enumerate(references):
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(one[f"{index}.{name}"], value, rtol=1e-6, atol=1e-6)


def test_a_sync_bn_of_ours_tracks_the_micro_batches_of_all_ranks_once(ranks):
    reference = nn.BatchNorm2d(3)
    reference(torch.cat([*batches(0)[:2], *batches(1)[:2]]))
    for result in ranks.of(synchronized_by_ours):
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-6)


def test_a_rank_that_raises_inside_the_block_keeps_no_other_waiting(ranks):
    waited, failed = ranks.of(a_rank_raises)
    assert failed["error"][0] == "ZeroDivisionError"
    assert waited["error"][0] == "RankFailedError"
    assert "ZeroDivisionError" in waited["error"][1]
    assert waited["seconds"] < processes.HANG_S / 2
    assert waited["unchanged"]
    assert failed["unchanged"]


def test_ranks_with_different_layers_all_raise(ranks):
    for result in ranks.of(not_all_layers_on_all_ranks):
        assert result["error"][0] == "InputError"
        assert "different sizes" in result["error"][1]
        assert result["unchanged"]
