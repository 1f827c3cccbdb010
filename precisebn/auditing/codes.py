"""The table of all checks, in Markdown: what docs/audit.md shows. ``python -m precisebn.auditing.codes`` renews it."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from precisebn.auditing.check import Check
from precisebn.auditing.checks import CHECKS
from precisebn.auditing.copies import COPY_CHECKS

__all__ = ["BEGIN", "END", "all_checks", "code_table", "renewed"]

BEGIN, END = "<!-- codes -->\n", "<!-- end of codes -->\n"
"""What stands before the table on the page, and behind it."""


def all_checks() -> list[Check]:
    """Every check of :func:`precisebn.audit` and of :func:`precisebn.check_copy`, once, in the order of codes."""
    return sorted({one.code: one for one in (*CHECKS, *COPY_CHECKS)}.values(), key=lambda one: one.code)


def code_table(checks: Iterable[Check]) -> str:
    """One line for each check.

    Example:
        >>> print(code_table(all_checks()[:1]))  # doctest: +ELLIPSIS
        | code | severity | what it looks for | needs | source |
        |---|---|---|---|---|
        | PBN101 | error | frozen parameters, live running statistics |  | [pytorch #86590](https:...) |
    """
    rows = ["| code | severity | what it looks for | needs | source |", "|---|---|---|---|---|"]
    for one in checks:
        needs = ", ".join(f"`{'copy_optimizer' if name == 'other_optimizer' else name}=`" for name in one.needs)
        rows.append(f"| {one.code} | {one.severity} | {one.title} | {needs} | {_link(one.source)} |")
    return "\n".join(rows)


def renewed(page: str) -> str:
    """The page with the table as it is now."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{code_table(all_checks())}\n\n{END}{tail}"


def _link(source: str) -> str:
    """A source as a link with a short name; of a paper, the arXiv number in it."""
    if not source.startswith("https://"):
        return re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    parts = source.removeprefix("https://").split("/")
    if parts[0] == "github.com" and len(parts) == 5:
        return f"[{parts[2]} #{parts[4]}]({source})"
    return f"[{parts[-1].partition('#')[0].removesuffix('.html')}]({source})"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/audit.md")
    path.write_text(renewed(path.read_text()))
