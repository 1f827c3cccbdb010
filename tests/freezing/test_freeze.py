"""freeze: what is frozen stays bit-identical whatever training does, and comes back as it was."""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
from conftest import state_of
from interrupting import Lines
from torch import Tensor, nn

from precisebn import (
    InputError,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    update_bn_stats,
)
from precisebn.freezing import freeze as freeze_module
from precisebn.freezing.freeze import freeze, frozen, unfreeze
from precisebn.freezing.parameters import trainable_parameters
from precisebn.nn import GhostBN, use_domain
from precisebn.nn.population import Recordable, RunningStatistics


def net(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.1))
    head = nn.Sequential(nn.Conv2d(6, 4, 3), norm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(backbone, head)


def images() -> Tensor:
    return 2 + 3 * torch.randn(8, 3, 8, 8)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    """As training loops do: modes change, gradients are zeroed rather than dropped, the model is evaluated between."""
    for step in range(steps):
        model.train()
        optimizer.zero_grad(set_to_none=bool(step % 2))
        model(images()).square().sum().backward()
        optimizer.step()
        model.eval()
        model(images())
    model.train()


def bits(module: nn.Module) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in module.state_dict().items()}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3], ids=["at once", "after training"])
def test_frozen_parts_stay_the_same_bit_for_bit(optimizer, before):
    """Also where the optimizer holds them already, with gradients and momentum of theirs."""
    model = net()
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, made, before)
    freeze(model, "0")
    kept, others = bits(model[0]), bits(model[1])
    train(model, made)
    assert bits(model[0]) == kept
    assert all(value != others[key] for key, value in bits(model[1]).items())


def test_without_freeze_the_running_statistics_of_such_an_encoder_move():
    """The story behind: gradients off and eval mode, which the training loop's next train() undoes."""
    model = net()
    for parameter in model[0].requires_grad_(False).eval().parameters():
        assert not parameter.requires_grad
    kept = bits(model[0])
    train(model, torch.optim.SGD(trainable_parameters(model), lr=0.1))
    moved = {key for key, value in bits(model[0]).items() if value != kept[key]}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_frozen_layer_normalizes_by_its_running_statistics_and_lets_gradients_through():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    model(images())
    freeze(model, "1")
    x = images()
    bn = model[1]
    expected = torch.nn.functional.batch_norm(model[0](x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
    y = model.train()(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.abs().max() > 0
    assert bn.weight.grad is None


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: GhostBN(c, 4), nn.InstanceNorm2d, nn.GroupNorm])
def test_unfreeze_restores_what_was_trainable_and_the_modes(norm):
    if norm is nn.GroupNorm:
        model = net(lambda c: nn.GroupNorm(2, c))
    elif norm is nn.InstanceNorm2d:
        model = net(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True))
    else:
        model = net(norm)
    model[0][0].bias.requires_grad = False
    model[1][1].eval()
    before = state_of(model)
    unfreeze(freeze(model))
    assert state_of(model) == before
    with frozen(model, "*.1"):
        assert not model[0][1].weight.requires_grad
    assert state_of(model) == before


def test_what_was_frozen_before_a_block_stays_so_behind_it():
    model = freeze(net(), "0.1")
    before = state_of(model)
    with frozen(model, "0", "1"):
        assert not any(p.requires_grad for p in model.parameters())
    assert state_of(model) == before
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.1.weight", "0.1.bias"]


def test_a_block_ends_the_freeze_also_where_an_exception_does():
    model = net()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert state_of(model) == before


def test_behind_a_freeze_a_layer_is_in_the_mode_that_was_last_asked_for():
    model = freeze(net(), "0")
    model.eval()
    unfreeze(model)
    assert not any(module.training for module in model.modules())
    freeze(model)
    model.train()
    unfreeze(model, "0")
    assert model[0][1].training
    assert not model[1][1].training


def test_statistics_alone_leave_every_parameter_in_training():
    """FrozenBN of the paper; torchvision's and timm's have no gradients either."""
    model = freeze(net(), affine=True)
    before = bits(model)
    train(model, torch.optim.SGD(trainable_parameters(model), lr=0.1))
    same = {key for key, value in bits(model).items() if value == before[key]}
    assert same == {f"{i}.1.{key}" for i in (0, 1) for key in ("running_mean", "running_var", "num_batches_tracked")}


def test_freezing_more_adds_to_what_is_frozen():
    model = net()
    before = state_of(model)
    freeze(model, "0", affine=True)
    freeze(model, "0.1")
    assert not model[0][1].weight.requires_grad
    assert model[0][0].weight.requires_grad
    unfreeze(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: loaded_by_torch(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_frozen_by_themselves(copied):
    model = freeze(net(), "0")
    other = copied(model)
    kept = bits(model), bits(other[0])
    train(other, torch.optim.SGD(trainable_parameters(other), lr=0.1))
    assert (bits(model), bits(other[0])) == kept
    unfreeze(other)
    assert other[0][1].training
    assert not model[0][1].training
    model.train()
    assert not model[0][1].training


def loaded_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_a_checkpoint_is_what_it_was_and_loads_without_a_thaw():
    model, other = net(), net()
    keys = list(model.state_dict())
    freeze(model, "0")
    assert list(model.state_dict()) == keys
    model.load_state_dict(other.state_dict())
    kept = bits(model[0])
    assert kept == bits(other[0])
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert bits(model[0]) == kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_stays_frozen_in_one_graph(one_thread):
    model = freeze(net(), "0")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    kept = bits(model[0])
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    train(compiled, optimizer, 2)
    assert bits(model[0]) == kept
    torch.export.export(model, (images(),))


def test_under_autocast_and_a_gradient_scaler_too():
    model = net()
    freeze(model, "0")
    kept, others = bits(model[0]), bits(model[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(images()).float().square().sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert bits(model[0]) == kept
    assert bits(model[1]) != others


def test_frozen_layers_are_not_recalibrated_unless_they_are_named():
    model = freeze(net(), "0")
    kept = bits(model[0])
    report = update_bn_stats(model.eval(), [images()] * 2, 2, modules="all")
    assert [layer.name for layer in report.layers] == ["1.1"]
    assert bits(model[0]) == kept
    update_bn_stats(model, [images()] * 2, 2, modules="0.1")
    assert bits(model[0]) != kept
    assert not model.train()[0][1].training


def test_conversions_pass_frozen_layers_over_and_refuse_them_by_name():
    model = freeze(net(), "0")
    before = state_of(model[0])
    convert_ghost(model, 4)
    assert isinstance(model[1][1], GhostBN)
    assert state_of(model[0]) == before
    with pytest.raises(InputError, match=r"layer '0\.1' \(BatchNorm2d\) is frozen by precisebn\.freeze.*unfreeze it"):
        convert_ghost(model, 4, include="0.1")
    with pytest.raises(InputError, match="is frozen by precisebn"):
        convert_frozen_batchnorm(model)
    assert state_of(model[0]) == before


def test_patterns_that_match_nothing_are_errors_with_what_comes_near():
    with pytest.raises(InputError, match=r"modules='0\.3x' matches no module of Sequential.*Did you mean '0\.3'"):
        freeze(net(), "0.3x")
    model = net()
    before = state_of(model)
    with pytest.raises(InputError, match="matches no module"):
        freeze(model, "0", "nowhere")
    assert state_of(model) == before


def test_a_module_of_another_model_is_an_error():
    with pytest.raises(InputError, match="the BatchNorm2d given matches no module"):
        freeze(net(), nn.BatchNorm2d(3))


def test_a_parameter_shared_with_other_parts_is_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="shared, and frozen there too: 1: '1'") as caught:
        freeze(model, "0")
    assert caught[0].filename == __file__


def test_unfreezing_what_is_not_frozen_is_told():
    with pytest.warns(UserWarning, match="nothing was frozen by freeze") as caught:
        unfreeze(net())
    assert caught[0].filename == __file__
    model = freeze(net(), "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfreeze(model)


def test_trainable_parameters_are_those_that_require_gradients_each_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    freeze(model, "2")
    assert [id(p) for p in trainable_parameters(model)] == [
        id(p) for p in (model[0].weight, model[0].bias, model[1].bias)
    ]


def test_weight_decay_leaves_out_norms_and_biases_also_of_several_domains():
    model = convert_domain_specific(net(), 3, affine="domain")
    decayed, rest = trainable_parameters(model, weight_decay=0.1)
    assert {id(p) for p in decayed["params"]} == {id(model[0][0].weight), id(model[1][0].weight)}
    assert any(p.shape == (3, 6) for p in rest["params"])
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    with use_domain(1):
        model(images()).sum().backward()
    torch.optim.SGD([decayed, rest], lr=0.1).step()


def test_nothing_to_train_is_an_error():
    with pytest.raises(InputError, match="nothing is to be trained"):
        trainable_parameters(freeze(net()))


def test_in_distributed_data_parallel_only_statistics_can_be_frozen(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(InputError, match="freeze the model first, then wrap it"):
            freeze(model, "0")
        freeze(model, "0", affine=True)
        kept = model.module[0][1].running_mean.clone()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert torch.equal(model.module[0][1].running_mean, kept)

        wrapped = nn.parallel.DistributedDataParallel(freeze(net(), "0"))
        before = bits(wrapped.module[0])
        train(wrapped, torch.optim.SGD(trainable_parameters(wrapped), lr=0.1))
        assert bits(wrapped.module[0]) == before
    finally:
        torch.distributed.destroy_process_group()


class Centered(Recordable):
    """Keeps the mean of mini-batches under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("width", torch.ones(3))

    def populations(self) -> Sequence[RunningStatistics]:
        return [RunningStatistics(self.center, self.width, None, eps=0.0)]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.center.lerp_(x.mean((0, 2, 3)), 0.1)
        return x - self.center.reshape(-1, 1, 1)


def test_a_module_that_declares_its_populations_under_other_names_is_frozen_like_any_other():
    model = nn.Sequential(Centered())
    before = bits(model)
    freeze(model).train()
    model(images())
    assert bits(model) == before
    unfreeze(model)
    assert model[0].training
    model(images())
    assert bits(model) != before


# ---- Lazy layers, threads, Ctrl-C -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
class Elsewhere(nn.Module):
    """A normalization of another library, which keeps its statistics in some other place."""

    def __init__(self, keep: Callable[[nn.Module, str, Tensor], None]) -> None:
        super().__init__()
        keep(self, "running_mean", torch.zeros(3))
        keep(self, "running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.data, self.running_var.data
        return torch.nn.functional.batch_norm(x, mean, var, training=self.training)


def as_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def with_an_attribute() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3)
    del layer.running_mean
    layer.running_mean = torch.zeros(3)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Elsewhere(setattr), lambda: Elsewhere(nn.Module.register_buffer), lambda: Elsewhere(as_parameter),
        with_an_attribute,
    ],
    ids=["attributes", "buffers", "parameters", "a BatchNorm with an attribute"],
)  # fmt: skip
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy], ids=["itself", "copy"])
def test_statistics_of_other_libraries_stand_still_wherever_they_are_kept(layer, copied):
    model = copied(freeze(nn.Sequential(nn.Conv2d(3, 3, 1), layer()), affine=True)).train()
    model(images())
    assert not model[1].running_mean.any()
    unfreeze(model)
    assert model[1].training
    model(images())
    assert model[1].running_mean.all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_code_of_torch_jit_whose_statistics_would_move_is_refused():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), nn.Conv2d(4, 4, 1))
    before = state_of(model)
    with pytest.raises(InputError, match=r"module '0\.1' is code of torch\.jit.*freeze the module"):
        freeze(model)
    assert state_of(model) == before
    freeze(model, "1")


def test_a_lazy_module_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d())
    before = state_of(model)
    with pytest.raises(InputError, match=r"module '1' \(LazyConv2d\) is lazy.*run the model on a mini-batch"):
        freeze(model)
    with pytest.raises(InputError, match=r"module '2' \(LazyBatchNorm2d\) is lazy"), frozen(model, "2"):
        pass
    assert state_of(model) == before
    freeze(model, affine=True)
    model(images())
    assert int(model[2].num_batches_tracked) == 0


@pytest.mark.parametrize("affine", [False, True])
def test_blocks_of_two_threads_may_end_in_any_order(affine):
    """The end of the first thawed what the second relied upon; or neither thawed it, if they began at the same time."""
    model = net()
    before = state_of(model)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with frozen(model, affine=affine):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    with frozen(model, "0"):
        leave.set()
        thread.join()
        assert not any(p.requires_grad for p in model[0].parameters())
        assert not model.train()[0][1].training
        assert all(p.requires_grad for p in model[1].parameters())
        assert model[1][1].training
    assert state_of(model) == before


def test_two_threads_that_freeze_at_the_same_time_thaw_all():
    """One took what the other had just frozen for what the user had frozen before."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    looks, has_frozen = threading.Event(), threading.Event()
    keeps_statistics = freeze_module._keeps_statistics

    def meet(module: nn.Module) -> bool:
        if threading.current_thread() is other and isinstance(module, nn.BatchNorm2d):
            looks.set()
            has_frozen.wait(0.3)
        return keeps_statistics(module)

    def block() -> None:
        with frozen(model):
            pass

    other = threading.Thread(target=block)
    before = state_of(model)
    with mock.patch.object(freeze_module, "_keeps_statistics", meet):
        other.start()
        assert looks.wait(30)
        with frozen(model):
            has_frozen.set()
            other.join()
    assert state_of(model) == before


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's")
@pytest.mark.usefixtures("pythons_own_handler")
def test_ctrl_c_at_any_line_leaves_nothing_frozen():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def block() -> None:
        with frozen(model):
            pass

    before = state_of(model)
    for at in range(len(Lines().run(block).ran)):
        assert Lines(lambda number, where, at=at: number == at).run(block).interrupted
        assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_statistics_in_scripted_code_are_refused_and_its_parameters_frozen():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), nn.ReLU())
    before = state_of(model)
    for act in (freeze, lambda model: freeze(model, "0.1", affine=True), lambda model: frozen(model).__enter__()):
        with pytest.raises(InputError, match=r"module '0.1' is code of torch.jit"):
            act(model)
        assert state_of(model) == before
    exported = torch.export.export(nn.Sequential(nn.BatchNorm1d(3)), (torch.randn(4, 3),)).module()
    with pytest.raises(InputError, match=r"module '' is code of torch.export"):
        freeze(exported)
    freeze(model, "0.0")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
