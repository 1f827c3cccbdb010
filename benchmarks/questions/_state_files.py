"""One comparison of two files in a process of its own, for :mod:`benchmarks.questions.state`: its time, and its memory.

    python -m benchmarks.questions._state_files CONTESTANT SMALL BEFORE AFTER

prints ``{"seconds": ..., "peak": ...}``, bytes beyond what the process held when it began. What is loaded once is
loaded before, on a small file of the same format.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import precisebn

BLOCK = 16 << 20


def _ours(before: str, after: str) -> None:
    precisebn.diff_state(before, after)


def _read(before: str, after: str) -> None:
    """Every byte of both files, in blocks."""
    block = memoryview(bytearray(BLOCK))
    for path in (before, after):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _equal(before: str, after: str) -> None:
    """torch.equal of one tensor after the other."""
    for a, b in _tensors(before, after):
        torch.equal(a, b)


def _plain_numbers(before: str, after: str) -> None:
    """What one writes: the largest difference and the root mean square, in float64, of one tensor after the other."""
    for a, b in _tensors(before, after):
        if not torch.equal(a, b):
            d = b.double() - a.double()
            d.abs().max(), d.square().mean().sqrt()


def _tensors(before: str, after: str) -> Iterator[tuple[Tensor, Tensor]]:
    if before.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(before, framework="pt") as a, safe_open(after, framework="pt") as b:
            for name in a.keys():  # noqa: SIM118
                yield a.get_tensor(name), b.get_tensor(name)
    else:
        olds, news = (torch.load(path, mmap=True, weights_only=True) for path in (before, after))
        for name in olds:
            yield olds[name], news[name]


CONTESTANTS: dict[str, Callable[[str, str], None]] = {
    "precisebn": _ours,
    "plain read": _read,
    "torch.equal": _equal,
    "plain float64": _plain_numbers,
}


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Measure one contestant."""
    contestant, small, before, after = sys.argv[1:]
    work = CONTESTANTS[contestant]
    work(small, small)
    held = _kib("VmRSS")
    start = time.perf_counter()
    work(before, after)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": (_kib("VmHWM") - held) << 10}))


if __name__ == "__main__":
    main()
