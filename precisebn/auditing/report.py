"""AuditReport: what an audit has found, and what it could not look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from precisebn.auditing.finding import SEVERITIES, Finding, Severity
from precisebn.errors import PreciseBNError

__all__ = ["AuditError", "AuditReport"]


class AuditError(PreciseBNError):
    """An audit has found something as grave as :meth:`AuditReport.raise_if` does not let pass."""


@dataclass(frozen=True, slots=True, repr=False)
class AuditReport:
    """The findings of :func:`precisebn.audit`, gravest first. ``str()`` is a table; true where there are any.

    Attributes:
        findings: what was found.
        not_run: checks that were not run, by code, with the reason: an argument that was not given, or something that
            could not be observed.
    """

    findings: tuple[Finding, ...]
    not_run: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def at_least(self, severity: Severity) -> list[Finding]:
        """The findings that are as grave as this, or graver."""
        return [one for one in self.findings if SEVERITIES.index(one.severity) >= SEVERITIES.index(severity)]

    def raise_if(self, severity: Severity = "error") -> None:
        """Raise where anything as grave as this was found, for a test suite.

        Raises:
            AuditError: with the table of these findings.
        """
        if found := self.at_least(severity):
            raise AuditError(f"{len(found)} finding(s):\n{AuditReport(tuple(found), {})}")

    def to_dict(self) -> dict[str, Any]:
        """All of it, in what JSON knows."""
        return {"findings": [one.to_dict() for one in self.findings], "not_run": dict(self.not_run)}

    def __str__(self) -> str:
        lines = [
            f"{one.code} {one.severity}: {', '.join(one.layers)}: {one.what} {one.remedy}" for one in self.findings
        ]
        return "\n".join(lines) or "nothing found"

    __repr__ = __str__
