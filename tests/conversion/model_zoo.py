"""What the tests of conversions convert: models of every family, every conversion, and how to compare."""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import import_torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from precisebn.conversion.converters import (
    convert_batch_stat,
    convert_concat_shared,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_sync_batchnorm,
    convert_to_batchnorm,
)
from precisebn.conversion.layers import is_layer
from precisebn.models.selection import select
from precisebn.models.snapshot import Snapshot
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBN,
    SyncBN,
    use_domain,
)

Convert = Callable[[nn.Module], nn.Module]

CONVERSIONS: dict[str, Convert] = {
    "frozen": convert_frozen_batchnorm,
    "frozen, trainable affine": lambda model, **kw: convert_frozen_batchnorm(model, trainable_affine=True, **kw),
    "domain": lambda model, **kw: convert_domain_specific(model, 2, affine="domain", **kw),
    "domain, shared affine": lambda model, **kw: convert_domain_specific(model, 2, **kw),
    "domain, shared population": lambda model, **kw: convert_domain_specific(model, 2, population="shared", **kw),
    "cycle": lambda model, **kw: convert_cycle(model, 2, **kw),
    "concat": convert_concat_shared,
    "batch-stat": convert_batch_stat,
    "ghost": lambda model, **kw: convert_ghost(model, 2, **kw),
    "sync": convert_sync_batchnorm,
    "sync, precisebn": lambda model, **kw: convert_sync_batchnorm(model, implementation="precisebn", **kw),
}
EVERY_CONVERSION = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
NEW_CLASSES = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, DomainSpecificBN, CycleBatchNormList)
NEW_CLASSES += (ConcatSharedBN, BatchStatBN, GhostBN, nn.SyncBatchNorm, SyncBN)


def convnet() -> nn.Sequential:
    """Two layers, the first in two places; with statistics and an affine that are not those of the start."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), bn, nn.ReLU(), nn.Conv2d(4, 4, 3), bn, nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4)
    )
    net.eval()(X)
    return lived_in(net.train())


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What a conversion sees as layers, by name."""
    return select(model, None, is_layer=is_layer, outermost=True).found


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def lived_in(model: nn.Module) -> nn.Module:
    """The model after some training, as far as its BatchNorm layers go."""
    generator = torch.Generator().manual_seed(2)
    for layer in find_layers(model).values():
        for name, tensor in tensors_of(layer).items():
            if name in ("weight", "running_var"):
                tensor.data.uniform_(0.5, 2.0, generator=generator)
            elif name in ("bias", "running_mean"):
                tensor.data.normal_(0.0, 0.1, generator=generator)
            elif name == "num_batches_tracked":
                tensor.fill_(7)
    return model


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None}


class Picture:
    """All of a model, comparable with ==: its modules, by every name, and their state."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.state = Snapshot(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and (self.modules, self.state) == (other.modules, other.state)


def torchvision_model(name: str, **kwargs: Any) -> nn.Module:
    models = import_torchvision().models
    return getattr(models, name)(num_classes=2, **kwargs)


def _densenet() -> nn.Module:
    import_torchvision()
    from torchvision.models.densenet import DenseNet

    return DenseNet(4, (2, 2), 8, num_classes=2)


def _detector() -> nn.Module:
    import_torchvision()
    from torchvision.models import detection

    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=2)


def _video() -> nn.Module:
    import_torchvision()
    from torchvision.models.video import resnet

    return resnet.VideoResNet(
        resnet.BasicBlock, [resnet.Conv3DSimple] * 4, [1, 1, 1, 1], resnet.BasicStem, num_classes=2
    )


def timm_model(name: str) -> nn.Module:
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm", reason="timm is not installed")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=2)
    return model


def import_transformers() -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: types.ModuleType = pytest.importorskip("transformers", reason="transformers is not installed")
    return module


def _tiny_resnet_config(**kwargs: Any) -> Any:
    return import_transformers().ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **kwargs)


def detr() -> nn.Module:
    """Its constructor has replaced every BatchNorm by transformers' own frozen one."""
    backbone = _tiny_resnet_config(out_features=["stage2"])
    config = import_transformers().DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        **dict.fromkeys(("encoder_layers", "decoder_layers", "num_queries"), 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 1),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 8),
    )
    return import_transformers().DetrModel(config)


def _lazy() -> nn.Module:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    net(X)
    return net


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), image()),
    "torchvision mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small"), image()),
    "torchvision densenet": (_densenet, image()),
    "torchvision inception_v3": (lambda: torchvision_model("inception_v3", init_weights=False), image(75)),
    "torchvision fasterrcnn": (_detector, image()),
    "torchvision video": (_video, torch.randn(2, 3, 4, 16, 16)),
    "timm resnet18": (lambda: timm_model("resnet18"), image()),
    "timm efficientnet_b0": (lambda: timm_model("efficientnet_b0"), image()),
    "timm regnetx_002": (lambda: timm_model("regnetx_002"), image()),
    "transformers ResNet": (lambda: import_transformers().ResNetModel(_tiny_resnet_config()), image()),
    "LazyBatchNorm": (_lazy, X),
    "FX": (lambda: torch.fx.symbolic_trace(convnet()), X),
    "AveragedModel": (lambda: AveragedModel(convnet()), X),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


class Member(NamedTuple):
    """A model of a family, what it is, and its output at test time: the same for all tests, which leave it as it is."""

    model: nn.Module
    picture: Picture
    outputs: list[Tensor]


@functools.cache
def built(family: str) -> Member:
    torch.manual_seed(0)
    model = lived_in(FAMILIES[family][0]())
    outputs = run(family, model)
    return Member(model, Picture(model), outputs)


def run(family: str, model: nn.Module) -> list[Tensor]:
    """The model's outputs at test time, for domain 1 of two."""
    model.eval()
    part = model.backbone if "rcnn" in family else model  # torchvision's kernels for boxes may be missing
    with torch.no_grad(), use_domain(1):
        output = part(FAMILIES[family][1])
    return [output] if isinstance(output, Tensor) else [y for y in output.values() if isinstance(y, Tensor)]


def train(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward for domain 0 of two; a whole cycle where there are any, and the output of its last call."""
    cycles = any(isinstance(layer, CycleBatchNormList) for layer in model.modules())
    with use_domain(0):
        ys = [model(x) for _ in range(2 if cycles else 1)]
    torch.stack(ys).square().sum().backward()
    return ys[-1]


def to_domain_0(model: nn.Module) -> nn.Module:
    """Back to nn.BatchNorm, by way of domain 0 where there are any."""
    domains = any(isinstance(layer, CycleBatchNormList | DomainSpecificBN) for layer in model.modules())
    return convert_to_batchnorm(model, domain=0 if domains else None)
