"""Where and when a result was taken, as far as it bears on the figures."""

import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import precisebn.ops
from benchmarks.harness.inputs import cache_bytes
from benchmarks.harness.timing import clock

DEVICES = ("cpu", "cuda")
ENVIRONMENT = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "GOMP_", "KMP_"))}
"""The variables by which the caller has changed how threads run; empty in the environment that users have by default.

Taken before peers are imported, some of which set others, too late to change anything.
"""


def machine(device: str) -> dict[str, Any]:
    """Where and when a result was taken, as far as it bears on the figures."""
    found = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock(device),
        "environment": ENVIRONMENT,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precisebn": str(precisebn.ops.backend()),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, {cache_bytes(device) / 1e6:.0f} MB of L2",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def describe(machine: Mapping[str, Any]) -> str:
    """One line about a machine."""
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, " if "gpu" in machine else ""
    return (
        f"{machine['date']}, {gpu}{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']} with "
        f"{machine['threads']} threads ({_environment_in_words(machine)}), {machine['clock']}, "
        f"load average {machine['load']} at the start, precisebn on {machine['precisebn']}"
    )


def page_faults() -> int:
    """How many pages of memory the system has handed this process so far; 0 where it does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _environment_in_words(machine: Mapping[str, Any]) -> str:
    if "environment" not in machine:  # a result of before these were kept
        return f"OpenMP wait policy {machine['wait policy']}"
    set_ = " ".join(f"{name}={value}" for name, value in machine["environment"].items())
    return set_ or "default environment"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
