"""Conversions of the layers of other libraries: timm, torchvision, transformers, detectron2, apex."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import import_torchvision
from model_zoo import (
    EVERY_CONVERSION,
    NEW_CLASSES,
    Picture,
    X,
    detr,
    find_layers,
    image,
    lived_in,
    timm_model,
    to_domain_0,
    train,
)
from pretended import APEX, DETECTRON2
from torch import Tensor, nn

from precisebn.conversion.converters import (
    convert_concat_shared,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_to_batchnorm,
)
from precisebn.nn import (
    BatchStatBN,
    CycleBatchNormList,
    FrozenBatchNorm2d,
    MultiInputSequential,
    use_domain,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


@EVERY_CONVERSION
def test_timm_activations_stay_in_place(convert):
    """Children, their parameters and their names; and they run before the users' hooks."""
    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    layer = norm_act.BatchNormAct2d(4, act_layer=nn.PReLU, drop_layer=nn.Identity, inplace=False)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), layer))
    keys, act, seen = set(model.state_dict()), model[1].act, []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    expected, before = model.eval()(X), Picture(model)
    convert(model)
    if not isinstance(model[1], CycleBatchNormList):
        assert set(model.state_dict()) == keys
    assert model[1].act is act
    with use_domain(0):
        y = model(X)
    assert seen[-1] is y
    if not isinstance(model[1], BatchStatBN):
        torch.testing.assert_close(y, expected)
    copied = copy.deepcopy(model)
    assert copied[1].act is not act
    for layer in model.modules():
        if isinstance(layer, CycleBatchNormList):
            layer.reset()
    y = train(model.train(), X)
    assert (y < 0).any()
    torch.testing.assert_close(y, act(y / torch.where(y < 0, act.weight, 1.0)))  # applied once
    model[1].act = nn.ReLU()
    to_domain_0(model.eval())
    assert isinstance(model[1].act, nn.ReLU)
    model[1].act = act
    assert type(model[1]) is norm_act.BatchNormAct2d
    assert before.modules == Picture(model).modules
    assert len(model[1]._forward_hooks) == 1


def test_timm_activations_are_applied_to_each_of_a_list():
    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    head = convert_concat_shared(MultiInputSequential(nn.Conv2d(3, 4, 1), norm_act.BatchNormAct2d(4)))
    ys = head([X, X[..., :4]])
    assert [y.shape[-1] for y in ys] == [8, 4]
    assert all((y >= 0).all() for y in ys)


def test_timm_synchronized_and_frozen_layers():
    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), norm_act.BatchNormAct2d(4))).eval()
    expected, act = model(X), model[1].act
    sync = norm_act.convert_sync_batchnorm(copy.deepcopy(model))
    before = Picture(sync)
    convert_to_batchnorm(convert_frozen_batchnorm(sync))
    assert Picture(sync) == before
    assert isinstance(sync[1], norm_act.SyncBatchNormAct)
    frozen = norm_act.freeze_batch_norm_2d(model)
    assert isinstance(frozen[1], norm_act.FrozenBatchNormAct2d)
    for plain in (convert_to_batchnorm(sync), convert_to_batchnorm(convert_frozen_batchnorm(frozen))):
        assert type(plain[1]) is nn.BatchNorm2d
        assert {name for name, _ in plain[1].named_children()} == {"act", "drop"}
        torch.testing.assert_close(plain.eval()(X), expected)
        picture = Picture(plain)
        convert_to_batchnorm(convert_ghost(convert_frozen_batchnorm(plain), 2, include="1"))
        assert Picture(plain) == picture
    assert frozen[1].act is act


def _foreign_frozen() -> dict[str, nn.Module]:
    import_torchvision()
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return {
        "torchvision": resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3),
        "transformers": detr(),
        "timm": _timm_frozen(),
        "detectron2": nn.Sequential(nn.Conv2d(3, 4, 3), DETECTRON2.FrozenBatchNorm2d(4, eps=1e-3)),
    }


def _timm_frozen() -> nn.Module:
    model = timm_model("test_efficientnet.r160_in1k")
    from timm.layers import freeze_batch_norm_2d

    return freeze_batch_norm_2d(model)


@pytest.mark.parametrize("library", ["torchvision", "transformers", "timm", "detectron2"])
def test_frozen_layers_of_other_libraries_become_ours_and_can_be_thawed(library):
    model = lived_in(_foreign_frozen()[library]).eval()
    layers = find_layers(model)
    names, eps = [name for name, _ in model.named_parameters()], [vars(bn).get("eps", 1e-5) for bn in layers.values()]
    buffers = {key: buffer for key, buffer in model.named_buffers() if key.rpartition(".")[0] in layers}
    assert len(layers) * 4 == len(buffers)
    out = _first(model(image()))
    assert convert_frozen_batchnorm(model) is model
    assert [type(bn) for bn in find_layers(model).values()] == [FrozenBatchNorm2d] * len(layers)
    assert [bn.eps for bn in find_layers(model).values()] == eps
    assert list(find_layers(model)) == list(layers)
    assert all(dict(model.named_buffers())[key] is buffer for key, buffer in buffers.items())
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(bn.training for bn in find_layers(model).values())
    torch.testing.assert_close(_first(model(image())), out, rtol=1e-3, atol=1e-4 * float(out.abs().max()))
    with pytest.warns(UserWarning, match="frozen"):
        convert_ghost(model, 2)
    convert_to_batchnorm(model)
    assert {type(bn) for bn in find_layers(model).values()} == {nn.BatchNorm2d}
    assert all(isinstance(bn.weight, nn.Parameter) and bn.weight.requires_grad for bn in find_layers(model).values())
    torch.testing.assert_close(_first(model(image())), out, rtol=1e-3, atol=1e-4 * float(out.abs().max()))


def _first(output: Any) -> Tensor:
    """A tensor of what a model has returned."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output.detach()


def test_frozen_layers_of_other_libraries_can_be_named_or_thawed_directly():
    model = _foreign_frozen()["detectron2"]
    foreign, mean = model[1], model[1].running_mean
    with pytest.warns(UserWarning, match="frozen"):
        convert_ghost(model, 2)
    assert model[1] is foreign
    assert convert_frozen_batchnorm(copy.deepcopy(model), trainable_affine=True)[1].weight.requires_grad
    assert int(convert_ghost(copy.deepcopy(model), 2, include="1")[1].num_batches_tracked) == 0
    thawed = convert_to_batchnorm(model)[1]
    assert type(thawed) is nn.BatchNorm2d
    assert thawed.running_mean is mean
    assert thawed.eps == 1e-3


@EVERY_CONVERSION
def test_synchronized_layers_of_other_libraries(convert):
    model = lived_in(nn.Sequential(DETECTRON2.NaiveSyncBatchNorm(3), APEX.SyncBatchNorm(3)))
    before = Picture(model)
    convert(model)
    assert {type(bn) for bn in model} <= set(NEW_CLASSES)
    if isinstance(model[1], CycleBatchNormList):
        assert isinstance(model[1][0], nn.SyncBatchNorm)
    convert_to_batchnorm(model)
    assert Picture(model) == before
    assert {type(bn) for bn in convert_to_batchnorm(model)} == {nn.BatchNorm2d}


def test_what_timms_own_tools_do_to_frozen_layers():
    """As docs/modules.md says: what to call in the place of one, and before the other."""
    import_torchvision()
    byobnet = pytest.importorskip("timm.models.byobnet")
    from timm.utils import model as timm_tools

    model = lived_in(nn.Sequential(byobnet.MobileOneBlock(4, 4))).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    convert_frozen_batchnorm(model)
    timm_tools.unfreeze(model)
    assert all(type(layer) is FrozenBatchNorm2d for layer in find_layers(model).values())
    with pytest.raises(AssertionError, match=r"^$"):
        timm_tools.reparameterize_model(model)
    convert_to_batchnorm(model)
    assert {type(layer) for layer in find_layers(model).values()} <= {nn.BatchNorm2d, timm_layer_class()}
    fused = timm_tools.reparameterize_model(model)
    assert not find_layers(fused)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


def timm_layer_class() -> type[nn.Module]:
    return pytest.importorskip("timm.layers.norm_act").BatchNormAct2d
