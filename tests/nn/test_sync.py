"""SyncBN: what one process computes on all mini-batches. Real processes over gloo, whose one start runs all scenarios.

What a scenario returns is compared, on this side, with one process: with the definition in float64 (``reference.py``),
or with a BatchNorm layer on the concatenated batch.
"""

import copy
import datetime
import pickle
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import state_of, values_of
from processes import HANG_S, Outcome, Result, Scenario, raised, skip_without_gloo
from reference import (
    DTYPES,
    Running,
    assert_is,
    assert_rounded,
    batch_normalized,
    eps_of,
    sample,
    trained_with_checkpointing,
    with_random_affine,
    with_random_population,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from precisebn import convert_sync_batchnorm, convert_to_batchnorm, pause_tracking, update_bn_stats
from precisebn.errors import InputError
from precisebn.nn import SyncBN, sync_group

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 3
SIZES = [5, 1, 0]
"""Samples of each rank: the first has several, the last of three has none, the second has one."""
SPACES: dict[str, tuple[int, ...]] = {"1d": (), "2d": (4,), "3d": (3, 2), "4d": (2, 3, 2)}
LAYOUTS = [(name, False) for name in SPACES] + [("3d", True), ("4d", True)]


def layer(dtype: torch.dtype = torch.float64, **arguments: Any) -> SyncBN:
    torch.manual_seed(3)
    bn = with_random_population(SyncBN(CHANNELS, dtype=dtype, **arguments))
    return with_random_affine(bn) if bn.weight is not None else bn


def share(
    rank: int, space: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64, channels_last: bool = False
) -> Tensor:
    """The mini-batch of one rank, of another mean on each."""
    torch.manual_seed(rank)
    return sample((SIZES[rank], CHANNELS, *space), dtype, channels_last) + rank


def cotangent(rank: int, y: Tensor) -> Tensor:
    torch.manual_seed(100 + rank)
    return torch.randn(y.shape).to(y.dtype)


def gradients(bn: nn.Module, x: Tensor, rank: int) -> Result:
    """Output and all gradients, of random cotangents."""
    x = x.detach().requires_grad_()
    y = bn(x)
    parameters = dict(bn.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], cotangent(rank, y))
    return {"y": y.detach(), "x": found[0], **dict(zip(parameters, found[1:], strict=True))}


# ---- Scenarios: what the processes do -------------------------------------------------------------------------------


def layouts(rank: int, world: int) -> Result:
    return {
        f"{name} {channels_last}": gradients(layer(), share(rank, SPACES[name], channels_last=channels_last), rank)
        for name, channels_last in LAYOUTS
    }


def dtypes(rank: int, world: int) -> Result:
    return {str(dtype): gradients(layer(_of_parameters(dtype)), share(rank, dtype=dtype), rank) for dtype in DTYPES}


def _of_parameters(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def another_dtype_and_size_on_each_rank(rank: int, world: int) -> Result:
    x = share(rank, [(3, 2), (5,), ()][rank], [torch.bfloat16, torch.float64, torch.float32][rank])
    return gradients(layer(_of_parameters(x.dtype)), x, rank)


def autocast(rank: int, world: int) -> Result:
    net = nn.Sequential(nn.Linear(2, CHANNELS), layer(torch.float32), nn.ReLU())
    torch.manual_seed(rank)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, 2))
    y.sum().backward()
    return {"dtypes": (y.dtype, net[1].weight.grad.dtype), "state": net[1].state_dict()}


def twice(rank: int, world: int) -> Result:
    """A gradient penalty: what a backward gives is differentiated again."""
    return _penalized(layer(), share(rank), rank)


def _penalized(bn: nn.Module, x: Tensor, *ranks: int) -> Result:
    x = x.detach().requires_grad_()
    y = bn(x)
    dy = torch.cat([cotangent(r, t) for r, t in zip(ranks, y.split([len(share(r)) for r in ranks]), strict=True)])
    dy.requires_grad_()
    dx, dw, db = torch.autograd.grad((y**2 * dy).sum(), [x, bn.weight, bn.bias], create_graph=True)
    penalty = (dx**3).sum() + ((dw + db) * torch.arange(1.0, CHANNELS + 1, dtype=torch.float64)).sum()
    penalty.backward()
    return {"x": x.grad, "dy": dy.grad, "weight": bn.weight.grad, "bias": bn.bias.grad}


def running_statistics(rank: int, world: int) -> Result:
    found = {}
    for momentum in (0.1, 0.0, 1.0, None):
        bn = SyncBN(CHANNELS, momentum=momentum, dtype=torch.float64)
        for batch in range(3):
            bn(share(rank) * (batch + 1))
        found[str(momentum)] = bn.state_dict()
    return found


def without_affine_and_running_statistics(rank: int, world: int) -> Result:
    bn = SyncBN(CHANNELS, affine=False, track_running_stats=False)
    only_weight = SyncBN(CHANNELS, bias=False, dtype=torch.float64)
    return {
        "plain": gradients(bn, share(rank), rank),
        "weight": gradients(only_weight, share(rank), rank),
        "eval": bn.eval()(share(0)),
    }


def only_what_is_needed(rank: int, world: int) -> Result:
    """A first layer, whose input needs no gradient; a frozen affine; and no gradient at all."""
    bn, x = layer(), share(rank)
    y = bn(x)
    dw, db = torch.autograd.grad(y, [bn.weight, bn.bias], cotangent(rank, y))
    bn.requires_grad_(False)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(bn(x), x, cotangent(rank, y))
    with torch.no_grad():
        y = bn(x)
    return {"y": y, "x": dx, "weight": dw, "bias": db}


def evaluated_on_rank_0_only(rank: int, world: int) -> Result:
    bn = layer().eval()
    return {"y": bn(share(0))} if rank == 0 else {}


def paused(rank: int, world: int) -> Result:
    bn = layer()
    before = values_of(bn)
    with pause_tracking(bn):
        y = bn(share(rank))
    return {"y": y.detach(), "unchanged": values_of(bn) == before}


def checkpointed(rank: int, world: int) -> Result:
    return {str(how): trained_with_checkpointing(layer(), share(rank), how) for how in (None, True, False)}


class Classifier(nn.Module):
    def __init__(self, bn: Callable[[int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn1, self.conv2 = nn.Conv2d(2, 4, 3), bn(4), nn.Conv2d(4, 4, 1)
        self.bn2, self.head = bn(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn1(self.conv(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


STEPS, BATCH = 3, 4


def trained(net: nn.Module, *ranks: int) -> dict[str, Tensor]:
    """Three steps of SGD on the mini-batches of some ranks."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        batches = [torch.Generator().manual_seed(10 * step + rank) for rank in ranks]
        x = torch.cat([torch.randn(BATCH, 2, 6, 6, generator=g, dtype=torch.float64) for g in batches])
        labels = torch.cat([torch.randint(3, (BATCH,), generator=g) for g in batches])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return {key.removeprefix("module."): value.clone() for key, value in net.state_dict().items()}


def data_parallel(rank: int, world: int) -> Result:
    ddp = nn.parallel.DistributedDataParallel(Classifier(SyncBN).double(), broadcast_buffers=False)
    return trained(ddp, rank)


def converted(rank: int, world: int) -> Result:
    net = convert_sync_batchnorm(Classifier(nn.BatchNorm2d).double(), implementation="precisebn")
    classes = {type(module).__name__ for module in net.modules()}
    state = trained(nn.parallel.DistributedDataParallel(net, broadcast_buffers=False), rank)
    return {"classes": classes, "state": state, "back": type(convert_to_batchnorm(net).bn1).__name__}


def recalibrated(rank: int, world: int) -> Result:
    """Ranks with different numbers of mini-batches: nobody waits inside a layer."""
    net = Classifier(SyncBN).double()
    update_bn_stats(net, batches_of(rank), None)
    return net.state_dict()


def batches_of(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [rank + torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64) for n in [4, 3, 5][: 3 - rank]]


def compiled(rank: int, world: int) -> Result:
    torch._dynamo.reset()
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def count(inner: torch.fx.GraphModule, _: Any) -> Any:
            operators.append(" ".join(str(node.target) for node in inner.graph.nodes if node.op == "call_function"))
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=count, bw_compiler=count)(graph, inputs)

    eager, x = layer(), share(rank)
    bn = copy.deepcopy(eager)
    got = gradients(torch.compile(bn, fullgraph=True, backend=backend), x, rank)
    expected = gradients(eager, x, rank)
    states = bn.state_dict(), eager.state_dict()
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), SyncBN(CHANNELS), nn.ReLU(), SyncBN(CHANNELS))
    explained = torch._dynamo.explain(net)(torch.randn(4, CHANNELS))
    return {
        "got": {key.removeprefix("_orig_mod."): value for key, value in got.items()},
        "expected": expected,
        "states": states,
        "operators": operators,
        "graphs, breaks": (explained.graph_count, explained.graph_break_count),
        "torch's": raised(lambda: nn.SyncBatchNorm(CHANNELS)(x)),
    }


def graphs_that_run_elsewhere(rank: int, world: int) -> Result:
    bn, x = layer(torch.float32), share(rank, dtype=torch.float32)
    return {
        "export": raised(lambda: torch.export.export(bn, (x,))),
        "trace": raised(lambda: torch.jit.trace(bn, x)),
        "func": raised(lambda: torch.func.grad(lambda x: bn(x).sum())(x)),
        "in evaluation": torch.jit.trace(bn.eval(), share(0, dtype=torch.float32))(share(0, dtype=torch.float32)),
    }


def compiled_before_there_are_ranks(rank: int, world: int) -> Result:
    note = [tempfile.mktemp()]
    dist.broadcast_object_list(note)
    dist.barrier()
    dist.destroy_process_group()
    torch._dynamo.reset()
    bn = torch.compile(layer(), fullgraph=True, backend="aot_eager")
    alone = bn(share(0)).detach()
    store = dist.FileStore(note[0], world)
    timeout = datetime.timedelta(seconds=HANG_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    return {"alone": alone, "y": bn(share(rank)).detach()}


def process_groups(rank: int, world: int) -> Result:
    pair, own = dist.new_group([0, 1]), dist.new_group([world - 1])
    mesh = init_device_mesh("cpu", (world,))
    found = {
        "pair": layer(process_group=pair)(share(rank)).detach() if rank < 2 else None,
        "not of it": raised(lambda: layer(process_group=pair)(share(rank))) if rank >= 2 else None,
        "own": layer(process_group=own)(share(0)).detach() if rank == world - 1 else None,
        "mesh": layer(process_group=mesh)(share(rank)).detach(),
        "each for itself": layer(process_group=sync_group(1))(share(0)).detach(),
        "False": pickle.loads(pickle.dumps(layer(process_group=False)))(share(0)).detach(),
        "all": layer(process_group=sync_group(world))(share(rank)).detach(),
        "no divisor": raised(lambda: sync_group(5)),
        "with dimensions": raised(
            lambda: layer(process_group=init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b")))(share(rank))
        ),
    }
    if rank < 2:
        bn = layer(process_group=pair)
        twin = copy.deepcopy(bn)
        found["copy"] = twin(share(rank)).detach()
        found["same group"] = twin.process_group is pair
        unpickled = pickle.loads(pickle.dumps(copy.deepcopy(bn)))
        found["lost"] = raised(lambda: unpickled(share(rank)))
        found["in evaluation"] = unpickled.eval()(share(0)).detach()
        unpickled.train().process_group = pair
        found["set anew"] = unpickled(share(rank)).detach()
    return found


def a_rank_that_does_not_come(rank: int, world: int) -> Result:
    """Rank 1 is in evaluation mode. The last scenario: a group that has timed out is of no use any more."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    bn = layer(process_group=group)
    if rank != 0:
        bn.eval()(share(0))
        time.sleep(2 if rank == 1 else 0)  # a process that ends is noticed at once
        return {}
    before, start = state_of(bn), time.monotonic()
    error = raised(lambda: bn(share(0)))
    return {"error": error, "seconds": time.monotonic() - start, "unchanged": state_of(bn) == before}


SCENARIOS: list[Scenario] = [
    layouts,
    dtypes,
    another_dtype_and_size_on_each_rank,
    autocast,
    twice,
    running_statistics,
    without_affine_and_running_statistics,
    only_what_is_needed,
    evaluated_on_rank_0_only,
    paused,
    checkpointed,
    data_parallel,
    converted,
    recalibrated,
    process_groups,
    a_rank_that_does_not_come,
]
GRAPHS: list[Scenario] = [compiled, graphs_that_run_elsewhere, compiled_before_there_are_ranks]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    skip_without_gloo()
    return Outcome(SCENARIOS, request.param, tmp_path_factory.mktemp("sync"))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two ranks: compiling takes long."""
    skip_without_gloo()
    return Outcome(GRAPHS, 2, tmp_path_factory.mktemp("graphs"))


# ---- As in one process ----------------------------------------------------------------------------------------------


def assert_as_one_process(
    results: list[Result], xs: list[Tensor], weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Output and gradients of ranks are those of the definition on all mini-batches; weight's and bias's add up."""
    exact = [x.double().requires_grad_() for x in xs]
    affine = [None if p is None else p.detach().double().requires_grad_() for p in (weight, bias)]
    expected = batch_normalized(exact, *affine)
    dys = [cotangent(rank, result["y"]).double() for rank, result in enumerate(results)]
    wanted = [*exact, *(p for p in affine if p is not None)]
    right = torch.autograd.grad(expected, wanted, dys)
    for rank, result in enumerate(results):
        assert result["y"].dtype == result["x"].dtype == xs[rank].dtype
        assert result["x"].stride() == result["y"].stride() == xs[rank].stride()
        arithmetic = torch.float64 if xs[rank].dtype == torch.float64 else torch.float32
        assert_rounded(result["y"], expected[rank].detach(), arithmetic)
        assert_rounded(result["x"], right[rank], arithmetic)
    for name, truth in zip((n for n in ("weight", "bias") if n in results[0]), right[len(xs) :], strict=True):
        shares = [result[name] for result in results]
        worst = max(shares, key=lambda t: eps_of(t.dtype)).dtype
        assert_rounded(sum(t.double() for t in shares), truth, worst)


@pytest.mark.parametrize(("space", "channels_last"), LAYOUTS)
def test_outputs_and_gradients_are_those_of_one_process_on_all_mini_batches(ranks, space, channels_last):
    """Also where ranks have as many samples as they like: five, one, none."""
    results = [result[f"{space} {channels_last}"] for result in ranks.of(layouts)]
    xs = [share(rank, SPACES[space], channels_last=channels_last) for rank in range(ranks.world)]
    assert_as_one_process(results, xs, layer().weight, layer().bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(ranks, dtype):
    results = [result[str(dtype)] for result in ranks.of(dtypes)]
    bn = layer(_of_parameters(dtype))
    assert_as_one_process(results, [share(rank, dtype=dtype) for rank in range(ranks.world)], bn.weight, bn.bias)


def test_ranks_may_bring_other_dtypes_and_sizes(ranks):
    """What they add up is float64 and of the size of the channels, always."""
    spaces, kinds = [(3, 2), (5,), ()], [torch.bfloat16, torch.float64, torch.float32]
    xs = [share(rank, spaces[rank], kinds[rank]) for rank in range(ranks.world)]
    results = ranks.of(another_dtype_and_size_on_each_rank)
    for result in results:  # whose affine is random in its own dtype, and so of other values
        w, b = (layer(_of_parameters(result["y"].dtype)).get_parameter(n).detach() for n in ("weight", "bias"))
        result["affine"] = w.double(), b.double()
    values = torch.cat([x.double().movedim(1, -1).reshape(-1, CHANNELS) for x in xs])
    mean, std = values.mean(0), (values.var(0, correction=0) + 1e-5).sqrt()
    for x, result in zip(xs, results, strict=True):
        w, b = result["affine"]
        flat = x.double().movedim(1, -1).reshape(-1, CHANNELS)
        y = result["y"].movedim(1, -1).reshape(-1, CHANNELS)
        assert_rounded(y, (flat - mean) / std * w + b, torch.float32)  # in which a rank takes its bfloat16's statistics


def test_autocast(ranks):
    results = ranks.of(autocast)
    assert all(result["dtypes"] == (torch.bfloat16, torch.float32) for result in results)
    for key, value in results[0]["state"].items():
        assert all(torch.equal(value, other["state"][key]) for other in results)


def test_double_backward_is_that_of_one_process(ranks):
    """The collectives are differentiated too; gradients of weight and bias add up over ranks."""
    results = ranks.of(twice)
    everything = range(ranks.world)
    plain = nn.BatchNorm2d(CHANNELS).double()
    plain.load_state_dict(layer().state_dict())
    together = _penalized(plain, torch.cat([share(r) for r in everything]), *everything)
    for name in ("x", "dy"):
        assert_rounded(torch.cat([result[name] for result in results]), together[name], roundings=256)
    for name in ("weight", "bias"):
        assert_rounded(sum(result[name] for result in results), together[name], roundings=256)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_are_those_of_all_mini_batches_and_the_same_bits_everywhere(ranks, momentum):
    results = [result[str(momentum)] for result in ranks.of(running_statistics)]
    expected = Running(CHANNELS, momentum)
    for batch in range(3):
        expected.see(*(share(rank) * (batch + 1) for rank in range(ranks.world)))
    bn = SyncBN(CHANNELS, dtype=torch.float64)
    bn.load_state_dict(results[0])
    expected.assert_in(bn)
    for result in results:
        assert all(torch.equal(value, results[0][key]) for key, value in result.items())


def test_without_affine_bias_and_running_statistics(ranks):
    results = ranks.of(without_affine_and_running_statistics)
    xs = [share(rank) for rank in range(ranks.world)]
    assert_as_one_process([result["plain"] for result in results], xs)
    assert_as_one_process([result["weight"] for result in results], xs, torch.ones(CHANNELS))
    for result in results:  # in evaluation a rank has its own mini-batch to normalize by
        assert_rounded(result["eval"], batch_normalized([share(0)], None, None)[0])


def test_gradients_that_nobody_asks_for_are_not_worked_out(ranks):
    xs = [share(rank) for rank in range(ranks.world)]
    assert_as_one_process(ranks.of(only_what_is_needed), xs, layer().weight, layer().bias)


def test_in_evaluation_a_rank_is_on_its_own(ranks):
    bn = layer().eval()
    assert torch.equal(ranks.of(evaluated_on_rank_0_only)[0]["y"], bn(share(0)))


def test_paused_tracking(ranks):
    exact = batch_normalized([share(rank) for rank in range(ranks.world)], layer().weight, layer().bias)
    for result, y in zip(ranks.of(paused), exact, strict=True):
        assert result["unchanged"]
        assert_rounded(result["y"], y.detach())


def test_activation_checkpointing_changes_nothing(ranks):
    for result in ranks.of(checkpointed):
        for how in ("True", "False"):
            torch.testing.assert_close(result[how], result["None"], rtol=0, atol=0)


# ---- Training -------------------------------------------------------------------------------------------------------


def assert_trained_as_one_process(states: list[dict[str, Tensor]]) -> None:
    alone = trained(Classifier(nn.BatchNorm2d).double(), *range(len(states)))
    for state in states:
        assert state.keys() == alone.keys()
        for key, value in state.items():
            assert torch.equal(value, states[0][key])
            assert_rounded(value, alone[key].double()) if value.is_floating_point() else None
        assert int(state["bn1.num_batches_tracked"]) == STEPS


def test_ddp_trains_as_one_process_on_all_mini_batches(ranks):
    """Three steps of SGD with momentum: parameters and statistics to float64 rounding, and bits alike on all ranks."""
    assert_trained_as_one_process(ranks.of(data_parallel))


def test_a_converted_model_does_so_too(ranks):
    results = ranks.of(converted)
    assert all("SyncBN" in result["classes"] and "BatchNorm2d" not in result["classes"] for result in results)
    assert all(result["back"] == "BatchNorm2d" for result in results)
    assert_trained_as_one_process([result["state"] for result in results])


def test_a_recalibration_measures_over_all_ranks_and_no_layer_waits(ranks):
    alone = Classifier(nn.BatchNorm2d).double()
    update_bn_stats(alone, [batch for rank in range(ranks.world) for batch in batches_of(rank)], None)
    results = ranks.of(recalibrated)
    for result in results:
        assert all(torch.equal(value, results[0][key]) for key, value in result.items())
        for key in ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
            torch.testing.assert_close(result[key], alone.state_dict()[key], rtol=1e-12, atol=1e-12)


# ---- Graphs ---------------------------------------------------------------------------------------------------------


def test_torch_compile_makes_one_graph_with_one_all_reduce_forward_and_one_backward(graphs):
    """No graph break, where torch's SyncBatchNorm does not run at all."""
    for result in graphs.of(compiled):
        assert result["graphs, breaks"] == (1, 0)
        assert [operators.count("_c10d_functional.all_reduce") for operators in result["operators"]] == [1, 1]
        torch.testing.assert_close(result["got"], result["expected"])
        torch.testing.assert_close(*result["states"])
        error, message = result["torch's"]
        assert error == "ValueError"
        assert message.startswith("SyncBatchNorm expected input tensor to be on GPU")


def test_graphs_that_run_elsewhere_and_transformations_are_refused_in_training(graphs):
    y = layer(torch.float32).eval()(share(0, dtype=torch.float32))
    for result in graphs.of(graphs_that_run_elsewhere):
        for how in ("export", "trace", "func"):
            error, message = result[how]
            assert error == "InputError", how
            assert "call eval() before" in message
        torch.testing.assert_close(result["in evaluation"], y)


def test_a_graph_from_before_there_were_ranks_is_made_anew(graphs):
    """And does not go on without them, and without a word."""
    w, b = layer().weight.detach(), layer().bias.detach()
    (alone,) = batch_normalized([share(0)], w, b)
    together = batch_normalized([share(rank) for rank in range(graphs.world)], w, b)
    for result, y in zip(graphs.of(compiled_before_there_are_ranks), together, strict=True):
        assert_rounded(result["alone"], alone)
        assert_rounded(result["y"], y)


# ---- Groups of ranks ------------------------------------------------------------------------------------------------


def test_any_process_group(ranks):
    results = ranks.of(process_groups)
    xs, (w, b) = [share(rank) for rank in range(ranks.world)], (layer().weight.detach(), layer().bias.detach())
    (alone,), pair, everybody = (batch_normalized(group, w, b) for group in ([xs[0]], xs[:2], xs))
    for rank, result in enumerate(results):
        assert_rounded(result["mesh"], everybody[rank])
        assert_rounded(result["all"], everybody[rank])
        assert_rounded(result["each for itself"], alone)
        assert_rounded(result["False"], alone)
        if rank < 2:
            assert_rounded(result["pair"], pair[rank])
        else:
            assert result["not of it"][0] == "InputError"
        assert result["no divisor"][0] == result["with dimensions"][0] == "InputError"
        assert "divides" in result["no divisor"][1]
        assert "2 dimensions" in result["with dimensions"][1]
    assert_rounded(results[-1]["own"], alone)


def test_a_copy_has_the_process_group_and_a_pickle_says_that_it_is_lost(ranks):
    pair = batch_normalized([share(0), share(1)], layer().weight.detach(), layer().bias.detach())
    for rank, result in enumerate(ranks.of(process_groups)[:2]):
        assert result["same group"]
        assert_rounded(result["copy"], pair[rank])
        assert result["lost"][0] == "InputError"
        assert "set it anew" in result["lost"][1]
        assert torch.equal(result["in evaluation"], layer().eval()(share(0)).detach())
        assert_rounded(result["set anew"], pair[rank])


def of_pairs(rank: int, world: int) -> Result:
    return {"y": layer(process_group=sync_group(2))(share(rank % 2) + rank).detach()}


def test_groups_of_neighbours(tmp_path):
    skip_without_gloo()
    results = Outcome([of_pairs], 4, tmp_path).of(of_pairs)
    for first in (0, 2):
        xs = [share(rank % 2) + rank for rank in (first, first + 1)]
        for rank, y in enumerate(batch_normalized(xs, layer().weight.detach(), layer().bias.detach()), first):
            assert_rounded(results[rank]["y"], y)


def test_a_rank_that_does_not_come_makes_the_others_raise_after_the_timeout(ranks):
    result = ranks.of_rank(a_rank_that_does_not_come, 0)
    assert result["error"][0] == "RankFailedError"
    assert "same layers, in the same mode, as often" in result["error"][1]
    assert 0.5 < result["seconds"] < 10
    assert result["unchanged"]


# ---- One process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_it_is_batch_normalization(dtype):
    bn = layer(_of_parameters(dtype))
    expected = Running(CHANNELS)
    expected.mean, expected.var = bn.running_mean.double(), bn.running_var.double()
    x = sample((4, CHANNELS, 3, 2), dtype)
    expected.see(x)
    assert_is(bn, bn, x, batch_normalized)
    expected.assert_in(bn)


def test_it_takes_the_arguments_of_torchs_and_loads_its_state_dict():
    arguments: tuple[Any, ...] = (CHANNELS, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    theirs, ours = nn.SyncBatchNorm(*arguments), SyncBN(*arguments)
    with_random_population(with_random_affine(theirs))
    ours.load_state_dict(theirs.state_dict())
    assert values_of(ours) == values_of(theirs)
    assert repr(ours) == repr(theirs).replace("SyncBatchNorm", "SyncBN")
    assert (ours.eps, ours.momentum, ours.process_group) == (1e-3, 0.2, None)


def test_a_single_value_per_channel_without_other_ranks_is_an_error():
    with pytest.raises(InputError, match="one value per channel has no variance"):
        layer()(torch.ones(1, CHANNELS, dtype=torch.float64))


def test_wrong_calls():
    with pytest.raises(InputError, match=r"SyncBN\(3\) takes tensors \(N, 3, \*\), got shape \(2, 4\)"):
        layer()(torch.ones(2, 4))
    with pytest.raises(InputError, match=r"sync_group\(2\): torch.distributed is not initialized"):
        sync_group(2)


def test_a_pickle_that_has_lost_its_group_is_batch_normalization_where_there_are_no_ranks():
    bn = layer()
    bn.process_group = object()
    twin = pickle.loads(pickle.dumps(bn))
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(twin(share(0)), layer()(share(0)))
    assert torch.equal(again(share(0)), layer()(share(0)))
