"""Checks of optimizers: each finds the mistake, and is quiet where it is nearly made."""

import copy
import re

import pytest
import torch
from torch import nn

from precisebn import convert_domain_specific, convert_frozen_batchnorm, freeze, trainable_parameters
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit

pytestmark = pytest.mark.usefixtures("one_thread")


def found(code: str, model: nn.Module, optimizer, **given) -> tuple[Finding, ...]:
    return audit(model, optimizer=optimizer, only=code, **given)[code]


def layers(code: str, model: nn.Module, optimizer, **given) -> tuple[str, ...]:
    return tuple(name for one in found(code, model, optimizer, **given) for name in one.layers)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False))


def sgd(parameters, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, **settings)


def halves(some) -> list[dict]:
    return [{"params": list(some[:1].parameters())}, {"params": list(some[1:].parameters())}]


NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")


# ---- PBN301: an optimizer of another model --------------------------------------------------------------------------


def test_the_optimizer_of_the_original_trains_the_original():
    """Story 3: a model is copied, and the optimizer goes on with the one that it was made for."""
    original = model()
    optimizer = sgd(original.parameters())
    [finding] = found("PBN301", copy.deepcopy(original), optimizer, other=original)
    assert (finding.layers, finding.severity) == (NAMES, "error")
    assert "5 are of the other" in finding.what


def test_a_copy_of_an_optimizer_alone_trains_nobody():
    original = model()
    optimizer = copy.deepcopy(sgd(original.parameters()))
    assert layers("PBN301", original, optimizer) == NAMES
    before = copy.deepcopy(original.state_dict())
    original(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in original.named_parameters())  # and so it is


def test_an_optimizer_made_before_layers_were_replaced():
    some = model()
    optimizer = sgd(some.parameters())
    some[1] = nn.BatchNorm2d(4)
    assert layers("PBN301", some, optimizer) == ("1.weight", "1.bias")


def replaced_head(some):
    some[2] = nn.Conv2d(4, 10, 1, bias=False)
    return some


def with_frozen_stem(some):
    return freeze(some, "0")


@pytest.mark.parametrize("change", [nn.Sequential.train, with_frozen_stem, replaced_head, lambda some: some[:2]])
@pytest.mark.parametrize("groups", [lambda some: some.parameters(), lambda some: some.named_parameters(), halves])
def test_the_remedy_for_an_optimizer_of_another_model_works(change, groups):
    """With the state of the old one where, and only where, that fits."""
    original = model()
    original(torch.randn(2, 3, 8, 8)).sum().backward()
    old = torch.optim.Adam(groups(original))
    old.step()
    some = change(copy.deepcopy(original))
    [finding] = found("PBN301", some, old, other=original)
    source = re.match(r"Make the optimizer anew from (\S+), after", finding.remedy)[1]
    new = torch.optim.Adam(eval(source, {"model": some, "trainable_parameters": trainable_parameters}))
    loads = "load_state_dict(old.state_dict())" in finding.remedy
    assert loads == (groups is not halves and change in (nn.Sequential.train, with_frozen_stem))
    if loads:
        new.load_state_dict(old.state_dict())
        state = {id(p): one["exp_avg"] for p, one in old.state.items()}
        for name, p in original.named_parameters():
            assert torch.equal(state[id(p)], new.state[some.get_parameter(name)]["exp_avg"])
    some(torch.randn(2, 3, 8, 8)).sum().backward()
    new.step()
    assert not found("PBN301", some, new)


def test_the_state_of_parameters_in_another_order_is_not_loaded():
    """Weight and bias of one shape each: load_state_dict would take one's for the other's."""
    original = model()
    named = [(f"0.{name}", p) for name, p in original[1].named_parameters()]
    for order, loads in ((named, True), (named[::-1], False)):
        [finding] = found("PBN301", nn.Sequential(nn.BatchNorm2d(4)), torch.optim.Adam(order))
        assert ("load_state_dict" in finding.remedy) == loads


def test_an_optimizer_made_before_the_conversion_to_domains():
    some = model()
    optimizer = sgd(some.parameters())
    convert_domain_specific(some, num_domains=2, affine="domain")
    assert [one.severity for one in found("PBN301", some, optimizer)] == ["note"]
    assert layers("PBN302", some, optimizer) == ("1.weight", "1.bias")


def test_a_copy_of_both_together_is_fine():
    original = model()
    twin, optimizer = copy.deepcopy((original, sgd(original.parameters())))
    assert found("PBN301", twin, optimizer) == found("PBN302", twin, optimizer) == ()


def test_an_optimizer_of_the_model_and_of_its_loss_is_noted():
    some, loss = model(), nn.Linear(4, 2)
    optimizer = sgd([*some.parameters(), *loss.parameters()])
    [finding] = found("PBN301", some, optimizer)
    assert finding.severity == "note"
    assert "2 parameters not of this model" in finding.what


def test_moving_a_model_keeps_its_parameters():
    some = model()
    optimizer = sgd(some.parameters())
    some.to(torch.float64).train()
    assert found("PBN301", some, optimizer) == ()


def test_master_copies_in_float32_are_fine():
    some = model().half()
    optimizer = sgd([p.detach().float().requires_grad_() for p in some.parameters()])
    assert not audit(some, optimizer=optimizer, only=["PBN301", "PBN302"])


def test_several_optimizers():
    some = model()
    optimizers = [sgd(some[0].parameters()), torch.optim.Adam([*some[1].parameters(), *some[2].parameters()])]
    assert not audit(some, optimizer=optimizers, only="PBN3*")
    assert layers("PBN302", some, optimizers[:1]) == ("1.weight", "1.bias", "2.weight")


def test_an_optimizer_of_another_lazy_model():
    some, other = nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.LazyLinear(2))
    assert layers("PBN301", some, sgd(other.parameters())) == ("0.weight", "0.bias")
    assert found("PBN301", some, sgd(some.parameters())) == ()


def test_the_wrapped_model_is_the_same_model():
    some = model()
    assert found("PBN301", nn.DataParallel(some), sgd(some.parameters())) == ()
    assert found("PBN301", torch.compile(some), sgd(some.parameters())) == ()


# ---- PBN302: trainable parameters that no optimizer holds -----------------------------------------------------------


def test_parameters_that_no_optimizer_holds():
    some = model()
    assert layers("PBN302", some, sgd(some[0].parameters())) == ("1.weight", "1.bias", "2.weight")


def test_frozen_parameters_need_no_optimizer():
    some = freeze(model(), "0")
    assert found("PBN302", some, sgd(trainable_parameters(some))) == ()
    assert found("PBN302", some, sgd(trainable_parameters(some, weight_decay=1e-4))) == ()


def test_tied_parameters_are_held_once():
    some = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    some[1].weight = some[0].weight
    assert not audit(some, optimizer=sgd(some.parameters()), only="PBN3*")


# ---- PBN303: frozen parameters in the optimizer ---------------------------------------------------------------------


def test_frozen_parameters_in_the_optimizer_are_noted():
    some = model()
    optimizer = sgd(some.parameters(), weight_decay=0.1)
    freeze(some, "0")
    [finding] = found("PBN303", some, optimizer)
    assert (finding.severity, finding.layers) == ("note", ("0.weight", "0.bias"))


def test_frozen_parameters_with_gradients_from_before_move():
    some = model()
    optimizer = sgd(some.parameters(), momentum=0.9, weight_decay=0.1)
    some(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    some[0].requires_grad_(False)
    [finding] = found("PBN303", some, optimizer)
    assert (finding.severity, finding.layers) == ("warning", ("0.weight", "0.bias"))
    before = some[0].weight.clone()
    optimizer.step()
    assert not torch.equal(some[0].weight, before)  # and so they do


def test_an_optimizer_of_what_is_trained_alone():
    some = freeze(model(), "0")
    assert found("PBN303", some, sgd(trainable_parameters(some))) == ()


# ---- PBN304, PBN305: held twice; held, and no parameter -------------------------------------------------------------


def test_parameters_held_twice():
    some = model()
    optimizers = [sgd(some.parameters()), sgd(some[1].parameters())]
    assert layers("PBN304", some, optimizers) == ("1.weight", "1.bias")
    assert layers("PBN304", some, optimizers[0]) == ()


def test_an_optimizer_that_writes_a_frozen_layers_buffers():
    some = model()
    optimizer = sgd(some.parameters())
    frozen = nn.Module()
    frozen.register_buffer("weight", some[1].weight.detach())  # the same memory
    frozen.register_buffer("bias", some[1].bias.detach().clone())
    some[1] = frozen
    assert layers("PBN305", some, optimizer) == ("1.weight",)


def test_our_frozen_layers_are_not_written():
    some = model()
    optimizer = sgd(some.parameters(), weight_decay=0.1)
    convert_frozen_batchnorm(some)
    written = layers("PBN305", some, optimizer)
    before = some[1].weight.clone()
    some(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert (written == ()) == torch.equal(some[1].weight, before)
    assert written == ()
