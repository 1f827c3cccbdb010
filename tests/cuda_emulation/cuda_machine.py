"""What the tests of the CUDA kernels run on: a GPU, or without one its emulation on the CPU (tests/cuda_emulation).

The same cases serve both. They call the operators through ``raw`` and put tensors on ``DEVICE``. The emulation takes
its time and is thorough where a GPU is not, so it runs a share of the cases (emulated_share.py); with
``PRECISEBN_EMULATE=all`` all of them, and also where there is a GPU.
"""

import os
import zlib
from typing import Any

import emulated_library
import pytest
import torch
from emulated_library import Emulated, Patch

from precisebn.ops import raw as native

__all__ = ["DEVICE", "EMULATED", "ONLY_FLOAT32", "ONLY_FLOAT32_AND_BFLOAT16", "needs_gpu", "raw", "set_up", "why_not"]

EMULATED = not torch.cuda.is_available() or os.environ.get("PRECISEBN_EMULATE") == "all"
DEVICE = "cpu" if EMULATED else "cuda"

DOUBLE = "    case ScalarType::Double:\n      return f(double{});\n"
HALF = "    case ScalarType::Half:\n      return f(__half{});\n"
BFLOAT16 = "    case ScalarType::BFloat16:\n      return f(__nv_bfloat16{});\n"
TENSORS = "cuda/tensors.h"
# Types that a library is built without, which takes as much less time to compile as there are fewer.
ONLY_FLOAT32: tuple[Patch, ...] = ((TENSORS, DOUBLE, ""), (TENSORS, HALF, ""), (TENSORS, BFLOAT16, ""))
ONLY_FLOAT32_AND_BFLOAT16 = ONLY_FLOAT32[:2]


def emulated() -> Emulated:
    """The emulated device, built when it is first asked for."""
    if os.environ.get("PRECISEBN_EMULATE") == "sanitizers":
        return emulated_library.load(emulated_library.SANITIZERS, ONLY_FLOAT32_AND_BFLOAT16)
    return emulated_library.load()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class _Raw:
    """The operators as kernels; those that are emulated are built when the first is called."""

    def __getattr__(self, name: str) -> Any:
        return getattr(emulated().kernels if EMULATED else native, name)


raw = _Raw()


def why_not() -> str:
    """Why there is nothing to run the kernels on, or an empty string."""
    return emulated_library.why_not() if EMULATED else ""


def set_up(test: str) -> None:
    """Give each test an emulated device of its own: another order of threads, another number of multiprocessors."""
    if not EMULATED:
        return
    number = zlib.crc32(test.encode())
    emulated().set(
        seed=number,
        multiprocessors=(1, 16, 132)[number % 3],
        resident=1 + number // 3 % 4,
        capturing=number % 5 == 0,
        clusters=number % 7 > 0,
    )
