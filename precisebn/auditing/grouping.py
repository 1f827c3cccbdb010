"""Many names as few: ``layer1.0.bn1``, ``layer1.1.bn1`` are ``layer1.*.bn1 (2)``, a pattern that ``freeze`` takes."""

import re
from collections.abc import Iterable

__all__ = ["grouped"]

_INDEX = re.compile(r"(?<![^.])()\d+(?![^.])")  # a component that is a number
_NUMBERED = re.compile(r"(?<![^.])([A-Za-z_]*)\d+(?![^.])")  # or a word with a number
_FEW = 4


def grouped(names: Iterable[str]) -> list[str]:
    """Names and patterns, each pattern with how many of the names it stands for; the names alone where they are few.

    Args:
        names: qualified names.

    Example:
        >>> grouped(f"layer{i}.{j}.bn{k}" for i in (1, 2) for j in range(3) for k in (1, 2))
        ['layer1.*.bn1 (3)', 'layer1.*.bn2 (3)', 'layer2.*.bn1 (3)', 'layer2.*.bn2 (3)']
        >>> grouped(f"block{i}.layer{j}.norm" for i in range(4) for j in range(6))
        ['block*.layer*.norm (24)']
        >>> grouped(["stem.bn", "head.bn"])
        ['stem.bn', 'head.bn']
    """
    names = [name or "(the model)" for name in names]
    if len(names) <= _FEW:
        return names
    groups = _groups(names, _INDEX)
    if len(groups) > _FEW:
        groups = _groups(names, _NUMBERED)
    shown = [pattern if len(group) > 1 else group[0] for pattern, group in groups.items()]
    counts = [f" ({len(group)})" if len(group) > 1 else "" for group in groups.values()]
    lines = [f"{pattern}{count}" for pattern, count in zip(shown, counts, strict=True)]
    if len(lines) > 2 * _FEW:
        rest = sum(len(group) for group in list(groups.values())[2 * _FEW - 1 :])
        lines = [*lines[: 2 * _FEW - 1], f"... ({rest} more)"]
    return lines


def _groups(names: list[str], number: re.Pattern[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(number.sub(r"\1*", name), []).append(name)
    return groups
