"""functional: nn.BatchNorm forward and backward over groups and lists of tensors; and with given statistics."""

import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from precisebn.errors import InputError
from precisebn.functional import batch_norm, frozen_batch_norm
from precisebn.statistics.moments import Moments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13 warns of its own use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

EPS = torch.finfo(torch.float32).eps
# Rounding of the result's dtype, a few operations deep.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def grads(output: torch.Tensor, cotangent: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((output.to(cotangent.dtype) * cotangent).sum(), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(16, 5), (7, 5, 6), (6, 5, 4, 3), (4, 5, 3, 2, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_torch_forward_and_backward(shape, dtype, channels_last):
    x0 = (torch.randn(shape) * 2 + 1).to(dtype)
    if channels_last and x0.dim() in (4, 5):
        x0 = x0.to(memory_format=torch.channels_last if x0.dim() == 4 else torch.channels_last_3d)
    parameter_dtype = dtype if dtype == torch.float64 else torch.float32
    w0, b0 = torch.randn(5, dtype=parameter_dtype), torch.randn(5, dtype=parameter_dtype)
    cotangent = torch.randn(shape, dtype=parameter_dtype)
    ours, exact = leaves(x0, w0, b0), leaves(x0.double(), w0.double(), b0.double())
    y, _ = batch_norm(*ours)
    expected = F.batch_norm(exact[0], None, None, exact[1], exact[2], training=True)
    assert y.dtype == dtype
    assert y.stride() == x0.stride()
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    # The reference sees the cotangent as the low-precision output hands it on.
    seen = cotangent.to(dtype).double()
    for ours_grad, exact_grad in zip(grads(y, cotangent, ours), grads(expected, seen, exact), strict=True):
        scale = exact_grad.abs().max().item()
        torch.testing.assert_close(ours_grad.double(), exact_grad, rtol=0, atol=4 * TOLERANCE[dtype] * scale)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=12), st.booleans())
def test_groups_equal_separate_batch_norms(group, own_affine):
    group = [0, 0, 1, 1, 2, 2, *group]  # at least two values each
    index = torch.tensor(group)
    x0 = torch.randn(len(group), 3, 2, dtype=torch.float64) + 10 * index[:, None, None]
    w0, b0 = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    if not own_affine:
        w0, b0 = w0[0], b0[0]
    cotangent = torch.randn_like(x0)
    ours, apart = leaves(x0, w0, b0), leaves(x0, w0, b0)
    y, moments = batch_norm(*ours, group=index, num_groups=3)
    expected = torch.empty_like(x0)
    for g in range(3):
        w, b = (p[g] if own_affine else p for p in apart[1:])
        expected[index == g] = F.batch_norm(apart[0][index == g], None, None, w, b, training=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(moments.mean[1], x0[index == 1].mean((0, 2)))
    for a, b in zip(grads(y, cotangent, ours), grads(expected, cotangent, apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_list_equals_the_concatenation():
    shapes = [(2, 4, 8, 8), (2, 4, 4, 4), (2, 4, 1, 1), (0, 4, 3, 3)]
    tensors = [torch.randn(shape, dtype=torch.float64) * 3 + 1 for shape in shapes]
    w0, b0 = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    flat0 = torch.cat([t.movedim(1, -1).reshape(-1, 4) for t in tensors])
    ours, whole = leaves(*tensors, w0, b0), leaves(flat0, w0, b0)
    ys, moments = batch_norm(ours[:4], *ours[4:])
    expected = F.batch_norm(whole[0], None, None, whole[1], whole[2], training=True)
    assert [tuple(y.shape) for y in ys] == shapes
    flat = torch.cat([y.movedim(1, -1).reshape(-1, 4) for y in ys])
    torch.testing.assert_close(flat, expected)
    torch.testing.assert_close(moments.var(), flat0.var(0, unbiased=False))
    cotangent = torch.randn_like(flat)
    *gx, gw, gb = grads(flat, cotangent, ours)
    ex, ew, eb = grads(expected, cotangent, whole)
    torch.testing.assert_close(torch.cat([g.movedim(1, -1).reshape(-1, 4) for g in gx]), ex)
    torch.testing.assert_close(gw, ew)
    torch.testing.assert_close(gb, eb)


def double_leaves(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_including_those_of_the_moments(check):
    def one(x, w, b):
        y, moments = batch_norm(x, w, b)
        return y, moments.mean, moments.m2

    assert check(one, double_leaves((4, 2, 3), (2,), (2,)))

    index = [torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 0])]

    def grouped_list(x, z, w, b):
        (y, q), moments = batch_norm([x, z], w, b, group=index, num_groups=2)
        return y, q, moments.var()

    assert check(grouped_list, double_leaves((4, 2, 3), (3, 2, 2, 2), (2, 2), (2,)))


@pytest.mark.parametrize("parameters", [(None, None), ("w", None), (None, "b")])
def test_weight_and_bias_are_optional_each(parameters):
    x = torch.randn(5, 3, requires_grad=True)
    w, b = (None if p is None else torch.randn(3, requires_grad=True) for p in parameters)
    y, _ = batch_norm(x, w, b)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, w, b, training=True))
    y.square().sum().backward()
    assert x.grad is not None


def test_compiles_into_one_graph_and_equals_eager():
    def f(x, w, b):
        y, moments = batch_norm(x, w, b)
        return y.relu().square().sum() + moments.mean.sum()

    args = leaves(torch.randn(6, 3, 4), torch.randn(3), torch.randn(3))
    same = leaves(*args)
    torch.compile(f, fullgraph=True, backend="aot_eager")(*args).backward()
    f(*same).backward()
    for a, b in zip(args, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_passes_opcheck():
    x, z = torch.randn(4, 3, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    groups = [torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0])]
    operator = torch.ops.precisebn.batch_norm.default
    torch.library.opcheck(operator, ([x, z], torch.randn(3, requires_grad=True), None, 1e-5, groups, 2, True))
    torch.library.opcheck(operator, ([x], None, torch.randn(1, 3, requires_grad=True), 1e-5, [], 1, False))


def test_keeps_only_inputs_and_small_tensors_for_backward():
    saved = []
    x, w = torch.randn(8, 3, 10, 10, requires_grad=True), torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_norm(x, w)
    big = [t for t in saved if t.numel() > 3]
    assert [t.data_ptr() for t in big] == [x.data_ptr()]


def test_under_autocast_low_precision_activations_meet_float32_parameters():
    conv, w, b = torch.nn.Conv2d(3, 4, 3), torch.ones(4), torch.zeros(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = conv(torch.randn(4, 3, 8, 8))
        y, _ = batch_norm(x, w, b)
    assert y.dtype == x.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), F.batch_norm(x.float(), None, None, w, b, training=True), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_norm([]), "empty list"),
        (lambda: batch_norm(torch.ones(3)), "at least 2 dimensions"),
        (lambda: batch_norm(torch.ones(2, 3, dtype=torch.int64)), "int64"),
        (lambda: batch_norm(torch.ones(1, 3)), "one value per channel"),
        (lambda: batch_norm([torch.ones(2, 3), torch.ones(2, 4)]), r"xs\[1\] is \(2, 4\)"),
        (lambda: batch_norm([torch.ones(2, 3), torch.ones(2, 3).double()]), "agree in channels, dtype"),
        (lambda: batch_norm(torch.ones(2, 3), torch.ones(4)), r"weight must be \(3,\)"),
        (lambda: batch_norm(torch.ones(2, 3), bias=torch.ones(2, 3)), r"bias must be \(3,\) or \(1, 3\)"),
        (lambda: batch_norm(torch.ones(2, 3), group=torch.tensor([0, 2]), num_groups=2), "0 to 1"),
        (lambda: batch_norm(torch.ones(2, 3), group=torch.zeros(3, dtype=torch.int64)), r"shape \(2,\)"),
        (lambda: batch_norm([torch.ones(2, 3)], group=torch.tensor([0, 0])), "one int64 vector for each of the 1"),
        (lambda: batch_norm(torch.ones(2, 3), num_groups=0, shared_statistics=True), "num_groups must be at least 1"),
        (
            lambda: batch_norm([torch.ones(2, 3), torch.ones(0, 3)], group=[torch.tensor([0, 0]), torch.tensor([])]),
            r"xs\[1\]: group must be int64 of shape \(0,\)",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- shared_statistics: groups tell only affines and Moments apart ------------------------------------------------


def values_of_channels(x: Tensor) -> Tensor:
    """``(N, C, *)`` as ``(n, C)``."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def per_sample(parameter: Tensor | None, group: Tensor | None, x: Tensor, otherwise: float) -> Tensor | float:
    """A parameter ``(C,)`` or ``(G, C)`` as it meets each sample of ``x``."""
    if parameter is None:
        return otherwise
    rows = parameter[group] if parameter.dim() == 2 else parameter.unsqueeze(0)
    return rows.reshape(*rows.shape, *(1 for _ in x.shape[2:]))


def normalized_together(
    xs: Sequence[Tensor], groups: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> list[Tensor]:
    """By the definition: mean and biased variance of all values, whatever their group."""
    values = torch.cat([values_of_channels(x) for x in xs])
    mean = values.mean(0)
    std = ((values - mean).square().mean(0) + eps).sqrt()
    return [
        (x - per_sample(mean, None, x, 0.0)) / per_sample(std, None, x, 1.0) * per_sample(weight, group, x, 1.0)
        + per_sample(bias, group, x, 0.0)
        for x, group in zip(xs, groups, strict=True)
    ]


def moments_of_groups(xs: Sequence[Tensor], groups: Sequence[Tensor], num_groups: int) -> Moments:
    """By the definition; zeros for a group without values."""
    members = [
        torch.cat([values_of_channels(x[group == g]) for x, group in zip(xs, groups, strict=True)])
        for g in range(num_groups)
    ]
    means = [values.sum(0) / max(len(values), 1) for values in members]
    m2s = [(values - mean).square().sum(0) for values, mean in zip(members, means, strict=True)]
    count = torch.tensor([float(len(values)) for values in members], dtype=torch.float64)
    return Moments(count, torch.stack(means), torch.stack(m2s))


def drawn_parameter(kind: str, num_groups: int, channels: int) -> list[Tensor]:
    shape = {"none": None, "shared": (channels,), "own": (num_groups, channels)}[kind]
    return [] if shape is None else [torch.randn(shape, dtype=torch.float64, requires_grad=True)]


kinds = st.sampled_from(["none", "shared", "own"])


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=3), kinds, kinds)
@example([[0, 0, 1]], "own", "shared")  # a group of a single value, and two without any
@example([[3], [], [0]], "own", "own")  # a tensor without samples
@example([[2, 2, 2]], "none", "own")  # only one group
def test_shared_statistics_are_those_of_the_concatenation(groups, weight_kind, bias_kind):
    assume(sum(map(len, groups)) > 1)
    indices = [torch.tensor(group, dtype=torch.int64) for group in groups]
    tensors = [
        torch.randn(len(group), 2, *rest, dtype=torch.float64) + 5 * index.reshape(-1, *(1 for _ in (2, *rest)))
        for group, index, rest in zip(groups, indices, [(), (3,), (1, 2)], strict=False)
    ]
    xs = leaves(*tensors)
    weight, bias = drawn_parameter(weight_kind, 4, 2), drawn_parameter(bias_kind, 4, 2)
    w, b = (parameter[0] if parameter else None for parameter in (weight, bias))
    single = len(xs) == 1
    ys, moments = batch_norm(
        xs[0] if single else xs,
        w,
        b,
        group=indices[0] if single else indices,
        num_groups=4,
        shared_statistics=True,
    )
    ys = [ys] if single else ys
    expected, expected_moments = normalized_together(xs, indices, w, b), moments_of_groups(xs, indices, 4)
    assert torch.equal(moments.count, expected_moments.count)
    outputs, expecteds = [*ys, moments.mean, moments.m2], [*expected, expected_moments.mean, expected_moments.m2]
    torch.testing.assert_close(outputs, expecteds, rtol=1e-11, atol=1e-11)

    cotangents = [torch.randn_like(output) for output in outputs]
    inputs = [*xs, *weight, *bias]
    ours, exact = (
        torch.autograd.grad(sum((o * c).sum() for o, c in zip(every, cotangents, strict=True)), inputs)
        for every in (outputs, expecteds)
    )
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_shared_statistics_without_groups_change_nothing():
    xs = [torch.randn(4, 3, 2), torch.randn(2, 3)]
    (y, z), moments = batch_norm(xs, shared_statistics=True)
    (p, q), expected = batch_norm(xs)
    assert torch.equal(y, p)
    assert torch.equal(z, q)
    assert moments == expected


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shared_statistics_in_every_dtype_and_layout(dtype, channels_last):
    index = torch.tensor([1, 0, 1, 1, 3, 0])
    x = (torch.randn(6, 5, 4, 3) + 2 * index[:, None, None, None]).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    w, b = torch.randn(4, 5), torch.randn(5)
    y, _ = batch_norm(x, w, b, group=index, num_groups=4, shared_statistics=True)
    (expected,) = normalized_together([x.double()], [index], w.double(), b.double())
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_shared_statistics_including_those_of_the_moments(check):
    index = [torch.tensor([0, 3, 0, 1]), torch.tensor([1, 0])]  # group 2 is empty; 3 has a single value per channel

    def grouped_list(x, z, w, b):
        (y, q), moments = batch_norm([x, z], w, b, group=index, num_groups=4, shared_statistics=True)
        return y, q, moments.mean, moments.m2

    assert check(grouped_list, double_leaves((4, 2), (2, 2, 2), (4, 2), (2,)))


@pytest.mark.usefixtures("fresh_dynamo")
def test_shared_statistics_compile_into_one_graph_and_equal_eager():
    index = [torch.tensor([0, 1, 0, 2]), torch.tensor([2, 0])]

    def f(x, z, w, b):
        (y, q), moments = batch_norm([x, z], w, b, group=index, num_groups=4, shared_statistics=True)
        return y.square().sum() + q.sin().sum() + moments.var().sum()

    args = leaves(torch.randn(4, 3, 4), torch.randn(2, 3), torch.randn(4, 3), torch.randn(3))
    same = leaves(*args)
    torch.compile(f, fullgraph=True, backend="aot_eager")(*args).backward()
    f(*same).backward()
    for a, b in zip(args, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shared", [False, True])
def test_passes_opcheck_with_affines_of_groups(shared):
    x, w, b = double_leaves((4, 3, 2), (3, 3), (3, 3))
    group = torch.tensor([0, 1, 0, 1])  # 2 is empty
    torch.library.opcheck(torch.ops.precisebn.batch_norm.default, ([x], w, b, 1e-5, [group], 3, shared))


def test_the_gradient_of_weight_keeps_its_digits_where_the_mean_is_large():
    x, dy = torch.randn(16, 3, 5) + 1e4, torch.randn(16, 3, 5)
    w, b = leaves(torch.randn(3), torch.randn(3))
    (ours,) = torch.autograd.grad(batch_norm(x, w, b)[0], w, dy)
    values = values_of_channels(x.double())
    normalized = (values - values.mean(0)) / (values.var(0, unbiased=False) + 1e-5).sqrt()
    terms = values_of_channels(dy) * normalized
    assert torch.all((ours - terms.sum(0)).abs() <= rounding_of_sum(terms, w))


# ---- frozen_batch_norm --------------------------------------------------------------------------------------------


def statistics(channels: int, *groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Mean, variance, weight and bias."""
    shape = (*groups, channels)
    mean, std, weight, bias = torch.randn(shape), torch.rand(shape) + 0.5, torch.randn(shape), torch.randn(shape)
    return mean.to(dtype), std.square().to(dtype), weight.to(dtype), bias.to(dtype)


def rounding(x: Tensor, parameters: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """How far ``scale * x + shift``, computed in float32 (float64 for float64), may be from the exact value."""
    mean, var, weight, bias = (p.double().abs().reshape(1, -1, *(1 for _ in x.shape[2:])) for p in parameters)
    scale = weight / (var + eps).sqrt()
    inner = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    outer = 0.0 if x.dtype in (torch.float32, torch.float64) else torch.finfo(x.dtype).eps
    terms = scale * x.double().abs() + scale * mean + bias
    # sqrt, quotient, two products, two sums: six roundings of at most half an ulp each, of terms no larger than these;
    # then the rounding to a half-precision result, of which small ones are subnormal.
    return 3 * inner * terms + (outer / 2) * terms + (torch.finfo(x.dtype).smallest_normal if outer else 0.0) * outer


def rounding_of_sum(terms: Tensor, result: Tensor) -> Tensor:
    """How far the sum of terms ``(n, C)`` of random sign, in chains of 32 at most, and then exactly, may be off.

    Each addition rounds a partial sum, which is sqrt(32 / 2) = 4 terms large on average, by half an ulp at most; each
    term has been rounded twice before; and the result is rounded to its dtype.
    """
    return 3 * torch.finfo(result.dtype).eps * terms.double().abs().sum(0)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "every second value": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(9, 5), (7, 5, 6), (6, 5, 4, 3), (4, 5, 3, 2, 3), (0, 5, 2, 2), (2, 5, 0)])
def test_frozen_equals_torch_in_evaluation_forward_and_backward(shape, dtype, layout):
    x = LAYOUTS[layout]((torch.randn(shape) * 2 + 1).to(dtype)).requires_grad_()
    parameters = statistics(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mean, var, *affine = parameters
    w, b = leaves(*affine)
    y = frozen_batch_norm(x, mean, var, w, b)
    exact = leaves(x.double(), w.double(), b.double())
    expected = F.batch_norm(exact[0], mean.double(), var.double(), *exact[1:], training=False)
    assert (y.dtype, y.shape, y.stride()) == (dtype, x.shape, torch.empty_like(x).stride())
    assert torch.all((y.double() - expected).abs() <= rounding(x.detach(), parameters))
    with torch.no_grad():
        assert torch.equal(frozen_batch_norm(x, mean, var, w, b), y)

    dy = LAYOUTS[layout](torch.randn(shape).to(dtype))
    ours, theirs = torch.autograd.grad(y, [x, w, b], dy), torch.autograd.grad(expected, exact, dy.double())
    assert [g.dtype for g in ours] == [x.dtype, w.dtype, b.dtype]
    # scale is rounded three times, its product with dy once. What float16 cannot hold as a normal number is coarser.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours[0].double(), theirs[0], rtol=4 * unit, atol=torch.finfo(dtype).smallest_normal * unit
    )
    centered = x.detach().double() - mean.double().reshape(1, -1, *(1 for _ in shape[2:]))
    std = (var.double() + 1e-5).sqrt()
    assert torch.all(
        (ours[1].double() - theirs[1]).abs() <= rounding_of_sum(values_of_channels(dy * centered) / std, w)
    )
    assert torch.all((ours[2].double() - theirs[2]).abs() <= rounding_of_sum(values_of_channels(dy), w))


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_frozen_takes_weight_and_bias_each_or_not(affine, eps):
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    mean, var, weight, bias = statistics(4)
    w = weight.requires_grad_() if "weight" in affine else None
    b = bias.requires_grad_() if "bias" in affine else None
    y = frozen_batch_norm(x, mean, var, w, b, eps=eps)
    expected = torch.batch_norm(x, w, b, mean, var, False, 0.0, eps, False)  # F.batch_norm of 2.10 refuses eps=0
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    inputs = [t for t in (x, w, b) if t is not None]
    ours, theirs = (torch.autograd.grad(output.sin().sum(), inputs) for output in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


own_or_shared = st.sampled_from([(), (3,)])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2), max_size=6), own_or_shared, own_or_shared, own_or_shared, own_or_shared)
@example([0, 2, 0], (), (), (3,), ())  # one population and an affine for each group, of which one is empty
@example([1, 1], (), (), (), (3,))
@example([1, 0], (), (3,), (), ())
def test_frozen_groups_equal_separate_batch_norms(group, of_mean, of_var, of_weight, of_bias):
    index = torch.tensor(group, dtype=torch.int64)
    mean, var, weight, bias = (statistics(2, *of)[i] for i, of in enumerate((of_mean, of_var, of_weight, of_bias)))
    x, w, b = leaves(torch.randn(len(group), 2, 3, dtype=torch.float64), weight, bias)
    y = frozen_batch_norm(x, mean, var, w, b, group=index)
    expected = torch.empty_like(x)
    for g in range(3):
        of_g = [p[g] if p.dim() == 2 else p for p in (mean, var, w, b)]
        expected[index == g] = F.batch_norm(x[index == g], *of_g)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    cotangent = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(output, [x, w, b], cotangent) for output in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("groups", [(), (3,)])
def test_derivatives_of_frozen(check, groups):
    mean, var, *_ = statistics(2, *groups)
    group = torch.tensor([0, 2, 0, 2])

    def affine(x, w, b):
        return frozen_batch_norm(x, mean, var, w, b, group=group)

    def fixed(x):
        return frozen_batch_norm(x, mean, var, mean, var, group=group)

    assert check(affine, double_leaves((4, 2, 3), (*groups, 2), (2,)))
    assert check(fixed, double_leaves((4, 2, 3)))


def saved_for_backward(call: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("groups", [(), (2,)])
def test_frozen_keeps_nothing_of_the_size_of_its_input_unless_weight_needs_it(groups):
    x = torch.randn(8, 3, 10, 10, requires_grad=True)
    mean, var, weight, bias = statistics(3, *groups, dtype=torch.float32)
    group = torch.tensor([0, 1] * 4)
    saved = saved_for_backward(lambda: frozen_batch_norm(x, mean, var, weight, bias, group=group))
    assert max(t.numel() for t in saved) <= max(mean.numel(), len(group))

    weight.requires_grad_()
    saved = saved_for_backward(lambda: frozen_batch_norm(x, mean, var, weight, bias, group=group))
    assert [t.data_ptr() for t in saved if t.numel() > len(group)] == [x.data_ptr()]

    with torch.no_grad():
        assert saved_for_backward(lambda: frozen_batch_norm(x, mean, var, weight, bias, group=group)) == []


def test_the_input_of_frozen_may_be_overwritten_where_it_is_not_kept():
    x0 = torch.randn(4, 3, 2, requires_grad=True)
    mean, var, weight, bias = statistics(3, dtype=torch.float32)
    x = x0 * 1.0
    y = frozen_batch_norm(x, mean, var, weight, bias)
    x.zero_()
    y.sum().backward()
    expected = (weight / (var + 1e-5).sqrt()).reshape(1, 3, 1).expand(4, 3, 2)
    torch.testing.assert_close(x0.grad, expected, rtol=4 * EPS, atol=0)


def test_frozen_under_autocast_takes_low_precision_activations_and_float32_parameters():
    conv, parameters = torch.nn.Conv2d(3, 4, 3), statistics(4, dtype=torch.float32)
    mean, var, w, b = parameters
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = conv(torch.randn(4, 3, 8, 8))
        y = frozen_batch_norm(x, mean, var, w, b)
    assert y.dtype == x.dtype == torch.bfloat16
    expected = F.batch_norm(x.double(), mean.double(), var.double(), w.double(), b.double())
    assert torch.all((y.double() - expected).abs() <= rounding(x, parameters))
    y.float().sum().backward()
    assert (w.grad.dtype, conv.weight.grad.dtype) == (torch.float32, torch.float32)


class Graphs:
    """A backend of torch.compile that runs graphs, forward and backward, as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.compile = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def operators(self) -> set[str]:
        return {str(node.target) for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_frozen_is_plain_arithmetic_and_equals_eager(dtype, trained, groups):
    parameters = statistics(3, *groups, dtype=torch.float32)
    mean, var, weight, bias = parameters
    group = torch.tensor([2, 1, 1, 2, 0, 2])
    x0, dy = torch.randn(6, 3, 4).to(dtype), torch.randn(6, 3, 4).to(dtype)

    def run(f):
        inputs = leaves(x0, *((weight, bias) if trained else ()))
        affine = inputs[1:] if trained else (weight, bias)
        y = f(inputs[0], mean, var, *affine, group=group)
        return y, torch.autograd.grad(y, inputs, dy)

    graphs = Graphs()
    y, grads_of_y = run(torch.compile(frozen_batch_norm, fullgraph=True, backend=graphs.compile))
    assert y.dtype == dtype
    assert len(graphs.graphs) == 2
    assert not [name for name in graphs.operators() if "precisebn" in name]
    expected, expected_grads = run(frozen_batch_norm)
    bound = torch.stack(
        [rounding(x[None], [p[g] if groups else p for p in parameters])[0] for x, g in zip(x0, group, strict=True)]
    )
    assert torch.all((y.double() - expected.double()).abs() <= 2 * bound)
    # The compiled sums, of a few values, are those of float32.
    for g, e in zip(grads_of_y, expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=8 * torch.finfo(g.dtype).eps, atol=64 * EPS)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_frozen_through_inductor_equals_eager():
    mean, var, weight, bias = statistics(3, dtype=torch.float32)
    runs = []
    for f in (torch.compile(frozen_batch_norm, fullgraph=True), frozen_batch_norm):
        x, w, b = leaves(torch.arange(72.0).reshape(6, 3, 4).sin(), weight, bias)
        y = f(x, mean, var, w, b).relu()
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, w, b])])
    torch.testing.assert_close(*runs, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_gradient_of_frozen_weight_keeps_its_digits_where_the_mean_is_large(backend):
    """That of ``scale * x + shift``, term by term, is a difference of sums that cancel."""
    f = frozen_batch_norm if backend is None else torch.compile(frozen_batch_norm, fullgraph=True, backend=backend)
    x, dy = torch.randn(16, 3, 4) + 1e3, torch.randn(16, 3, 4)
    mean, var = torch.full((3,), 1e3), torch.ones(3)
    w, b = leaves(torch.ones(3), torch.zeros(3))
    (ours,) = torch.autograd.grad(f(x, mean, var, w, b), w, dy)
    terms = values_of_channels(dy.double() * (x.double() - 1e3)) / math.sqrt(1 + 1e-5)
    assert torch.all((ours - terms.sum(0)).abs() <= rounding_of_sum(terms, w))


def test_frozen_under_torch_func_and_in_forward_mode():
    """As torch's own: gradients of single samples need it, and with frozen statistics they are well defined."""
    mean, var, *affine = statistics(3)
    x, tangent = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)

    def loss(parameters, sample):
        return frozen_batch_norm(sample.unsqueeze(0), mean, var, *parameters).sin().sum()

    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tuple(affine), x)
    for i, sample in enumerate(x):
        parameters = leaves(*affine)
        expected = torch.autograd.grad(loss(parameters, sample), parameters)
        torch.testing.assert_close(tuple(g[i] for g in of_samples), expected)

    expected = tangent * (affine[0] / (var + 1e-5).sqrt()).reshape(1, 3, 1)
    _, of_func = torch.func.jvp(lambda x: frozen_batch_norm(x, mean, var, *affine), (x,), (tangent,))
    torch.testing.assert_close(of_func, expected)
    with forward_ad.dual_level():
        dual = frozen_batch_norm(forward_ad.make_dual(x, tangent), mean, var, *affine)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


ONE, THREE = torch.ones(3), torch.ones(3, 3)
ON_META = torch.ones(3, device="meta")

WRONG_FROZEN_CALLS = {
    "1-D x": (lambda f: f(torch.ones(3), ONE, ONE), r"for x \(N, C, \*\), which is \(3,\)"),
    "integer x": (lambda f: f(torch.ones(2, 3, dtype=torch.int64), ONE, ONE), "int64"),
    "other channels": (lambda f: f(torch.ones(2, 4), ONE, ONE), r"mean is \(3,\), must be .* which is \(2, 4\)"),
    "one variance": (lambda f: f(torch.ones(2, 3), ONE, torch.ones(1)), r"var is \(1,\)"),
    "weight for each value": (lambda f: f(torch.ones(2, 3), ONE, ONE, torch.ones(3, 1, 1)), r"weight is \(3, 1, 1\)"),
    "no group": (lambda f: f(torch.ones(3, 3), THREE, THREE), "mean .* has 3 groups, but group is not given"),
    "no group for bias": (lambda f: f(torch.ones(1, 3), ONE, ONE, None, THREE), "bias .* group is not given"),
    "other number of groups": (
        lambda f: f(torch.ones(2, 3), THREE, THREE, torch.ones(2, 3), group=torch.tensor([0, 1])),
        r"weight \(2, 3\) has 2 groups, others have 3",
    ),
    "group for each value": (
        lambda f: f(torch.ones(2, 3), THREE, THREE, group=torch.zeros(2, 3, dtype=torch.int64)),
        r"group must be int64 of shape \(2,\)",
    ),
    "device": (lambda f: f(torch.ones(2, 3), ONE, ONE, ON_META), "weight is on meta, but x on cpu"),
}


@pytest.mark.parametrize("name", WRONG_FROZEN_CALLS)
def test_wrong_calls_of_frozen_say_what_is_wrong(name):
    call, message = WRONG_FROZEN_CALLS[name]
    with pytest.raises(InputError, match=message):
        call(frozen_batch_norm)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["no group", "no group for bias", "one variance"])
def test_wrong_calls_of_frozen_in_compiled_code_do_too(name):
    """Without a check, (G, C) statistics would be broadcast against the samples."""
    call, message = WRONG_FROZEN_CALLS[name]
    with pytest.raises(InputError, match=message):
        torch.compile(lambda: call(frozen_batch_norm), backend="eager")()


@pytest.mark.parametrize("group", [[0, 3], [-1, 0]])
def test_groups_of_frozen_out_of_range_are_an_error(group):
    with pytest.raises(InputError, match="group must hold numbers from 0 to 2"):
        frozen_batch_norm(torch.ones(2, 3), THREE, THREE, group=torch.tensor(group))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_derivatives_are_those_of_backward(shared, requires_grad):
    """Also where nothing asks for gradients: an operator without derivatives would give 0, and say nothing."""
    x, z = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    w, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2))
    groups = [torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 0])]

    def f(x):
        (y, q), moments = batch_norm([x, z], w, b, group=groups, num_groups=2, shared_statistics=shared)
        return y, q, moments.mean, moments.m2

    for ours, expected in zip(torch.func.jacfwd(f)(x), torch.autograd.functional.jacobian(f, x), strict=True):
        torch.testing.assert_close(ours, expected)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y, _ = batch_norm(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


def test_gradients_of_single_samples_by_torch_func():
    x, w = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(x):
        return batch_norm(x, w)[0].square().sum() + batch_norm([x, 2 * x])[0][0].exp().sum()

    together = torch.func.vmap(torch.func.grad(loss))(x)
    apart = torch.stack([torch.autograd.functional.jacobian(loss, one) for one in x])
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_on_the_meta_device_results_have_the_shape_that_they_have_elsewhere(requires_grad):
    def run(device):
        x, z = (torch.ones(n, 3, 2, device=device, requires_grad=requires_grad) for n in (4, 3))
        w, b = (torch.ones(3, device=device, requires_grad=requires_grad) for _ in range(2))
        group = torch.zeros(4, dtype=torch.int64, device=device)
        y, moments = batch_norm(x, w, b)
        ys, _ = batch_norm([x, z], w, b)
        grouped, of_groups = batch_norm(x, w, b, group=group, num_groups=2)
        frozen = frozen_batch_norm(x, b, w, w, b)
        outputs = [y, *ys, grouped, frozen]
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), [x, z, w, b]) if requires_grad else ()
        return [*outputs, moments.count, moments.mean, of_groups.m2, *gradients]

    for on_meta, on_cpu in zip(run("meta"), run("cpu"), strict=True):
        assert on_meta.is_meta
        assert (on_meta.shape, on_meta.dtype, on_meta.stride()) == (on_cpu.shape, on_cpu.dtype, on_cpu.stride())


WRONG_DEVICES = {
    "weight": lambda: batch_norm(torch.ones(2, 3), ON_META),
    "bias": lambda: batch_norm(torch.ones(2, 3), bias=ON_META),
    "group": lambda: batch_norm(torch.ones(2, 3), group=torch.zeros(2, dtype=torch.int64, device="meta")),
    "a tensor": lambda: batch_norm([torch.ones(2, 3), torch.ones(2, 3, device="meta")]),
    "x": lambda: batch_norm(torch.ones(2, 3, device="meta"), ONE, ONE),
    "mean": lambda: frozen_batch_norm(torch.ones(2, 3), ON_META, ONE),
    "var": lambda: frozen_batch_norm(torch.ones(2, 3), ONE, ON_META),
    "x of frozen": lambda: frozen_batch_norm(torch.ones(2, 3, device="meta"), ONE, ONE),
    "group of frozen": lambda: frozen_batch_norm(
        torch.ones(2, 3), THREE, THREE, group=torch.zeros(2, dtype=torch.int64, device="meta")
    ),
}


@pytest.mark.parametrize("name", WRONG_DEVICES)
def test_a_tensor_of_another_device_is_an_error(name):
    with pytest.raises(InputError, match="meta"):
        WRONG_DEVICES[name]()
