"""What the targets of the Makefile would do, from a fresh clone: read from a dry run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if shutil.which("make") is None:
    pytest.skip("make is not installed", allow_module_level=True)


def commands_of(target: str) -> str:
    """The commands of a target and of all that it needs, as if nothing had been made yet."""
    call = ["make", "--dry-run", "--always-make", "--no-print-directory", target]  # the tests may run inside of a make
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_lint_and_format_build_nothing() -> None:
    for target in ("lint", "format"):
        commands = commands_of(target)
        assert "ruff" in commands
        assert "clang-format" in commands
        assert not re.search(r"--editable|setup\.py|\bninja\b|install \.", commands)


def test_every_command_comes_from_the_environment_that_make_sets_up() -> None:
    """A fresh machine has Python, and none of the tools."""
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    assert targets is not None
    for target in targets[1].split():
        programs = {line.split()[0] for line in commands_of(target).splitlines()} - {"python3", "touch", "rm", "echo"}
        assert [name for name in programs if not name.startswith(".venv/bin/")] == []
    assert "pre-commit==" in (ROOT / "requirements-dev.txt").read_text()


def test_lint_sees_every_source_of_the_extension() -> None:
    checked = set(commands_of("lint").split())
    sources = {
        str(path.relative_to(ROOT)) for suffix in ("h", "cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")
    }
    assert sources
    assert sources <= checked


def test_commands_that_list_every_source_are_not_printed() -> None:
    commands = re.findall(r"^\t(.*\$\(CXX_SOURCES\))$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert commands
    assert [command for command in commands if not command.startswith("@")] == []


def test_the_demo_does_not_overwrite_the_picture_of_the_readme() -> None:
    assert "examples/digits.py" in commands_of("demo")
    assert "docs/demo.png" not in commands_of("demo")
    assert "--output docs/demo.png" in commands_of("docs-demo")
    assert "/build/" in (ROOT / ".gitignore").read_text().splitlines()


def test_benchmarks_run_in_the_environment_that_users_have() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^.*export OMP_.*$", makefile, flags=re.MULTILINE) == ["test: export OMP_WAIT_POLICY ?= PASSIVE"]


def test_every_target_that_is_described_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    described = re.findall(r"^#   make (\S+)", makefile, flags=re.MULTILINE)
    contributing = re.findall(r"^    make (\S+)", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert described
    assert contributing
    assert [
        name for name in described + contributing if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)
    ] == []
