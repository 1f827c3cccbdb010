"""The demo as a user runs it, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the demo needs the extra 'demo'")
ROOT = Path(__file__).parents[1]


def test_demo_shows_that_precise_statistics_beat_ema_and_adaptation_repairs_a_shift(tmp_path: Path) -> None:
    picture = tmp_path / "build" / "demo.png"  # where git ignores it, not the one in docs/
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits.py"), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search_path, "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "9 BatchNorm layers" in result.stdout

    by_epoch = re.findall(r"│ +(\d+) +│ +([\d.]+)% +│ +([\d.]+)% +│ +[\d.]+ +│", result.stdout)
    assert [epoch for epoch, _, _ in by_epoch] == ["1", "2", "3"]
    assert all(float(precise) < float(ema) for _, ema, precise in by_epoch)

    [(clean, shifted, adapted)] = re.findall(r"│ +([\d.]+)% +│ +([\d.]+)% +│ +([\d.]+)% +│", result.stdout)
    assert float(clean) < float(adapted) < float(shifted)
