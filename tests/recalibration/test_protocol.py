"""A module that declares its populations is recalibrated, reported, merged over ranks, and nobody knows its class."""

import copy
from collections.abc import Sequence

import pytest
import torch
from conftest import state_of
from processes import Outcome, Result, skip_without_gloo
from torch import Tensor, nn

from precisebn import CycleError, Moments, NonFiniteStatisticsError, update_bn_stats
from precisebn.nn.population import Recordable, Recorder, RunningStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


class TwoHalves(Recordable):
    """Normalizes the first and the second half of the channels by statistics of their own, kept under other names.

    It has to be called twice in a mini-batch, which is a state of its own.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-3
        for k in range(2):
            self.register_buffer(f"mean{k}", torch.zeros(channels // 2, dtype=torch.float64))
            self.register_buffer(f"var{k}", torch.ones(channels // 2, dtype=torch.float64))
        self.calls = 0

    def populations(self) -> Sequence[RunningStatistics]:
        return [
            RunningStatistics(getattr(self, f"mean{k}"), getattr(self, f"var{k}"), None, self.eps, k) for k in range(2)
        ]

    def start_recording(self, recorder: Recorder) -> None:
        super().start_recording(recorder)
        self.calls = 0

    def end_batch(self, name: str) -> None:
        if self.calls % 2:
            raise CycleError(f"layer {name!r} was called once")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        parts = []
        for k, half in enumerate(x.chunk(2, 1)):
            mean, var = getattr(self, f"mean{k}"), getattr(self, f"var{k}")
            if self.recorder is not None:
                moments = Moments.of(half)
                self.recorder(moments, k)
                mean, var = moments.mean, moments.m2 / moments.count
            parts.append((half - mean) / (var + self.eps).sqrt())
        return torch.cat(parts, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bn = TwoHalves(4), nn.BatchNorm1d(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.norm(x) + self.norm(3.0 * x + 1.0))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (8, 3, 5, 6)]


def test_it_is_recalibrated_and_reported():
    net = Net()
    report = update_bn_stats(net, batches(), None)
    seen = torch.cat([part for x in batches() for part in (x, 3.0 * x + 1.0)])
    for k, half in enumerate(seen.chunk(2, 1)):
        one = net.norm.populations()[k]
        torch.testing.assert_close(one.mean, half.mean(0))
        torch.testing.assert_close(one.var, half.var(0, unbiased=False))
    assert [(layer.name, layer.count) for layer in report.layers] == [("norm[0]", 44), ("norm[1]", 44), ("bn", 22)]
    assert net.norm.recorder is None


def test_it_is_chosen_by_name_and_by_mode():
    net = Net()
    net.norm.eval()
    assert update_bn_stats(net, batches(), None).skipped == {"norm": "eval mode"}
    assert [one.name for one in update_bn_stats(net, batches(), None, modules="norm").layers] == ["norm[0]", "norm[1]"]


def test_what_it_left_half_done_is_an_error_and_nothing_is_changed():
    net = Net()
    before = state_of(net)
    with pytest.raises(CycleError, match="layer 'norm' was called once"):
        update_bn_stats(net, batches(), None, forward=lambda net, x: net.norm(x))
    assert state_of(net) == before


class Follows(TwoHalves):
    """Its statistics follow those of mini-batches in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.recorder is None:
            self.mean0.add_(1.0)
            self.var1.mul_(2.0)
        return super().forward(x)


def test_its_statistics_are_as_before_where_it_is_not_chosen():
    net = Net()
    net.norm = Follows(4)
    before = state_of(net.norm)
    report = update_bn_stats(net, batches(), None, exclude="norm")
    assert [layer.name for layer in report.layers] == ["bn"]
    assert set(before.differences(state_of(net.norm))) == {":calls"}  # which a forward has done, as any does


def test_nan_is_laid_to_it():
    net = Net()
    before = state_of(net)
    with pytest.raises(NonFiniteStatisticsError, match=r"layer 'norm\[0\]' \(TwoHalves\)"):
        update_bn_stats(net, [torch.full((4, 4), torch.nan, dtype=torch.float64)], 1)
    assert state_of(net) == before


class Own(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Halves(nn.Module):
    """Mini-batches of more than four samples go through one subclass with a forward of its own, others through two."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.always = Net(), Own(4, dtype=torch.float64)
        self.large = Own(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> None:
        self.always(self.net(x))
        if len(x) > 4:
            self.large(x)


def _rank(rank: int, world: int) -> Result:
    model = Halves()
    own = [b for b in batches() if (len(b) > 4) == (rank == 0)]  # what is large is on rank 0 alone
    report = update_bn_stats(model, own, None)
    return {"state": model.state_dict(), "skipped": list(report.skipped)}


def test_ranks_merge_also_what_mini_batches_reach_on_one_rank_only(tmp_path):
    skip_without_gloo()
    ranks = Outcome([_rank], 2, tmp_path).of(_rank)
    assert [result["skipped"] for result in ranks] == [[], []]
    first, second = (result["state"] for result in ranks)
    one = Halves()
    update_bn_stats(one, batches(), None)
    for key, value in one.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-12, atol=1e-12)
    assert not torch.equal(first["large.running_mean"], copy.deepcopy(Halves()).large.running_mean)
