"""Conversions: what they keep, that they lead back bit for bit, and what they refuse, on models of every family."""

import copy
import functools
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import import_torchvision, state_of, values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import APEX, DETECTRON2
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from precisebn import InputError, update_bn_stats
from precisebn.conversion.converters import (
    convert_batch_stat,
    convert_concat_shared,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_sync_batchnorm,
    convert_to_batchnorm,
    replace_batchnorm,
)
from precisebn.conversion.layers import is_layer, origin_of
from precisebn.models.selection import select
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
    use_domain,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

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
}
EVERY_CONVERSION = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
NEW_CLASSES = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, DomainSpecificBN, CycleBatchNormList)
NEW_CLASSES += (ConcatSharedBN, BatchStatBN, GhostBN, nn.SyncBatchNorm)


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
        for name, tensor in _tensors(layer).items():
            if name in ("weight", "running_var"):
                tensor.data.uniform_(0.5, 2.0, generator=generator)
            elif name in ("bias", "running_mean"):
                tensor.data.normal_(0.0, 0.1, generator=generator)
            elif name == "num_batches_tracked":
                tensor.fill_(7)
    return model


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None}


class Picture:
    """All of a model, comparable with ==: its modules, by identity, and their state."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.state = state_of(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and (self.modules, self.state) == (other.modules, other.state)


# ---- Families -----------------------------------------------------------------------------------------------------


def _torchvision(name: str, **kwargs: Any) -> nn.Module:
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


def _timm(name: str) -> nn.Module:
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm", reason="timm is not installed")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=2)
    return model


def _transformers() -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: types.ModuleType = pytest.importorskip("transformers", reason="transformers is not installed")
    return module


def _tiny_resnet_config(**kwargs: Any) -> Any:
    return _transformers().ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **kwargs)


def _detr() -> nn.Module:
    """Its constructor has replaced every BatchNorm by transformers' own frozen one."""
    backbone = _tiny_resnet_config(out_features=["stage2"])
    config = _transformers().DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        **dict.fromkeys(("encoder_layers", "decoder_layers", "num_queries"), 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 1),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 8),
    )
    return _transformers().DetrModel(config)


def _lazy() -> nn.Module:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    net(X)
    return net


def _image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "torchvision resnet18": (lambda: _torchvision("resnet18"), _image()),
    "torchvision mobilenet_v3_small": (lambda: _torchvision("mobilenet_v3_small"), _image()),
    "torchvision densenet": (_densenet, _image()),
    "torchvision inception_v3": (lambda: _torchvision("inception_v3", init_weights=False), _image(75)),
    "torchvision fasterrcnn": (_detector, _image()),
    "torchvision video": (_video, torch.randn(2, 3, 4, 16, 16)),
    "timm resnet18": (lambda: _timm("resnet18"), _image()),
    "timm efficientnet_b0": (lambda: _timm("efficientnet_b0"), _image()),
    "timm regnetx_002": (lambda: _timm("regnetx_002"), _image()),
    "transformers ResNet": (lambda: _transformers().ResNetModel(_tiny_resnet_config()), _image()),
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
def _built(family: str) -> Member:
    torch.manual_seed(0)
    model = lived_in(FAMILIES[family][0]())
    outputs = run(family, model)
    return Member(model, Picture(model), outputs)


@pytest.fixture
def member(family: str, request: pytest.FixtureRequest) -> Iterator[Member]:
    failed = request.session.testsfailed
    yield _built(family)
    if request.session.testsfailed != failed:
        _built.cache_clear()


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


# ---- Laws ---------------------------------------------------------------------------------------------------------


@EVERY_CONVERSION
@EVERY_FAMILY
def test_there_and_back_is_the_identity(member, convert):
    model, before, _ = member
    old = find_layers(model)
    others = set(model.modules()) - {part for layer in old.values() for part in layer.modules()}
    assert convert(model) is model
    new = find_layers(model)
    assert list(new) == list(old)
    assert all(isinstance(layer, NEW_CLASSES) for layer in new.values())
    assert set(model.modules()) - {part for layer in new.values() for part in layer.modules()} == others
    assert convert_to_batchnorm(model) is model
    assert Picture(model) == before


EQUAL_AT_TEST_TIME = {name: convert for name, convert in CONVERSIONS.items() if name != "batch-stat"}


@pytest.mark.parametrize("convert", EQUAL_AT_TEST_TIME.values(), ids=EQUAL_AT_TEST_TIME)
@EVERY_FAMILY
def test_the_output_at_test_time_stays_the_same(family, member, convert):
    outputs = run(family, convert(member.model))
    convert_to_batchnorm(member.model)
    # Each layer rounds differently by some ulps, which some fifty layers with random weights amplify.
    for output, y in zip(outputs, member.outputs, strict=True):
        torch.testing.assert_close(output, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


@EVERY_CONVERSION
def test_parameters_and_buffers_are_the_same_objects_wherever_shapes_agree(convert):
    model = convnet()
    before = {(name, key): t for name, layer in find_layers(model).items() for key, t in _tensors(layer).items()}
    convert(model)
    after = {(name, key): t for name, layer in find_layers(model).items() for key, t in _tensors(layer).items()}
    for (name, key), old in before.items():
        new = after.get((name, key))
        if new is None:
            assert isinstance(find_layers(model)[name], CycleBatchNormList)
        elif isinstance(old, nn.Parameter) == isinstance(new, nn.Parameter) and old.shape == new.shape:
            assert new is old
        elif old.shape == new.shape:  # a frozen affine
            assert torch.equal(new, old)
            assert not new.requires_grad
            assert new.data_ptr() != old.data_ptr()
        else:
            assert new.shape == (2, *old.shape)
            assert torch.equal(new[0], old)
            assert torch.equal(new[1], old)
            assert new.requires_grad == old.requires_grad
            assert new.is_contiguous()


@EVERY_CONVERSION
def test_an_optimizer_made_before_goes_on_training_what_is_still_there(convert):
    model = convert_to_batchnorm(convert(convnet()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight, before = model[1].weight, model[1].weight.detach().clone()
    convert(model)
    kept = model[1].weight is weight
    train(model, X)
    optimizer.step()
    assert torch.equal(weight, before) == (not kept)
    assert (model[0].weight.grad != 0).any()


@EVERY_CONVERSION
def test_a_layer_in_several_places_is_replaced_by_one(convert):
    model = convnet()
    model.add_module("again", nn.ModuleDict({"bn": model[1], "net": nn.Sequential(model[0], model[1])}))
    model.add_module("parent again", model.again.net)
    old = model[1]
    before = Picture(model)
    convert(model)
    places = [module for _, module in model.named_modules(remove_duplicate=False) if module is model[1]]
    assert len(places) == 5
    assert old not in list(model.modules())
    assert len(find_layers(model)) == 2
    assert model.again.net is model.get_submodule("parent again")
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
def test_a_model_that_is_itself_a_layer_is_returned_new(convert):
    bn = lived_in(nn.BatchNorm2d(3)).eval()
    before = Picture(bn)
    new = convert(bn)
    assert isinstance(new, NEW_CLASSES)
    assert not new.training
    assert convert_to_batchnorm(new) is bn
    assert Picture(bn) == before


@EVERY_CONVERSION
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mode_dtype_device_and_requires_grad_are_kept(convert, dtype):
    model = convnet().to(dtype)
    model[1].eval().weight.requires_grad_(False)
    convert(model)
    assert [part.training for part in model[1].modules()] == [False] * len(list(model[1].modules()))
    assert model[7].training
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else dtype)
        if name == "1.weight":
            assert not tensor.requires_grad
    with use_domain(0):
        assert model(X.to(dtype)).dtype == dtype
    on_meta = convert(convnet().to("meta"))
    assert {t.device.type for t in (*on_meta.parameters(), *on_meta.buffers())} == {"meta"}
    convert_to_batchnorm(on_meta)


@EVERY_CONVERSION
def test_momentum_eps_and_what_users_put_on_a_layer_are_kept(convert):
    model = convnet()
    model[1].eps, model[1].momentum, model[7].momentum = 0.1, None, 0.3
    model[1].note = "mine"
    model[1].register_buffer("seen", torch.zeros(2), persistent=False)
    seen, before = model[1].seen, Picture(model)
    new = convert(model)[1]
    for member in new if isinstance(new, CycleBatchNormList) else [new]:
        assert (member.eps, member.momentum) == (0.1, None)
    assert new.note == "mine"
    assert new.seen is seen
    assert "1.seen" not in model.state_dict()
    convert_to_batchnorm(model)
    assert Picture(model) == before
    assert model[1].note == "mine"

    new = convert(model)[1]
    new.note, new.later = "changed", [1]
    for member in new if isinstance(new, CycleBatchNormList) else [new]:
        member.momentum = 0.5
    convert_to_batchnorm(model)
    assert (model[1].note, model[1].later, model[1].momentum, model[7].momentum) == ("changed", [1], 0.5, 0.3)


@EVERY_CONVERSION
def test_without_affine_bias_or_running_statistics(convert):
    tracked = convert is CONVERSIONS["frozen"] or convert is CONVERSIONS["frozen, trainable affine"]
    model = nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=tracked), nn.BatchNorm2d(3)
    )
    model[2].bias = None
    before = Picture(model)
    convert(model)
    assert model[0].weight is None
    assert model[2].bias is None
    assert model[2].weight is not None
    if not tracked:
        assert not [name for name, _ in model.named_buffers() if name.startswith("1.")]
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
def test_statistics_switched_on_or_off_later_stay_so(convert):
    """``bn.track_running_stats = False`` and ``bn.running_mean = None`` are idioms of those who calibrate by hand."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].track_running_stats = False
    if convert not in (CONVERSIONS["frozen"], CONVERSIONS["frozen, trainable affine"]):
        model[1].running_mean = model[1].running_var = None
    before = Picture(model)
    convert(model)
    for layer, tracks in ((model[0], False), (model[1], True)):
        for member in layer if isinstance(layer, CycleBatchNormList) else [layer]:
            assert member.track_running_stats == tracks
            assert (member.running_mean is None) == (before.modules[2][1].running_mean is None and tracks)
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
def test_nothing_remembered_shows_in_parameters_buffers_and_state_dict(convert):
    model, plain = convnet(), convnet()
    convert(model)
    expected = set(plain.state_dict())
    if isinstance(model[1], CycleBatchNormList):
        statistics = {key for key in expected if "running" in key or "tracked" in key}
        prefixed = {f"{head}.{k}.{tail}" for head, tail in (s.split(".") for s in statistics) for k in range(2)}
        expected = expected - statistics | prefixed
    assert set(model.state_dict()) == expected
    assert len(list(model.parameters())) <= len(list(plain.parameters()))
    if not isinstance(model[1], CycleBatchNormList):
        plain.load_state_dict(convert_to_batchnorm(model).state_dict())


@EVERY_CONVERSION
def test_copies_and_pickles_of_a_converted_model_lead_back_too(convert):
    model = convert(convnet())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        new = twin[1]
        assert isinstance(new, type(model[1]))
        convert_to_batchnorm(twin)
        assert type(twin[1]) is nn.BatchNorm2d
        assert twin[1] is twin[4]
        assert values_of(twin) == values_of(convnet())
        if new._parameters.get("weight") is not None and new.weight.dim() == 1:
            assert twin[1].weight is new.weight
        assert not {id(t) for t in twin.parameters()} & {id(t) for t in model.parameters()}
    assert isinstance(model[1], NEW_CLASSES)


# ---- Training in between ------------------------------------------------------------------------------------------


@EVERY_CONVERSION
def test_what_was_trained_in_between_comes_back(convert):
    model = convert(convnet())
    new = model[1]
    rows = isinstance(new, CycleBatchNormList | DomainSpecificBN)
    with torch.no_grad():
        for layer in (new, *(new if isinstance(new, CycleBatchNormList) else ())):
            for tensor in _tensors(layer).values():
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 1)
    members = new[1] if isinstance(new, CycleBatchNormList) else new
    expected = {key: t.clone() for key, t in _tensors(members).items()}
    expected |= {key: t.detach().clone() for key, t in _tensors(new).items()}
    parameters = set(map(id, new.parameters()))
    convert_to_batchnorm(model, domain=1 if rows else None)
    assert isinstance(model[1].weight, nn.Parameter)
    for key, t in _tensors(model[1]).items():
        dims = 0 if key == "num_batches_tracked" else 1
        assert torch.equal(t, expected[key][1] if expected[key].dim() > dims else expected[key])
    if not rows and parameters:
        assert parameters == set(map(id, model[1].parameters()))


def test_a_frozen_affine_comes_back_as_the_parameters_that_it_was():
    model = convnet()
    weight, optimizer = model[1].weight, torch.optim.SGD(model.parameters(), lr=1.0)
    convert_frozen_batchnorm(model)
    model[1].weight.fill_(3.0)
    convert_to_batchnorm(model)
    assert model[1].weight is weight
    assert weight.tolist() == [3.0] * 4
    model(X).square().sum().backward()
    optimizer.step()
    assert weight.tolist() != [3.0] * 4


@EVERY_CONVERSION
def test_another_dtype_in_between_is_the_restored_one(convert):
    model = convnet()
    weight = model[1].weight
    model(X).sum().backward()
    convert(model).to(torch.float64)
    convert_to_batchnorm(model)
    assert model[1].weight is weight
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float64, torch.int64}
    assert weight.grad is None or weight.grad.dtype == torch.float64
    reference = convnet()
    reference(X)  # the forward above
    assert values_of(model) == values_of(reference.to(torch.float64))
    model(X.double()).sum().backward()


@EVERY_CONVERSION
def test_training_with_activations_in_place(convert):
    """The activation of timm's BatchNormAct2d works in place, on what the new layer returns."""
    model = convert(_timm("test_efficientnet.r160_in1k"))
    train(model, _image(64))
    assert all(p.grad is not None for p in model.parameters())
    assert (model.conv_stem.weight.grad != 0).any()


def test_recalibration_sees_through_conversions():
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    converted = convert_concat_shared(copy.deepcopy(plain))
    update_bn_stats(plain, batches, 3)
    update_bn_stats(converted, batches, 3)
    convert_to_batchnorm(converted)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], value)


# ---- Hooks --------------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda layer, f: layer.register_forward_hook(f),
    "forward with kwargs": lambda layer, f: layer.register_forward_hook(f, with_kwargs=True),
    "forward always": lambda layer, f: layer.register_forward_hook(f, always_call=True),
    "forward pre": lambda layer, f: layer.register_forward_pre_hook(f),
    "forward pre with kwargs": lambda layer, f: layer.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda layer, f: layer.register_full_backward_hook(f),
    "backward pre": lambda layer, f: layer.register_full_backward_pre_hook(f),
    "state dict": lambda layer, f: layer.register_state_dict_post_hook(f),
    "state dict pre": lambda layer, f: layer.register_state_dict_pre_hook(f),
    "load state dict pre": lambda layer, f: layer.register_load_state_dict_pre_hook(f),
    "load state dict post": lambda layer, f: layer.register_load_state_dict_post_hook(f),
}


@EVERY_CONVERSION
def test_hooks_run_with_the_new_layer_and_their_handles_remove_them(convert):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    calls: dict[str, list[nn.Module]] = {}

    def register(name: str) -> Any:
        return HOOKS[name](model[1], lambda module, *args: calls.setdefault(name, []).append(module))

    def exercise() -> None:
        calls.clear()
        train(model, X)
        model.load_state_dict(model.state_dict())

    before, handles = Picture(model), {name: register(name) for name in HOOKS}
    for layer_of in (convert, to_domain_0, convert):
        layer_of(model)
        exercise()
        assert set(calls) == set(HOOKS)
        assert {module for modules in calls.values() for module in modules} == {model[1]}
    handles["later"] = model[1].register_forward_hook(lambda *args: None)
    for name in list(HOOKS)[::2]:
        handles.pop(name).remove()
    exercise()
    assert set(calls) == set(list(HOOKS)[1::2])
    to_domain_0(model)
    exercise()
    assert set(calls) == set(list(HOOKS)[1::2])
    for handle in handles.values():
        handle.remove()
    assert not any(hooks for key, hooks in vars(model[1]).items() if "_hooks" in key)
    assert before.modules == Picture(model).modules


def test_a_hook_that_is_always_called_is_so_on_the_new_layer():
    model, calls = nn.Sequential(nn.BatchNorm2d(3)), []
    model[0].register_forward_hook(lambda module, *args: calls.append(module), always_call=True)
    convert_ghost(model, 2)
    with pytest.raises(InputError):
        model(torch.ones(2, 4, 3, 3))
    assert calls == [model[0]]


# ---- Again, and from one to another -------------------------------------------------------------------------------


@EVERY_CONVERSION
def test_converting_twice_changes_nothing(convert):
    model = convert(convnet())
    before = Picture(model)
    convert(model)
    assert Picture(model) == before
    convert_to_batchnorm(model)
    before = Picture(model)
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
@pytest.mark.parametrize("first", [n for n in CONVERSIONS if "frozen" not in n])
def test_from_one_to_another_goes_by_way_of_what_the_layer_was(first, convert):
    model, direct = convnet(), convert(convnet())
    before = Picture(model)
    convert(CONVERSIONS[first](model))
    assert type(model[1]) is type(direct[1])
    assert type(model[7]) is type(direct[7])
    assert values_of(model) == values_of(direct)
    assert set(vars(model[1])) == set(vars(direct[1]))
    convert_to_batchnorm(model)
    assert Picture(model) == before


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(CONVERSIONS)), max_size=6))
def test_any_chain_of_conversions_leads_back(chain):
    model = convnet()
    before, outputs = Picture(model), model.eval()(X)
    for name in chain:
        CONVERSIONS[name](model, include=["1", "7"])  # by name, so that frozen ones go on too
        assert type(model[1]) is type(CONVERSIONS[name](nn.BatchNorm2d(4)))
        if name != "batch-stat":
            with use_domain(1):
                torch.testing.assert_close(model(X), outputs)
            for layer in find_layers(model).values():
                if isinstance(layer, CycleBatchNormList):
                    layer.reset()
    convert_to_batchnorm(model.train())
    assert Picture(model) == before


def test_other_settings_make_a_layer_anew():
    model = convert_ghost(convnet(), 4)
    before = model[1]
    assert convert_ghost(model, 8)[1].ghost_size == 8
    assert model[1] is not before
    assert model[1].weight is before.weight
    frozen = convert_frozen_batchnorm(model)[1]
    assert convert_frozen_batchnorm(model, trainable_affine=True)[1] is not frozen
    assert model[1].weight is before.weight
    assert convert_cycle(model, 2, include="1")[1].length == 2
    assert len(convert_cycle(model, 3)[1]) == 3
    assert convert_domain_specific(model, 3, affine="domain", include="1")[1].weight.shape == (3, 4)
    assert convert_domain_specific(model, 3)[1].weight is before.weight
    assert type(convert_to_batchnorm(model)[1]) is nn.BatchNorm2d


def test_the_rows_of_domains_stay_the_same_parameters_where_they_can():
    model = convert_domain_specific(convnet(), 2, affine="domain")
    weight = model[1].weight
    convert_domain_specific(model, 2, affine="domain", normalize="shared")
    assert model[1].weight is weight


@EVERY_CONVERSION
def test_frozen_layers_are_not_unfrozen_by_accident(convert):
    model = convert_frozen_batchnorm(convnet(), include="1")
    frozen, other = model[1], model[7]
    freezing = convert in (CONVERSIONS["frozen"], CONVERSIONS["frozen, trainable affine"])
    convert(model)
    assert (model[1] is frozen) == (not freezing or convert is CONVERSIONS["frozen"])
    assert model[7] is not other
    if freezing:
        return
    with pytest.warns(UserWarning, match="frozen"):
        convert(model, include=["?"], exclude="7")
    assert model[1] is frozen
    convert(model, include=[model[1]])
    assert model[1] is not frozen
    convert_frozen_batchnorm(model, include="1")
    convert(model, include=["1", "7"])
    assert not isinstance(model[1], FrozenBatchNorm2d)


# ---- Slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["domain", "domain, shared affine", "cycle"])
def test_domains_that_have_parted_need_a_choice(name):
    model = CONVERSIONS[name](convnet())
    with torch.no_grad():
        second = model[1][1].running_mean if isinstance(model[1], CycleBatchNormList) else model[1].running_mean[1]
        second.add_(1.0)
    expected = second.tolist()
    before = Picture(model)
    for convert in (*CONVERSIONS.values(), convert_to_batchnorm):
        if convert is CONVERSIONS[name]:
            continue
        with pytest.raises(InputError, match=r"layer '1' \(\w+\) has 2 domains, whose running_mean differ.*domain=k"):
            convert(model)
        assert Picture(model) == before
    with pytest.raises(InputError, match=r"domain=2: layer '1' .* has domains 0 to 1"):
        convert_to_batchnorm(model, domain=2)
    assert Picture(model) == before
    convert_to_batchnorm(model, domain=1)
    assert model[1].running_mean.tolist() == expected


def test_layers_of_precisebn_that_were_no_others_become_bn_class():
    model = nn.ModuleList(
        [
            FrozenBatchNorm1d(3, eps=0.1),
            FrozenBatchNorm2d(3, trainable_affine=True),
            FrozenBatchNorm3d(3, affine=False),
            GhostBN(3, 2, momentum=0.3),
            DomainSpecificBN(3, 2),
            CycleBatchNormList(2, nn.BatchNorm1d, num_features=3),
            CycleBatchNormList(2, num_features=3, affine=False),
            ConcatSharedBN(3, track_running_stats=False, affine=False),
            nn.SyncBatchNorm(3),
        ]
    )
    lived_in(model[:4])
    weight, mean, values = model[1].weight, model[0].running_mean, model[0].weight.clone()
    convert_to_batchnorm(model, bn_class=nn.BatchNorm3d)
    dims = [1, 2, 3, 3, 3, 1, 2, 3, 3]
    assert [type(layer) for layer in model] == [getattr(nn, f"BatchNorm{d}d") for d in dims]
    assert (model[0].eps, model[3].momentum) == (0.1, 0.3)
    assert model[1].weight is weight
    assert model[0].running_mean is mean
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, values)
    assert model[2].weight is model[6].weight is model[7].weight is None
    assert model[7].running_mean is None
    before = Picture(model)
    convert_to_batchnorm(convert_ghost(model, 2))
    assert Picture(model) == before


def test_a_frozen_layer_for_any_dimension_is_for_that_of_bn_class():
    model = nn.ModuleList([nn.SyncBatchNorm(3), nn.BatchNorm1d(3), GhostBN(3, 2)])
    convert_sync_batchnorm(model, include=["0", "1"])
    convert_frozen_batchnorm(model, bn_class=nn.BatchNorm3d)
    assert [type(layer) for layer in model] == [FrozenBatchNorm3d, FrozenBatchNorm1d, FrozenBatchNorm3d]
    convert_to_batchnorm(model)
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm3d]


# ---- Layers of other libraries ------------------------------------------------------------------------------------


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
        "transformers": _detr(),
        "timm": _timm_frozen(),
        "detectron2": nn.Sequential(nn.Conv2d(3, 4, 3), DETECTRON2.FrozenBatchNorm2d(4, eps=1e-3)),
    }


def _timm_frozen() -> nn.Module:
    model = _timm("test_efficientnet.r160_in1k")
    from timm.layers import freeze_batch_norm_2d

    return freeze_batch_norm_2d(model)


@pytest.mark.parametrize("library", ["torchvision", "transformers", "timm", "detectron2"])
def test_frozen_layers_of_other_libraries_become_ours_and_can_be_thawed(library):
    model = lived_in(_foreign_frozen()[library]).eval()
    layers = find_layers(model)
    names, eps = [name for name, _ in model.named_parameters()], [vars(bn).get("eps", 1e-5) for bn in layers.values()]
    buffers = {key: buffer for key, buffer in model.named_buffers() if key.rpartition(".")[0] in layers}
    assert len(layers) * 4 == len(buffers)
    out = _first(model(_image()))
    assert convert_frozen_batchnorm(model) is model
    assert [type(bn) for bn in find_layers(model).values()] == [FrozenBatchNorm2d] * len(layers)
    assert [bn.eps for bn in find_layers(model).values()] == eps
    assert list(find_layers(model)) == list(layers)
    assert all(dict(model.named_buffers())[key] is buffer for key, buffer in buffers.items())
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(bn.training for bn in find_layers(model).values())
    torch.testing.assert_close(_first(model(_image())), out, rtol=1e-3, atol=1e-4 * float(out.abs().max()))
    with pytest.warns(UserWarning, match="frozen"):
        convert_ghost(model, 2)
    convert_to_batchnorm(model)
    assert {type(bn) for bn in find_layers(model).values()} == {nn.BatchNorm2d}
    assert all(isinstance(bn.weight, nn.Parameter) and bn.weight.requires_grad for bn in find_layers(model).values())
    torch.testing.assert_close(_first(model(_image())), out, rtol=1e-3, atol=1e-4 * float(out.abs().max()))


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


# ---- Which layers -------------------------------------------------------------------------------------------------


def _nested() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    model = nn.ModuleDict({"stem": block(), "head": nn.ModuleDict({"a": block(), "b": block()})})
    model["head"]["shared"] = model["stem"][1]
    return model


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        (None, None, {"stem.1", "head.a.1", "head.b.1"}),
        ("head.a.1", None, {"head.a.1"}),
        ("head.?.*", None, {"head.a.1", "head.b.1"}),
        ("head", None, {"head.a.1", "head.b.1", "stem.1"}),  # which holds the stem's layer too
        (["stem", "*.b"], None, {"stem.1", "head.b.1"}),
        (lambda m: m["head"]["a"], None, {"head.a.1"}),
        (lambda m: [m["stem"][1], "head.a"], None, {"stem.1", "head.a.1"}),
        (None, "head.a", {"stem.1", "head.b.1"}),
        (None, "head.shared", {"head.a.1", "head.b.1"}),  # the stem's layer by its other name
        ("head", lambda m: m["stem"], {"head.a.1", "head.b.1"}),
        (None, [], {"stem.1", "head.a.1", "head.b.1"}),
    ],
)
def test_include_and_exclude(include, exclude, converted):
    model = _nested()
    include, exclude = (item(model) if isinstance(item, types.FunctionType) else item for item in (include, exclude))
    convert_ghost(model, 2, include=include, exclude=exclude)
    assert {name for name, layer in model.named_modules() if isinstance(layer, GhostBN)} == converted
    assert model["head"]["shared"] is model["stem"][1]


def test_names_are_those_without_wrappers():
    model = convert_ghost(nn.DataParallel(AveragedModel(_nested())), 2, include="head.a")
    assert isinstance(model.module.module["head"]["a"][1], GhostBN)


def test_parts_converted_alone_may_be_restored_with_the_whole():
    model = _nested()
    before = Picture(model)
    convert_ghost(model["stem"], 2)
    assert model["head"]["shared"] is not model["stem"][1]
    convert_to_batchnorm(model)
    assert Picture(model) == before


# ---- Wrappers and transformed models ------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_converted_model_can_be_wrapped_in_ddp(one_rank):
    model = convert_ghost(convnet(), 2)
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp(X).sum().backward()
    before = Picture(ddp)
    with pytest.raises(InputError, match=r"DistributedDataParallel at 'net' .* convert the model first, then wrap it"):
        convert_frozen_batchnorm(nn.ModuleDict({"net": ddp}))
    assert Picture(ddp) == before


def test_a_converted_model_can_be_sharded(one_rank):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = dist.init_device_mesh("cpu", (1,))
    sharded = fsdp.fully_shard(convert_ghost(convnet(), 2), mesh=mesh)
    with pytest.raises(InputError, match=r"FSDPModule manages .* convert the model first, then wrap it"):
        convert_frozen_batchnorm(sharded)


@EVERY_CONVERSION
@pytest.mark.parametrize("compiled_when", ["before", "after"])
def test_compiled_models_run_what_they_were_converted_to(convert, compiled_when):
    torch._dynamo.reset()
    plain = convnet().eval()
    model = copy.deepcopy(plain)
    with torch.no_grad(), use_domain(1):
        if compiled_when == "before":
            model = torch.compile(model, backend="eager")
            model(X)
            convert(model)
        else:
            model = torch.compile(convert(model), backend="eager")
        with torch.no_grad():
            for layer in find_layers(model).values():
                (layer.bias if layer.bias is not None else layer.weight).add_(1.0)
        expected = convert(plain)
        for layer in find_layers(plain).values():
            layer.bias.add_(1.0)
        torch.testing.assert_close(model(X), expected(X))
        convert_to_batchnorm(model)
        convert_to_batchnorm(plain)
        torch.testing.assert_close(model(X), plain(X))
    torch._dynamo.reset()


def test_a_compiled_layer_as_the_model():
    torch._dynamo.reset()
    bn = lived_in(nn.BatchNorm2d(3))
    model = torch.compile(bn, backend="eager")
    convert_frozen_batchnorm(model)
    assert isinstance(model._orig_mod, FrozenBatchNorm2d)
    before = model._orig_mod.running_mean.clone()
    torch.testing.assert_close(model(X), model._orig_mod(X))
    assert torch.equal(model._orig_mod.running_mean, before)
    convert_to_batchnorm(model)
    model(X)
    assert model._orig_mod is bn
    assert int(bn.num_batches_tracked) == 8
    torch._dynamo.reset()


# ---- Factories of users -------------------------------------------------------------------------------------------


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


# ---- All or nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [lambda model: model, *CONVERSIONS.values()], ids=["BatchNorm", *CONVERSIONS])
def test_a_factory_that_fails_leaves_the_model_bit_identical(first, error):
    model = first(convnet())
    model[7].register_load_state_dict_pre_hook(lambda *args: None)
    with torch.no_grad():
        model[1].bias.add_(1.0)
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    model[1].later = "mine"
    before = Picture(model)
    remembered = [memory.layer for memory in map(origin_of, (model[1], model[7])) if memory is not None]
    before_remembered = list(map(Picture, remembered))

    def failing(bn: nn.Module) -> nn.Module:
        if isinstance(bn, nn.BatchNorm1d):
            raise error
        return GhostBN(bn.num_features, 2)

    with pytest.raises(error):
        replace_batchnorm(model, failing, include=["1", "7"])
    assert Picture(model) == before
    assert list(map(Picture, remembered)) == before_remembered
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interrupted_at_any_line_a_conversion_is_done_or_not_begun(dtype):
    """Also in the middle of putting layers in place, and on the way from one layer to another."""
    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    fresh = convert_frozen_batchnorm(nn.Sequential(nn.BatchNorm2d(3), norm_act.BatchNormAct2d(3))).to(dtype)
    fresh[0].weight.add_(1.0)  # which the parameter that it was is given on the way; or a new dtype
    fresh[1].register_load_state_dict_pre_hook(lambda *args: None)
    interrupted = 0
    for after in range(3, 10**6, 17):
        model = copy.deepcopy(fresh)
        before, was = Picture(model), nn.ModuleList(origin_of(layer).layer for layer in model)
        weights = [bn.weight for bn in was]
        values = [(weight.dtype, weight.tolist()) for weight in weights]
        if not _interrupt(after, functools.partial(convert_ghost, model, 2, include=["0", "1"])):
            break
        if isinstance(model[0], FrozenBatchNorm2d):
            assert Picture(model) == before
            assert [(weight.dtype, weight.tolist()) for weight in weights] == values
            interrupted += 1
        else:
            assert isinstance(model[1], GhostBN)
    assert interrupted > 30


def _interrupt(after: int, action: Callable[[], object]) -> bool:
    """Interrupt an action at a line of the engine, counted as they run; False if it was done before."""
    lines = 0

    def trace(frame: types.FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.endswith("engine.py"):
            return None
        lines += event == "line"
        if lines == after:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


# ---- Wrong calls --------------------------------------------------------------------------------------------------


def _parametrized() -> nn.Module:
    model = convnet()
    parametrize.register_parametrization(model[7], "weight", nn.ReLU())
    return model


def _parametrized_bias() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    return model


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3))
    prune.l1_unstructured(model[0], "weight", 1)
    return model


def _patched() -> nn.Module:
    model = convnet()
    model[7].forward = lambda x: x
    return model


def _qat_layer() -> nn.Module:
    qat = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    return nn.Sequential(nn.Identity(), qat.ConvBn2d(3, 6, 3, qconfig=quantization.get_default_qat_qconfig("fbgemm")))


def _fused() -> nn.Module:
    intrinsic = pytest.importorskip("torch.ao.nn.intrinsic")
    return nn.Sequential(intrinsic.ConvBn2d(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))


def _observed() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(net)


def _with_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def _same_for_all(model: nn.Module) -> nn.Module:
    one = nn.Identity()
    return replace_batchnorm(model, lambda bn: one)


SIZE = r"must be a whole number"
WRONG_CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "no such name": (convnet, lambda m: convert_ghost(m, 2, include="x"), r"include='x' .* Sequential; it has 2: '1'"),
    "no such pattern": (convnet, lambda m: convert_ghost(m, 2, exclude=["*x*"]), r"exclude='\*x\*' matches no"),
    "a name that holds none": (convnet, lambda m: convert_ghost(m, 2, include="0"), "matches no BatchNorm layer"),
    "another's layer": (
        convnet,
        lambda m: convert_ghost(m, 2, include=nn.BatchNorm2d(2)),
        "include=the BatchNorm2d given matches no",
    ),
    "nothing to choose from": (lambda: nn.Sequential(nn.ReLU()), lambda m: convert_cycle(m, 2, include="0"), "none"),
    "a number": (convnet, lambda m: convert_ghost(m, 2, include=1), r"include=1 must be modules, names and patterns"),
    "numbers": (convnet, lambda m: convert_ghost(m, 2, exclude=[1]), r"exclude= takes modules, .* not int: 1"),
    "an empty list": (convnet, lambda m: convert_ghost(m, 2, include=[]), r"include= is empty"),
    "an inner part": (
        lambda: nn.Sequential(CycleBatchNormList(2, num_features=3)),
        lambda m: convert_ghost(m, 2, include="0.1"),
        "matches no",
    ),
    "ghost_size": (convnet, lambda m: convert_ghost(m, 0), rf"ghost_size=0 {SIZE}"),
    "num_domains": (convnet, lambda m: convert_domain_specific(m, 1.5), rf"num_domains=1.5 {SIZE}"),
    "normalize": (convnet, lambda m: convert_domain_specific(m, 2, normalize="all"), "normalize='all' must be"),
    "population": (convnet, lambda m: convert_domain_specific(m, 2, population=None), "population=None must be"),
    "affine": (convnet, lambda m: convert_domain_specific(m, 2, affine=None), "affine=None must be .* stay without"),
    "length": (convnet, lambda m: convert_cycle(m, True), rf"length=True {SIZE}"),
    "domain": (convnet, lambda m: convert_to_batchnorm(m, domain=-1), "domain=-1 must be the number of a domain"),
    "domain, a bool": (convnet, lambda m: convert_to_batchnorm(m, domain=True), "domain=True must be"),
    "bn_class": (convnet, lambda m: convert_to_batchnorm(m, bn_class=nn.ReLU), "bn_class=.* must be a BatchNorm class"),
    "frozen bn_class": (
        convnet,
        lambda m: convert_frozen_batchnorm(m, bn_class=nn.SyncBatchNorm),
        "bn_class=.* must be nn.BatchNorm1d, ",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)),
        convert_frozen_batchnorm,
        r"layer '1' \(BatchNorm2d\) has no running statistics to freeze .*exclude=",
    ),
    "no values yet": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()),
        convert_frozen_batchnorm,
        r"layer '1' \(LazyBatchNorm2d\) has no values yet; run one forward",
    ),
    "no values yet, own factory": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()),
        lambda m: replace_batchnorm(m, lambda bn: nn.Identity()),
        "layer '1' .* has no values yet",
    ),
    "parametrized": (_parametrized, convert_frozen_batchnorm, r"layer '7' .* computed .*remove_parametrizations"),
    "parametrized bias": (_parametrized_bias, convert_batch_stat, "layer '0' .* computed"),
    "pruned": (_pruned, convert_sync_batchnorm, "layer '0' .* computed"),
    "patched": (_patched, convert_concat_shared, r"layer '7' \(BatchNorm1d\) .* put on the instance"),
    "a patched layer of ours": (
        lambda: _with_forward(GhostBN(3, 2)),
        convert_to_batchnorm,
        r"the GhostBN given has a forward of its own, put on the instance",
    ),
    "fused relu": (
        lambda: nn.Sequential(APEX.SyncBatchNorm(3, fuse_relu=True)),
        convert_batch_stat,
        r"layer '0' \(SyncBatchNorm\) has a forward of its own, apex.parallel",
    ),
    "quantization-aware": (_qat_layer, convert_frozen_batchnorm, r"layer '1.bn' .* quantization.* then prepare it"),
    "fused": (_fused, convert_frozen_batchnorm, r"layer '0.1' .* quantization"),
    "observed": (_observed, convert_frozen_batchnorm, r"layer '0' .* quantization"),
    "a list": (lambda: nn.Identity(), lambda m: convert_ghost([m], 2), "model must be a module, not list"),
    "factory, a module": (convnet, lambda m: replace_batchnorm(m, nn.Identity()), "factory=Identity.* a function"),
    "factory that returns None": (
        lambda: nn.BatchNorm2d(3),
        lambda m: replace_batchnorm(m, lambda bn: None),
        "the factory returned None for the BatchNorm2d given; it must return a module",
    ),
    "factory, the same": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
        _same_for_all,
        "the factory returned for layer '1' .* in use already",
    ),
    "factory, one of the model": (
        convnet,
        lambda m: replace_batchnorm(m, lambda bn: m[2]),
        "the factory returned for layer '1' .* in use already",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong_and_change_nothing(call):
    build, convert, message = WRONG_CALLS[call]
    model = build()
    before = list(model.modules()) if call.startswith("no values") else Picture(model)  # there is nothing to picture
    with pytest.raises(InputError, match=message):
        convert(model)
    assert before == (list(model.modules()) if call.startswith("no values") else Picture(model))


def test_nothing_to_convert_warns_and_says_why():
    model = nn.Sequential(nn.ReLU())
    for convert in (*CONVERSIONS.values(), convert_to_batchnorm, lambda m: replace_batchnorm(m, nn.Identity)):
        with pytest.warns(UserWarning, match="Sequential has no BatchNorm layer, so nothing is converted") as caught:
            assert convert(model) is model
        assert len(caught) == 1
        assert caught[0].filename == __file__
    model = convnet()
    with pytest.warns(UserWarning, match="none is left by include= and exclude="):
        convert_frozen_batchnorm(model, include="1", exclude="1")
    before = Picture(model)
    convert_to_batchnorm(model)  # all is BatchNorm already: nothing to say
    assert Picture(model) == before
