"""What a benchmark finds: its goals, and the file that keeps rows, summary and machine for the page and the plots."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Result = dict[str, Any]
"""``{"rows": [dict, ...], "summary": dict}``; goals lie in ``summary["goals"]``, see :func:`goal`."""


def goal(what: str, measured: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """One goal of the project beside what was measured, for ``summary["goals"]``."""
    if at_least is not None:
        return {"what": what, "goal": f">= {at_least:g}", "measured": measured, "met": bool(measured >= at_least)}
    if at_most is not None:
        return {"what": what, "goal": f"<= {at_most:g}", "measured": measured, "met": bool(measured <= at_most)}
    raise ValueError("a goal needs at_least or at_most")


def load_results(path: Path) -> dict[str, Result]:
    """The results in a file, by benchmark; none if there is no such file."""
    if not path.exists():
        return {}
    results: dict[str, Result] = json.loads(path.read_text())["benchmarks"]
    return results


def save_results(path: Path, results: Mapping[str, Result]) -> None:
    """Write results, keeping those of other benchmarks that the file already holds: each names its own machine.

    A row is a line, a figure has nine digits, and no samples: the page and the plots need medians and quartiles.
    """
    merged = {**load_results(path), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")  # where the run may be stopped at any time, on a GPU that is lent
    partial.write_text(_lines({"benchmarks": merged}) + "\n")
    partial.replace(path)


def _lines(value: Any, depth: int = 0) -> str:
    """As JSON of which a row, or a goal, is a line."""
    indent = " " * (depth + 1)
    if isinstance(value, Mapping) and depth < 4:
        return "{\n" + ",\n".join(f"{indent}{_line(key)}: {_lines(value[key], depth + 1)}" for key in value) + "}"
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return "[\n" + ",\n".join(indent + _line(item) for item in value) + "]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False)


def goals_of(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Every goal of every benchmark, for a table; with a digit more, so that a near miss shows as one."""
    return [
        {"benchmark": name, **entry, "measured": f"{entry['measured']:.4g}"}
        for name, result in results.items()
        for entry in result["summary"].get("goals", [])
    ]


def _rounded(value: Any) -> Any:
    """Floats to nine digits, wherever they lie; scalars of torch and NumPy as Python's."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return float(f"{value:.9g}") if isinstance(value, float) else value
