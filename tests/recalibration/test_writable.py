"""Buffers that a recalibration can write, and those that it refuses before anything runs or leaves really alone."""

import pytest
import torch
from conftest import state_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

from precisebn import InputError, convert_domain_specific, update_bn_stats
from precisebn.nn import DomainSpecificBN, use_domain

BATCHES = [torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(n)) for n in (4, 6)]
VALUES = torch.cat(BATCHES).transpose(0, 1).flatten(1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))


def assert_refused(model: nn.Module, message: str, **arguments: object) -> None:
    """Before a single mini-batch is taken; and nothing changes."""
    before, taken = state_of(model), []
    with pytest.raises(InputError, match=message):
        update_bn_stats(model, (taken.append(batch) or batch for batch in BATCHES), None, **arguments)
    assert not taken
    assert state_of(model) == before


# ---- Memory in common ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["running_mean", "running_var"])
def test_two_layers_of_one_buffer_are_refused_by_name(kind):
    model = net()
    setattr(model[2], kind, getattr(model[0], kind))
    assert_refused(model, rf"{kind} of layer '0' .* and {kind} of layer '2' .* share memory.*{kind}\.clone\(\)")
    setattr(model[2], kind, getattr(model[2], kind).clone())  # as the message says
    update_bn_stats(model, BATCHES, None)
    torch.testing.assert_close(model[0].running_mean, VALUES.mean(1))


def test_so_are_buffers_that_overlap_in_part():
    model, flat = net(), torch.zeros(5)
    model[0].running_mean, model[2].running_mean = flat[:3], flat[2:]
    assert_refused(model, "share memory")


def test_so_are_mean_and_variance_of_one_layer():
    bn = nn.BatchNorm2d(3)
    bn.running_mean = bn.running_var
    assert_refused(bn, "running_mean of layer .* and running_var of layer .* share memory")


def test_so_are_layers_whose_buffers_are_strided_views_of_the_same_elements():
    model, table = net(), torch.zeros(6, 3)
    model[0].running_mean, model[2].running_mean = table[::2, 1], table[2:5, 1]
    assert_refused(model, "share memory")


def test_a_module_in_two_places_is_one_layer():
    bn = nn.BatchNorm2d(3)
    report = update_bn_stats(nn.Sequential(bn, bn), BATCHES, None)
    assert [layer.name for layer in report.layers] == ["0"]


def test_only_what_is_recalibrated_needs_memory_of_its_own():
    model = net()
    model[2].running_mean = model[0].running_mean
    model[2].eval()
    assert list(update_bn_stats(model, BATCHES, None).skipped) == ["2"]


def test_views_of_one_flat_tensor_are_fine():
    model, flat = net(), torch.zeros(12)
    buffers = [("running_mean", 0), ("running_var", 0), ("running_mean", 2), ("running_var", 2)]
    for (kind, layer), view in zip(buffers, flat.split(3), strict=True):
        setattr(model[layer], kind, view)
    update_bn_stats(model, BATCHES, None)
    torch.testing.assert_close(flat[:3], VALUES.mean(1))
    torch.testing.assert_close(flat[3:6], VALUES.var(1, correction=0))
    assert torch.equal(flat[6:9], model[2].running_mean)


def test_interleaved_views_of_one_tensor_are_fine():
    model, table = net(), torch.ones(3, 4)
    for column, (kind, layer) in enumerate([(k, n) for n in (0, 2) for k in ("running_mean", "running_var")]):
        setattr(model[layer], kind, table[:, column])
    reference = net()
    for one in (model, reference):
        update_bn_stats(one, BATCHES, None)
    for layer in (0, 2):
        assert torch.equal(model[layer].running_mean, reference[layer].running_mean)
        assert torch.equal(model[layer].running_var, reference[layer].running_var)


# ---- Tensors that nothing can be written into ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_inference_tensors_are_refused_by_name(name):
    model = net()
    with torch.inference_mode():
        setattr(model[2], name, getattr(model[2], name).clone())
    assert_refused(model, rf"{name} of layer '2' \(BatchNorm2d\) is an inference tensor.*layer\.{name}\.clone\(\)")
    setattr(model[2], name, getattr(model[2], name).clone())  # as the message says
    update_bn_stats(model, BATCHES, None)


def test_inside_inference_mode_they_can_be_written():
    with torch.inference_mode():
        model = net()
        update_bn_stats(model, BATCHES, None)
    torch.testing.assert_close(model[0].running_mean, VALUES.mean(1))


def test_expanded_tensors_are_refused_by_name():
    model = net()
    model[2].running_var = torch.ones(1).expand(3)
    assert_refused(model, r"running_var of layer '2' .*was expanded.*layer\.running_var\.clone\(\)")
    model[2].running_var = model[2].running_var.clone()
    update_bn_stats(model, BATCHES, None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_statistics_that_are_no_floating_point_numbers_are_refused_by_name(dtype):
    model = net()
    model[2].running_mean = model[2].running_mean.to(dtype)
    shown = str(dtype).removeprefix("torch.")
    assert_refused(model, rf"running_mean of layer '2' \(BatchNorm2d\) is {shown}.*to\(torch\.float32\)")


def test_a_population_of_several_is_named_by_its_number():
    model = nn.Sequential(DomainSpecificBN(3, 2))
    model[0].running_var = torch.ones(1, 3).expand(2, 3)
    assert_refused(model, r"running_var of layer '0\[0\]' .* and running_var of layer '0\[1\]' .* share memory")


def test_layers_made_by_a_conversion_in_inference_mode_can_be_written():
    model = net()
    with torch.inference_mode():
        convert_domain_specific(model, num_domains=2)
    with use_domain(1):
        update_bn_stats(model, BATCHES, None)
    torch.testing.assert_close(model[0].running_mean[1], VALUES.mean(1))


# ---- Statistics elsewhere than in buffers -------------------------------------------------------------------------


class Same(nn.Module):
    """A parametrization that hands on what it gets, and so what torch's batch norm writes into."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def as_parameters(bn: nn.BatchNorm2d) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = bn._buffers.pop(name)
        setattr(bn, name, nn.Parameter(value, requires_grad=False))


def as_attributes(bn: nn.BatchNorm2d) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        vars(bn)[name] = bn._buffers.pop(name)


def parametrized(bn: nn.BatchNorm2d) -> None:
    for name in ("running_mean", "running_var"):
        parametrize.register_parametrization(bn, name, Same())


@pytest.mark.parametrize("move", [as_parameters, as_attributes, parametrized])
def test_statistics_that_are_no_buffers_are_left_alone_and_really_so(move):
    """They were said to be left alone, and moved with every mini-batch."""
    model = net()
    move(model[2])
    model[2](BATCHES[0])
    before = [model[2].running_mean.clone(), model[2].running_var.clone(), model[2].num_batches_tracked.clone()]
    report = update_bn_stats(model, BATCHES, None)
    assert report.skipped["2"].startswith("running statistics that are no buffers")
    after = [model[2].running_mean, model[2].running_var, model[2].num_batches_tracked]
    assert all(map(torch.equal, before, after))
    assert report["0"].num_batches == 2


def test_a_layer_without_any_is_told_apart_from_them():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    assert update_bn_stats(model, BATCHES, None).skipped == {"1": "no running statistics (track_running_stats=False)"}


# ---- Settings that are no attributes ------------------------------------------------------------------------------


class EpsBuffer(nn.BatchNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        del self.eps
        self.register_buffer("eps", torch.tensor(1e-2))


class Computed(nn.BatchNorm2d):
    eps = property(lambda self: 1e-2, lambda self, value: None)
    momentum = property(lambda self: 0.5, lambda self, value: None)


class ComputedByHand(Computed):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


@pytest.mark.parametrize("kind", [EpsBuffer, Computed, ComputedByHand])
def test_eps_and_momentum_may_be_buffers_or_properties(kind):
    model = nn.Sequential(kind(3), nn.BatchNorm2d(3))
    reference = nn.Sequential(nn.BatchNorm2d(3, 1e-2), nn.BatchNorm2d(3))
    keys = list(vars(model[0]))
    for one in (model, reference):
        update_bn_stats(one, BATCHES, None)
    assert torch.equal(model[0].running_mean, reference[0].running_mean)
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)
    assert list(vars(model[0])) == keys


@pytest.mark.parametrize("move", [as_parameters, as_attributes, parametrized])
def test_a_model_of_nothing_else_says_what_to_do(move):
    model = nn.Sequential(nn.BatchNorm2d(3))
    move(model[0])
    with pytest.warns(UserWarning, match="1 keeps running statistics that are no buffers; register_buffer"):
        update_bn_stats(model, BATCHES, None)
