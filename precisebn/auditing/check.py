"""Check: a function that looks for one mistake, and what is to be said of it wherever it is found."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from precisebn.auditing.finding import Finding, Severity
from precisebn.auditing.subject import Subject

__all__ = ["Check", "Problem", "check"]


class Problem(NamedTuple):
    """What is particular to one finding of a check."""

    what: str
    """One sentence of what happens."""
    remedy: str
    """One sentence with the call to make."""
    layers: Sequence[str] = ()
    """Qualified names of the layers that it is about."""
    severity: Severity | None = None
    """Where it is another than the check's."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check: its rule, and the function that finds where it is broken.

    Attributes:
        code: its stable name; never given to another check, and never changed.
        severity: of its findings.
        title: what it looks for, in a few words.
        source: where the mistake is known from.
        needs: which arguments of :func:`precisebn.audit` it cannot do without.
        look: yields a problem for each mistake of its kind.
    """

    code: str
    severity: Severity
    title: str
    source: str
    needs: tuple[str, ...]
    look: Callable[[Subject], Iterable[Problem]]

    def findings(self, subject: Subject) -> list[Finding]:
        """What it finds.

        Raises:
            Unobservable: what it has to see cannot be seen, with the reason.
        """
        return [
            Finding(self.code, p.severity or self.severity, self.title, tuple(p.layers), p.what, p.remedy, self.source)
            for p in self.look(subject)
        ]


def check(
    code: str, severity: Severity, title: str, *, source: str, needs: Sequence[str] = ()
) -> Callable[[Callable[[Subject], Iterable[Problem]]], Check]:
    """Make a check of a function, see :class:`Check`.

    Example:
        >>> @check("PBN999", "note", "no layers", source="nowhere")
        ... def no_layers(subject):
        ...     if not subject.norms:
        ...         yield Problem("the model has no BatchNorm layer.", "add one.")
        >>> no_layers.code
        'PBN999'
    """

    def decorate(look: Callable[[Subject], Iterable[Problem]]) -> Check:
        return Check(code, severity, title, source, tuple(needs), look)

    return decorate
