"""replace_batchnorm with factories of one's own."""

import copy

import pytest
import torch
from model_zoo import CONVERSIONS, Picture, X, convnet
from torch import Tensor, nn

from precisebn import InputError, batch_norm, update_bn_stats
from precisebn.conversion.converters import (
    convert_frozen_batchnorm,
    convert_ghost,
    convert_to_batchnorm,
)
from precisebn.conversion.engine import replace_batchnorm
from precisebn.nn import GhostBN
from precisebn.nn.population import PopulationNorm

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


def test_a_factory_of_ones_own_and_the_way_back():
    model = convnet()
    before, weight = Picture(model), model[1].weight
    seen = []
    model[1].register_forward_hook(lambda module, *args: seen.append(module))
    with_hook = Picture(model)
    returned = replace_batchnorm(model, lambda bn: nn.GroupNorm(2, bn.num_features, eps=0.1), exclude="7")
    assert returned is model
    assert type(model[1]) is type(model[4]) is nn.GroupNorm
    assert model[1] is model[4]
    assert model[1].weight is weight
    model(X)
    assert seen == [model[1], model[1]]
    with pytest.warns(UserWarning, match="replaced"):
        convert_ghost(model, 2, exclude="7")
    convert_to_batchnorm(model)
    assert Picture(model).modules == with_hook.modules == before.modules
    assert model[1].eps == 1e-5


class Own(PopulationNorm):
    """A module of one's own, over the protocol of population statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.uses_batch_statistics:
            return self.frozen(self.check(x), self.weight, self.bias)
        y, moments = batch_norm(self.check(x), self.weight, self.bias, eps=self.eps)
        self.track(moments)
        return y


def test_a_module_of_ones_own_comes_is_recalibrated_and_goes_back_with_what_it_has_learned():
    model, batches = convnet(), [X, 2 * X]
    plain = copy.deepcopy(model)
    before = Picture(model)
    replace_batchnorm(model, lambda bn: Own(bn.num_features, eps=bn.eps, momentum=bn.momentum))
    assert type(model[1]) is type(model[7]) is Own
    convert_to_batchnorm(model)
    assert Picture(model) == before
    replace_batchnorm(model, lambda bn: Own(bn.num_features, eps=bn.eps, momentum=bn.momentum))
    for net in (model, plain):
        report = update_bn_stats(net, batches, None)
        assert [layer.name for layer in report.layers] == ["1", "7"]
    convert_to_batchnorm(model)
    assert type(model[1]) is nn.BatchNorm2d
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    layer = replace_batchnorm(nn.BatchNorm2d(4), lambda bn: Own(bn.num_features))
    layer.forward = layer.forward
    with pytest.raises(InputError, match="forward of its own, put on the instance"):
        convert_to_batchnorm(layer)


class OwnGhost(GhostBN):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    "factory",
    [lambda bn: Own(bn.num_features), lambda bn: OwnGhost(bn.num_features, 3)],
    ids=["PopulationNorm", "GhostBN"],
)
@pytest.mark.parametrize("on", CONVERSIONS)
def test_a_subclass_of_a_module_of_precisebn_leads_on_and_back_like_any_other(factory, on):
    model = convnet()
    before, layer = Picture(model), model[1]
    replace_batchnorm(model, factory)
    assert isinstance(model[1], Own | OwnGhost)
    assert model[1].running_mean is layer.running_mean
    CONVERSIONS[on](model)
    assert not isinstance(model[1], Own | OwnGhost)
    convert_to_batchnorm(replace_batchnorm(model, factory, include=["1", "7"]))
    assert Picture(model) == before


def test_a_forward_put_on_what_a_factory_has_made_is_not_dropped():
    model = replace_batchnorm(convnet(), lambda bn: nn.GroupNorm(2, bn.num_features))
    model[1].forward = lambda x: x
    before = Picture(model)
    with pytest.raises(InputError, match=r"layer '1' \(GroupNorm\) has a forward of its own, put on the instance"):
        convert_to_batchnorm(model)
    assert Picture(model) == before


def test_a_factory_gets_what_the_layer_was_and_may_let_it_be():
    model = convnet()
    layers = [model[1], model[7]]
    seen: list[nn.Module] = []

    def keep(bn: nn.Module) -> nn.Module:
        seen.append(bn)
        return bn

    replace_batchnorm(convert_ghost(model, 2), keep)
    assert seen == layers
    assert [model[1], model[7]] == layers


def test_a_factory_may_build_a_layer_that_keeps_less():
    model = convnet()
    before = Picture(model)
    replace_batchnorm(model, lambda bn: nn.InstanceNorm2d(4) if bn.num_features == 4 else bn, include="1")
    assert model[1].weight is None
    assert not model[1].track_running_stats
    assert Picture(convert_to_batchnorm(model)) == before
    replace_batchnorm(model, lambda bn: nn.BatchNorm2d(4, affine=False, track_running_stats=False), include="1")
    assert model[1].running_mean is model[1].weight is None
    assert Picture(convert_to_batchnorm(model)) == before
    replace_batchnorm(model, lambda bn: nn.Identity())
    assert Picture(convert_to_batchnorm(model)) == before


def test_a_layer_that_keeps_something_else_under_the_same_names():
    """A matrix of a Linear is no weight for each of several domains."""
    model = convnet()
    before = Picture(model)
    replace_batchnorm(model, lambda bn: nn.Linear(bn.num_features, bn.num_features))
    assert Picture(convert_to_batchnorm(model)) == before


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OwnAttributes(nn.BatchNorm2d):
    """Torch's forward, so that a conversion drops nothing."""


def test_a_forward_of_ones_own_is_for_a_factory_of_ones_own():
    model = nn.Sequential(OwnAttributes(3), OwnForward(3))
    before = Picture(model)
    for convert in CONVERSIONS.values():
        with pytest.raises(InputError, match=r"layer '1' \(OwnForward\) has a forward of its own.*replace_batchnorm"):
            convert(model)
        assert Picture(model) == before
        assert convert(model, exclude="1")[0] is not before.modules[1][1]
        assert convert_to_batchnorm(model)[1] is before.modules[2][1]
        assert Picture(model) == before
    replace_batchnorm(model, lambda bn: GhostBN(bn.num_features, 2))
    assert [type(bn) for bn in model] == [GhostBN, GhostBN]
    with pytest.raises(InputError, match="OwnForward"):
        convert_frozen_batchnorm(model)
    assert Picture(convert_to_batchnorm(model)) == before
