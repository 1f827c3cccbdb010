"""Names that two states have in common, whatever wrappers have put in front of those of either."""

from collections.abc import Callable
from itertools import product

from torch import Tensor

from precisebn.errors import InputError
from precisebn.models.selection import WRAPPER_COMPONENTS
from precisebn.state.entries import Entry, State

__all__ = ["Side", "aligned", "check_common"]


class Side:
    """The entries of a state under names that meet those of the other side."""

    def __init__(self, state: State, prefix: str, rename: Callable[[str], str]) -> None:
        self.rename, self.prefix, self.release = rename, prefix, state.release
        self.entries = {rename(name): entry for name, entry in state.entries.items()}
        statistics = (entry.statistic for entry in self.entries.values())
        self.knows_eps = any(one is not None and one.eps is not None for one in statistics)

    def names(self, entry: Entry) -> list[str]:
        """All names of an entry."""
        return [self.rename(name) for name in entry.names]

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name."""
        entry = self.entries.get(name)
        found = entry.load() if entry is not None else None
        return found if isinstance(found, Tensor) else None

    def notes(self, state: State) -> list[str]:
        """What was set aside in names."""
        side = "a model" if state.whole else "a state dict"
        return [f"names of {side} are compared without {self.prefix!r}"] if self.prefix else []


def aligned(before: State, after: State) -> tuple[Side, Side]:
    """Both sides under the names that have most in common; where that is a tie, as little renamed as can be.

    What DDP puts in front of names, ``module.``, may be a user's own name as well: the other side tells.
    """
    plain = Side(before, *_RENAMINGS[0]), Side(after, *_RENAMINGS[0])
    if _common(*plain) == min(len(before.entries), len(after.entries)):
        return plain
    befores, afters = (
        [Side(state, *renaming) for renaming in _RENAMINGS if _stays_apart(state, renaming[1])]
        for state in (before, after)
    )
    return max(product(befores, afters), key=lambda sides: _common(*sides))


def check_common(before: State, after: State) -> None:
    """Two sides that have something, and nothing in common, are not meant.

    Raises:
        InputError: they are such; with the prefix that is in the way, where it is one.
    """
    b, a = aligned(before, after)
    if not b.entries or not a.entries or b.entries.keys() & a.entries.keys():
        return
    hint = ""
    for one, other, state, name in ((b, a, before, "before"), (a, b, after, "after")):
        ends = [f".{end}" for end in other.entries]
        prefixes = [key[: 1 - len(end)] for key in list(one.entries)[:50] for end in ends if key.endswith(end)]
        if prefixes:
            prefix = max(set(prefixes), key=prefixes.count)
            hint = f". Those of {name} have {prefix!r} in front{_without_prefix(state, prefix)}"
            break
    raise InputError(f"before and after have no name in common: {_first(b)} against {_first(a)}{hint}")


def _without_prefix(state: State, prefix: str) -> str:
    """What to pass instead, in Python."""
    if not state.source:
        return ""
    if prefix.removesuffix(".") in state.inside:
        return f": pass {state.source}[{prefix.removesuffix('.')!r}]"
    return f": pass {{key.removeprefix({prefix!r}): value for key, value in {state.source}.items()}}"


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_COMPONENTS)


_RENAMINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("", lambda name: name),
    ("", _without_wrappers),
    ("module.", lambda name: _without_wrappers(name).removeprefix("module.")),
    ("module.", lambda name: ".".join(part for part in _without_wrappers(name).split(".") if part != "module")),
)
"""What to set aside in names: nothing; components that no user chooses; and ``module``, which is DDP's or a user's."""


def _common(before: Side, after: Side) -> int:
    return len(before.entries.keys() & after.entries.keys())


def _stays_apart(state: State, rename: Callable[[str], str]) -> bool:
    return len({rename(name) for name in state.entries}) == len(state.entries)


def _first(side: Side) -> str:
    names = list(side.entries)
    return ", ".join(map(repr, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
