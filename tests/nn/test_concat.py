"""ConcatSharedBN: flatten, concatenate, normalize, split; without the concatenation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import state_of
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    DTYPES,
    LAYOUTS,
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
from precisebn.nn import ConcatSharedBN

pytestmark = pytest.mark.usefixtures("one_thread")

FPN = [(2, 3, size, size) for size in (32, 16, 8, 4, 2)]


def layer(dtype: torch.dtype = torch.float32, **arguments) -> ConcatSharedBN:
    return with_random_population(with_random_affine(ConcatSharedBN(3, dtype=dtype, **arguments)))


def pyramid(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> list[Tensor]:
    """Levels of different location and scale: normalized one by one they would come out otherwise."""
    return [sample(shape, dtype, channels_last) * (1 + k / 4) - k / 2 for k, shape in enumerate(FPN)]


class FlattenCatSplit(nn.Module):
    """What ConcatSharedBN stands for, with torch's own layer."""

    def __init__(self, bn: nn.BatchNorm1d) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        together = self.bn(torch.cat([x.flatten(2).movedim(1, 2).flatten(0, 1) for x in xs]))
        parts = together.split([x.numel() // x.shape[1] for x in xs])
        per_sample = [part.view(len(x), -1, x.shape[1]) for part, x in zip(parts, xs, strict=True)]
        return [part.movedim(2, 1).reshape(x.shape).clone() for part, x in zip(per_sample, xs, strict=True)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_five_fpn_levels_equal_flatten_cat_batchnorm_split(momentum):
    ours = layer(torch.float64, momentum=momentum, eps=0.5)
    theirs = FlattenCatSplit(nn.BatchNorm1d(3, momentum=momentum, eps=0.5, dtype=torch.float64))
    theirs.bn.load_state_dict(ours.state_dict())
    for _ in range(2):
        xs = [x.requires_grad_() for x in pyramid(torch.float64)]
        same = [x.detach().clone().requires_grad_() for x in xs]
        ys, expected = ours(xs), theirs(same)
        cotangents = [torch.randn_like(y) for y in ys]
        got = torch.autograd.grad(ys, [*xs, ours.weight, ours.bias], cotangents)
        right = torch.autograd.grad(expected, [*same, theirs.bn.weight, theirs.bn.bias], cotangents)
        torch.testing.assert_close(ys, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)  # weights' are sums over 2728 values
    torch.testing.assert_close(ours.state_dict(), theirs.bn.state_dict(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.eval()(xs), theirs.eval()(xs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes_and_layouts(dtype, channels_last):
    bn = layer(torch.float64 if dtype == torch.float64 else torch.float32)
    xs = pyramid(dtype, channels_last)
    assert_is(bn, bn, xs, batch_normalized)
    assert_is(bn.eval(), bn, xs, population_normalized(bn))


@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
def test_a_single_tensor_is_plain_batch_normalization(shape, channels_last):
    bn, x = layer(), sample(shape, channels_last=channels_last)
    assert_is(bn, bn, x, batch_normalized)
    assert_is(bn.eval(), bn, x, population_normalized(bn))


def test_tensors_of_different_dimensions_and_layouts():
    bn = layer()
    xs = [sample((4, 3)), sample((2, 3, 5)), sample((1, 3, 2, 3), channels_last=True), sample((1, 3, 1, 1, 1))]
    assert_is(bn, bn, xs, batch_normalized)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1), st.randoms())
def test_neither_the_cut_nor_the_order_matters(sizes, random):
    whole = sample((sum(sizes), 3), torch.float64)
    bn, expected = layer(torch.float64), layer(torch.float64)
    expected.load_state_dict(bn.state_dict())
    parts = list(enumerate(whole.split(sizes)))
    random.shuffle(parts)
    ys = bn([part for _, part in parts])
    in_order = [y for _, y in sorted(zip([k for k, _ in parts], ys, strict=True), key=lambda pair: pair[0])]
    # Two values may lie close together; one over the deviation, at most 316 with this eps, magnifies rounding.
    torch.testing.assert_close(torch.cat(in_order), expected(whole), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bn.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


def test_lists_and_tuples_give_lists_and_a_tensor_a_tensor():
    bn, xs = layer(), pyramid()
    expected = bn(xs)
    assert isinstance(expected, list)
    from_tuple = bn(tuple(xs))
    assert isinstance(from_tuple, list)
    assert all(torch.equal(a, b) for a, b in zip(from_tuple, expected, strict=True))
    assert isinstance(bn(xs[0]), Tensor)
    assert isinstance(bn([xs[0]]), list)
    for evaluated in (bn.eval()(xs), bn(tuple(xs))):
        assert isinstance(evaluated, list)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_running_statistics_move_once_a_forward_in_training_only(momentum):
    bn, expected = ConcatSharedBN(3, momentum=momentum), Running(3, momentum)
    for _ in range(3):
        xs = pyramid()
        bn(xs)
        expected.see(*xs)
    expected.assert_in(bn)
    before = state_of(bn.eval())
    bn(pyramid())
    assert state_of(bn) == before


def test_empty_levels_count_for_nothing_and_stay_empty():
    bn, expected = layer(), layer()
    expected.load_state_dict(bn.state_dict())
    xs = pyramid()
    empty = torch.empty(0, 3, 7, 7)
    ys = bn([empty, xs[0], empty, *xs[1:], torch.empty(2, 3, 0)])
    assert [tuple(ys[k].shape) for k in (0, 2, -1)] == [(0, 3, 7, 7), (0, 3, 7, 7), (2, 3, 0)]
    torch.testing.assert_close([ys[1], *ys[3:-1]], expected(xs))
    torch.testing.assert_close(bn.state_dict(), expected.state_dict())


def test_only_empty_levels_change_nothing():
    bn = layer(momentum=None)
    before = state_of(bn)
    leaves = [torch.empty(0, 3, 7, 7, requires_grad=True), torch.empty(0, 3, requires_grad=True)]
    sum(y.sum() for y in bn(leaves)).backward()
    assert state_of(bn) == before
    assert bn.weight.grad.tolist() == bn.bias.grad.tolist() == [0.0] * 3
    assert [tuple(y.shape) for y in bn.eval()(leaves)] == [(0, 3, 7, 7), (0, 3)]


def test_levels_without_gradient_and_outputs_that_are_not_used():
    bn, xs = layer(torch.float64), pyramid(torch.float64)
    together = [x.clone().requires_grad_() for x in xs]
    bn(together)[3].square().sum().backward()
    alone = xs[0].clone().requires_grad_()
    ys = bn([alone, *xs[1:]])
    ys[3].square().sum().backward()
    torch.testing.assert_close(alone.grad, together[0].grad)
    assert alone.grad.abs().max() > 0  # the first level moves the statistics that normalize the fourth


def test_without_affine_and_without_running_statistics():
    bn = ConcatSharedBN(3, affine=False, track_running_stats=False)
    assert bn.state_dict() == {}
    assert_is(bn, bn, pyramid(), batch_normalized)
    assert_is(bn.eval(), bn, pyramid(), batch_normalized)


def test_for_backward_it_keeps_the_levels_themselves_and_nothing_of_their_size():
    bn, xs, saved = layer(), [x.requires_grad_() for x in pyramid()], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bn(xs)
    assert {t.data_ptr() for t in saved if t.numel() > 3} == {x.data_ptr() for x in xs}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_mini_batch_once_where_torch_counts_it_twice(use_reentrant):
    assert_checkpointing_changes_nothing(lambda: ConcatSharedBN(3), pyramid(), use_reentrant)
    trap = FlattenCatSplit(nn.BatchNorm1d(3))
    trained_with_checkpointing(trap, pyramid(), use_reentrant)
    assert int(trap.bn.num_batches_tracked) == 2


def test_level_by_level_a_plain_batchnorm_is_something_else():
    """The trap that it is for: in training each level by its own statistics, at test time by the average of all."""
    xs = pyramid()
    shared, plain = ConcatSharedBN(3, momentum=1.0), nn.BatchNorm2d(3, momentum=1.0)
    apart = [plain(x) for x in xs]
    assert max((a - b).abs().max().item() for a, b in zip(shared(xs), apart, strict=True)) > 0.5
    # Biased variances normalize in training, unbiased ones are kept: of n = 2728 values.
    n = sum(x.numel() for x in xs) / 3
    for y, trained in zip(shared.eval()(xs), shared.train()(xs), strict=True):
        torch.testing.assert_close(y, trained * ((n - 1) / n) ** 0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (3, r"ConcatSharedBN\(3\) takes a tensor or a list of tensors, got int"),
        (None, "takes a tensor or a list of tensors, got NoneType"),
        ({"p3": torch.ones(2, 3)}, "takes a tensor or a list of tensors, got dict"),
        ([], "xs is an empty list; pass at least one tensor"),
        ([torch.ones(2, 3), "p4"], r"takes tensors \(N, 3, \*\), got str"),
        ([torch.ones(2, 3), torch.ones(2, 4)], r"got shape \(2, 4\); build it with num_features="),
        ([torch.ones(2, 3), torch.ones(2, 3).double()], r"must agree in channels, dtype and device, but xs\[1\]"),
        ([torch.ones(1, 3), torch.ones(0, 3)], "one value per channel has no variance"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(x, message):
    bn = layer()
    before = state_of(bn)
    with pytest.raises(InputError, match=message):
        bn(x)
    assert state_of(bn) == before


def test_one_value_in_each_level_is_enough_for_a_variance():
    a, b = ConcatSharedBN(3)([torch.zeros(1, 3), torch.full((1, 3), 2.0)])
    expected = F.batch_norm(torch.tensor([[0.0] * 3, [2.0] * 3]), None, None, training=True)
    torch.testing.assert_close(torch.cat([a, b]), expected)


# ---- One tensor after the other -----------------------------------------------------------------------------------


def level_by_level(bn: nn.Module, count: int = 3) -> Tensor:
    return sum(bn(x).square().sum() for x in [torch.randn(2, 3, 4 + k, 4) for k in range(count)])


def test_a_loop_over_levels_is_told_of_once_that_it_normalizes_each_alone():
    bn = ConcatSharedBN(3)
    with pytest.warns(UserWarning, match=r"ConcatSharedBN\(3\) .*MultiInputSequential .*convert_shared_head") as caught:
        level_by_level(bn).backward()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    level_by_level(bn).backward()
    with pytest.warns(UserWarning, match="one tensor after the other"):  # a copy is another layer
        level_by_level(copy.deepcopy(bn)).backward()


def test_the_line_that_is_named_is_the_users_also_where_the_layer_lies_in_containers():
    head = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), ConcatSharedBN(3)))
    with pytest.warns(UserWarning, match="one tensor after the other") as caught:
        level_by_level(head).backward()
    assert caught[0].filename == __file__


def test_one_tensor_a_step_is_no_loop():
    """Layers of a model with one input, after convert_concat_shared: nothing is wrong with them."""
    bn = ConcatSharedBN(3)
    losses = []  # which keep their graphs alive
    for _ in range(3):
        losses.append(level_by_level(bn, 1))
        losses[-1].backward()
    level_by_level(bn, 1)  # a trial run, without backward, whose graph is gone
    level_by_level(bn, 1).backward()
    with torch.no_grad():
        level_by_level(bn)
    level_by_level(bn.eval())
    kept = bn.train()([torch.randn(2, 3, 4, 4)] * 2)
    level_by_level(bn, 1).backward()
    assert kept


def test_layers_that_are_watched_are_copied_and_pickled_as_any():
    bn = ConcatSharedBN(3)
    before = vars(bn).keys()
    loss = level_by_level(bn, 1)
    assert vars(bn).keys() == before
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        level_by_level(twin, 1).backward()
    loss.backward()
    level_by_level(bn, 1).backward()


def test_compiled_code_is_not_watched():
    torch._dynamo.reset()
    compiled = torch.compile(ConcatSharedBN(3), backend="eager", fullgraph=True)
    level_by_level(compiled).backward()
    torch._dynamo.reset()
