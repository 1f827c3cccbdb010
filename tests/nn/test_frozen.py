"""FrozenBatchNorm: what it promises while a network trains, whose checkpoints it takes, and where it fits in."""

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from conftest import values_of
from functorch.compile import make_boxed_func
from processes import Outcome, Result, skip_without_gloo
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from precisebn.errors import InputError
from precisebn.nn import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile, torch.export and torch.onnx of 2.10 to 2.13 warn of their own use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]

NO_BATCHES = (torch.int64, bytes(8))
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Each class with its counterpart in torch and the shapes that it takes.
CLASSES = [
    (FrozenBatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (FrozenBatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (FrozenBatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 2)),
    (FrozenBatchNorm3d, nn.BatchNorm3d, (2, 4, 3, 2, 2)),
]


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer with statistics, weight and bias that no two channels share."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values.abs() + 0.2 if name.endswith("running_var") else values)
    return layer


def normalized(x: Tensor, layer: nn.Module) -> np.ndarray:
    """By the definition, in float64."""
    broadcast = (1, -1, *(1 for _ in x.shape[2:]))
    mean, var, weight, bias = (
        t.detach().double().numpy().reshape(broadcast)
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x.detach().double().numpy() - mean) / np.sqrt(var + layer.eps) * weight + bias


def assert_normalizes(y: Tensor, expected: np.ndarray, roundings: int = 16) -> None:
    """Equal to a few roundings of values of order 1 to 10, as :func:`drawn` gives."""
    tolerance = max(torch.finfo(y.dtype).eps, EPS if y.dtype != torch.float64 else 0.0) * roundings
    np.testing.assert_allclose(y.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


# ---- What it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("frozen", "_", "shape"), CLASSES)
def test_normalizes_by_the_definition_in_every_dtype_and_mode(frozen, _, shape, dtype, training):
    layer = drawn(frozen(4, eps=1e-3)).train(training)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert_normalizes(y, normalized(x, layer))
    dy = torch.randn(shape).to(dtype)
    y.backward(dy)
    scale = (layer.weight.double() / (layer.running_var.double() + 1e-3).sqrt()).reshape(1, -1, *(1 for _ in shape[2:]))
    assert_normalizes(x.grad, (dy.double() * scale).numpy())


@pytest.mark.parametrize(("frozen", "bn", "shape"), CLASSES)
def test_equals_torch_in_evaluation(frozen, bn, shape):
    theirs = drawn(bn(4)).eval()
    ours = frozen(4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(ours.train()(x), theirs(x), rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_other_precision_compute_in_float32_at_least(dtype, affine):
    """The layer's numbers are rounded to the dtype; nothing else is, but the result."""
    layer = drawn(FrozenBatchNorm2d(4, affine=affine)).to(dtype)
    assert {t.dtype for t in layer.buffers()} == {dtype, torch.int64}
    x = torch.randn(3, 4, 2, 2).to(dtype)
    y = layer(x)
    stand_in = FrozenBatchNorm2d(4) if not affine else layer
    stand_in.running_mean, stand_in.running_var = layer.running_mean, layer.running_var
    assert y.dtype == dtype
    assert_normalizes(y, normalized(x, stand_in), roundings=4 if dtype in (torch.float16, torch.bfloat16) else 16)


@pytest.mark.parametrize(
    ("frozen", "shape", "memory_format"),
    [
        (FrozenBatchNorm2d, (3, 4, 5, 2), torch.channels_last),
        (FrozenBatchNorm3d, (2, 4, 3, 2, 2), torch.channels_last_3d),
    ],
)
def test_keeps_channels_last(frozen, shape, memory_format):
    layer = drawn(frozen(4))
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.stride() == x.stride()
    assert_normalizes(y, normalized(x, layer))
    y.backward(torch.randn(shape))
    assert x.grad.stride() == x.stride()


def test_a_batch_may_be_empty():
    x = torch.randn(0, 4, 3, 3, requires_grad=True)
    FrozenBatchNorm2d(4)(x).sum().backward()
    assert x.grad.shape == (0, 4, 3, 3)


# ---- While a network trains ---------------------------------------------------------------------------------------


def net(**arguments: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), drawn(FrozenBatchNorm2d(4, **arguments)), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)
    )


def train(model: nn.Module, steps: int = 100, steps_per_epoch: int = 10) -> None:
    """With everything that could move what should stand still: momentum, weight decay, and .train() in each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2)
    for step in range(steps):
        if step % steps_per_epoch == 0:
            model.train()
        optimizer.zero_grad()
        model(torch.randn(2, 3, 7, 7) * 3 + 1).square().mean().backward()
        optimizer.step()


def test_a_hundred_steps_leave_every_bit_as_it_was_and_train_the_layers_around():
    model = net()
    before, around = values_of(model[1]), values_of(nn.ModuleList([model[0], model[3]]))
    assert set(before) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert list(model[1].parameters()) == []
    train(model)
    assert values_of(model[1]) == before
    after = values_of(nn.ModuleList([model[0], model[3]]))
    assert all(after[key] != around[key] for key in around)  # the first layer too, which lies behind the frozen one


def test_a_trainable_affine_trains_and_the_statistics_stand_still():
    model = net(trainable_affine=True)
    before = values_of(model[1])
    assert [name for name, _ in model[1].named_parameters()] == ["weight", "bias"]
    train(model, steps=10)
    changed = {key for key, value in values_of(model[1]).items() if value != before[key]}
    assert changed == {"weight", "bias"}


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_are_those_of_batch_normalization_with_constant_statistics(trainable):
    """Also with an in-place ReLU behind, which overwrites the output."""
    model = net(trainable_affine=trainable).double()
    reference = nn.Sequential(model[0], nn.BatchNorm2d(4).double().eval(), nn.ReLU(), model[3])
    reference[1].load_state_dict(model[1].state_dict())
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    of_affine = [[m.weight, m.bias] if trainable else [] for m in (model[1], reference[1])]
    ours, theirs = (
        torch.autograd.grad(m(x).square().sum(), [m[0].weight, m[0].bias, *of])
        for m, of in zip((model, reference), of_affine, strict=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_activation_is_saved_for_backward_unless_the_affine_trains():
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    sizes: dict[bool, list[int]] = {}
    for trainable in (False, True):
        layer, saved = drawn(FrozenBatchNorm2d(3, trainable_affine=trainable)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            layer(x).sum()
        sizes[trainable] = sorted(t.numel() for t in saved)
    assert max(sizes[False]) <= 3
    assert [size for size in sizes[True] if size > 3] == [x.numel()]


def test_two_forwards_before_one_backward():
    model = net()
    a, b = torch.randn(2, 3, 7, 7), torch.randn(2, 3, 7, 7)
    (model(a).sum() + model(b).sum()).backward()
    both = model[0].weight.grad.clone()
    model.zero_grad()
    for x in (a, b):
        model(x).sum().backward()
    torch.testing.assert_close(both, model[0].weight.grad, rtol=64 * EPS, atol=64 * EPS)


def test_hooks_run():
    layer, seen = drawn(FrozenBatchNorm2d(4)), []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, output: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, grads: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda m, grads, of_output: seen.append((grads[0].clone(), of_output[0].clone())))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert seen[:3] == ["pre", "forward", "backward pre"]
    ((grad_input, grad_output),) = seen[3:]
    assert torch.equal(grad_input, x.grad)
    torch.testing.assert_close(grad_output, 2 * layer(x))


def test_nothing_that_treats_batch_norms_alike_takes_it_for_one():
    model = net()
    before = values_of(model)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model)[1] is model[1]
    torch.optim.swa_utils.update_bn([torch.randn(2, 3, 7, 7)], model)
    assert values_of(model) == before


# ---- As a module --------------------------------------------------------------------------------------------------


def test_constructor_and_repr_are_those_of_torch():
    arguments = (8, 1e-3, 0.2, True, True, "cpu", torch.float64)
    ours, theirs = FrozenBatchNorm2d(*arguments), nn.BatchNorm2d(*arguments)
    for trainable in (False, True):  # what an affine does is said either way
        shown = repr(theirs).replace("BatchNorm2d(", "FrozenBatchNorm2d(")[:-1] + f", trainable_affine={trainable})"
        assert repr(FrozenBatchNorm2d(*arguments, trainable_affine=trainable)) == shown
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
        assert ours.state_dict()[key].dtype == value.dtype


def copied_by_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), copied_by_torch_save]
)
def test_copies(copied, trainable):
    layer = drawn(FrozenBatchNorm2d(4, eps=1e-2, trainable_affine=trainable)).eval()
    copy_of = copied(layer)
    assert type(copy_of) is FrozenBatchNorm2d
    assert values_of(copy_of) == values_of(layer)
    assert [name for name, _ in copy_of.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert repr(copy_of) == repr(layer)
    x = torch.randn(2, 4, 3, 3)
    expected = layer(x)
    with torch.no_grad():
        layer.running_mean.zero_()
    assert torch.equal(copy_of(x), expected)


@pytest.mark.parametrize("trainable", [False, True])
def test_built_on_meta_and_materialized(trainable):
    with torch.device("meta"):
        model = nn.Sequential(FrozenBatchNorm2d(4, trainable_affine=trainable))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(torch.empty(2, 4, 3, 3, device="meta")).shape == (2, 4, 3, 3)
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    new = nn.Sequential(FrozenBatchNorm2d(4, trainable_affine=trainable))
    assert values_of(model) == values_of(new)
    loaded = drawn(nn.Sequential(nn.BatchNorm2d(4)))
    model.load_state_dict(loaded.state_dict())
    assert values_of(model) == values_of(loaded)

    with torch.device("meta"):
        assigned = nn.Sequential(FrozenBatchNorm2d(4, trainable_affine=trainable))
    assigned.load_state_dict(loaded.state_dict(), assign=True)
    assert values_of(assigned) == values_of(loaded)
    assert len(list(assigned.parameters())) == (2 if trainable else 0)


# ---- Checkpoints --------------------------------------------------------------------------------------------------

STATE = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("frozen", "bn", "shape"), CLASSES)
def test_state_dicts_are_those_of_torch_both_ways(frozen, bn, shape, trainable):
    theirs = drawn(bn(4))
    theirs(torch.randn(shape))  # counts a mini-batch
    ours = frozen(4, trainable_affine=trainable)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert values_of(ours) == values_of(theirs)
    back = bn(4)
    back.load_state_dict(ours.state_dict())
    assert values_of(back) == values_of(theirs)
    assert [p.requires_grad for p in ours.parameters()] == [True] * (2 if trainable else 0)


def test_a_checkpoint_of_batch_norm_is_not_taken_for_detectron2_version_2_though_both_say_2():
    """The trap: nn.BatchNorm's format is version 2 too, and detectron2 would take eps off its variance."""
    theirs = nn.Sequential(drawn(nn.BatchNorm2d(4, eps=0.1)))
    checkpoint = theirs.state_dict()
    assert checkpoint._metadata["0"] == {"version": 2}
    assert "0.num_batches_tracked" in checkpoint
    ours = nn.Sequential(FrozenBatchNorm2d(4, eps=0.1))
    ours.load_state_dict(checkpoint)
    assert torch.equal(ours[0].running_var, theirs[0].running_var)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(theirs))
    ours.load_state_dict(sync.state_dict())
    assert torch.equal(ours[0].running_var, theirs[0].running_var)


def test_an_own_checkpoint_round_trips():
    first, second = nn.Sequential(drawn(FrozenBatchNorm2d(4))), nn.Sequential(FrozenBatchNorm2d(4))
    # What detectron2 tells by: this running_var is without eps.
    assert first.state_dict()._metadata["0"] == {"version": 3}
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert values_of(second) == values_of(first)


class Detectron2Frozen(nn.Module):
    """What detectron2's FrozenBatchNorm2d kept and computed, in the versions of its format.

    1, and checkpoints converted from Caffe2: weight and bias, into which the statistics are folded. 2: also a
    running_var to which eps had been added. 3: a running_var as torch's.
    """

    def __init__(self, version: int) -> None:
        super().__init__()
        self._version = version
        self.eps = 1e-2  # large, so that an eps too much or too little shows
        for name in STATE[: 2 if version == 1 else 4]:
            self.register_buffer(name, torch.ones(4))
        drawn(self, seed=version)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias))
        if self._version == 1:
            return x * weight + bias
        mean, var = (t.reshape(1, -1, 1, 1) for t in (self.running_mean, self.running_var))
        return (x - mean) / (var if self._version == 2 else var + self.eps).sqrt() * weight + bias

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        assert state._metadata[kwargs.get("prefix", "")[:-1]] == {"version": self._version}
        return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_checkpoints_of_detectron2(version, dtype):
    theirs = nn.Sequential(nn.Identity(), Detectron2Frozen(version).to(dtype))
    checkpoint = theirs.state_dict()
    before = {key: value.clone() for key, value in checkpoint.items()}
    ours = nn.Sequential(nn.Identity(), FrozenBatchNorm2d(4, eps=1e-2))
    ours[1].num_batches_tracked.fill_(7)
    ours.load_state_dict(checkpoint)
    assert int(ours[1].num_batches_tracked) == 0
    x = torch.randn(3, 4, 5, 2)
    with torch.no_grad():
        expected = theirs.double()(x.double())
    # Twice: taking eps off the variance in a half precision rounds it there.
    roundings = 16 if dtype in (torch.float32, torch.float64) or version != 2 else torch.finfo(dtype).eps / EPS
    assert_normalizes(ours(x), expected.numpy(), roundings=roundings)
    assert set(checkpoint) == set(before)  # the user's own, which may be loaded again
    assert all(torch.equal(checkpoint[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_of_caffe2_is_an_affine_map(dtype):
    """As read from a pickle: a plain dict without metadata; weight and bias stand for the whole layer."""
    weight, bias = torch.randn(4).to(dtype), torch.randn(4).to(dtype)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), drawn(FrozenBatchNorm2d(4, eps=1e-3)))
    rest = {f"0.{name}": value for name, value in model[0].state_dict().items()}
    model.load_state_dict({**rest, "1.weight": weight, "1.bias": bias})
    x = torch.randn(3, 4, 5, 2)
    y = model[1](x)
    torch.testing.assert_close(y, x * weight.reshape(-1, 1, 1) + bias.reshape(-1, 1, 1), rtol=4 * EPS, atol=4 * EPS)


def test_a_plain_dict_with_four_tensors_is_taken_as_it_is():
    theirs = drawn(nn.BatchNorm2d(4))
    ours = FrozenBatchNorm2d(4)
    ours.load_state_dict({name: theirs.state_dict()[name] for name in STATE})
    torch.testing.assert_close(ours(x := torch.randn(3, 4, 5, 2)), theirs.eval()(x), rtol=8 * EPS, atol=8 * EPS)


def test_checkpoints_of_torchvision_both_ways(torchvision):
    theirs = nn.Sequential(drawn(torchvision.ops.FrozenBatchNorm2d(4)))
    assert set(theirs.state_dict()) == {f"0.{name}" for name in STATE}
    assert theirs.state_dict()._metadata["0"] == {"version": 1}
    ours = nn.Sequential(FrozenBatchNorm2d(4))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 5, 2)
    assert_normalizes(ours(x), normalized(x, theirs[0]))
    torch.testing.assert_close(ours(x), theirs(x), rtol=8 * EPS, atol=8 * EPS)
    back = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4))
    back.load_state_dict(ours.state_dict())
    assert values_of(back) == values_of(theirs)


def with_version(state: Mapping[str, Tensor], version: int | None) -> dict[str, Tensor]:
    """A checkpoint of a Sequential whose only layer is in a format of this version."""
    checkpoint = nn.Module().state_dict()
    checkpoint.update({f"0.{name}": value for name, value in state.items()})
    if version is not None:
        checkpoint._metadata["0"] = {"version": version}
    return checkpoint


FULL = {name: torch.ones(4) for name in STATE}

BROKEN_CHECKPOINTS = {
    "nothing": ({}, None, r'Missing key\(s\).*"0.weight", "0.bias", "0.running_mean", "0.running_var"'),
    "no bias": ({"weight": torch.ones(4)}, 1, r'Missing key\(s\).*"0.bias"'),
    "no mean": ({k: v for k, v in FULL.items() if k != "running_mean"}, None, r'Missing key\(s\).*"0.running_mean"'),
    "no variance": ({k: v for k, v in FULL.items() if k != "running_var"}, 2, r'Missing key\(s\).*"0.running_var"'),
    "a BatchNorm without statistics": (
        nn.BatchNorm2d(4, track_running_stats=False).state_dict(),
        2,
        r'Missing key\(s\).*"0.running_mean", "0.running_var"',
    ),
    "other channels": ({name: torch.ones(5) for name in STATE}, 3, "size mismatch for 0.running_mean"),
    "other channels, Caffe2": ({name: torch.ones(5) for name in STATE[:2]}, None, "size mismatch for 0.weight"),
    "something else": ({**FULL, "scale": torch.ones(4)}, 3, r'Unexpected key\(s\).*"0.scale"'),
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_other_checkpoints_are_errors_that_name_the_layer(name):
    state, version, message = BROKEN_CHECKPOINTS[name]
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(FrozenBatchNorm2d(4)).load_state_dict(with_version(state, version))


# ---- Where it fits in ---------------------------------------------------------------------------------------------


def test_in_a_torchvision_resnet(torchvision):
    build = torchvision.models.resnet18
    plain = drawn(build(num_classes=3)).eval()
    frozen = build(num_classes=3, norm_layer=FrozenBatchNorm2d)
    frozen.load_state_dict(plain.state_dict())
    theirs = build(num_classes=3, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    theirs.load_state_dict(plain.state_dict())
    of_theirs = build(num_classes=3, norm_layer=FrozenBatchNorm2d)
    of_theirs.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = plain(x)
        scale = expected.abs().max().item()
        for model in (frozen, of_theirs):
            # 20 layers, each some roundings away.
            torch.testing.assert_close(model(x), expected, rtol=0, atol=512 * EPS * scale)
    assert {name for name, p in frozen.named_parameters() if "bn" in name or "downsample.1" in name} == set()


def test_under_autocast():
    model = net(trainable_affine=True)
    seen = []
    model[1].register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 7, 7)).float().square().sum()
    loss.backward()
    ((x, y),) = seen
    assert x.dtype == y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("trainable", [False, True])
def test_compiles_into_plain_arithmetic_and_equals_eager(trainable):
    operators = set()

    def collect(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    eager = net(trainable_affine=trainable)
    of_compiled = copy.deepcopy(eager)
    compiled = torch.compile(
        of_compiled, fullgraph=True, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect)
    )
    x = torch.randn(2, 3, 7, 7)
    ours, theirs = compiled(x), eager(x)
    torch.testing.assert_close(ours, theirs, rtol=16 * EPS, atol=16 * EPS)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for p, q in zip(of_compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=64 * EPS, atol=256 * EPS)
    assert values_of(of_compiled[1]) == values_of(eager[1])
    assert operators
    assert not [name for name in operators if "precisebn" in name]


def test_torch_export_holds_nothing_of_this_library():
    model = net().eval()
    x = torch.randn(2, 3, 7, 7)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    assert "precisebn" not in str(program.graph)
    for n in (2, 5):
        x = torch.randn(n, 3, 7, 7)
        torch.testing.assert_close(program.module()(x), model(x), rtol=16 * EPS, atol=16 * EPS)


def test_onnx_export_folds_into_the_convolution_before():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = net().eval(), torch.randn(2, 3, 7, 7)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph] == ["Conv", "Relu", "Conv"]
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("trainable", [False, True])
def test_symbolic_trace(trainable):
    model = net(trainable_affine=trainable)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(traced(x), model(x), rtol=16 * EPS, atol=16 * EPS)
    traced(x).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    # What a forward does not use, the traced module does not hold.
    assert values_of(model).items() - values_of(traced).items() == {("1.num_batches_tracked", NO_BATCHES)}


GRAPHS = {
    "compile": lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager"),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "trace": torch.jit.trace,
    "script": lambda layer, x: torch.jit.script(layer),
    "fx": lambda layer, x: torch.fx.symbolic_trace(layer),
}


@pytest.mark.parametrize("graph_of", GRAPHS.values(), ids=GRAPHS)
def test_every_graph_takes_eps_0(graph_of):
    """As torchvision's pretrained detectors have it, and ``F.batch_norm`` of torch 2.10 does not."""
    torch._dynamo.reset()
    layer, x = drawn(FrozenBatchNorm2d(4, eps=0.0)), torch.randn(3, 4, 5, 2)
    expected = normalized(x, layer)
    for call in (layer, graph_of(layer, x)):
        np.testing.assert_allclose(call(x).numpy(), expected, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("convolution", "frozen"),
    [
        (nn.Conv1d(3, 4, 3), FrozenBatchNorm1d),
        (nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d),
        (nn.Conv3d(3, 4, 2), FrozenBatchNorm3d),
        (nn.ConvTranspose2d(3, 4, 3), FrozenBatchNorm2d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value.__name__,
)
def test_folds_into_a_convolution(convolution, frozen, affine):
    convolution = copy.deepcopy(convolution).double().eval()
    layer = drawn(frozen(4, affine=affine)).double().eval()
    fused = fuse_conv_bn_eval(convolution, layer, transpose=isinstance(convolution, nn.ConvTranspose2d))
    x = torch.randn(2, 3, *[5] * (convolution.weight.dim() - 2), dtype=torch.float64)
    torch.testing.assert_close(fused(x), layer(convolution(x)), rtol=1e-13, atol=1e-13)


def test_folds_into_a_linear_layer():
    linear, layer = nn.Linear(3, 4).double().eval(), drawn(FrozenBatchNorm1d(4)).double().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(fuse_linear_bn_eval(linear, layer)(x), layer(linear(x)), rtol=1e-13, atol=1e-13)


def train_on_a_rank(rank: int, world: int) -> Result:
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-2)
    for step in range(3):
        x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(10 * step + rank))
        # Two forwards before a backward: DDP writes buffers in between, and backward must not mind.
        loss = ddp(x).square().mean() + ddp(x + 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values_of(model)


def test_ddp_trains_the_layers_around_and_leaves_every_bit_as_it_was(tmp_path):
    skip_without_gloo()
    first, second = Outcome([train_on_a_rank], 2, tmp_path).of(train_on_a_rank)
    assert first == second
    before = values_of(net())
    changed = {key for key in before if first[key] != before[key]}
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias"}


# ---- Wrong calls --------------------------------------------------------------------------------------------------

WRONG_CALLS = {
    "2d on 3 dimensions": (
        FrozenBatchNorm2d(4),
        torch.ones(2, 4, 3),
        r"\(4\) takes .* of 4 dimensions, got.*\(2, 4, 3\)",
    ),
    "2d on 5 dimensions": (FrozenBatchNorm2d(4), torch.ones(2, 4, 3, 3, 3), "of 4 dimensions"),
    "1d on an image": (FrozenBatchNorm1d(4), torch.ones(2, 4, 3, 3), r"FrozenBatchNorm1d\(4\) .* of 2 or 3 dimensions"),
    "3d on an image": (FrozenBatchNorm3d(4), torch.ones(2, 4, 3, 3), "of 5 dimensions"),
    "other channels": (FrozenBatchNorm2d(4), torch.ones(2, 3, 5, 5), r"\(N, 4, \*\).* got shape \(2, 3, 5, 5\)"),
    "channels not second": (FrozenBatchNorm2d(4), torch.ones(2, 5, 5, 4), r"got shape \(2, 5, 5, 4\)"),
    "a list": (FrozenBatchNorm2d(4), [torch.ones(2, 4, 5, 5)], "takes tensors .* got list"),
    "integers": (FrozenBatchNorm2d(4), torch.ones(2, 4, 5, 5, dtype=torch.uint8), "uint8"),
    "another device": (FrozenBatchNorm2d(4), torch.ones(2, 4, 5, 5, device="meta"), "mean is on cpu, but x on meta"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong(name):
    layer, x, message = WRONG_CALLS[name]
    with pytest.raises(InputError, match=message):
        layer(x)


def test_statistics_cannot_be_done_without():
    with pytest.raises(InputError, match="track_running_stats=False leaves no statistics"):
        FrozenBatchNorm2d(4, track_running_stats=False)


def test_a_checkpoint_of_the_trained_parameters_alone_leaves_the_statistics_as_they_are():
    """It must not be taken for Caffe2's, which means an affine map by the same two keys."""
    layer = FrozenBatchNorm2d(4, trainable_affine=True)
    layer.running_mean.fill_(5.0)
    layer.running_var.fill_(9.0)
    checkpoint = {name: torch.full_like(value, 2.0) for name, value in layer.named_parameters()}
    missing = layer.load_state_dict(checkpoint, strict=False).missing_keys
    assert {"running_mean", "running_var"} <= set(missing)
    assert layer.weight.tolist() == [2.0] * 4
    assert (layer.running_mean[0].item(), layer.running_var[0].item()) == (5.0, 9.0)


def test_taking_eps_off_never_makes_a_variance_negative():
    """nn.BatchNorm's state dict without its count of mini-batches looks like detectron2's version 2."""
    source = nn.BatchNorm2d(4)
    source.running_var.fill_(1e-6)
    checkpoint = source.state_dict()
    del checkpoint["num_batches_tracked"]
    frozen = FrozenBatchNorm2d(4)
    frozen.load_state_dict(checkpoint)
    assert frozen.running_var.min().item() == 0.0
