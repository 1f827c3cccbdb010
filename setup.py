"""Builds the shared libraries of precisebn; everything else about the package is in setup.cfg and pyproject.toml.

The libraries use the LibTorch stable ABI and no Python symbol. One build therefore serves every Python and every torch
from 2.10 on, and the wheel is tagged py3-none-<platform>. The package works without them: where they cannot be built,
the build log says why, a file in the package keeps the reason, and the wheel is py3-none-any.

Environment:
    PRECISEBN_PURE=1            do not build them
    PRECISEBN_REQUIRE_NATIVE=1  fail where they cannot be built
    PRECISEBN_CUDA=0|1          never or always try to build the CUDA library; by default it is built where torch is a
                                CUDA build and nvcc is found, in CUDA_HOME or on the path
    TORCH_CUDA_ARCH_LIST        as in torch's own extensions: for which GPUs, "8.6;9.0+PTX", instead of those below
    CXX                         the C++ compiler
"""

import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

# pip looks at the versions that pyproject.toml asks for only where it isolates the build.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"precisebn: setuptools {setuptools.__version__} cannot build it, 77 or later can. Either upgrade it:\n"
        f"    {sys.executable} -m pip install --upgrade 'setuptools>=77' wheel\n"
        "or leave out --no-build-isolation: pip then fetches a setuptools of its own, and another torch."
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
OBJECTS = ROOT / "build" / "objects"  # not in setuptools' temporary folder: editable installs have a new one each time
TARGET_TORCH = "0x020a000000000000"  # 2.10, the oldest torch whose headers and library have what the sources use

# -ffp-contract=fast lets a * b + c be one fused operation, -fno-math-errno sqrt one instruction. Nothing that changes
# the handling of NaN and infinity.
CXX_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-Wall", "-Wextra", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
]  # fmt: skip

# Sources in csrc/cpu/kernels are compiled once for each of these, and the library chooses at run time.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512",
        # GCC 12 warns of its own _mm512_undefined_ps() (GCC bug 105593).
        "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    ]  # fmt: skip

# Machine code for T4, for A100 and all of its generation and the next, and for H100; PTX that drivers compile for
# whatever is newer.
CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_75,code=sm_75",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]


def extensions() -> list[Extension]:
    """What to build: the CPU library, and the CUDA library where there is something to build it from and with."""
    if is_pure():
        return []
    return [cpu_extension(), cuda_extension()] if wants_cuda() else [cpu_extension()]


def is_pure() -> bool:
    return os.environ.get("PRECISEBN_PURE") == "1"


def cpu_extension() -> Extension:
    return extension("precisebn._C_cpu", "csrc/cpu/kernels/*.cpp", "csrc/cpu/*.cpp", "csrc/*.cpp")


def cuda_extension() -> Extension:
    return extension("precisebn._C_cuda", "csrc/cuda/*.cu", "csrc/*.cpp")


def extension(name: str, *patterns: str) -> Extension:
    return Extension(
        name,
        sources=[str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))],
        optional=os.environ.get("PRECISEBN_REQUIRE_NATIVE") != "1",
    )


def wants_cuda() -> bool:
    choice = os.environ.get("PRECISEBN_CUDA")
    if choice in ("0", "1"):
        return choice == "1"
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None and find_nvcc() is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")  # which has to do with this torch, where it is set
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


class BuildNative(build_ext):
    """Compiles an extension into a plain shared library, with the headers and libraries of the torch at hand."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        # setuptools turns a CompileError of an optional extension into a warning that quotes it.
        try:
            self.build_library(ext)
            why_not(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        except CompileError as error:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build, of other sources
            note_why_not(self.get_ext_fullpath(ext.name), first_error(str(error)))
            what = "a pure-Python install" if ext.name.endswith("_cpu") else "no CUDA kernels"
            raise CompileError(f"{error}\nprecisebn: {what}: {ext.name} was not built; PyTorch replaces it") from None

    def build_library(self, ext: Extension) -> None:
        if os.name == "nt":
            raise CompileError("the kernels need GCC or Clang, which Windows builds of torch are not made with")
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            raise CompileError(f"torch is needed to build and cannot be imported: {error}") from None

        cuda = ext.name.endswith("_cuda")
        if cuda and torch.version.cuda is None:
            raise CompileError("torch is not a CUDA build")
        # Where CUDA's headers and libraries are nvcc knows; torch guesses, from where nvcc seems to be.
        includes = [argument for path in cpp_extension.include_paths("cpu") for argument in ("-isystem", path)]
        jobs = (cuda_jobs if cuda else cpu_jobs)(ext, OBJECTS / ext.name)
        workers = os.cpu_count() if self.parallel in (None, True) else self.parallel
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda job: compile_if_stale(job[0] + includes, job[1], torch.__version__), jobs))

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        linker = [cuda_compiler(), "--cudart=shared"] if cuda else compiler()
        paths = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
        libraries = ["-ltorch_cpu", "-ltorch_cuda"] if cuda else ["-ltorch_cpu"]
        run([*linker, "-shared", *(str(target) for _, target in jobs), "-o", str(library), *paths, *libraries])


def why_not(library: str | Path) -> Path:
    """Where the package keeps the reason why a library was not built: pip shows no warning of a build."""
    return Path(library).with_suffix(".not_built")


def note_why_not(library: str | Path, reason: str) -> None:
    note = why_not(library)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(reason + "\n")


def first_error(text: str) -> str:
    """The line of a compiler's output that says most, or the first of another text."""
    lines = text.splitlines() or [""]
    return next((line for line in lines[1:] if "error" in line.lower()), lines[0])[:300]


Job = tuple[list[str], Path]  # a compiler's command, and the object file that it writes


def cpu_jobs(ext: Extension, objects: Path) -> list[Job]:
    jobs = []
    for source in ext.sources:
        variants = INSTRUCTION_SETS if "/kernels/" in source else {"": []}
        for isa, flags in variants.items():
            define = [f"-DPRECISEBN_ISA={isa}"] if isa else []
            jobs.append(job([*compiler(), *CXX_FLAGS, *flags, *define], source, objects, isa or "common"))
    return jobs


def cuda_jobs(ext: Extension, objects: Path) -> list[Job]:
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", *cuda_architectures()]
    return [job([cuda_compiler(), *flags], source, objects, "cuda") for source in ext.sources]


def cuda_architectures() -> list[str]:
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return CUDA_ARCHITECTURES
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    return _get_cuda_arch_flags()


def job(command: list[str], source: str, objects: Path, variant: str) -> Job:
    target = objects / f"{Path(source).stem}.{variant}.o"
    # -MMD: the compiler notes which headers it read. Those of the system and of torch are not among them.
    return [*command, "-MMD", "-MF", str(target.with_suffix(".d")), "-c", source, "-o", str(target)], target


def compile_if_stale(command: list[str], target: Path, torch_version: str) -> bool:
    """Compile what has changed since the object file was written: a source, a header of it, the command or torch."""
    stamp = target.with_suffix(".stamp")  # written last
    made_by = f"{shlex.join(command)}\n{torch_version}\n"
    if stamp.exists() and stamp.read_text() == made_by and not newer_inputs(target, stamp):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    begin = time.time()
    run(command)
    stamp.write_text(made_by)
    os.utime(stamp, (begin, begin))  # what is edited while the compiler runs is newer
    return True


def newer_inputs(target: Path, than: Path) -> bool:
    """Whether what target was compiled from has changed since, or is gone."""
    inputs = target.with_suffix(".d").read_text().replace("\\\n", " ").partition(":")[2].split()
    times = [(ROOT / name).stat().st_mtime if (ROOT / name).exists() else math.inf for name in inputs]
    return max(times, default=math.inf) >= than.stat().st_mtime


def compiler() -> list[str]:
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise CompileError("no C++ compiler found (looked for c++, g++ and clang++; CXX names another)")
    return [found]


def cuda_compiler() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc is neither in CUDA_HOME nor on the path")
    return nvcc


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} does not run: {error}") from None
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{shlex.join(command)}\n{error.stdout}") from None


class AnnouncePure(build_py):
    """Says once, in the one command that every kind of install runs, that there are no kernels."""

    def run(self) -> None:
        if is_pure():
            print("precisebn: a pure-Python install: PRECISEBN_PURE=1; PyTorch replaces the kernels", file=sys.stderr)
        super().run()
        if is_pure() and not self.editable_mode:
            note_why_not(Path(self.build_lib, "precisebn", "_C_cpu.so"), "PRECISEBN_PURE=1")


class PlainWheel(bdist_wheel):
    """Tags the wheel by what was built: nothing in it depends on the Python version."""

    def run(self) -> None:
        self.run_command("build")
        built = self.get_finalized_command("build_ext").get_outputs()
        self.root_is_pure = not any(Path(output).exists() for output in built)
        if self.root_is_pure:
            self.distribution.ext_modules = []  # else the files would go to where platform-dependent ones belong
        self.skip_build = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return ("py3", "none", "any" if self.root_is_pure else platform_tag)


if __name__ == "__main__":
    commands = {"build_py": AnnouncePure, "build_ext": BuildNative, "bdist_wheel": PlainWheel}
    setup(ext_modules=extensions(), cmdclass=commands)
