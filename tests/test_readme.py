"""Every code block of the README runs, in order, in one namespace, and its report looks as it says."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_every_code_block_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    shown = re.search(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)[1].splitlines()
    for line in shown:
        assert without_figures(line) in without_figures(printed)
    assert "cpu: " in printed


def without_figures(text: str) -> str:
    """Kernels of other machines round the last digit differently."""
    return re.sub(r"\d\.\d+", "#", text)


def test_the_figures_of_the_first_report_are_those_of_seed_0():
    """Those of the table, root mean squares, and that of the metric, of the worst channel, are not the same."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    text = README.read_text()
    exec(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1], namespace)
    report = namespace["report"]
    row = re.search(r"^1 +\d+ +(\S+) +(\S+) +(\S+) +(\S+)$", text, flags=re.MULTILINE)
    layer = report["1"]
    found = [layer.mean_drift, layer.var_drift, layer.mean_error, layer.var_error]
    assert [float(figure) for figure in row.groups()] == pytest.approx(found, rel=1e-2)
    metric = re.search(r'"precisebn/max_drift": ([\d.]+)', text)[1]
    assert float(metric) == pytest.approx(report.metrics()["precisebn/max_drift"], rel=1e-2)


def test_the_commands_it_names_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    commands = re.findall(r"^    make (\w+)", README.read_text(), flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{command}:" in makefile for command in commands)
