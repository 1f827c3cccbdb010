"""AuditReport: what an audit has found, and what it could not look at; as a table, in plain text or by rich."""

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from precisebn._reports import by_reason, counted
from precisebn.auditing.finding import SEVERITIES, Finding, Severity
from precisebn.auditing.grouping import grouped
from precisebn.errors import AuditError, InputError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["AuditReport"]


@dataclass(frozen=True, slots=True, repr=False)
class AuditReport:
    """The findings of :func:`precisebn.audit`, gravest first. ``str()`` is a table; true where there are any.

    ``rich.print(report)`` shows the table with colours. ``report["PBN101"]`` are the findings of one check, and
    ``"PBN101" in report`` says whether there are any.

    Attributes:
        findings: what was found.
        not_run: checks that were not run, by code, with the reason: an argument that was not given, or something that
            could not be observed.
        passed: codes of the checks that were run and have found nothing.

    Example:
        >>> import precisebn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> model[0].running_var[1] = float("nan")
        >>> report = precisebn.audit(model)
        >>> "PBN201" in report, report["PBN201"][0].layers, report["PBN202"]
        (True, ('0',), ())
        >>> report.raise_if("error")
        Traceback (most recent call last):
        precisebn.errors.AuditError: 1 finding that is an error:
        ...
    """

    findings: tuple[Finding, ...]
    not_run: dict[str, str]
    passed: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __contains__(self, code: object) -> bool:
        """Whether the check of this code has found something."""
        return any(one.code == code for one in self.findings)

    def __getitem__(self, code: str) -> tuple[Finding, ...]:
        """What the check of this code has found; empty where it has found nothing.

        Raises:
            KeyError: there is no such check, or it was not run; the message says which, and why.
        """
        found = tuple(one for one in self.findings if one.code == code)
        if found or code in self.passed:
            return found
        if code in self.not_run:
            raise KeyError(f"{code} was not run: {self.not_run[code]}")
        run = {*self.passed, *self.not_run, *(one.code for one in self.findings)}
        near = get_close_matches(str(code), sorted(run), n=1)
        raise KeyError(f"no check {code!r} was asked for" + (f"; did you mean {near[0]!r}?" if near else ""))

    def at_least(self, severity: Severity) -> list[Finding]:
        """The findings that are as grave as this, or graver.

        Raises:
            InputError: not a severity.
        """
        if severity not in SEVERITIES:
            raise InputError(f"severity {severity!r} must be one of {', '.join(map(repr, SEVERITIES))}")
        return [one for one in self.findings if SEVERITIES.index(one.severity) >= SEVERITIES.index(severity)]

    def raise_if(self, severity: Severity = "error") -> None:
        """Raise where anything as grave as this was found: one line for a test suite.

        Raises:
            AuditError: with the table of these findings.
            InputError: not a severity.
        """
        if found := self.at_least(severity):
            graver = "" if severity == SEVERITIES[-1] else " or graver"
            article = "an" if severity == "error" else "a"
            which = f"finding that is {article} {severity}" if len(found) == 1 else f"findings that are {severity}s"
            table = "\n".join(_table(tuple(found), _width()))  # whose headline would count these checks alone
            raise AuditError(f"{len(found)} {which}{graver}:\n{table}")

    def to_dict(self) -> dict[str, Any]:
        """All of it, in what JSON knows."""
        return {
            "findings": [one.to_dict() for one in self.findings],
            "not_run": dict(self.not_run),
            "passed": list(self.passed),
        }

    def __repr__(self) -> str:
        """One line: the table is what ``print`` shows."""
        return f"<AuditReport: {self._headline()}>"

    def __str__(self) -> str:
        width = _width()
        return "\n".join([self._headline(), *_table(self.findings, width), *self._remarks(width)])

    def __rich__(self) -> "Table":
        """What rich prints."""
        from rich.table import Table  # there where it asks
        from rich.text import Text

        colours = {"note": "cyan", "warning": "yellow", "error": "bold red"}
        table = Table(title=self._headline(), caption="\n".join(self._remarks(100)) or None, show_lines=True)
        for name in _COLUMNS:
            table.add_column(name, overflow="fold")  # not cut: remedies are there to be copied
        for one in self.findings:
            cells = [Text(cell) for cell in _cells(one)]
            cells[0].stylize(colours[one.severity])
            table.add_row(*cells)
        return table

    def _headline(self) -> str:
        counts = {severity: sum(one.severity == severity for one in self) for severity in reversed(SEVERITIES)}
        shown = ", ".join(counted(n, name) for name, n in counts.items() if n)
        run = len({one.code for one in self.findings}) + len(self.passed)
        return (shown or "nothing found") + (f" ({counted(run, 'check')})" if run else "")

    def _remarks(self, width: int) -> list[str]:
        lines = [f"not run: {', '.join(codes)}: {reason}" for reason, codes in by_reason(self.not_run).items()]
        return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="  ")]


def _width() -> int:
    """Of the terminal, within reason."""
    return min(max(shutil.get_terminal_size((120, 24)).columns, 60), 160)


_COLUMNS = ("severity", "code", "where", "what happens, and what to do")


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    return finding.severity, finding.code, "\n".join(grouped(finding.layers)), f"{finding.what}\n-> {finding.remedy}"


def _table(findings: tuple[Finding, ...], width: int) -> list[str]:
    """Aligned columns, of which the last two are wrapped to the width."""
    if not findings:
        return []
    rows = [_cells(one) for one in findings]
    narrow = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in (0, 1)]
    longest = max((len(line) for row in [_COLUMNS, *rows] for line in row[2].split("\n")), default=0)
    where = min(longest, width // 3)
    text = width - sum(narrow) - where - 3 * 2
    lines = []
    for row in [_COLUMNS, *rows]:
        columns = [[row[0]], [row[1]], _wrapped(row[2], where), _wrapped(row[3], text)]
        for i in range(max(map(len, columns))):
            cells = [column[i] if i < len(column) else "" for column in columns]
            padded = (f"{cell:<{w}}" for cell, w in zip(cells, [*narrow, where, 0], strict=True))
            lines.append("  ".join(padded).rstrip())
    return lines


def _wrapped(cell: str, width: int) -> list[str]:
    """The lines of a cell; a name that is longer than the column breaks."""
    lines = []
    for line in cell.split("\n"):
        indent = "   " if line.startswith("-> ") else ""
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return lines
