"""The model of docs/scaling.md: the fit finds what is there, and the page says what the formulas say.

The benchmark itself, with its processes, runs in CI with ``--quick``.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.questions._scaling_model import (
    Model,
    Point,
    fit,
    nccl_latency,
    nonnegative_least_squares,
    numbers_of_a_recalibration,
    percent_off,
    ring,
    tree,
)
from precisebn import ops
from precisebn.statistics.estimator import PopulationEstimator

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


@pytest.mark.parametrize("cores", [2, math.inf])
@pytest.mark.parametrize("hops", [tree, ring])
def test_the_fit_finds_the_model_and_predicts_what_it_has_not_seen(hops: Callable[[int], float], cores: float) -> None:
    truth = Model(3e-4, 2e-4, 5e-9, hops, cores)
    points = [Point(w, n, truth.seconds(w, n)) for w in (1, 2, 8) for n in (640, 10_240, 163_840)]
    found = fit(points, hops, cores)
    assert found[:3] == pytest.approx(truth[:3], rel=1e-9)
    assert percent_off(found.seconds(4, 40_960), truth.seconds(4, 40_960)) == pytest.approx(0.0, abs=1e-7)


def test_one_rank_communicates_nothing() -> None:
    assert Model(1.0, 1.0, 1.0, ring).seconds(1, 1000) == 0.0


def test_what_would_be_negative_is_left_out() -> None:
    """Times that fall with the ranks, as noise makes them: the rest is fitted as if there were no such column."""
    falling = [Point(w, n, 1e-3 + 1e-6 * n - 1e-4 * w) for w in (2, 8) for n in (100, 1000)]
    found = fit(falling, tree)
    assert found.hop == 0.0
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
        fit([Point(2, 100, 0.0)], tree)
    with pytest.raises(ValueError, match="needs values"):
        fit([Point(1, 100, 1.0)], tree)


# ---- What docs/scaling.md says --------------------------------------------------------------------------------------


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
    assert len(sent) == 2
    assert sum(sent) == numbers_of_a_recalibration(len(channels), sum(channels), batches)


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
    for gpus, by_tree, by_ring, *rest in latencies:
        nodes = int(gpus.split("= ")[1].split(" x")[0])
        ranks = 8 * nodes
        assert int(gpus.split(" =")[0].replace(",", "")) == ranks
        assert by_tree == f"{1e6 * nccl_latency(nodes):,.0f} us"
        assert by_ring == f"{1e6 * nccl_latency(nodes, by_ring=True):,.0f} us"
        in_the_store = 7e-3 * step_ms(text, ranks)
        assert rest == [f"{106e3 * nccl_latency(nodes):.1f} ms", f"{in_the_store:.2g} s"]


def step_ms(text: str, ranks: int) -> float:
    """What a step takes in the store, by the formula that stands in a text."""
    found = re.search(r"([\d.]+)\sms\s\+\s([\d.]+)\sms\sW\slog2\(W\)", text)
    assert found is not None
    return float(found[1]) + float(found[2]) * ranks * math.log2(ranks)


def test_the_page_says_of_the_store_what_was_measured() -> None:
    """Another run finds other figures; where they are others by a half, the page is to be written anew."""
    results = json.loads((PAGE.parents[1] / "benchmarks" / "results" / "cpu.json").read_text())
    measured = results["benchmarks"]["scaling"]["summary"]["a step in the store, for W ranks"]
    text = PAGE.read_text()
    for ranks in (8, 512, 16_384):
        assert step_ms(text, ranks) == pytest.approx(step_ms(measured, ranks), rel=0.5)
    more = re.search(r"210 more steps, which take (\d+) s on 64 ranks and (\d+) s on 512", text)
    assert more is not None
    assert [int(seconds) for seconds in more.groups()] == [round(0.21 * step_ms(text, ranks)) for ranks in (64, 512)]


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    model = nn.Sequential(nn.BatchNorm1d(2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        namespace["recalibrate_on_the_first_machine"](model, [torch.tensor([[1.0, 2.0], [3.0, 6.0]])], 1)
    finally:
        dist.destroy_process_group()
    assert model.state_dict()["0.running_mean"].tolist() == [2.0, 4.0]
