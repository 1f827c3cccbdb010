"""The operator that normalizes and tracks in one call, the way of eager tensors, under all that watches tracking."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precisebn import accumulate_statistics, pause_tracking, update_bn_stats
from precisebn.nn import BatchStatBN, DomainSpecificBN, GhostBN

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchStatBN": lambda: BatchStatBN(3),
    "GhostBN": lambda: GhostBN(3, 8),  # one ghost of a small mini-batch
    "DomainSpecificBN": lambda: OfDomain(DomainSpecificBN(3, 2)),
    "DomainSpecificBN, shared": lambda: OfDomain(DomainSpecificBN(3, 2, population="shared", affine="shared")),
    "momentum=None": lambda: BatchStatBN(3, momentum=None),
}


class OfDomain(nn.Module):
    def __init__(self, norm: DomainSpecificBN) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, domain=1)


class Calls:
    """Lets tensors take the one way or the other, and counts which take the one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from precisebn.nn import population

        self.at_once, self.number = False, 0
        real = population.batch_norm_and_track

        def counted(*args, **kwargs) -> Tensor:
            self.number += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(population, "tracks_in_one_call", lambda: self.at_once)
        monkeypatch.setattr(population, "batch_norm_and_track", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def _plain(model: nn.Module, xs: list[Tensor]) -> None:
    for x in xs:
        model(x).square().sum().backward()


def _accumulated(model: nn.Module, xs: list[Tensor]) -> None:
    with accumulate_statistics(model):
        _plain(model, xs)


def _paused(model: nn.Module, xs: list[Tensor]) -> None:
    _plain(model, xs[:1])
    with pause_tracking(model):
        _plain(model, xs[1:])


def _repeated(model: nn.Module, xs: list[Tensor], use_reentrant: bool) -> None:
    for x in xs:
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()


def _accumulated_and_repeated(model: nn.Module, xs: list[Tensor]) -> None:
    with accumulate_statistics(model):
        _repeated(model, xs, use_reentrant=False)


def _recalibrated(model: nn.Module, xs: list[Tensor]) -> None:
    update_bn_stats(model, [x.detach() for x in xs], None)
    _plain(model, xs)


# What is done with a model, and how many of its three forwards take the one call.
DONE: dict[str, tuple[Callable[[nn.Module, list[Tensor]], None], int]] = {
    "trained": (_plain, 3),
    "accumulate_statistics": (_accumulated, 0),
    "pause_tracking": (_paused, 1),
    "checkpoint": (lambda model, xs: _repeated(model, xs, False), 3),
    "checkpoint, reentrant": (lambda model, xs: _repeated(model, xs, True), 3),
    "checkpoint in accumulate_statistics": (_accumulated_and_repeated, 0),
    "update_bn_stats": (_recalibrated, 3),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("done", DONE)
def test_statistics_outputs_and_gradients_are_those_of_two_calls(done, layer, calls):
    do, number = DONE[done]
    torch.manual_seed(0)
    xs = [2 * torch.randn(6, 3, 4) + 1 for _ in range(3)]
    one = LAYERS[layer]()
    two = copy.deepcopy(one)
    inputs = {}
    for model, at_once in ((one, True), (two, False)):
        calls.at_once, calls.number = at_once, 0
        inputs[at_once] = [x.clone().requires_grad_() for x in xs]
        do(model, inputs[at_once])
        assert calls.number == (number if at_once else 0)
    for (name, a), b in zip(one.named_buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(inputs[True], inputs[False], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
