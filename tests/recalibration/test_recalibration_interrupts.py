"""Ctrl-C at every instant of a recalibration: the model is as before, or done; never anything between."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import state_of
from interrupting import Lines
from torch import Tensor, nn

from precisebn import InsufficientDataError, adapt_bn_stats, update_bn_stats
from precisebn.models.snapshot import Snapshot
from precisebn.nn import CycleBatchNormList, DomainSpecificBN

pytestmark = [
    pytest.mark.usefixtures("one_thread", "pythons_own_handler"),
    pytest.mark.skipif(
        threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's"
    ),
]

BATCHES = [torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Small(nn.Module):
    """A layer of every kind that is recorded in another way, and state beside."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.own, self.idle = nn.BatchNorm2d(3), Own(3), nn.BatchNorm2d(3).eval()
        self.domains, self.cycle = DomainSpecificBN(3, 2), CycleBatchNormList(2, num_features=3)
        self.register_buffer("calls", torch.zeros(()))
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        x = self.domains(self.idle(self.own(self.bn(x))), domain=0)
        return self.cycle(self.cycle(x))


def run(model: nn.Module) -> None:
    adapt_bn_stats(model, BATCHES, prior=2.0, modules=["bn", "own", "domains", "cycle"])


def run_that_fails(model: nn.Module) -> None:
    with pytest.raises(InsufficientDataError):
        update_bn_stats(model, BATCHES, 3)


def outcomes(run: Callable[[nn.Module], None]) -> tuple[Small, Snapshot, dict[str, Any]]:
    """A model, its picture, and the values that it has when the run is done."""
    torch.manual_seed(0)
    model, done = Small(), Small()
    done.load_state_dict(model.state_dict())
    run(done)
    return model, state_of(model), {key: value.clone() for key, value in done.state_dict().items()}


def is_done(model: nn.Module, values: dict[str, Any]) -> bool:
    return all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def interrupted(call: Callable[[], None], at: set[int]) -> bool:
    """Send real signals at the n-th lines that a call runs in the package; whether KeyboardInterrupt comes out."""
    return Lines(lambda number, _: number in at).run(call).interrupted


@pytest.fixture(scope="module", params=[run, run_that_fails], ids=["good run", "failing run"])
def lines(request: pytest.FixtureRequest) -> tuple[Callable[[nn.Module], None], list[int]]:
    """Of every line of the package the first and the last time that the run comes to it."""
    torch.manual_seed(0)
    request.param(Small())  # what is imported or cached once is so
    visits: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(Lines().run(lambda: request.param(Small())).ran):
        visits.setdefault(line, []).append(number)
    return request.param, sorted({n for at in visits.values() for n in (at[0], at[-1])})


def test_ctrl_c_at_every_line(lines):
    run, instants = lines
    model, before, done = outcomes(run)
    came_out = 0
    for instant in instants:
        was_interrupted = interrupted(lambda: run(model), {instant})
        came_out += was_interrupted
        assert torch.is_grad_enabled(), f"gradients are off after an interrupt at line {instant}"
        if state_of(model) != before:
            assert is_done(model, done), f"neither as before nor done, after an interrupt at line {instant}"
            before.put_back()
    assert len(instants) > 500
    assert came_out > len(instants) // 2


def test_a_second_ctrl_c_during_the_clean_up(lines):
    run, instants = lines
    model, before, done = outcomes(run)
    for instant in instants[::7]:
        interrupted(lambda: run(model), set(range(instant, instant + 4000, 3)))
        if state_of(model) != before:
            assert is_done(model, done), f"neither as before nor done, after interrupts from line {instant} on"
            before.put_back()


def test_an_interrupt_before_the_last_step_is_not_lost():
    model, before, _ = outcomes(run)
    assert interrupted(lambda: run(model), {0})
    assert state_of(model) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_real_signals_at_random_instants():
    """In the suite a few hundred; run the script by hand for more."""
    script = Path(__file__).with_name("interrupt_storm.py")
    result = subprocess.run(
        [sys.executable, str(script), "300"], capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 changed" in result.stdout
