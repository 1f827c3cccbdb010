"""Checks of layers and their precision: each finds the mistake, and is quiet where it is nearly made."""

import pytest
import torch
from torch import fx, nn

from precisebn import convert_frozen_batchnorm, freeze
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit
from precisebn.nn import GhostBN

pytestmark = pytest.mark.usefixtures("one_thread")


def found(code: str, model: nn.Module) -> tuple[Finding, ...]:
    return audit(model, only=code)[code]


def layers(code: str, model: nn.Module) -> tuple[str, ...]:
    return tuple(name for one in found(code, model) for name in one.layers)


# ---- PBN601: a bias that BatchNorm takes away again -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), torch.randn(4, 3, 8)),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.randn(4, 3, 8, 8)),
        (nn.ConvTranspose3d(3, 4, 3), nn.BatchNorm3d(4), torch.randn(4, 3, 4, 4, 4)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(8, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wasted_bias(layer, norm, x):
    some = nn.Sequential(layer, norm)
    [finding] = found("PBN601", some)
    assert (finding.layers, finding.severity) == (("0",), "note")
    some(x).pow(3).sum().backward()
    assert layer.bias.grad.abs().max() < 1e-4 * layer.weight.grad.abs().max()  # and so it is


def test_a_wasted_bias_in_a_block_and_before_timms_layer(torchvision, timm):
    block = torchvision.ops.Conv2dNormActivation(3, 4, bias=True)
    assert layers("PBN601", nn.Sequential(block)) == ("0.0",)
    assert layers("PBN601", nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.BatchNorm2d(4))) == ("0",)
    assert layers("PBN601", nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4))) == ("0",)


class Block(nn.Module):
    """What only a graph tells: the first convolution is followed by BatchNorm alone, the second is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv2(self.bn1(self.conv1(x)))
        return y + self.bn2(y)


def test_a_wasted_bias_in_a_graph():
    assert layers("PBN601", Block()) == ()  # whose order is unknown
    assert layers("PBN601", fx.symbolic_trace(Block())) == ("conv1",)


def test_biases_that_do_something():
    conv = nn.Conv2d(4, 4, 1)
    others = {
        "no bias": nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)),
        "something between": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        "a container of its own": nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)]),
        "frozen statistics": freeze(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "1"),
        "a frozen layer": convert_frozen_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))),
        "used twice": nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.ReLU()),
        "not over channels": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)),
        "instance norm": nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True)),
        "what it normalizes is not known": nn.Sequential(nn.Conv2d(3, 4, 1), GhostBN(4, ghost_size=2)),
    }
    assert [name for name, some in others.items() if found("PBN601", some)] == []


# ---- PBN602: half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_in_half_precision(dtype):
    some = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)).to(dtype)
    [finding] = found("PBN602", some)
    assert (finding.severity, finding.layers) == ("warning", ("0", "1"))
    assert f" {torch.finfo(dtype).eps / 2:.2%} of a value" in finding.what
    assert " 0.00%" not in finding.what
    [finding] = found("PBN602", some.eval())
    assert finding.severity == "note"


def test_a_moving_average_in_half_precision_stands_still():
    bn = nn.BatchNorm1d(1, momentum=0.001).to(torch.bfloat16)
    bn.running_mean.fill_(1.0)
    for _ in range(500):
        bn(torch.tensor([[-0.2], [0.2]], dtype=torch.bfloat16))
    assert bn.running_mean == 1.0  # 0.001 is less than half of what bfloat16 tells apart there


def test_half_precision_elsewhere():
    some = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4), nn.BatchNorm2d(4).double())
    assert found("PBN602", some) == ()


# ---- PBN603: eps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "dtype"), [(0.0, torch.float32), (1e-15, torch.float32), (1e-8, torch.float16)])
def test_an_eps_that_is_too_small(eps, dtype):
    assert layers("PBN603", nn.Sequential(nn.BatchNorm2d(4, eps=eps).to(dtype))) == ("0",)


def test_torchvisions_frozen_layer_with_the_eps_of_old(torchvision):
    some = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4, eps=0.0))
    assert layers("PBN603", some) == ("0",)
    some[0].running_var.zero_()
    assert not torch.isfinite(some(torch.zeros(1, 4, 2, 2))).all()  # and so it does


@pytest.mark.parametrize(
    ("eps", "dtype"),
    [
        (1e-5, torch.float32),
        (1e-12, torch.float32),
        (1e-5, torch.float16),
        (1e-5, torch.bfloat16),
        (1e-3, torch.float64),
    ],
)
def test_an_eps_that_does(eps, dtype):
    assert layers("PBN603", nn.Sequential(nn.BatchNorm2d(4, eps=eps).to(dtype))) == ()
