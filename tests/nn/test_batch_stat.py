"""BatchStatBN: mini-batch statistics in both modes; running statistics kept, and not used."""

import pytest
import torch
from conftest import state_of
from reference import (
    DTYPES,
    LAYOUTS,
    Running,
    assert_checkpointing_changes_nothing,
    assert_is,
    batch_normalized,
    sample,
    trained_with_checkpointing,
    with_random_affine,
)
from torch import nn

from precisebn.errors import InputError
from precisebn.nn import BatchStatBN

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(dtype: torch.dtype = torch.float32, **arguments) -> BatchStatBN:
    return with_random_affine(BatchStatBN(3, dtype=dtype, **arguments))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
def test_normalizes_by_the_mini_batch_in_both_modes(shape, dtype, channels_last, training):
    bn = layer(torch.float64 if dtype == torch.float64 else torch.float32).train(training)
    bn.running_mean.fill_(torch.nan)  # not used
    assert_is(bn, bn, sample(shape, dtype, channels_last), batch_normalized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_half_precision(dtype):
    bn = layer(dtype)
    assert_is(bn, bn, sample((6, 3, 4), dtype), batch_normalized)


def test_training_equals_torch():
    ours, theirs = layer(momentum=0.3, eps=0.5), nn.BatchNorm2d(3, momentum=0.3, eps=0.5)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = sample((4, 3, 5, 5))
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_running_statistics_move_in_training_only(momentum):
    bn, expected = BatchStatBN(3, momentum=momentum), Running(3, momentum)
    for _ in range(3):
        x = sample((4, 3, 5))
        bn(x)
        expected.see(x)
    expected.assert_in(bn)
    before = state_of(bn.eval())
    bn(sample((4, 3, 5)))
    assert state_of(bn) == before


def test_without_affine_and_without_running_statistics():
    bn = BatchStatBN(3, affine=False, track_running_stats=False)
    assert bn.state_dict() == {}
    assert_is(bn, bn, sample((4, 3)), batch_normalized)
    assert_is(bn.eval(), bn, sample((4, 3)), batch_normalized)


def test_output_of_a_sample_depends_on_the_others_at_test_time():
    """What the page warns of: nn.BatchNorm does not do that."""
    x = sample((4, 3, 5))
    ours, theirs = layer().eval(), nn.BatchNorm1d(3).eval()
    torch.testing.assert_close(theirs(x)[:2], theirs(x[:2]))
    assert (ours(x)[:2] - ours(x[:2])).abs().max() > 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_mini_batch_once_where_torch_counts_it_twice(use_reentrant):
    x = sample((4, 3, 2, 2))
    assert_checkpointing_changes_nothing(lambda: BatchStatBN(3), x, use_reentrant)
    trap = nn.BatchNorm2d(3)
    trained_with_checkpointing(trap, x, use_reentrant)
    assert int(trap.num_batches_tracked) == 2


def test_symbolic_trace_takes_eps_0():
    """As the layer does; ``F.batch_norm`` does not in training."""
    bn, x = layer(eps=0.0).eval(), sample((4, 3, 2))
    torch.testing.assert_close(torch.fx.symbolic_trace(bn)(x), bn(x))


def test_an_empty_mini_batch_changes_nothing():
    bn = layer()
    before = state_of(bn)
    assert bn(sample((0, 3, 2))).shape == (0, 3, 2)
    assert state_of(bn) == before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_single_value_per_channel_is_an_error_in_both_modes(training):
    with pytest.raises(InputError, match=r"one value per channel has no variance.*\(1, 3\)"):
        layer().train(training)(torch.ones(1, 3))


def test_wrong_inputs():
    with pytest.raises(InputError, match=r"BatchStatBN\(3\) takes tensors \(N, 3, \*\), got shape \(2, 4\)"):
        layer()(torch.ones(2, 4))
    with pytest.raises(InputError, match=r"BatchStatBN\(3\) takes tensors \(N, 3, \*\), got list"):
        layer()([torch.ones(2, 3)])
