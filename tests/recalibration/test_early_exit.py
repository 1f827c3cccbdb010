"""early_exit=True: forwards end behind the last layer that is recalibrated, and the statistics are the same."""

from typing import Any

import pytest
import torch
from conftest import state_of
from torch import Tensor, nn

from precisebn import InputError, adapt_bn_stats, convert_cycle, update_bn_stats
from precisebn.nn import CycleBatchNormList, DomainSpecificBN, GhostBN

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    head = nn.Sequential(Counted(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    return nn.Sequential(backbone, head)


def loader(batches: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(batches)]


@pytest.mark.parametrize("modules", ["all", "0", "0.1", ["0.4", "0.1"], "1.*"])
def test_the_statistics_are_those_of_whole_forwards(modules):
    whole, left = network(), network()
    update_bn_stats(whole, loader(), None, modules=modules)
    update_bn_stats(left, loader(), None, modules=modules, early_exit=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), left.buffers(), strict=True))


def test_nothing_behind_the_last_layer_runs_but_in_the_first_mini_batch():
    model = network()
    update_bn_stats(model, loader(6), None, modules="0.*", early_exit=True)
    assert model[1][0].calls == 1
    update_bn_stats(model, loader(6), None, modules="0.*")
    assert model[1][0].calls == 7
    assert not any(module._forward_hooks for module in model.modules())


def test_a_prior_and_a_tolerance_work_with_it():
    whole, left = network(), network()
    for model, early in ((whole, False), (left, True)):
        adapt_bn_stats(model, loader(), 16, modules="0", early_exit=early)
        update_bn_stats(model, loader(40), 40, tolerance=0.3, modules="0.1", early_exit=early)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), left.buffers(), strict=True))
    assert left[1][0].calls < whole[1][0].calls


class Alternating(nn.Module):
    """Calls its layers in another order each time."""

    def __init__(self, *orders: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.orders, self.calls = orders, 0

    def forward(self, x: Tensor) -> Tensor:
        order = self.orders[min(self.calls, len(self.orders) - 1)]
        self.calls += 1
        for index in order:
            x = self.layers[index](x)
        return x


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        (((0, 1, 2), (1, 0, 2)), "called layer 'layers.1' where the first called 'layers.0'"),
        (((0, 1, 2), (0, 1)), "ended before layer 'layers.2'"),
        (((), (0, 1)), "called layer 'layers.0' where the first called 'none'"),
    ],
)
def test_a_model_that_takes_another_way_is_refused_and_left_as_it_was(orders, words):
    model = Alternating(*orders)
    before = state_of(model)
    with pytest.raises(InputError, match=words):
        update_bn_stats(model, loader(), None, early_exit=True)
    assert state_of(model) == before


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_catches_everything_is_refused(again):
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.bn(x)
            except:  # noqa: E722  # what this is about
                return self.bn(x) if again else x

    model = Catching()
    before = state_of(model)
    with pytest.raises(InputError, match="caught what leaves a forward"):
        update_bn_stats(model, loader(), None, early_exit=True)
    assert state_of(model) == before


@pytest.mark.parametrize("last", [nn.BatchNorm2d(3), GhostBN(3, 2), CycleBatchNormList(1, num_features=3)])
def test_a_layer_that_is_run_past_its_hooks_is_refused(last):
    """It was measured on the first mini-batch alone, and nobody was told."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.BatchNorm2d(3), last

        def forward(self, x: Tensor) -> Tensor:
            return self.last.forward(self.first(x))

    model = Direct()
    before = state_of(model)
    with pytest.raises(InputError, match="'last' is run past its __call__"):
        update_bn_stats(model, loader(), None, early_exit=True)
    assert state_of(model) == before
    assert update_bn_stats(model, loader(), None).num_iters == 6


def test_modes_that_a_forward_changes_for_a_while_are_back():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.bn = nn.Dropout(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.dropout.eval()
            x = self.bn(self.dropout(x))
            self.dropout.train()
            return x

    model = Aside()
    update_bn_stats(model, loader(), None, early_exit=True)
    assert model.dropout.training


def test_a_failure_is_not_taken_for_an_exit():
    model = network()
    bad = [*loader(2), torch.full((4, 3, 8, 8), float("nan"))]
    with pytest.raises(ArithmeticError, match=r"mini-batch 2"):
        update_bn_stats(model, bad, None, early_exit=True)


def test_a_cycle_is_gone_through_to_its_end():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return convert_cycle(nn.Sequential(nn.BatchNorm2d(3)), 2)

    def both(model: nn.Module, batch: Tensor) -> Any:
        return [model(batch), model(2 * batch + 1)]

    whole, left = build(), build()
    assert isinstance(whole[0], CycleBatchNormList)
    update_bn_stats(whole, loader(), None, forward=both)
    update_bn_stats(left, loader(), None, forward=both, early_exit=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), left.buffers(), strict=True))


def test_modules_with_several_populations_work():
    whole, left = (nn.Sequential(DomainSpecificBN(3, 2), Counted()) for _ in range(2))

    def by_domain(model: nn.Module, batch: Tensor) -> Any:
        return model[1](model[0](batch, domain=torch.tensor([0, 0, 1, 1])))

    update_bn_stats(whole, loader(), None, forward=by_domain)
    update_bn_stats(left, loader(), None, forward=by_domain, early_exit=True)
    assert left[1].calls == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), left.buffers(), strict=True))
