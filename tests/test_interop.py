"""Real models, wrappers and ways of running them: each recalibrates as the plain model does."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import state_of, values_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from precisebn import InsufficientDataError, update_bn_stats
from precisebn.models.families import normalizes_its_input

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13 warns of its own use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

EPS = torch.finfo(torch.float32).eps
BATCHES = [torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(n)) for n in (8, 5, 8, 8)]


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Flatten()
    )


def recalibrated() -> dict[str, Any]:
    """State dict of the plain net after recalibration."""
    model = convnet()
    update_bn_stats(model, BATCHES, 4)
    return values_of(model)


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    """The largest distance of the running statistics of two models: in standard deviations, and relatively."""
    distances = [0.0]
    for ours, theirs in zip(_bn(a), _bn(b), strict=True):
        std = theirs.running_var.double().sqrt()
        distances.append(((ours.running_mean.double() - theirs.running_mean.double()).abs() / std).max().item())
        distances.append((ours.running_var.double() / theirs.running_var.double() - 1).abs().max().item())
    return float(np.max(distances))


def _bn(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


# ---- Model zoos ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), [("resnet10t", "BatchNorm2d"), ("efficientnet_b0", "BatchNormAct2d")])
def test_timm_models_agree_with_fvcore(timm, fvcore_bn, name, layer):
    ours = timm.create_model(name, pretrained=False, num_classes=2, drop_rate=0.0, drop_path_rate=0.0).train()
    assert any(type(bn).__name__ == layer for bn in _bn(ours))
    theirs = copy.deepcopy(ours)
    batches = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    assert all(map(normalizes_its_input, _bn(ours)))  # so that the fast and exact way is taken
    report = update_bn_stats(ours, batches, 2)
    fvcore_bn.update_bn_stats(theirs, batches, 2)
    assert len(report.layers) == len(_bn(ours))
    # A float32 network of 12 to 50 normalized layers: some ulps each, which later ones amplify.
    assert largest_difference(ours, theirs) < 1e-3


def test_torchvision_resnet18_agrees_with_fvcore(torchvision, fvcore_bn):
    ours = torchvision.models.resnet18(num_classes=2)
    theirs = copy.deepcopy(ours)
    batches = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    report = update_bn_stats(ours, batches, 2)
    fvcore_bn.update_bn_stats(theirs, batches, 2)
    assert report.layers[0].name == "bn1"
    assert largest_difference(ours, theirs) < 1e-3


def test_torch_swa_utils_agrees_on_batches_of_one_size():
    """update_bn of swa_utils averages mini-batches' means and unbiased variances: our estimator "batch-mean"."""
    ours, theirs = convnet(), convnet()
    batches = [torch.randn(8, 3, 10, 10) for _ in range(6)]
    update_bn_stats(ours, batches, None, estimator="batch-mean")
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert largest_difference(ours, theirs) < 64 * EPS


# ---- Precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_precision(dtype):
    model, reference = convnet().to(dtype), convnet().double()
    update_bn_stats(model, [batch.to(dtype) for batch in BATCHES], 4)
    update_bn_stats(reference, [batch.double() for batch in BATCHES], 4)
    assert _bn(model)[0].running_var.dtype == dtype
    # Weights, inputs and every result are rounded to the dtype; what comes of it averages over thousands of values.
    assert largest_difference(model, reference) < max(16 * torch.finfo(dtype).eps, 1e-12)


def test_autocast_bfloat16():
    model, reference = convnet(), convnet()
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    update_bn_stats(model, BATCHES, 4, forward=forward)
    update_bn_stats(reference, BATCHES, 4)
    assert set(seen) == {torch.bfloat16}
    assert _bn(model)[0].running_var.dtype == torch.float32
    assert 0 < largest_difference(model, reference) < 16 * torch.finfo(torch.bfloat16).eps


def test_autocast_around_the_call():
    inside, around = convnet(), convnet()
    with torch.autocast("cpu", torch.bfloat16):
        update_bn_stats(around, BATCHES, 4)
    update_bn_stats(inside, BATCHES, 4, forward=torch.autocast("cpu", torch.bfloat16)(lambda m, x: m(x)))
    assert values_of(inside) == values_of(around)


# ---- Wrappers and transformed models ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, nn.Sequential], ids=lambda wrap: wrap.__name__)
def test_wrapped_models(wrap):
    model = wrap(convnet())
    before = state_of(model)
    report = update_bn_stats(model, BATCHES, 4)
    inner = next(module for module in model.modules() if isinstance(module, nn.Sequential) and len(module) == 6)
    assert values_of(inner) == recalibrated()
    assert len(report.layers) == 2
    changed = {key.rsplit(".", 1)[-1] for key in before.differences(state_of(model))}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_averaged_weights_are_what_the_statistics_are_taken_of():
    net = convnet()
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    with torch.no_grad():
        net[0].weight.mul_(3.0)
    averaged.update_parameters(net)
    update_bn_stats(averaged, BATCHES, 4)
    doubled = convnet()
    with torch.no_grad():
        doubled[0].weight.mul_(2.0)  # the mean of 1 and 3 times
    update_bn_stats(doubled, BATCHES, 4)
    assert largest_difference(averaged.module, doubled) < 64 * EPS


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_in_one_process(one_rank):
    ddp = nn.parallel.DistributedDataParallel(convnet())
    before = state_of(ddp)
    report = update_bn_stats(ddp, BATCHES, 4)
    assert values_of(ddp.module) == recalibrated()
    assert [layer.name for layer in report.layers] == ["1", "4"]
    changed = set(before.differences(state_of(ddp)))
    assert changed - {":_lazy_init_ran"} == {  # DDP's own note of its first forward
        f"module.{layer.name}.{buffer}"
        for layer in report.layers
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    ddp(BATCHES[0]).sum().backward()  # it still reduces gradients and synchronizes buffers
    assert ddp.require_forward_param_sync


def test_fx_graph_modules():
    model = torch.fx.symbolic_trace(convnet())
    update_bn_stats(model, BATCHES, 4)
    assert values_of(model) == recalibrated()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.net = convnet()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


# checkpoint(use_reentrant=True) warns that its input needs no gradient, as in any forward without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_every_value_once(use_reentrant):
    model = Checkpointed(use_reentrant)
    report = update_bn_stats(model, BATCHES, 4)
    assert values_of(model.net) == recalibrated()
    assert report.layers[0].count == sum(map(len, BATCHES)) * 64


@pytest.mark.parametrize(
    "parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrized_convolutions(parametrize):
    model, plain = convnet(), convnet()
    parametrize(model[0])
    model.eval()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
    update_bn_stats(model, BATCHES, 4, modules="all")
    update_bn_stats(plain, BATCHES, 4)
    assert largest_difference(model, plain) < 64 * EPS


def test_channels_last():
    model, plain = convnet().to(memory_format=torch.channels_last), convnet()
    update_bn_stats(model, [batch.to(memory_format=torch.channels_last) for batch in BATCHES], 4)
    update_bn_stats(plain, BATCHES, 4)
    assert largest_difference(model, plain) < 64 * EPS


def test_quantization_aware_conv_bn(fvcore_bn):
    """torch.ao's ConvBn2d scales its weight by the running variance before its BatchNorm runs."""
    qat = pytest.importorskip("torch.ao.nn.intrinsic.qat", reason="this torch has no torch.ao.quantization any more")
    quantization = pytest.importorskip("torch.ao.quantization")
    ours = nn.Sequential(qat.ConvBn2d(3, 6, 3, qconfig=quantization.get_default_qat_qconfig("fbgemm")))
    for batch in BATCHES:
        ours(batch)  # observers learn the range of the weights
    theirs = copy.deepcopy(ours)
    report = update_bn_stats(ours, BATCHES, 4)
    fvcore_bn.update_bn_stats(theirs, BATCHES, 4)
    assert [layer.name for layer in report.layers] == ["0.bn"]
    # Weights are rounded to 8 bits on a grid that the variance stretches: biased here, unbiased in fvcore.
    assert largest_difference(ours, theirs) < 2**-7


# ---- torch.compile ------------------------------------------------------------------------------------------------


class Compiler:
    """A backend of torch.compile that runs graphs as they are, and counts how many it got and how often they ran."""

    def __init__(self) -> None:
        self.compilations = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compilations += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


class Net(nn.Module):
    """A class of the user's: ``compile()`` of nn.Sequential and other classes of torch itself compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _compile_whole(net: nn.Module, compiler: Compiler) -> nn.Module:
    return torch.compile(net, backend=compiler)


def _compile_in_place(net: nn.Module, compiler: Compiler) -> nn.Module:
    net.compile(backend=compiler)
    return net


def _compile_a_submodule(net: nn.Module, compiler: Compiler) -> nn.Module:
    return nn.Sequential(_compile_in_place(net, compiler), nn.ReLU())


def _compile_the_forward(net: nn.Module, compiler: Compiler) -> nn.Module:
    net.forward = torch.compile(net.forward, backend=compiler)
    return net


COMPILED = {
    "torch.compile(model)": _compile_whole,
    "model.compile()": _compile_in_place,
    "model.part.compile()": _compile_a_submodule,
    "model.forward = torch.compile(model.forward)": _compile_the_forward,
}


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch._dynamo.reset()
    yield Compiler()
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_code_is_neither_used_wrongly_nor_thrown_away(compiler, how, training):
    plain = nn.Sequential(Net(), nn.ReLU() if how == "model.part.compile()" else nn.Identity()).train(training)
    model = COMPILED[how](copy.deepcopy(plain[0]), compiler)
    with torch.no_grad():
        model(BATCHES[0])
        plain(BATCHES[0])
        assert (compiler.compilations, compiler.runs) == (1, 1)

        report = update_bn_stats(model, BATCHES, 4, modules="all")
        update_bn_stats(plain, BATCHES, 4, modules="all")
        assert (compiler.compilations, compiler.runs) == (1, 1)  # compiled code would not see the recording
        assert [layer.name.removeprefix("0.") for layer in report.layers] == ["layers.1", "layers.4"]

        output, expected = model(BATCHES[0]), plain(BATCHES[0])
    assert (compiler.compilations, compiler.runs) == (1, 2)
    torch.testing.assert_close(output, expected, rtol=64 * EPS, atol=64 * EPS)
    assert largest_difference(model, plain) < 64 * EPS


def test_a_model_not_yet_compiled_compiles_after_recalibration(compiler):
    model = torch.compile(convnet(), backend=compiler)
    update_bn_stats(model, BATCHES, 4)
    assert compiler.compilations == 0
    assert values_of(model._orig_mod) == recalibrated()
    with torch.no_grad():
        model.eval()(BATCHES[0])
    assert (compiler.compilations, compiler.runs) == (1, 1)


def test_compiled_code_is_used_again_after_a_failure(compiler):
    model = torch.compile(convnet().eval(), backend=compiler)
    with torch.no_grad():
        expected = model(BATCHES[0])
        with pytest.raises(InsufficientDataError):
            update_bn_stats(model, BATCHES, 5, modules="all")
        assert torch.equal(model(BATCHES[0]), expected)
    assert (compiler.compilations, compiler.runs) == (1, 2)


@pytest.mark.parametrize("order", ["compile(DDP)", "DDP(compile)"])
def test_ddp_and_compile_together(one_rank, compiler, order):
    ddp, compiled = nn.parallel.DistributedDataParallel, torch.compile
    net = convnet()
    model = compiled(ddp(net), backend=compiler) if order == "compile(DDP)" else ddp(compiled(net, backend=compiler))
    model(BATCHES[0])
    counts = compiler.compilations, compiler.runs
    update_bn_stats(model, BATCHES, 4)
    assert (compiler.compilations, compiler.runs) == counts
    values, expected = values_of(net), recalibrated()
    del values["1.num_batches_tracked"], values["4.num_batches_tracked"]  # one more: the forward above
    assert all(values[key] == expected[key] for key in values)
    model(BATCHES[0])
    assert compiler.compilations == counts[0]


def test_data_loaders_with_workers(torchvision):
    """Any iterable will do; this one is torch's own, with labels and a last mini-batch that is smaller."""
    data = torch.utils.data.TensorDataset(torch.cat(BATCHES), torch.arange(sum(map(len, BATCHES))))
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=1)
    model, plain = convnet(), convnet()
    report = update_bn_stats(model, loader, None)
    update_bn_stats(plain, torch.cat(BATCHES).split(8), None)
    assert values_of(model) == values_of(plain)
    assert (report.num_iters, report.num_samples) == (4, 29)
    assert update_bn_stats(model, itertools.cycle(loader), 9).num_iters == 9
