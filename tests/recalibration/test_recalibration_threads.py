"""A layer that several threads run while it is recalibrated: of one forward, or of somebody else's."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import state_of
from torch import Tensor, nn

from precisebn import adapt_bn_stats, update_bn_stats
from precisebn.nn import GhostBN
from precisebn.recalibration.recording import Recording
from precisebn.statistics.moments import Moments

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENCE = 0.3
"""Seconds that a forward waits for what must not happen while it runs."""


class Met(nn.BatchNorm2d):
    """Calls a function in the middle of its forward, which is nn.BatchNorm2d's."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.meet: Callable[[], object] = lambda: None

    def _check_input_dim(self, input: Tensor) -> None:
        self.meet()
        super()._check_input_dim(input)


class MetInItsOwnForward(Met):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Overlap:
    """Lets one forward, of another thread, wait for a second to be inside, and that one for the first to be done."""

    def __init__(self) -> None:
        self.first_is_in, self.second_is_in, self.first_is_done = (threading.Event() for _ in range(3))
        self.runs_second = threading.current_thread()

    def __call__(self) -> None:
        if threading.current_thread() is self.runs_second:
            self.second_is_in.set()
            assert self.first_is_done.wait(30)
        elif not self.first_is_in.is_set():
            self.first_is_in.set()
            self.second_is_in.wait(PATIENCE)

    def of(self, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor(1) as other:
            running = other.submit(first)
            running.add_done_callback(lambda _: self.first_is_done.set())
            assert self.first_is_in.wait(30)
            output = second()
            return running.result(), output


def chunks() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 5, 5), 7 + 2 * torch.randn(6, 3, 5, 5)


@pytest.mark.parametrize("prior", [0.0, 4.0])
@pytest.mark.parametrize("kind", [Met, MetInItsOwnForward])
def test_forwards_of_one_layer_by_two_threads_normalize_by_their_own_statistics(kind, prior):
    """One saved the mode and the buffers that the other had set, and put these back as the layer's own."""
    layer, alone = kind(3), kind(3)
    parts, outputs = chunks(), []

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        layer.meet = overlap = Overlap()
        outputs.extend(overlap.of(lambda: model(batch[0]), lambda: model(batch[1])))
        layer.meet = lambda: None

    adapt_bn_stats(layer, [parts], prior, modules="all", forward=forward)
    assert layer.training
    adapt_bn_stats(alone, [parts], prior, modules="all", forward=lambda m, batch: [m(part) for part in batch])
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, alone.get_buffer(name), rtol=1e-6, atol=1e-6)
    if not prior:
        for y in outputs:
            assert y.mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), MetInItsOwnForward(3), GhostBN(3, 2)], ids=lambda m: type(m).__name__
)
def test_all_that_many_threads_run_is_counted(layer):
    parts = [torch.randn(4, 3, 5, 5) + i for i in range(64)]

    def forward(model: nn.Module, batch: list[Tensor]) -> None:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(model, batch))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        report = update_bn_stats(layer, [parts], 1, forward=forward)
    finally:
        sys.setswitchinterval(interval)
    assert report.layers[0].count == 64 * 4 * 25
    values = torch.cat(parts).double()
    torch.testing.assert_close(layer.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), values.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [Met, MetInItsOwnForward])
def test_a_forward_that_outlives_a_recalibration_changes_nothing(kind, fails):
    """It put back, as the layer's own, the scratch buffers that it had found: and they stayed for good."""
    layer = kind(3).eval()
    inside, ended = threading.Event(), threading.Event()

    def stays() -> None:
        inside.set()
        ended.wait(PATIENCE)

    def foreign() -> None:
        with torch.no_grad():
            layer(torch.randn(2, 3, 5, 5))

    thread = threading.Thread(target=foreign)

    def forward(model: nn.Module, x: Tensor) -> None:
        model(x)
        layer.meet = stays
        thread.start()
        assert inside.wait(30)
        layer.meet = nothing
        if fails:
            raise ZeroDivisionError

    nothing = layer.meet
    before, own = state_of(layer), dict(layer.named_buffers())
    try:
        update_bn_stats(layer, [torch.randn(4, 3, 5, 5)], 1, modules="all", forward=forward)
    except ZeroDivisionError:
        assert fails
    ended.set()
    after = state_of(layer)
    thread.join()
    assert state_of(layer) == after
    assert all(layer.get_buffer(name) is buffer for name, buffer in own.items())
    assert not layer.training
    if fails:
        assert after == before


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), MetInItsOwnForward(3)], ids=lambda layer: type(layer).__name__)
def test_a_call_that_comes_too_late_is_one_of_the_layer_as_it_is(layer, training):
    """A thread that has looked the forward up, and runs when the recording is over."""
    kept: list[Any] = []

    def forward(model: nn.Module, x: Tensor) -> None:
        kept.append(model.forward)
        model(x)

    report = update_bn_stats(layer.train(), [torch.randn(4, 3, 5, 5)], 1, forward=forward)
    x = 3 + torch.randn(4, 3, 5, 5)
    layer.train(training)
    y = kept[0](x)
    assert int(layer.num_batches_tracked) == 1 + training
    if not training:
        assert torch.equal(y, layer(x))
        report.undo()  # nothing has been changed since


def test_moments_that_come_too_late_do_not_count():
    layer, x = GhostBN(3, 2), torch.randn(4, 3, 5, 5)
    with Recording(layer, {"": layer}, "population") as recording:
        layer(x)
        recorder, count = layer.recorder, recording.estimators[0].slots(0, 1)[0]
        recording.stop()
        before = count.clone()
        recorder(Moments.of(x), None)
        assert torch.equal(count, before)
