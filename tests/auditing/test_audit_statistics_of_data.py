"""Checks of running statistics against data: drift, train and eval that disagree, averages of weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from precisebn import freeze, update_bn_stats
from precisebn.auditing.finding import Finding
from precisebn.auditing.norms import is_fresh
from precisebn.auditing.run import audit


def of(code: str, model: nn.Module, batch=None, **arguments) -> list[Finding]:
    report = audit(model, batch, **arguments)
    assert code not in report.not_run, report.not_run[code]
    return [finding for finding in report if finding.code == code]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def data(shift=0.0, number=10) -> list[torch.Tensor]:
    return [torch.randn(16, 3, 12, 12) + shift for _ in range(number)]


def trained() -> nn.Sequential:
    """With the statistics of the data, exactly."""
    model = net()
    update_bn_stats(model, data(number=40), None)
    model[1].num_batches_tracked.fill_(1000)
    model[4].num_batches_tracked.fill_(1000)
    return model


@pytest.mark.parametrize("by", ["batch", "loader"])
def test_running_statistics_far_from_the_data(by):
    given = {"batch": data(2.0)[0]} if by == "batch" else {"loader": data(2.0)}
    [finding] = of("PBN251", trained(), **given)
    assert (finding.severity, finding.layers[0]) == ("warning", "1")
    assert of("PBN251", trained(), **({"batch": data()[0]} if by == "batch" else {"loader": data()})) == []


@pytest.mark.parametrize("by", ["batch", "loader"])
def test_frozen_statistics_that_are_far_may_be_meant(by):
    """Those of a backbone that was trained on other data; a recalibration on the loader leaves them alone."""
    given = {"batch": data(2.0)[0]} if by == "batch" else {"loader": data(2.0)}
    [finding] = of("PBN251", freeze(trained()), **given)
    assert (finding.severity, finding.layers[0]) == ("note", "1")
    live, held = of("PBN251", freeze(trained(), "0", "1"), **given)  # layer 4 gets what layer 1 does not mend
    assert (live.severity, live.layers, held.severity, held.layers) == ("warning", ("4",), "note", ("1",))


def test_variances_that_are_far():
    model = trained()
    model[4].running_var.mul_(4)
    [finding] = of("PBN251", model, data()[0])
    assert finding.layers == ("4",)
    assert abs(float(finding.what.split("and ")[1].split()[0]) - 1.39) < 0.1  # log(4)


def test_a_small_batch_is_no_proof():
    """Of two samples the statistics may be far off by chance."""
    model = nn.Sequential(nn.BatchNorm1d(64))
    update_bn_stats(model, [torch.randn(64, 64) for _ in range(40)], None)
    model[0].num_batches_tracked.fill_(1000)
    for _ in range(5):
        assert of("PBN251", model, torch.randn(3, 64)) == []


def test_a_fresh_model_is_far_from_everything_and_that_is_no_fault():
    assert of("PBN251", net(), data(2.0)[0]) == []
    assert of("PBN252", net(), data(2.0)[0]) == []


def _recalibrated(model: nn.Module, loader: list[torch.Tensor]) -> None:
    update_bn_stats(model, loader, None)


def _averaged(model: nn.Module, loader: list[torch.Tensor]) -> None:
    update_bn(loader, model)


@pytest.mark.parametrize("number", [1, 10])
@pytest.mark.parametrize("measure", [_recalibrated, _averaged])
def test_statistics_measured_on_few_mini_batches_are_not_those_of_a_fresh_model(measure, number):
    """They count one mini-batch or ten, of which a moving average would hold its initial values still."""
    model = net()
    measure(model, data(number=number))
    assert of("PBN251", model, data()[0]) == of("PBN252", model, data()[0]) == []
    [finding] = of("PBN251", model, data(2.0)[0])
    assert (finding.severity, finding.layers[0]) == ("warning", "1")
    with torch.no_grad():  # the weights train on, and the statistics stay behind
        model[3].weight.mul_(3)
        model[3].bias.add_(3)
    [finding] = of("PBN252", model.eval(), data()[0])
    assert (finding.severity, finding.layers) == ("warning", ("4",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_a_model_in_its_first_steps_is_fresh_whatever_its_data(spread, dtype):
    """Of no variance at all its part of the initial variance is all there is."""
    layer = nn.BatchNorm1d(4).to(dtype).train()
    for steps in range(1, 40):
        layer(spread * torch.randn(8, 4, dtype=dtype) + 5)
        # 0.9^28 is 0.052; behind it the initial values count as forgotten.
        assert is_fresh(layer) == (steps <= 28), steps


def test_where_train_and_eval_begin_to_disagree():
    model = trained()
    model[4].running_mean.add_(3 * model[4].running_var.sqrt())
    [finding] = of("PBN252", model, data()[0])
    assert (finding.severity, finding.layers) == ("warning", ("4",))
    assert "begin to differ at '4'" in finding.what


def test_a_fault_in_an_early_layer_is_told_as_the_start():
    model = trained()
    model[1].running_var.div_(9)
    [finding] = of("PBN252", model, data()[0])
    assert finding.layers == ("1",)  # what comes of it in layer 4 is no fault of layer 4


def test_dropout_is_no_disagreement():
    model = trained()
    x = data()[0]
    assert not torch.allclose(model(x), model.eval()(x), rtol=0.2)
    assert of("PBN252", model.train(), x) == []


def test_frozen_layers_do_the_same_in_both_modes():
    model = trained()
    model[4].running_mean.add_(3)
    assert of("PBN252", freeze(model, "4"), data()[0]) == []


def moved(model: nn.Module) -> nn.Module:
    """Another model, far away: the average of such has smaller variances than any of them."""
    model[0].reset_parameters()
    model[3].reset_parameters()
    update_bn_stats(model, data(number=20), None)
    return model


def averaged(**arguments) -> tuple[AveragedModel, nn.Module]:
    model = trained()
    average = AveragedModel(model, **arguments)
    for _ in range(3):
        average.update_parameters(moved(model))
    return average, model


def test_statistics_that_averaging_has_left_behind():
    average, model = averaged()
    [finding] = of("PBN721", average)
    assert (finding.severity, finding.layers) == ("note", ("1", "4"))
    [finding] = of("PBN721", average, other=model)  # they are those of the last model, which is here
    assert finding.severity == "warning"
    assert of("PBN721", averaged(use_buffers=True)[0]) == []
    assert of("PBN721", AveragedModel(trained())) == []


@pytest.mark.parametrize("arguments", [{}, {"use_buffers": True}], ids=["left behind", "averaged"])
def test_statistics_that_are_not_those_of_averaged_weights(arguments):
    average, _ = averaged(**arguments)
    loader = data()
    [finding] = of("PBN722", average, loader=loader)
    assert finding.severity == "warning"
    update_bn(data(number=20), average)
    assert of("PBN722", average, loader=loader) == []
    assert of("PBN721", average, loader=loader) == []  # measured, and not guessed
    assert of("PBN251", average, loader=loader) == []  # said once


def test_averages_of_timm(timm):
    from timm.utils import ModelEmaV2, ModelEmaV3

    for kind in (ModelEmaV2, ModelEmaV3):
        model = trained()
        average = kind(copy.deepcopy(model), decay=0.5)
        for _ in range(3):
            average.update(moved(model))
        assert of("PBN722", average, loader=data())
        update_bn_stats(average, data(number=20), None, modules="all")
        assert of("PBN722", average, loader=data()) == []
        assert of("PBN102", average) == []  # the wrapper is made in training mode, the average is in eval mode
        average.module[1].train()
        assert of("PBN103", average)


def test_an_average_over_steps_that_are_near_is_right():
    model = trained()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.mul_(1.001)
        average.update_parameters(model)
    assert of("PBN722", average, loader=data()) == []


def test_too_few_mini_batches_for_standard_errors():
    average, _ = averaged()
    report = audit(average, loader=data(number=3))
    assert "standard errors take 8" in report.not_run["PBN722"]
    assert "PBN721" in report  # which then is all that can be said
