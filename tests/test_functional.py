"""functional.batch_norm: nn.BatchNorm forward and backward, over groups and over lists of tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from precisebn.errors import InputError
from precisebn.functional import batch_norm

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


@settings(deadline=None, max_examples=30)
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
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
