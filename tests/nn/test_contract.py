"""What every module of precisebn.nn promises: one test a column of the table in docs/modules.md, one case a row.

Each module stands in a small network behind a convolution, and sees two tensors: two levels, or two domains, or one
after the other, whatever its way is. What a module computes from them is told by a few lines of float64
(``reference.py``); the tests in the other files of this folder look at each module more closely.
"""

import copy
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import state_of, values_of
from processes import Outcome, Result, skip_without_gloo
from reference import (
    Reference,
    Running,
    assert_is,
    batch_normalized,
    normalized,
    sample,
    with_random_affine,
    with_random_population,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import precisebn.nn
from precisebn import adapt_bn_stats, update_bn_stats
from precisebn.distributed import permutation_of
from precisebn.errors import CycleError, InputError, PreciseBNError
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm2d,
    GhostBN,
    MultiInputSequential,
    ShuffleBN,
    SyncBN,
    use_domain,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile and torch.export of 2.10 to 2.13 warn of their own use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "modules.md"

# ---- The modules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """One row: how to build a module for 3 channels, how to call it on two tensors, and what it then computes.

    Attributes:
        build: the module.
        call: it on a list of two tensors, giving two.
        trained: what it gives in training, by definition.
        populations: of each, its name in a report, as it follows the module's name; and which of the two tensors its
            values are from. Frozen ones have one too, which training does not move.
        frozen: whether training does not move it, and normalizes by it.
        batch_statistics_in_eval: whether evaluation normalizes by the mini-batch.
        over_ranks: whether training normalizes by the mini-batches of all ranks.
    """

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, list[Tensor]], list[Tensor]]
    trained: Reference
    populations: dict[str, tuple[int, ...]]
    frozen: bool = False
    batch_statistics_in_eval: bool = False
    over_ranks: bool = False

    def new(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """With an affine and populations that are neither trivial nor alike."""
        torch.manual_seed(3)
        module = self.build()
        for part in (module, *module.children()):
            if isinstance(getattr(part, "weight", None), Tensor):
                with_random_affine(part)
            if isinstance(getattr(part, "running_mean", None), Tensor):
                with_random_population(part)
        return module.to(dtype)

    def evaluated(self, module: nn.Module) -> Reference:
        """What it gives in evaluation, by definition."""
        if self.batch_statistics_in_eval:
            return self.trained
        populations = [self.population(module, which) for which in self.populations]
        by_tensor = {i: populations[s] for s, tensors in enumerate(self.populations.values()) for i in tensors}

        def reference(xs: list[Tensor], w: Tensor | None, b: Tensor | None) -> list[Tensor]:
            return [normalized(x, by_tensor[i][0], by_tensor[i][1], row(w, i), row(b, i)) for i, x in enumerate(xs)]

        return reference

    def population(self, module: nn.Module, which: str) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of running mean and variance, float64, and number of mini-batches."""
        inner = affine_of(module)
        if which.startswith("."):
            inner, which = module.get_submodule(which[1:]), ""
        buffers = [inner.running_mean, inner.running_var, inner.num_batches_tracked]
        mean, var, batches = (b[int(which[1:-1])] if which else b for b in buffers)
        return mean.double(), var.double(), batches.clone()


def row(parameter: Tensor | None, domain: int) -> Tensor | None:
    return parameter if parameter is None or parameter.dim() == 1 else parameter[domain]


def affine_of(module: nn.Module) -> nn.Module:
    """The part that holds weight and bias."""
    if isinstance(module, ShuffleBN):
        return module.head
    return module[0] if isinstance(module, MultiInputSequential) else module


def one_by_one(module: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    return [module(x) for x in xs]


def as_a_list(module: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    return module(xs)


def by_domain(module: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    return [module(x, domain=k) for k, x in enumerate(xs)]


def each_by_its_own(xs: list[Tensor], w: Tensor | None, b: Tensor | None) -> list[Tensor]:
    return [y for k, x in enumerate(xs) for y in batch_normalized([x], row(w, k), row(b, k))]


def each_by_parts_of_two(xs: list[Tensor], w: Tensor | None, b: Tensor | None) -> list[Tensor]:
    return [torch.cat([y for part in x.split(2) for y in batch_normalized([part], w, b)]) for x in xs]


BOTH = (0, 1)
MODULES = {
    "FrozenBatchNorm2d": Module(lambda: FrozenBatchNorm2d(3), one_by_one, each_by_its_own, {"": BOTH}, frozen=True),
    "FrozenBatchNorm2d(trainable_affine=True)": Module(
        lambda: FrozenBatchNorm2d(3, trainable_affine=True), one_by_one, each_by_its_own, {"": BOTH}, frozen=True
    ),
    "DomainSpecificBN": Module(
        lambda: DomainSpecificBN(3, num_domains=2), by_domain, each_by_its_own, {"[0]": (0,), "[1]": (1,)}
    ),
    "CycleBatchNormList": Module(
        lambda: CycleBatchNormList(2, num_features=3), one_by_one, each_by_its_own, {".0": (0,), ".1": (1,)}
    ),
    "ConcatSharedBN": Module(lambda: ConcatSharedBN(3), as_a_list, batch_normalized, {"": BOTH}),
    "MultiInputSequential": Module(
        lambda: MultiInputSequential(ConcatSharedBN(3)), as_a_list, batch_normalized, {".0": BOTH}
    ),
    "GhostBN": Module(lambda: GhostBN(3, ghost_size=2), one_by_one, each_by_parts_of_two, {"": BOTH}),
    "BatchStatBN": Module(
        lambda: BatchStatBN(3), one_by_one, each_by_its_own, {"": BOTH}, batch_statistics_in_eval=True
    ),
    "SyncBN": Module(lambda: SyncBN(3), one_by_one, each_by_its_own, {"": BOTH}, over_ranks=True),
    "ShuffleBN": Module(lambda: ShuffleBN(ConcatSharedBN(3)), as_a_list, batch_normalized, {".head": BOTH}),
}

every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)

COLUMNS = {
    f"test_{column}"
    for column in (
        "train", "eval", "state_dict", "copies", "dtype", "meta", "compile", "export", "autocast", "ddp",
        "update_bn_stats", "onnx", "jit", "fx",
    )
}  # fmt: skip


class Net(nn.Module):
    """A convolution, the module, and an activation in place; takes a list of two tensors."""

    def __init__(self, module: Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        layer = module.new()
        torch.manual_seed(4)
        self.conv, self.layer, self.call = nn.Conv2d(2, 3, 1), layer, module.call
        self.to(dtype)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [torch.relu_(y) for y in self.call(self.layer, [self.conv(x) for x in xs])]


def images(n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two tensors of different sizes and statistics."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(n, 2, size, 4, generator=generator, dtype=torch.float64) for size in (4, 3))
    return [first.to(dtype), (3 * second + 2).to(dtype)]


def features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two tensors of 3 channels, for the module itself."""
    return [sample((4, 3, 3, 2), dtype), 2 * sample((4, 3, 2, 2), dtype) - 1]


def step(net: nn.Module, xs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Output and gradients of one training step."""
    net.zero_grad()
    ys = net(xs)
    sum((y**2).mean() for y in ys).backward()
    return [y.detach() for y in ys], {name: p.grad.clone() for name, p in net.named_parameters()}


# ---- Columns ------------------------------------------------------------------------------------------------------


@every_module
def test_train(module):
    """Output, gradients and running statistics are those of the definition, also with an in-place ReLU behind it."""
    layer = module.new(torch.float64)
    inputs = features(torch.float64)
    before = values_of(layer)
    reference = module.evaluated(layer) if module.frozen else module.trained
    expected = []
    for which, tensors in module.populations.items():
        running = Running(3)
        running.mean, running.var, batches = module.population(layer, which)
        running.batches = int(batches)
        for xs in [[inputs[i] for i in tensors]] if module.call is as_a_list else [[inputs[i]] for i in tensors]:
            running.see(*xs)
        expected.append(running)

    assert_is(
        lambda xs: [torch.relu_(y) for y in module.call(layer.train(), xs)],
        affine_of(layer),
        inputs,
        lambda *args: [y.relu() for y in reference(*args)],
    )
    if module.frozen:
        assert values_of(layer) == before
        return
    for which, running in zip(module.populations, expected, strict=True):
        mean, var, batches = module.population(layer, which)
        torch.testing.assert_close((mean, var), (running.mean, running.var), rtol=1e-13, atol=1e-13)
        assert int(batches) == running.batches


@every_module
def test_eval(module):
    layer = module.new(torch.float64).eval()
    before = state_of(layer)
    assert_is(lambda xs: module.call(layer, xs), affine_of(layer), features(torch.float64), module.evaluated(layer))
    assert state_of(layer) == before


@every_module
def test_state_dict(module):
    """A plain checkpoint fills all populations; its own comes back bit for bit; a single one has torch's keys."""
    plain = with_random_population(with_random_affine(nn.BatchNorm2d(3)))
    plain(sample((4, 3, 3, 2)))
    net = nn.ModuleDict({"bn": module.new()})
    prefix = next(f"{name}." for name, part in net.named_modules() if part is affine_of(net["bn"]))
    net.load_state_dict({prefix + key: value for key, value in plain.state_dict().items()})
    for which in module.populations:
        mean, var, batches = module.population(net["bn"], which)
        assert torch.equal(mean, plain.running_mean.double())
        assert torch.equal(var, plain.running_var.double())
        assert int(batches) == 1
    layer = affine_of(net["bn"])
    for k in range(2):
        assert torch.equal(row(layer.weight, k), plain.weight)
        assert torch.equal(row(layer.bias, k), plain.bias)

    own, other = module.new(), module.new()
    for value in own.state_dict().values():
        value.add_(1)
    assert values_of(own) != values_of(other)
    other.load_state_dict(own.state_dict())
    assert values_of(own) == values_of(other)

    if len(module.populations) == 1:
        assert layer.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(affine_of(own).state_dict())
        assert torch.equal(plain.running_mean, affine_of(own).running_mean)


@every_module
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies(module, clone):
    """A copy has the same bits and mode, computes the same, and shares nothing."""
    layer = module.new().eval()
    twin = clone(layer)
    assert values_of(twin) == values_of(layer)
    assert repr(twin) == repr(layer)
    assert not twin.training
    xs = features()
    got, expected = module.call(twin, xs), module.call(layer, xs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    before = values_of(layer)
    module.call(twin.train(), xs)
    for value in twin.state_dict().values():
        value.add_(1)
    assert values_of(layer) == before


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype(module, dtype):
    """``.to(dtype)`` moves parameters and statistics, not counts; inputs of that dtype work, to its rounding."""
    layer = module.new().to(dtype)
    for name, value in layer.state_dict().items():
        assert value.dtype == (torch.int64 if "tracked" in name else dtype)
    call = lambda xs: module.call(layer, xs)  # noqa: E731
    assert_is(call, affine_of(layer.eval()), features(dtype), module.evaluated(layer))
    if not module.frozen:
        assert_is(call, affine_of(layer.train()), features(dtype), module.trained)
    assert {value.dtype for name, value in layer.state_dict().items() if "tracked" not in name} == {dtype}


@every_module
def test_meta(module):
    """On the meta device it gives shapes; ``to_empty`` and a checkpoint, or ``reset_parameters``, fill it."""
    with torch.device("meta"):
        layer = module.build()
    assert all(value.is_meta for value in layer.state_dict().values())
    for mode in (True, False):
        ys = module.call(layer.train(mode), [x.to("meta") for x in features()])
        assert [(y.shape, y.device.type) for y in ys] == [(x.shape, "meta") for x in features()]
    ordinary = module.new()
    layer = layer.train().to_empty(device="cpu")
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.fill_(7)
    for part in layer.modules():
        if not isinstance(part, MultiInputSequential | ShuffleBN):
            part.reset_parameters()
    assert values_of(layer) == values_of(module.build())
    layer.load_state_dict(ordinary.state_dict())
    xs = features()
    for mode in (True, False):
        got, expected = (module.call(bn.train(mode), xs) for bn in (layer, ordinary))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert values_of(layer) == values_of(ordinary)


@every_module
def test_compile(module):
    """One graph, in training and in evaluation: outputs, gradients and statistics are those of eager execution."""
    torch._dynamo.reset()
    net = Net(module)
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        xs = images()
        got, expected = step(compiled.train(mode), xs), step(eager.train(mode), xs)
        got = got[0], {name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(net.state_dict(), eager.state_dict())


@every_module
def test_compile_for_any_size(module):
    """One graph with sizes left open: here Dynamo took every shape of a weight for a wrong one."""
    torch._dynamo.reset()
    layer = module.new()
    eager, xs = copy.deepcopy(layer), features()
    compiled = torch.compile(lambda xs: module.call(layer, xs), fullgraph=True, dynamic=True, backend="eager")
    for rows in (len(xs[0]), len(xs[0]) - 1):
        these = [x[:rows] for x in xs]
        torch.testing.assert_close(compiled(these), module.call(eager, these))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


def test_compile_by_inductor():
    """The same graphs made into code of its own, which takes long: so of one module, and forward only."""
    if not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    torch._dynamo.reset()
    module = MODULES["ConcatSharedBN"]
    layer = module.new()
    eager, xs = copy.deepcopy(layer), features()
    with torch.no_grad():
        ys = torch.compile(lambda xs: module.call(layer, xs), fullgraph=True)(xs)
        torch.testing.assert_close(ys, module.call(eager, xs))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


@every_module
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(module, training):
    """``torch.export``, in training too: outputs and statistics are those of the module."""
    net = Net(module).train(training)
    before = values_of(net)
    program = torch.export.export(net, (images(),))
    assert values_of(net) == before
    exported = program.module()
    for seed in (1, 2):
        xs = images(seed=seed)
        torch.testing.assert_close(exported(xs), net(xs))
    torch.testing.assert_close(
        {key: value for key, value in exported.state_dict().items() if "running" in key or "tracked" in key},
        {key: value for key, value in net.state_dict().items() if "running" in key or "tracked" in key},
    )


# ---- Graphs that run without this library -------------------------------------------------------------------------


class Apart(nn.Module):
    """A network that takes its two tensors one by one, and gives its outputs so: what exporters like."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.net = Net(module)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.net([first, second])
        return a, b


TORCHS = replace(MODULES["FrozenBatchNorm2d"], build=lambda: nn.BatchNorm2d(3))
"""torch's own BatchNorm in the place of a module, which is what deployment tools know."""


def onnx_operators_and_session(net: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool) -> tuple[list[str], Any]:
    """Export; the names of the operators, and what runs them."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    if dynamo:
        pytest.importorskip("onnxscript")
        torch.onnx.export(net, inputs, dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(net, inputs, file, dynamo=False)
    operators = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    return operators, runtime.InferenceSession(file.getvalue())


@every_module
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning")
def test_onnx(module, dynamo):
    """In evaluation the graph is that of nn.BatchNorm2d, by either exporter; onnxruntime computes the same from it."""
    net = Apart(module).eval()
    before = state_of(net)
    operators, session = onnx_operators_and_session(net, tuple(images()), dynamo)
    assert state_of(net) == before
    if not module.batch_statistics_in_eval:
        theirs, _ = onnx_operators_and_session(Apart(TORCHS).eval(), tuple(images()), dynamo)
        ours = [name for name in operators if name != "Identity"]  # the same weights under two names
        if not dynamo and isinstance(net.net.layer, DomainSpecificBN):
            # The legacy exporter merges with the convolution before it knows that a row of a constant is one.
            assert ours.count("BatchNormalization") == 2
            ours = [name for name in ours if name != "BatchNormalization"]
        assert sorted(ours) == sorted(name for name in theirs if name != "Identity")
    xs = images(seed=2)
    ys = session.run(None, {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), xs, strict=True)})
    for got, expected in zip(ys, net(*xs), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected)


@every_module
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning")
def test_onnx_merges_it_with_the_convolution_before(module, dynamo):
    """As deployment tools do with nn.BatchNorm2d; also where the domain is that of a block."""
    if module.batch_statistics_in_eval:
        pytest.skip("its statistics are those of the input")
    net = nn.Sequential(nn.Conv2d(2, 3, 1), module.new()).eval()
    with use_domain(1):
        operators, session = onnx_operators_and_session(net, (images()[0],), dynamo)
        expected = copy.deepcopy(net)(images()[0])  # a cycle's copy starts afresh, as the export has
    as_itself = not dynamo and isinstance(net[1], DomainSpecificBN)  # see above
    assert operators == (["Conv", "BatchNormalization"] if as_itself else ["Conv"])
    (y,) = session.run(None, {session.get_inputs()[0].name: images()[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected)


LOADS_WITHOUT = """
import pathlib, sys, torch
folder = pathlib.Path(sys.argv[1])
inputs, results = torch.load(folder / "inputs"), {}
for path in folder.glob("*.ts"):
    traced = torch.jit.load(path)
    results[path.stem] = [traced(*xs) for xs in inputs], dict(traced.named_buffers())
assert "precisebn" not in sys.modules
torch.save(results, folder / "outputs")
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each module's trace, in either mode, computes in a process that does not have this library."""
    folder = tmp_path_factory.mktemp("traced")
    torch.save([images(seed=seed) for seed in (1, 2)], folder / "inputs")
    for name, module in MODULES.items():
        for training in (False, True):
            net = Apart(module).train(training)
            with warnings.catch_warnings():
                if training and name == "GhostBN":  # into how many ghost batches it cuts is part of the graph
                    warnings.simplefilter("ignore", torch.jit.TracerWarning)
                torch.jit.trace(net, tuple(images()), check_trace=False).save(folder / f"{name}-{training}.ts")
    command = [sys.executable, "-c", LOADS_WITHOUT, str(folder)]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": ""})
    return torch.load(folder / "outputs")


@every_module
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jit(module, training, traced):
    """A trace computes the same where the library is not, and moves the same statistics; frozen layers can be scripted.

    The others refuse, and say what to do.
    """
    name = next(name for name, other in MODULES.items() if other is module)
    net = Apart(module).train(training)
    net(*images())  # tracing runs it once, and saves what it is then
    outputs, buffers = traced[f"{name}-{training}"]
    for seed, ys in zip((1, 2), outputs, strict=True):
        torch.testing.assert_close(ys, net(*images(seed=seed)))
    torch.testing.assert_close(buffers, dict(net.named_buffers()))

    part = nn.Sequential(module.new()).train(training)
    if not module.frozen:
        with pytest.raises(InputError, match=r"convert_to_batchnorm\(model, domain=k\)"):
            torch.jit.script(part)
        return
    scripted = torch.jit.script(part)
    for x in features():
        torch.testing.assert_close(scripted(x), part(x))


@every_module
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx(module, training):
    """``torch.fx.symbolic_trace`` gives torch's own functions, of the module's own buffers; in training it refuses."""
    net = Apart(module).train(training)
    if training and not module.frozen:
        with pytest.raises(InputError, match=r"convert_to_batchnorm\(model, domain=k\)"):
            torch.fx.symbolic_trace(net)
        return
    graph = torch.fx.symbolic_trace(net)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(nn.functional.batch_norm) == 2
    assert not [target for target in targets if target.__module__.startswith("precisebn")]
    graph(*images())[0].sum().backward()
    with torch.no_grad():
        for seed, value in enumerate([*net.parameters(), *net.buffers()]):
            if value.is_floating_point():
                value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    graph.load_state_dict(net.state_dict(), strict=False)  # what a forward does not use, the graph does not hold
    for seed in (1, 2):
        torch.testing.assert_close(graph(*images(seed=seed)), net(*images(seed=seed)))


@every_module
def test_autocast(module):
    """bfloat16 from the convolution on, float32 parameters and statistics: as in float32, on the rounded input."""
    net = Net(module)
    with torch.autocast("cpu", torch.bfloat16):
        ys, gradients = step(net, images())
        assert all(y.dtype == torch.bfloat16 for y in ys)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
    layer = module.new()
    reference = module.evaluated(layer) if module.frozen else module.trained
    call = torch.autocast("cpu", torch.bfloat16)(lambda xs: module.call(layer, xs))
    assert_is(call, affine_of(layer), features(torch.bfloat16), reference)
    assert all(value.dtype in (torch.float32, torch.int64) for value in layer.state_dict().values())


# ---- DDP: one pair of processes for all modules -------------------------------------------------------------------

WORLD = 2


def ddp_steps(rank: int, world: int) -> Result:
    """What each process does: for every module a training step on the rank's own data, and one in evaluation."""
    results = {}
    for name, module in MODULES.items():
        net = nn.parallel.DistributedDataParallel(Net(module))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        _, gradients = step(net, images(seed=rank))
        statistics = {key: value.clone() for key, value in net.module.named_buffers()}
        optimizer.step()
        weights = {key: value.clone() for key, value in net.module.named_parameters()}
        with torch.no_grad():
            ys = net.eval()(images(seed=7))
        results[name] = {"gradients": gradients, "statistics": statistics, "weights": weights, "ys": ys}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """What came of it on each rank."""
    skip_without_gloo()
    return Outcome([ddp_steps], WORLD, tmp_path_factory.mktemp("ddp")).of(ddp_steps)


def shuffled(batches: list[list[Tensor]]) -> list[list[Tensor]]:
    """What each rank has after the first shuffle of seed 0."""
    whole = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
    parts = permutation_of(len(whole[0]), seed=0).tensor_split(WORLD)
    return [[x[part] for x in whole] for part in parts]


@every_module
def test_ddp(module, ranks):
    """Gradients are averaged over the ranks; running statistics are each rank's own until DDP hands on rank 0's.

    Unless they are those of all ranks: then both are as in one process on the concatenated mini-batches.
    """
    name = next(name for name, other in MODULES.items() if other is module)
    alone = [Net(module) for _ in range(WORLD)]
    batches = [images(seed=rank) for rank in range(WORLD)]
    if module.over_ranks:
        batches = [[torch.cat(xs) for xs in zip(*batches, strict=True)]] * WORLD
    if name == "ShuffleBN":
        batches = shuffled(batches)
    gradients = [step(net, batch)[1] for net, batch in zip(alone, batches, strict=True)]
    average = {key: (gradients[0][key] + gradients[1][key]) / WORLD for key in gradients[0]}
    for rank, results in enumerate(ranks):
        got = {key.removeprefix("module."): value for key, value in results[name]["gradients"].items()}
        torch.testing.assert_close(got, average)
        torch.testing.assert_close(results[name]["statistics"], dict(alone[rank].named_buffers()))
        first = ranks[0][name]
        for key, value in results[name]["weights"].items():
            assert torch.equal(value, first["weights"][key])
        assert all(torch.equal(a, b) for a, b in zip(results[name]["ys"], first["ys"], strict=True))
    if not module.frozen and not module.over_ranks:
        apart = [results[name]["statistics"] for results in ranks]
        assert any(not torch.equal(apart[0][key], apart[1][key]) for key in apart[0])


# ---- Recalibration ------------------------------------------------------------------------------------------------

SIZES = (5, 2, 7)


def loader(dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Mini-batches of different sizes, each of two tensors."""
    return [images(n, seed, dtype) for seed, n in enumerate(SIZES)]


def assert_has_the_population_of(module: Module, net: Net, report: precisebn.UpdateReport) -> None:
    """Every population has mean and biased variance, by NumPy, of all values that reached it."""
    assert [layer.name for layer in report.layers] == [f"layer{which}" for which in module.populations]
    for (which, tensors), layer in zip(module.populations.items(), report.layers, strict=True):
        with torch.no_grad():
            seen = [net.conv(batch[i]).numpy() for batch in loader() for i in tensors]
        values = np.concatenate([np.moveaxis(x, 1, -1).reshape(-1, 3) for x in seen])
        mean, var, _ = module.population(net.layer, which)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(var, values.var(0), rtol=1e-12)
        assert (layer.count, layer.num_batches) == (len(values), len(SIZES))


@every_module
@pytest.mark.parametrize("how", ["training", "all", "layer"])
def test_update_bn_stats(module, how):
    """Each population is exactly that of its own domain; frozen ones stay, unless they are named."""
    net = Net(module, torch.float64).train(how != "all")
    batches = [int(module.population(net.layer, which)[2]) for which in module.populations]
    before, attributes = state_of(net), attributes_of(net)
    if module.frozen and how != "layer":
        with pytest.warns(UserWarning, match=r"of 1 BatchNorm layer of Net, 1 is frozen; pass modules='\*'"):
            report = update_bn_stats(net, loader(), num_iters=None, modules=how)
        assert list(report.skipped) == ["layer"]
        assert "frozen" in report.skipped["layer"]
        assert report.layers == ()
        assert state_of(net) == before
        return
    report = update_bn_stats(net, loader(), num_iters=None, modules=how)
    assert report.skipped == {}
    assert_has_the_population_of(module, net, report)
    for which, seen in zip(module.populations, batches, strict=True):
        assert int(module.population(net.layer, which)[2]) == seen + len(SIZES)
    changed = {key.rsplit(".", 1)[-1] for key in before.differences(state_of(net))}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert attributes_of(net) == attributes


def attributes_of(net: nn.Module) -> dict[str, set[str]]:
    """What every part has; a recording that stayed behind in one would show."""
    return {name: set(vars(part)) for name, part in net.named_modules()}


class Interrupted:
    """Mini-batches, and then an exception: while the next is loaded, or inside the forward of the next."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, 0

    def __iter__(self) -> Any:
        yield from loader()[:2]
        if self.where == "loader":
            raise KeyboardInterrupt
        yield loader()[2]

    def forward(self, net: Net, batch: list[Tensor]) -> None:
        self.calls += 1
        if self.where == "forward" and self.calls == 3:
            net.layer(net.conv(batch[0])) if net.call is one_by_one else net(batch)
            raise KeyboardInterrupt
        net(batch)


@every_module
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("where", ["loader", "forward", "nan"])
def test_a_recalibration_that_fails_leaves_every_bit(module, where, training):
    net = Net(module, torch.float64).train(training)
    before, attributes = state_of(net), attributes_of(net)
    data = Interrupted(where)
    error: type[BaseException] = KeyboardInterrupt
    if where == "nan":
        data, error = loader(), PreciseBNError
        data[2][1][0, 0, 0, 0] = torch.nan
    forward = data.forward if where == "forward" else None
    with pytest.raises(error):
        update_bn_stats(net, data, num_iters=None, modules="layer", forward=forward)
    assert state_of(net) == before
    assert attributes_of(net) == attributes


def vector_of(xs: list[Tensor]) -> Tensor:
    return torch.tensor([k for k, x in enumerate(xs) for _ in x])


def by_a_vector(bn: DomainSpecificBN, xs: list[Tensor]) -> None:
    bn(torch.cat(xs), domain=vector_of(xs))


def by_use_domain(bn: DomainSpecificBN, xs: list[Tensor]) -> None:
    for k, x in enumerate(xs):
        with use_domain(k):
            nn.Sequential(bn)(x)


def by_a_list_of_levels(bn: DomainSpecificBN, xs: list[Tensor]) -> None:
    bn(xs)


@pytest.mark.parametrize("way", [by_domain, by_a_vector, by_use_domain, by_a_list_of_levels])
@pytest.mark.parametrize("normalize", ["domain", "shared"])
@pytest.mark.parametrize("population", ["domain", "shared"])
def test_domains_are_recalibrated_each_by_itself_however_they_are_told(way, normalize, population):
    """Also with no value of a domain in a mini-batch, or in none: that one stays as it is, and the report says so."""
    bn = DomainSpecificBN(3, num_domains=3, normalize=normalize, population=population, dtype=torch.float64)
    with_random_population(bn)
    data = [[sample((n, 3), torch.float64) * (k + 1) for k, n in enumerate(sizes)] for sizes in [(4, 2, 0), (3, 0, 0)]]
    before = bn.running_mean.clone()
    report = update_bn_stats(nn.Sequential(bn), data, None, forward=lambda model, xs: way(bn, xs))
    seen = [np.concatenate([xs[k].numpy() for xs in data]) for k in range(3)]
    if population == "shared":
        assert [layer.name for layer in report.layers] == ["0"]
        values = np.concatenate(seen)
        np.testing.assert_allclose(bn.running_mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(bn.running_var, values.var(0), rtol=1e-12)
        return
    assert [(layer.name, layer.count, layer.num_batches) for layer in report.layers] == [("0[0]", 7, 2), ("0[1]", 2, 1)]
    assert report.skipped == {"0[2]": "no sample of the domain was seen"}
    for k in range(2):
        np.testing.assert_allclose(bn.running_mean[k], seen[k].mean(0), rtol=1e-12)
        np.testing.assert_allclose(bn.running_var[k], seen[k].var(0), rtol=1e-12)
    assert torch.equal(bn.running_mean[2], before[2])
    assert bn.num_batches_tracked.tolist() == [2, 1, 0]


def test_recalibration_in_evaluation_mode_runs_the_modules_as_in_training():
    """What lies behind a module sees the output of training mode, and of that its own population is taken."""
    for name, module in MODULES.items():
        if module.frozen:
            continue
        net = nn.ModuleList([Net(module, torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)])
        in_training = copy.deepcopy(net[0]).train()
        with torch.no_grad():
            outputs = [y.numpy() for xs in loader() for y in in_training(xs)]
        values = np.concatenate([np.moveaxis(y, 1, -1).reshape(-1, 3) for y in outputs])
        forward = lambda model, xs: [model[1](y) for y in model[0](xs)]  # noqa: E731
        update_bn_stats(net.eval(), loader(), None, modules="all", forward=forward)
        np.testing.assert_allclose(net[1].running_mean, values.mean(0), rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(net[1].running_var, values.var(0), rtol=1e-12, err_msg=name)


def test_frozen_layers_beside_others_are_listed_and_stay():
    net = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3), FrozenBatchNorm2d(3, trainable_affine=True))
    before = values_of(net)
    report = update_bn_stats(net, [sample((4, 3, 2, 2)) for _ in range(3)], None)
    assert list(report.skipped) == ["1", "2"]
    assert [layer.name for layer in report.layers] == ["0"]
    assert {key for key, value in values_of(net).items() if before[key] != value} == {
        f"0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


@every_module
def test_adapt_bn_stats_with_an_infinite_prior_changes_nothing_and_without_one_everything(module):
    net = Net(module, torch.float64).eval()
    before = {which: module.population(net.layer, which)[:2] for which in module.populations}
    adapt_bn_stats(net, loader(), prior=float("inf"), modules="layer")
    for which, old in before.items():
        torch.testing.assert_close(module.population(net.layer, which)[:2], old)
    report = adapt_bn_stats(net, loader(), modules="layer")
    assert_has_the_population_of(module, net, report)


@pytest.mark.parametrize("change_of_mode", [False, True])
def test_a_cycle_left_unfinished_before_a_recalibration_does_not_shift_its_domains(change_of_mode):
    """An interrupted forward left it at call 1: the recalibration starts at call 0, and leaves it as it was."""
    module = MODULES["CycleBatchNormList"]
    net = Net(module, torch.float64)
    with torch.no_grad():
        net.layer(net.conv(loader()[0][0]))
    net.train(not change_of_mode)
    position = net.layer._pos, net.layer._left_at
    report = update_bn_stats(net, loader(), num_iters=None, modules="all")
    assert_has_the_population_of(module, net, report)
    assert (net.layer._pos, net.layer._left_at) == position


def test_a_recalibration_that_leaves_a_cycle_unfinished_raises():
    """Or the next mini-batch would begin with the member of another domain."""
    net = Net(MODULES["CycleBatchNormList"], torch.float64)
    before = state_of(net)
    with pytest.raises(CycleError, match=r"layer 'layer' \(CycleBatchNormList\(2\)\) was left after 1 of 2 calls"):
        update_bn_stats(net, loader(), num_iters=None, forward=lambda net, xs: net(xs[:1]))
    assert state_of(net) == before


# ---- The page -----------------------------------------------------------------------------------------------------


def tables() -> list[dict[str, dict[str, str]]]:
    """Every table of the page that has a row for each module: cells by row and column."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text(), flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        if header[0] == "module":
            found.append({cells[0]: dict(zip(header[1:], cells[1:], strict=True)) for cells in rows})
    return found


def test_the_page_has_a_row_for_every_module_and_a_column_for_every_test():
    assert set(globals()) >= COLUMNS
    promises = [name.removeprefix("test_") for name in COLUMNS]
    columns = [column.lower().replace(" ", "_") for table in tables() for column in next(iter(table.values()))]
    assert sorted(columns) == sorted(promises)
    public = {name for name in precisebn.nn.__all__ if isinstance(getattr(precisebn.nn, name), type)}
    for table in tables():
        assert len(table) == len(MODULES)
        named = {name for row in table for name in re.findall(r"\w+", row)}
        assert public <= named
        for name in MODULES:
            assert any(f"`{name}`" in row for row in table), name
        assert all(cell for cells in table.values() for cell in cells.values())
    for name in precisebn.nn.__all__:
        assert f"`{name}" in PAGE.read_text()


def test_every_code_block_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)


def wrong_calls() -> list[tuple[str, str]]:
    """Calls on the page, and the messages below them, which stand on indented lines."""
    text = "".join(re.findall(r"```text\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    pairs = re.findall(r"^(\S.*)\n((?:    .*\n)+)", text, flags=re.MULTILINE)
    return [(call, " ".join(message.split())) for call, message in pairs]


def raised_by(call: str) -> str:
    namespace = {name: getattr(precisebn.nn, name) for name in precisebn.nn.__all__}
    namespace |= {"torch": torch, "nn": nn, "checkpoint": checkpoint}
    namespace |= {"x": torch.ones(2, 3, 4, 4), "level": torch.ones(2, 3, 4, 4)}
    namespace |= {"bn": CycleBatchNormList(2, num_features=3)}
    try:
        exec(call, namespace)
    except PreciseBNError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(("call", "message"), wrong_calls(), ids=[call for call, _ in wrong_calls()])
def test_wrong_calls_raise_what_the_page_says(call, message):
    assert raised_by(call) == message


def test_the_page_shows_wrong_calls_of_every_module():
    calls = "".join(call for call, _ in wrong_calls())
    for name in precisebn.nn.__all__:
        assert f"{name}(" in calls
