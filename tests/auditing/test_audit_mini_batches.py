"""Checks of normalization batches and of calls: the fault, and what nearly is one."""

import pytest
import torch
from torch import nn

from precisebn import convert_cycle, convert_ghost, freeze
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit


def of(code: str, model: nn.Module, batch, **arguments) -> list[Finding]:
    report = audit(model, batch, **arguments)
    assert code not in report.not_run
    return [finding for finding in report if finding.code == code]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))


class Head(nn.Module):
    """A head over levels, whose values differ by some scale from level to level."""

    def __init__(self, scale, times=3):
        super().__init__()
        self.norm, self.scale, self.times = nn.BatchNorm2d(4), scale, times

    def forward(self, x):
        return [self.norm(x * self.scale**level) for level in range(self.times)]


def test_a_population_shared_by_levels_that_differ():
    [finding] = of("PBN401", Head(2.0), torch.randn(8, 4, 8, 8))
    assert (finding.severity, finding.layers) == ("warning", ("norm",))
    assert "called 3 times" in finding.what
    assert "length=3" in finding.remedy
    assert abs(float(finding.what.split("and ")[1].split()[0]) - 2.77) < 0.1  # log(16), of variances


def test_means_that_differ():
    class Shifted(Head):
        def forward(self, x):
            return self.norm(x) + self.norm(x + 2)

    [finding] = of("PBN401", Shifted(1.0), torch.randn(8, 4, 8, 8))
    assert finding.severity == "warning"
    assert abs(float(finding.what.split("up to ")[1].split()[0]) - 2) < 0.1


def test_levels_of_one_distribution_are_a_note():
    [finding] = of("PBN401", Head(1.0), torch.randn(8, 4, 8, 8))
    assert finding.severity == "note"


@pytest.mark.parametrize("model", [Head(2.0, times=1), convert_cycle(Head(2.0), 3), freeze(Head(2.0))])
def test_one_call_or_one_for_each_level_or_frozen(model):
    assert of("PBN401", model, torch.randn(8, 4, 8, 8)) == []


def test_a_normalization_batch_that_is_too_small_counts_its_pixels():
    [finding] = of("PBN411", net(), torch.randn(3, 3, 16, 16))
    assert (finding.severity, finding.layers) == ("warning", ("4",))  # 3 pooled values; layer 1 has 3 x 196
    assert "3 samples of 1 value each" in finding.what


def test_pixels_that_are_all_alike_count_for_one():
    flat = torch.randn(3, 3, 1, 1).expand(3, 3, 16, 16)
    [finding] = of("PBN411", net(), flat)
    assert finding.layers == ("1", "4")


def test_a_mini_batch_of_eight_is_a_note_at_most():
    [finding] = of("PBN411", net(), torch.randn(8, 3, 16, 16))
    assert finding.severity == "note"
    assert of("PBN411", net(), torch.randn(32, 3, 16, 16)) == []


def test_the_error_is_that_of_the_means():
    """1 / sqrt(N - 1), for N samples of one value, in the standard deviations of the sample."""
    [finding] = of("PBN411", nn.Sequential(nn.BatchNorm1d(2000)), torch.randn(10, 2000))
    assert "up to 0.33 standard deviations" in finding.what
    means = torch.randn(100_000, 10).mean(1)  # 1 / sqrt(N), in those of the data
    assert abs(0.33 * (9 / 10) ** 0.5 - float(means.std())) < 0.01


def test_frozen_layers_need_no_batch():
    assert of("PBN411", freeze(net(), "4"), torch.randn(3, 3, 16, 16)) == []


def test_one_sample():
    stem = nn.Sequential(*net()[:3])
    [finding] = of("PBN412", stem, torch.randn(1, 3, 16, 16))
    assert finding.layers == ("1",)
    assert of("PBN412", stem, torch.randn(2, 3, 16, 16)) == []
    assert of("PBN412", freeze(stem), torch.randn(1, 3, 16, 16)) == []


def test_ghost_batches_of_one_sample():
    assert of("PBN412", convert_ghost(nn.Sequential(*net()[:3]), ghost_size=1), torch.randn(8, 3, 16, 16))
    assert of("PBN412", convert_ghost(nn.Sequential(*net()[:3]), ghost_size=4), torch.randn(8, 3, 16, 16)) == []


def test_one_value_per_channel_is_an_error_although_the_forward_raises():
    report = audit(net(), torch.randn(1, 3, 16, 16))
    [finding] = [one for one in report if one.code == "PBN413"]
    assert (finding.severity, finding.layers) == ("error", ("4",))
    assert "Expected more than 1 value" in report.not_run["PBN401"]
    assert of("PBN413", net(), torch.randn(2, 3, 16, 16)) == []


def test_layers_in_eval_mode_are_looked_at_as_they_train():
    """A model that has just been loaded is in eval mode throughout; one that is so in part means it."""
    assert of("PBN411", net().eval(), torch.randn(3, 3, 16, 16))
    partly = net()
    partly[4].eval()
    assert of("PBN411", partly, torch.randn(3, 3, 16, 16)) == []


class Regions(nn.Module):
    """A head over 16 regions of every image, as of R-CNN."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.head(x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))


def test_regions_of_one_image():
    [finding] = of("PBN713", Regions(), torch.randn(1, 3, 32, 32))
    assert finding.layers == ("head.1",)
    assert of("PBN713", Regions(), torch.randn(2, 3, 32, 32)) == []
    assert of("PBN713", nn.Sequential(*net()[:2]), torch.randn(1, 3, 32, 32)) == []


class Graphs:
    """A mini-batch of a kind that nothing is known of."""

    def __init__(self):
        self.nodes = torch.randn(40, 3)


def test_a_mini_batch_that_does_not_tell_its_samples():
    assert of("PBN713", nn.BatchNorm1d(3), Graphs(), forward=lambda model, graphs: model(graphs.nodes)) == []


def test_a_network_that_is_called_twice_is_one_finding():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(5)))

        def forward(self, x):
            return self.net(x) + self.net(x.flip(0))

    [finding] = of("PBN401", Twice(), torch.randn(8, 4, 8, 8))
    assert (finding.severity, len(finding.layers)) == ("note", 5)


def test_layers_inside_of_torch_func_are_passed_over():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x):
            return torch.vmap(self.norm)(x)

    report = audit(Mapped(), torch.randn(3, 8, 4))
    assert "PBN411" not in report.not_run
    assert "PBN411" not in report
