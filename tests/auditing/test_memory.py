"""Memory that tensors share: exactly, for any strides."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from precisebn.auditing.memory import overlapping


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Sizes, strides and offset of a view of 64 elements."""
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(0, 7), min_size=len(sizes), max_size=len(sizes)))
    return sizes, strides, draw(st.integers(0, 20))


@given(a=views(), b=views())
def test_two_views_overlap_where_writing_one_changes_the_other(a, b):
    memory = torch.zeros(64)
    first, second = (memory.as_strided(*view) for view in (a, b))
    places = torch.arange(64)
    common = set(places.as_strided(*a).flatten().tolist()) & set(places.as_strided(*b).flatten().tolist())
    assert bool(overlapping({"a": first}, {"b": second})) == bool(common)


def test_a_view_of_another_dtype():
    memory = torch.zeros(8)
    assert overlapping({"a": memory.view(torch.uint8)[4:5]}, {"b": memory[1:2]}) == {"a": "b"}
    assert overlapping({"a": memory.view(torch.uint8)[3:4]}, {"b": memory[1:2]}) == {}


def test_tensors_without_memory_share_it_with_themselves_alone():
    lazy, meta, sparse = nn.LazyLinear(2).weight, torch.zeros(2, device="meta"), torch.eye(2).to_sparse()
    some: dict[str, Tensor] = {"lazy": lazy, "meta": meta, "sparse": sparse}
    assert overlapping(some, some) == {name: name for name in some}
    others: dict[str, Tensor] = {"m": torch.zeros(2, device="meta"), "s": torch.eye(2).to_sparse()}
    assert overlapping(some, others) == {}
    assert overlapping({"a": torch.zeros(0)}, {"b": torch.zeros(0)}) == {}
