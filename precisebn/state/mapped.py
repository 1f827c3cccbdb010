"""Files as memory: pages of a checkpoint that have been read are given back, so that memory does not grow with it.

What torch.load(mmap=True) and safetensors hand out are views of the file. Pages that have been touched count as this
process's memory until the mapping goes, and other processes would have to push them out. On Linux the system is told,
piece by piece, that they are done with; elsewhere nothing happens.
"""

import ctypes
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

__all__ = ["releaser"]


def releaser(path: Path) -> Callable[[Tensor], None] | None:
    """A function that gives back the pages of a tensor that lies in this file, which is mapped now, and of no other.

    None where the file is not mapped, or the system cannot be told.
    """
    mapped = _mapped(os.path.realpath(path))
    if not mapped:
        return None
    starts = [start for start, _ in mapped]
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def release(piece: Tensor) -> None:
        if not piece.is_contiguous() or not piece.nbytes:
            return
        begin, end = piece.data_ptr(), piece.data_ptr() + piece.nbytes
        index = bisect_right(starts, begin) - 1
        # Only what lies in the file wholly: anywhere else the values would be lost and not read again.
        if index >= 0 and end <= mapped[index][1]:
            begin -= begin % mmap.PAGESIZE
            madvise(begin, end - begin, mmap.MADV_DONTNEED)

    return release


def _mapped(path: str) -> list[tuple[int, int]]:
    """Where in memory the file lies, from the system's list of this process's mappings; sorted."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return []
    found = []
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == path:
            start, end = fields[0].split("-")
            found.append((int(start, 16), int(end, 16)))
    return sorted(found)
