"""Checks of modes: each finds the mistake, and is quiet where it is nearly made."""

import copy

import pytest
import torch
from torch import nn

from precisebn import convert_batch_stat, convert_frozen_batchnorm, freeze, pause_tracking
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit
from precisebn.nn import CycleBatchNormList, DomainSpecificBN

pytestmark = pytest.mark.usefixtures("one_thread")


def found(code: str, model: nn.Module) -> tuple[Finding, ...]:
    return audit(model, only=code)[code]


def layers(code: str, model: nn.Module) -> tuple[str, ...]:
    return tuple(name for one in found(code, model) for name in one.layers)


def model(**bn) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **bn), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, **bn))


# ---- PBN101: frozen parameters, live running statistics -------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        DomainSpecificBN(4, num_domains=2),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_frozen_parameters_with_live_statistics(norm):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    whole = nn.Sequential(encoder.requires_grad_(False), nn.Conv2d(4, 2, 1))
    [finding] = found("PBN101", whole)
    assert (finding.layers, finding.severity) == (("0.1",), "error")


def test_frozen_parameters_of_timms_layers(timm):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4))
    assert layers("PBN101", nn.Sequential(encoder.requires_grad_(False), nn.Conv2d(4, 2, 1))) == ("0.1",)


def test_frozen_parameters_of_a_lazy_layer_that_has_seen_data():
    whole = nn.Sequential(nn.LazyBatchNorm2d(), nn.Conv2d(3, 2, 1))
    assert layers("PBN101", whole) == ()  # not built yet
    whole(torch.randn(2, 3, 4, 4))
    whole[0].requires_grad_(False)
    assert layers("PBN101", whole) == ("0",)


def test_a_layer_without_affine_in_a_frozen_part_is_frozen_with_it():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).requires_grad_(False)
    assert layers("PBN101", nn.Sequential(encoder, nn.Conv2d(4, 2, 1))) == ("0.1",)


def test_a_cycle_with_frozen_affine():
    whole = nn.Sequential(CycleBatchNormList(2, num_features=4).requires_grad_(False), nn.Conv2d(4, 2, 1))
    assert layers("PBN101", whole) == ("0.0", "0.1")


@pytest.mark.parametrize("affine", [True, False])
def test_layers_whose_surroundings_train_are_not_frozen(affine):
    assert layers("PBN101", model(affine=affine)) == ()


def test_a_layer_of_which_the_bias_alone_is_trained_is_not_frozen():
    some = model()
    some.requires_grad_(False)
    for layer in (some[1], some[3]):
        layer.bias.requires_grad_(True)
    assert layers("PBN101", some) == ()


def test_frozen_parameters_and_statistics_are_fine():
    assert layers("PBN101", freeze(model(), "0", "1").train()) == ()


def test_frozen_batch_norm_is_fine():
    some = convert_frozen_batchnorm(model(), include="1")
    some[0].requires_grad_(False)
    assert layers("PBN101", some) == ()


def test_a_model_that_is_frozen_as_a_whole_may_be_a_teacher():
    [finding] = found("PBN101", model().requires_grad_(False))
    assert finding.severity == "note"
    assert found("PBN101", model().requires_grad_(False).eval()) == ()


# ---- PBN102: BatchNorm in eval mode, which train() will undo --------------------------------------------------------


def test_eval_that_train_will_undo():
    some = model()
    some[1].eval()
    assert layers("PBN102", some) == ("1",)
    assert not some[1].training  # tried out, and put back


def test_eval_of_the_whole_model_is_fine():
    assert layers("PBN102", model().eval()) == ()


def test_eval_that_freeze_holds_is_fine():
    assert layers("PBN102", freeze(model(), "1", affine=True).train()) == ()


def test_eval_that_the_models_own_train_holds_is_fine():
    class NormEval(nn.Sequential):
        """As mmdetection's backbones with norm_eval=True."""

        def train(self, mode=True):
            super().train(mode)
            for part in self.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eval()
            return self

    assert layers("PBN102", NormEval(*model()).train()) == ()


def test_a_train_that_raises_says_so():
    class Broken(nn.Sequential):
        def train(self, mode=True):
            raise RuntimeError("no")

    some = Broken(*model())
    some[1].eval()
    report = audit(some, only="PBN102")
    assert "model.train() raises RuntimeError: no" in report.not_run["PBN102"]


# ---- PBN103: BatchNorm in training mode in a model in eval mode -----------------------------------------------------


def test_batch_norm_left_in_training_mode():
    some = model().eval()
    some[3].train()
    assert layers("PBN103", some) == ("3",)


def test_batch_norm_without_statistics_of_its_own_has_none_to_move():
    some = model(track_running_stats=False).eval()
    some[3].train()
    assert layers("PBN103", some) == ()
    assert layers("PBN103", model()) == ()


# ---- PBN104, PBN105: dropout ----------------------------------------------------------------------------------------


class WithDropouts(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.drop = nn.Dropout(rate)
        self.lstm = nn.LSTM(3, 3, num_layers=2, dropout=rate)
        self.attention = nn.MultiheadAttention(4, 2, dropout=rate)


def test_dropout_left_at_work():
    some = WithDropouts(0.5).eval()
    for part in (some.drop, some.lstm, some.attention):
        part.train()
    assert layers("PBN104", some) == ("drop", "lstm", "attention")


def test_drop_path_left_at_work(timm, torchvision):
    some = nn.Sequential(timm.layers.DropPath(0.1), torchvision.ops.StochasticDepth(0.1, "row"), nn.ReLU())
    some.training = False
    assert layers("PBN104", some) == ("0", "1")


def test_dropout_of_rate_zero_drops_nothing():
    some = WithDropouts(0.0).eval()
    some.drop.train()
    some.lstm.train()
    assert layers("PBN104", some) == ()
    assert layers("PBN105", WithDropouts(0.0).train()) == ()


def test_dropout_switched_off():
    some = WithDropouts(0.5)
    some.drop.eval()
    [finding] = found("PBN105", some)
    assert (finding.layers, finding.severity) == (("drop",), "note")
    assert found("PBN105", WithDropouts(0.5)) == ()


# ---- PBN106, PBN107: without running statistics ---------------------------------------------------------------------


def test_tracking_switched_off_beside_statistics():
    some = model()
    some[1].track_running_stats = False
    assert layers("PBN106", some) == ("1",)


def test_lightnings_freezing_is_found():
    finetuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    some = model()
    finetuning.freeze(some[:2], train_bn=False)
    assert layers("PBN106", some) == ("1",)


def test_tracking_switched_off_from_the_beginning_is_another_thing():
    assert layers("PBN106", model(track_running_stats=False)) == ()
    assert layers("PBN106", nn.Sequential(nn.InstanceNorm2d(4, affine=True))) == ()


def test_tracking_switched_off_in_a_frozen_layer_changes_nothing():
    some = freeze(model(), "1", affine=True)
    some[1].track_running_stats = False
    assert layers("PBN106", some) == ()


def test_no_running_statistics():
    [finding] = found("PBN107", model(track_running_stats=False))
    assert (finding.layers, finding.severity) == (("1", "3"), "note")


def test_running_statistics_and_layers_that_need_none():
    assert found("PBN107", model()) == ()
    assert found("PBN107", nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4))) == ()
    assert found("PBN107", convert_batch_stat(model())) == ()
    assert found("PBN107", convert_batch_stat(model(track_running_stats=False))) == ()  # its remedy


# ---- PBN108, PBN109: left half done ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_a_copy_made_inside_a_pause(norm):
    some = nn.Sequential(norm)
    with pause_tracking(some):
        twin = copy.deepcopy(some)
    [finding] = found("PBN108", twin)
    assert (finding.layers, finding.severity) == (("0",), "error")


def test_a_pause_that_lasts_and_one_that_has_ended():
    some = model()
    with pause_tracking(some, "1"):
        [finding] = found("PBN108", some)
        assert (finding.layers, finding.severity) == (("1",), "note")
        assert layers("PBN106", some) == ()
    assert found("PBN108", some) == ()
    assert found("PBN108", copy.deepcopy(some)) == ()


def test_an_unfinished_cycle():
    cycle = nn.Sequential(CycleBatchNormList(2, num_features=3))
    cycle(torch.randn(2, 3, 4, 4))
    assert layers("PBN109", cycle) == ("0",)
    cycle(torch.randn(2, 3, 4, 4))
    assert layers("PBN109", cycle) == ()
    cycle(torch.randn(2, 3, 4, 4))
    cycle.eval()
    assert layers("PBN109", cycle) == ("0",)
    cycle[0].reset()
    assert layers("PBN109", cycle) == ()
