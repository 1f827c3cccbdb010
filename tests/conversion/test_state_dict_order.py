"""The order of state dicts is that of nn.BatchNorm: there is code that pairs two of them by position."""

import pytest
import torch
from model_zoo import CONVERSIONS, EVERY_CONVERSION, convnet
from torch import nn

from precisebn import convert_to_batchnorm
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBN,
    MultiInputSequential,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ORDER = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

MODULES = {
    "FrozenBatchNorm1d": lambda: FrozenBatchNorm1d(3),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(3),
    "FrozenBatchNorm2d, trainable affine": lambda: FrozenBatchNorm2d(3, trainable_affine=True),
    "FrozenBatchNorm3d": lambda: FrozenBatchNorm3d(3),
    "BatchStatBN": lambda: BatchStatBN(3),
    "ConcatSharedBN": lambda: ConcatSharedBN(3),
    "DomainSpecificBN": lambda: DomainSpecificBN(3, 2),
    "DomainSpecificBN, all shared": lambda: DomainSpecificBN(3, 2, population="shared", affine="shared"),
    "GhostBN": lambda: GhostBN(3, 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_the_order_of_nn_batchnorm(name):
    assert list(nn.BatchNorm2d(3).state_dict()) == ORDER
    module = MODULES[name]()
    assert list(module.state_dict()) == ORDER
    assert list(MultiInputSequential(module).state_dict()) == [f"0.{key}" for key in ORDER]
    checkpoint = {key: torch.full_like(value, 3) for key, value in nn.BatchNorm2d(3).state_dict().items()}
    module.load_state_dict(checkpoint)
    assert all(bool((value == 3).all()) for value in module.state_dict().values())


def test_the_members_of_a_cycle_have_it_each():
    expected = ORDER[:2] + [f"{k}.{key}" for k in range(2) for key in ORDER[2:]]
    assert list(CycleBatchNormList(2, num_features=3).state_dict()) == expected


@EVERY_CONVERSION
def test_conversions_keep_it_there_and_back(convert):
    model = convnet()
    model[1].register_buffer("mine", torch.ones(1))
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    convert(model)
    if not any(isinstance(layer, CycleBatchNormList) for layer in model):
        assert list(model.state_dict()) == keys
    there = [name for name, _ in model.named_parameters()]
    assert there == [name for name in parameters if name in there]
    convert_to_batchnorm(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == parameters


SAME_SHAPES = (
    "frozen",
    "frozen, trainable affine",
    "domain, shared population",
    "concat",
    "batch-stat",
    "ghost",
    "sync",
    "sync, precisebn",
)


@pytest.mark.parametrize("average_made", ["before", "after"])
@pytest.mark.parametrize("name", SAME_SHAPES)
@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timms_average_of_weights_follows_a_converted_model(timm, version, name, average_made):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    if average_made == "before":
        average = vars(timm.utils)[version](model, decay=0.5)
    CONVERSIONS[name](model)
    if average_made == "after":
        average = vars(timm.utils)[version](model, decay=0.5)
    before = {key: value.clone() for key, value in average.module.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(2)
    average.update(model)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[key] + 1)
