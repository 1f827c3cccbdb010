"""include= and exclude= of conversions, and models in wrappers or compiled."""

import copy
import types
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from model_zoo import EVERY_CONVERSION, Picture, X, convnet, find_layers, lived_in, timm_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from precisebn import InputError
from precisebn.conversion.converters import (
    convert_frozen_batchnorm,
    convert_ghost,
    convert_to_batchnorm,
)
from precisebn.nn import (
    FrozenBatchNorm2d,
    GhostBN,
    use_domain,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

# ---- Which layers ---------------------------------------------------------------------------------------------------


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


def _timm_blocks() -> nn.Module:
    return timm_model("test_efficientnet.r160_in1k").blocks


SLICES = {
    "nn.Sequential": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)),
    "nn.ModuleList": lambda: nn.ModuleList(
        [nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)]
    ),
    "timm": _timm_blocks,
}


@pytest.mark.parametrize("name", SLICES)
@EVERY_CONVERSION
def test_a_slice_says_which_part_of_a_model(name, convert):
    """A slice itself is another container, with places of its own: ``convert(model[:2])`` changes those alone."""
    model = SLICES[name]()
    old, head, tail = find_layers(model), model[:-1], model[-1]
    assert convert(model, include=head) is model
    new = find_layers(model)
    assert list(new) == list(old)
    inside = set(tail.modules())
    assert [layer is old[name] for name, layer in new.items()] == [old[name] in inside for name in old]
    assert 0 < sum(layer in inside for layer in old.values()) < len(old)
    convert_to_batchnorm(model)
    convert(model, exclude=model[-1:])
    assert [layer is old[name] for name, layer in find_layers(model).items()] == [old[name] in inside for name in old]
    convert_to_batchnorm(model, include=model[:-1])
    assert find_layers(model) == old


@EVERY_CONVERSION
def test_a_slice_as_the_model_is_what_is_converted(convert):
    """Why the documentation says include=: the model is left with its own places, and what they share is replaced."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(3))
    part = convert(model[:2])
    assert type(model[0]) is nn.BatchNorm2d
    assert type(part[0]) is not nn.BatchNorm2d
    assert model[1] is part[1]
    assert type(model[1][0]) is not nn.BatchNorm2d


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


# ---- Wrappers and transformed models --------------------------------------------------------------------------------


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
