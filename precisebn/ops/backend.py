"""Which implementation of the operators runs: loads the shared libraries that lie in the package, and tells.

The environment variable ``PRECISEBN_BACKEND`` chooses: ``auto`` (default), ``native`` (an error where the kernels
cannot be loaded) or ``fallback``.
"""

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

import precisebn.ops.registry  # noqa: F401  # kernels are registered for operators that exist
from precisebn.errors import InputError

__all__ = ["Backend", "backend"]

_PACKAGE = Path(__file__).parents[1]

_library = torch.library.Library("precisebn", "FRAGMENT")
_library.define("_cpu_capability() -> str")


class Backend(NamedTuple):
    """What runs the operators on each device; ``str()`` is one plain line."""

    cpu: str
    """``"native"`` or ``"fallback"``."""
    cpu_detail: str
    """The instruction set in use (``"avx512"``, ``"avx2"``, ``"baseline"``), or why the fallback is used."""
    cuda: str
    """``"native"``, ``"fallback"`` or ``"unavailable"``."""
    cuda_detail: str
    """Empty, or why CUDA does not run natively."""

    def __str__(self) -> str:
        cpu = f"cpu: {self.cpu} ({self.cpu_detail})"
        cuda = f"cuda: {self.cuda}" + (f" ({self.cuda_detail})" if self.cuda_detail else "")
        return f"{cpu}; {cuda}"


def backend() -> Backend:
    """Which implementation of the operators is in use, and why.

    >>> backend().cpu in ("native", "fallback")
    True
    """
    cpu_detail = _cpu_failure or torch.ops.precisebn._cpu_capability()
    if torch.version.cuda is None or not torch.cuda.is_available():
        cuda, cuda_detail = "unavailable", "torch has no CUDA device"
    else:
        cuda, cuda_detail = "fallback" if _cuda_failure else "native", _cuda_failure
    return Backend("fallback" if _cpu_failure else "native", cpu_detail, cuda, cuda_detail)


def _load(name: str) -> str:
    """Load a shared library that lies in the package. Returns why that failed, or an empty string."""
    path = _PACKAGE / name
    if not path.exists():
        return f"{name} was not built{_why_not_built(path)}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name}{_built_for(path)} could not be loaded: {error.__cause__ or error}"
    return ""


def _why_not_built(path: Path) -> str:
    """What the build has noted, and whether this is a source tree, which hides what pip has installed elsewhere."""
    note = path.with_suffix(".not_built")  # setup.py writes it
    reason = f": {note.read_text().strip()}" if note.exists() else ""
    return f" in the source tree {_PACKAGE}{reason}" if _is_source_tree() else reason


def _is_source_tree() -> bool:
    """Whether what runs is no install: in the folder of the sources, Python imports the package that lies there."""
    return all((_PACKAGE.parent / name).exists() for name in ("setup.py", "csrc"))


def _remedy() -> str:
    if _is_source_tree():
        return (
            "run Python in another folder, where it imports what pip has installed; or build them here, with "
            "pip install --no-build-isolation -e ."
        )
    return (
        "reinstall it where there is a C++ compiler (for CUDA, also nvcc of the CUDA that torch has) with "
        "pip install --no-build-isolation, which builds for the torch at hand"
    )


def _built_for(path: Path) -> str:
    """Which CUDA a library is linked to, where it is to one: no version of a wheel says it, and others do not load."""
    needed = re.search(rb"libcudart\.so\.(\d+)", path.read_bytes())
    if needed is None:
        return ""
    return f", built for CUDA {needed[1].decode()} where torch has {torch.version.cuda},"


def _load_libraries() -> tuple[str, str]:
    """Load what there is. Returns why the CPU and the CUDA kernels are not in use, empty where they are.

    Does not ask whether there is a CUDA device: that would initialize CUDA, and a process that has done so cannot fork
    workers that use it.
    """
    choice = os.environ.get("PRECISEBN_BACKEND", "auto")
    if choice not in ("auto", "native", "fallback"):
        raise InputError(f"PRECISEBN_BACKEND must be auto, native or fallback, but is {choice!r}")
    if choice == "fallback":
        return "PRECISEBN_BACKEND=fallback", "PRECISEBN_BACKEND=fallback"
    cpu_failure = _load("_C_cpu.so")
    cuda_failure = "torch has no CUDA" if torch.version.cuda is None else _load("_C_cuda.so")
    if choice == "auto":
        _report(cpu_failure, cuda_failure)
    if choice == "native" and (cpu_failure or _is_missed(cuda_failure)):
        raise ImportError(
            f"PRECISEBN_BACKEND=native, but {cpu_failure or cuda_failure}. To have them, {_remedy()}; or unset "
            "PRECISEBN_BACKEND"
        )
    return cpu_failure, cuda_failure


def _report(cpu_failure: str, cuda_failure: str) -> None:
    """Say where the fallback runs although kernels could: results do not differ, speed does."""
    missing = []
    if cpu_failure and os.name != "nt":  # there are none for Windows
        missing.append(cpu_failure)
    if _is_missed(cuda_failure):
        missing.append(cuda_failure)
    if missing:
        logging.getLogger("precisebn").warning(
            "precisebn runs without its kernels, in plain PyTorch: %s. To have them, %s. PRECISEBN_BACKEND=fallback "
            "makes this a choice",
            "; ".join(missing),
            _remedy(),
        )


def _is_missed(cuda_failure: str) -> bool:
    """Whether CUDA could run but for this failure: the torch of PyPI has CUDA, also where there is no GPU."""
    return bool(cuda_failure) and torch.version.cuda is not None and _has_gpu()


def _has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without initializing CUDA: on Linux, and on Linux in Windows."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


_cpu_failure, _cuda_failure = _load_libraries()
