"""Which layers: find BatchNorm layers in a model, and choose among them by mode, name, pattern or instance."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from precisebn.errors import InputError
from precisebn.nn.frozen import FrozenNorm
from precisebn.nn.population import PopulationNorm

__all__ = ["ModuleSelection", "find_bn", "get_bn_modules", "matching", "named_modules", "select_bn"]

_KINDS = (_BatchNorm, PopulationNorm, FrozenNorm)

ModuleSelection = str | nn.Module | Iterable[str | nn.Module]
"""``"training"``, ``"all"``, or modules, qualified names and glob patterns, one or several."""

# Path components that wrappers put between a layer's name and what the user calls it.
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def get_bn_modules(model: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers of a model that are in training mode and not frozen.

    Follows ``fvcore.nn.precise_bn.get_bn_modules``, and also finds subclasses such as timm's ``BatchNormAct2d`` and
    ``LazyBatchNorm``, and the modules of :mod:`precisebn.nn`. A layer used in several places is listed once.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8).eval())
        >>> get_bn_modules(model) == [model[1]]
        True
    """
    return list(select_bn(model, "training").values())


def find_bn(model: nn.Module) -> dict[str, _NormBase]:
    """All BatchNorm layers by qualified name, in the order of ``named_modules``, without the names of wrappers."""
    return {name: layer for name, layer in named_modules(model) if isinstance(layer, _KINDS)}


def select_bn(model: nn.Module, modules: ModuleSelection) -> dict[str, _NormBase]:
    """The BatchNorm layers that ``modules`` asks for, by qualified name and in the model's order.

    Args:
        model: where to look.
        modules: ``"training"``: those in training mode; ``"all"``: all; neither takes frozen ones. Otherwise one or
            several of: a BatchNorm layer of the model, a module of it that contains some, a qualified name of either,
            or a glob pattern over qualified names (``"backbone.*"``); these take frozen ones too.

    Raises:
        InputError: something that selects no BatchNorm layer of this model; the message lists what there is.
    """
    found = find_bn(model)
    if isinstance(modules, str) and modules in ("training", "all"):
        return {
            name: layer
            for name, layer in found.items()
            if (modules == "all" or layer.training) and not isinstance(layer, FrozenNorm)
        }
    if not isinstance(modules, str | nn.Module | Iterable):
        raise InputError(f"modules={modules!r} must be 'training', 'all', or modules, names and patterns")
    wanted = [modules] if isinstance(modules, str | nn.Module) else list(modules)
    if not wanted:
        raise InputError("modules= is empty, so there is nothing to recalibrate; 'all' selects every BatchNorm layer")
    names = dict(named_modules(model, remove_duplicate=False))
    chosen: set[str] = set()
    for item in wanted:
        matched = matching(item, found, names)
        if not matched:
            raise InputError(_nothing_selected(item, model, found))
        chosen |= matched
    return {name: layer for name, layer in found.items() if name in chosen}


def matching(item: object, found: Mapping[str, nn.Module], names: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that one item of a selection stands for."""
    if isinstance(item, str):
        inside = set(names[item].modules()) if item in names else set()
        for name, module in names.items():
            if fnmatchcase(name, item):
                inside.update(module.modules())
        return {name for name, layer in found.items() if layer in inside}
    if isinstance(item, nn.Module):
        inside = set(item.modules())
        return {name for name, layer in found.items() if layer in inside}
    raise InputError(f"modules= takes modules, names and patterns, not {type(item).__name__}: {item!r}")


def _nothing_selected(item: str | nn.Module, model: nn.Module, found: Mapping[str, nn.Module]) -> str:
    shown = repr(item) if isinstance(item, str) else f"the {type(item).__name__} given"
    if not found:
        return f"modules={shown} selects nothing: {type(model).__name__} has no BatchNorm layer"
    some = ", ".join(repr(name) for name in list(found)[:6]) + (", ..." if len(found) > 6 else "")
    return f"modules={shown} selects no BatchNorm layer of {type(model).__name__}; it has {len(found)}: {some}"


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules`` with the names that layers have without wrappers around the model or its parts."""
    wrapped: set[str] = set()  # qualified names of modules that only wrap their child `module`
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, _WRAPPERS):
            wrapped.add(f"{name}.module".lstrip("."))
        parts = name.split(".")
        kept = [
            part
            for i, part in enumerate(parts)
            if part not in _WRAPPER_COMPONENTS and ".".join(parts[: i + 1]) not in wrapped
        ]
        yield ".".join(kept), module
