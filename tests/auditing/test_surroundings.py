"""What a run touches besides the model: put back bit for bit, and nothing else touched."""

import collections
import random
import threading
import types

import pytest
import torch
from torch import nn

from precisebn.auditing.surroundings import MOST_ITEMS, ObjectsPicture, Surroundings


def test_attributes_and_containers_are_filled_with_what_was_in_them():
    inner = types.SimpleNamespace(epoch=3, seen=[1, 2], queue=collections.deque([1], maxlen=2), names={"a"})
    outer = types.SimpleNamespace(loader=inner, table=collections.OrderedDict(a=1, b={"c": inner}))
    before = vars(inner).copy()
    picture = ObjectsPicture([outer], tensors=False)
    inner.epoch, inner.new = 4, "new"
    inner.seen.append(3)
    inner.queue.extend([2, 3])
    inner.names.clear()
    outer.table.move_to_end("a")
    del outer.loader
    picture.put_back()
    assert vars(inner) == before
    assert (inner.seen, list(inner.queue), inner.queue.maxlen, inner.names) == ([1, 2], [1], 2, {"a"})
    assert list(outer.table) == ["a", "b"]
    assert outer.loader is inner
    assert all(vars(inner)[key] is value for key, value in before.items())


def test_generators_go_on_from_where_they_were():
    numpy = pytest.importorskip("numpy")
    holder = types.SimpleNamespace(
        torch=torch.Generator().manual_seed(1), python=random.Random(1),
        new=numpy.random.default_rng(1), old=numpy.random.RandomState(1),
    )  # fmt: skip

    def draw():
        return (torch.rand(1, generator=holder.torch).item(), holder.python.random(),
                holder.new.random(), holder.old.random_sample())  # fmt: skip

    picture = ObjectsPicture([holder], tensors=False)
    first = draw()
    draw()
    picture.put_back()
    assert draw() == first


def test_a_generator_without_a_state_is_left_alone():
    ObjectsPicture([random.SystemRandom()], tensors=False).put_back()  # its getstate raises


def test_large_containers_are_data_and_those_of_an_optimizer_are_not():
    data = list(range(MOST_ITEMS + 1))
    picture = ObjectsPicture([data], tensors=False, most_items=MOST_ITEMS)
    data.append(0)
    picture.put_back()
    assert len(data) == MOST_ITEMS + 2

    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(MOST_ITEMS + 1)])
    optimizer = torch.optim.Adam(model.parameters())
    for number in (1, 2):
        for p in model.parameters():
            p.grad = torch.ones(1)
        if number == 2:
            surroundings = Surroundings(model, [optimizer])
        optimizer.step()
    surroundings.put_back()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert len(optimizer.state) == MOST_ITEMS + 1


def test_a_first_step_of_an_optimizer_leaves_no_state():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    surroundings = Surroundings(model, [optimizer])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    surroundings.put_back()
    assert len(optimizer.state) == 0
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in model.parameters())


def test_cycles_and_running_things_are_no_matter():
    one = types.SimpleNamespace(lock=threading.Lock(), thread=threading.current_thread(), me=None)
    one.me = one
    ObjectsPicture([one], tensors=True).put_back()
    assert one.me is one
