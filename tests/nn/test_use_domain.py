"""use_domain: which layer hears of which block, across nesting, exceptions, threads, tasks and compiled code."""

import asyncio
import contextvars
import copy
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from conftest import values_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from precisebn.errors import InputError
from precisebn.nn import DomainSpecificBN, use_domain

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile and torch.export of 2.10 to 2.13 warn of their own use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

# Free-threaded Python hands the context of a thread on to those that it starts.
threads_start_afresh = pytest.mark.skipif(
    bool(getattr(sys.flags, "thread_inherit_context", False)), reason="threads inherit the context here"
)

K = 4
NO_DOMAIN = r"DomainSpecificBN\(5\): of which domain is the input\?"


class Net(nn.Module):
    """Two layers that are told apart by domain, in a forward that knows nothing of domains."""

    def __init__(self, num_domains: int = K) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(3, 5),
            DomainSpecificBN(5, num_domains),
            nn.ReLU(),
            nn.Linear(5, 5),
            DomainSpecificBN(5, num_domains),
        ).double()
        with torch.no_grad():
            for name, tensor in (*self.named_parameters(), *self.named_buffers()):
                if tensor.is_floating_point():
                    values = torch.randn(tensor.shape)
                    tensor.copy_(values.abs() + 0.2 if name.endswith("running_var") else values)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def told(self, x: Tensor, domain: int | Tensor) -> Tensor:
        """The same by argument."""
        linear, bn, relu, second_linear, second_bn = self.layers
        return second_bn(second_linear(relu(bn(linear(x), domain=domain))), domain=domain)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64)


@pytest.fixture
def told() -> Net:
    """A copy of the net of :class:`Net`, to be told by argument and compared with."""
    return Net()


MIXED = torch.tensor([3, 0, 0, 1, 3, 0, 3, 1])


# ---- Blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("domain", [0, 3, MIXED], ids=["0", "3", "mixed"])
def test_a_block_is_the_argument_of_every_layer_inside(x, told, domain, training):
    net = Net().train(training)
    with use_domain(domain):
        y = net(x)
    assert torch.equal(y, told.train(training).told(x, domain))
    assert values_of(net) == values_of(told)


def test_blocks_nest_and_the_inner_one_counts(x):
    net = Net().eval()
    with use_domain(1):
        before = net(x)
        with use_domain(2), use_domain(MIXED):
            inner = net(x)
        after = net(x)
    assert torch.equal(before, net.told(x, 1))
    assert torch.equal(inner, net.told(x, MIXED))
    assert torch.equal(after, before)
    with pytest.raises(InputError, match=NO_DOMAIN):
        net(x)


def test_a_block_that_is_left_by_an_exception_is_left(x):
    net = Net().eval()
    with use_domain(1):
        with pytest.raises(ZeroDivisionError), use_domain(2):
            _ = 1 / 0
        assert torch.equal(net(x), net.told(x, 1))
    with pytest.raises(ZeroDivisionError), use_domain(2):
        _ = 1 / 0
    with pytest.raises(InputError, match=NO_DOMAIN):
        net(x)


def test_what_a_layer_is_told_by_argument_or_position_counts_more():
    bn = DomainSpecificBN(5, K)
    x = torch.randn(8, 5)
    with use_domain(1):
        bn(x, domain=2)
        assert bn.num_batches_tracked.tolist() == [0, 0, 1, 0]
        bn([x, x, x, x])
        assert bn.num_batches_tracked.tolist() == [1, 1, 2, 1]


def test_as_a_decorator(x):
    net = Net().eval()

    @use_domain(2)
    def call() -> Tensor:
        return net(x)

    for _ in range(2):
        assert torch.equal(call(), net.told(x, 2))
    with pytest.raises(InputError, match=NO_DOMAIN):
        net(x)


# ---- Threads and tasks --------------------------------------------------------------------------------------------


def test_threads_each_have_their_own(x):
    net, entered = Net().eval(), threading.Barrier(K)

    def run(domain: int) -> Tensor:
        with use_domain(domain):
            entered.wait(timeout=60)
            return net(x)

    with ThreadPoolExecutor(K) as pool:
        for domain, y in enumerate(pool.map(run, range(K))):
            assert torch.equal(y, net.told(x, domain))


@threads_start_afresh
def test_a_new_thread_without_a_block_is_an_error_rather_than_domain_0(x):
    """As replicas of DataParallel are, which run on threads of their own."""
    net = Net()
    before = values_of(net)
    with use_domain(1), ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(net, half) for half in x.chunk(2)]:
            with pytest.raises(InputError, match=NO_DOMAIN):
                future.result()
    assert values_of(net) == before


def test_a_context_that_is_carried_to_a_thread_brings_the_block_along(x):
    net = Net().eval()
    with use_domain(3):
        context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(context.run, net, x).result(), net.told(x, 3))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", [False, True])
def test_tasks_of_one_loop_that_take_turns_do_not_see_each_others(x, told, compiled):
    net = Net()
    model = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    order: list[int] = []
    one_thread_at_a_time = asyncio.Lock()  # or two threads, not domains, would get into each other's buffers

    async def serve(domain: int) -> list[Tensor]:
        ys = []
        with use_domain(domain):
            for _ in range(3):
                await asyncio.sleep(0)  # the other task's turn
                order.append(domain)
                async with one_thread_at_a_time:
                    ys.append(model(x).detach())
            async with one_thread_at_a_time:
                ys.append((await asyncio.to_thread(model, x)).detach())
        return ys

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(serve(1), serve(2))

    of_tasks = asyncio.run(both())
    assert order == [1, 2, 1, 2, 1, 2]
    for domain, ys in zip((1, 2), of_tasks, strict=True):
        for y in ys:
            torch.testing.assert_close(y, told.told(x, domain), rtol=1e-12, atol=1e-12)
    assert net.layers[1].num_batches_tracked.tolist() == [0, 4, 4, 0]


# ---- Backward -----------------------------------------------------------------------------------------------------


def gradients(net: Net, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sin().sum(), list(net.parameters()))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_backward_needs_no_block_and_minds_none(x, told, backend):
    """Nor do those of compiled code, which might have asked for the domain again."""
    net = Net()
    model = net if backend is None else torch.compile(net, fullgraph=True, backend=backend)
    with use_domain(2):
        y, z = model(x), model(x)
    expected = gradients(told, told.told(x, 2))
    torch.testing.assert_close(gradients(net, y), expected, rtol=1e-10, atol=1e-10)
    with use_domain(1):
        torch.testing.assert_close(gradients(net, z), expected, rtol=1e-10, atol=1e-10)


def checkpointed(net: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False)


def test_a_forward_repeated_in_backward_outside_the_block_says_so(x):
    net = Net()
    with use_domain(2):
        y = checkpointed(net, x)
    with pytest.raises(InputError, match=r"put backward\(\) inside the block too, or pass domain="):
        y.sum().backward()


def test_the_hint_at_checkpointing_is_not_given_elsewhere(x):
    with pytest.raises(InputError, match=NO_DOMAIN) as caught:
        Net()(x)
    assert "checkpointing" not in str(caught.value)


def test_a_forward_repeated_in_backward_inside_the_block_gives_the_same_gradients(x, told):
    net = Net()
    with use_domain(2):
        ours = gradients(net, checkpointed(net, x))
    assert all(map(torch.equal, ours, gradients(told, told.told(x, 2))))
    assert values_of(net) == values_of(told)  # statistics are updated once


# ---- Compiled and exported code -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph_serves_all_domains(x, training):
    counter, eager = CompileCounter(), Net(num_domains=20).train(training)
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for domain in range(20):
        with use_domain(domain):
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-12, atol=1e-12)
    mixed = torch.randint(20, (8,))
    with use_domain(mixed):
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_asks_anew_each_time_and_says_what_is_wrong(x):
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with use_domain(1):
        expected = compiled(x)
    before = values_of(net)
    for block, message in (
        (nullcontext(), NO_DOMAIN),
        (use_domain(K), r"DomainSpecificBN\(5\): the domain must be from 0 to 3, but is 4"),
        (use_domain(torch.tensor([0, 1])), "use_domain has set 2 domains on cpu, but the input has 8 samples on cpu"),
        (use_domain(torch.full((8,), K)), "domains must be from 0 to 3, but go from 4 to 4"),
    ):
        with block, pytest.raises(InputError, match=message):
            compiled(x)
    assert values_of(net) == before
    with use_domain(1):
        assert torch.equal(compiled(x), expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_block_inside_compiled_code_breaks_the_graph_and_is_still_right(x, told):
    net = Net()

    def call(x: Tensor, domain: int) -> Tensor:
        with use_domain(domain):
            return net(x)

    compiled = torch.compile(call, backend="eager")
    with use_domain(0):
        for domain in (2, 3):
            torch.testing.assert_close(compiled(x, domain), told.told(x, domain), rtol=1e-12, atol=1e-12)


def test_the_operator_that_compiled_code_asks(x):
    operator = torch.ops.precisebn.current_domain.default
    # A CUDA graph, as of torch.compile(mode="reduce-overhead"), would replay the domain of its recording.
    assert torch.Tag.cudagraph_unsafe in operator.tags
    with use_domain(MIXED):
        torch.library.opcheck(operator, (x, K, "who"))
        # A compiler may write over what an operator returns, once it is used up.
        assert operator(x, K, "who").data_ptr() != MIXED.data_ptr()
    with use_domain(3):
        assert torch.equal(operator(x, K, "who"), torch.full((8,), 3))


def test_exported_code_asks_each_time_too(x):
    net = Net().eval()
    with use_domain(1):
        program = torch.export.export(net, (x,)).module()
    for domain in (0, 3, MIXED):
        with use_domain(domain):
            torch.testing.assert_close(program(x), net(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match=NO_DOMAIN):
        program(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*legacy TorchScript-based ONNX:DeprecationWarning")
def test_a_graph_that_cannot_ask_is_of_the_domain_of_its_making(x):
    net = Net().eval()
    with use_domain(2):
        graphs = [torch.jit.trace(net, x), torch.fx.symbolic_trace(net)]
        expected = net(x)
    for graph in graphs:
        torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
        with use_domain(1):
            torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*legacy TorchScript-based ONNX:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        torch.jit.trace,
        lambda net, x: torch.fx.symbolic_trace(net),
        lambda net, x: torch.onnx.export(net, (x,), io.BytesIO(), dynamo=False),
        lambda net, x: torch.onnx.export(net, (x,), dynamo=True, verbose=False),
        lambda net, x: torch.onnx.export(torch.export.export(net, (x,)), verbose=False),
    ],
    ids=["jit", "fx", "legacy", "dynamo", "program"],
)
def test_a_graph_that_cannot_ask_and_is_made_outside_a_block_is_an_error(x, make):
    pytest.importorskip("onnxscript")
    remedy = r"`with use_domain\(k\):`.* convert_to_batchnorm\(model, domain=k\) makes it a plain BatchNorm"
    with pytest.raises(Exception, match=remedy):
        make(Net().eval(), x)


# ---- Wrong calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (-1, "use_domain: the domain must be 0 or more, but is -1"),
        (True, "use_domain: a domain is a whole number, or an int64 tensor .* not bool: True"),
        (0.0, "not float: 0.0"),
        (None, "not NoneType: None"),
        ("source", "not str: 'source'"),
        (torch.tensor(1), r"of shape \(\); for a single domain pass int\(domain\)"),
        (torch.zeros(8), r"is torch.float32 of shape \(8,\)"),
    ],
)
def test_blocks_of_no_domain_are_errors_and_leave_the_outer_block_as_it_is(x, domain, message):
    net, ran = Net().eval(), []
    with use_domain(1):
        with pytest.raises(InputError, match=message), use_domain(domain):
            ran.append(domain)
        assert torch.equal(net(x), net.told(x, 1))
    assert not ran


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (7, r"DomainSpecificBN\(5\): the domain must be from 0 to 3, but is 7"),
        (torch.full((8,), 4), r"DomainSpecificBN\(5\): domains must be from 0 to 3, but go from 4 to 4"),
        (torch.zeros(8, dtype=torch.int64) - 1, "but go from -1 to -1"),
        (torch.zeros(3, dtype=torch.int64), r"there are 3 domains on cpu for 8 samples on cpu"),
    ],
)
def test_a_domain_that_a_layer_does_not_have_is_an_error_there(x, domain, message):
    """A block does not know how many domains the layers inside have."""
    net = Net()
    before = values_of(net)
    with use_domain(domain), pytest.raises(InputError, match=message):
        net(x)
    assert values_of(net) == before
