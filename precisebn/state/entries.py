"""State: tensors and plain values by name, as one side of a comparison, wherever they come from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from precisebn.errors import InputError
from precisebn.models.statistics_buffers import Statistic
from precisebn.nn.population import STATISTICS

__all__ = [
    "KINDS",
    "Entry",
    "State",
    "Uninitialized",
    "check_kinds",
    "entries_of",
    "mark_statistics",
    "place_of",
]

KINDS = ("parameter", "statistic", "buffer", "value")
"""What there is: parameters, running statistics, other buffers, and values that are no tensors (of an extra state)."""

MEAN, VAR, _ = STATISTICS
_ROLES: dict[str, Literal["mean", "var"]] = {MEAN: "mean", VAR: "var"}


@dataclass(slots=True)
class Entry:
    """One tensor or value, under all names that it has.

    Attributes:
        load: gives it; of a file, its part of the file.
        kind: one of :data:`KINDS`.
        certain: whether the kind is known, and not told from a name.
        persistent: whether a state dict has it.
        statistic: what running statistics are to their layer, the variance by its qualified name.
        names: its names; several where it is shared.
    """

    load: Callable[[], Any]
    kind: str
    certain: bool = False
    persistent: bool = True
    statistic: Statistic | None = None
    names: list[str] = field(default_factory=list)


@dataclass(slots=True)
class State:
    """One side of a comparison.

    Attributes:
        entries: by qualified name; a shared tensor is one entry under several names.
        whole: whether a module is behind it, with buffers that no state dict has.
        kinds: what it was restricted to; None: nothing was left out.
        training: of modules, by name: whether in training mode.
        requires_grad: of parameters, by name.
        notes: what the reader should know, in sentences.
        source: the expression that gives its mapping, for messages; empty where there is none.
        inside: keys of that mapping that lead to mappings.
        release: to be called with what has been read of a tensor: where it lies in a file, memory may forget it.
    """

    entries: dict[str, Entry]
    whole: bool = False
    kinds: frozenset[str] | None = None
    training: dict[str, bool] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source: str = ""
    inside: frozenset[str] = frozenset()
    release: Callable[[Tensor], None] | None = None


class Uninitialized:
    """In the place of a lazy module's parameter that has no values yet."""


def check_kinds(kinds: str | Iterable[str] | None) -> frozenset[str] | None:
    """What ``kinds=`` asks for.

    Raises:
        InputError: it names none of :data:`KINDS`.
    """
    if kinds is None:
        return None
    asked = frozenset([kinds] if isinstance(kinds, str) else kinds)
    if not asked or not asked <= set(KINDS):
        raise InputError(f"kinds={kinds!r} must be one or several of {', '.join(map(repr, KINDS))}")
    return asked


def entries_of(values: Mapping[Any, Any]) -> dict[str, Entry]:
    """Tensors and plain values of a mapping, and of the mappings and lists in it, by path: ``"state.0.exp_avg"``."""
    found: dict[str, Entry] = {}
    by_place: dict[Any, Entry] = {}
    for name, value in _leaves(values, (), frozenset()):
        while name in found:  # 0 beside "0", "a.b" beside b in a
            name += "'"
        entry = Entry(lambda value=value: value, "value", certain=True)  # type: ignore[misc]
        if isinstance(value, Tensor):
            entry = by_place.setdefault(place_of(value), Entry(entry.load, _kind_of(value)))
        entry.names.append(name)
        found[name] = entry
    mark_statistics(found)
    return found


def mark_statistics(entries: Mapping[str, Entry]) -> None:
    """Tell running statistics by their names: a prefix that has a mean and a variance belongs to a layer with both."""
    for name, entry in entries.items():
        prefix, last = _split(name)
        if not entry.certain and last in STATISTICS and {prefix + MEAN, prefix + VAR} <= entries.keys():
            entry.kind = "statistic"
            entry.statistic = Statistic(_ROLES.get(last, ""), prefix + VAR)


def place_of(tensor: Tensor) -> Any:
    """What is the same for two tensors only where they are the same: memory, shape and strides; else the object."""
    try:
        memory = tensor.untyped_storage()
        if memory.nbytes() and not tensor.is_meta and (address := tensor.data_ptr()):
            flags = tensor.is_conj(), tensor.is_neg()
            return memory.device, address, tensor.dtype, tensor.shape, tensor.stride(), flags
    except (RuntimeError, NotImplementedError):  # sparse and opaque tensors, wrappers around others
        pass
    return id(tensor)


def _kind_of(tensor: Tensor) -> str:
    """What a tensor without a module most likely is: nobody trains integers."""
    return "parameter" if tensor.is_floating_point() or tensor.is_complex() else "buffer"


def _split(name: str) -> tuple[str, str]:
    prefix, dot, last = name.rpartition(".")
    return prefix + dot, last


def _leaves(value: Any, path: tuple[str, ...], inside: frozenset[int]) -> Iterator[tuple[str, Any]]:
    """Every item that is no container, with a name of its own; of a container in itself, nothing."""
    if isinstance(value, Tensor) or not isinstance(value, Mapping | list | tuple):
        yield ".".join(path), value
        return
    if id(value) in inside:
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(item, (*path, str(key)), inside | {id(value)})
