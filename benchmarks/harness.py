"""What every benchmark shares: interleaved timing, the machine, goals, tables, plots and the results file.

A figure is only comparable with one taken beside it, so the contestants of one row run in turns, round by round, and
a ratio is taken within a round; what is reported is the median over rounds, with the quartiles.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import precisebn.ops

RESULTS = Path(__file__).with_name("results")
Result = dict[str, Any]
"""``{"name": str, "rows": [dict, ...], "summary": dict}``; goals lie in ``summary["goals"]``, see :func:`goal`."""


# ---- Timing -------------------------------------------------------------------------------------------------------


def clock() -> str:
    """Which clock contestants are timed by: ``"CPU time"`` with one thread, ``"wall time"`` with several.

    On an idle machine they agree for one thread, and CPU time is not disturbed by what else runs. With several threads
    it would count the waiting of threads for each other as work.
    """
    return "CPU time" if torch.get_num_threads() == 1 else "wall time"


def now() -> float:
    """Seconds by :func:`clock`, for differences."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleave(
    contestants: Mapping[str, Callable[[], float]], rounds: int, budget: float = float("inf"), least: int = 3
) -> dict[str, list[float]]:
    """Let contestants measure themselves in turns, the order rotating from round to round, after one warm-up round.

    Args:
        contestants: each does its work once and returns how long that took.
        rounds: how many rounds, at most.
        budget: seconds after which no further round starts.
        least: how many rounds there are whatever the budget.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + budget
    for name in names:
        contestants[name]()
    for turn in range(rounds):
        if turn >= least and time.perf_counter() > deadline:
            break
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(contestants[name]())
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, mid, high


def ratios(slower: Iterable[float], faster: Iterable[float]) -> list[float]:
    """How many times as fast the second is, round by round."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


# ---- The machine, and peers that need help to be imported -----------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Where and when a result was taken, as far as it bears on the figures."""
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock(),
        "wait policy": os.environ.get("OMP_WAIT_POLICY", "default").lower(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precisebn": str(precisebn.ops.backend()),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def describe(machine: Mapping[str, Any]) -> str:
    """One line about a machine."""
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']} with "
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


def torchvision_models() -> ModuleType:
    """``torchvision.models``, also beside a CPU build of torch for which torchvision has no compiled operators.

    torchvision registers fake kernels for its own operators when it is imported, and fails where they do not exist.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _kept.append(library)
        import torchvision
    models: ModuleType = torchvision.models
    return models


_kept: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


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


def refresh_readme(device: str) -> None:
    """Rewrite the part of README.md that shows the results of a device."""
    page = RESULTS.parent / "README.md"
    results = load_results(RESULTS / f"{device}.json")
    begin, end = f"<!-- begin {device} results -->", f"<!-- end {device} results -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no part between {begin!r} and {end!r}")
    parts = ["### Goals", markdown_table(goals_of(results))]
    for name, result in results.items():
        parts += [f"### {name}", markdown_table(result["rows"]), describe(result["machine"])]
        plot = RESULTS / f"{device}-{name}.png"
        if plot.exists():
            parts.append(f"![{name}](results/{plot.name})")
    page.write_text("\n\n".join([before + begin, *parts, end + after]))


def _plain(value: Any) -> Any:
    """What JSON does not know: scalars of torch and NumPy."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong into a result")
