"""Which layers of a model: chosen by mode, name, pattern or instance."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from precisebn._reports import quoted
from precisebn.errors import InputError
from precisebn.models.families import is_batch_norm, is_frozen

__all__ = [
    "WRAPPER_COMPONENTS",
    "ModuleSelection",
    "Selection",
    "get_bn_modules",
    "listed",
    "named_modules",
    "select",
    "select_modules",
]

ModuleSelection = str | nn.Module | Iterable[str | nn.Module]
"""Modules, qualified names and glob patterns, one or several; for ``modules=`` also ``"training"`` and ``"all"``."""

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)  # which keep the model as `module`
# Path components that other wrappers put between a layer's name and what the user calls it.
WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def get_bn_modules(model: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers of a model that are in training mode and not frozen.

    Follows ``fvcore.nn.precise_bn.get_bn_modules``, and also finds subclasses such as timm's ``BatchNormAct2d`` and
    ``LazyBatchNorm``, and the modules of :mod:`precisebn.nn`. A layer used in several places is listed once.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8).eval())
        >>> get_bn_modules(model) == [model[1]]
        True
    """
    return list(select_modules(model, "training").chosen.values())


class Selection(NamedTuple):
    """What has been found in a model, and what has been chosen of it.

    Attributes:
        found: all layers of the model by qualified name, in its order.
        chosen: those of them that are included and not excluded.
        named: layers that the selection names one by one, by a name of theirs or as modules.
        excluded: layers that ``exclude`` stands for, whether they were included or not.
    """

    found: dict[str, nn.Module]
    chosen: dict[str, nn.Module]
    named: frozenset[nn.Module]
    excluded: frozenset[nn.Module]


def select_modules(model: nn.Module, modules: ModuleSelection, exclude: ModuleSelection | None = None) -> Selection:
    """Choose among the BatchNorm layers of a model as ``modules=`` asks for it.

    Args:
        model: where to look.
        modules: ``"training"``: those in training mode; ``"all"``: all; neither takes frozen ones. Otherwise one or
            several of: a BatchNorm layer of the model, a module of it that contains some, a qualified name of either,
            or a glob pattern over qualified names (``"backbone.*"``); these take frozen ones too.
        exclude: which of them not; the same, but for ``"training"`` and ``"all"``.

    Raises:
        InputError: something that matches no BatchNorm layer of this model; the message lists what there is.
    """
    if not isinstance(modules, str) or modules not in ("training", "all"):
        return select(model, modules, exclude, argument="modules")
    selection = select(model, None, exclude)
    chosen = {
        name: layer
        for name, layer in selection.chosen.items()
        if (modules == "all" or layer.training) and not is_frozen(layer)
    }
    return selection._replace(chosen=chosen)


def select(
    model: nn.Module,
    include: ModuleSelection | None,
    exclude: ModuleSelection | None = None,
    *,
    argument: str = "include",
    what: str = "BatchNorm layer",
    is_layer: Callable[[nn.Module], bool] = is_batch_norm,
    outermost: bool = False,
) -> Selection:
    """Choose among the layers of a model: the one place where ``modules=``, ``include=`` and ``exclude=`` are read.

    Args:
        model: where to look.
        include: one or several of: a layer, a module that contains some, a qualified name of either, a glob pattern
            over qualified names, which stands for all layers in what it matches. None: every layer.
        exclude: the same; what not.
        argument: what ``include`` is called in the function that the user has called, for messages.
        what: what is chosen among, for messages.
        is_layer: what counts as a layer.
        outermost: whether what lies inside a layer is part of it, and no layer.

    Raises:
        InputError: something that is neither a module nor a string; an ``include`` without items; an item that no
            layer of the model matches, with those that come near it.
    """
    included = None if include is None else _items(argument, include)
    excluded = None if exclude is None else _items("exclude", exclude)
    if included is not None and not included:
        every = "'*' takes every layer" if argument == "modules" else "leave it out to take every layer"
        raise InputError(f"{argument}= is empty, so it chooses nothing; {every}")
    # A module in several places has several names, any of which may be asked for.
    by_name = any(isinstance(item, str) for item in (*(included or ()), *(excluded or ())))
    places = list(named_modules(model, remove_duplicate=not by_name))
    found = dict(_layers(places, is_layer, outermost))
    chosen = set(found.values()) if included is None else _matched(argument, what, included, model, found, places)
    left_out = set[nn.Module]() if excluded is None else _matched("exclude", what, excluded, model, found, places)
    asked_for = set(included or ())
    named = {module for name, module in places if name in asked_for or module in asked_for} if asked_for else set()
    return Selection(
        found,
        {name: layer for name, layer in found.items() if layer in chosen and layer not in left_out},
        frozenset(named.intersection(found.values())),
        frozenset(left_out),
    )


def listed(found: Mapping[str, nn.Module]) -> str:
    """How many layers there are and the names of the first, for messages."""
    return f"{len(found)}: {quoted(list(found))}" if found else "none at all"


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules`` with the names that layers have without wrappers around the model or its parts."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if remove_duplicate:
            if module in seen:
                continue
            seen.add(module)
        yield name, module
        if not module._modules:
            continue
        wraps, prefix = isinstance(module, _WRAPPERS), f"{name}." if name else ""
        children = [
            (name if key in WRAPPER_COMPONENTS or (wraps and key == "module") else prefix + key, child)
            for key, child in module._modules.items()
            if child is not None
        ]
        children.reverse()
        stack += children


def _layers(
    places: Iterable[tuple[str, nn.Module]], is_layer: Callable[[nn.Module], bool], outermost: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Every layer once, under the first of its names."""
    seen: set[nn.Module] = set()
    for name, module in places:
        if module not in seen and is_layer(module):
            yield name, module
            seen.update(module.modules() if outermost else (module,))


def _items(argument: str, selection: ModuleSelection) -> list[str | nn.Module]:
    if isinstance(selection, str | nn.Module):
        return [selection]
    if not isinstance(selection, Iterable):
        keywords = "'training', 'all', or " if argument == "modules" else ""
        raise InputError(f"{argument}={selection!r} must be {keywords}modules, names and patterns, one or several")
    items = list(selection)
    for item in items:
        if not isinstance(item, str | nn.Module):
            raise InputError(f"{argument}= takes modules, names and patterns, not {type(item).__name__}: {item!r}")
    return items


def _matched(
    argument: str,
    what: str,
    items: Iterable[str | nn.Module],
    model: nn.Module,
    found: Mapping[str, nn.Module],
    places: list[tuple[str, nn.Module]],
) -> set[nn.Module]:
    """The layers that the items of a selection stand for, each for at least one."""
    layers, chosen = set(found.values()), set[nn.Module]()
    for item in items:
        if isinstance(item, str):
            tops = [module for name, module in places if name == item or fnmatchcase(name, item)]
        else:
            tops = [item]
        matched = layers.intersection(part for top in tops for part in top.modules())
        if not matched:
            raise InputError(_no_match(argument, what, item, model, found, places))
        chosen |= matched
    return chosen


def _no_match(
    argument: str,
    what: str,
    item: str | nn.Module,
    model: nn.Module,
    found: Mapping[str, nn.Module],
    places: list[tuple[str, nn.Module]],
) -> str:
    shown = repr(item) if isinstance(item, str) else f"the {type(item).__name__} given"
    message = f"{argument}={shown} matches no {what} of {type(model).__name__}; it has {listed(found)}"
    if not isinstance(item, str):
        return message
    layers = set(found.values())
    holding = [name for name, module in places if not layers.isdisjoint(module.modules())] if layers else []
    near = get_close_matches(item, dict.fromkeys(holding), n=3)
    return f"{message}. Did you mean {' or '.join(map(repr, near))}?" if near else message
