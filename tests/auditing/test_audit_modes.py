"""Checks of modes: each finds the mistake, and is quiet where it is nearly made."""

from torch import nn

from precisebn import freeze
from precisebn.auditing.run import audit


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


def codes(model: nn.Module) -> list[str]:
    return [finding.code for finding in audit(model)]


def test_frozen_parameters_with_live_statistics():
    encoder = model()
    encoder[:2].requires_grad_(False)
    [finding] = [one for one in audit(encoder) if one.code == "PBN101"]
    assert finding.layers == ("1",)


def test_frozen_parameters_and_statistics_are_fine():
    assert "PBN101" not in codes(freeze(model(), "0", "1").train())
