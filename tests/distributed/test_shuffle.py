"""Shuffles over ranks: real processes over gloo, held against one process that shuffles the whole batch."""

import copy
import datetime
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import values_of
from processes import Outcome, Result, Scenario, raised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precisebn import Moments, update_bn_stats
from precisebn._torch import group_store
from precisebn.distributed import permutation_of
from precisebn.nn import GhostBN, ShuffleBN, batch_shuffle, batch_unshuffle

SIZES = {
    2: {"even": [6, 6], "uneven": [9, 4], "empty": [0, 8]},
    3: {"even": [5, 5, 5], "uneven": [2, 9, 6], "empty": [7, 0, 0]},
}
"""Samples of each rank, by the number of ranks."""


class Heads(NamedTuple):
    """What a detector's head returns, and what it takes."""

    scores: Any
    boxes: Any


class TwoBranches(nn.Module):
    """A head with keyword arguments, nested inputs and nested outputs: every kind of leaf in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 6)
        self.bn, self.last = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, inputs: list[Tensor], *, scale: float, extra: Heads, ids: Tensor) -> dict[str, Any]:
        hidden = self.first(inputs[0]) + self.second(inputs[1]) * extra.scores.unsqueeze(1)
        hidden = torch.tanh(self.bn(hidden)) * scale
        return {"ids": ids, "outputs": (self.last(hidden), [hidden * extra.boxes["temperature"], "kept"])}


def head() -> TwoBranches:
    torch.manual_seed(1)
    return TwoBranches().double()


def samples(n: int, rank: int) -> dict[str, Any]:
    """Arguments of the head: of another location on each rank, so that where a sample is normalized shows."""
    generator = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randn(n, *shape, generator=generator, dtype=torch.float64) * (rank + 1) + rank  # noqa: E731
    return {
        "inputs": [draw(4).requires_grad_(), draw(3).requires_grad_()],
        "scale": 1.5,
        "extra": Heads(draw().requires_grad_(), {"temperature": torch.tensor(0.5, dtype=torch.float64)}),
        "ids": 100 * rank + torch.arange(n),
    }


def floats_of(arguments: dict[str, Any]) -> list[Tensor]:
    return [*arguments["inputs"], arguments["extra"].scores]


def loss_of(outputs: dict[str, Any]) -> Tensor:
    """One that asks for another gradient of every output of every sample."""
    logits, (hidden, _) = outputs["outputs"]
    weights = torch.cos(outputs["ids"].double()).unsqueeze(1)
    return (logits**2 * weights).sum() + (hidden.sin() * weights).sum()


def penalized(loss: Tensor, floats: list[Tensor]) -> Tensor:
    """With a penalty on its gradients."""
    gradients = torch.autograd.grad(loss, floats, create_graph=True)
    return loss + sum((gradient**2).sum() for gradient in gradients)


def detached(outputs: dict[str, Any]) -> list[Tensor]:
    logits, (hidden, kept) = outputs["outputs"]
    assert kept == "kept"
    return [outputs["ids"], logits.detach(), hidden.detach()]


def in_one_process(world: int, sizes: list[int], penalty: bool = True) -> list[Result]:
    """The definition: all samples in one batch, shuffled, cut into as many mini-batches as ranks, and put back."""
    module, parts = head(), [samples(n, rank) for rank, n in enumerate(sizes)]
    whole: dict[str, Any] = {
        "inputs": [torch.cat([part["inputs"][i] for part in parts]) for i in range(2)],
        "scores": torch.cat([part["extra"].scores for part in parts]),
        "ids": torch.cat([part["ids"] for part in parts]),
    }
    permutation = permutation_of(sum(sizes), seed=3)
    chunks = []
    for chosen in permutation.tensor_split(world):
        extra = Heads(whole["scores"][chosen], parts[0]["extra"].boxes)
        inputs = [x[chosen] for x in whole["inputs"]]
        chunks.append(module(inputs, scale=1.5, extra=extra, ids=whole["ids"][chosen]))
    back = permutation.argsort()
    outputs = {
        "ids": torch.cat([chunk["ids"] for chunk in chunks])[back],
        "outputs": tuple(torch.cat(pieces)[back] for pieces in zip(*[_pair(chunk) for chunk in chunks], strict=True)),
    }
    outputs["outputs"] = (outputs["outputs"][0], [outputs["outputs"][1], "kept"])
    loss, floats = loss_of(outputs), [x for part in parts for x in floats_of(part)]
    (penalized(loss, floats) if penalty else loss).backward()
    pieces = [part.split(sizes) for part in detached(outputs)]
    return [
        {
            "outputs": [part[rank] for part in pieces],
            "gradients": [x.grad for x in floats_of(parts[rank])],
            "parameters": {name: p.grad for name, p in module.named_parameters()},
        }
        for rank in range(world)
    ]


def _pair(chunk: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return chunk["outputs"][0], chunk["outputs"][1][0]


@contextmanager
def collectives() -> Iterator[dict[str, list[int]]]:
    """Bytes that this rank hands to each collective of torch.distributed, call by call."""
    seen: dict[str, list[int]] = {}

    def counted(name: str, which: int) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, []).append(args[which].numel() * args[which].element_size())
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    others = ("broadcast", "all_reduce", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list")
    with counted("all_to_all_single", 1), counted("all_gather", 1), forbidden(*others):
        yield seen


@contextmanager
def forbidden(*names: str) -> Iterator[None]:
    """No collective of these names may be called."""
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(dist, name, side_effect=AssertionError(f"{name} was called")))
        yield


# ---- Scenarios: what the processes do -------------------------------------------------------------------------------


def one_step(rank: int, sizes: list[int], given: Any) -> Result:
    module, arguments = ShuffleBN(head(), seed=3, sizes=given), samples(sizes[rank], rank)
    outputs = module(**arguments)
    penalized(loss_of(outputs), floats_of(arguments)).backward()
    return {
        "outputs": detached(outputs),
        "gradients": [x.grad for x in floats_of(arguments)],
        "parameters": {name.removeprefix("head."): p.grad for name, p in module.named_parameters()},
    }


def gradients(rank: int, world: int) -> Result:
    """With sizes that are asked for, and given."""
    result = {}
    for name, sizes in SIZES[world].items():
        result[name] = one_step(rank, sizes, None)
        result[f"{name}, given"] = one_step(rank, sizes, "equal" if name == "even" else sizes)
    return result


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.uint8, torch.int16, torch.int64,
    torch.bool,
)  # fmt: skip


def anything(n: int, rank: int) -> Any:
    """Every dtype, several shapes, a row of no bytes, and leaves that are no samples; and where each sample is from."""
    generator = torch.Generator().manual_seed(rank)
    tensors = {
        str(dtype): torch.randint(0, 2, (n, 1 + i % 3), generator=generator).to(dtype) for i, dtype in enumerate(DTYPES)
    }
    images = torch.randn(n, 3, 4, 5, generator=generator)
    conjugate = torch.randn(n, 2, dtype=torch.complex64, generator=generator).conj()
    return OrderedDict(
        ids=100 * rank + torch.arange(n),
        tensors=tensors,
        images=(images, images.contiguous(memory_format=torch.channels_last), images.transpose(2, 3)),
        nothing=torch.empty(n, 0),
        conjugate=conjugate,
        pair=Heads([images[:, :, 0, 0]], None),
        rest=["text", 7, torch.tensor(2.5), torch.Size([3]), {"rank": rank}],
    )


def formats(batch: Any) -> list[bool]:
    return [x.is_contiguous(memory_format=torch.channels_last) for x in batch["images"]]


def round_trip(rank: int, world: int) -> Result:
    """Anything there and back; and what was there in between."""
    result = {}
    for name, sizes in SIZES[world].items():
        batch = anything(sizes[rank], rank)
        shuffled, shuffle = batch_shuffle(batch, distributed=True, seed=5)
        result[name] = {
            "shuffled": shuffled,
            "back": batch_unshuffle(shuffled, shuffle, distributed=True),
            "permutation": shuffle.permutation,
            "formats": [formats(batch), formats(shuffled)],
        }  # fmt: skip
    return result


def traffic(rank: int, world: int) -> Result:
    """What goes over the wire in a step of 64 samples of 40 bytes a rank, with sizes that are asked for, and given."""
    result = {}
    for name, sizes in (("asked", None), ("given", "equal")):
        module = ShuffleBN(nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10)), sizes=sizes)
        x = torch.randn(64, 10).requires_grad_()
        with collectives() as seen:
            y = module(x)
            forward = {key: list(value) for key, value in seen.items()}
            y.sum().backward()
        result[name] = {"forward": forward, "all": seen}
    _, shuffle = batch_shuffle(x, distributed=True, seed=module.seed, sizes="equal")
    return {**result, "sent": shuffle.num_sent}


def permutations(rank: int, world: int) -> Result:
    """Which samples come to lie where: call after call, in a copy, after a reload, with another seed."""
    module = ShuffleBN(Where(), seed=11)
    ids = 100 * rank + torch.arange(4).unsqueeze(1).float()
    run = lambda module: (module(ids), module.head.seen)[1].flatten().tolist()  # noqa: E731
    rows = {"first": run(module), "second": run(module)}
    clone = copy.deepcopy(module)
    rows |= {"copied": run(clone), "third": run(module)}
    module.load_state_dict(module.state_dict())
    rows["fourth"] = run(module)
    resumed = ShuffleBN(Where(), seed=11)
    resumed.load_state_dict(module.state_dict())
    rows["resumed"] = run(resumed)
    resumed.calls = 3
    rows |= {"resumed at 3": run(resumed), "another seed": run(ShuffleBN(Where(), seed=12))}
    torch.manual_seed(rank)  # torch's own generator is not what ranks have in common
    rows["another generator"] = run(ShuffleBN(Where(), seed=11))
    return rows


class Where(nn.Module):
    """A head that keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.empty(0)
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().clone()
        return x


def checkpointed(rank: int, world: int) -> Result:
    """Two forwards of one module under way, repeated in the backward in the other order."""

    def step(run: Any) -> tuple[list[Tensor], int]:
        torch.manual_seed(100 * rank)
        module = ShuffleBN(
            nn.Sequential(nn.Linear(3, 4), GhostBN(4, ghost_size=2), nn.Dropout(0.5), nn.Linear(4, 2)).double()
        )
        generator = torch.Generator().manual_seed(rank)
        xs = [torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
        with torch.no_grad():
            for i, p in enumerate(module.parameters()):
                p.uniform_(-1, 1, generator=torch.Generator().manual_seed(i))
        sum((run(module, x) ** 2).sum() for x in xs).backward()
        assert int(module.head[1].num_batches_tracked) == 2
        return [x.grad for x in xs] + [p.grad for p in module.parameters()], module.calls

    plain = step(lambda module, x: module(x))
    same = [step(partial(checkpoint, use_reentrant=reentrant)) for reentrant in (False, True)]
    without = raised(
        lambda: step(lambda module, x: checkpoint(module, x, use_reentrant=False, preserve_rng_state=False))
    )

    def seeded_alike(module: nn.Module, x: Tensor) -> Any:
        torch.manual_seed(0)
        return checkpoint(module, x, use_reentrant=False)

    # One after the other is no doubt: each is repeated before the next comes.
    module = ShuffleBN(nn.BatchNorm1d(3))
    for _ in range(2):
        seeded_alike(module, torch.randn(4, 3, requires_grad=True)).sum().backward()
    return {
        "plain": plain, "same": same, "without": without, "seeded alike": raised(lambda: step(seeded_alike)),
        "calls": module.calls,
    }  # fmt: skip


def differences(rank: int, world: int) -> Result:
    """Ranks that are about to do different things; then all do the same again."""
    x = torch.randn(4, 3)
    bn = lambda **arguments: ShuffleBN(nn.BatchNorm1d(3), **arguments)  # noqa: E731
    ahead = bn()
    ahead.calls = rank
    calls = {
        "group": lambda: bn(process_group=True)(x),
        "dtype": lambda: bn()(x.double() if rank else x),
        "shape": lambda: bn()(torch.randn(4, 3, 5 + rank)),
        "form": lambda: bn()({"b": x} if rank else {"a": x}),
        "kind": lambda: ShuffleBN(nn.Identity())([x, x] if rank else [x, None]),
        "gradient": lambda: bn()(x.clone().requires_grad_(rank == 0)),
        "seed": lambda: bn(seed=rank)(x),
        "calls": lambda: ahead(x),
        "no rows": lambda: ShuffleBN(Total())(x),
        "other rows": lambda: ShuffleBN(nn.Flatten(0))(x),
        "no tensor": lambda: ShuffleBN(Nothing())(x),
        "wrong sizes": lambda: bn(sizes=[3] * world)(x),
        "too few sizes": lambda: bn(sizes=[4])(x),
        "no seed": lambda: batch_shuffle(x, True, sizes="equal"),
        "trace": lambda: torch.jit.trace(bn(), (x,)),
    }
    result: Result = {name: raised(call) for name, call in calls.items()}
    result["afterwards"] = bn()(x).shape
    return result


class Total(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x.sum()]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


def recalibrated(rank: int, world: int) -> Result:
    """With another number of mini-batches on every rank, and no exchange of samples; also where it fails."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), ShuffleBN(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)))
    ).double()
    bn, data = model[1].head[0], mini_batches(rank)
    with forbidden("all_to_all_single", "all_gather"):
        report = update_bn_stats(model, data, None)
        statistics = [bn.running_mean.clone(), bn.running_var.clone()]
        failed = raised(lambda: update_bn_stats(model, [data[0] * torch.nan] if rank == 0 else data[:1], None))
        model.eval()(data[0])  # nor in evaluation
    with collectives() as seen:
        model.train()(data[0])
    return {
        "statistics": statistics,
        "layers": [layer.name for layer in report.layers],
        "failed": failed[0],
        "values": values_of(copy.deepcopy(model).eval()),
        "afterwards": {key: len(value) for key, value in seen.items()},
        "attributes": sorted(vars(model[1])),
    }


def mini_batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 3, generator=generator, dtype=torch.float64) + rank for _ in range(1 + 2 * rank)]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.middle = ShuffleBN(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def compiled(rank: int, world: int) -> Result:
    """Around the exchanges there are graphs; off, all is one."""
    torch.manual_seed(0)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    model = Network().double()
    eager = copy.deepcopy(model)
    fast = torch.compile(model, backend=backend)
    x = torch.randn(5, 3, dtype=torch.float64) + rank
    steps = []
    for _ in range(4):
        pair = []
        for each in (fast, eager):
            y = each(x)
            y.square().sum().backward()
            pair.append(y.detach())
        steps.append((pair[0] - pair[1]).abs().max().item())
    trained = len(graphs)
    graphs.clear()
    torch.compiler.reset()
    off = torch.compile(copy.deepcopy(model).eval(), backend=backend, fullgraph=True)(x)
    grads = [(p.grad - q.grad).abs().max().item() for p, q in zip(model.parameters(), eager.parameters(), strict=True)]
    return {
        "steps": steps,
        "graphs": trained,
        "off": len(graphs),
        "same": torch.allclose(off, copy.deepcopy(eager).eval()(x)),
        "grads": grads,
    }


def ddp(rank: int, world: int) -> Result:
    """Under DistributedDataParallel: gradients are the averages of what one process sums up."""
    sizes = SIZES[world]["uneven"]
    model = nn.parallel.DistributedDataParallel(ShuffleBN(head(), seed=3))
    loss_of(model(**samples(sizes[rank], rank))).backward()
    return {name.removeprefix("module.head."): p.grad for name, p in model.named_parameters()}


def groups(rank: int, world: int) -> Result:
    """Groups of ranks that shuffle among themselves: the first two, and the others; a single rank has no others."""
    pair, rest = dist.new_group([0, 1]), dist.new_group(list(range(2, world))) if world > 2 else None
    mine = pair if rank < 2 else rest
    ids = 100 * rank + torch.arange(8).float().unsqueeze(1)

    def met(module: ShuffleBN) -> list[int]:
        module(ids)
        return sorted({int(i) // 100 for i in module.head.seen.flatten()})

    module = ShuffleBN(Where(), process_group=mine)
    clone, lost = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    return {
        "lost": raised(lambda: lost(ids)),
        "met": [met(module), met(clone)],
        "alone": met(ShuffleBN(Where(), process_group=False)),
        "mesh": met(ShuffleBN(Where(), process_group=dist.init_device_mesh("cpu", (world,)))),
        "shared": clone.process_group is mine,
        "foreign": raised(lambda: ShuffleBN(Where(), process_group=pair)(ids)) if rank >= 2 else None,
    }


def lightly(rank: int, world: int) -> Result:
    """As MoCo calls it: a key encoder under no_grad, seeds from torch's generator, which differ between ranks."""
    torch.manual_seed(10 + rank)
    images = 100 * rank + torch.arange(4).float().unsqueeze(1)
    with torch.no_grad():
        shuffled, shuffle = batch_shuffle(images, distributed=True)
        again, other = batch_shuffle(images, distributed=True)
        keys = batch_unshuffle(shuffled * 2, shuffle, distributed=True)
    local, own = batch_shuffle(images)
    return {
        "permutations": [shuffle.permutation, other.permutation],
        "right": torch.equal(keys, images * 2) and torch.equal(batch_unshuffle(again, other), images),
        "local": sorted(local.flatten().tolist()) == images.flatten().tolist() and own.num_sent == 0,
        "opposite": raised(lambda: batch_unshuffle(local, own, distributed=True)),
        "back": torch.equal(batch_unshuffle(local, own), images),
    }


SCENARIOS: tuple[Scenario, ...] = (
    gradients, round_trip, traffic, permutations, checkpointed, differences, recalibrated, ddp, groups, lightly,
)  # fmt: skip


def compiled_before(rank: int, world: int) -> Result:
    """A graph from before init_process_group, and what runs afterwards."""
    store = group_store(dist.group.WORLD)
    dist.destroy_process_group()
    layer = ShuffleBN(nn.BatchNorm1d(3))
    fast = torch.compile(layer, backend="eager")
    fast(torch.randn(4, 3))
    before = layer.calls
    timeout = datetime.timedelta(seconds=processes.HANG_S)
    again = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=again, rank=rank, world_size=world, timeout=timeout)
    fast(torch.randn(4, 3))
    return {"shuffles": (before, layer.calls)}


def left_alone(rank: int, world: int) -> Result:
    """One rank does not come, as its process has ended."""
    if rank == 0:
        error, asking = (
            raised(lambda: ShuffleBN(nn.BatchNorm1d(3), sizes=sizes)(torch.randn(4, 3)))  # noqa: B023 -- called here
            for sizes in ("equal", None)
        )
        return {"error": error, "asking": asking}
    return {}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    processes.skip_without_gloo()
    once = (compiled, compiled_before, left_alone) if request.param == 2 else ()  # what takes long, and what ends all
    return Outcome(SCENARIOS + once, request.param, tmp_path_factory.mktemp("shuffle"))


# ---- Tests: what came of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", ", given"])
@pytest.mark.parametrize("name", ["even", "uneven", "empty"])
def test_outputs_and_gradients_are_those_of_one_process_that_shuffles_the_whole_batch(ranks, name, given):
    """Second derivatives are in it: the loss has a penalty on the gradients."""
    expected = in_one_process(ranks.world, SIZES[ranks.world][name])
    found = [result[name + given] for result in ranks.of(gradients)]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got["outputs"], wanted["outputs"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got["gradients"], wanted["gradients"], rtol=1e-11, atol=1e-11)
    for key, wanted in expected[0]["parameters"].items():
        total = sum(got["parameters"][key] for got in found)
        torch.testing.assert_close(total, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["even", "uneven", "empty"])
def test_a_shuffle_moves_whole_samples_of_every_dtype_and_back_bit_for_bit(ranks, name):
    sizes = SIZES[ranks.world][name]
    found = [result[name] for result in ranks.of(round_trip)]
    permutation = found[0]["permutation"]
    assert torch.equal(permutation, permutation_of(sum(sizes), seed=5))
    everything = [anything(n, rank) for rank, n in enumerate(sizes)]
    shares = permutation.tensor_split(ranks.world)
    for rank, got in enumerate(found):
        assert torch.equal(got["permutation"], permutation)
        assert bits_of(got["back"]) == bits_of(everything[rank])
        for path, whole in paths(everything[0]).items():
            shuffled = paths(got["shuffled"])[path]
            if not isinstance(whole, Tensor) or whole.dim() == 0:
                assert shuffled == paths(everything[rank])[path]
                continue
            wanted = torch.cat([paths(part)[path] for part in everything])[shares[rank]]
            assert shuffled.dtype == wanted.dtype
            assert torch.equal(shuffled, wanted)
        if sizes[rank]:
            before, after = got["formats"]
            assert before == after
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def paths(tree: Any) -> dict[str, Any]:
    return {str(path): leaf for path, leaf in torch.utils._pytree.tree_flatten_with_path(tree)[0]}


def bits_of(tree: Any) -> dict[str, Any]:
    return {
        path: (leaf.dtype, leaf.shape, leaf.resolve_conj().tolist()) if isinstance(leaf, Tensor) else leaf
        for path, leaf in paths(tree).items()
    }


def test_only_the_samples_that_move_are_on_the_wire(ranks):
    """40 bytes each, once each way and once each way back; by no other collective, but for three integers a rank."""
    world = ranks.world
    all_sent = 0
    for result in ranks.of(traffic):
        sent = result["sent"]
        assert result["given"]["forward"] == {"all_to_all_single": [40 * sent] * 2}
        assert result["given"]["all"] == {"all_to_all_single": [40 * sent] * 4}
        assert result["asked"]["forward"] == {"all_gather": [24], "all_to_all_single": [40 * sent] * 2}
        assert result["asked"]["all"] == {"all_gather": [24], "all_to_all_single": [40 * sent] * 4}
        all_sent += sent
    total = 64 * world
    permutation = permutation_of(total, 0)
    moved = int((permutation // 64 != torch.arange(total) // 64).sum())
    assert all_sent == moved
    assert abs(moved / total - (world - 1) / world) < 3 / total**0.5  # several standard deviations of chance


def test_one_seed_gives_the_same_permutation_on_all_ranks_without_a_broadcast(ranks):
    found = ranks.of(permutations)
    ids = [100 * rank + i for rank in range(ranks.world) for i in range(4)]

    def wanted(seed: int, number: int) -> list[int]:
        return [ids[j] for j in permutation_of(len(ids), seed, number)]

    for row, number in [
        ("first", 0), ("second", 1), ("copied", 2), ("third", 2), ("fourth", 3), ("resumed", 0), ("resumed at 3", 3),
        ("another generator", 0),
    ]:  # fmt: skip
        assert [int(i) for result in found for i in result[row]] == wanted(11, number), row
    assert [int(i) for result in found for i in result["another seed"]] == wanted(12, 0)
    assert len({tuple(wanted(11, number)) for number in range(4)} | {tuple(wanted(12, 0))}) == 5


def test_activation_checkpointing_repeats_the_permutation_of_each_forward(ranks):
    for result in ranks.of(checkpointed):
        plain, calls = result["plain"]
        assert calls == 2
        for got, same_calls in result["same"]:
            assert same_calls == calls
            for a, b in zip(got, plain, strict=True):
                assert torch.equal(a, b)
        kind, text = result["without"]
        assert kind == "InputError"
        assert "preserve_rng_state=True" in text
        kind, text = result["seeded alike"]  # either would have been taken for the last one, and had wrong gradients
        assert kind == "InputError"
        assert "several had the same random numbers" in text
        assert result["calls"] == 2


REFUSED = {
    "group": "process_group=True must be a process group, a DeviceMesh of one dimension, None for all ranks",
    "dtype": "ranks are about to shuffle different things: the input is float32 (N, 3) in (('*',), {}) on rank 0, but "
    "float64 (N, 3) in (('*',), {}) on rank 1",
    "shape": "float32 (N, 3, 5) in (('*',), {}) on rank 0, but float32 (N, 3, 6)",
    "form": "({'a': '*'},)",
    "kind": "(['*', '-'],)",
    "gradient": "float32 (N, 3) with gradient in (('*',), {}) on rank 0, but float32 (N, 3) in",
    "seed": "the seed is 0 on rank 0, but 1 on rank 1",
    "calls": "the number of the shuffle is 0 on rank 0, but 1 on rank 1; set its attribute `calls`",
    "no rows": "ShuffleBN(Total): the output: tensor 1 of 2 is (), but must have a row for each of 4 samples",
    "other rows": "ShuffleBN(Flatten): the output: tensor 0 of 1 is (12,), but must have a row for each of 4 samples",
    "no tensor": "ShuffleBN(Nothing): the output holds no tensor (N, *)",
    "wrong sizes": "says that rank {rank} has 3 samples, but it has 4; pass sizes=None",
    "too few sizes": "sizes= holds 1 number for {world} ranks",
    "no seed": "batch_shuffle: with sizes= ranks ask each other nothing, so pass seed=",
    "trace": "torch.jit.trace would keep one shuffle for ever; call eval(), or trace the head",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_shuffle_is_refused_on_all_of_them(ranks, name):
    for rank, result in enumerate(ranks.of(differences)):
        kind, text = result[name]
        assert kind == "InputError"
        assert REFUSED[name].replace("{rank}", str(rank)).replace("{world}", str(ranks.world)) in text
        assert result["afterwards"] == (4, 3)


def test_a_recalibration_does_not_exchange_samples_and_measures_those_of_all_ranks(ranks):
    """Ranks have 1, 3, 5 mini-batches. The population of the first layer is that of all samples, however they lie."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 4).double()
    with torch.no_grad():
        values = linear(torch.cat([x for rank in range(ranks.world) for x in mini_batches(rank)]))
    moments = Moments.of(values)
    results = ranks.of(recalibrated)
    for result in results:
        mean, var = result["statistics"]
        torch.testing.assert_close(mean, moments.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(var, moments.var(), rtol=1e-12, atol=1e-12)
        assert result["layers"] == ["1.head.0", "1.head.2"]
        assert result["failed"] in ("NonFiniteStatisticsError", "RankFailedError")
        assert result["afterwards"] == {"all_gather": 1, "all_to_all_single": 2}
        assert "recorder" not in result["attributes"]
    assert {result["failed"] for result in results} == {"NonFiniteStatisticsError", "RankFailedError"}


def test_compiled_code_breaks_its_graph_at_the_two_exchanges_and_nowhere_else(ranks):
    """Before, inside, behind: three graphs; one in evaluation. As exact as eager; the next call makes no others."""
    if ranks.world > 2:
        pytest.skip("of two ranks only")
    for result in ranks.of(compiled):
        assert max(result["steps"]) < 1e-12
        assert max(result["grads"]) < 1e-12
        assert result["graphs"] == 3
        assert result["off"] == 1
        assert result["same"]


def test_code_that_was_compiled_before_there_were_ranks_shuffles_when_there_are(ranks):
    if ranks.world > 2:
        pytest.skip("of two ranks only")
    assert [result["shuffles"] for result in ranks.of(compiled_before)] == [(0, 1)] * ranks.world


def test_ddp_averages_the_gradients_that_one_process_sums(ranks):
    world = ranks.world
    expected = in_one_process(world, SIZES[world]["uneven"], penalty=False)[0]["parameters"]
    for got in ranks.of(ddp):
        for key, wanted in expected.items():
            torch.testing.assert_close(got[key] * world, wanted, rtol=1e-11, atol=1e-11)


def test_groups_of_ranks_shuffle_among_themselves(ranks):
    for rank, result in enumerate(ranks.of(groups)):
        members = [0, 1] if rank < 2 else list(range(2, ranks.world))
        assert result["met"] == [members, members]
        assert result["alone"] == [rank]
        assert result["mesh"] == list(range(ranks.world))
        assert result["shared"]
        if ranks.world == 2 or rank < 2:
            assert result["lost"][0] == "InputError"
            assert "has not come through pickling" in result["lost"][1]
        if rank >= 2:
            assert result["foreign"][0] == "InputError"
            assert "does not belong to the process_group" in result["foreign"][1]


def test_batch_shuffle_is_called_as_in_lightly_and_needs_no_seed(ranks):
    results = ranks.of(lightly)
    for result in results:
        assert result["right"]
        assert result["local"]
        assert result["back"]
        assert result["opposite"][0] == "InputError"
        for one, first in zip(result["permutations"], results[0]["permutations"], strict=True):
            assert torch.equal(one, first)
    assert not torch.equal(*results[0]["permutations"])


def test_a_rank_that_does_not_come_is_an_error_on_the_others(ranks):
    if ranks.world > 2:
        pytest.skip("of two ranks only")
    result = ranks.of_rank(left_alone, 0)
    assert [kind for kind, _ in result.values()] == ["RankFailedError"] * 2
    assert "2 ranks failed in exchanging samples" in result["error"][1]
    assert "2 ranks failed in asking each other for their numbers of samples" in result["asking"][1]
