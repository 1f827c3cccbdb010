"""Small layers stay on one thread: waking another takes longer than their work, and takes a core from somebody else.

Counted by the threads of a fresh process: OpenMP starts those of its team in the first region that needs them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from precisebn.ops.backend import backend

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys, torch
from precisebn import functional, ops

def threads():
    return len(os.listdir("/proc/self/task"))

def run(*shape):
    torch.set_num_threads(1)  # torch's own operators start threads, too
    C = shape[1]
    x = torch.randn(shape).contiguous(memory_format=getattr(torch, sys.argv[1])).requires_grad_()
    dy = torch.randn_like(x)
    totals = torch.zeros(1, dtype=torch.float64), *torch.zeros(2, C, dtype=torch.float64)
    weight, mean, var = torch.ones(C, requires_grad=True), torch.zeros(C), torch.ones(C)
    before = threads()
    torch.set_num_threads(2)
    ops.moments(x.detach())
    ops.accumulate(x.detach(), *totals)
    y, _ = functional.batch_norm(x, weight, mean)
    torch.autograd.grad(y, [x, weight], dy)
    y = functional.frozen_batch_norm(x, mean, var, weight, None)
    torch.autograd.grad(y, [x, weight], dy)
    return threads() - before

torch.ones(1, requires_grad=True).mul(2).backward()  # whose engine has threads of its own
print(json.dumps([run(4, 64, 8, 8), run(2, 80, 16, 16), run(64, 64, 28, 28)]))
"""


ONE_PASS = """
import os, sys, torch
from precisebn import ops

shape, layout = eval(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(1)  # torch's own operators start threads, too
x = torch.ones(shape).contiguous(memory_format=layout)
before = len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
ops.moments(x)
print(len(os.listdir("/proc/self/task")) - before)
"""

counts_threads = pytest.mark.skipif(
    not sys.platform.startswith("linux") or backend().cpu != "native",
    reason="counts the kernels' threads in /proc",
)


@counts_threads
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1024, 1024), "contiguous_format"),  # rows, and few of them
        ((16, 1024, 7, 7), "channels_last"),
        ((512, 512, 4, 4), "contiguous_format"),  # planes so short that a sample is one row
        ((1, 64, 200, 200), "channels_last"),
        ((2, 2048, 16, 16), "contiguous_format"),
    ],
)
def test_a_pass_over_megabytes_is_work_for_several_threads(shape: tuple[int, ...], layout: str) -> None:
    arguments = [sys.executable, "-c", ONE_PASS, repr(shape), layout]
    done = subprocess.run(arguments, check=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) > 0


@counts_threads
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_passes_over_up_to_half_a_mebibyte_start_no_threads_and_long_ones_do(layout: str) -> None:
    """Inputs of 64 KiB, 160 KiB and 12 MiB; the longest pass, of a backward, goes over three such."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, layout], check=True, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    tiny, small, large = json.loads(done.stdout)
    assert (tiny, small) == (0, 0)
    assert large > 0
