"""check_determinism: it finds where two runs part, and is content where they only seem to."""

import itertools

import pytest
import torch
from conftest import state_of
from torch import nn

from precisebn import InputError
from precisebn.auditing.determinism import check_determinism


class Net(nn.Module):
    """Something between two layers."""

    def __init__(self, between):
        super().__init__()
        self.one, self.norm, self.two, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout()
        self.between = between

    def forward(self, x):
        return self.drop(self.two(self.between(self, self.norm(self.one(x)))))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, batches=None):
    fixed = torch.randn(8, 4)

    def step():
        optimizer.zero_grad()
        loss = model(fixed if batches is None else next(batches)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def check(between, **arguments):
    model = Net(between)
    optimizer = torch.optim.AdamW(model.parameters())
    return check_determinism(step_of(model, optimizer), model=model, optimizer=optimizer, **arguments)


def test_a_step_with_dropout_and_moving_buffers_is_deterministic():
    report = check(lambda net, x: x)
    assert report.deterministic
    assert report.compared > 20
    assert str(report).startswith("deterministic")


def test_a_generator_of_its_own():
    generator = torch.Generator()

    def noise(net, x):
        return x + torch.randn(x.shape, generator=generator)

    report = check(noise)
    assert not report.deterministic
    assert (report.kind, report.name) == ("input", "two")
    assert "right after the output of 'norm'" in report.what
    assert "restore=" in report.remedy
    assert check(noise, restore=[generator]).deterministic


class OwnDropout(nn.Module):
    generator = torch.Generator()  # of the class: no attribute of the module

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator) > 0.5)


def test_dropout_of_its_own_generator():
    model = Net(lambda net, x: x)
    model.drop = OwnDropout()
    report = check_determinism(lambda: model(torch.ones(8, 4)), model=model)
    assert (report.kind, report.name) == ("output", "drop")
    assert "dropout" in report.cause


def test_a_generator_in_an_attribute_is_put_back():
    model = Net(lambda net, x: x * torch.rand(1, generator=net.generator))
    model.generator = torch.Generator()
    assert check_determinism(lambda: model(torch.ones(8, 4)), model=model).deterministic


def test_other_data():
    model = Net(lambda net, x: x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = iter(torch.randn(8, 8, 4))
    report = check_determinism(step_of(model, optimizer, batches), model=model, optimizer=optimizer)
    assert (report.kind, report.name) == ("input", "")
    assert report.cause.startswith("data")


def test_the_same_data_again():
    model = Net(lambda net, x: x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = itertools.repeat(torch.randn(8, 4))
    assert check_determinism(step_of(model, optimizer, batches), model=model, optimizer=optimizer).deterministic


def test_another_order_of_calls():
    turns = itertools.count()

    def in_turn(net, x):
        return net.norm(net.one(x)) if next(turns) % 2 else net.one(net.norm(x))

    report = check(in_turn)
    assert report.kind == "order"
    assert "sorted" in report.remedy


class NoisyBackward(torch.autograd.Function):
    counter = itertools.count()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + next(NoisyBackward.counter))


def test_a_backward_that_differs():
    report = check(lambda net, x: NoisyBackward.apply(x))
    assert report.kind == "gradient"
    assert report.name in ("norm.weight", "norm.bias", "one.weight", "one.bias")


def test_an_operator_without_a_fixed_order_of_sums(monkeypatch):
    """Told by torch itself; what differs is pretended here, for on a CPU there is no such operator."""
    counter = itertools.count()

    def unordered(net, x):
        return x if torch.are_deterministic_algorithms_enabled() else x + next(counter)

    report = check(unordered)
    assert "fixed order" in report.cause
    assert "use_deterministic_algorithms" in report.remedy
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_buffer_that_somebody_else_writes():
    model = Net(lambda net, x: x)
    counter = itertools.count()

    def step():
        model(torch.ones(8, 4))
        model.norm.running_mean.add_(next(counter))

    report = check_determinism(step, model=model)
    assert (report.kind, report.name) == ("buffer", "norm.running_mean")


def test_an_optimizer_that_nobody_mentioned():
    model = Net(lambda net, x: x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    report = check_determinism(step_of(model, optimizer), model=model)
    assert report.kind == "parameter"
    assert "optimizer=" in report.remedy


def test_a_result_that_differs():
    counter = itertools.count()
    report = check_determinism(lambda: torch.tensor(next(counter)), model=nn.Linear(1, 1))
    assert report.kind == "result"


def test_all_is_as_before():
    model = Net(lambda net, x: x)
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_of(model, optimizer)
    step()
    generator = torch.Generator()
    before = state_of(model), torch.get_rng_state(), generator.get_state(), [p.grad.clone() for p in model.parameters()]
    steps = [float(state["step"]) for state in optimizer.state.values()]
    check_determinism(step, model=model, optimizer=optimizer, restore=[generator])
    assert before[0].differences(state_of(model)) == {}
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before[3], strict=True))
    assert [float(state["step"]) for state in optimizer.state.values()] == steps


def test_a_step_that_raises_leaves_all_as_before():
    model = Net(lambda net, x: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        check_determinism(lambda: model(torch.ones(8, 4)), model=model)
    assert before.differences(state_of(model)) == {}


def test_two_models_and_a_teacher_that_follows():
    student, teacher = Net(lambda net, x: x), Net(lambda net, x: x)

    def step():
        loss = (student(torch.ones(8, 4)) - teacher(torch.ones(8, 4))).square().mean()
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                p.lerp_(q + 1, 0.5)
        return loss

    assert check_determinism(step, model=[student, teacher]).deterministic
    report = check_determinism(step, model=student)
    assert report.kind == "result"  # what the teacher does is not seen


def test_wrong_calls():
    with pytest.raises(InputError, match="model must be a module"):
        check_determinism(lambda: None, model="resnet18")
    with pytest.raises(InputError, match="step must be a function"):
        check_determinism(3, model=nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_steps_inside_of_torch_func_and_with_tensors_of_any_kind():
    class Odd(nn.Module):
        def forward(self, x):
            return x * 2

    odd = Odd()
    values = [
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.eye(3).to_sparse_csr(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ]

    def step():
        outputs = [odd(value) for value in values]
        return torch.vmap(odd)(torch.ones(2, 3)), torch.func.grad(lambda x: odd(x).sum())(torch.ones(2)), *outputs

    assert check_determinism(step, model=odd).deterministic
    noise = itertools.count()
    report = check_determinism(lambda: torch.vmap(lambda x: odd(x + next(noise)))(torch.ones(2, 3)), model=odd)
    assert not report.deterministic


def test_a_report_is_neither_true_nor_false():
    """``assert check_determinism(...)`` and ``if audit(...)`` would mean opposite things."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"report\.deterministic"):
        bool(check_determinism(lambda: model(torch.ones(2, 4)), model=model))
