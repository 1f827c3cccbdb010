"""What is said where the kernels cannot be loaded: once, at import, with the reason and the remedy."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import precisebn

loader = sys.modules["precisebn.ops.backend"]  # the package hands on a function of the same name


def imported(package: Path, choice: str) -> subprocess.CompletedProcess[str]:
    program = "import precisebn.ops as ops; print(ops.backend())"
    environment = os.environ | {"PYTHONPATH": "", "PRECISEBN_BACKEND": choice}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of precisebn without its shared libraries."""
    source = Path(precisebn.__file__).parent
    return Path(shutil.copytree(source, tmp_path / "precisebn", ignore=shutil.ignore_patterns("*.so", "__pycache__")))


def test_an_install_without_kernels_says_so_once(package):
    done = imported(package, "auto")
    assert done.returncode == 0
    assert done.stdout.startswith("cpu: fallback (_C_cpu.so was not built)")
    assert done.stderr.count("precisebn runs without its kernels") == 1
    assert "_C_cpu.so was not built" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_a_source_tree_is_named_where_pip_has_installed_another(package, choice):
    """In a clone Python imports the package that lies there, whatever pip has built: another folder is the remedy."""
    (package.parent / "setup.py").touch()
    (package.parent / "csrc").mkdir()
    done = imported(package, choice)
    assert f"_C_cpu.so was not built in the source tree {package}" in done.stderr
    assert "run Python in another folder" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr
    if choice == "auto":
        assert f"was not built in the source tree {package}" in done.stdout


def test_what_the_build_has_noted_is_told(package):
    (package / "_C_cpu.not_built").write_text("no C++ compiler found\n")
    done = imported(package, "auto")
    assert done.stdout.startswith("cpu: fallback (_C_cpu.so was not built: no C++ compiler found)")


def test_a_fallback_that_was_chosen_is_not_reported(package):
    done = imported(package, "fallback")
    assert done.stdout.startswith("cpu: fallback (PRECISEBN_BACKEND=fallback)")
    assert done.stderr == ""


def test_a_library_that_does_not_load_gives_its_reason(package):
    (package / "_C_cpu.so").write_bytes(b"not a library")
    done = imported(package, "auto")
    assert "_C_cpu.so could not be loaded: " in done.stdout
    assert "_C_cpu.so could not be loaded: " in done.stderr


def test_a_library_for_another_cuda_is_named_with_both(tmp_path, monkeypatch):
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"\x7fELF\0libtorch_cuda.so\0libcudart.so.12\0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(loader, "_PACKAGE", tmp_path)
    reason = loader._load("_C_cuda.so")
    assert reason.startswith("_C_cuda.so, built for CUDA 12 where torch has 13.0, could not be loaded: ")


@pytest.mark.parametrize(
    ("cuda", "gpu", "reported"), [("13.0", True, True), ("13.0", False, False), (None, True, False)]
)
def test_missing_cuda_kernels_are_reported_where_there_is_a_gpu(cuda, gpu, reported, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(loader, "_has_gpu", lambda: gpu)
    with caplog.at_level(logging.WARNING, logger="precisebn"):
        loader._report("", "_C_cuda.so was not built")
    assert [record.name for record in caplog.records] == ["precisebn"] * reported
    assert all("_C_cuda.so was not built" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("cuda", "gpu", "required"), [("13.0", True, True), ("13.0", False, False), (None, True, False)]
)
def test_native_requires_the_cuda_kernels_where_there_is_a_gpu(cuda, gpu, required, monkeypatch):
    monkeypatch.setenv("PRECISEBN_BACKEND", "native")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(loader, "_has_gpu", lambda: gpu)
    monkeypatch.setattr(loader, "_load", {"_C_cpu.so": "", "_C_cuda.so": "_C_cuda.so was not built"}.get)
    with pytest.raises(ImportError, match=r"_C_cuda\.so was not built") if required else contextlib.nullcontext():
        loader._load_libraries()
