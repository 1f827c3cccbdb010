"""The model of docs/scaling.md: the fit finds what is there, never less than nothing; and what the page works out by it.

The benchmark itself, with its processes, runs in CI with ``--quick``.
"""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.questions._scaling_model import (
    Model,
    Point,
    fit,
    nccl_latency,
    nonnegative_least_squares,
    numbers_of_a_recalibration,
    percent_off,
)
from precisebn import ops
from precisebn.statistics.estimator import PopulationEstimator

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_fit_finds_the_model_and_predicts_what_it_has_not_seen() -> None:
    truth = Model(start=3e-4, doubling=2e-4, channel=5e-9)
    found = fit(Point(w, n, truth.seconds(w, n)) for w in (1, 2, 8) for n in (640, 10_240, 163_840))
    assert found == pytest.approx(truth, rel=1e-9)
    assert percent_off(found.seconds(4, 40_960), truth.seconds(4, 40_960)) == pytest.approx(0.0, abs=1e-7)


def test_one_rank_communicates_nothing() -> None:
    assert Model(1.0, 1.0, 1.0).seconds(1, 1000) == 0.0


def test_what_would_be_negative_is_left_out() -> None:
    """Times that fall with the ranks, as noise makes them: the rest is fitted as if there were no such column."""
    falling = [Point(w, n, 1e-3 + 1e-6 * n - 1e-4 * w) for w in (2, 8) for n in (100, 1000)]
    found = fit(falling)
    assert found.doubling == 0.0
    rows = [(1.0, float(point.channels)) for point in falling]
    assert [found.start, found.channel] == pytest.approx(
        nonnegative_least_squares(rows, [point.seconds for point in falling])
    )


def test_no_coefficients_are_better() -> None:
    """Against many others at random, of which none may be negative."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    values = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1

    def error(coefficients: torch.Tensor) -> torch.Tensor:
        return (coefficients @ rows.T / values - 1.0).square().sum(-1)

    found = torch.tensor(nonnegative_least_squares(rows.tolist(), values.tolist()), dtype=torch.float64)
    near = (found + 0.05 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)).clamp(min=0.0)
    anywhere = 2.0 * torch.rand(20_000, 3, generator=generator, dtype=torch.float64)
    assert (found >= 0.0).all()
    assert error(found) <= error(torch.cat([near, anywhere])).min() + 1e-12


def test_a_relative_fit_needs_times() -> None:
    with pytest.raises(ValueError, match="all above 0"):
        fit([Point(2, 100, 0.0)])
    with pytest.raises(ValueError, match="needs values"):
        fit([Point(1, 100, 1.0)])


# ---- What docs/scaling.md says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 7, 8, 200])
def test_a_recalibration_adds_up_as_many_numbers_as_the_formula_says(batches: int) -> None:
    channels = (3, 5, 8)
    estimator = PopulationEstimator(channels)
    for _ in range(batches):
        for layer, number in enumerate(channels):
            ops.accumulate(torch.randn(4, number), *estimator.slot(layer))
        estimator.end_batch()
    sent: list[int] = []
    estimator.result(torch.full((3,), 1e-5), all_reduce=lambda flat: sent.append(flat.numel()))
    facts = 2 * len(channels)
    assert sum(sent) + facts == numbers_of_a_recalibration(len(channels), sum(channels), batches)


def test_the_estimate_of_nccl_is_the_one_that_nccl_printed() -> None:
    """For 128 bytes over 2 nodes of 8 H100, in NVIDIA/nccl issue 1453: 25.214764 us, 0.014764 of them for the bytes."""
    assert nccl_latency(2) == pytest.approx(25.2e-6)


def test_the_page_has_the_numbers_of_the_formulas() -> None:
    text = PAGE.read_text()
    numbers = numbers_of_a_recalibration(53, 26_560, 200)
    assert f"{numbers:,} numbers, {8 * numbers / 1e6:.2f} MB" in text
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "| " in line]
    latencies = [row for row in rows if re.fullmatch(r"[\d,]+ = \d+ x 8", row[0])]
    assert len(latencies) == 5
    for gpus, tree, ring, *rest in latencies:
        nodes = int(gpus.split("= ")[1].split(" x")[0])
        assert int(gpus.split(" =")[0].replace(",", "")) == 8 * nodes
        assert tree == f"{1e6 * nccl_latency(nodes):,.0f} us"
        assert ring == f"{1e6 * nccl_latency(nodes, ring=True):,.0f} us"
        assert rest == [f"{106e3 * nccl_latency(nodes):.1f} ms", f"{0.12 * 8 * nodes / 1e3 * 7:.2g} s"]
