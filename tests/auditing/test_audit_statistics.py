"""Checks of running statistics: each finds the mistake, and is quiet where it is nearly made."""

import pytest
import torch
from torch import nn

from precisebn import convert_frozen_batchnorm, freeze, update_bn_stats
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit
from precisebn.nn import CycleBatchNormList, DomainSpecificBN

pytestmark = pytest.mark.usefixtures("one_thread")


def found(code: str, model: nn.Module, **given) -> tuple[Finding, ...]:
    return audit(model, only=code, **given)[code]


def layers(code: str, model: nn.Module, **given) -> tuple[str, ...]:
    return tuple(name for one in found(code, model, **given) for name in one.layers)


def model(**bn) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **bn), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, **bn))


def sgd(some: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(some.parameters(), lr=0.1)


# ---- PBN201, PBN202: no numbers, and no variances -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite(buffer, value):
    some = model()
    getattr(some[3], buffer)[2] = value
    assert layers("PBN201", some) == ("3",)


def test_one_domain_that_is_not_finite():
    some = nn.Sequential(DomainSpecificBN(4, num_domains=3))
    some[0].running_mean[1, 0] = float("nan")
    assert layers("PBN201", some) == ("0[1]",)


def test_frozen_layers_of_any_library_are_looked_at(torchvision, timm):
    some = nn.Sequential(
        convert_frozen_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))[0],
        torchvision.ops.FrozenBatchNorm2d(4),
        timm.layers.FrozenBatchNormAct2d(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    )
    assert layers("PBN201", some) == layers("PBN202", some) == ()
    for layer in some:
        layer.running_mean[0] = float("nan")
        layer.running_var[0] = -1
    assert layers("PBN201", some) == layers("PBN202", some) == ("0", "1", "2", "3")


def test_frozen_layers_without_eps(timm):
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    some = nn.Sequential(detr.DetrFrozenBatchNorm2d(4))
    assert not audit(some, only="PBN201").findings
    some[0].running_var[0] = float("inf")
    assert layers("PBN201", some) == ("0",)


def test_large_and_tiny_numbers_are_numbers():
    some = model()
    some[1].running_mean.fill_(1e38)
    some[1].running_var.fill_(0)
    assert layers("PBN201", some) == layers("PBN202", some) == ()


def test_negative_variances():
    some = model()
    some[1].running_var[0] = -1e-7
    assert layers("PBN202", some) == ("1",)


def test_layers_without_values_yet():
    some = nn.Sequential(nn.LazyBatchNorm2d(), nn.BatchNorm2d(4, device="meta"), nn.BatchNorm2d(4, momentum=None))
    assert audit(some, only="PBN2*", num_steps=1000)["PBN201"] == ()


# ---- PBN203, PBN204: never measured ---------------------------------------------------------------------------------


def test_a_new_model_is_noted():
    [finding] = found("PBN203", model())
    assert (finding.severity, finding.layers) == ("note", ("1", "3"))


def test_a_model_that_was_trained_in_eval_mode():
    some = model().eval()
    optimizer = torch.optim.Adam(some.parameters())
    assert found("PBN203", some, optimizer=optimizer)[0].severity == "note"  # not a step yet
    some(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    [finding] = found("PBN203", some, optimizer=optimizer)
    assert (finding.severity, finding.layers) == ("warning", ("1", "3"))


def test_layers_that_a_checkpoint_left_out():
    some = model()
    update_bn_stats(some, [torch.randn(4, 3, 8, 8)] * 2, None)
    assert found("PBN203", some) == ()
    some[3].reset_running_stats()
    [finding] = found("PBN203", some)
    assert (finding.severity, finding.layers) == ("warning", ("3",))


def test_statistics_that_have_one_initial_value_are_measured():
    some = model()
    some[1].running_mean.fill_(0.1)  # and the variance is 1 still
    some[3].running_var.fill_(0.9)
    assert found("PBN203", some) == ()


def test_a_domain_that_was_never_seen():
    some = nn.Sequential(DomainSpecificBN(4, num_domains=3))
    assert found("PBN204", some) == ()  # new
    some[0](torch.randn(8, 4, 2, 2), domain=1)
    assert layers("PBN204", some) == ("0[0]", "0[2]")
    assert found("PBN203", some) == ()
    some[0](torch.randn(8, 4, 2, 2), domain=0)
    some[0](torch.randn(8, 4, 2, 2), domain=2)
    assert found("PBN204", some) == ()


def test_a_call_of_a_cycle_that_was_never_made():
    some = nn.Sequential(CycleBatchNormList(2, num_features=3))
    some(torch.randn(2, 3, 4, 4))
    assert layers("PBN203", some) == ("0.1",)


# ---- PBN205: a cumulative average that starts over ------------------------------------------------------------------


def test_a_cumulative_average_that_starts_over():
    some = model(momentum=None)
    some[1].running_mean.fill_(3.0)  # loaded from where nothing was counted
    assert layers("PBN205", some) == ("1",)
    some.train()(torch.randn(4, 3, 8, 8))
    assert not torch.any(some[1].running_mean == 3.0)  # and so it is


def test_cumulative_averages_that_go_on_or_begin():
    some = model(momentum=None)
    assert layers("PBN205", some) == ()
    some[1].running_mean.fill_(3.0)
    some[1].num_batches_tracked.fill_(100)
    assert layers("PBN205", some) == ()
    loaded = model()
    loaded[1].running_mean.fill_(3.0)
    assert layers("PBN205", loaded) == ()


# ---- PBN206, PBN207: momentum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "severity"), [(0.0, "warning"), (0.99, "warning"), (1.0, "warning"), (1.5, "error")]
)
def test_a_momentum_that_averages_nothing(momentum, severity):
    some = model(momentum=momentum)
    [finding] = found("PBN206", some, optimizer=sgd(some))
    assert (finding.severity, finding.layers) == (severity, ("1", "3"))


def test_a_momentum_matters_in_training_alone():
    assert found("PBN206", model(momentum=0.99))[0].severity == "note"
    assert found("PBN206", model(momentum=0.99), num_steps=10)[0].severity == "warning"


@pytest.mark.parametrize("momentum", [0.5, 0.1, 0.01, 0.0003, None])
def test_a_momentum_that_averages(momentum):
    some = model(momentum=momentum)
    assert found("PBN206", some, optimizer=sgd(some)) == ()


def test_the_momentum_of_a_layer_that_stands_still():
    some = model(momentum=0.0)
    some[1].eval()
    assert layers("PBN206", freeze(some, "3", affine=True)) == ()


def test_a_momentum_as_noisy_as_it_is_said_to_be():
    """The variance of a moving average over that of one mini-batch is m / (2 - m)."""
    momentum = 0.8
    bn = nn.BatchNorm1d(20_000, momentum=momentum)
    for _ in range(20):
        bn(torch.randn(2, 20_000))
    noise = bn.running_mean.var() / (1 / 2)  # of the mean of 2 samples
    assert float(noise) == pytest.approx(momentum / (2 - momentum), rel=0.05)  # of 20,000: 5 standard errors
    assert "1.5 mini-batches" in found("PBN206", nn.Sequential(bn))[0].what


@pytest.mark.parametrize(("momentum", "steps"), [(0.1, 21), (0.01, 229), (0.0003, 7600)])
def test_too_few_steps_to_forget(momentum, steps):
    """0.9 ** 21 and 0.99 ** 229 are just above a tenth, one step more is not."""
    some = model(momentum=momentum)
    assert layers("PBN207", some, num_steps=steps) == ("1", "3")
    assert layers("PBN207", some, num_steps=round(steps * 1.05)) == ()


def test_the_momentum_that_is_named_is_enough():
    [finding] = found("PBN207", model(momentum=0.001), num_steps=1000)
    assert "37% of what they began with" in finding.what
    assert "layer.momentum = 0.003 or more" in finding.remedy
    assert found("PBN207", model(momentum=0.003), num_steps=1000) == ()


def test_a_cumulative_average_over_a_training_is_noted():
    [finding] = found("PBN207", model(momentum=None), num_steps=1000)
    assert finding.severity == "note"
