"""DomainSpecificBN against its definition, in all settings and for all ways to say the domain."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import values_of
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from processes import Outcome, Result, skip_without_gloo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from precisebn.errors import InputError
from precisebn.nn import ConcatSharedBN, CycleBatchNormList, DomainSpecificBN, use_domain

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile and torch.export of 2.10 to 2.13 warn of their own use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

EPS = torch.finfo(torch.float32).eps
# Rounding of the result's dtype, a few operations deep.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

K, C = 4, 3

# The rows of Table 5 of the paper, as detectron2's projects/Rethinking-BatchNorm numbers them, in the order of the
# docstring: whose statistics normalize in training, whose are the population's, whose is the affine.
TABLE_5 = {
    "row 1": ("shared", "shared", "shared"),
    "row 2": ("shared", "domain", "shared"),
    "row 3": ("domain", "shared", "shared"),
    "row 4": ("domain", "domain", "shared"),
    "row 5": ("shared", "shared", "domain"),
    "row 6": ("domain", "domain", "domain"),
}
SETTINGS = list(itertools.product(["shared", "domain"], ["shared", "domain"], ["shared", "domain", None]))


def build(setting: tuple[str, str, str | None], **arguments: Any) -> DomainSpecificBN:
    """A layer of a setting, with weights, biases and statistics that differ everywhere."""
    normalize, population, affine = setting
    layer = DomainSpecificBN(C, K, affine=affine, normalize=normalize, population=population, **arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape))
            layer.running_var.copy_(torch.rand(layer.running_var.shape) + 0.5)
    return layer


class Definition:
    """What the settings mean, sample by sample in float64: no Moments, no groups, nothing of the library.

    Whatever belongs to a domain stands in a row of its own, and what all share in the only row.
    """

    def __init__(self, layer: DomainSpecificBN) -> None:
        self.normalize, self.population = layer.normalize, layer.population
        self.eps, self.momentum, self.training = layer.eps, layer.momentum, layer.training
        self.tracked = layer.running_mean is not None
        if self.tracked:
            self.mean, self.var = (t.double().reshape(-1, C).clone() for t in (layer.running_mean, layer.running_var))
            self.batches = layer.num_batches_tracked.reshape(-1).clone()
        self.affine = [p.detach().double().reshape(-1, C).requires_grad_() for p in layer.parameters()]

    def __call__(self, samples: list[Tensor], domains: list[int]) -> list[Tensor]:
        """Samples ``(C, L)``, each with its domain, of one call."""
        places = domains if self.population == "domain" else [0] * len(domains)
        if self.training or not self.tracked:
            together = domains if self.normalize == "domain" else [0] * len(domains)
            statistics = {key: self._statistics(samples, together, key) for key in together}
            of_samples = [statistics[key] for key in together]
        else:
            of_samples = [(self.mean[place], self.var[place]) for place in places]
        if self.training and self.tracked:
            for place in set(places):
                self._update(samples, places, place)
        return [
            self._affine((x - mean[:, None]) / (var + self.eps).sqrt()[:, None], domain)
            for x, domain, (mean, var) in zip(samples, domains, of_samples, strict=True)
        ]

    def _statistics(self, samples: list[Tensor], keys: list[int], key: int) -> tuple[Tensor, Tensor]:
        values = torch.cat([x for x, of in zip(samples, keys, strict=True) if of == key], 1)
        mean = values.mean(1)
        return mean, (values - mean[:, None]).square().mean(1)

    def _affine(self, x: Tensor, domain: int) -> Tensor:
        if not self.affine:
            return x
        weight, bias = (p[domain if len(p) > 1 else 0][:, None] for p in self.affine)
        return x * weight + bias

    def _update(self, samples: list[Tensor], places: list[int], place: int) -> None:
        values = torch.cat([x.detach() for x, of in zip(samples, places, strict=True) if of == place], 1)
        if values.shape[1] < 2:
            return
        self.batches[place] += 1
        share = 1 / float(self.batches[place]) if self.momentum is None else self.momentum
        self.mean[place] = (1 - share) * self.mean[place] + share * values.mean(1)
        self.var[place] = (1 - share) * self.var[place] + share * values.var(1)  # unbiased

    def assert_same_statistics(self, layer: DomainSpecificBN, tolerance: float) -> None:
        if not self.tracked:
            assert layer.running_mean is None
            return
        for ours, theirs in ((layer.running_mean, self.mean), (layer.running_var, self.var)):
            torch.testing.assert_close(ours.double(), theirs.reshape(ours.shape), rtol=tolerance, atol=tolerance)
        assert torch.equal(layer.num_batches_tracked.reshape(-1), self.batches)


def assert_follows_the_definition(
    layer: DomainSpecificBN, definition: Definition, xs: list[Tensor], call: Callable[[Any], Any], domains: list[int]
) -> None:
    """Forward, backward and running statistics of one call; ``xs`` are the tensors that it passes."""
    dtype = xs[0].dtype
    tolerance = 4 * TOLERANCE[dtype]
    of_statistics = 1e-12 if layer.running_mean is None or layer.running_mean.dtype == torch.float64 else 8 * EPS
    inputs = [x.detach().requires_grad_() for x in xs]
    outputs = call(inputs if len(xs) > 1 else inputs[0])
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    exact = [x.detach().double().requires_grad_() for x in xs]
    samples = [sample.reshape(C, -1) for x in exact for sample in x]
    expected = definition(samples, domains)
    same = [(x.dtype, x.shape, torch.empty_like(x).stride()) for x in xs]
    assert [(y.dtype, y.shape, y.stride()) for y in outputs] == same
    for y, e in zip([y for output in outputs for y in output], expected, strict=True):
        torch.testing.assert_close(y.double().reshape(C, -1), e, rtol=tolerance, atol=tolerance)
    definition.assert_same_statistics(layer, of_statistics)

    cotangents = [torch.randn(x.shape).to(dtype) for x in xs]
    ours = torch.autograd.grad(outputs, [*inputs, *layer.parameters()], cotangents)
    flat = [cotangent.double().reshape(C, -1) for of in cotangents for cotangent in of]
    theirs = torch.autograd.grad(
        expected, [*exact, *definition.affine], flat, allow_unused=True, materialize_grads=True
    )
    for g, e in zip(ours, theirs, strict=True):
        scale = max(1.0, e.abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(g.double(), e.reshape(g.shape), rtol=0, atol=tolerance * scale)


def inputs_of(kind: str, spatial: tuple[int, ...] = (3,)) -> tuple[list[Tensor], dict[str, Any], list[int]]:
    """Tensors, how to say their domains, and the domain of each sample."""
    if kind == "int":
        domains = [2] * 5
        return [_from(domains, spatial)], {"domain": 2}, domains
    if kind == "vector":
        domains = [2, 0, 2, 3, 0, 2, 3, 3]  # unsorted, and domain 1 is missing
        return [_from(domains, spatial)], {"domain": torch.tensor(domains)}, domains
    sizes = (3, 0, 2, 4)  # a list, with nothing of domain 1
    xs = [_from([k] * n, tuple(max(1, side - k) for side in spatial)) for k, n in enumerate(sizes)]
    return xs, {}, [k for k, n in enumerate(sizes) for _ in range(n)]


def _from(domains: list[int], spatial: tuple[int, ...]) -> Tensor:
    """Samples of domains with other means and scales."""
    index = torch.tensor(domains).reshape(-1, 1, *(1 for _ in spatial))
    return torch.randn(len(domains), C, *spatial) * (1 + index) + 3 * index


KINDS = ["int", "vector", "list"]


# ---- The definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_all_settings_follow_the_definition_in_training_and_evaluation(setting, kind):
    layer = build(setting).double()
    for training in (True, True, False):
        layer.train(training)
        definition = Definition(layer)
        xs, arguments, domains = inputs_of(kind)
        xs = [x.double() for x in xs]
        assert_follows_the_definition(layer, definition, xs, lambda x, a=arguments: layer(x, **a), domains)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, K - 1), max_size=9), st.sampled_from(SETTINGS), st.booleans(), st.sampled_from([0.3, None])
)
@example([1, 0, 1], ("domain", "domain", "domain"), True, None)  # a domain with a single value per channel
@example([3], ("domain", "domain", "shared"), False, 0.1)  # a single sample at test time
@example([], ("domain", "shared", "domain"), True, 0.1)
def test_any_mixture_follows_the_definition(domains, setting, training, momentum):
    assume(not training or len(domains) != 1)
    layer = build(setting, momentum=momentum).double().train(training)
    layer.num_batches_tracked.random_(3)
    x = torch.randn(len(domains), C, dtype=torch.float64) + 2 * torch.tensor(domains, dtype=torch.float64)[:, None]
    vector = torch.tensor(domains, dtype=torch.int64)
    assert_follows_the_definition(layer, Definition(layer), [x], lambda x: layer(x, domain=vector), domains)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_momentum_is_each_domains_own(kind, momentum):
    """With None, the average over the mini-batches that held samples of the domain."""
    layer = build(("domain", "domain", "shared"), momentum=momentum).double()
    layer.num_batches_tracked.copy_(torch.tensor([0, 5, 1, 7]))
    for _ in range(2):
        xs, arguments, domains = inputs_of(kind)
        xs = [x.double() for x in xs]
        assert_follows_the_definition(layer, Definition(layer), xs, lambda x, a=arguments: layer(x, **a), domains)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_without_running_statistics_those_of_the_batch_serve_at_test_time_too(setting, kind, training):
    layer = build(setting, track_running_stats=False).double().train(training)
    assert set(layer.state_dict()) == ({"weight", "bias"} if setting[2] else set())
    xs, arguments, domains = inputs_of(kind)
    xs = [x.double() for x in xs]
    assert_follows_the_definition(layer, Definition(layer), xs, lambda x: layer(x, **arguments), domains)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spatial", [(), (5,), (4, 3), (3, 2, 2)], ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_layout_and_number_of_dimensions(kind, spatial, dtype, channels_last):
    layer = build(("domain", "domain", "domain") if dtype in (torch.float64, torch.float16) else TABLE_5["row 2"])
    layer = layer.double() if dtype == torch.float64 else layer
    xs, arguments, domains = inputs_of(kind, spatial)
    xs = [x.to(dtype) for x in xs]
    if channels_last:
        xs = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in xs]
    for training in (True, False):
        layer.train(training)
        assert_follows_the_definition(layer, Definition(layer), xs, lambda x: layer(x, **arguments), domains)


# ---- Table 5 ------------------------------------------------------------------------------------------------------


def levels() -> list[Tensor]:
    return [torch.randn(2, C, side, side) * (1 + k) + k for k, side in enumerate((8, 4, 3, 2))]


def same_affine(layer: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(layer.bias)


def test_row_1_is_concat_shared_bn():
    ours, theirs = build(TABLE_5["row 1"]), ConcatSharedBN(C)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        xs = levels()
        torch.testing.assert_close(ours.train(training)(xs), theirs.train(training)(xs), rtol=0, atol=0)
    assert values_of(ours) == values_of(theirs)


def test_row_3_is_a_plain_batch_norm_called_level_by_level():
    ours, theirs = build(TABLE_5["row 3"]), nn.BatchNorm2d(C)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        for k, x in enumerate(levels()):
            y, expected = ours.train(training)(x, domain=k), theirs.train(training)(x)
            torch.testing.assert_close(y, expected, rtol=16 * EPS, atol=16 * EPS)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=16 * EPS, atol=16 * EPS)


def test_row_4_is_cycle_batch_norm_list():
    ours, theirs = DomainSpecificBN(C, K, affine="shared"), CycleBatchNormList(K, num_features=C)
    for training in (True, True, False):
        xs = levels()
        ys, expected = ours.train(training)(xs), [theirs.train(training)(x) for x in xs]
        torch.testing.assert_close(ys, expected, rtol=16 * EPS, atol=16 * EPS)
    for k, member in enumerate(theirs):
        torch.testing.assert_close(ours.running_var[k], member.running_var, rtol=16 * EPS, atol=0)
        assert int(ours.num_batches_tracked[k]) == int(member.num_batches_tracked) == 2


def test_row_6_is_separate_layers():
    ours, theirs = build(TABLE_5["row 6"]), [nn.BatchNorm2d(C) for _ in range(K)]
    for k, layer in enumerate(theirs):
        layer.load_state_dict({name: value[k] for name, value in ours.state_dict().items()})
    for training in (True, True, False):
        xs = levels()
        expected = [layer.train(training)(x) for layer, x in zip(theirs, xs, strict=True)]
        torch.testing.assert_close(ours.train(training)(xs), expected, rtol=16 * EPS, atol=16 * EPS)
    for k, layer in enumerate(theirs):
        torch.testing.assert_close(ours.running_var[k], layer.running_var, rtol=16 * EPS, atol=0)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_training_and_test_agree_where_both_share_or_neither_does(setting):
    """What Table 5 is about. Momentum 1 makes the population the mini-batch's, but for Bessel's correction."""
    layer = build(setting, momentum=1.0).double()
    xs = [x.double() for x in levels()]
    trained = layer(xs)
    n = torch.tensor([x.numel() / C for x in xs], dtype=torch.float64)
    n = n[:, None] if layer.population == "domain" else n.sum()
    layer.running_var.mul_((n - 1) / n)
    tested = layer.eval()(xs)
    agree = all(torch.allclose(y, z, rtol=1e-10, atol=1e-10) for y, z in zip(trained, tested, strict=True))
    assert agree == (layer.normalize == layer.population)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_one_domain_by_number_or_by_vector_is_the_same(setting, training):
    by_number = build(setting).train(training)
    by_vector = copy.deepcopy(by_number)
    x = torch.randn(5, C, 4)
    y = by_number(x, domain=3)
    torch.testing.assert_close(by_vector(x, domain=torch.full((5,), 3)), y, rtol=8 * EPS, atol=8 * EPS)
    for name, value in by_number.state_dict().items():
        torch.testing.assert_close(by_vector.state_dict()[name], value, rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_mixture_or_a_list_is_the_same(setting, training):
    by_list = build(setting).double().train(training)
    by_vector = copy.deepcopy(by_list)
    xs = [torch.randn(n, C, 4, dtype=torch.float64) + n for n in (3, 0, 2, 4)]
    order = torch.randperm(9)
    domains = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 3])
    ys = torch.cat(by_list(xs))[order]
    torch.testing.assert_close(by_vector(torch.cat(xs)[order], domain=domains[order]), ys, rtol=1e-12, atol=1e-12)
    for name, value in by_list.state_dict().items():
        torch.testing.assert_close(by_vector.state_dict()[name], value, rtol=1e-12, atol=1e-12)


# ---- Cost ---------------------------------------------------------------------------------------------------------


PASSES = {  # over the input, of each operator that reads it
    "_moments": 1,
    "accumulate": 1,
    "_normalize": 1,
    "normalize_batch": 2,
    "_backward_reduce": 1,
    "_backward_apply": 1,
    "backward_batch": 2,
}


class Passes(TorchDispatchMode):
    """Counts the passes over the input of the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "precisebn":
            self.count += PASSES.get(name, 0)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_domains", [1, 2, 30])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_mixture_of_any_number_of_domains_is_read_as_often_as_one(setting, num_domains):
    normalize, population, affine = setting
    layer = DomainSpecificBN(C, num_domains, affine=affine, normalize=normalize, population=population)
    x = torch.randn(60, C, 4, requires_grad=True)
    domain = torch.arange(60) % num_domains
    with Passes() as forward:
        y = layer(x, domain=domain)
    assert forward.count == 2
    with Passes() as backward:
        y.sum().backward()
    assert backward.count == 2
    with Passes() as evaluation:
        layer.eval()(x, domain=domain)
    assert evaluation.count == 1


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_each_tensor_of_a_list_is_read_as_often_as_one_alone(setting):
    layer = build(setting)
    with Passes() as forward:
        layer(levels())
    assert forward.count == 2 * K
    with Passes() as evaluation:
        layer.eval()(levels())
    assert evaluation.count == K


def test_the_input_is_kept_once_for_backward_and_nothing_else_of_its_size():
    layer, saved = build(TABLE_5["row 6"]), []
    x = torch.randn(8, C, 10, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, domain=torch.arange(8) % K)
    assert [t.data_ptr() for t in saved if t.numel() > K * C] == [x.data_ptr()]


# ---- As a module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_plain_checkpoint_fills_every_domain(setting):
    plain = nn.Sequential(nn.BatchNorm2d(C, affine=setting[2] is not None))
    plain(torch.randn(4, C, 3, 3) * 2 + 1)
    if setting[2]:
        nn.init.normal_(plain[0].weight)
        nn.init.normal_(plain[0].bias)
    ours = nn.Sequential(build(setting)).eval()
    assert set(ours.state_dict()) == set(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, C, 3, 3)
    for k in range(K):
        torch.testing.assert_close(ours[0](x, domain=k), plain.eval()(x), rtol=16 * EPS, atol=16 * EPS)
    assert torch.equal(ours[0].num_batches_tracked, torch.ones_like(ours[0].num_batches_tracked))
    with torch.no_grad():
        ours[0].running_mean.view(-1)[0] = 7.0  # the domains do not share memory
    assert int((ours[0].running_mean == 7.0).sum()) == 1
    assert not torch.any(plain[0].running_mean == 7.0)


def test_a_plain_checkpoint_that_is_assigned_gives_every_domain_memory_of_its_own():
    layer = DomainSpecificBN(C, K, affine="domain", device="meta")
    layer.load_state_dict(nn.BatchNorm1d(C).state_dict(), assign=True)
    layer(torch.randn(8, C) + 3, domain=2)
    assert layer.num_batches_tracked.tolist() == [0, 0, 1, 0]
    assert [bool(row.any()) for row in layer.running_mean] == [False, False, True, False]
    assert all(tensor.is_contiguous() for tensor in layer.state_dict().values())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_own_checkpoint_round_trips(setting):
    first, second = build(setting), DomainSpecificBN(C, K, affine=setting[2], population=setting[1])
    first(torch.randn(8, C), domain=torch.arange(8) % K)
    second.load_state_dict(first.state_dict())
    assert values_of(second) == values_of(first)


def test_a_checkpoint_with_a_shared_affine_fills_those_of_the_domains():
    shared, own = build(TABLE_5["row 4"]), build(TABLE_5["row 6"])
    own.load_state_dict(shared.state_dict())
    assert torch.equal(own.running_mean, shared.running_mean)
    assert all(torch.equal(weight, shared.weight) for weight in own.weight)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (DomainSpecificBN(C, K + 1), "size mismatch for 0.running_mean"),
        (nn.BatchNorm2d(C + 1), "size mismatch for 0.running_mean"),
        (nn.BatchNorm2d(C, affine=False), r'Missing key\(s\).*"0.weight", "0.bias"'),
    ],
)
def test_checkpoints_that_do_not_fit_are_errors_that_name_the_layer(layer, message):
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(DomainSpecificBN(C, K)).load_state_dict(nn.Sequential(layer).state_dict())


def test_statistics_of_domains_do_not_load_into_a_shared_population():
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        build(TABLE_5["row 1"]).load_state_dict(build(TABLE_5["row 4"]).state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_copies(setting, copied):
    layer = build(setting, momentum=None)
    copy_of = copied(layer)
    assert repr(copy_of) == repr(layer)
    assert values_of(copy_of) == values_of(layer)
    x, domain = torch.randn(8, C), torch.arange(8) % K
    assert torch.equal(copy_of(x, domain=domain), layer(x, domain=domain))
    assert values_of(copy_of) == values_of(layer)
    before = values_of(copy_of)
    layer(x, domain=domain)
    assert values_of(copy_of) == before


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_other_precision(kind, dtype):
    """All numbers of the layer are rounded to the dtype; each update is one more rounding."""
    layer, reference = build(TABLE_5["row 6"]).to(dtype), None
    assert {t.dtype for t in (*layer.parameters(), *layer.buffers())} == {dtype, torch.int64}
    reference = copy.deepcopy(layer).double()
    xs, arguments, _ = inputs_of(kind)
    xs = [x.to(dtype) for x in xs]
    for training in (True, False):
        for model in (layer, reference):
            model.train(training)
        ours = layer(xs if len(xs) > 1 else xs[0], **arguments)
        theirs = reference([x.double() for x in xs] if len(xs) > 1 else xs[0].double(), **arguments)
        for y, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(y.double(), e, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.running_mean.double(), reference.running_mean, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(layer.running_var.double(), reference.running_var, rtol=4 * unit, atol=4 * unit)
    assert torch.equal(layer.num_batches_tracked, reference.num_batches_tracked)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_built_on_meta_and_materialized(setting):
    normalize, population, affine = setting
    arguments = {"affine": affine, "normalize": normalize, "population": population}
    layer = DomainSpecificBN(C, K, device="meta", **arguments)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert values_of(layer) == values_of(DomainSpecificBN(C, K, **arguments))


def test_reset_running_stats_resets_every_domain():
    layer = build(TABLE_5["row 6"])
    weight = layer.weight.detach().clone()
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean, torch.zeros(K, C))
    assert torch.equal(layer.running_var, torch.ones(K, C))
    assert torch.equal(layer.weight, weight)


def test_constructor_and_repr():
    layer = DomainSpecificBN(8, 2, 1e-3, None, "shared", True, "cpu", torch.float64, normalize="shared")
    assert (layer.eps, layer.momentum, layer.weight.shape, layer.weight.dtype) == (1e-3, None, (8,), torch.float64)
    assert repr(layer) == (
        "DomainSpecificBN(8, num_domains=2, eps=0.001, momentum=None, affine='shared', bias=True, "
        "track_running_stats=True, normalize='shared', population='domain')"
    )
    assert repr(eval(repr(layer))) == repr(layer)


def test_under_autocast():
    conv, layer = nn.Conv2d(3, C, 3), build(TABLE_5["row 6"])
    x0, domain = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    definition = Definition(layer)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(x0)
        y = layer(x, domain=domain)
    assert x.dtype == y.dtype == torch.bfloat16
    expected = definition([sample.detach().double().reshape(C, -1) for sample in x], domain.tolist())
    for ours, theirs in zip(y, expected, strict=True):
        torch.testing.assert_close(ours.double().reshape(C, -1), theirs, rtol=2e-2, atol=8e-2)
    definition.assert_same_statistics(layer, 8 * EPS)
    y.float().sum().backward()
    assert {p.grad.dtype for p in (*conv.parameters(), *layer.parameters())} == {torch.float32}


def test_inference_mode():
    layer, expected = build(TABLE_5["row 6"]), build(TABLE_5["row 6"])
    expected.load_state_dict(layer.state_dict())
    x, domain = torch.randn(8, C), torch.arange(8) % 3
    for training in (True, False):
        with torch.inference_mode():
            y = layer.train(training)(x, domain=domain)
        assert torch.equal(y, expected.train(training)(x, domain=domain))
    assert values_of(layer) == values_of(expected)


def test_activation_checkpointing_updates_statistics_once_and_changes_no_gradient():
    plain = nn.ModuleList([nn.Linear(3, C), build(TABLE_5["row 6"])])
    repeated = copy.deepcopy(plain)
    x, domain = torch.randn(8, 3), torch.tensor([0, 2, 3, 3, 2, 0, 2, 3])

    def forward(model: nn.ModuleList, x: Tensor, domain: Tensor) -> Tensor:
        return model[1](model[0](x), domain=domain).sin()

    forward(plain, x, domain).sum().backward()
    checkpoint(forward, repeated, x, domain, use_reentrant=False).sum().backward()
    assert values_of(repeated) == values_of(plain)
    assert plain[1].num_batches_tracked.tolist() == [1, 0, 1, 1]
    for p, q in zip(repeated.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# ---- torch.compile and torch.export -------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("setting", [TABLE_5["row 2"], TABLE_5["row 6"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph_and_equals_eager(kind, setting):
    eager = build(setting).double()
    of_compiled = copy.deepcopy(eager)
    compiled = torch.compile(of_compiled, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        eager.train(training)
        of_compiled.train(training)
        xs, arguments, _ = inputs_of(kind)
        results = []
        for model, layer in ((compiled, of_compiled), (eager, eager)):
            inputs = [x.double().requires_grad_() for x in xs]
            y = model(inputs if len(inputs) > 1 else inputs[0], **arguments)
            ys = [y] if isinstance(y, Tensor) else y
            loss = sum(t.sin().sum() for t in ys)
            results.append([*ys, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(of_compiled.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fresh_dynamo")
def test_domains_given_by_number_do_not_each_have_a_graph():
    """One for the first number that the compiler sees, which it takes for a constant, and one for all others."""
    layer, counter = DomainSpecificBN(C, 20), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for domain in range(20):
        compiled(torch.randn(4, C), domain=domain)
    assert counter.frame_count <= 3
    assert layer.num_batches_tracked.tolist() == [1] * 20


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("domain", [[0, 4, 1], [-1, 0, 0]])
def test_compiled_code_checks_the_range_too(domain):
    layer = torch.compile(DomainSpecificBN(C, K), fullgraph=True, backend="aot_eager")
    layer(torch.randn(3, C), domain=torch.tensor([0, 3, 1]))
    with pytest.raises(RuntimeError, match="domains must be from 0 to 3"):
        layer(torch.randn(3, C), domain=torch.tensor(domain))


@pytest.mark.parametrize("setting", [TABLE_5["row 1"], TABLE_5["row 6"]], ids=str)
def test_torch_export_takes_the_domains_as_an_input(setting):
    layer = build(setting).eval()
    n = torch.export.Dim("n", min=2)
    example = (torch.randn(4, C, 3), torch.tensor([0, 1, 2, 3]))
    program = torch.export.export(layer, example, dynamic_shapes=({0: n}, {0: n}))
    assert "precisebn" not in str(program.graph)
    x, domain = torch.randn(6, C, 3), torch.tensor([3, 3, 0, 1, 1, 2])
    torch.testing.assert_close(program.module()(x, domain), layer(x, domain=domain), rtol=16 * EPS, atol=16 * EPS)
    with pytest.raises(RuntimeError, match="domains must be from 0 to 3"):
        program.module()(x, domain + 1)


def test_torch_export_of_one_domain():
    layer = build(TABLE_5["row 6"]).eval()
    x = torch.randn(4, C, 3)
    program = torch.export.export(layer, (x,), {"domain": 2})
    torch.testing.assert_close(program.module()(x, domain=2), layer(x, domain=2), rtol=16 * EPS, atol=16 * EPS)


# ---- Several ranks ------------------------------------------------------------------------------------------------


def of_rank(rank: int) -> Tensor:
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(rank)) + rank


def model_for_ranks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, C), DomainSpecificBN(C, 2))


def train_on_a_rank(rank: int, world: int) -> Result:
    results = {}
    for broadcast in (False, True):
        model = model_for_ranks()
        ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
        for _ in range(2):
            model.zero_grad()
            with use_domain(rank):
                ddp(of_rank(rank)).square().mul(torch.arange(C)).sum().backward()
        results["broadcast" if broadcast else "own"] = {
            "state": model.state_dict(),
            "grads": {name: p.grad for name, p in model.named_parameters()},
        }
    return results


def test_ddp_with_a_domain_for_each_rank(tmp_path):
    skip_without_gloo()
    ranks = Outcome([train_on_a_rank], 2, tmp_path).of(train_on_a_rank)
    model = model_for_ranks()
    for _ in range(2):
        model.zero_grad()
        for rank in range(2):
            y = model[1](model[0](of_rank(rank)), domain=rank)
            (y.square().mul(torch.arange(C)).sum() / 2).backward()
    for statistics, rank in itertools.product(("own", "broadcast"), range(2)):
        for name, parameter in model.named_parameters():
            grad = ranks[rank][statistics]["grads"][name]
            torch.testing.assert_close(grad, parameter.grad, rtol=64 * EPS, atol=64 * EPS)
    for rank in range(2):  # each knows the statistics of its own domain
        state = ranks[rank]["own"]["state"]
        torch.testing.assert_close(state["1.running_mean"][rank], model[1].running_mean[rank], rtol=64 * EPS, atol=EPS)
        assert state["1.num_batches_tracked"].tolist() == [2 * (1 - rank), 2 * rank]


# ---- Wrong calls --------------------------------------------------------------------------------------------------

X = torch.ones(3, C)


def vector(*domains: int) -> Tensor:
    return torch.tensor(domains, dtype=torch.int64)


WRONG_CALLS = {
    "none": ((X,), {}, r"DomainSpecificBN\(3\): of which domain is the input\? Call it with domain=, on a list"),
    "too large": ((X,), {"domain": 4}, "the domain must be from 0 to 3, but is 4"),
    "negative": ((X,), {"domain": -1}, "the domain must be from 0 to 3, but is -1"),
    "bool": ((X,), {"domain": True}, "a domain is a whole number, or an int64 tensor .* not bool: True"),
    "float": ((X,), {"domain": 1.0}, "not float: 1.0"),
    "string": ((X,), {"domain": "source"}, "not str: 'source'"),
    "list of numbers": ((X,), {"domain": [0, 1, 2]}, r"not list: \[0, 1, 2\]"),
    "float vector": ((X,), {"domain": torch.zeros(3)}, r"must be int64 \(N,\).* is torch.float32 of shape \(3,\)"),
    "int32 vector": ((X,), {"domain": torch.zeros(3, dtype=torch.int32)}, "is torch.int32"),
    "mask": ((X,), {"domain": torch.zeros(3, dtype=torch.bool)}, "is torch.bool"),
    "0-dimensional": ((X,), {"domain": torch.tensor(1)}, r"of shape \(\); for a single domain pass int\(domain\)"),
    "2-dimensional": ((X,), {"domain": torch.zeros(3, 1, dtype=torch.int64)}, r"of shape \(3, 1\)"),
    "vector too large": ((X,), {"domain": vector(0, 4, 1)}, "domains must be from 0 to 3, but go from 0 to 4"),
    "vector negative": ((X,), {"domain": vector(0, -1, 1)}, "but go from -1 to 1"),
    "vector of other length": ((X,), {"domain": vector(0, 1)}, "there are 2 domains on cpu for 3 samples on cpu"),
    "vector elsewhere": ((X,), {"domain": vector(0, 1, 2).to("meta")}, "3 domains on meta for 3 samples on cpu"),
    "list too short": (([X, X],), {}, "one tensor for each of the 4 domains, in order .* it holds 2"),
    "list too long": (([X] * 5,), {}, "it holds 5"),
    "list with domain": (([X] * 4,), {"domain": 1}, "takes no domain="),
    "list of something else": (([X, X, X, 1.0],), {"domain": None}, "takes tensors .* got float"),
    "other channels": ((torch.ones(3, 5),), {"domain": 0}, r"takes tensors \(N, 3, \*\), got shape \(3, 5\)"),
    "1-dimensional": ((torch.ones(3),), {"domain": 0}, r"got shape \(3,\)"),
    "not a tensor": (("x",), {"domain": 0}, "got str"),
    "integers": ((torch.ones(3, C, dtype=torch.int64),), {"domain": 0}, "int64"),
    "a single value": ((torch.ones(1, C),), {"domain": 0}, "one value per channel has no variance"),
    "a single value in a list": (([X, X, torch.ones(1, C), X],), {}, "one value per channel has no variance"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong_and_change_nothing(name):
    arguments, keywords, message = WRONG_CALLS[name]
    layer = build(TABLE_5["row 6"])
    before = values_of(layer)
    with pytest.raises(InputError, match=message):
        layer(*arguments, **keywords)
    assert values_of(layer) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_domains": 0}, "num_domains=0 must be a whole number, 1 or more"),
        ({"num_domains": 2.0}, "num_domains=2.0 must be a whole number"),
        ({"num_domains": True}, "num_domains=True must be a whole number"),
        ({"num_domains": 2, "normalize": "batch"}, "normalize='batch' must be 'domain' or 'shared'$"),
        ({"num_domains": 2, "normalize": None}, "normalize=None must be 'domain' or 'shared'$"),
        ({"num_domains": 2, "population": True}, "population=True must be 'domain' or 'shared'$"),
        ({"num_domains": 2, "affine": True}, "affine=True must be 'domain' or 'shared', or None$"),
    ],
)
def test_wrong_settings_say_what_is_wrong(arguments, message):
    with pytest.raises(InputError, match=message):
        DomainSpecificBN(C, **arguments)


def test_numpys_integers_are_domains():
    bn = DomainSpecificBN(C, 2)
    bn(torch.randn(4, C), domain=np.int64(1))
    with use_domain(np.int32(0)):
        bn(torch.randn(4, C))
    assert bn.num_batches_tracked.tolist() == [1, 1]


@pytest.mark.parametrize("affine", ["domain", "shared", None])
@pytest.mark.parametrize("normalize", ["domain", "shared"])
def test_a_shared_cumulative_average_is_that_of_all_samples_of_each_call(normalize, affine):
    """As of nn.BatchNorm on them together, whichever way domains are told; a call is one mini-batch."""
    layer = DomainSpecificBN(C, K, momentum=None, normalize=normalize, affine=affine, population="shared")
    plain = nn.BatchNorm1d(C, momentum=None)
    xs = [2 * torch.randn(n, C) + n for n in (5, 9, 12, 7)]
    parts = list(xs[2].tensor_split(K))
    layer(xs[0], domain=0)
    layer(xs[1], domain=torch.arange(9) % K)
    layer(parts)
    with use_domain(K - 1):
        layer(xs[3])
    for x in xs:
        plain(x)
    assert layer.num_batches_tracked == 4
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)

    layer(parts[:1] + [part[:0] for part in parts[1:]])  # domains without samples
    plain(parts[0])
    layer([part[:0] for part in parts])  # nobody has any: no mini-batch
    assert layer.num_batches_tracked == 5
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)

    layer.eval()
    x = torch.randn(6, C)
    expected = plain.eval()(x)
    for domain in range(K):
        torch.testing.assert_close(layer(x, domain=domain), expected)
