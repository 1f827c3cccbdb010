"""What is reached from a model beside modules, parameters and buffers: hooks, attributes, and what these hold on to.

A deep copy takes along lists, dictionaries, tensors and bound methods; functions it does not copy, nor what they
close over. So a copied module may call the module that it was copied from.
"""

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["attributes", "hooks", "modules_held", "objects_held"]

_PLACES = frozenset({"_parameters", "_buffers", "_modules"})
_CONTAINERS = (dict, list, set, tuple, deque)
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})  # hold nothing, and may be many in a list
_DEPTH = 6  # of functions in partial applications in lists; deeper nothing was seen


def hooks(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, object]]:
    """All hooks of some modules, each with the name of the module and of the dictionary that it lies in."""
    for name, module in modules.items():
        for key, value in vars(module).items():
            if _is_of_hooks(key) and isinstance(value, dict):
                for hook in value.values():
                    yield f"{name}.{key}".lstrip("."), hook


def attributes(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, object]]:
    """All attributes of some modules but hooks, parameters, buffers and children, with their names."""
    for name, module in modules.items():
        for key, value in vars(module).items():
            if key not in _PLACES and not _is_of_hooks(key):
                yield f"{name}.{key}".lstrip("."), value


def _is_of_hooks(key: str) -> bool:
    return key.startswith("_") and "hook" in key


def modules_held(value: object) -> list[nn.Module]:
    """The modules that an attribute or a hook holds on to: it is bound to them, closes over them, or has them in it."""
    return [held for held in objects_held(value) if isinstance(held, nn.Module)]


def objects_held(value: object) -> list[Any]:
    """Every object in a value, those that its functions are bound to or close over included; not what is in modules."""
    found: list[Any] = []
    seen: set[int] = set()
    left: list[tuple[object, int]] = [(value, 0)]
    while left:
        item, depth = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        found.append(item)
        if depth < _DEPTH and not isinstance(item, nn.Module):
            left += [(inside, depth + 1) for inside in _inside(item)]
    return found


def _inside(item: object) -> Iterable[object]:
    if isinstance(item, _CONTAINERS):
        items = item.values() if isinstance(item, dict) else item
        return [held for held in items if type(held) not in _PLAIN]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, weakref.ReferenceType):
        return [held for held in [item()] if held is not None]
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    if callable(item) and not isinstance(item, type):  # an object with __call__ that wraps a function or a module
        held = getattr(item, "__dict__", {})  # without what functools.wraps has copied from a function: annotations
        return [value for key, value in held.items() if key not in functools.WRAPPER_ASSIGNMENTS]
    return ()


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (the question)
    except ValueError:
        return False
    return True
