"""MultiInputSequential: a head over a list of tensors, layer by layer."""

import copy

import pytest
import torch
from conftest import values_of
from reference import assert_checkpointing_changes_nothing, sample
from torch import Tensor, nn

from precisebn.errors import InputError
from precisebn.nn import ConcatSharedBN, CycleBatchNormList, DomainSpecificBN, MultiInputSequential, use_domain
from precisebn.nn.multi_input import TakesLists

pytestmark = pytest.mark.usefixtures("one_thread")


def levels(count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [sample((2, 3, 8 - 2 * k, 6), dtype) + k for k in range(count)]


class Noting(nn.Module):
    """Hands its input on, and notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def forward(self, x: object) -> object:
        self.calls.append([tuple(t.shape) for t in x] if isinstance(x, list) else tuple(x.shape))
        return x


def test_plain_layers_see_level_by_level():
    head = MultiInputSequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    xs = levels()
    ys = head(xs)
    assert isinstance(ys, list)
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(y, nn.Sequential(*head)(x))


def test_every_level_goes_through_a_layer_before_any_goes_on():
    order: list[str] = []
    head = MultiInputSequential(nn.Identity(), nn.Identity())
    for name, layer in head.named_children():
        layer.register_forward_hook(lambda module, args, y, name=name: order.append(f"{name}:{args[0].shape[2]}"))
    head(levels())
    assert order == ["0:8", "0:6", "0:4", "1:8", "1:6", "1:4"]


def test_a_layer_that_stands_in_it_twice_runs_twice():
    """named_children() lists a shared layer once; nn.Sequential runs it as often as it stands there."""
    shared = nn.Conv2d(3, 3, 3, padding=1)
    head = MultiInputSequential(shared, nn.ReLU(), shared)
    xs = levels()
    assert all(torch.equal(y, head(x)) for x, y in zip(xs, head(xs), strict=True))
    assert not torch.equal(head(xs)[0], torch.relu(shared(xs[0])))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_concat_shared_bn_gets_the_list(training):
    conv, bn = nn.Conv2d(3, 3, 3, padding=1), ConcatSharedBN(3)
    head = MultiInputSequential(conv, bn, nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)).train(training)
    alone = copy.deepcopy(head)
    xs = levels()
    ys = head(xs)
    normalized = alone[1]([alone[0](x) for x in xs])
    assert all(torch.equal(y, alone[3](z.relu())) for y, z in zip(ys, normalized, strict=True))
    assert values_of(head) == values_of(alone)
    assert int(bn.num_batches_tracked) == int(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_domain_specific_bn_gets_the_list_and_takes_positions_for_domains(training):
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), DomainSpecificBN(3, num_domains=3), nn.ReLU()).train(training)
    head[1].running_mean.copy_(torch.randn(3, 3))
    alone = copy.deepcopy(head)
    xs = levels()
    ys = head(xs)
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        assert torch.equal(y, alone[1](alone[0](x), domain=k).relu())
    assert values_of(head) == values_of(alone)


def test_a_module_of_ones_own_that_says_so_gets_the_list():
    class Centered(TakesLists, nn.Module):
        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            mean = torch.cat([x.flatten() for x in xs]).mean()
            return [x - mean for x in xs]

    ys = MultiInputSequential(nn.Identity(), Centered())(levels())
    torch.testing.assert_close(torch.cat([y.flatten() for y in ys]).mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert abs(ys[0].mean()) > 1e-3
    with pytest.raises(InputError, match="takes all tensors at once"):
        MultiInputSequential(nn.Sequential(Centered()))(levels())


def test_cycle_batch_norm_list_makes_one_cycle():
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), CycleBatchNormList(3, num_features=3), nn.ReLU())
    head(levels())
    head(levels())
    assert [int(member.num_batches_tracked) for member in head[1]] == [2, 2, 2]
    with pytest.raises(RuntimeError, match="in a cycle"):
        sum(y.sum() for y in head(levels(2))).backward()


def test_nested_containers_hand_the_list_on():
    noting = Noting()
    inner = MultiInputSequential(ConcatSharedBN(3), MultiInputSequential(noting, ConcatSharedBN(3)))
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), inner, nn.ReLU())
    flat = MultiInputSequential(head[0], inner[0], inner[1][0], inner[1][1], head[2])
    xs = levels()
    for a, b in zip(head(xs), flat(xs), strict=True):
        torch.testing.assert_close(a, b)
    assert noting.calls == [tuple(x.shape) for x in xs] * 2  # a plain layer, called level by level also in there


def test_a_plain_container_runs_level_by_level():
    head = MultiInputSequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU())
    alone = copy.deepcopy(head)
    xs = levels()
    ys = head(xs)
    assert all(torch.equal(y, alone[0](x).relu()) for x, y in zip(xs, ys, strict=True))


def test_a_single_tensor_is_nn_sequential():
    bn = DomainSpecificBN(3, num_domains=2)
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), ConcatSharedBN(3), bn, nn.ReLU())
    x = sample((2, 3, 4, 4))
    with use_domain(1):
        y = head(x)
        expected = nn.Sequential(*copy.deepcopy(head))
        assert torch.equal(y, expected(x))
    assert isinstance(y, Tensor)
    assert bn.num_batches_tracked.tolist() == [0, 1]


def test_gradients_are_those_of_the_layers_called_by_hand():
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), ConcatSharedBN(3), nn.ReLU(inplace=True)).double()
    alone = copy.deepcopy(head)
    xs = [x.requires_grad_() for x in levels(dtype=torch.float64)]
    same = [x.detach().clone().requires_grad_() for x in xs]
    sum((y**2).sum() for y in head(xs)).backward()
    sum((y.relu() ** 2).sum() for y in alone[1]([alone[0](x) for x in same])).backward()
    torch.testing.assert_close([x.grad for x in xs], [x.grad for x in same])
    torch.testing.assert_close([p.grad for p in head.parameters()], [p.grad for p in alone.parameters()])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_mini_batch_once(use_reentrant):
    def build() -> nn.Module:
        torch.manual_seed(1)
        return MultiInputSequential(nn.Conv2d(3, 3, 1), ConcatSharedBN(3), CycleBatchNormList(3, num_features=3))

    assert_checkpointing_changes_nothing(build, levels(), use_reentrant)


def test_state_dict_and_container_are_those_of_nn_sequential():
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()]
    plain = nn.Sequential(*layers)
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), ConcatSharedBN(3), nn.ReLU())
    assert isinstance(head, nn.Sequential)
    assert list(head.state_dict()) == list(plain.state_dict())
    head.load_state_dict(plain.state_dict())
    assert values_of(head) == values_of(plain)
    plain.load_state_dict(head.state_dict())
    assert isinstance(head[:2], MultiInputSequential)
    head.append(nn.ReLU())
    assert len(head) == 4
    assert [y.shape for y in head(levels())] == [x.shape for x in levels()]


@pytest.mark.parametrize("empty", [[], ()])
def test_no_levels_and_no_layers(empty):
    assert MultiInputSequential(nn.ReLU())(empty) == []
    xs = levels()
    assert MultiInputSequential()(xs) == xs


@pytest.mark.parametrize(
    ("xs", "message"),
    [
        (3, "takes a tensor or a list of tensors, got int"),
        ({"p3": torch.ones(2, 3)}, "takes a tensor or a list of tensors, got dict"),
        ([torch.ones(2, 3), 3], r"takes a tensor or a list of tensors, got \[Tensor, int\]"),
        ("p3", "takes a tensor or a list of tensors, got str"),
    ],
)
def test_wrong_inputs(xs, message):
    with pytest.raises(InputError, match="MultiInputSequential " + message):
        MultiInputSequential(nn.ReLU())(xs)


@pytest.mark.parametrize("inner", [ConcatSharedBN(3), DomainSpecificBN(3, 3), MultiInputSequential(nn.ReLU())])
@pytest.mark.parametrize("wrap", [nn.Sequential, lambda layer: nn.Sequential(nn.ReLU(), nn.Sequential(layer))])
def test_a_layer_that_takes_lists_inside_a_plain_container_is_an_error(inner, wrap):
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), wrap(inner))
    message = r"layer '1' \(Sequential\) of MultiInputSequential holds .* make it a MultiInputSequential too"
    with pytest.raises(InputError, match=message):
        head(levels())


def test_a_list_of_the_wrong_length_for_the_domains():
    head = MultiInputSequential(nn.Conv2d(3, 3, 1), DomainSpecificBN(3, num_domains=2))
    with pytest.raises(InputError, match=r"one tensor for each of the 2 domains.*holds 3"):
        head(levels())
