"""An audit changes nothing: model, gradients, optimizer, random state, hooks, mini-batch; however it ends."""

import copy
import random
import signal

import pytest
import torch
from conftest import state_of
from interrupting import Lines
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from precisebn import freeze
from precisebn.auditing.run import audit
from precisebn.models.random_state import RandomState

pytestmark = pytest.mark.usefixtures("pythons_own_handler")


class Eventful(nn.Module):
    """Moves whatever a forward can move."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.register_buffer("queue", torch.zeros(4))
        self.calls, self.seen = 0, []
        self.generator = torch.Generator().manual_seed(1)
        self.dice = random.Random(1)

    def forward(self, x):
        self.calls += 1
        self.seen.append(float(x.sum()))
        x.mul_(2)
        y = self.norm(self.conv(x))
        with torch.no_grad():
            self.queue.add_(y.mean((0, 2, 3)))
        self.drawn = torch.rand(1, generator=self.generator) + self.dice.random() + random.random()
        return self.drop(y)


def trained() -> tuple[Eventful, torch.optim.Optimizer]:
    model = Eventful()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return model, optimizer  # with gradients and a state


def everything(model, optimizer, *tensors) -> tuple:
    numbers = copy.deepcopy((
        [p.grad for p in model.parameters()], optimizer.state_dict(), tensors, model.generator.get_state(),
        torch.get_rng_state(),
    ))  # fmt: skip
    return numbers, random.getstate(), model.dice.getstate()


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


LOSSES = {
    "default": None,
    "one that raises": lambda output, batch: 1 / 0,
    "one that trains": "train",
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_all_is_as_before(loss, mode):
    model, optimizer = trained()
    model.train(mode)
    function = LOSSES[loss]
    if function == "train":  # manual optimization, as in Lightning

        def function(output, batch):
            output.sum().backward(retain_graph=True)
            optimizer.step()
            return output.sum()

    batch, loader = torch.randn(4, 3, 8, 8), [torch.randn(4, 3, 8, 8) for _ in range(9)]
    grads = [p.grad for p in model.parameters()]
    before, picture = everything(model, optimizer, batch, *loader), state_of(model)
    report = audit(model, batch, optimizer=optimizer, loss=function, loader=loader)
    assert same(everything(model, optimizer, batch, *loader), before)
    assert picture.differences(state_of(model)) == {}
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert ("PBN351" in report.not_run) == (loss != "default")  # nor can autograd go back through weights that moved


@pytest.mark.parametrize("broken", ["conv", "norm", "drop"])
def test_a_forward_that_raises_in_the_middle(broken):
    model, optimizer = trained()
    getattr(model, broken).register_forward_hook(lambda module, args, output: 1 / 0)
    before, picture = everything(model, optimizer), state_of(model)
    report = audit(model, torch.randn(4, 3, 8, 8), loader=[torch.randn(4, 3, 8, 8)] * 9)
    assert "raised ZeroDivisionError" in report.not_run["PBN401"]
    assert same(everything(model, optimizer)[0][0], before[0][0])
    assert picture.differences(state_of(model)) == {}


@pytest.mark.parametrize("nth", range(1, 8))
def test_ctrl_c_in_the_forward(nth):
    """Of each of the forwards that an audit makes."""
    model, optimizer = trained()
    left = [nth]

    def forward(model, batch):
        output = model(batch)
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return output

    batches = [torch.randn(4, 3, 8, 8) for _ in range(9)]
    before, picture = everything(model, optimizer, *batches), state_of(model)
    with pytest.raises(KeyboardInterrupt):
        audit(model, batches[0], loader=batches, forward=forward)
    assert same(everything(model, optimizer, *batches), before)
    assert picture.differences(state_of(model)) == {}


def test_ctrl_c_at_any_line_of_ours():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    batch = torch.randn(8, 3)
    picture, state = state_of(model), torch.get_rng_state()
    audit(model, batch)  # what is cached is worked out once, in more lines
    number = len(Lines().run(lambda: audit(model, batch)).ran)
    for at in range(0, number, max(number // 150, 1)):
        ran = Lines(lambda line, where, at=at: line == at).run(lambda: audit(model, batch))
        assert ran.interrupted, ran.ran[at]
        assert picture.differences(state_of(model)) == {}, ran.ran[at]
        assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_cannot_be_run_says_why():
    batch = torch.randn(8, 3)
    lazy = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    assert "is lazy" in audit(lazy, batch).not_run["PBN401"]
    assert nn.parameter.is_lazy(lazy[0].weight)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert "torch.jit" in audit(torch.jit.script(model), batch).not_run["PBN351"]
    exported = torch.export.export(model, (batch,)).module()
    assert "audit the module that it was made from" in audit(exported, batch).not_run["PBN252"]
    report = audit(model.to("meta"), batch.to("meta"))
    assert "meta device" in report.not_run["PBN252"]
    assert "PBN351" not in report.not_run  # for gradients shapes are enough


def test_under_no_grad_and_in_inference_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            report = audit(model, torch.randn(8, 3))
        assert "PBN351" not in report.not_run
        assert [finding for finding in report if finding.code == "PBN351"] == []


def test_wrapped_and_compiled_models():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    for wrapped in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        picture = state_of(wrapped)
        report = audit(wrapped, torch.randn(64, 3))
        assert "PBN351" not in report.not_run
        assert report.at_least("warning") == []
        assert picture.differences(state_of(wrapped)) == {}


def test_random_state_is_that_of_before_the_call():
    model = freeze(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()), "0")
    batch, before = torch.randn(8, 3), RandomState()
    audit(model, batch)
    after = torch.rand(3)
    before.put_back()
    assert torch.equal(torch.rand(3), after)


def test_a_model_under_ddp_trains_on_as_before(one_rank):
    """DistributedDataParallel counts forwards and backwards: those of an audit are none of its business."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    wrapped = nn.parallel.DistributedDataParallel(model)
    picture = state_of(wrapped)
    for _ in range(2):
        assert "PBN351" not in audit(wrapped, torch.randn(64, 3)).not_run
        assert picture.differences(state_of(wrapped)) == {}
    for _ in range(2):
        wrapped(torch.randn(8, 3)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
