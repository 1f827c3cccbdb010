"""Every code block of the README runs, in order, in one namespace, and its report looks as it says."""

import re
from pathlib import Path

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
    for line in shown[:2]:
        assert line in printed
    assert "cpu: " in printed


def test_the_commands_it_names_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    commands = re.findall(r"^    make (\w+)", README.read_text(), flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{command}:" in makefile for command in commands)
