"""docs/audit.md: its table is that of the checks, its code runs, and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from precisebn.auditing.checks import CHECKS
from precisebn.auditing.codes import all_checks, code_table, renewed
from precisebn.auditing.copies import COPY_CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "audit.md"


def test_the_page_has_every_check():
    """`python -m precisebn.auditing.codes` renews it."""
    assert renewed(PAGE.read_text()) == PAGE.read_text()
    assert {one.code for one in (*CHECKS, *COPY_CHECKS)} == set(re.findall(r"^\| (PBN\d+) ", PAGE.read_text(), re.M))


def test_every_source_is_a_paper_or_a_page():
    for one in all_checks():
        assert re.search(r"^https://\S+$|, arXiv \d{4}\.\d{5}(, \w+ [\d.]+)*$", one.source), one.code


def test_links_to_other_pages_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()) if not link.startswith("https://")]
    assert links
    assert all((PAGE.parent / link).exists() for link in links)


def test_what_is_said_of_a_check_is_short():
    for line in code_table(all_checks()).splitlines()[2:]:
        assert len(line.split(" | ")[2]) < 90


def test_the_code_of_the_page_prints_what_it_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
            exec(compile(block, "docs/audit.md", "exec"), namespace)
    [shown] = re.findall(r"It prints\n\n```\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert shown in printed.getvalue()
