"""docs/state.md: its code runs, and prints what it shows."""

import re
import tempfile
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "state.md"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_code_of_the_page_runs_and_prints_what_it_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text", "python", "python"]
    namespace: dict[str, object] = {}
    for kind, block in blocks:
        if kind == "python":
            capsys.readouterr()
            exec(compile(block, "docs/state.md", "exec"), namespace)
        else:
            # Kernels of other machines round the last digit differently: words and names count, figures are alike.
            assert without_figures(capsys.readouterr().out) == without_figures(block)


def without_figures(table: str) -> list[list[str]]:
    return [[re.sub(r"\d\.\d+", "#", word) for word in line.split()] for line in table.splitlines()]
