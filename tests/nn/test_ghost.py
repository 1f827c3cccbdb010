"""GhostBN: a loop of batch normalizations over parts of the mini-batch, with the running statistics of all of it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import state_of
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Running,
    assert_checkpointing_changes_nothing,
    assert_is,
    batch_normalized,
    population_normalized,
    sample,
    trained_with_checkpointing,
    with_random_affine,
    with_random_population,
)
from torch import Tensor, nn

from precisebn.errors import InputError
from precisebn.nn import GhostBN

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(ghost_size: int, dtype: torch.dtype = torch.float32, **arguments) -> GhostBN:
    return with_random_population(with_random_affine(GhostBN(3, ghost_size, dtype=dtype, **arguments)))


def normalized_in_chunks(ghost_size: int):
    def reference(xs: list[Tensor], w: Tensor | None, b: Tensor | None) -> list[Tensor]:
        return [torch.cat([batch_normalized([chunk], w, b)[0] for chunk in xs[0].split(ghost_size)])]

    return reference


def spread_out(num_samples: int, width: int) -> Tensor:
    """Values of which no two of a channel are closer than 0.9, so that no deviation is near 0."""
    numbers = torch.stack([torch.randperm(num_samples * width) for _ in range(3)])
    return (numbers + 0.1 * torch.rand(numbers.shape, dtype=torch.float64)).view(3, num_samples, width).movedim(0, 1)


@given(st.integers(2, 9), st.integers(1, 10), st.integers(2, 3))
def test_equals_a_loop_over_chunks_forward_and_backward(num_samples, ghost_size, width):
    """The last chunk may be smaller; a chunk may be one sample, which is normalized over its positions."""
    bn = layer(ghost_size, torch.float64)
    x = spread_out(num_samples, width).requires_grad_()
    same = x.detach().clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in (bn.weight, bn.bias))
    y = bn(x)
    expected = torch.cat([F.batch_norm(c, None, None, weight, bias, training=True) for c in same.split(ghost_size)])
    cotangent = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, bn.weight, bn.bias], cotangent)
    right = torch.autograd.grad(expected, [same, weight, bias], cotangent)
    # Gradients hold the square of mean / deviation, which is below 27 / 0.45, and some roundings of it.
    torch.testing.assert_close((y, *got), (expected, *right), rtol=1e-10, atol=1e-10)


@given(st.integers(2, 9), st.integers(1, 10), st.sampled_from([None, 0.1, 1.0]))
def test_running_statistics_are_those_of_the_whole_mini_batch(num_samples, ghost_size, momentum):
    bn, expected = GhostBN(3, ghost_size, momentum=momentum, dtype=torch.float64), Running(3, momentum)
    for _ in range(2):
        x = sample((num_samples, 3, 2), torch.float64)
        bn(x)
        expected.see(x)  # once, with the variance that lies between ghost batches too
    expected.assert_in(bn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels_last"), [((14, 3), False), *LAYOUTS[1:]])
def test_all_dtypes_and_layouts(shape, dtype, channels_last):
    ghost_size = 7 if len(shape) == 2 else 2
    bn = layer(ghost_size, torch.float64 if dtype == torch.float64 else torch.float32)
    x = sample(shape, dtype, channels_last)
    assert_is(bn, bn, x, normalized_in_chunks(ghost_size))
    assert_is(bn.eval(), bn, x, population_normalized(bn))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ghost_size", [6, 1000])
def test_a_mini_batch_of_one_ghost_batch_is_plain_batch_normalization(shape, ghost_size):
    bn_class = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    ours, theirs = layer(ghost_size, eps=0.5), bn_class(3, eps=0.5)
    theirs.load_state_dict(ours.state_dict())
    x = sample(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_ghost_size_1_is_instance_norm():
    x = sample((4, 3, 5, 5))
    torch.testing.assert_close(GhostBN(3, 1, eps=0.5)(x), F.instance_norm(x, eps=0.5))


def test_evaluation_changes_nothing_and_takes_single_samples():
    bn = layer(2).eval()
    before = state_of(bn)
    x = sample((5, 3))
    torch.testing.assert_close(torch.cat([bn(one) for one in x.split(1)]), bn(x))
    assert state_of(bn) == before


def test_without_affine_and_without_running_statistics():
    bn = GhostBN(3, 2, affine=False, track_running_stats=False)
    assert bn.state_dict() == {}
    x = sample((6, 3, 2))
    assert_is(bn, bn, x, normalized_in_chunks(2))
    assert_is(bn.eval(), bn, x, normalized_in_chunks(2))  # as nn.BatchNorm's: by batch statistics, in its own way


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_mini_batch_once_where_torch_counts_it_twice(use_reentrant):
    x = sample((5, 3, 2, 2))
    assert_checkpointing_changes_nothing(lambda: GhostBN(3, 2), x, use_reentrant)
    trap = nn.BatchNorm2d(3)
    trained_with_checkpointing(trap, x, use_reentrant)
    assert int(trap.num_batches_tracked) == 2


def test_an_empty_mini_batch_changes_nothing():
    bn = layer(2)
    before = state_of(bn)
    assert bn(sample((0, 3, 2))).shape == (0, 3, 2)
    assert state_of(bn) == before


@pytest.mark.parametrize("ghost_size", [0, -1, 1.5, 2.0, True, "2", None])
def test_ghost_size_must_be_a_whole_number(ghost_size):
    with pytest.raises(InputError, match=f"ghost_size={ghost_size!r} must be a whole number of samples, 1 or more"):
        GhostBN(3, ghost_size)


@pytest.mark.parametrize(("num_samples", "ghost_size"), [(5, 2), (1, 4), (4, 1), (3, 1)])
def test_a_ghost_batch_of_a_single_value_is_an_error_in_training_only(num_samples, ghost_size):
    bn, x = layer(ghost_size), torch.ones(num_samples, 3, 1)
    before = state_of(bn)
    with pytest.raises(InputError, match=rf"x \({num_samples}, 3, 1\), cut into ghost batches of {ghost_size}, ends.*"):
        bn(x)
    assert state_of(bn) == before
    bn(x.expand(-1, -1, 2))
    bn.eval()(x)


def test_wrong_inputs():
    with pytest.raises(InputError, match=r"GhostBN\(3\) takes tensors \(N, 3, \*\), got shape \(2, 4\)"):
        layer(2)(torch.ones(2, 4))


def test_it_shows_its_ghost_size():
    shown = str(GhostBN(3, 2))
    assert shown.startswith(str(nn.BatchNorm2d(3)).replace("BatchNorm2d", "GhostBN")[:-1])
    assert shown.endswith(", ghost_size=2)")
