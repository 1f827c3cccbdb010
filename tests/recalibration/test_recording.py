"""Recording: the model computes what it computes in training, and afterwards it is what it was before."""

import copy

import pytest
import torch
from conftest import state_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from precisebn import InputError, NonFiniteStatisticsError, adapt_bn_stats, update_bn_stats
from precisebn.nn import GhostBN
from precisebn.recalibration.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")


class OwnForward(nn.BatchNorm2d):
    """A subclass with its own forward, as frameworks have them: it scales, normalizes and activates."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input + 1.0).relu()


class ChannelsAtTheEnd(nn.BatchNorm1d):
    """Takes (N, L, C), as token models do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class ByHand(nn.BatchNorm2d):
    """Computes everything itself, with another argument beside the input."""

    def forward(self, input: Tensor, offset: float = 0.0) -> Tensor:
        if not self.training:
            return super().forward(input + offset)
        values = (input + offset).transpose(0, 1).flatten(1)
        self.running_mean.lerp_(values.mean(1), self.momentum)
        self.running_var.lerp_(values.var(1), self.momentum)
        return nn.functional.batch_norm(input + offset, None, None, self.weight, self.bias, True, 0.0, self.eps)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(3.0 * self.bn(x).relu())


LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(6),
    "affine=False": lambda: nn.BatchNorm2d(6, affine=False),
    "momentum=None": lambda: nn.BatchNorm2d(6, momentum=None),
    "track_running_stats=False": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "large eps": lambda: nn.BatchNorm2d(6, eps=0.5),
    "own forward": lambda: OwnForward(6),
    "own forward, momentum=None": lambda: OwnForward(6, momentum=None),
    "own forward, by hand": lambda: ByHand(6),
    "by keyword": ByKeyword,
    "twice": Twice,
    "LazyBatchNorm2d": nn.LazyBatchNorm2d,
    "parametrized weight": lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(6), dim=None),
}


def net(kind: str) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), LAYERS[kind](), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not kind.startswith(("Lazy", "param")):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_while_recording_is_that_of_training(kind, memory_format):
    model = net(kind)
    model.eval()(torch.randn(2, 3, 9, 9))  # lazy layers get their size
    model.train().to(memory_format=memory_format)
    in_training = copy.deepcopy(model)
    batches = [(1 + 2 * torch.randn(n, 3, 9, 9)).to(memory_format=memory_format) for n in (8, 5)]
    outputs = []
    update_bn_stats(model, batches, 2, forward=lambda m, x: outputs.append(m(x)))
    for batch, output in zip(batches, outputs, strict=True):
        expected = in_training(batch)
        # Two normalizations of values of order 1, a convolution over 54 of them between: some tens of ulps.
        torch.testing.assert_close(output, expected, rtol=0, atol=256 * torch.finfo(torch.float32).eps)
        assert output.stride() == expected.stride()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_subclass_with_its_own_forward_gets_the_statistics_of_what_it_normalizes(momentum):
    """Neither x itself, nor always of the shape of x: fvcore sees it right too, as the layer itself does."""
    scaled, tokens, by_hand = OwnForward(3, momentum=momentum), ChannelsAtTheEnd(3), ByHand(3)
    batches = [torch.randn(n, 3, 5, 7) for n in (8, 3, 6)]
    update_bn_stats(scaled, batches, 3)
    update_bn_stats(by_hand, batches, 3, forward=lambda model, x: model(x, offset=4.0))
    report = update_bn_stats(tokens, [batch.flatten(2).transpose(1, 2) for batch in batches], 3)
    values = torch.cat([batch.flatten(2) for batch in batches]).double()
    mean, var = values.mean((0, 2)), values.var((0, 2), unbiased=False)
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}  # float32 rounding of three mini-batches' statistics
    torch.testing.assert_close(scaled.running_mean, 2 * mean + 1, **close)
    torch.testing.assert_close(scaled.running_var, 4 * var, **close)
    torch.testing.assert_close(by_hand.running_mean, mean + 4, **close)
    torch.testing.assert_close(by_hand.running_var, var, **close)
    torch.testing.assert_close(tokens.running_mean, mean, **close)
    torch.testing.assert_close(tokens.running_var, var, **close)
    assert report.layers[0].count == values.numel() // 3
    assert (scaled.momentum, scaled.num_batches_tracked, scaled.training) == (momentum, 3, True)


def test_a_subclass_with_its_own_forward_is_cured_of_nan_and_reports_nan():
    bn = OwnForward(3)
    bn.running_mean.fill_(torch.nan)
    update_bn_stats(bn, [torch.randn(4, 3, 5, 5)], 1)
    assert bn.running_mean.isfinite().all()
    before = state_of(bn)
    with pytest.raises(NonFiniteStatisticsError, match="mini-batch 1"):
        update_bn_stats(bn, [torch.randn(4, 3, 5, 5), torch.full((4, 3, 5, 5), torch.inf)], 2)
    assert state_of(bn) == before


def test_lazy_layers_get_their_size_from_the_first_mini_batch_which_is_not_lost():
    model = nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(5, track_running_stats=True))
    instance_mean = model[2].running_mean
    batches = (torch.randn(4, 3, 6, 6) for _ in range(3))
    report = update_bn_stats(model, batches, 3)
    assert type(model[1]) is nn.BatchNorm2d
    assert (report.num_iters, report.layers[0].num_channels, report.layers[0].count) == (3, 5, 3 * 4 * 16)
    assert model[1].num_batches_tracked == 3
    assert torch.equal(instance_mean, torch.zeros(5))


def test_lazy_layers_that_were_not_chosen_stay_out_of_it():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    report = update_bn_stats(model, [torch.randn(8, 3)] * 2, 2, modules="0")
    assert [layer.name for layer in report.layers] == ["0"]
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert model[1].num_batches_tracked == 0


def test_lazy_layers_that_are_never_reached_stay_lazy_and_are_listed():
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.LazyBatchNorm1d(), nn.LazyInstanceNorm1d(track_running_stats=True)])
    report = update_bn_stats(model, [torch.randn(8, 3)], 1, forward=lambda m, x: m[0](x))
    assert "lazy" in report.skipped["1"]
    assert isinstance(model[1], nn.LazyBatchNorm1d)


def test_sync_batchnorm_on_the_cpu_in_one_process():
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    update_bn_stats(plain, batches, 3)
    update_bn_stats(synced, batches, 3)
    assert isinstance(synced[1], nn.SyncBatchNorm)
    for key, value in plain[1].state_dict().items():
        assert torch.equal(synced[1].state_dict()[key], value)


def test_values_that_a_users_hook_changes_are_recorded_as_changed():
    bn = nn.BatchNorm1d(2)
    bn.register_forward_pre_hook(lambda module, args: (args[0] + 10.0,))
    batch = torch.randn(64, 2)
    update_bn_stats(bn, [batch], 1)
    torch.testing.assert_close(bn.running_mean, batch.mean(0) + 10.0)


def test_an_empty_mini_batch_counts_for_nothing():
    bn, twin = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    batches = [torch.randn(8, 2), torch.empty(0, 2), torch.randn(8, 2)]
    report = update_bn_stats(bn, batches, 3)
    update_bn_stats(twin, batches[::2], 2)
    assert torch.equal(bn.running_mean, twin.running_mean)
    assert torch.equal(bn.running_var, twin.running_var)
    assert report.layers[0].num_batches == 2


def test_no_gradients_are_kept():
    model, outputs = net("BatchNorm2d"), []
    update_bn_stats(model, [torch.randn(2, 3, 8, 8)], 1, forward=lambda m, x: outputs.append(m(x)))
    assert not outputs[0].requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_inside_only_the_recorded_layers_differ_and_outside_nothing_does():
    model = net("twice")
    before = state_of(model)
    with Recording(model, {"1.bn": model[1].bn}, "population") as recording:
        assert torch.is_grad_enabled() is False
        inside = before.differences(state_of(model))
        scratch = {"1.bn.running_mean", "1.bn.running_var"}
        assert set(inside) == {"1.bn:forward", "1.bn:__deepcopy__", "1.bn:__reduce_ex__"} | scratch
        model(torch.randn(2, 3, 8, 8))
        recording.end_batch()
    assert state_of(model) == before
    assert recording.estimators[0].moments(0).count == 2 * 2 * 36


def test_nothing_is_touched_if_a_layer_cannot_be_recorded():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    before = state_of(model)
    with pytest.raises(InputError, match="layer '1' keeps no running statistics"):
        Recording(model, {"0": model[0], "1": model[1]}, "population")
    assert state_of(model) == before


def test_a_batch_whose_variance_overflows_half_precision_is_an_error_not_zeros_for_the_next_layer():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).half().train()
    batches = [torch.randn(16, 1).half() for _ in range(9)]
    batches[4] = (torch.randn(16, 1) * 400).half()  # variance 160,000, where float16 ends at 65,504; of all: 18,000
    with pytest.raises(NonFiniteStatisticsError, match=r"layer '0'.* mini-batch 4 "):
        update_bn_stats(model, batches, num_iters=None)


class PutsNewTensors(nn.BatchNorm1d):
    """A hand-written forward that replaces its buffers instead of writing into them."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            mean, var = input.mean(0), input.var(0)
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        return input


class NeverWrites(nn.BatchNorm1d):
    """Batch statistics only, whatever the mode."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, True)


def test_a_forward_that_replaces_its_buffers_is_recalibrated_in_place():
    layer, batches = PutsNewTensors(2), [torch.randn(32, 2) * 3 + 7 for _ in range(4)]
    own = layer.running_mean
    update_bn_stats(layer, batches, None)
    whole = torch.cat(batches)
    torch.testing.assert_close(layer.running_mean, whole.mean(0))
    torch.testing.assert_close(layer.running_var, whole.var(0, unbiased=False))
    assert layer.running_mean is own


def test_a_forward_that_writes_no_statistics_is_listed_and_left_alone():
    layer = NeverWrites(2)
    with pytest.warns(UserWarning, match="writes no running statistics"):
        report = update_bn_stats(layer, [torch.randn(32, 2) * 3 + 7] * 4, None)
    assert not report.layers
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()


def test_a_sparse_buffer_is_no_obstacle():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.register_buffer("adjacency", torch.eye(4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.adjacency @ x)

    assert update_bn_stats(Graph(), [torch.randn(4, 2)] * 3, None).layers[0].count == 12


@pytest.mark.parametrize("fails", [False, True])
def test_a_buffer_that_a_forward_registers_stays_unless_the_run_fails(fails):
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            if "offset" not in self._buffers:
                self.register_buffer("offset", torch.zeros(2))
            return self.bn(x + self.offset)

    model = Grows()
    if fails:
        with pytest.raises(NonFiniteStatisticsError):
            update_bn_stats(model, [torch.full((4, 2), float("nan"))], None)
    else:
        update_bn_stats(model, [torch.randn(4, 2)], None)
    assert ("offset" in model._buffers) is not fails


class Doubling(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Differentiates(nn.Module):
    """A model whose forward needs gradients, as that of an energy does."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.bn(x).square().sum(), x)
        return slope


@pytest.mark.parametrize("prior", [0.0, 4.0])
@pytest.mark.parametrize("bn", [nn.BatchNorm1d(3), Doubling(3), GhostBN(3, 2)], ids=lambda bn: type(bn).__name__)
def test_a_forward_that_asks_for_gradients_is_recorded(bn, prior):
    x, model = torch.randn(4, 3), Differentiates(copy.deepcopy(bn))
    adapt_bn_stats(model, [x], prior)
    times = 2 if isinstance(bn, Doubling) else 1
    assert torch.allclose(model.bn.running_mean, times * x.mean(0) * 4 / (4 + prior), atol=1e-6)
    assert not model.bn.running_mean.requires_grad
