"""How many parallel regions a mini-batch opens, counted in a process of its own.

On a busy machine the time of a small network is that of its regions: at the end of each, threads wait for the last of
them, which waits for a core. Times there are chance, by a factor of ten; the number of regions is none. They are
counted where torch enters them, in libgomp's ``GOMP_parallel``, by a library of a few lines that is loaded before.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import precisebn
from benchmarks.peers import installed

__all__ = ["count_regions"]

NETWORKS = ("resnet18", "shufflenet_v2_x1_0", "mobilenet_v2")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
BATCH = (8, 3, 64, 64)

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
static long regions;
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
  __sync_fetch_and_add(&regions, 1);
  ((Parallel)dlsym(RTLD_NEXT, "GOMP_parallel"))(work, data, threads, flags);
}
long regions_so_far(void) { return regions; }
"""
LIBRARY = "PRECISEBN_BENCHMARK_REGIONS"
"""The environment variable by which the counting process finds the library."""


def count_regions(quick: bool = False) -> list[dict[str, Any]] | str:
    """A row for each network and layout; or why there are none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return "not counted: that takes Linux and a C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "regions.c", Path(folder) / "regions.so"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)}
        networks = NETWORKS[:1] if quick else NETWORKS
        done = subprocess.run(
            [sys.executable, "-m", __name__, *networks], env=environment, check=True, capture_output=True, text=True
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows if rows and rows[0]["regions"] else "not counted: torch's threads are not those of libgomp"


class _Regions:
    """The regions that a recalibration opens for a mini-batch, set-up and finishing left out."""

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        self.model, self.batch = model, batch
        self.library = ctypes.CDLL(os.environ[LIBRARY])

    def of(self, update: Any) -> float:
        """The difference that three mini-batches more make."""
        found = []
        for batches in (1, 1, 4):  # the first call sets up what is set up once
            before = self.library.regions_so_far()
            update(self.model.train(), [self.batch] * batches, batches)
            found.append(self.library.regions_so_far() - before)
        return float(found[2] - found[1]) / 3


def _forward(model: nn.Module, batches: list[Tensor], number: int) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


def _main(networks: list[str]) -> None:
    torch.set_num_threads(2)
    models, fvcore = installed("torchvision.models"), installed("fvcore.nn")
    rows = []
    for name in networks if models is not None else []:
        for layout, memory_format in LAYOUTS.items():
            model = getattr(models, name)().to(memory_format=memory_format)
            regions = _Regions(model, torch.randn(BATCH).contiguous(memory_format=memory_format))
            row: dict[str, Any] = {"what": f"parallel regions of a mini-batch, {name} {layout}"}
            row |= {"shape": "x".join(map(str, BATCH)), "regions": regions.of(precisebn.update_bn_stats)}
            if fvcore is not None:
                row["fvcore's"] = regions.of(fvcore.update_bn_stats)
            rows.append(row | {"the forward's": regions.of(_forward)})
    print(json.dumps(rows))


if __name__ == "__main__":
    _main(sys.argv[1:])
