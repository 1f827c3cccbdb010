"""What every benchmark shares beside timing: the machine, goals, tables, results, and the page that shows them."""

import importlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import precisebn.ops
from benchmarks.inputs import cache_bytes
from benchmarks.timing import clock

RESULTS = Path(__file__).with_name("results")
DEVICES = ("cpu", "cuda")
Result = dict[str, Any]
"""``{"name": str, "rows": [dict, ...], "summary": dict}``; goals lie in ``summary["goals"]``, see :func:`goal`."""


# ---- The machine ----------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Where and when a result was taken, as far as it bears on the figures."""
    found = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock(device),
        "wait policy": os.environ.get("OMP_WAIT_POLICY", "default").lower(),
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
        f"{machine['threads']} threads (OpenMP wait policy {machine['wait policy']}), {machine['clock']}, "
        f"load average {machine['load']} at the start, precisebn on {machine['precisebn']}"
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---- Goals and tables -----------------------------------------------------------------------------------------------


def goal(what: str, measured: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """One goal of the project beside what was measured, for ``summary["goals"]``."""
    if at_least is not None:
        return {"what": what, "goal": f">= {at_least:g}", "measured": measured, "met": bool(measured >= at_least)}
    if at_most is not None:
        return {"what": what, "goal": f"<= {at_most:g}", "measured": measured, "met": bool(measured <= at_most)}
    raise ValueError("a goal needs at_least or at_most")


def format_value(value: Any) -> str:
    """A figure with the digits that it deserves."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e5:
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:.1e}"
    if isinstance(value, list | tuple):
        return " to ".join(format_value(item) for item in value)
    return "" if value is None else str(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys of all rows, in order of appearance; keys that start with ``_`` are for plots only."""
    return list(dict.fromkeys(key for row in rows for key in row if not key.startswith("_")))


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One table of a benchmark, on the terminal."""
    table = Table(title=title, title_justify="left")
    names = columns(rows)
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | list | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(format_value(row.get(name)) for name in names))
    console.print(table)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for a page."""
    names = columns(rows)
    lines = [names, ["---"] * len(names), *([format_value(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- Results -------------------------------------------------------------------------------------------------------


def load_results(path: Path) -> dict[str, Result]:
    """The results in a file, by benchmark; none if there is no such file."""
    if not path.exists():
        return {}
    results: dict[str, Result] = json.loads(path.read_text())["benchmarks"]
    return results


def save_results(path: Path, results: Mapping[str, Result]) -> None:
    """Write results, keeping those of other benchmarks that the file already holds: each names its own machine."""
    merged = {**load_results(path), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmarks": merged}, indent=1, default=_plain) + "\n")


def goals_of(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Every goal of every benchmark, for a table; with a digit more, so that a near miss shows as one."""
    return [
        {"benchmark": name, **entry, "measured": f"{entry['measured']:.4g}"}
        for name, result in results.items()
        for entry in result["summary"].get("goals", [])
    ]


def refresh_readme() -> None:
    """Rewrite the parts of README.md that show the latest results of each device."""
    path = RESULTS.parent / "README.md"
    text = path.read_text()
    for device in DEVICES:
        begin, end = f"<!-- begin {device} results -->", f"<!-- end {device} results -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{path} has no part between {begin!r} and {end!r}")
        text = "\n\n".join([before + begin, *_shown(device), end + after])
    path.write_text(text)


def _shown(device: str) -> list[str]:
    results = load_results(RESULTS / f"{device}.json")
    if not results:
        return [f"Not run yet: there is no results/{device}.json."]
    parts = ["#### Goals", markdown_table(goals_of(results))]
    for name, result in results.items():
        parts.append(f"#### {name}")
        for title, rows in tables_of(name, result).items():
            parts += [f"{title}:", markdown_table(rows)] if title else [markdown_table(rows)]
        parts += [f"{key}: {format_value(value)}" for key, value in notes_of(result)]
        parts.append(describe(result["machine"]))
        plot = RESULTS / f"{device}-{name}.png"
        if plot.exists():
            parts.append(f"![{name}](results/{plot.name})")
    return parts


def tables_of(name: str, result: Result) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The tables for the page, by title: those that the benchmark makes of its result, or else its rows."""
    benchmark = importlib.import_module(f"benchmarks.{name}")
    return benchmark.page(result) if hasattr(benchmark, "page") else {"": result["rows"]}


def notes_of(result: Result) -> list[tuple[str, Any]]:
    """What a summary says besides goals."""
    return [(key, value) for key, value in result["summary"].items() if key != "goals" and value != ""]


def _plain(value: Any) -> Any:
    """What JSON does not know: scalars of torch and NumPy."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong into a result")
