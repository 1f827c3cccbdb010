"""The arithmetic of exported graphs: the same as the library's own, in torch's operators alone."""

import pytest
import torch
from torch import Tensor, nn

from precisebn.functional import batch_norm, frozen_batch_norm, portable

pytestmark = pytest.mark.usefixtures("one_thread")

C = 3
EPS = torch.finfo(torch.float32).eps


def sample(shape: tuple[int, ...]) -> Tensor:
    """Values of mean 1 and deviation 2."""
    return torch.randn(shape) * 2 + 1


def affine(rows: int | None) -> tuple[Tensor, Tensor]:
    shape = (C,) if rows is None else (rows, C)
    return torch.rand(shape) + 0.5, torch.randn(shape)


@pytest.mark.parametrize("shape", [(7, C), (7, C, 5), (7, C, 3, 2)])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("own_affine", [False, True], ids=["common affine", "own affine"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batch_statistics_are_those_of_the_operators(shape, shared, grouped, own_affine, offset):
    """Several tensors, groups, and values far from 0: by float64 to a few roundings."""
    torch.manual_seed(0)
    xs = [sample(shape) + offset, sample((5, *shape[1:])) + offset]
    groups = [torch.tensor([0, 2, 2, 0, 0, 2, 0]), torch.tensor([2, 2, 0, 2, 0])] if grouped else []
    num_groups = 4 if grouped else 1  # two of them empty
    weight, bias = affine(num_groups if own_affine else None)
    expected, moments = batch_norm(
        [x.double() for x in xs], weight, bias, group=groups or None, num_groups=num_groups, shared_statistics=shared
    )
    ys, count, mean, m2 = portable.batch_norm(xs, weight, bias, 1e-5, groups, num_groups, shared)
    for y, z in zip(ys, expected, strict=True):
        torch.testing.assert_close(y.double(), z, rtol=32 * EPS, atol=32 * EPS)
    defined = (t if grouped else t.unsqueeze(0) for t in (moments.count, moments.mean, moments.m2))
    for ours, theirs in zip((count, mean, m2), defined, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_constant_channel_becomes_its_bias():
    x = torch.full((4, C, 2), 3e3)
    weight, bias = affine(None)
    (y,), _, _, m2 = portable.batch_norm([x], weight, bias, 1e-5, [], 1, False)
    assert torch.equal(y, bias.view(-1, 1).expand_as(x))
    assert not m2.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_statistics", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_frozen_statistics_may_be_of_another_dtype(dtype, of_statistics):
    """Torch's own operator takes only some of these mixtures."""
    x = sample((4, C, 5)).to(dtype)
    mean, var, weight, bias = (t.to(of_statistics) for t in (torch.randn(C), torch.rand(C) + 1, *affine(None)))
    ours = portable.frozen_batch_norm(x, mean, var, weight, bias, 1e-5)
    assert ours.dtype == dtype
    # The coefficients of a half precision operator may be rounded to it before it multiplies and adds.
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, frozen_batch_norm(x, mean, var, weight, bias), rtol=eps, atol=eps)


class Functional(nn.Module):
    """The functions themselves, by domains that are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(4, C))
        self.register_buffer("var", torch.rand(4, C) + 1)
        self.weight = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = batch_norm(x, self.weight, group=domain, num_groups=4)
        return y, frozen_batch_norm(x, self.mean, self.var, self.weight, group=domain)


def assert_is_the_function(graph: object, function: Functional) -> None:
    """Also for other domains, in another number of samples."""
    for n in (6, 9):
        x, domain = sample((n, C, 2)), torch.arange(n) % 3
        torch.testing.assert_close(graph(x, domain), function(x, domain))


def test_a_trace_serves_every_batch_size_and_every_domain():
    function = Functional()
    with torch.no_grad():
        traced = torch.jit.trace(function, (sample((4, C, 2)), torch.arange(4) % 2))
    assert "precisebn::" not in str(traced.inlined_graph)
    assert_is_the_function(traced, function)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_program_serves_every_batch_size_and_every_domain(strict):
    function, n = Functional(), torch.export.Dim("n", min=3)
    example = sample((4, C, 2)), torch.arange(4) % 2
    program = torch.export.export(function, example, dynamic_shapes=({0: n}, {0: n}), strict=strict)
    assert "precisebn" not in str(program.graph)
    assert_is_the_function(program.module(), function)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_an_exported_program_is_differentiable():
    function = Functional()
    x, domain = sample((6, C, 2)), torch.arange(6) % 3
    graph = torch.export.export(function, (x, domain)).module()
    gradients = []
    for call in (function, graph):
        x.grad = None
        y, z = call(x.requires_grad_(), domain)
        (y.square().mul(torch.arange(2)).sum() + z.square().sum()).backward()
        gradients.append(x.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_compile_has_arithmetic_of_its_own_to_fuse(compiled):
    """Only graphs that leave are of torch's batch norm operator."""
    torch._dynamo.reset()
    graphs = []
    function = lambda x, mean, var: frozen_batch_norm(x, mean, var)  # noqa: E731
    arguments = sample((2, C)), torch.randn(C), torch.rand(C)
    if compiled:

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            graphs.append(graph)
            return graph.forward

        torch.compile(function, backend=keep, fullgraph=True)(*arguments)
    else:
        graphs.append(torch.jit.trace(function, arguments).graph)
    assert ("batch_norm(" in str(getattr(graphs[0], "code", graphs[0]))) is not compiled
