"""UpdateReport: what it says is true, readable, and ready for JSON and for a picture."""

import configparser
import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from precisebn import InsufficientDataError, LayerReport, UpdateReport, adapt_bn_stats, ops, update_bn_stats
from precisebn.nn import DomainSpecificBN, FrozenBatchNorm2d

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


@pytest.mark.parametrize(
    "use",
    [
        lambda report: report,
        lambda report: pickle.loads(pickle.dumps(report)),
        copy.deepcopy,
        copy.copy,
        dataclasses.replace,
    ],
)
def test_layers_are_worked_out_when_somebody_asks_and_tell_of_the_time_of_the_call(model, use):
    twin = copy.deepcopy(model)
    at_once = update_bn_stats(twin, BATCHES, None)
    assert len(at_once.layers) == 2
    later = update_bn_stats(model, BATCHES, None)
    for bn in (model[0], model[2]):
        bn.running_mean.fill_(7)
        bn.running_var.fill_(7)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert use(later) == at_once
    assert later.layers is later.layers
    with pytest.raises(AttributeError, match="layer"):
        _ = later.layer


def test_a_report_that_nobody_reads_keeps_no_model_alive(model):
    seen = weakref.ref(model[0])
    report = update_bn_stats(nn.Sequential(model[0]), BATCHES, None)
    del model[0]
    gc.collect()
    assert seen() is None
    assert report["0"].count == sum(map(len, BATCHES)) * 36


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
    assert "1 layer left alone: no running statistics (track_running_stats=False): own" in lines
    assert any(line.startswith("tolerance 10 reached") for line in lines)


def test_to_dict_is_ready_for_json_and_complete(model):
    model[0].running_var.fill_(math.inf)
    report = update_bn_stats(model, BATCHES, 3)
    as_dict = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(as_dict) == {field.name for field in dataclasses.fields(UpdateReport) if not field.name.startswith("_")}
    assert set(as_dict["layers"][0]) == {field.name for field in dataclasses.fields(LayerReport)}
    assert as_dict["layers"][1]["count"] == report.layers[1].count
    assert as_dict["layers"][0]["mean_error"] is None  # NaN: too few mini-batches
    assert as_dict["layers"][0]["var_drift"] is None  # infinite


def test_to_dict_is_of_plain_values_whatever_numbers_were_given(model):
    report = update_bn_stats(model, BATCHES, np.int64(9), tolerance=np.float32(0.5))
    assert json.loads(json.dumps(report.to_dict()))["tolerance"] == 0.5
    assert type(report.tolerance) is float
    adapted = adapt_bn_stats(model, BATCHES, np.float32(4), tolerance=Fraction(1, 2))
    assert "tolerance 0.5 reached" in str(adapted)
    json.dumps(adapted.to_dict())


# ---- dead channels ------------------------------------------------------------------------------------------------


def dying(eps: float = 1e-5) -> nn.Sequential:
    """A network whose second layer has two constant channels of five, and running means far from these constants."""
    conv, bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=eps)
    with torch.no_grad():
        conv.weight[:2] = 0.0
        conv.bias[:2] = torch.tensor([1.5, -3.0])
    return nn.Sequential(nn.BatchNorm2d(3), conv, bn)


def test_dead_channels_are_counted_and_drown_nothing():
    net, live = dying(), dying()
    live[1] = nn.Conv2d(3, 3, 3)
    live[1].weight.data, live[1].bias.data = net[1].weight[2:].detach(), net[1].bias[2:].detach()
    live[2] = nn.BatchNorm2d(3)
    report, expected = update_bn_stats(net, BATCHES, None), update_bn_stats(live, BATCHES, None)
    assert [layer.dead_channels for layer in report.layers] == [0, 2]
    assert report.dead_channels == 2
    assert report.max_drift == pytest.approx(expected.max_drift, rel=1e-6)
    for what in ("mean_drift", "max_mean_drift", "var_drift", "max_var_drift", "mean_error", "var_error"):
        assert getattr(report["2"], what) == pytest.approx(getattr(expected["2"], what), rel=1e-6), what
    assert "(dead: channels that are constant in the data, 2 of 8; left out of drift and s.e.)" in str(report)
    assert [line.split()[-1] for line in str(report).splitlines()[1:4]] == ["dead", "-", "2"]
    assert "dead" not in str(expected)


def test_what_a_layer_puts_out_of_a_dead_channel_hardly_varies():
    """The criterion is of the output, so it goes with eps: its standard deviation is at most a hundredth."""
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    for eps in (1e-5, 1e-3):
        scale = torch.tensor([1.0, 1.01, 0.99]).view(1, 3, 1, 1) * torch.tensor([1.0, 1e-2, 1e-2]).view(1, 3, 1, 1)
        bn = nn.BatchNorm2d(3, eps=eps, dtype=torch.float64)
        report = update_bn_stats(bn, [x * scale * math.sqrt(eps)] * 2, None)
        std = bn.eval()(x * scale * math.sqrt(eps)).detach().std((0, 2, 3))
        assert report.layers[0].dead_channels == int((std < 0.01).sum()) == 1


def test_a_layer_that_is_dead_altogether_has_no_drift_and_keeps_no_tolerance_from_being_reached():
    net = nn.Sequential(nn.BatchNorm2d(3))
    report = update_bn_stats(net, [torch.full((4, 3, 2, 2), 7.0)] * 9, None, tolerance=0.1)
    (layer,) = report.layers
    assert (layer.dead_channels, layer.mean_drift, layer.max_mean_drift, layer.var_drift) == (3, 0.0, 0.0, 0.0)
    assert (layer.mean_error, layer.var_error, report.converged) == (0.0, 0.0, True)


def test_without_eps_only_a_constant_channel_is_dead():
    x = torch.cat([torch.ones(8, 1, 4, 4), torch.randn(8, 1, 4, 4) * 1e-6], 1)
    layer = update_bn_stats(nn.Sequential(Normless(2)), [x] * 2, None).layers[0]
    assert layer.dead_channels == 1
    assert math.isfinite(layer.max_var_drift)


class Normless(nn.BatchNorm2d):
    """BatchNorm with eps=0 that never divides: some versions of torch refuse eps=0."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        return x


def test_max_var_drift_is_of_the_worst_channel():
    bn = nn.BatchNorm2d(3)
    update_bn_stats(bn, BATCHES, None)
    bn.running_var[1] *= 8
    report = update_bn_stats(bn, BATCHES, None)
    assert report.max_var_drift == pytest.approx(math.log(8), rel=1e-4)  # eps is 1e-5
    assert report.layers[0].var_drift == pytest.approx(math.log(8) / math.sqrt(3), rel=1e-4)
    bn.running_var[2] = math.nan
    assert update_bn_stats(bn, BATCHES, None).max_var_drift == math.inf


# ---- what was left alone, and what was overwritten all the same -----------------------------------------------------


def test_one_of_anything_is_singular():
    report = update_bn_stats(nn.Sequential(nn.BatchNorm1d(2)), [torch.tensor([[1.0, 2.0]])], 1)
    assert str(report).startswith("1 BatchNorm layer, 1 sample in 1 mini-batch, estimator")
    assert repr(report).startswith("<UpdateReport: 1 layer, 1 sample, ")
    with pytest.raises(InsufficientDataError, match="ended after 1 mini-batch;"):
        update_bn_stats(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(4, 2)], 2)


def test_every_layer_of_the_model_is_recalibrated_or_left_alone_with_a_reason(model):
    model.add_module("fixed", nn.BatchNorm2d(5).eval())
    model.add_module("frozen", FrozenBatchNorm2d(5))
    report = update_bn_stats(model, BATCHES, None)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert report.skipped == {
        "own": "no running statistics (track_running_stats=False)",
        "fixed": "eval mode",
        "frozen": "frozen (modules='training' leaves these out; modules='*', or names, to take them)",
    }
    named = update_bn_stats(model, BATCHES, None, modules=["0", "frozen"])
    assert [layer.name for layer in named.layers] == ["0", "frozen"]
    assert set(named.skipped.values()) == {"not chosen by modules="}
    assert list(named.skipped) == ["2", "own", "fixed"]


def test_many_layers_left_alone_take_one_line():
    net = nn.Sequential(nn.BatchNorm2d(3), *[nn.BatchNorm2d(3).eval() for _ in range(44)])
    lines = str(update_bn_stats(net, BATCHES, 2)).splitlines()
    assert [line for line in lines if "alone" in line] == ["44 layers left alone: eval mode: 1, 2, ..., 44"]


def test_layers_overwritten_although_their_parameters_are_frozen_are_listed(model):
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    report = update_bn_stats(model, BATCHES, 2)
    assert report.frozen == ("0",)
    assert "1 layer recalibrated although all its parameters are frozen: 0" in str(report)
    model[0].weight.requires_grad_(True)
    assert update_bn_stats(model, BATCHES, 2).frozen == ()


def test_in_a_model_that_trains_nothing_no_layer_stands_out_as_frozen(model):
    model.requires_grad_(False)  # an average of weights, or a model that is deployed
    report = update_bn_stats(model, BATCHES, 2)
    assert report.frozen == ()
    assert "frozen" not in str(report)


# ---- looking a layer up ---------------------------------------------------------------------------------------------


def test_layers_are_looked_up_by_name(model):
    report = update_bn_stats(model, BATCHES, 2)
    assert report["2"] is report.layers[1]
    assert "2" in report
    assert "own" not in report
    with pytest.raises(TypeError, match="not iterable"):
        iter(report)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stem.own", r"'stem\.own' was left alone: no running statistics"),
        ("bn1", r"no layer 'bn1' was recalibrated; did you mean 'stem\.bn1'\?"),
        ("stem.bnl", r"did you mean 'stem\.bn1'"),
        ("stem", r"did you mean 'stem\.bn1'"),
        ("domains", r"did you mean 'domains\[0\]', 'domains\[1\]'\?"),
        ("x", r"there are stem\.bn1, domains\[0\], domains\[1\]"),
        (0, "by name, not by int"),
    ],
)
def test_a_name_that_is_not_there_names_those_that_come_near(name, message):
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential())
    net.stem.add_module("bn1", nn.BatchNorm2d(3))
    net.stem.add_module("own", nn.BatchNorm2d(3, track_running_stats=False))
    net.add_module("domains", DomainSpecificBN(3, 2))
    report = update_bn_stats(net, BATCHES, 2, forward=lambda model, x: model.domains([model.stem(x), model.stem(x)]))
    with pytest.raises(KeyError, match=message):
        report[name]


# ---- for loggers, and for people ------------------------------------------------------------------------------------


def test_metrics_are_floats_with_names(model):
    report = update_bn_stats(model, BATCHES, None, tolerance=10.0)
    metrics = report.metrics()
    assert metrics == {
        "precisebn/max_drift": report.max_drift,
        "precisebn/max_var_drift": report.max_var_drift,
        "precisebn/max_error": report.max_error,
        "precisebn/dead_channels": 0.0,
        "precisebn/layers": 2.0,
        "precisebn/skipped": 1.0,
        "precisebn/num_iters": 8.0,
        "precisebn/num_samples": float(report.num_samples),
        "precisebn/converged": 1.0,
    }
    assert {type(value) for value in metrics.values()} == {float}
    of_layers = report.metrics("val/bn", per_layer=True)
    assert of_layers["val/bn/mean_drift/2"] == report["2"].mean_drift
    assert len(of_layers) == len(metrics) + 5 * len(report.layers)


def test_metrics_leave_out_what_is_not_known(model):
    metrics = update_bn_stats(model, BATCHES, 3).metrics(per_layer=True)
    assert "precisebn/max_error" not in metrics
    assert "precisebn/mean_error/0" not in metrics
    assert "precisebn/mean_drift/0" in metrics
    assert "precisebn/converged" not in metrics


def test_a_report_shows_as_one_line_and_prints_as_a_table(model):
    report = update_bn_stats(model, BATCHES, 3)
    assert re.fullmatch(r"<UpdateReport: 2 layers, 15 samples, max_drift=.*, max_error=nan>", repr(report))
    assert len(str(report).splitlines()) > 3


def test_mini_batches_on_several_ranks_are_said_to_be_of_this_one(model):
    report = update_bn_stats(model, BATCHES, 4)
    two = dataclasses.replace(report, world_size=2, num_samples=80)
    assert "80 samples on 2 ranks (4 mini-batches on this rank)" in str(two)
    assert "ranks" not in str(report)


def test_the_fallback_is_named_where_it_ran(model):
    report = update_bn_stats(model, BATCHES, 3)
    backend = ops.backend()
    expected = f"cpu: {backend.cpu_detail}" if backend.cpu == "fallback" else ""
    assert report.fallback == expected
    assert ("plain PyTorch ran in the place of kernels" in str(report)) == bool(expected)


@pytest.mark.skipif(ops.backend().cpu == "fallback", reason="there are no kernels to do without")
def test_the_fallback_is_named_where_it_ran_in_another_process():
    code = (
        "import torch, precisebn; print(precisebn.update_bn_stats(torch.nn.BatchNorm1d(2), [torch.rand(4, 2)], None))"
    )
    environment = {**os.environ, "PRECISEBN_BACKEND": "fallback"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert re.search(r"^plain PyTorch ran in the place of kernels: cpu: .*PRECISEBN_BACKEND", printed, re.MULTILINE)


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("progress", [None, True])
def test_a_loader_that_does_not_know_its_length_needs_none(error, progress, capsys):
    class Loader:
        def __iter__(self):
            return iter(BATCHES)

        def __len__(self):
            asked.append(self)
            raise error("no length")

    asked = []
    assert update_bn_stats(nn.BatchNorm2d(3), Loader(), None, progress).num_iters == len(BATCHES)
    assert len(asked) == (1 if progress else 0)


# ---- the picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_iters", [3, 10], ids=["errors unknown", "errors known"])
def test_plot_draws_a_picture(tmp_path, model, num_iters):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "drift.png"
    figure = update_bn_stats(model, BATCHES, num_iters).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000
    assert {text.get_text() for text in figure.legends[0].get_texts()} == (
        {"drift of the old statistics"} | ({"standard error of the new"} if num_iters == 10 else set())
    )


def test_plot_has_a_point_for_every_layer_on_logarithmic_axes(model):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = update_bn_stats(model, BATCHES, None)
    figure = report.plot()
    for axes, what in zip(figure.axes, ("mean", "var"), strict=True):
        assert axes.get_xscale() == "log"
        assert not axes.patches  # no bars, which have no beginning on a logarithmic axis
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "2"]
        drawn = {(x, y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        kinds = (f"{what}_drift", f"{what}_error")
        assert drawn == {(getattr(layer, kind), row) for kind in kinds for row, layer in enumerate(report.layers)}


def test_plot_shows_what_no_logarithmic_axis_holds_at_its_edges(model):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    update_bn_stats(model, BATCHES, None)
    model[2].running_mean.fill_(math.nan)
    report = update_bn_stats(model, BATCHES, None)
    axes = report.plot().axes[0]
    points = {line.get_marker(): list(line.get_xydata()[0]) for line in axes.lines}
    assert points["<"] == [axes.get_xlim()[0], 0]
    assert points[">"] == [axes.get_xlim()[1], 1]


@pytest.mark.parametrize("num_layers", [1, 5, 160])
def test_names_and_points_of_a_plot_do_not_overlap(num_layers):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    net = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(num_layers)])
    figure = update_bn_stats(net, BATCHES, 3).plot()
    FigureCanvasAgg(figure).draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == num_layers
    assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(boxes))
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_plot_of_nothing_is_an_empty_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.warns(UserWarning, match="no BatchNorm layer"):
        report = update_bn_stats(nn.ReLU(), BATCHES, 3)
    report.plot(tmp_path / "drift.svg")
    assert "<svg" in (tmp_path / "drift.svg").read_text()


def test_without_matplotlib_plot_names_the_extra_to_install(model, monkeypatch):
    report = update_bn_stats(model, BATCHES, 3)
    monkeypatch.delitem(sys.modules, "precisebn.recalibration.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*precisebn\[(\w+)\]") as caught:
        report.plot()
    extra = re.search(r"precisebn\[(\w+)\]", str(caught.value))[1]
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    assert "matplotlib" in setup["options.extras_require"][extra].split()


def test_a_report_cannot_be_changed(model):
    report = update_bn_stats(model, BATCHES, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.num_iters = 5
