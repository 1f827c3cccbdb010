"""Models that do in their forward what forwards rarely do: nothing of it may cost them more than a forward does."""

import copy
import itertools
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import state_of, values_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from precisebn import (
    InputError,
    NonFiniteStatisticsError,
    adapt_bn_stats,
    convert_domain_specific,
    pause_tracking,
    update_bn_stats,
)
from precisebn.models.snapshot import Snapshot
from precisebn.nn import DomainSpecificBN, GhostBN, use_domain

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(n)) for n in (4, 6, 5)]
NAN = torch.full((4, 3, 5, 5), torch.nan)


def assert_population(layer: nn.Module, values: Tensor) -> None:
    """The exact statistics of (N, C, *), but for the rounding to float32."""
    values = values.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), values.var(1, unbiased=False), rtol=1e-6, atol=0)


# ---- Parts that are no ordinary modules ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("part", [torch.jit.script, lambda m: torch.jit.trace(m, BATCHES[0])], ids=["script", "trace"])
def test_a_scripted_or_traced_part_is_no_obstacle(part, fails):
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True))
    model = nn.Sequential(part(plain), nn.BatchNorm2d(3))
    before = state_of(model)
    with pytest.raises(NonFiniteStatisticsError) if fails else nullcontext():
        update_bn_stats(model, [*BATCHES, NAN] if fails else BATCHES, None)
    if fails:
        assert state_of(model) == before
    else:
        changed = set(before.differences(state_of(model)))
        assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("part", [torch.jit.script, lambda m: torch.jit.trace(m, BATCHES[0])], ids=["script", "trace"])
def test_batch_norm_inside_of_scripted_code_is_listed_and_left_alone(part):
    model = nn.Sequential(part(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)
    assert [layer.name for layer in report.layers] == ["1"]
    assert report.skipped == {"0.1": "code of torch.jit"}
    with pytest.warns(UserWarning, match="1 is code of torch.jit; recalibrate the model before"):
        update_bn_stats(model[0], BATCHES, None)


def test_batch_norm_inside_of_exported_code_is_listed_and_left_alone():
    exported = torch.export.export(nn.Sequential(nn.BatchNorm2d(3)), (BATCHES[0],))
    model = nn.Sequential(exported.module(), nn.BatchNorm2d(3))
    assert update_bn_stats(model, BATCHES[:1], None).skipped == {"0": "code of torch.export"}
    with pytest.warns(UserWarning, match="no BatchNorm layer, so nothing was recalibrated; .* exported"):
        update_bn_stats(model[0], BATCHES[:1], None)


class Cache(nn.Module):
    """The idiom of rotary embeddings: a buffer that grows with the input, its size in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2
        self.seen: list[int] = []
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if x.shape[-1] > self.size:
            self.size = x.shape[-1]
            self.register_buffer("table", torch.zeros(self.size), persistent=False)
        return self.bn(x + self.table[: x.shape[-1]])


def test_a_cache_that_a_forward_enlarges_stays_so_after_success():
    model = Cache()
    table = model.table
    update_bn_stats(model, BATCHES, None)
    assert model.table is not table
    assert (model.size, len(model.table), model.seen) == (5, 5, [4, 6, 5])
    model(BATCHES[0])


def test_a_cache_that_a_forward_enlarges_is_as_before_after_failure():
    model = Cache()
    before, table = state_of(model), model.table
    with pytest.raises(NonFiniteStatisticsError):
        update_bn_stats(model, [*BATCHES, NAN], None)
    assert state_of(model) == before
    assert model.table is table
    assert (model.size, model.seen) == (2, [])
    model(BATCHES[0])


class Hostile(nn.Module):
    """Does one thing to itself in each forward."""

    def __init__(self, does: Callable[["Hostile"], Any]) -> None:
        super().__init__()
        self.does = does
        self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
        self.conv = nn.Conv2d(3, 3, 1)
        self.plain = torch.ones(3)
        self.memory = {"queue": [torch.zeros(2)]}
        self.register_buffer("grid", torch.arange(6.0))
        self.register_buffer("halves", torch.zeros(4, dtype=torch.complex32))
        self.register_buffer("four_bits", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
        self.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        self.register_buffer("jagged", torch.nested.nested_tensor([torch.ones(2, 2)], layout=torch.jagged))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(self.conv(self.bn(x)))
        self.does(self)
        return y


@torch.no_grad()
def _new_parameter(m: Hostile) -> None:
    m.conv.weight = nn.Parameter(torch.zeros(3, 3, 1, 1))


DEEDS: dict[str, Callable[[Hostile], Any]] = {
    "data of another shape": lambda m: setattr(m.grid, "data", torch.zeros(2, 2)),
    "data of another dtype": lambda m: setattr(m.grid, "data", torch.zeros(6, dtype=torch.float64)),
    "data of a statistic": lambda m: m.other.running_mean.data.add_(1),
    "data of a statistic elsewhere": lambda m: setattr(m.other.running_var, "data", torch.ones(3)),
    "resize": lambda m: m.grid.resize_(9).fill_(7),
    "complex32": lambda m: m.halves.copy_(torch.ones(4)),
    "float4": lambda m: m.four_bits.view(torch.uint8).fill_(3),
    "nested": lambda m: m.nested.mul_(2),
    "jagged": lambda m: m.jagged.mul_(2),
    "sparse": lambda m: m.sparse.mul_(2),
    "expanded": lambda m: m.expanded.data[:1].add_(1),
    "parameter in place": lambda m: m.conv.weight.mul_(0.5),
    "data of a parameter": lambda m: m.conv.weight.data.mul_(0.5),
    "new parameter": _new_parameter,
    "tensor in an attribute": lambda m: m.plain.add_(1),
    "tensor in a list in a dictionary": lambda m: m.memory["queue"][0].add_(1),
    "longer list": lambda m: m.memory["queue"].append(torch.ones(2)),
    "new key": lambda m: m.memory.update(more=1),
    "deleted attribute": lambda m: vars(m).pop("memory", None),
    "deleted buffer": lambda m: m._buffers.pop("grid", None),
    "module": lambda m: m.add_module("late", nn.Linear(1, 1)),
    "hook": lambda m: m.conv.register_forward_hook(lambda *args: None),
    "mode": lambda m: m.conv.eval(),
    "gradient switched off": lambda m: m.conv.weight.requires_grad_(False),
    "statistics of another layer": lambda m: m.other.running_mean.fill_(5.0),
    "statistics of the layer": lambda m: m.bn.running_mean.fill_(5.0),
    "another statistic in its place": lambda m: m.other.register_buffer("running_var", torch.ones(3) * 3),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:ComplexHalf", "ignore:.*[Ss]parse")
@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_a_forward_does_to_the_model_is_undone_after_a_failure(deed):
    model = Hostile(DEEDS[deed])
    before = state_of(model)
    deed_alone = copy.copy(DEEDS[deed])
    with pytest.raises(NonFiniteStatisticsError):
        update_bn_stats(model, [*BATCHES, NAN], None)
    assert before.differences(state_of(model)) == {}
    with torch.no_grad():
        deed_alone(model)
    assert before.differences(state_of(model)) != {}  # or the picture would not show what this test is about


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:ComplexHalf", "ignore:.*[Ss]parse")
@pytest.mark.parametrize("deed", DEEDS)
def test_after_success_what_a_forward_has_done_stays_but_to_running_statistics(deed):
    model, twin = Hostile(DEEDS[deed]), Hostile(DEEDS[deed])
    before, other = state_of(model), Snapshot(model.other)
    with torch.no_grad():
        model_twin = state_of(twin)
        for _ in BATCHES:
            DEEDS[deed](twin)
    expected = {key for key in model_twin.differences(state_of(twin)) if not key.startswith(("bn.", "other."))}
    update_bn_stats(model, BATCHES, None)
    assert state_of(model.other) == other
    assert_population(model.bn, torch.cat(BATCHES).flatten(2).transpose(0, 1).reshape(3, -1).T)
    changed = set(before.differences(state_of(model)))
    assert changed == expected | {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


# ---- Copies ---------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """Copies itself in its first forward, as teachers of students are made, and runs the copy beside it."""

    def __init__(self, layer: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
        self.make = make
        self.teachers: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.teachers:
            self.teachers.append(self.make(self.net))
        self.teachers[0](x + 10.0)
        return self.net(x)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "eval mode": lambda: nn.BatchNorm2d(3).eval(),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "own forward": lambda: Doubling(3),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None),
    "GhostBN": lambda: GhostBN(3, 2),
}


class OwnState(nn.BatchNorm2d):
    """Makes a state of its own, as classes do that leave something out of it."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Saved(nn.Module):
    """Pickles its layer when that has just been called, as code does that saves a checkpoint on the way."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.saved: list[bytes] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.saved.append(pickle.dumps(self.layer))
        return y


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), OwnState(3)], ids=["BatchNorm2d", "own __getstate__"])
def test_what_is_pickled_after_a_layer_has_run_has_its_own_statistics(layer):
    model = Saved(layer)
    layer.running_mean.fill_(0.5)
    update_bn_stats(model, BATCHES, None)
    for saved in model.saved:
        copied = pickle.loads(saved)
        assert copied.running_mean.tolist() == [0.5] * 3
        assert copied.running_var.tolist() == [1.0] * 3
        assert "forward" not in vars(copied)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_copy_made_in_a_forward_has_nothing_of_the_recording_and_is_not_counted(kind, how):
    if how == "pickle" and kind == "parametrized":
        pytest.skip("torch pickles no parametrized modules")
    model = Student(LAYERS[kind](), COPIES[how])
    layer = model.net[1]
    layer.running_mean.fill_(0.5)
    twin = copy.deepcopy(model)
    report = update_bn_stats(model, BATCHES, None, modules="all")
    assert report.layers[0].count == sum(len(batch) * 25 for batch in BATCHES)
    teacher = model.teachers[0][1]
    assert vars(teacher).keys() == vars(layer).keys()
    assert teacher.training == layer.training
    assert [len(value) for key, value in vars(teacher).items() if "hooks" in key] == [
        len(value) for key, value in vars(layer).items() if "hooks" in key
    ]
    # The copy did what it would have done without a recording: in training, its own averages go on from the layer's.
    with torch.no_grad():
        for batch in BATCHES:
            twin(batch)
    torch.testing.assert_close(teacher.running_mean, twin.teachers[0][1].running_mean)
    torch.testing.assert_close(teacher.running_var, twin.teachers[0][1].running_var)
    update_bn_stats(model.teachers[0], BATCHES, None, modules="all")


# ---- Buffers of others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.0, 5.0])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), Doubling(3)], ids=["BatchNorm2d", "own forward"])
def test_a_forward_by_functional_call_with_other_buffers_normalizes_by_the_mini_batch_all_the_same(layer, prior):
    """Averaged weights kept as a dictionary: the statistics in it are not those of the mini-batch."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for value in averaged.state_dict().values():
            value.add_(1)
        for index in (1, 4):  # whose statistics are the prior
            model[index].running_mean.add_(1)
            model[index].running_var.add_(1)
    state = {key: value.clone().mul_(3) for key, value in averaged.state_dict().items()}
    averaged.load_state_dict({key: value for key, value in state.items() if "running" not in key}, strict=False)
    adapt_bn_stats(averaged, BATCHES, prior)
    adapt_bn_stats(model, BATCHES, prior, forward=lambda m, x: torch.func.functional_call(m, state, (x,)))
    for index in (1, 4):
        torch.testing.assert_close(model[index].running_mean, averaged[index].running_mean)
        torch.testing.assert_close(model[index].running_var, averaged[index].running_var)


# ---- Surroundings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.0, 3.0])
def test_another_default_device_makes_no_difference(prior):
    """Such as torch.set_default_device("cuda") is one for a model on the CPU."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), convert_domain_specific(nn.BatchNorm2d(4), 2))
    twin = copy.deepcopy(model)

    def forward(m: nn.Module, x: Tensor) -> None:
        with use_domain(1):
            m(x)

    batches = [*BATCHES, *BATCHES, *BATCHES]
    expected = adapt_bn_stats(twin, batches, prior, forward=forward, tolerance=100.0)
    with torch.device("meta"):
        report = adapt_bn_stats(model, batches, prior, forward=forward, tolerance=100.0)
    assert report.to_dict() == expected.to_dict()
    assert values_of(model) == values_of(twin)


# ---- Forwards of their own ------------------------------------------------------------------------------------------


class HalfNormalized(nn.BatchNorm2d):
    """Normalizes the first half of its input, and hands the rest on."""

    def forward(self, input: Tensor) -> Tensor:
        first, rest = input.chunk(2)
        return torch.cat([super().forward(first), rest])


class HalfByHand(nn.BatchNorm2d):
    """The same without batch_norm: nothing tells of what the statistics are that it writes."""

    def forward(self, input: Tensor) -> Tensor:
        first, rest = input.chunk(2)
        var, mean = torch.var_mean(first, (0, 2, 3), keepdim=True)
        self.running_mean.lerp_(mean.flatten(), self.momentum)
        self.running_var.lerp_(var.flatten(), self.momentum)
        return torch.cat([(first - mean) / (var + self.eps).sqrt(), rest])


def test_what_counts_is_what_a_layer_normalizes_not_what_it_is_called_with():
    layer = HalfNormalized(3)
    report = update_bn_stats(layer, BATCHES, None)
    halves = torch.cat([batch.chunk(2)[0].flatten(2).transpose(1, 2).reshape(-1, 3) for batch in BATCHES])
    assert_population(layer, halves)
    assert report.layers[0].count == len(halves)


def test_the_bound_of_a_forward_of_its_own_is_that_of_any_layer():
    layer, batches = HalfNormalized(3), [1e4 + torch.randn(8, 3, 16, 16) for _ in range(5)]
    update_bn_stats(layer, batches, None)
    assert_population(
        layer, torch.cat([batch.chunk(2)[0].flatten(2).transpose(1, 2).reshape(-1, 3) for batch in batches])
    )


def test_a_layer_that_is_not_understood_is_listed_and_left_alone():
    model = nn.Sequential(HalfByHand(3), nn.BatchNorm2d(3))
    before = state_of(model[0])
    report = update_bn_stats(model, BATCHES, None)
    assert state_of(model[0]) == before
    assert "not known what it normalizes" in report.skipped["0"]
    assert [layer.name for layer in report.layers] == ["1"]


def test_split_batchnorm_of_timm(timm):
    from timm.layers import SplitBatchNorm2d

    layer, batches = SplitBatchNorm2d(3, num_splits=2), [torch.randn(4, 3, 4, 4) + 3 * i for i in range(4)]
    report = update_bn_stats(layer, batches, None)
    for bn, part in ((layer, 0), (layer.aux_bn[0], 1)):
        assert_population(bn, torch.cat([b.chunk(2)[part].flatten(2).transpose(1, 2).reshape(-1, 3) for b in batches]))
    assert [one.count for one in report.layers] == [4 * 2 * 16] * 2


# ---- Forwards that the model does not count itself ------------------------------------------------------------------


SWITCHES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "eval mode": (lambda layer: layer.eval(), lambda layer: layer.train()),
    "track_running_stats": (
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: setattr(layer, "track_running_stats", True),
    ),
    "momentum": (lambda layer: setattr(layer, "momentum", 0.0), lambda layer: setattr(layer, "momentum", 0.1)),
    "pause_tracking": (
        lambda layer: vars(layer).__setitem__("block", pause_tracking(layer)) or layer.block.__enter__(),
        lambda layer: layer.block.__exit__(None, None, None) or vars(layer).pop("block"),
    ),
}


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


SWITCHED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "own forward": lambda: OwnForward(3),
    "GhostBN": lambda: GhostBN(3, 8),
}


class Switching(nn.Module):
    """Gives its layer a second look at other values, for which it switches the tracking of statistics off."""

    def __init__(self, layer: nn.Module, switch: str) -> None:
        super().__init__()
        self.layer, self.switch, self.seen = layer, switch, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        off, on = SWITCHES[self.switch]
        y = self.layer(x)
        off(self.layer)
        self.seen.append(self.layer(9 * x + 1))
        on(self.layer)
        return y


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("layer", SWITCHED)
def test_a_forward_for_which_the_model_switches_tracking_off_does_not_count(layer, switch):
    model = Switching(SWITCHED[layer](), switch)
    model.layer.running_mean.fill_(0.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for batch in BATCHES:
            twin(batch)
    report = update_bn_stats(model, BATCHES, None)
    assert report.layers[0].count == sum(len(batch) * 25 for batch in BATCHES)
    assert_population(model.layer, torch.cat(BATCHES))
    assert model.layer.num_batches_tracked == len(BATCHES)
    if switch != "eval mode":  # where running statistics normalize, which a twin's own forwards have moved
        for seen, expected in zip(model.seen, twin.seen, strict=True):
            torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("layer", SWITCHED)
def test_what_the_model_puts_into_eval_mode_normalizes_by_its_own_statistics_and_keeps_them(layer):
    """A teacher, as models with one have it in their forward."""

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = SWITCHED[layer](), SWITCHED[layer]()
            self.teacher.running_mean.fill_(2.0)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.teacher.eval()
            self.seen.append(self.teacher(x))
            return self.student(x)

    model = Taught()
    teacher = copy.deepcopy(model.teacher).eval()
    report = update_bn_stats(model, BATCHES, None)
    assert report.skipped == {
        "teacher": "put into eval mode or paused by the model's own forward (modules='all' takes any mode)"
    }
    assert_population(model.student, torch.cat(BATCHES))
    assert values_of(model.teacher) == values_of(teacher)
    for seen, batch in zip(model.seen, BATCHES, strict=True):
        torch.testing.assert_close(seen, teacher(batch))
    # Named, or asked for with all others, it is recalibrated whatever its mode.
    assert [one.name for one in update_bn_stats(model, BATCHES, None, modules="all").layers] == ["student", "teacher"]
    assert_population(model.teacher, torch.cat(BATCHES))


@pytest.mark.parametrize("switch", ["track_running_stats", "momentum"])
def test_a_layer_that_tracks_nothing_at_the_outset_is_recalibrated_all_the_same(switch):
    layer = nn.BatchNorm2d(3)
    SWITCHES[switch][0](layer)
    update_bn_stats(nn.Sequential(layer), BATCHES, None)
    assert_population(layer, torch.cat(BATCHES))


@pytest.mark.parametrize("prior", [0.0, 4.0])
def test_with_a_prior_too(prior):
    model = Switching(nn.BatchNorm2d(3), "pause_tracking")
    plain = nn.Sequential(copy.deepcopy(model.layer))
    adapt_bn_stats(model, BATCHES, prior)
    adapt_bn_stats(plain, BATCHES, prior)
    assert values_of(model.layer) == values_of(plain[0])


def test_mini_batches_without_a_sample_are_told_from_none():
    layer = nn.BatchNorm2d(3)
    with pytest.warns(UserWarning, match="no BatchNorm layer was recalibrated .0: mini-batches without a sample"):
        update_bn_stats(nn.Sequential(layer), [BATCHES[0][:0]], None)


# ---- Threads --------------------------------------------------------------------------------------------------------


def in_threads(*calls: Callable[[], Any]) -> list[BaseException | None]:
    """What each call raised."""
    raised: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_two_threads_that_recalibrate_leave_the_compiler_as_it_was():
    import torch._dynamo

    first_is_in, second_is_in = threading.Event(), threading.Event()
    models = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]

    def begins_first(model: nn.Module, x: Tensor) -> None:
        first_is_in.set()
        assert second_is_in.wait(30)
        model(x)

    def begins_second(model: nn.Module, x: Tensor) -> None:
        second_is_in.set()
        thread.join(30)  # it ends last: the first one's end comes between
        model(x)

    def second() -> None:
        assert first_is_in.wait(30)
        update_bn_stats(models[1], BATCHES[:1], 1, forward=begins_second)

    thread = threading.Thread(target=lambda: update_bn_stats(models[0], BATCHES[:1], 1, forward=begins_first))
    thread.start()
    assert in_threads(second) == [None]
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(compiled) == 1
    for model in models:
        assert_population(model, BATCHES[0])


def test_a_model_under_recalibration_is_refused_to_a_second_thread_and_the_first_goes_on():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    twin = copy.deepcopy(model)
    refused: list[BaseException | None] = []

    def forward(model: nn.Module, x: Tensor) -> None:
        refused.extend(
            in_threads(lambda: update_bn_stats(model, BATCHES, None), lambda: adapt_bn_stats(model[1], BATCHES))
        )
        model(x)

    update_bn_stats(model, BATCHES, None, forward=forward)
    assert len(refused) == 2 * len(BATCHES)
    for error, name in zip(refused, itertools.cycle(("Sequential", "BatchNorm2d"))):
        assert isinstance(error, InputError)
        assert f"{name}, or a part of it, is being recalibrated already" in str(error)
    update_bn_stats(twin, BATCHES, None)
    assert torch.equal(model[1].running_var, twin[1].running_var)
    update_bn_stats(model, BATCHES, None)  # and it is free again


# ---- DDP and FSDP ---------------------------------------------------------------------------------------------------


def test_what_join_leaves_behind_in_ddp_is_set_aside(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
        with ddp.join():
            ddp(BATCHES[0]).sum().backward()
        assert ddp._join_config.enable  # torch leaves it so
        config, inside = ddp._join_config, []
        update_bn_stats(ddp, BATCHES, None, forward=lambda m, x: (inside.append(m._join_config.enable), m(x)))
        assert inside == [False] * len(BATCHES)
        assert ddp._join_config is config
    finally:
        dist.destroy_process_group()


class Fails(nn.Module):
    """Fails in the middle of a forward, where it is to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError
        return x


@pytest.mark.parametrize("where", ["forward", "between forwards"])
def test_a_sharded_model_goes_on_after_a_failure(where, tmp_path):
    """FSDP puts whole parameters in the places of sharded ones, and knows which are there."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Fails(), nn.Conv2d(4, 3, 1))
        twin = copy.deepcopy(model)
        fsdp.fully_shard(model[0], mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)

        def fails(m: nn.Module, x: Tensor) -> None:
            model[2].fails = where == "forward"
            m(x)
            raise ValueError

        for _ in range(2):
            before = model[1].running_mean.clone()
            with pytest.raises(ValueError):  # noqa: PT011  (its own)
                update_bn_stats(model, BATCHES, None, forward=fails)
            assert torch.equal(model[1].running_mean, before)
            model[2].fails = False
            with torch.no_grad():
                model(BATCHES[0])  # which leaves whole parameters in place
        update_bn_stats(model, BATCHES, None)
        update_bn_stats(twin, BATCHES, None)
        torch.testing.assert_close(model[1].running_var, twin[1].running_var)
        model(BATCHES[0]).sum().backward()
    finally:
        dist.destroy_process_group()


# ---- What is left alone ---------------------------------------------------------------------------------------------


def three() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())


@pytest.mark.parametrize("update", [update_bn_stats, adapt_bn_stats])
@pytest.mark.parametrize("exclude", ["1", ["[1]"], lambda m: m[1]])
def test_excluded_layers_are_left_alone_and_listed(update, exclude):
    model = three()
    before = state_of(model[1])
    report = update(model, BATCHES, num_iters=None, exclude=exclude(model) if callable(exclude) else exclude)
    assert state_of(model[1]) == before
    assert report.skipped["1"] == "exclude="
    assert ("2" in report.skipped) is (update is update_bn_stats)


def test_every_layer_is_in_the_report_or_has_a_reason():
    model = nn.Sequential(*three(), nn.BatchNorm2d(3, track_running_stats=False), DomainSpecificBN(3, 2))
    report = update_bn_stats(model, BATCHES, None, forward=lambda m, x: m[4](m[3](m[:3](x)), domain=0), exclude="0")
    assert [layer.name for layer in report.layers] == ["1", "4[0]"]
    assert report.skipped == {
        "0": "exclude=",
        "2": "eval mode",
        "3": "no running statistics (track_running_stats=False)",
        "4[1]": "no sample of the domain was seen",
    }


def test_excluding_everything_is_told():
    with pytest.warns(UserWarning, match="of 3 BatchNorm layers of Sequential, 3 are left out by exclude="):
        update_bn_stats(three(), BATCHES, None, exclude="*")
    with pytest.raises(InputError, match="exclude='bn' matches no BatchNorm layer"):
        update_bn_stats(three(), BATCHES, None, exclude="bn")


def test_a_warning_points_at_the_users_line_however_it_came_there():
    def helper() -> None:
        update_bn_stats(nn.Linear(1, 1), [torch.randn(2, 1)], 1)

    def both() -> None:
        helper()
        list(map(lambda model: adapt_bn_stats(model, []), [nn.Linear(1, 1)]))  # noqa: C417

    with pytest.warns(UserWarning, match="Linear has no BatchNorm layer") as caught:
        both()
    assert [one.filename for one in caught] == [__file__] * 2
    assert caught[0].lineno == helper.__code__.co_firstlineno + 1
    assert sys.modules[__name__].__file__ == __file__
