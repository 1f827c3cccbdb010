"""Which buffers of a module are running statistics: by their names, as torch's are, or by what a module declares."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from precisebn.models.families import populations_of
from precisebn.models.tensor_pictures import memory_of
from precisebn.nn.population import STATISTICS, Recordable, RunningStatistics

__all__ = ["Statistic", "statistics_buffers", "statistics_of"]

MEAN, VAR, _ = STATISTICS
_NAMES = frozenset(STATISTICS)


class Statistic(NamedTuple):
    """What one buffer of running statistics is to its module.

    Attributes:
        role: what it holds; empty for a count, for several of these in one buffer, and for one whose counterpart is
            not there.
        var: of a mean or a variance, the name of the buffer with the variance.
        eps: what the module adds to the variance; None where it does not say.
    """

    role: Literal["mean", "var", ""] = ""
    var: str = ""
    eps: float | None = None


def statistics_buffers(module: nn.Module) -> list[str]:
    """The names of the buffers of one module that are running statistics.

    By name that is so of any class: frozen layers of other libraries are none of torch's. A
    :class:`precisebn.nn.population.Recordable` may keep its populations under other names, several in one buffer;
    what such a module declares is told by the memory that it lies in. Of a lazy module only the names are known.

    Example:
        >>> statistics_buffers(nn.BatchNorm2d(4))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    if not module._buffers:
        return []
    buffers = [name for name, t in module._buffers.items() if t is not None]  # of torch.jit, no dictionary
    names = [name for name in STATISTICS if name in buffers]
    if len(buffers) == len(names) or not isinstance(module, Recordable):
        return names
    places = _places(module)
    declared = {memory for population in _declared(module, places) for memory in _memory(population)} if places else ()
    return names + [name for name, memory in places.items() if memory in declared]


def statistics_of(module: nn.Module) -> dict[str, Statistic]:
    """The same buffers, with what each is to the module.

    Example:
        >>> statistics_of(nn.BatchNorm2d(4))["running_mean"]
        Statistic(role='mean', var='running_var', eps=1e-05)
    """
    names = statistics_buffers(module)
    eps = getattr(module, "eps", None)
    eps = float(eps) if isinstance(eps, int | float) else None
    found = dict.fromkeys(names, Statistic(eps=eps))
    if MEAN in names and VAR in names:
        found |= {MEAN: Statistic("mean", VAR, eps), VAR: Statistic("var", VAR, eps)}
    if not _NAMES.issuperset(names):
        places = _places(module)
        for population in _declared(module, places):
            found |= _roles(population, places)
    return found


def _places(module: nn.Module) -> dict[str, int]:
    """Where the buffers lie that have no name of running statistics; those without memory of their own lie nowhere."""
    buffers = [(name, t) for name, t in module._buffers.items() if t is not None]
    if any(is_lazy(t) for _, t in buffers):
        return {}
    return {name: memory for name, t in buffers if name not in _NAMES and (memory := memory_of(t))}


def _declared(module: nn.Module, places: Mapping[str, int]) -> list[RunningStatistics]:
    """The populations that a module declares, all or in part in these places."""
    return [one for one in populations_of(module) if not _memory(one).isdisjoint(places.values())]


def _memory(population: RunningStatistics) -> set[int | None]:
    return {memory_of(t) for t in (population.mean, population.var, population.num_batches) if t is not None}


def _roles(population: RunningStatistics, places: Mapping[str, int]) -> dict[str, Statistic]:
    """What each of the buffers of a population is to it."""
    mean, var, all_of_it = memory_of(population.mean), memory_of(population.var), _memory(population)
    at_var = next((name for name, memory in places.items() if memory == var), "")
    apart = mean != var and at_var != ""
    found = {}
    for name, memory in places.items():
        if memory == mean and apart:
            found[name] = Statistic("mean", at_var, population.eps)
        elif memory == var and apart:
            found[name] = Statistic("var", at_var, population.eps)
        elif memory in all_of_it:
            found[name] = Statistic("", at_var, population.eps)
    return found
