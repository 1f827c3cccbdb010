"""Checks of gradients: where they are cut, and where they only seem to be."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit

CODES = ("PBN351", "PBN352", "PBN353", "PBN354")


class Net(nn.Module):
    """Three layers, with something between the second and the third."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, x):
        return self.three(self.between(self, self.one(x)))


def gradient_findings(model: nn.Module, batch=None, **arguments) -> list[Finding]:
    report = audit(model, torch.randn(4, 4) if batch is None else batch, **arguments)
    assert not set(CODES) & report.not_run.keys()
    return [finding for finding in report if finding.code in CODES]


def under_no_grad(net, x):
    with torch.no_grad():
        return net.two(x)


def under_no_grad_before(net, x):
    with torch.no_grad():
        y = x * 2
    return net.two(y)


def under_inference_mode(net, x):
    with torch.inference_mode():
        y = net.two(x)
    return y.clone()


def by_reentrant_checkpoint(net, x):
    return checkpoint(net.two, x.detach(), use_reentrant=True)


def by_values_in_a_buffer(net, x):
    buffer = torch.zeros(4, 4)
    with torch.no_grad():
        buffer[:] = x
    return net.two(buffer)


def by_a_leaf_of_its_own(net, x):
    return net.two(x.detach().requires_grad_())


def by_argmax(net, x):
    return net.two(nn.functional.one_hot(x.argmax(1), 4).float())


CUTS = {
    "no_grad around a middle layer": (under_no_grad, {"one", "two"}, "three", "no_grad"),
    "no_grad before it": (under_no_grad_before, {"one"}, "two", "no_grad"),
    "inference mode": (under_inference_mode, {"one", "two"}, "", "inference_mode"),
    "detach": (lambda net, x: net.two(x.detach()), {"one"}, "two", "detach()"),
    ".data": (lambda net, x: net.two(x.data), {"one"}, "two", ".data"),
    ".data of a weight": (lambda net, x: nn.functional.linear(x, net.two.weight.data), {"two"}, "", ".data"),
    "a tensor rebuilt": (lambda net, x: net.two(torch.tensor(x)), {"one"}, "two", "tensor()"),
    "values in a buffer": (by_values_in_a_buffer, {"one"}, "two", "no_grad"),
    "a leaf of its own": (by_a_leaf_of_its_own, {"one"}, "two", "detach()"),
    "argmax": (by_argmax, {"one"}, "", "argmax()"),
    "a checkpoint of nothing that has a gradient": (by_reentrant_checkpoint, {"one", "two"}, "", ""),
}


@pytest.mark.filterwarnings(
    "ignore:.*requires_grad=True. Gradients will be None", "ignore:To copy construct from a tensor"
)
@pytest.mark.parametrize(("between", "layers", "behind", "how"), CUTS.values(), ids=CUTS)
def test_a_cut_is_found_with_the_first_module_behind_it(between, layers, behind, how):
    found = gradient_findings(Net(between))
    cut = [finding for finding in found if finding.code == "PBN351"]
    assert {finding.severity for finding in cut} == {"error"}
    names = {name for finding in cut for name in finding.layers}
    assert layers <= {name.split(".")[0] for name in names}
    assert "three.weight" not in names
    told = cut[0].what
    assert how in told
    assert behind == "" or f"module '{behind}' is the first behind" in told
    assert not how or "test_audit_gradients.py:" in told


def test_a_model_that_is_cut_off_as_a_whole():
    class Whole(Net):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    [finding] = gradient_findings(Whole(lambda net, x: net.two(x)))
    assert (finding.code, len(finding.layers)) == ("PBN351", 6)


def straight_through(net, x):
    y = net.two(x)
    return y + (y.round() - y).detach()


def logged(net, x):
    net.log = x.detach().mean(), float(x.detach().sum()), x.argmax(1)
    return net.two(x)


def masked(net, x):
    return net.two(x) * (x > 0)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 + 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


NO_CUTS = {
    "nothing": lambda net, x: net.two(x),
    "detached for a log": logged,
    "a mask": masked,
    "straight-through": straight_through,
    "an autograd.Function": lambda net, x: net.two(Doubled.apply(x)),
    "a checkpoint": lambda net, x: checkpoint(net.two, x, use_reentrant=False),
    "a reentrant checkpoint": lambda net, x: checkpoint(net.two, x, use_reentrant=True),
    "in place": lambda net, x: net.two(x).mul_(2),
    "detached once of two ways": lambda net, x: net.two(x) + net.two(x.detach()),
}


@pytest.mark.parametrize("between", NO_CUTS.values(), ids=NO_CUTS)
def test_what_nearly_is_a_cut(between):
    assert gradient_findings(Net(between)) == []


def test_a_frozen_backbone_under_no_grad_is_no_mistake():
    net = Net(under_no_grad)
    net.one.requires_grad_(False)
    net.two.requires_grad_(False)
    assert gradient_findings(net) == []


def test_values_that_leave_torch():
    found = gradient_findings(Net(lambda net, x: net.two(torch.tensor(x.tolist()))))
    assert [(finding.code, finding.layers) for finding in found] == [("PBN352", ("one.weight", "one.bias"))]
    assert "tolist()" in found[0].what
    assert gradient_findings(Net(logged)) == []  # a log only


def test_parameters_that_are_not_used_are_a_note():
    [finding] = gradient_findings(Net(lambda net, x: x))
    assert (finding.code, finding.severity, finding.layers) == ("PBN354", "note", ("two.weight", "two.bias"))
    net = Net(lambda net, x: x)
    net.two.requires_grad_(False)
    assert gradient_findings(net) == []


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return {"main": self.main(x), "aux": self.aux(x)}


def test_parameters_beside_the_loss_are_a_note():
    [finding] = gradient_findings(TwoHeads(), loss=lambda output, batch: output["main"].sum())
    assert (finding.code, finding.severity, finding.layers) == ("PBN353", "note", ("aux.weight", "aux.bias"))
    assert gradient_findings(TwoHeads(), loss=lambda output, batch: (output["main"] + output["aux"]).sum()) == []
    assert gradient_findings(TwoHeads()) == []  # by default all that comes out counts


def test_the_outputs_own_loss_counts():
    class WithLoss(TwoHeads):
        def forward(self, x):
            return {"loss": self.main(x).sum(), "aux": self.aux(x)}

    [finding] = gradient_findings(WithLoss())
    assert finding.layers == ("aux.weight", "aux.bias")


def test_the_loss_gets_the_mini_batch_on_the_models_device():
    """From a loader it comes on the CPU."""
    devices = []

    def loss(output, batch):
        devices.append(batch[1].device.type)
        return nn.functional.cross_entropy(output["main"], batch[1])

    gradient_findings(TwoHeads().to("meta"), (torch.randn(4, 4), torch.zeros(4).long()), loss=loss)
    assert devices == ["meta"]


@pytest.mark.parametrize("recurrent", [nn.LSTM(4, 4), nn.GRU(4, 4)], ids=["LSTM", "GRU"])
def test_recurrent_layers_are_followed(recurrent):
    assert gradient_findings(recurrent) == []


def test_what_cannot_be_looked_at_says_what_to_pass():
    def broken(output, batch):
        raise ValueError("no labels")

    report = audit(Net(lambda net, x: x), torch.randn(4, 4), loss=broken)
    assert "no labels; pass loss=" in report.not_run["PBN351"]
    report = audit(Net(lambda net, x: x), torch.randn(4, 5))
    assert "pass forward=" in report.not_run["PBN351"]
    assert "needs batch=" in audit(nn.BatchNorm1d(3)).not_run["PBN351"]
    report = audit(nn.BatchNorm1d(4, affine=False), torch.randn(4, 4))
    assert "no trainable parameter" in report.not_run["PBN351"]


@pytest.mark.parametrize(
    ("out_of_torch", "how"),
    [
        (lambda x: torch.from_numpy(x.detach().numpy()), "numpy()"),
        (lambda x: torch.tensor(x.tolist()), "tolist()"),
    ],
)
def test_a_module_whose_last_act_is_to_leave_torch_is_named_with_its_line(out_of_torch, how):
    class Leaves(nn.Linear):
        def forward(self, x):
            return out_of_torch(super().forward(x))

    model = nn.Sequential(nn.Linear(4, 4), Leaves(4, 4), nn.Linear(4, 4))
    [finding] = gradient_findings(model)
    assert (finding.code, finding.severity) == ("PBN351", "error")
    assert f"{how} in module '1' (test_audit_gradients.py:" in finding.what
    assert "module '2' is the first behind" in finding.what


def test_what_no_given_optimizer_steps_may_be_cut_off():
    """A generator in its discriminator's step; a backbone under no_grad whose head alone is trained."""
    model = Net(under_no_grad_before)
    [finding] = gradient_findings(model, optimizer=torch.optim.SGD(model.three.parameters(), lr=0.1))
    assert (finding.severity, finding.layers) == ("note", ("one.weight", "one.bias"))
    held = torch.optim.SGD([model.one.weight, *model.three.parameters()], lr=0.1)
    found = {finding.layers: finding.severity for finding in gradient_findings(model, optimizer=held)}
    assert found == {("one.weight",): "error", ("one.bias",): "note"}
