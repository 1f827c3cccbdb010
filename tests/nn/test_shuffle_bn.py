"""ShuffleBN and batch_shuffle in one process; between ranks: ``tests/distributed/test_shuffle.py``."""

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from conftest import values_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from precisebn import InputError, update_bn_stats
from precisebn.distributed import permutation_of
from precisebn.distributed.exchange import Routes
from precisebn.nn import ShuffleBN, batch_shuffle, batch_unshuffle

pytestmark = pytest.mark.usefixtures("one_thread")


def head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


class Pair(NamedTuple):
    x: Tensor
    y: Any


# ---- Laws of routes --------------------------------------------------------------------------------------------------


def everywhere(rows: list[Tensor], routes: list[Routes]) -> list[Tensor]:
    """What every rank has after an exchange, by what each route says: all in one process."""
    parts = [list(part[route.leaving].split(route.sent)) for part, route in zip(rows, routes, strict=True)]
    after = []
    for rank, route in enumerate(routes):
        y = torch.full((route.rows_after,), -1)
        y[route.stay_at] = rows[rank][route.staying]
        y[route.arriving] = torch.cat([sent[rank] for sent in parts])
        assert [len(sent[rank]) for sent in parts] == route.received
        after.append(y)
    return after


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 2**32))
def test_routes_put_every_row_where_the_permutation_says_and_back(sizes, seed):
    total, world = sum(sizes), len(sizes)
    permutation = permutation_of(total, seed)
    after = [len(part) for part in torch.arange(total).tensor_split(world)]
    routes = [Routes.of(permutation, sizes, after, rank) for rank in range(world)]
    rows = list(torch.arange(total).split(sizes))
    shuffled = everywhere(rows, routes)
    assert torch.equal(torch.cat(shuffled), permutation)
    back = everywhere(shuffled, [route.inverse() for route in routes])
    assert all(torch.equal(a, b) for a, b in zip(back, rows, strict=True))
    for rank, route in enumerate(routes):
        assert route.sent[rank] == route.received[rank] == 0  # what stays is not sent
        assert len(route.leaving) == sum(route.sent)


def test_permutations_of_neighbouring_seeds_and_numbers_have_nothing_in_common():
    """By the share of places that two have in common: 1 in 1000 by chance."""
    every = [permutation_of(1000, seed, number) for seed in range(8) for number in range(8)]
    common = [int((a == b).sum()) for i, a in enumerate(every) for b in every[:i]]
    assert max(common) <= 10
    assert 0.8 < sum(common) / len(common) < 1.2
    assert all(torch.equal(permutation.sort().values, torch.arange(1000)) for permutation in every)


# ---- ShuffleBN without other ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_the_head_and_draws_no_random_number(training):
    module, plain = ShuffleBN(head()).train(training), head().train(training)
    x = torch.randn(6, 4)
    before = torch.get_rng_state()
    y = module(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(y, plain(x))
    assert values_of(module.head) == values_of(plain)
    assert module.calls == 0
    torch.testing.assert_close(nn.Sequential(module)(x[:1]) if not training else y, y[:1] if not training else y)


def test_alone_it_takes_and_returns_whatever_the_head_does():
    class Anything(nn.Module):
        def forward(self, x: Any, *, k: int = 0) -> Any:
            return {"sum": x.sum(), "k": k}

    assert ShuffleBN(Anything())(torch.ones(3), k=2) == {"sum": torch.tensor(3.0), "k": 2}


def test_a_checkpoint_of_the_head_loads_and_its_own_goes_under_head():
    plain, module = head(), ShuffleBN(head())
    plain(torch.randn(8, 4))
    assert list(module.state_dict()) == [f"head.{key}" for key in plain.state_dict()]
    model = nn.ModuleDict({"top": module})
    model.load_state_dict({f"top.{key}": value for key, value in plain.state_dict().items()})
    assert values_of(module.head) == values_of(plain)
    other = ShuffleBN(head())
    other.load_state_dict(module.state_dict())
    assert values_of(other) == values_of(module)


def test_a_head_with_a_part_called_head_keeps_its_keys_apart():
    inside = lambda: nn.ModuleDict({"head": nn.Linear(2, 2), "neck": nn.Linear(2, 2)})  # noqa: E731
    plain, own = inside(), ShuffleBN(inside())
    own.load_state_dict(plain.state_dict())
    assert values_of(own.head) == values_of(plain)
    again = ShuffleBN(inside())
    again.load_state_dict(own.state_dict())
    assert values_of(again) == values_of(own)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.0\.weight"):
        ShuffleBN(nn.Sequential(nn.Linear(2, 2))).load_state_dict({"1.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_go_on_at_the_same_call(clone):
    module = ShuffleBN(head(), seed=4, sizes=[3, 5])
    module.calls = 7
    twin = clone(module)
    assert (twin.seed, twin.sizes, twin.calls) == (4, [3, 5], 7)
    assert repr(twin) == repr(module)
    assert "seed=4, sizes=[3, 5]" in repr(module)
    assert values_of(twin) == values_of(module)
    assert twin.head[0].weight is not module.head[0].weight


def test_it_is_recalibrated_as_what_is_inside():
    model = nn.Sequential(ShuffleBN(head()))
    data = [torch.randn(8, 4) for _ in range(5)]
    report = update_bn_stats(model, data, None)
    assert [layer.name for layer in report.layers] == ["0.head.1"]
    with torch.no_grad():
        values = model[0].head[0](torch.cat(data))
    torch.testing.assert_close(model[0].head[1].running_mean, values.mean(0))
    assert "recorder" not in vars(model[0])


# ---- batch_shuffle in one process ------------------------------------------------------------------------------------


def test_a_nested_batch_is_shuffled_by_one_permutation_and_comes_back():
    x, ids = torch.randn(7, 3, 2, 2), torch.arange(7)
    batch = OrderedDict(a=[x, Pair(ids, "text")], b=(x.half(), {"t": torch.tensor(2.0), "none": None}))
    shuffled, shuffle = batch_shuffle(batch)
    order = shuffle.permutation
    assert type(shuffled) is OrderedDict
    assert isinstance(shuffled["a"][1], Pair)
    assert torch.equal(shuffled["a"][1].x, order)
    assert torch.equal(shuffled["a"][0], x[order])
    assert torch.equal(shuffled["b"][0], x.half()[order])
    assert shuffled["b"][1]["t"] is batch["b"][1]["t"]
    assert (shuffled["a"][1].y, shuffled["b"][1]["none"]) == ("text", None)
    back = batch_unshuffle(shuffled, shuffle)
    assert torch.equal(back["a"][0], x)
    assert torch.equal(back["a"][1].x, ids)
    assert shuffle.num_sent == 0


def test_a_shuffle_is_differentiable_twice():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def through(x: Tensor) -> Tensor:
        shuffled, shuffle = batch_shuffle([x, x**2], seed=1)
        y, z = batch_unshuffle([shuffled[0] * shuffled[1], shuffled[0].exp()], shuffle)
        return y * torch.arange(8.0, dtype=torch.float64).view(4, 2) + z

    assert torch.autograd.gradcheck(through, x)
    assert torch.autograd.gradgradcheck(through, x)


def test_of_a_seed_there_is_one_permutation_and_without_one_it_follows_torchs_generator():
    x = torch.arange(20)
    assert torch.equal(batch_shuffle(x, seed=3)[0], batch_shuffle(x, True, seed=3)[0])
    assert not torch.equal(batch_shuffle(x, seed=3)[0], batch_shuffle(x, seed=4)[0])
    for distributed in (False, True):  # of a single process: its own samples
        torch.manual_seed(5)
        first, shuffle = batch_shuffle(x, distributed)
        assert not torch.equal(first, batch_shuffle(x, distributed)[0])
        torch.manual_seed(5)
        assert torch.equal(first, batch_shuffle(x, distributed)[0])
        assert torch.equal(batch_unshuffle(first, shuffle, distributed), x)
        assert sorted(first.tolist()) == x.tolist()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.uint16,
        torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
)  # fmt: skip
def test_every_dtype_is_moved_as_it_is(dtype):
    x = torch.arange(12).reshape(6, 2).to(dtype)
    shuffled, shuffle = batch_shuffle(x)
    assert shuffled.dtype == dtype
    assert shuffled.tolist() == [x.tolist()[i] for i in shuffle.permutation]
    assert batch_unshuffle(shuffled, shuffle).tolist() == x.tolist()


def test_a_conjugate_is_moved_as_what_it_stands_for():
    x = torch.complex(torch.arange(6.0), torch.ones(6)).conj()
    shuffled, shuffle = batch_shuffle(x)
    assert torch.equal(shuffled, x[shuffle.permutation])


def test_memory_formats_are_kept():
    x = torch.randn(4, 3, 5, 6)
    shuffled, _ = batch_shuffle([x, x.contiguous(memory_format=torch.channels_last)])
    assert shuffled[0].is_contiguous()
    assert shuffled[1].is_contiguous(memory_format=torch.channels_last)
    assert not shuffled[1].is_contiguous()


# ---- Wrong calls -----------------------------------------------------------------------------------------------------


@dataclass
class Boxes:
    x: Tensor


class Batch(dict[str, Any]):
    """A mapping that torch does not know."""


WRONG = {
    "no module": (lambda: ShuffleBN(torch.relu), "ShuffleBN takes a module, its head, not "),
    "seed": (lambda: ShuffleBN(head(), seed=1.5), "seed=1.5 must be a whole number"),
    "sizes": (lambda: ShuffleBN(head(), sizes="same"), "sizes='same' must be None, 'equal', or a list"),
    "no sizes": (lambda: ShuffleBN(head(), sizes=[]), r"sizes=\[\] must be None, 'equal', or a list"),
    "negative": (lambda: ShuffleBN(head(), sizes=[3, -1]), r"sizes=\[3, -1\] must be numbers of samples, 0 or more"),
    "no tensor": (lambda: batch_shuffle(["a", torch.tensor(1.0)]), r"batch_shuffle holds no tensor \(N, \*\)"),
    "another N": (
        lambda: batch_shuffle([torch.ones(4, 2), torch.ones(3)]),
        r"batch_shuffle: tensor 1 of 2 is \(3,\), but must have a row for each of 4 samples",
    ),
    "dataclass": (lambda: batch_shuffle([torch.ones(4), Boxes(torch.ones(4))]), "holds a Boxes, .* make it a dict"),
    "mapping": (lambda: batch_shuffle(Batch(x=[torch.ones(4)])), "holds a Batch, whose tensors cannot be reached"),
    "sparse": (lambda: batch_shuffle(torch.ones(4, 2).to_sparse()), "tensor 0 of 1 is sparse or nested"),
    "other rows": (
        lambda: batch_unshuffle(torch.ones(3), batch_shuffle(torch.ones(4))[1]),
        r"batch_unshuffle: tensor 0 of 1 is \(3,\), but must have a row for each of 4 samples",
    ),
    "an index": (lambda: batch_unshuffle(torch.ones(3), torch.arange(3)), "takes the second .* not Tensor"),
    "opposite": (
        lambda: batch_unshuffle(torch.ones(4), batch_shuffle(torch.ones(4), True)[1], False),
        "distributed=False, but batch_shuffle was called with the opposite",
    ),
    "no ranks": (
        lambda: batch_shuffle(torch.ones(4, 4), True, process_group=object()),
        "process_group was given, but torch.distributed is not initialized",
    ),
}


def test_a_process_group_does_not_matter_where_there_are_no_ranks():
    layer, x = ShuffleBN(head(), process_group=object()), torch.randn(4, 4)
    assert torch.equal(layer(x), layer.head(x))
    assert layer.calls == 0


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        call()


def test_what_only_looks_like_a_container_of_tensors_is_passed_on():
    x = torch.ones(4)
    shuffled, _ = batch_shuffle([x, x.shape, Batch(n=3), {"s"}, Boxes])
    assert shuffled[1:] == [x.shape, {"n": 3}, {"s"}, Boxes]


def test_scripted_it_is_the_head():
    module = ShuffleBN(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).eval()
    x = torch.randn(5, 4)
    assert torch.equal(torch.jit.script(nn.Sequential(module))(x), module(x))
