"""report.undo() and recalibrated(): old statistics come back bit for bit, or nothing is touched and it is said why."""

import copy
import gc
import io
import json
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import state_of
from interrupting import Lines
from torch import Tensor, nn

from precisebn import (
    InputError,
    PreciseBNError,
    UndoError,
    UpdateReport,
    adapt_bn_stats,
    convert_ghost,
    recalibrated,
    update_bn_stats,
)
from precisebn.models.tensor_pictures import same_bits
from precisebn.nn import CycleBatchNormList, DomainSpecificBN, GhostBN

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [2 + 3 * torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Net(nn.Module):
    """A layer of every kind that keeps its statistics in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.own, self.wide = nn.BatchNorm2d(3), Own(3), nn.BatchNorm2d(3).double()
        self.uncounted = nn.BatchNorm2d(3)
        self.uncounted.num_batches_tracked = None
        self.domains, self.cycle, self.ghost = (
            DomainSpecificBN(3, 2),
            CycleBatchNormList(2, num_features=3),
            GhostBN(3, 2),
        )
        self.idle = nn.BatchNorm2d(3).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.uncounted.train(False)(self.own(self.bn(x)))
        x = self.wide(x.double()).to(x.dtype)
        x = self.ghost(self.domains(x, domain=1))
        return self.idle(self.cycle(self.cycle(x)))


def net() -> Net:
    """Whose statistics are those of no new layer, NaN in an odd channel among them."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for index, (name, buffer) in enumerate(model.named_buffers()):
            buffer.fill_(index) if buffer.dtype == torch.int64 else buffer.uniform_(1, 2)
            if name == "bn.running_mean":
                buffer[0], buffer[1] = -0.0, float("nan")
    return model


def statistics(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Of every buffer: where it lies, and what is in it."""
    return {name: (b.data_ptr(), b.clone()) for name, b in model.named_buffers()}


def equal(a: dict[str, tuple[int, Tensor]], b: dict[str, tuple[int, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(a[k][0] == b[k][0] and same_bits(a[k][1], b[k][1]) for k in a)


def update(model: nn.Module) -> UpdateReport:
    return update_bn_stats(model, BATCHES, None, modules="all", exclude="idle")


CALLS: dict[str, Callable[[nn.Module], UpdateReport]] = {
    "update": update,
    "adapt": lambda model: adapt_bn_stats(model, BATCHES, exclude="idle"),
}


@pytest.mark.parametrize("call", CALLS)
def test_undo_puts_the_statistics_of_all_layers_back_in_the_same_memory(call):
    model = net()
    before = state_of(model)
    report = CALLS[call](model)
    assert len(report.layers) == 8
    changed = before.differences(state_of(model))
    report.undo()
    after = state_of(model)
    modes = {"uncounted:training"}  # which the forward has set itself
    assert len(changed) > 15
    assert set(before.differences(after)) <= modes


def test_with_a_prior_too():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = state_of(model)
    adapt_bn_stats(model, BATCHES, prior=5).undo()
    assert state_of(model) == before


def test_the_statistics_are_there_inside_the_block_and_the_old_ones_behind_it():
    model, other = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    before = state_of(model)
    expected = update_bn_stats(other, BATCHES, None)
    with recalibrated(model, BATCHES, None) as report:
        assert report.to_dict() == expected.to_dict()
        assert torch.equal(model[0].running_mean, other[0].running_mean)
        assert before != state_of(model)
        model.eval()(BATCHES[0])
    model.train()
    assert state_of(model) == before


def test_a_block_with_a_prior_is_that_of_adapt_bn_stats():
    model, other = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    adapt_bn_stats(other, BATCHES, 5.0)
    with recalibrated(model, BATCHES, None, prior=5.0):
        assert torch.equal(model[0].running_mean, other[0].running_mean)
    assert not model[0].running_mean.any()


def test_a_block_that_raises_leaves_the_old_statistics_too():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), recalibrated(model, BATCHES, None):
        raise ZeroDivisionError
    assert state_of(model) == before


def test_a_block_whose_recalibration_fails_raises_what_it_raises():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = state_of(model)
    with pytest.raises(PreciseBNError, match="ended after 3 mini-batches"), recalibrated(model, BATCHES, 5):
        pass
    assert state_of(model) == before


def test_a_block_in_which_undo_was_called_has_nothing_left_to_do():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with recalibrated(model, BATCHES, None) as report:
        report.undo()
        model(BATCHES[0])
    assert int(model[0].num_batches_tracked) == 1


# ---- Changed since ---------------------------------------------------------------------------------------------------


def train_on(model: nn.Module) -> None:
    model[0](BATCHES[0])


def load_other(model: nn.Module) -> None:
    model.load_state_dict(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).state_dict(), assign=True)


def write_by_data(model: nn.Module) -> None:
    """Which no version counter sees."""
    model[0].running_var.data[2] += 1e-3


def count_on(model: nn.Module) -> None:
    model[0].num_batches_tracked += 1


@pytest.mark.parametrize("change", [train_on, load_other, write_by_data, count_on])
def test_statistics_that_somebody_has_changed_are_named_and_left(change):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    before = statistics(model)
    report = update_bn_stats(model, BATCHES, None)
    change(model)
    changed = state_of(model)
    who = r"layers '0', '1'" if change is load_other else r"layer '0'"
    with pytest.raises(UndoError, match=rf"nothing was put back: the statistics of {who} have been changed since"):
        report.undo()
    assert state_of(model) == changed
    report.undo(force=True)
    assert all(same_bits(before[name][1], value) for name, (_, value) in statistics(model).items())


def test_a_block_that_trains_is_told_at_its_end_unless_it_was_foreseen():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = state_of(model)
    with pytest.raises(UndoError, match="layer '0' have been changed since"), recalibrated(model, BATCHES, None):
        model(BATCHES[0])
    assert state_of(model) != before
    model[0].reset_running_stats()
    with recalibrated(model, BATCHES, None, force=True):
        model(BATCHES[0])
    assert state_of(model) == before


def test_an_exception_of_the_block_matters_more_and_says_that_statistics_are_not_back():
    model = nn.Sequential(nn.BatchNorm2d(3))

    def block() -> None:
        with recalibrated(model, BATCHES, None):
            model(BATCHES[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        block()
    [note] = caught.value.__notes__
    assert "from before recalibrated() are not back: nothing was put back" in note


def test_of_several_recalibrations_the_last_one_is_undone_first():
    model = nn.Sequential(nn.BatchNorm2d(3))
    first = state_of(model)
    one = update_bn_stats(model, BATCHES, None)
    between = state_of(model)
    two = update_bn_stats(model, BATCHES[:1], None)
    with pytest.raises(UndoError, match="another recalibration"):
        one.undo()
    two.undo()
    assert state_of(model) == between
    one.undo()
    assert state_of(model) == first


def test_what_is_undone_cannot_be_undone_again():
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)
    report.undo()
    before = state_of(model)
    for force in (False, True):
        with pytest.raises(UndoError, match="has been undone already"):
            report.undo(force)
    assert state_of(model) == before


def test_where_nothing_was_recalibrated_undo_does_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3).eval())
    with pytest.warns(UserWarning, match="nothing was recalibrated"):
        report = update_bn_stats(model, BATCHES, None)
    before = state_of(model)
    report.undo()
    assert state_of(model) == before


# ---- A model that has moved on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_another_dtype_the_old_statistics_are_what_they_would_be_there(dtype):
    model, untouched = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    for one in (model, untouched):
        one[0].running_mean.copy_(torch.tensor([0.1, 1 / 3, 1e-6]))
    report = update_bn_stats(model, BATCHES, None)
    model.to(dtype)
    report.undo()
    expected = untouched.to(dtype).state_dict()
    assert model[0].running_mean.dtype == dtype
    assert all(same_bits(value, expected[name]) for name, value in model.state_dict().items())


def test_on_another_device_they_are_put_back_there():
    """Of two devices this machine has one: the buffers are others, as behind ``model.to(device)``."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)
    model._apply(lambda tensor: tensor.clone())
    memory = statistics(model)
    report.undo()
    assert {name: place for name, (place, _) in statistics(model).items()} == {n: p for n, (p, _) in memory.items()}
    assert not model[0].running_mean.any()


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_the_very_same_statistics_changes_nothing(assign):
    model = net()
    before = statistics(model)
    report = update(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file), assign=assign)
    report.undo()
    assert all(same_bits(before[name][1], value) for name, (_, value) in statistics(model).items())


def test_layers_that_were_converted_or_removed_are_named():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    kept = model[0]  # alive, but in the model no longer
    old = model[2].running_mean.clone()
    report = update_bn_stats(model, BATCHES, None)
    convert_ghost(model, 2, include=["0", "1"])
    before = state_of(model)
    with pytest.raises(UndoError, match="layers '0', '1': no longer in the model, or with statistics of another"):
        report.undo()
    assert state_of(model) == before
    report.undo(force=True)
    assert torch.equal(model[2].running_mean, old)
    assert kept.running_mean.any()


def test_a_layer_with_fewer_channels_than_before_is_named():
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)
    model[0].running_mean = model[0].running_mean[:2].clone()
    with pytest.raises(UndoError, match="layer '0': no longer in the model, or with statistics of another form"):
        report.undo()


def test_a_wrapper_or_slice_that_is_gone_does_not_matter():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    before = state_of(model)
    report = update_bn_stats(model[:1], BATCHES, None)
    wrapped = update_bn_stats(torch.optim.swa_utils.AveragedModel(model).module[:1], BATCHES, None)
    gc.collect()
    report.undo()
    assert state_of(model) == before
    with pytest.raises(UndoError, match="no longer in the model"):
        wrapped.undo()  # of a copy, which is gone


# ---- The report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report))])
def test_a_copy_of_a_report_says_that_it_cannot_undo_and_carries_no_statistics(copied):
    model = nn.Sequential(nn.BatchNorm2d(3000))
    before = state_of(model)
    report = update_bn_stats(model, [torch.randn(4, 3000, 2, 2)], None)
    other = copied(report)
    assert other.to_dict() == report.to_dict()
    assert len(pickle.dumps(report)) < 3000
    with pytest.raises(UndoError, match=r"no copy of a report does.*the report that the recalibration has returned"):
        other.undo()
    report.undo()
    assert state_of(model) == before


def test_a_report_shows_and_writes_nothing_of_what_it_keeps():
    report = update_bn_stats(nn.Sequential(nn.BatchNorm2d(3)), BATCHES, None)
    assert "undo" not in repr(report) + str(report) + json.dumps(report.to_dict())


def test_a_report_keeps_no_model_alive():
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)
    layer = weakref.ref(model[0])
    del model
    gc.collect()
    assert layer() is None
    with pytest.raises(UndoError, match="layer '0': no longer in the model"):
        report.undo()


# ---- Ctrl-C, threads -------------------------------------------------------------------------------------------------

main_thread_only = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's"
)


@main_thread_only
@pytest.mark.usefixtures("pythons_own_handler")
def test_ctrl_c_finds_all_statistics_back_or_none():
    done = net()
    old = statistics(done)
    report = update(done)
    new = statistics(done)
    count = len(Lines().run(report.undo).ran)
    outcomes = set()
    for at in range(0, count, 2):
        model = net()
        report = update(model)
        assert Lines(lambda number, where, at=at: number == at).run(report.undo).interrupted
        now = statistics(model)
        is_back, is_new = (all(same_bits(now[name][1], values[name][1]) for name in now) for values in (old, new))
        assert is_back != is_new
        outcomes.add(is_back)
        if is_new:
            report.undo()
            assert all(same_bits(value, old[name][1]) for name, (_, value) in statistics(model).items())
    assert outcomes == {True, False}


@main_thread_only
@pytest.mark.usefixtures("pythons_own_handler")
def test_ctrl_c_in_or_around_a_block_ends_with_the_old_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = state_of(model)

    def block() -> None:
        with recalibrated(model, BATCHES[:1], None):
            pass

    ran = Lines().run(block).ran
    start = next(n for n, (file, _) in enumerate(ran) if file.endswith("/undo.py"))  # the rest has tests of its own
    for at in [*range(start, len(ran) - 60, 7), *range(len(ran) - 60, len(ran))]:
        assert Lines(lambda number, where, at=at: number == at).run(block).interrupted
        assert state_of(model) == before, ran[at]


def test_a_model_that_is_just_being_recalibrated_is_not_touched():
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)

    def forward(model: nn.Module, batch: Tensor) -> None:
        with pytest.raises(InputError, match="is being recalibrated already"):
            report.undo()
        model(batch)

    again = update_bn_stats(model, BATCHES, None, forward=forward)
    again.undo()
    report.undo()
    assert not model[0].running_mean.any()


def test_a_write_that_fails_leaves_what_was_there():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    report = update_bn_stats(model, BATCHES, None)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        model[1].running_var = model[1].running_var.clone()  # which nobody can write to outside of that mode
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        report.undo()
    assert all(same_bits(value, after[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        report.undo()
    assert not model[0].running_mean.any()
