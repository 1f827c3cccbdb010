"""The example of several processes, as users run it: by torchrun, saved by one wrapper, resumed by another."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")
ROOT = Path(__file__).parents[1]

TORCH_ABORTS_AT_EXIT = "terminate called without an active exception"
"""What is left of a process that had done all its work when one of torch's gloo threads let go of its last tensor while
Python shut down (pytorch issue 190489). Destroying the group does not end these threads, for FSDP2's meshes stay alive
in torch's caches; on a busy machine one run in some hundreds ends so."""


def torchrun(folder: Path, *arguments: str) -> list[tuple[int, float, float]]:
    """Epoch, test error with running averages, and with PreciseBN, of each epoch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    checkpoint, started = folder / "ddp.pt", time.time()
    result = subprocess.run(
        [*command, str(ROOT / "examples" / "ddp_precise_bn.py"), "--checkpoint", str(checkpoint), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    saved = checkpoint.exists() and checkpoint.stat().st_mtime > started
    assert result.returncode == 0 or (saved and TORCH_ABORTS_AT_EXIT in result.stderr), result.stdout + result.stderr
    assert "in 2 processes" in result.stdout
    found = re.findall(r"epoch (\d+): test error ([\d.]+)% with running averages, ([\d.]+)%", result.stdout)
    return [(int(epoch), float(own), float(precise)) for epoch, own, precise in found]


def test_the_example_trains_saves_and_resumes_with_another_wrapper(tmp_path: Path) -> None:
    processes.skip_without_gloo()
    begun = torchrun(tmp_path, "--wrap", "ddp", "--norm", "sync", "--epochs", "2")
    gone_on = torchrun(tmp_path, "--wrap", "fsdp2", "--norm", "plain", "--epochs", "2", "--resume")
    assert [epoch for epoch, _, _ in begun + gone_on] == [0, 1, 2, 3]
    assert gone_on[-1][2] < begun[0][2] / 2
    assert gone_on[0][2] < begun[0][2]
