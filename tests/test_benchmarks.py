"""The benchmarks' results: the file keeps what the page needs, and the page shows what the file keeps."""

import json
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


def _lists(value: object) -> list[list[object]]:
    """Every list of figures, wherever it lies."""
    if isinstance(value, dict):
        return [each for item in value.values() for each in _lists(item)]
    if isinstance(value, list):
        inside = [each for item in value for each in _lists(item)]
        return inside if inside or not all(isinstance(item, float) for item in value) else [value]
    return []
