"""UpdateReport: what it says is true, readable, and ready for JSON and for a picture."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from precisebn import LayerReport, UpdateReport, update_bn_stats

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(4, 14)]


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    model.add_module("own", nn.BatchNorm2d(5, track_running_stats=False))
    return model


def test_counts(model):
    report = update_bn_stats(model, BATCHES, None)
    samples = sum(map(len, BATCHES))
    assert (report.num_iters, report.num_samples, report.world_size) == (10, samples, 1)
    assert (report.estimator, report.tolerance, report.converged) == ("population", None, None)
    assert [(r.name, r.num_channels, r.num_batches, r.count) for r in report.layers] == [
        ("0", 3, 10, samples * 36),
        ("2", 5, 10, samples * 16),
    ]
    assert list(report.skipped) == ["own"]


def test_drift_is_the_distance_of_the_old_statistics_from_the_new():
    bn = nn.BatchNorm2d(3)
    old_mean, old_var = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 1.0, 4.0])
    bn.running_mean.copy_(old_mean)
    bn.running_var.copy_(old_var)
    layer = update_bn_stats(bn, BATCHES, None).layers[0]
    var = bn.running_var.double().numpy() + bn.eps
    mean_drift = np.abs(old_mean.numpy() - bn.running_mean.double().numpy()) / np.sqrt(var)
    var_drift = np.log((old_var.double().numpy() + bn.eps) / var)
    assert layer.mean_drift == pytest.approx(np.sqrt(np.mean(mean_drift**2)), rel=1e-5)
    assert layer.max_mean_drift == pytest.approx(mean_drift.max(), rel=1e-5)
    assert layer.var_drift == pytest.approx(np.sqrt(np.mean(var_drift**2)), rel=1e-5)


def test_recalibrating_again_on_the_same_data_drifts_no_more(model):
    update_bn_stats(model, BATCHES, None)
    for layer in update_bn_stats(model, BATCHES, None).layers:
        assert layer.max_mean_drift < 1e-6
        assert layer.var_drift < 1e-6


def test_max_error_is_the_largest_of_all_layers_and_unknown_below_eight_mini_batches(model):
    report = update_bn_stats(model, BATCHES, None)
    assert report.max_error == max(max(layer.mean_error, layer.var_error) for layer in report.layers) > 0
    assert math.isnan(update_bn_stats(model, BATCHES, 7).max_error)
    assert not math.isnan(update_bn_stats(model, BATCHES, 8).max_error)


def test_str_is_a_table_with_a_line_for_every_layer(model):
    report = update_bn_stats(model, BATCHES, None, tolerance=10.0)
    lines = str(report).splitlines()
    assert "2 BatchNorm layers" in lines[0]
    assert f"{report.num_samples} samples in 8 mini-batches" in lines[0]
    assert lines[1].split()[:2] == ["layer", "count"]
    for line, layer in zip(lines[2:4], report.layers, strict=True):
        assert line.split()[:2] == [layer.name, str(layer.count)]
    assert len({len(line) for line in lines[1:4]}) == 1  # columns are aligned
    assert any(line.startswith("own: left alone") for line in lines)
    assert "tolerance 10 reached" in lines[-1]


def test_to_dict_is_ready_for_json_and_complete(model):
    model[0].running_var.fill_(math.inf)
    report = update_bn_stats(model, BATCHES, 3)
    as_dict = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(as_dict) == {field.name for field in dataclasses.fields(UpdateReport)}
    assert set(as_dict["layers"][0]) == {field.name for field in dataclasses.fields(LayerReport)}
    assert as_dict["layers"][1]["count"] == report.layers[1].count
    assert as_dict["layers"][0]["mean_error"] is None  # NaN: too few mini-batches
    assert as_dict["layers"][0]["var_drift"] is None  # infinite


@pytest.mark.parametrize("num_iters", [3, 10], ids=["errors unknown", "errors known"])
def test_plot_draws_a_picture(tmp_path, model, num_iters):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "drift.png"
    update_bn_stats(model, BATCHES, num_iters).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


def test_plot_of_nothing_is_an_empty_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.warns(UserWarning, match="no BatchNorm layer"):
        report = update_bn_stats(nn.ReLU(), BATCHES, 3)
    report.plot(tmp_path / "drift.svg")
    assert "<svg" in (tmp_path / "drift.svg").read_text()


def test_a_report_cannot_be_changed(model):
    report = update_bn_stats(model, BATCHES, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.num_iters = 5
