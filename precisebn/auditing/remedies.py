"""Calls that several remedies name: each runs as it is printed, with a loader of any length and a model in any mode."""

from collections.abc import Iterable

from precisebn.auditing.subject import Subject
from precisebn.models.families import is_frozen

__all__ = ["MEASURE", "adapt", "measure"]

MEASURE = "update_bn_stats(model, loader, None, modules='all')"


def measure(subject: Subject, layers: Iterable[str]) -> str:
    """The call that measures these layers anew.

    Args:
        subject: what is audited.
        layers: names; one of several populations may end in its number, ``"head.bn[1]"``.
    """
    return f"update_bn_stats(model, loader, None, modules={_which(subject, layers)!r})"


def adapt(subject: Subject, layers: Iterable[str]) -> str:
    """The call that adapts them to another domain."""
    return f"adapt_bn_stats(model, loader, modules={_which(subject, layers)!r})"


def _which(subject: Subject, layers: Iterable[str]) -> str:
    """The word that takes these layers: ``"all"`` passes frozen ones over."""
    return "*" if any(is_frozen(subject.modules[name.split("[")[0]]) for name in layers) else "all"
