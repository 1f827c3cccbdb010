"""Builds csrc/cuda for the CPU, each CUDA thread a fiber, and makes its operators callable. See README.md."""

import ctypes
import hashlib
import os
import platform
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch

from precisebn.ops.registry import OPERATORS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_emulation"

Patch = tuple[str, str, str]
"""A file below csrc, what is in it once, and what takes its place."""


class Mutation(NamedTuple):
    """A defect to put in: of the text in ``file`` that is there once, ``right`` becomes ``wrong``."""

    name: str
    file: str
    before: str
    right: str
    wrong: str
    after: str = ""

    def patch(self, number: int) -> Patch:
        """Both, one of them chosen when it runs: statements, or else expressions."""
        if self.right.endswith(";"):
            both = f"if (emulation::mutant({number})) {{ {self.wrong} }} else {{ {self.right} }}"
        else:
            both = f"(emulation::mutant({number}) ? {self.wrong} : {self.right})"
        return self.file, self.before + self.right + self.after, self.before + both + self.after


RACES = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-DEMULATION_RACES")
"""Calls the detector of races.h before every access. The linker is not told: the runtime is ours."""
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class Statistics(NamedTuple):
    """What the emulated device has done since it was loaded."""

    launches: int
    blocks: int
    switches: int
    barriers: int
    shuffles: int
    fences: int
    atomics: int
    accesses: int
    allocated: int
    freed: int
    invalidated: int


class Launch(NamedTuple):
    """What a launch has done: loads of 16 bytes and of fewer; the most by one thread, and those of partial results.

    And the most barriers that one block waits at.
    """

    kernel: str
    blocks: int
    threads: int
    fences: int
    wide_loads: int
    narrow_loads: int
    longest: int
    longest_merge: int
    barriers: int


def why_not() -> str:
    """Why the kernels cannot be emulated here, or an empty string."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulation's fibers are for x86-64 Linux"
    if compiler() is None:
        return "no g++"
    return ""


def compiler() -> str | None:
    return shutil.which("g++")


class Emulated:
    """The kernels of a library that :func:`build` has built: ``kernels.moments(x)`` as ``ops.raw.moments(x)``."""

    def __init__(self, library: Path, namespace: str) -> None:
        self.library = library
        self._definitions = torch.library.Library(namespace, "DEF")
        for operator in OPERATORS.values():
            name = operator.name if operator.derivative is None else f"_{operator.name}"
            self._definitions.define(name + operator.schema.removeprefix(operator.name))
        self._handle = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self.kernels = SimpleNamespace()
        for operator in OPERATORS.values():
            name = operator.name if operator.derivative is None else f"_{operator.name}"
            setattr(self.kernels, operator.name, getattr(getattr(torch.ops, namespace), name).default)
        self.set()

    def set(
        self,
        seed: int = 0,
        multiprocessors: int = 132,
        resident: int = 4,
        capturing: bool | Literal["elsewhere"] = False,
        stream: int = 0,
        device: int = 0,
        clusters: bool = True,
    ) -> None:
        """Set up device number ``device`` for the launches that follow.

        ``capturing``: their stream, or another. ``clusters``: whether the device has them.
        """
        what = 2 if capturing == "elsewhere" else int(capturing)
        numbers = (multiprocessors, resident, what, ctypes.c_uint64(stream), device, int(clusters))
        self._handle.emulation_set(ctypes.c_uint64(seed), *numbers)

    def fail(self, allocations: int = 0, memsets: int = 0) -> None:
        """Let the next so many allocations or memsets of the device fail."""
        self._handle.emulation_fail(allocations, memsets)

    def mutate(self, number: int) -> None:
        """Make the defect of that number active, of those that the library was built with; -1 for none."""
        self._handle.emulation_mutate(number)

    def defect(self, name: str) -> str:
        """Call a function ``name`` of a library's own test source, which returns what was wrong, or nothing."""
        function = getattr(self._handle, name)
        function.restype = ctypes.c_char_p
        message: bytes = function()
        return message.decode()

    def synchronize(self) -> None:
        """Order all launches so far before all that follow, whatever their streams."""
        self._handle.emulation_synchronize()

    def reset(self) -> None:
        """Make the device usable again when a launch has failed, as what it left behind has not been finished."""
        self._handle.emulation_reset()
        self.set()

    def statistics(self) -> Statistics:
        """Counts since the library was loaded."""
        counts = (ctypes.c_int64 * len(Statistics._fields))()
        self._handle.emulation_statistics(counts)
        return Statistics(*counts)

    def launches(self, call: Callable[[], object]) -> list[Launch]:
        """What ``call`` launches, in order."""
        self._handle.emulation_launches()
        call()
        work = (ctypes.c_int64 * (len(Launch._fields) - 1))()
        launch = self._handle.emulation_launch
        launch.restype = ctypes.c_char_p
        number = self._handle.emulation_launches()
        return [Launch(launch(ctypes.c_int64(i), work).decode(), *work) for i in range(number)]

    @contextmanager
    def during(self, **settings: Any) -> Iterator[None]:
        """The device set up otherwise for a while."""
        self.set(**settings)
        try:
            yield
        finally:
            self.set()


@cache
def load(
    flags: tuple[str, ...] = RACES, patches: tuple[Patch, ...] = (), sources: tuple[str, ...] = ("*",)
) -> Emulated:
    """Build the kernels, unless the same are there already, and load them into a namespace of their own."""
    library = build(flags, patches, sources)
    return Emulated(library, library.stem)


def sanitized_environment() -> dict[str, str]:
    """What a process needs in its environment to load a library that is built with :data:`SANITIZERS`."""
    # libstdc++ too: the sanitizer looks for it before Python has loaded anything that brings it.
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.check_output([str(compiler()), f"-print-file-name={n}"], text=True).strip() for n in names]
    options = "detect_leaks=0:detect_stack_use_after_return=0"  # Python leaks; fibers have no fake stacks
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}


def build(flags: Sequence[str], patches: Sequence[Patch] = (), sources: Sequence[str] = ("*",)) -> Path:
    """The library of csrc/cuda, or of those ``sources`` in it (patterns without a suffix), patched.

    Its name is that of its namespace of operators.
    """
    torch_folder = Path(torch.__file__).parent
    target = runpy.run_path(str(ROOT / "setup.py"))["TARGET_TORCH"]
    fma = ["-mfma", "-mf16c"] if " fma " in Path("/proc/cpuinfo").read_text() else []
    command = [
        str(compiler()), "-std=c++20", "-O1", "-g1", "-fPIC", *fma, "-ffp-contract=fast", "-fno-strict-aliasing",
        "-fvisibility=hidden", "-fno-gnu-unique", "-Wno-attributes", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={target}",
    ]  # fmt: skip
    files = {path: transformed(path, text) for path, text in patched(patches).items()}
    files["cuda/defects.cu"] = transformed("cuda/defects.cu", (HERE / "defects.cu").read_text())
    own = {path.name: path.read_bytes() for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("**/*.h")])}
    digest = hashlib.sha256(repr((command, flags, sources, files, own, torch.__version__)).encode()).hexdigest()
    namespace = f"precisebn_emulated_{digest[:16]}"
    folder = CACHE / digest[:16]
    library = folder / f"{namespace}.so"
    if library.exists():
        return library
    for path, text in files.items():
        to = folder / "csrc" / path
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    wanted = [path for pattern in sources for path in sorted((folder / "csrc").glob(f"**/{pattern}.c*"))]
    includes = [f"-I{HERE}/include", "-isystem", f"{torch_folder}/include", f"-I{folder}/csrc/cuda"]
    kernel = [*command, *flags, *includes, "-include", f"{HERE}/include/prelude.h"]
    kernel += [f"-DEMULATED_NAMESPACE={namespace}", "-x", "c++"]
    # The runtime itself is not checked for races, but has to know that the kernels are.
    plain = [flag for flag in flags if "thread" not in flag and "tsan" not in flag]
    jobs = [(kernel, path) for path in wanted]
    jobs += [([*command, *plain, *includes, "-I", str(HERE)], path) for path in sorted(HERE.glob("*.cpp"))]

    def compile_one(job: tuple[list[str], Path]) -> str:
        compile_command, path = job
        to = folder / f"{path.stem}.o"
        run([*compile_command, "-c", str(path), "-o", str(to)])
        return str(to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    partial = folder / f"partial-{os.getpid()}.so"
    linked = [flag for flag in flags if flag.startswith("-fsanitize=address")]
    link = [str(compiler()), "-shared", *linked, *objects, "-o", str(partial), "-Wl,-Bsymbolic"]
    run([*link, f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"])
    partial.rename(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def patched(patches: Sequence[Patch]) -> dict[str, str]:
    """The sources, by their path below csrc."""
    csrc = ROOT / "csrc"
    paths = [*csrc.glob("*.h"), *csrc.glob("*.cpp"), *csrc.glob("cuda/*")]
    files = {str(path.relative_to(csrc)): path.read_text() for path in sorted(paths)}
    for name, old, new in patches:
        if files[name].count(old) != 1:
            raise ValueError(f"{name} has {files[name].count(old)} times, not once: {old!r}")
        files[name] = files[name].replace(old, new)
    return files


def transformed(path: str, text: str) -> str:
    """CUDA's own syntax as C++: launches, and variables in shared memory. Lines stay where they are."""
    if not path.startswith("cuda/"):
        return text
    text = re.sub(
        r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(emulation::dynamic_shared());",
        text,
    )
    text = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[\w+\])*);",
        r"static char site_of_\2; auto& \2 = *static_cast<std::type_identity_t<\1\3>*>("
        r"emulation::static_shared(&site_of_\2, sizeof(std::type_identity_t<\1\3>)));",
        text,
    )
    text = re.sub(
        r"(\w+)(<[\w, ]+>)?\s*<<<(.*?)>>>\(",
        r"emulation::launch(EMULATION_NAME(\1), emulation::Configuration(\3), [](const auto&... a) { \1\2(a...); })(",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"cudaLaunchKernelEx\(&(\w+), (\w+)(<[\w, ]+>)?,",
        r"emulation::launch_with(EMULATION_NAME(\2), &\1, [](const auto&... a) { \2\3(a...); },",
        text,
    )
    # The instructions of PTX that kernels use: the barrier of a cluster, a load from another block's shared memory, and
    # an atomic that says what it orders.
    text = re.sub(
        r'asm volatile\(\s*"barrier\.cluster\.arrive\.release\.aligned;\\n\\t"\s*'
        r'"barrier\.cluster\.wait\.acquire\.aligned;"\s*::\s*: "memory"\);',
        "emulation::cluster_barrier();",
        text,
    )
    text = re.sub(
        r'asm volatile\(\s*"\{.*?mapa\.shared::cluster\.u32 there, %2, %3;.*?ld\.shared::cluster\.v2\.f64 \{%0, %1\}, '
        r'\[there\];.*?__cvta_generic_to_shared\((\w+)\)+, "r"\((\w+)\)\s*: "memory"\);',
        r"value = *static_cast<const double2*>(emulation::of_rank(\1, \2));",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r'asm volatile\("atom\.(\w+)\.gpu\.global\.inc\.u32 %0, \[%1\], %2;"\s*: "=r"\((\w+)\)\s*'
        r': "l"\(__cvta_generic_to_global\((\w+)\)\), "r"\((\w+)\)\s*: "memory"\);',
        r"\2 = atomicInc(\3, \4, emulation::Order::\1);",
        text,
    )
    if left := re.search(r"__shared__|<<<|asm volatile", text):
        raise ValueError(f"{path}: {left[0]} in a form that the emulation does not know")
    return text
