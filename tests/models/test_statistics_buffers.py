"""Which buffers are running statistics: one answer for all who ask."""

import pytest
import torch
from torch import Tensor, nn

from precisebn import diff_state, snapshot, update_bn_stats
from precisebn.models.snapshot import Snapshot
from precisebn.models.statistics_buffers import Statistic, statistics_buffers, statistics_of
from precisebn.nn import CycleBatchNormList, DomainSpecificBN, FrozenBatchNorm2d
from precisebn.nn.population import Recordable, RunningStatistics
from precisebn.ranks.facts import Facts
from precisebn.statistics.moments import Moments

ALL = ["running_mean", "running_var", "num_batches_tracked"]


class Apart(Recordable):
    """Keeps its two populations under names of its own, beside a buffer that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(2, 3))
        self.register_buffer("spreads", torch.ones(2, 3))
        self.register_buffer("codebook", torch.ones(3))

    def populations(self) -> list[RunningStatistics]:
        rows = enumerate(zip(self.centers, self.spreads, strict=True))
        return [RunningStatistics(mean, var, None, 1e-3, index) for index, (mean, var) in rows]

    def forward(self, x: Tensor) -> Tensor:
        if self.recorder is not None:
            self.recorder(Moments.of(x), 0)
        return x


class Together(Recordable):
    """Keeps mean and variance in one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("both", torch.zeros(2, 3))

    def populations(self) -> list[RunningStatistics]:
        return [RunningStatistics(self.both[0], self.both[1], None, 1e-3)]


class OfAnotherLibrary(nn.Module):
    """torchvision's and detectron2's frozen layers are such: the names, and none of torch's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))
        self.register_buffer("weight", torch.ones(3))


class Lone(nn.Module):
    """Centers by a running mean, and has no variance."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))


CASES = {
    "BatchNorm": (nn.BatchNorm2d(3), ALL),
    "InstanceNorm": (nn.InstanceNorm2d(3, track_running_stats=True), ALL),
    "without": (nn.BatchNorm2d(3, track_running_stats=False), []),
    "no count": (FrozenBatchNorm2d(3), None),
    "lazy": (nn.LazyBatchNorm2d(), ALL),
    "domains": (DomainSpecificBN(3, 2), ALL),
    "cycle": (CycleBatchNormList(2, num_features=3), []),
    "apart": (Apart(), ["centers", "spreads"]),
    "together": (Together(), ["both"]),
    "another library": (OfAnotherLibrary(), ALL[:2]),
    "lone": (Lone(), ALL[:1]),
    "no norm": (nn.Conv2d(3, 3, 1), []),
    "jit": (torch.jit.script(nn.BatchNorm2d(3)), ALL),
}


@pytest.mark.parametrize("name", CASES)
def test_all_who_ask_get_the_same_buffers(name):
    module, expected = CASES[name]
    names = statistics_buffers(module)
    assert expected is None or names == expected
    assert list(statistics_of(module)) == names
    if name not in ("lazy", "cycle"):  # without values, and those of children
        assert [place for _, place, _ in Snapshot(module)._statistics] == names
    assert {key for kind, key in Facts(module).by_key if kind == "statistic"} == _qualified(module, names)
    kept = snapshot(module, kinds="statistic").state.entries
    assert set(kept) == _qualified(module, names)


def _qualified(module: nn.Module, names: list[str]) -> set[str]:
    """With those of its children, of which only a cycle has some."""
    return set(names) | {f"{at}.{own}" for at, child in module.named_children() for own in statistics_buffers(child)}


def test_what_each_buffer_is_to_its_layer():
    assert statistics_of(nn.BatchNorm2d(3, eps=1e-3)) == {
        "running_mean": Statistic("mean", "running_var", 1e-3),
        "running_var": Statistic("var", "running_var", 1e-3),
        "num_batches_tracked": Statistic("", "", 1e-3),
    }
    assert statistics_of(Apart()) == {
        "centers": Statistic("mean", "spreads", 1e-3),
        "spreads": Statistic("var", "spreads", 1e-3),
    }
    assert statistics_of(Together())["both"].role == statistics_of(Lone())["running_mean"].role == ""


def test_differences_of_declared_statistics_are_told_in_standard_deviations_everywhere():
    model = nn.Sequential(Apart())
    before = snapshot(model)
    with torch.no_grad():
        model[0].spreads.fill_(4 - 1e-3)
        model[0].centers.fill_(3.0)
    facts = Facts(model)
    assert facts.scales["0.centers"].var is model[0].spreads
    assert facts.scales["0.centers"].eps == 1e-3
    assert {row.name for row in diff_state(before, model).changed} == {"0.centers", "0.spreads"}


def test_a_recalibration_leaves_other_statistics_as_they_were_and_other_buffers_as_the_forward_made_them():
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.lone, self.bn = Apart(), Lone(), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.own.codebook.add_(1)
            self.lone.running_mean.add_(1)
            return self.bn(self.own(x))

    model = Moving()
    update_bn_stats(model, [torch.randn(8, 3)], 1, modules="bn")
    assert model.own.codebook.tolist() == [2.0] * 3
    assert model.lone.running_mean.tolist() == [0.0] * 3
