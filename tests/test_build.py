"""What `setup.py` says and does: old build tools, incremental builds, sources that follow older headers of torch."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(tmp_path: Path) -> SimpleNamespace:
    """A throwaway project of one source and one header, compiled with the functions of `setup.py`."""
    functions: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    try:
        compiler = functions["compiler"]()
    except functions["CompileError"] as error:
        pytest.skip(str(error))
    (tmp_path / "used.h").write_text("constexpr int kAnswer = 42;\n")
    (tmp_path / "unused.h").write_text("")
    (tmp_path / "source.cpp").write_text('#include "used.h"\n#include <cstdint>\nint answer() { return kAnswer; }\n')

    def compile_it(*flags: str, torch_version: str = "2.13.0") -> bool:
        command, target = functions["job"]([*compiler, *flags], str(tmp_path / "source.cpp"), tmp_path / "o", "common")
        compiled: bool = functions["compile_if_stale"](command, target, torch_version)
        assert target.exists()
        return compiled

    return SimpleNamespace(compile=compile_it, folder=tmp_path, error=functions["CompileError"])


def touch(path: Path) -> None:
    """Make a file newer than everything that was written before."""
    path.touch()
    later = path.stat().st_mtime + 10
    os.utime(path, (later, later))


def test_what_has_not_changed_is_not_compiled_again(build: SimpleNamespace) -> None:
    assert build.compile()
    assert not build.compile()
    touch(build.folder / "unused.h")
    assert not build.compile()


@pytest.mark.parametrize("name", ["source.cpp", "used.h"])
def test_a_changed_source_or_header_is_compiled_again(build: SimpleNamespace, name: str) -> None:
    build.compile()
    touch(build.folder / name)
    assert build.compile()


def test_other_flags_and_another_torch_compile_again(build: SimpleNamespace) -> None:
    build.compile()
    assert build.compile("-DOTHER")
    assert not build.compile("-DOTHER")
    assert build.compile("-DOTHER", torch_version="2.10.0")


def test_a_failed_compilation_is_tried_again(build: SimpleNamespace) -> None:
    build.compile()
    good = (build.folder / "used.h").read_text()
    (build.folder / "used.h").write_text("#error no\n")
    touch(build.folder / "used.h")
    with pytest.raises(build.error, match="#error no"):
        build.compile()
    (build.folder / "used.h").write_text(good)
    os.utime(build.folder / "used.h", (0, 0))  # an older file put back: the object is still that of no source
    assert build.compile()


def test_a_header_that_is_gone_compiles_again(build: SimpleNamespace) -> None:
    build.compile()
    (build.folder / "used.h").unlink()
    with pytest.raises(build.error, match=r"used\.h"):
        build.compile()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit in CUDA_HOME whose nvcc notes what it is asked for; on the path there is the nvcc of another."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for folder in (tmp_path / "path", tmp_path / "cuda" / "bin"):
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text(
            '#!/bin/sh\necho "$0 $*" >>"${0%/*}/calls"\n'
            'while [ $# -gt 1 ]; do case $1 in -o|-MF) echo x: >"$2";; esac; shift; done\n'
        )
        (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path / "cuda"


def test_cuda_is_compiled_and_linked_by_the_nvcc_of_cuda_home(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which alone knows where the CUDA is that it belongs to: a script in /usr/local/bin may stand for it."""
    functions = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setitem(functions["run"].__globals__, "OBJECTS", tmp_path)
    build = functions["BuildNative"](functions["setuptools"].Distribution())
    build.build_lib, build.inplace, build.parallel = str(tmp_path / "lib"), False, 1
    build.build_library(functions["Extension"]("precisebn._C_cuda", ["csrc/cuda/track.cu"]))
    compiled, linked = (toolkit / "bin" / "calls").read_text().splitlines()
    assert "-c csrc/cuda/track.cu" in compiled
    assert "--cudart=shared -shared" in linked
    assert linked.endswith("-ltorch_cpu -ltorch_cuda")
    assert not (tmp_path / "path" / "calls").exists()
    monkeypatch.delenv("CUDA_HOME")
    assert functions["find_nvcc"]() == str(tmp_path / "path" / "nvcc")


def test_cuda_is_compiled_for_the_gpus_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    architectures = runpy.run_path(str(ROOT / "setup.py"))["cuda_architectures"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert [re.findall(r"sm_\d+|\bcompute_\d+\]", flag) for flag in architectures()] == [
        ["sm_75"], ["sm_80"], ["sm_90", "compute_90]"],
    ]  # fmt: skip
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX")
    assert sorted(architectures()) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_90",
    ]


def test_a_build_that_fails_leaves_its_reason_in_the_package(tmp_path: Path) -> None:
    """Pip shows no warning of a build, and reports would say nothing but that there are no kernels."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "precisebn", clone / "precisebn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", clone / "csrc")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    for settings, reason in (
        ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++ does not run: [Errno 2] No such file or directory"),
        ({"PRECISEBN_PURE": "1"}, "PRECISEBN_PURE=1"),
    ):
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path / reason[:4].strip("/"))],
            cwd=clone,
            env=os.environ | {"PRECISEBN_REQUIRE_NATIVE": "", "PRECISEBN_CUDA": "0"} | settings,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        [wheel] = (tmp_path / reason[:4].strip("/")).glob("*.whl")
        assert zipfile.ZipFile(wheel).read("precisebn/_C_cpu.not_built").decode().startswith(reason)


def test_the_reason_is_the_first_error_of_a_compiler() -> None:
    first_error = runpy.run_path(str(ROOT / "setup.py"))["first_error"]
    output = "c++ -Werror a.cpp\na.cpp: In function f:\na.cpp:1: error: no\na.cpp:2: error: nor this"
    assert first_error(output) == "a.cpp:1: error: no"
    assert first_error("torch is not a CUDA build") == "torch is not a CUDA build"


def test_setuptools_that_is_too_old_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\n")
    # What pip does in its subprocess: it executes setup.py, and shows what that writes.
    program = f"import runpy; runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "setuptools 65.5.0" in done.stderr
    assert "pip install --upgrade 'setuptools>=77'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_of_setuptools_is_that_of_pyproject() -> None:
    asked = re.search(r'"setuptools>=(\d+)"', (ROOT / "pyproject.toml").read_text())
    said = re.search(r"setuptools\.__version__.*< (\d+)", (ROOT / "setup.py").read_text())
    assert asked is not None
    assert said is not None
    assert asked[1] == said[1]


def test_sources_take_the_headers_of_torch_through_one_header() -> None:
    """Which headers of torch hold what has changed from release to release; `csrc/torch.h` knows."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 30
    including = {path.name for path in sources if re.search(r"#include <(torch|c10|ATen)/", path.read_text())}
    assert including == {"torch.h"}
