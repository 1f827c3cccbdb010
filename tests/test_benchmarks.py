"""The benchmarks' results: the file keeps what the page needs, and the page shows what the file keeps."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="benchmarks need the extra 'bench'")
for package in ("fvcore", "sklearn"):
    pytest.importorskip(package, reason="benchmarks need the extra 'bench'")

from benchmarks.harness import page, question, results  # noqa: E402

FILES = sorted(results.RESULTS.glob("*.json"))


def test_the_page_is_what_the_questions_and_results_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = (results.RESULTS.parent / "README.md").read_text()
    (tmp_path / "README.md").write_text(shown)
    (tmp_path / "results").symlink_to(results.RESULTS)
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    page.refresh_readme()
    assert (tmp_path / "README.md").read_text() == shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_hold_a_line_for_a_row_and_no_samples(path: Path, tmp_path: Path) -> None:
    found = results.load_results(path)
    results.save_results(tmp_path / "again.json", found)
    assert (tmp_path / "again.json").read_text() == path.read_text()
    rows = sum(len(result["rows"]) for result in found.values())
    assert len(path.read_text().splitlines()) < rows + 60 * len(found)
    # A row has figures, quartiles (three figures), and these by peer; never as many figures as there were rounds.
    assert max(len(each) for each in _lists(found)) <= 3 or not rows


def test_what_is_saved_is_what_was_found_and_other_benchmarks_stay(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cpu.json"
    first = {
        "rows": [{"us": 1.5, "quartiles": [1.25, 2.0], "_peers": {"torch": (1.0, 2.0, 3.0)}}],
        "summary": {"goals": []},
    }
    results.save_results(path, {"one": first})
    results.save_results(path, {"two": {"rows": [], "summary": {"goals": [results.goal("x", 1.0, at_least=2)]}}})
    assert json.loads(path.read_text())["benchmarks"]["one"]["rows"][0]["_peers"] == {"torch": [1.0, 2.0, 3.0]}
    assert [entry["met"] for entry in results.load_results(path)["two"]["summary"]["goals"]] == [False]


def test_every_question_says_what_it_asks_and_against_whom() -> None:
    questions = question.questions()
    assert {"kernels", "update", "modules", "overhead", "precision"} <= set(questions)
    assert all(
        each.asks.endswith("?") and each.against and set(each.devices) <= {"cpu", "cuda"} for each in questions.values()
    )


# ---- The script for machines with a GPU, on one without: all that it calls is pretended ------------------------------

STAND_INS = {
    "nvidia-smi": "echo '9.0, NVIDIA H100, 580.159.04, 81559 MiB'",
    "timeout": 'echo "$2 s: $3 $4 $5 $6" >>calls; shift 2; exec "$@"',
    "compute-sanitizer": 'echo "found by $2"; [[ "$*" != *$FAILS* ]] || exit 9',
    "python": """
        case "$1 $2" in
            "-c import "*) [[ " $MISSING " != *" ${2#import } "* ]]; exit;;
            "setup.py build_ext") echo "for $TORCH_CUDA_ARCH_LIST";;
            "-m pytest") echo "$*"; echo "plugins $PYTEST_DISABLE_PLUGIN_AUTOLOAD";;
            "-m benchmarks") echo "$*"; touch "$8";;
        esac
        [[ "$*" != *$DIES* ]] || kill -9 $PPID
        [[ "$*" != *$FAILS* ]]""",
}


def _on_a_gpu(
    folder: Path, fails: str = "nothing", dies: str = "nothing", missing: str = "apex"
) -> "tuple[subprocess.CompletedProcess[str], str, list[str]]":
    """What the script shows, its log, and its limits with the commands that they are of."""
    (folder / "benchmarks").mkdir()
    (folder / "bin").mkdir()
    shutil.copy(results.RESULTS.parent / "gpu.sh", folder / "benchmarks")
    for name, body in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "OUT": f"{folder}/out", "PYTHON": "python"}
    done = subprocess.run(
        ["bash", str(folder / "benchmarks" / "gpu.sh")],
        env=environment | {"FAILS": fails, "DIES": dies, "MISSING": missing},
        capture_output=True,
        text=True,
    )
    return done, (folder / "out" / "gpu.log").read_text(), (folder / "calls").read_text().splitlines()


def test_all_stages_run_within_the_time_and_leave_few_files(tmp_path: Path) -> None:
    done, log, limits = _on_a_gpu(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all stages ok" in done.stdout
    assert "for 9.0\n" in log
    assert "plugins 1" in log
    assert log.count("-p xdist.plugin -n 8") == 1
    assert all(f"found by {tool}" in log for tool in ("memcheck", "racecheck", "synccheck", "initcheck"))
    assert log.count("is not installed") == 1
    assert "--budget" in log
    seconds = [int(line.split()[0]) for line in limits if "compute-sanitizer" not in line]
    at_once = max(int(line.split()[0]) for line in limits if "compute-sanitizer" in line)
    assert sum(seconds[:-1]) + at_once <= 440  # which leaves some time for benchmarks in the worst of cases
    assert 500 <= seconds[-1] <= 540
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cuda.json", "gpu.log"]


@pytest.mark.parametrize(
    ("fails", "stage"),
    [("build_ext", "build"), ("test_sync", "tests"), ("racecheck", "racecheck"), ("-m benchmarks", "benchmarks")],
)
def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path: Path, fails: str, stage: str) -> None:
    done, log, _ = _on_a_gpu(tmp_path, fails)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(f"; failed: {stage}")
    assert "== benchmarks" in log


def test_nothing_is_timed_where_there_are_no_kernels(tmp_path: Path) -> None:
    done, log, _ = _on_a_gpu(tmp_path, fails="ops.backend()")
    assert done.returncode == 1
    assert "== backend: FAILED" in log
    assert "benchmarks" not in log


def test_the_log_holds_what_has_been_said_when_all_is_killed(tmp_path: Path) -> None:
    done, log, _ = _on_a_gpu(tmp_path, dies="--budget")
    assert done.returncode == -9
    assert "== tests: ok" in log
    assert log.splitlines()[-1].startswith("-m benchmarks")


def test_plugins_that_are_missing_are_done_without(tmp_path: Path) -> None:
    done, log, _ = _on_a_gpu(tmp_path, missing="pytest_timeout xdist")
    assert done.returncode == 0
    assert "-p pytest_timeout" not in log
    assert "-n 8" not in log


def _lists(value: object) -> list[list[object]]:
    """Every list of figures, wherever it lies."""
    if isinstance(value, dict):
        return [each for item in value.values() for each in _lists(item)]
    if isinstance(value, list):
        inside = [each for item in value for each in _lists(item)]
        return inside if inside or not all(isinstance(item, float) for item in value) else [value]
    return []
