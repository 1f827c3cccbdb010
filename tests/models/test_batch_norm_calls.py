"""BatchNormCalls: what forwards hand to batch_norm is seen, and nothing stays switched on behind them."""

import threading

import pytest
import torch
from interrupting import Lines
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from precisebn.models.batch_norm_calls import BatchNormCalls

X = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_calls_with_the_buffer_are_told_from_others_and_from_evaluation():
    layer, other, taken = nn.BatchNorm2d(3), nn.BatchNorm2d(3), list[Tensor]()
    watch = BatchNormCalls(layer._buffers["running_mean"], taken.append)

    def forward(x: Tensor) -> Tensor:
        layer.eval()(x)
        nn.functional.batch_norm(3 * x, None, None, training=True)
        return layer.train()(other(x) + 1)

    watch.of(forward, X)
    assert [x.shape for x in taken] == [X.shape]
    assert watch.seen_own
    assert torch.equal(watch.others[0], 3 * X)
    assert len(watch.others) == 1


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's")
@pytest.mark.usefixtures("pythons_own_handler")
def test_ctrl_c_at_any_line_leaves_no_watch_on():
    """Also between the end of the forward and that of the watch, where a plain ``with watch:`` stayed on for ever."""
    layer = nn.BatchNorm2d(3)

    def watched() -> None:
        BatchNormCalls(layer._buffers["running_mean"], lambda x: None).of(layer, X)

    count = len(Lines().run(watched).ran)
    for at in range(count):
        assert Lines(lambda number, where, at=at: number == at).run(watched).interrupted
        assert _get_current_function_mode_stack() == []
