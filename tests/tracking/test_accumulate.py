"""accumulate_statistics: k micro-batches move the running statistics once, as one forward of all of them would."""

import contextlib
import copy
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import state_of
from interrupting import Lines
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from precisebn import (
    InputError,
    accumulate_statistics,
    convert_ghost,
    freeze,
    pause_tracking,
    unfreeze,
    update_bn_stats,
)
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm2d,
    GhostBN,
    SyncBN,
    use_domain,
)
from precisebn.nn.population import ACCUMULATOR, Recordable, RunningStatistics
from precisebn.statistics.moments import Moments

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Doubling(nn.BatchNorm2d):
    """Normalizes something else than its input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Part(nn.BatchNorm2d):
    """Hands its buffers to batch_norm itself, with part of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input[:, :3], self.running_mean, self.running_var, training=self.training)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "momentum=None": lambda: nn.BatchNorm2d(3, momentum=None),
    "float64": lambda: nn.BatchNorm2d(3, dtype=torch.float64),
    "Lazy": lambda: nn.LazyBatchNorm2d(),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "a subclass": lambda: Doubling(3),
    "part of the input": lambda: Part(3),
    "BatchStatBN": lambda: BatchStatBN(3),
    "ConcatSharedBN": lambda: ConcatSharedBN(3),
    "SyncBN": lambda: SyncBN(3),
    "GhostBN": lambda: GhostBN(3, 2),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
}


def micro_batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of different sizes, locations and scales."""
    generator = torch.Generator().manual_seed(1)
    return [(k + (1 + k) * torch.randn(n, 3, 5, 5, generator=generator)).to(dtype) for k, n in enumerate((4, 2, 7))]


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items() if name.split(".")[-1] in STATISTICS}


def assert_as_one_forward(layer: nn.Module, reference: nn.Module) -> None:
    """To rounding: of the momentum's product and sum in the dtype of the buffers, on each side."""
    for name, value in statistics(layer).items():
        expected = statistics(reference)[name]
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        torch.testing.assert_close(value, expected, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:.*ConcatSharedBN:UserWarning")
def test_the_running_statistics_are_those_of_one_forward_of_all_micro_batches(name):
    layer, reference = LAYERS[name](), LAYERS[name]()
    dtype = torch.float64 if name == "float64" else torch.float32
    batches = micro_batches(dtype)
    model = nn.Sequential(layer)
    for step in range(3):
        before = None if step == 0 and name == "Lazy" else statistics(layer)
        with accumulate_statistics(model):
            for x in batches:
                model(step + x)
                if before is not None:
                    assert all(torch.equal(value, before[key]) for key, value in statistics(layer).items())
        reference(step + torch.cat(batches))
        assert_as_one_forward(layer, reference)
    k_updates = LAYERS[name]()
    for x in batches:
        k_updates(x)
    assert not torch.equal(k_updates.running_var, layer.running_var)


def test_timm_s_batch_norm_with_activation_too(timm):
    layer, reference = (timm.layers.BatchNormAct2d(3, inplace=True) for _ in range(2))
    model = nn.Sequential(nn.Identity(), layer)
    with accumulate_statistics(model):
        for x in micro_batches():
            assert model(x).min() == 0
    reference(torch.cat(micro_batches()))
    assert_as_one_forward(layer, reference)


def test_the_output_and_its_gradient_are_what_they_were_without():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Doubling(3), GhostBN(3, 2))
    results = []
    for context in (contextlib.nullcontext(), accumulate_statistics(model)):
        model.zero_grad()
        with context:
            y = model(micro_batches()[0])
            y.square().sum().backward()
        results.append([y, *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_spread_of_the_means_counts_which_an_average_of_variances_leaves_out():
    layer = nn.BatchNorm1d(1, momentum=1.0)
    with accumulate_statistics(layer):
        for value in (0.0, 10.0):
            layer(value + torch.tensor([[-1.0], [1.0]]))
    assert layer.running_mean.item() == 5.0
    assert layer.running_var.item() == pytest.approx(torch.tensor([-1.0, 1.0, 9.0, 11.0]).var().item(), rel=1e-6)


def test_statistics_far_from_zero_keep_their_digits():
    """The mean is 10,000 standard deviations: a difference of squares in float32 would have nothing left."""
    batches = [(1e4 + torch.randn(64, 2, 8, 8)) for _ in range(4)]
    layer = nn.BatchNorm2d(2, momentum=1.0)
    with accumulate_statistics(layer):
        for x in batches:
            layer(x)
    exact = torch.cat(batches).double().var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("population", ["domain", "shared"])
@pytest.mark.parametrize("how", ["number", "vector", "list"])
def test_each_domain_accumulates_its_own(population, how):
    layer, reference = (DomainSpecificBN(3, 3, population=population) for _ in range(2))
    first, second, third = micro_batches()
    with accumulate_statistics(layer):
        if how == "number":
            with use_domain(0):
                layer(first)
                layer(third)
            layer(second, domain=1)
        elif how == "vector":
            layer(torch.cat([first, second[:1]]), domain=torch.tensor([0, 0, 0, 0, 1]))
            layer(torch.cat([second[1:], third]), domain=torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]))
        else:
            layer([first, second, first[:0]])
            layer([third, first[:0], first[:0]])
    domains = torch.tensor([0] * 4 + [1] * 2 + [0] * 7)
    reference(torch.cat([first, second, third]), domain=domains)
    assert_as_one_forward(layer, reference)
    if population == "domain":
        assert layer.num_batches_tracked.tolist() == [1, 1, 0]


def test_lists_of_tensors_accumulate_as_one_each():
    layer, reference = ConcatSharedBN(3), ConcatSharedBN(3)
    first, second, third = micro_batches()
    with accumulate_statistics(layer):
        layer([first, second])
        layer([third[:, :, :2], third[:, :, 2:]])
    reference([first, second, third])
    assert_as_one_forward(layer, reference)


@pytest.mark.parametrize("bn_class", [nn.BatchNorm2d, Doubling])
def test_each_call_of_a_cycle_accumulates_its_own(bn_class):
    cycle, reference = (CycleBatchNormList(2, bn_class, num_features=3) for _ in range(2))
    head = nn.Sequential(cycle)
    with accumulate_statistics(head):
        for x in micro_batches():
            head(x)
            head(10 - x)
        with pytest.raises(InputError, match="is in a block of"):
            update_bn_stats(head, micro_batches(), None)
    together = torch.cat(micro_batches())
    reference(together)
    reference(10 - together)
    for member, other in zip(cycle, reference, strict=True):
        assert_as_one_forward(member, other)


# ---- What does not count ---------------------------------------------------------------------------------------------


def test_where_nothing_went_through_nothing_is_tracked():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), GhostBN(3, 2))
    before = state_of(model)
    with accumulate_statistics(model):
        pass
    assert state_of(model) == before
    with accumulate_statistics(model):
        model[1](micro_batches()[0])
    assert [int(bn.num_batches_tracked) for bn in model] == [0, 1, 0]


@pytest.mark.parametrize("layer", ["BatchNorm2d", "a subclass", "GhostBN", "InstanceNorm2d"])
def test_a_block_that_raises_tracks_nothing(layer):
    model = nn.Sequential(LAYERS[layer]())
    before = state_of(model)

    def block() -> None:
        with accumulate_statistics(model):
            model(micro_batches()[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert state_of(model) == before


@pytest.mark.parametrize("layer", ["BatchNorm2d", "a subclass", "GhostBN", "InstanceNorm2d"])
def test_forwards_in_eval_mode_normalize_by_the_running_statistics_and_do_not_count(layer):
    model, reference = nn.Sequential(LAYERS[layer]()), nn.Sequential(LAYERS[layer]())
    for one in (model, reference):
        one(3 + micro_batches()[2])
    expected = reference.eval()(micro_batches()[1])
    with accumulate_statistics(model):
        model(micro_batches()[0])
        assert torch.equal(model.eval()(micro_batches()[1]), expected)
        model.train()
    reference.train()(micro_batches()[0])
    assert_as_one_forward(model, reference)


@pytest.mark.parametrize("layer", ["BatchNorm2d", "a subclass", "GhostBN", "InstanceNorm2d"])
@pytest.mark.parametrize("outside", [False, True], ids=["pause inside", "pause outside"])
def test_forwards_that_are_paused_do_not_count(layer, outside):
    model, reference = nn.Sequential(LAYERS[layer]()), nn.Sequential(LAYERS[layer]())
    before = statistics(model)
    if outside:
        with pause_tracking(model), accumulate_statistics(model):
            model(micro_batches()[0])
        assert all(torch.equal(value, before[key]) for key, value in statistics(model).items())
    with accumulate_statistics(model):
        model(micro_batches()[0])
        with pause_tracking(model):
            model(micro_batches()[1])
    reference(micro_batches()[0])
    assert_as_one_forward(model, reference)
    model(micro_batches()[2])
    reference(micro_batches()[2])
    assert_as_one_forward(model, reference)


@pytest.mark.parametrize("layer", ["BatchNorm2d", "a subclass", "GhostBN", "InstanceNorm2d"])
def test_forwards_with_a_momentum_of_0_do_not_count(layer):
    """``bypass_bn``, which code for SAM has for its second forward."""
    bypassing, plain = LAYERS[layer](), LAYERS[layer]()
    with accumulate_statistics(bypassing), accumulate_statistics(plain):
        for x in micro_batches():
            plain(x)
            bypassing(x)
            bypassing.momentum = 0.0
            bypassing(9 * x)
            bypassing.momentum = 0.1
    assert_as_one_forward(bypassing, plain)


def test_frozen_layers_stay_as_they_are_whenever_they_were_frozen():
    model = freeze(
        nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), FrozenBatchNorm2d(3), GhostBN(3, 2)), "0"
    ).train()
    before = statistics(model)
    with accumulate_statistics(model):
        model(micro_batches()[0])
        freeze(model)
        model.train()(micro_batches()[1])
    assert all(torch.equal(value, before[key]) for key, value in statistics(model).items())
    with accumulate_statistics(model):
        unfreeze(model)
        model.train()(micro_batches()[0])
    assert [int(model[k].num_batches_tracked) for k in (0, 1, 3)] == [1, 1, 1]


def test_only_the_layers_asked_for_accumulate():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    with accumulate_statistics(model, "1"):
        for x in micro_batches():
            model(x)
    assert [int(bn.num_batches_tracked) for bn in model] == [3, 1]


@pytest.mark.parametrize("layer", ["BatchNorm2d", "GhostBN", "InstanceNorm2d"])
def test_layers_without_running_statistics_are_left_alone(layer):
    arguments = (3, 2) if layer == "GhostBN" else (3,)
    kind = {"BatchNorm2d": nn.BatchNorm2d, "GhostBN": GhostBN, "InstanceNorm2d": nn.InstanceNorm2d}[layer]
    model = nn.Sequential(kind(*arguments, track_running_stats=False))
    with accumulate_statistics(model):
        model(micro_batches()[0])
    assert list(model.buffers()) == []


# ---- Activation checkpointing ----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, norm: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer", ["BatchNorm2d", "a subclass", "GhostBN", "InstanceNorm2d"])
def test_a_repetition_by_checkpointing_counts_once(layer, use_reentrant):
    model = Checkpointed(LAYERS[layer](), use_reentrant)
    reference = copy.deepcopy(model.inner)
    with accumulate_statistics(model):
        for x in micro_batches():
            model(x.requires_grad_()).square().sum().backward()
    reference(torch.cat(micro_batches()))
    assert_as_one_forward(model.inner, reference)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_of_torch_s_layers_checkpointing_moves_the_statistics_twice_and_a_block_around_one_step_once(use_reentrant):
    """Pytorch issue 96136. The modules of precisebn.nn count once by themselves."""
    x = micro_batches()[0].requires_grad_()
    plain, ours = (Checkpointed(norm, use_reentrant) for norm in (nn.BatchNorm2d(3), BatchStatBN(3)))
    mended, reference = copy.deepcopy(plain), copy.deepcopy(plain.inner)
    for model in (plain, ours):
        model(x).square().sum().backward()
    with accumulate_statistics(mended):
        mended(x).square().sum().backward()
    reference(x)
    assert [int(model.inner[1].num_batches_tracked) for model in (plain, ours, mended)] == [2, 1, 1]
    assert_as_one_forward(mended.inner, reference)
    assert not torch.allclose(plain.inner[1].running_mean, reference[1].running_mean)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["BatchNorm2d", "GhostBN"])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_code_accumulates_in_one_graph_and_is_compiled_once(layer, compiled_before):
    model, reference = nn.Sequential(LAYERS[layer]()), nn.Sequential(LAYERS[layer]())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [x[:2] for x in micro_batches()]
    if compiled_before:
        for one in (compiled, reference):
            one(batches[1]).sum().backward()
    frames = []
    for _ in range(10):
        with accumulate_statistics(model):
            for x in batches:
                compiled(x).square().sum().backward()
        reference(torch.cat(batches))
        frames.append(counter.frame_count)
    assert_as_one_forward(model, reference)
    assert frames[0] == frames[-1]  # or every optimizer step would compile
    compiled(batches[0])
    reference(batches[0])
    assert_as_one_forward(model, reference)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_breaks_its_graph_at_a_checkpoint_and_counts_once_all_the_same():
    model = Checkpointed(nn.BatchNorm2d(3), use_reentrant=False)
    reference = copy.deepcopy(model.inner)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with accumulate_statistics(model):
        for x in micro_batches():
            compiled(x.requires_grad_()).square().sum().backward()
    reference(torch.cat(micro_batches()))
    assert_as_one_forward(model.inner, reference)


# ---- Copies, others at work, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("layer", ["BatchNorm2d", "a subclass", "GhostBN", "InstanceNorm2d", "cycle"])
def test_copies_made_inside_track_by_themselves(layer, copied):
    model = nn.Sequential(CycleBatchNormList(1, num_features=3) if layer == "cycle" else LAYERS[layer]())
    reference = copy.deepcopy(model)
    with accumulate_statistics(model):
        other = copied(model)
        other(micro_batches()[0])
        model(micro_batches()[1])
    reference(micro_batches()[0])
    assert_as_one_forward(other, reference)
    other(micro_batches()[1])
    reference(micro_batches()[1])
    assert_as_one_forward(other, reference)


def test_a_state_dict_taken_inside_has_the_statistics_from_before():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with accumulate_statistics(model):
        model(micro_batches()[0])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layer", ["BatchNorm2d", "GhostBN"])
def test_what_else_stands_in_forwards_is_refused_inside(layer):
    model = nn.Sequential(LAYERS[layer](), nn.BatchNorm2d(3))
    message = r"is in a block of precisebn\.accumulate_statistics; do that outside"
    with accumulate_statistics(model, "0"):
        with pytest.raises(InputError, match=message), accumulate_statistics(model):
            pass
        with pytest.raises(InputError, match=message):
            update_bn_stats(model, micro_batches(), None)
        with pytest.raises(InputError, match=message):
            convert_ghost(model, 3, include="0")
        model(micro_batches()[0])
    assert int(model[0].num_batches_tracked) == 1

    def forward(model: nn.Module, x: Tensor) -> None:
        with accumulate_statistics(model):
            model(x)

    with pytest.raises(InputError, match="is being recalibrated already"):
        update_bn_stats(model, micro_batches(), None, forward=forward)


class ByHand(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        self.running_mean.lerp_(input.detach().mean((0, 2, 3)), 0.1)
        return input


def test_a_forward_that_updates_by_hand_is_named():
    model = nn.Sequential(ByHand(3), nn.BatchNorm2d(3))
    before = state_of(model)
    with (
        pytest.raises(InputError, match=r"layer '0' \(ByHand\) has a forward of its own"),
        accumulate_statistics(model),
    ):
        model(micro_batches()[0])
    assert state_of(model) == before
    with accumulate_statistics(model, "1"):
        model(micro_batches()[0])
    assert int(model[1].num_batches_tracked) == 1


class Declared(Recordable):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("width", torch.ones(3))

    def populations(self) -> list[RunningStatistics]:
        return [RunningStatistics(self.center, self.width, None, eps=0.0)]


def test_a_layer_that_tracks_in_a_way_of_its_own_is_named():
    model = nn.Sequential(Declared())
    with pytest.raises(InputError, match=r"layer '0' \(Declared\) updates its running statistics in a way of its own"):
        accumulate_statistics(model).__enter__()


def test_data_parallel_on_several_devices_is_refused():
    model = nn.DataParallel(nn.Sequential(nn.BatchNorm2d(3)))
    with accumulate_statistics(model):
        model(micro_batches()[0])
    assert int(model.module[0].num_batches_tracked) == 1
    model.device_ids = [0, 1]
    with pytest.raises(InputError, match="DataParallel runs copies of the layers"):
        accumulate_statistics(model).__enter__()


def test_a_pattern_that_matches_no_layer_is_an_error():
    with pytest.raises(InputError, match="modules='head' matches no BatchNorm layer"):
        accumulate_statistics(nn.Sequential(nn.BatchNorm2d(3)), "head").__enter__()
    with pytest.raises(InputError, match="model must be a module, not int"):
        accumulate_statistics(3).__enter__()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), Doubling(3), GhostBN(3, 2)])
def test_forwards_of_several_threads_accumulate_as_those_of_one(layer):
    """One thread took the scratch buffers of another for the layer's own, and the layer kept them for good."""
    batch = micro_batches()[0]
    model, alone = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
    own = list(model.buffers())

    def forwards() -> None:
        for _ in range(50):
            model(batch)

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with accumulate_statistics(model), ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(forwards) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(switch_interval)
    with accumulate_statistics(alone):
        for _ in range(200):
            alone(batch)
    assert all(a is b for a, b in zip(model.buffers(), own, strict=True))
    for a, b in zip(model.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Met(nn.BatchNorm2d):
    """Calls a function in the middle of its forward."""

    meet: Callable[[], object] = staticmethod(lambda: None)

    def _check_input_dim(self, input: Tensor) -> None:
        self.meet()
        super()._check_input_dim(input)


def test_a_forward_that_began_in_the_last_block_leaves_this_one_the_layers_own_buffers():
    """Each block had a lock of its own: so one forward put back, as the layer's, the scratch buffers of another."""
    x, layer = micro_batches()[0], Met(3)
    own = dict(layer.named_buffers())
    late_is_in, is_in, late_is_done = threading.Event(), threading.Event(), threading.Event()

    def meet() -> None:
        if threading.current_thread() is late:
            late_is_in.set()
            is_in.wait(0.3)
        else:
            is_in.set()
            assert late_is_done.wait(30)

    def calls() -> None:
        forward(x)
        late_is_done.set()

    with accumulate_statistics(layer):
        forward = layer.forward  # looked up by a thread that comes late
    late = threading.Thread(target=calls)
    layer.meet = meet
    with accumulate_statistics(layer):
        late.start()
        assert late_is_in.wait(30)
        layer(x)
        late.join()
        assert int(layer.num_batches_tracked) == 0
    del layer.meet
    assert all(layer.get_buffer(name) is buffer for name, buffer in own.items())
    alone = nn.BatchNorm2d(3)
    alone(torch.cat([x, x]))
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), Doubling(3), GhostBN(3, 2)], ids=lambda layer: type(layer).__name__
)
def test_the_end_of_a_block_waits_for_the_forward_under_way(layer):
    """What it had gathered changed while it was tracked."""
    layer, x = copy.deepcopy(layer), micro_batches()[0]
    ended = threading.Event()
    with accumulate_statistics(layer):
        layer(x)
        accumulator, forward = vars(layer).get(ACCUMULATOR), layer.forward
        gathered = accumulator or forward.__self__.gathered
        entered = threading.Event()

        def holds() -> None:
            with gathered.alone() if accumulator else forward.__self__.alone():
                entered.set()
                ended.wait(0.3)
                was_open.append(not ended.is_set())

        was_open: list[bool] = []
        thread = threading.Thread(target=holds)
        thread.start()
        assert entered.wait(30)
    ended.set()
    thread.join()
    assert was_open == [True]
    before = state_of(layer)
    gathered(Moments.of(x), None)  # does not count any more
    assert state_of(layer) == before
    assert gathered.moments.count.item() == x.numel() / 3


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's")
@pytest.mark.usefixtures("pythons_own_handler")
def test_ctrl_c_leaves_the_model_as_before_or_done():
    x = micro_batches()[0]

    def block(model: nn.Module) -> None:
        with accumulate_statistics(model):
            model(x)

    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(3), Doubling(3), GhostBN(3, 2))

    done = fresh()
    count = len(Lines().run(lambda: block(done)).ran)
    outcomes = set()
    for at in range(0, count, 5):
        model = fresh()
        before = state_of(model)
        assert Lines(lambda number, where, at=at: number == at).run(lambda model=model: block(model)).interrupted
        is_before = state_of(model) == before
        is_done = all(torch.equal(value, done.state_dict()[key]) for key, value in model.state_dict().items())
        assert is_before != is_done
        outcomes.add(is_done)
        block(model)  # nothing is claimed, nothing stands in
    assert outcomes == {False, True}


class OwnSettings(nn.BatchNorm2d):
    """Keeps eps and momentum as buffers, which go to the device with it."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        del self.eps, self.momentum
        self.register_buffer("eps", torch.tensor(1e-3))
        self.register_buffer("momentum", torch.tensor(0.25))


class OwnSettingsByHand(OwnSettings):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, None, None, self.training, float(self.momentum), float(self.eps)
        )


@pytest.mark.parametrize("kind", [OwnSettings, OwnSettingsByHand])
def test_eps_and_momentum_may_be_buffers(kind):
    layer, reference = kind(3), nn.BatchNorm2d(3, 1e-3, 0.25)
    keys, batches = list(vars(layer)), torch.randn(4, 2, 3, 5, 5)
    for one in (layer, reference):
        with accumulate_statistics(one):
            for batch in batches:
                one(batch)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name), getattr(reference, name))
    assert list(vars(layer)) == keys
    assert torch.equal(layer.momentum, torch.tensor(0.25))
