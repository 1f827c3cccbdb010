"""Private names of torch: each still does what the library takes it to do."""

import collections

import pytest
import torch
from torch.autograd import forward_ad

from precisebn import _torch


def test_is_transformed_inside_torch_func_and_forward_mode_alone():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.is_transformed())
        return x.sin()

    x = torch.ones(3)
    assert not _torch.is_transformed()
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    assert seen == [True] * 4
    look(x.requires_grad_()).sum().backward()
    torch.compile(look, backend="eager")(x)
    assert seen[4:] == [False] * 2
    assert not _torch.is_transformed()


def test_in_backward_while_autograd_runs_alone():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_torch.in_backward())
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(_torch.in_backward())
            return dy

    x = torch.ones(3, requires_grad=True)
    Look.apply(x).sum().backward()
    assert seen == [False, True]
    assert not _torch.in_backward()

    def repeated(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.in_backward())
        return x.sin()

    torch.utils.checkpoint.checkpoint(repeated, x, use_reentrant=False).sum().backward()
    assert seen[2:] == [False, True]
    assert torch.compile(lambda x: x + _torch.in_backward(), fullgraph=True, backend="eager")(x).tolist() == [1.0] * 3


def test_assert_async_raises_with_its_message_also_from_a_graph():
    def checked(x: torch.Tensor) -> torch.Tensor:
        _torch.assert_async((x > 0).all(), "x must be positive")
        return x + 1

    x = torch.ones(2)
    for f in (checked, torch.compile(checked, fullgraph=True, backend="aot_eager")):
        assert f(x).tolist() == [2.0, 2.0]
        with pytest.raises(RuntimeError, match="x must be positive"):
            f(-x)


def test_is_batched_inside_vmap_alone_at_any_depth():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.is_batched(x))
        return x.sin().sum()

    x = torch.ones(2, 3)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.vmap(torch.func.grad(look))(x)
    assert seen == [True, False, True]
    assert not _torch.is_batched(x)


def test_is_exporting_in_torch_export_alone():
    class Look(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if _torch.is_exporting() else x - 1

    x = torch.zeros(2)
    assert torch.export.export(Look(), (x,)).module()(x).tolist() == [1.0, 1.0]
    assert torch.compile(Look(), backend="eager")(x).tolist() == [-1.0, -1.0]
    assert Look()(x).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("number", [1, 2])
def test_flattened_is_a_copy_in_order(number: int):
    tensors = [torch.arange(4.0).reshape(2, 2), torch.tensor(7.0)][:number]
    flat = _torch.flattened(tensors)
    tensors[0].zero_()  # of a single tensor torch itself makes a view
    assert flat.tolist() == [0.0, 1.0, 2.0, 3.0, 7.0][: 3 + number]


def test_trees_of_every_kind_of_container_are_taken_apart_and_put_together():
    pair = collections.namedtuple("pair", "a b")
    tree = {"x": [1, (2, None)], "y": pair(3, collections.OrderedDict(z="4")), "n": []}
    leaves, form = _torch.flatten_tree(tree)
    assert leaves == [1, 2, None, 3, "4"]
    assert _torch.unflatten_tree(leaves, form) == tree
    assert isinstance(_torch.unflatten_tree(leaves, form)["y"], pair)
    assert _torch.unflatten_tree(list("abcde"), form)["x"] == ["a", ("b", "c")]


def test_unwrapped_gives_what_is_inside_of_torch_func_at_any_depth():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(_torch.unwrapped(x).shape))
        return x.sin().sum()

    torch.vmap(torch.func.grad(look))(torch.ones(3, 2))
    assert seen == [(3, 2)]
    plain = torch.ones(2)
    assert _torch.unwrapped(plain) is plain


def test_outside_of_transforms_plain_tensors_can_be_written_in_the_midst_of_torch_func():
    seen = torch.zeros(3)

    def note(x: torch.Tensor) -> torch.Tensor:
        with _torch.outside_of_transforms():
            seen.add_(_torch.unwrapped(x))
        return x.sin().sum()

    x = torch.ones(3)
    gradient = torch.func.grad(note)(x)
    torch.func.jvp(note, (x,), (x,))
    assert torch.equal(seen, torch.full((3,), 2.0))
    torch.testing.assert_close(gradient, x.cos())
