"""pause_tracking: normalization as in training, running statistics as they are."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import state_of
from interrupting import Lines
from torch import Tensor, nn

from precisebn import InputError, accumulate_statistics, convert_ghost, update_bn_stats
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm2d,
    GhostBN,
    use_domain,
)
from precisebn.tracking.pause import is_in_block, pause_tracking

LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "momentum=None": lambda: nn.BatchNorm2d(3, momentum=None),
    "eval": lambda: nn.BatchNorm2d(3).eval(),
    "without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3).eval(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "InstanceNorm2d, eval": lambda: nn.InstanceNorm2d(3, track_running_stats=True).eval(),
    "BatchStatBN": lambda: BatchStatBN(3),
    "ConcatSharedBN": lambda: ConcatSharedBN(3),
    "CycleBatchNormList": lambda: CycleBatchNormList(1, num_features=3),
    "DomainSpecificBN": lambda: DomainSpecificBN(3, 2),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(3),
    "GhostBN": lambda: GhostBN(3, 2),
}


def images() -> Tensor:
    return 2 + 3 * torch.randn(4, 3, 5, 5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore:.*ConcatSharedBN:UserWarning")
def test_the_output_is_the_same_and_nothing_is_written(layer):
    """Under compilation too: the flag that is switched is one that graphs look at."""
    model = nn.Sequential(LAYERS[layer]())
    x = images()
    with use_domain(1), torch.no_grad():
        model(images())  # statistics that are not those of a new layer
        before = state_of(model)
        with pause_tracking(model):
            y = model(x)
            with pause_tracking(model):
                model(x)
            assert torch.equal(model(x), y)
        assert state_of(model) == before
        assert torch.equal(model(x), y)


def test_only_the_layers_asked_for_are_paused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    with pause_tracking(model, "1"):
        model(images())
    assert [int(bn.num_batches_tracked) for bn in model] == [1, 0]


def test_an_exception_ends_the_pause():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ZeroDivisionError), pause_tracking(model):
        raise ZeroDivisionError
    model(images())
    assert int(model[0].num_batches_tracked) == 1


def test_blocks_of_two_threads_may_end_in_any_order():
    model = nn.Sequential(nn.BatchNorm2d(3))
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with pause_tracking(model):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with pause_tracking(model):
        thread.start()
        assert entered.wait(10)
    model(images())
    assert int(model[0].num_batches_tracked) == 0
    leave.set()
    thread.join()
    model(images())
    assert int(model[0].num_batches_tracked) == 1


def test_a_compiled_model_pauses_too(one_thread):
    model = nn.Sequential(nn.BatchNorm2d(3))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(images())
    with pause_tracking(compiled):
        compiled(images())
    assert int(model[0].num_batches_tracked) == 1
    compiled(images())
    assert int(model[0].num_batches_tracked) == 2


def test_sharpness_aware_minimization_tracks_the_first_of_its_two_forwards():
    """SAM (Foret et al. 2021): the second forward is at perturbed weights, whose statistics belong to no model."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = images()
    model(x).square().mean().backward()
    first = model[1].running_mean.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad)
    with pause_tracking(model):
        model(x).square().mean().backward()
    assert torch.equal(model[1].running_mean, first)


def test_no_conversion_takes_a_layer_away_while_it_is_paused():
    """The layer in its place would never track again."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pause_tracking(model):
        before = state_of(model)
        with pytest.raises(InputError, match=r"paused by precisebn\.pause_tracking.*outside of that block"):
            convert_ghost(model, 2)
        assert state_of(model) == before
    convert_ghost(model, 2)(images())
    assert int(model[0].num_batches_tracked) == 1


def test_a_pattern_that_matches_no_layer_is_an_error():
    with (
        pytest.raises(InputError, match="modules='head' matches no BatchNorm layer"),
        pause_tracking(nn.Sequential(nn.BatchNorm2d(3)), "head"),
    ):
        pass


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), Doubling(3), GhostBN(3, 2)], ids=lambda layer: type(layer).__name__
)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "around and in the forward"])
def test_a_recalibration_inside_measures_and_writes_all_the_same(layer, inside):
    """What is paused is what forwards write; a recalibration is asked for by name."""
    model = nn.Sequential(layer)
    batches = [torch.randn(4, 3, 5, 5) for _ in range(3)]

    def forward(m: nn.Module, x: Tensor) -> None:
        with pause_tracking(m) if inside else nullcontext():
            m(x)

    with pause_tracking(model):
        report = update_bn_stats(model, batches, None, forward=forward)
    assert report.layers[0].count == 3 * 4 * 25
    assert layer.track_running_stats is True


def test_a_layer_knows_whether_its_pause_will_end():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pause_tracking(model):
        with pause_tracking(model):
            assert is_in_block(model[0])
            assert not is_in_block(copy.deepcopy(model)[0])
        assert is_in_block(model[0])
    assert not is_in_block(model[0])


# ---- Lazy layers ----------------------------------------------------------------------------------------------------


LAZY = {
    "LazyBatchNorm2d": nn.LazyBatchNorm2d,
    "momentum=None": lambda: nn.LazyBatchNorm2d(momentum=None),
    "without statistics": lambda: nn.LazyBatchNorm2d(track_running_stats=False),
    "LazyInstanceNorm2d": lambda: nn.LazyInstanceNorm2d(track_running_stats=True, affine=True),
    "LazyInstanceNorm2d, without": lambda: nn.LazyInstanceNorm2d(affine=True),
}


@pytest.mark.parametrize("layer", LAZY)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_layer_may_see_its_first_mini_batch_inside(layer):
    """Torch makes running statistics only if the layer tracks: without, half of it stayed without a size for ever."""
    model, twin = nn.Sequential(LAZY[layer]()), nn.Sequential(LAZY[layer]())
    x = images()
    with pause_tracking(model), pause_tracking(model):
        model(x)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, twin(x))
    assert type(model[0]) is type(twin[0])
    assert vars(model[0]).keys() == vars(twin[0]).keys()
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
        assert torch.equal(fresh.get_buffer(name), torch.full_like(buffer, name.endswith("var")))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_layer_that_sees_none_inside_stays_lazy():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    before = state_of(model)
    with pause_tracking(model):
        assert model[0].has_uninitialized_params()
    assert state_of(model) == before
    model(images())
    assert int(model[0].num_batches_tracked) == 1


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's")
@pytest.mark.usefixtures("pythons_own_handler")
def test_ctrl_c_at_any_line_leaves_no_layer_paused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))

    def block() -> None:
        with pause_tracking(model):
            pass

    before = state_of(model)
    for at in range(len(Lines().run(block).ran)):
        assert Lines(lambda number, where, at=at: number == at).run(block).interrupted
        assert state_of(model) == before
        assert not any(map(is_in_block, model))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("block", [pause_tracking, accumulate_statistics])
def test_compiled_code_that_would_go_on_tracking_is_refused(block):
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), nn.BatchNorm2d(3))
    with pytest.raises(InputError, match=r"layer '0.0' is code of torch.jit.*on the model that it was made from"):
        block(model).__enter__()
    exported = torch.export.export(nn.Sequential(nn.BatchNorm2d(3)), (torch.randn(4, 3, 5, 5),))
    for code in (exported.module(), torch.export.unflatten(exported), exported.run_decompositions().module()):
        with pytest.raises(InputError, match=r"is code of torch.export, which tracks"):
            block(nn.Sequential(code, nn.BatchNorm2d(3))).__enter__()
    evaluating = torch.export.export(nn.Sequential(nn.BatchNorm2d(3)).eval(), (torch.randn(4, 3, 5, 5),)).module()
    with block(nn.Sequential(evaluating, torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3))))) as plain:
        plain(torch.randn(4, 3, 5, 5))
    model[0].eval()  # a teacher
    with block(model, "0"), block(model, "1"):
        model(torch.randn(4, 3, 5, 5))
    with block(model):
        model(torch.randn(4, 3, 5, 5))
