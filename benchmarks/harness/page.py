"""Tables on the terminal, and the page README.md, which shows the latest results of each device."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness.machine import DEVICES, describe
from benchmarks.harness.question import module_of, questions
from benchmarks.harness.results import RESULTS, Result, goals_of, load_results


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


# ---- The page --------------------------------------------------------------------------------------------------------


def refresh_readme() -> None:
    """Rewrite the parts of README.md that follow from the code and from the latest results of each device."""
    path = RESULTS.parent / "README.md"
    text = _with_part(path.read_text(), "benchmarks", [markdown_table(_index())])
    for device in DEVICES:
        text = _with_part(text, f"{device} results", _shown(device))
    path.write_text(text)


def _with_part(text: str, name: str, paragraphs: Sequence[str]) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"README.md has no part between {begin!r} and {end!r}")
    return "\n\n".join([before + begin, *paragraphs, end + after])


def _index() -> list[dict[str, str]]:
    return [
        {
            "benchmark": f"`{name}`",
            "question": question.asks,
            "against": question.against,
            "device": "both" if question.devices == DEVICES else ", ".join(map(str.upper, question.devices)),
        }
        for name, question in questions().items()
    ]


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
    benchmark = module_of(name)
    return benchmark.page(result) if hasattr(benchmark, "page") else {"": result["rows"]}


def notes_of(result: Result) -> list[tuple[str, Any]]:
    """What a summary says besides goals."""
    return [(key, value) for key, value in result["summary"].items() if key != "goals" and value != ""]
