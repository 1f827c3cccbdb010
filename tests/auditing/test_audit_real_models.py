"""Real models with random weights and one mini-batch: nothing above a note; and real faults in them are found."""

import copy
import warnings

import pytest
import torch
from conftest import import_torchvision, state_of
from torch import nn

from precisebn import update_bn_stats
from precisebn.auditing.run import audit

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = (8, 3, 64, 64)
TORCHVISION = ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5"]
TIMM = ["efficientnet_b0", "mobilenetv3_small_050", "repvgg_a0"]


def torchvision_model(name: str) -> nn.Module:
    models = import_torchvision().models
    return getattr(models, name)(**({"init_weights": False} if name == "googlenet" else {}))


def timm_model(name: str) -> nn.Module:
    import_torchvision()
    return pytest.importorskip("timm").create_model(name)


def transformers_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.ResNetConfig(depths=[1] * 4, embedding_size=16, hidden_sizes=[16, 32, 64, 128])
        return transformers.ResNetForImageClassification(config)


MODELS = [
    *(pytest.param(torchvision_model, name, id=name) for name in TORCHVISION),
    *(pytest.param(timm_model, name, id=f"timm {name}") for name in TIMM),
]


def quiet(model: nn.Module, batch, **arguments) -> None:
    picture = state_of(model)
    report = audit(model, batch, **arguments)
    assert [finding for finding in report if finding.severity != "note" and finding.code[3] in "2347"] == []
    assert not [why for why in report.not_run.values() if "needs" not in why]
    assert picture.differences(state_of(model)) == {}


@pytest.mark.parametrize(("make", "name"), MODELS)
def test_nothing_is_found_in_clean_models(make, name):
    quiet(make(name), torch.randn(IMAGES))


def test_nothing_is_found_in_a_model_in_eval_mode(torchvision):
    quiet(torchvision.models.resnet18().eval(), torch.randn(IMAGES))


def test_nothing_is_found_in_a_model_of_transformers():
    """Loaded in eval mode; with its own loss."""
    quiet(transformers_resnet(), {"pixel_values": torch.randn(IMAGES), "labels": torch.zeros(8, dtype=torch.int64)})


def test_nothing_is_found_in_a_model_with_an_auxiliary_output(torchvision):
    models = torchvision.models.segmentation
    model = models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=True)
    quiet(model, torch.randn(8, 3, 32, 32))


def test_a_trained_model_is_quiet_and_its_faults_are_found(torchvision):
    model = torchvision.models.resnet18(num_classes=4)
    batches = [torch.randn(16, 3, 32, 32) for _ in range(9)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), torch.arange(16) % 4).backward()
        optimizer.step()
    update_bn_stats(model, batches, None)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(1000)
    quiet(model, batches[0], optimizer=optimizer)
    quiet(model, None, loader=batches)

    shifted = copy.deepcopy(model)
    shifted.layer2[0].bn1.running_mean.add_(shifted.layer2[0].bn1.running_var.sqrt())
    found = {finding.code: finding.layers[0] for finding in audit(shifted, batches[0]).at_least("warning")}
    assert found["PBN251"] == found["PBN252"] == "layer2.0.bn1"

    images = [(batch * 58 + 114).clamp(0, 255) for batch in batches]  # not normalized as in training
    assert "PBN251" in {finding.code for finding in audit(model, loader=images).at_least("warning")}


def test_a_middle_layer_under_no_grad(torchvision):
    model = torchvision.models.resnet18()
    forward = model.layer2.forward
    model.layer2.forward = torch.no_grad()(forward)
    [finding] = audit(model, torch.randn(IMAGES)).at_least("error")
    assert finding.code == "PBN351"
    assert {name.split(".")[0] for name in finding.layers} == {"conv1", "bn1", "layer1", "layer2"}
    assert "torch.no_grad() in module 'layer2" in finding.what
    assert "module 'layer3.0.conv1' is the first behind" in finding.what


def test_a_shared_head_over_levels(torchvision):
    from torchvision.models.detection.retinanet import RetinaNetClassificationHead

    head = RetinaNetClassificationHead(8, 1, 2, norm_layer=nn.BatchNorm2d)
    levels = [torch.randn(4, 8, size, size) * scale for size, scale in ((16, 1.0), (8, 3.0))]
    report = audit(head, levels, forward=lambda model, levels: model(levels))
    assert {finding.layers[0] for finding in report if finding.code == "PBN401" and finding.severity == "warning"} >= {
        "conv.0.1"
    }
