"""Snapshot and Transaction: what differs is told, what was is put back, and no step keeps another from running."""

from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from torch import nn

from precisebn.models.snapshot import Snapshot
from precisebn.models.transaction import Transaction, refill


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.text, self.items, self.chosen = 1, "a", [1, [2]], {3}
        self.table: dict[str, Any] = {"a": 1, "b": 2, "c": 3}
        self.recent = deque([1, 2], maxlen=2)
        self.object = object()
        self.pair = ([1], {"a": torch.zeros(2)})
        self.nested: dict[str, list[int]] = {"queue": []}


CHANGES = {
    "number": (lambda m: setattr(m, "number", 2), ":number"),
    "true for one": (lambda m: setattr(m, "number", True), ":number"),
    "object": (lambda m: setattr(m, "object", object()), ":object"),
    "new attribute": (lambda m: setattr(m, "more", 1), ":more"),
    "deleted attribute": (lambda m: delattr(m, "text"), ":text"),
    "list": (lambda m: m.items.append(3), ":items"),
    "list in a list": (lambda m: m.items[1].append(3), ":items"),
    "set": (lambda m: m.chosen.clear(), ":chosen"),
    "dictionary": (lambda m: m.table.pop("b"), ":table"),
    "order of a dictionary": (lambda m: m.table.update(a=m.table.pop("a")), ":table"),
    "deque": (lambda m: m.recent.append(3), ":recent"),
    "list in a tuple": (lambda m: m.pair[0].append(3), ":pair"),
    "tensor in a tuple": (lambda m: m.pair[1]["a"].add_(1), ":tensor 0"),
    "empty list in a dictionary": (lambda m: m.nested["queue"].append(3), ":nested"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_named_and_put_back(change):
    model = Attributes()
    items, inner, table = model.items, model.items[1], model.table
    before = Snapshot(model)
    do, name = CHANGES[change]
    do(model)
    assert list(before.differences(Snapshot(model))) == [name]
    before.put_back()
    assert before == Snapshot(model)
    assert (model.items is items, model.items[1] is inner, model.table is table) == (True, True, True)
    assert (list(model.table), list(model.recent), items, inner) == (["a", "b", "c"], [1, 2], [1, [2]], [2])


class Registry(OrderedDict):
    def __init__(self, name: str, size: int) -> None:
        super().__init__()


class Ring(deque):
    def __init__(self, size: int) -> None:
        super().__init__(maxlen=size)


class Counts(defaultdict):
    def __init__(self) -> None:
        super().__init__(int)


class Names(list):
    def __init__(self, *, of: str) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("made", "change"),
    [
        (Registry("a", 3), lambda c: c.update(b=2)),
        (Ring(2), lambda c: c.extend("bcd")),
        (Counts(), lambda c: c["b"]),
        (Names(of="x"), lambda c: c.append("b")),
    ],
)
def test_containers_whose_class_has_a_constructor_of_its_own(made, change):
    model = nn.Identity()
    model.made = made
    made.update(a=1) if isinstance(made, dict) else made.append("a")
    before, items = Snapshot(model), list(made)
    change(made)
    assert list(before.differences(Snapshot(model))) == [":made"]
    before.put_back()
    assert model.made is made
    assert list(made) == items
    assert before == Snapshot(model)


def test_the_order_of_a_state_dict_comes_back():
    bn = nn.BatchNorm1d(2)
    before, keys = Snapshot(bn), list(bn.state_dict())
    mean = bn._buffers.pop("running_mean")
    bn._buffers["running_mean"] = mean
    before.put_back()
    assert list(bn.state_dict()) == keys


def test_bits_count_and_not_values():
    model = nn.ParameterList([nn.Parameter(torch.tensor([0.0, torch.nan]))])
    before = Snapshot(model)
    assert before == Snapshot(model)
    with torch.no_grad():
        model[0][0] = -0.0
    assert before.differences(Snapshot(model)) == {".0": "values"}


def test_what_did_not_change_is_not_written():
    """Or a graph that awaits its backward would be out of date."""
    model = nn.BatchNorm1d(2)
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    before = Snapshot(model)
    model.running_mean.add_(1)
    before.put_back()
    after = [t._version for t in (*model.parameters(), *model.buffers())]
    assert [b - a for a, b in zip(versions, after, strict=True)] == [0, 0, 2, 0, 0]


def test_running_statistics_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = Snapshot(model)
    model[1](torch.randn(4, 2))
    with torch.no_grad():
        model[0].weight.add_(1)
    model[1].running_var = torch.zeros(2)
    before.put_back_statistics()
    assert before.differences(Snapshot(model)) == {"0.weight": "values"}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.data.add_(1),
        lambda t: setattr(t, "data", t.data.clone()),
        lambda t: setattr(t, "data", t.data.view(torch.int32)),  # the same memory, shape and bits
        lambda t: setattr(t, "data", t.data.view(2, 2)),
        lambda t: setattr(t, "data", t.data[:2]),
    ],
)
def test_what_is_done_to_the_data_of_running_statistics_is_seen_without_a_version(change):
    model = nn.BatchNorm1d(4)
    before, version = Snapshot(model), model.running_mean._version
    change(model.running_mean)
    assert model.running_mean._version == version
    before.put_back_statistics()
    assert before.differences(Snapshot(model)) == {}


def test_a_step_that_raises_keeps_no_other_from_running():
    done: list[str] = []
    changes = Transaction()
    changes.on_undo(done.append, "first")
    changes.on_undo({}.__getitem__, "missing")
    changes.on_undo(_interrupt)
    changes.on_undo(done.append, "last")
    with pytest.raises(KeyboardInterrupt):  # the first of the two
        changes.undo()
    assert done == ["last", "first"]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_what_clean_up_raises_does_not_hide_what_led_to_it():
    def fail_and_fail_to_clean_up() -> None:
        with Transaction() as changes:
            changes.on_undo({}.__getitem__, "missing")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail_and_fail_to_clean_up()
    assert "KeyError('missing')" in caught.value.__notes__[0]


@pytest.mark.parametrize("now", [[], ["a"], ["c", "a"], ["a", "c"], ["b", "d"], ["d", "a", "b", "c"]])
def test_refill_gives_a_dictionary_its_items_and_their_order(now):
    content = {"a": 1, "b": 2, "c": 3}
    place = OrderedDict.fromkeys(now, 0)
    refill(place, content)
    assert list(place.items()) == list(content.items())
