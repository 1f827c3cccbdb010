"""Snapshot: all of a model as it is now; comparable, able to say what differs, and to put everything back.

What belongs to a model: the modules in it, their attributes and modes, the hooks and other things in their lists and
dictionaries, and every tensor that is reached from there (parameters, buffers, tensors in attributes): its identity,
its memory, its shape and its bits. What lies inside other objects (a NumPy array, a random generator) does not.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from precisebn.distributed import is_sharded
from precisebn.models.statistics_buffers import statistics_buffers
from precisebn.models.tensor_pictures import PLAIN_TENSORS, TensorPicture, TensorPictures
from precisebn.models.transaction import Transaction, refill
from precisebn.nn.population import STATISTICS

__all__ = ["Snapshot"]


class Snapshot:
    """A picture of a model, equal to another where nothing differs.

    It costs the memory of the model's tensors. The modules, tensors and objects in it are the model's own.

    Args:
        model: what to take a picture of.
        modules: those of the model, each once, with the names that differences are to be told by.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())
        >>> before = Snapshot(model)
        >>> _ = model[0].running_mean.add_(1), model[0].running_var.mul_(2), model[1].eval()
        >>> before.differences(Snapshot(model))
        {'0.running_mean': 'values', '0.running_var': 'values', '1:training': 'True, False'}
        >>> before.put_back()
        >>> before == Snapshot(model)
        True
    """

    def __init__(self, model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> None:
        modules = model.named_modules() if modules is None else modules
        tensors: dict[int, Tensor] = {}  # by identity: a tensor's own hash is slow
        self._modules = [_ModulePicture(name, module, tensors) for name, module in modules]
        # Running statistics apart from the rest: whether any has changed is asked at the end of every good run.
        self._statistics = [place for module in self._modules for place in module.statistics()]
        statistics = {id(buffer): buffer for _, _, buffer in self._statistics}
        for key in statistics:
            tensors.pop(key, None)
        self._statistics_at, self._rest_at = TensorPictures(statistics.values()), TensorPictures(tensors.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and not self.differences(other)

    __hash__ = None  # type: ignore[assignment]  # what is equal now need not be later

    def __repr__(self) -> str:
        return f"<Snapshot of {len(self._modules)} modules>"

    def differences(self, later: "Snapshot") -> dict[str, str]:
        """What differs, and how: ``layer.name`` for parameters and buffers, ``layer:name`` for anything else."""
        before, after = dict(self._entries()), dict(later._entries())
        result = {}
        for key in {**before, **after}:
            if key not in after or key not in before:
                result[key] = "gone" if key in before else "new"
            elif how := _difference(before[key], after[key]):
                result[key] = how
        return result

    def put_back(self) -> None:
        """Make the model what it was: all that can be, and whatever is raised on the way.

        Modules that were lazy then are left as they have become: their initialization is nothing that can be undone.

        Raises:
            Exception: the first of those on the way.
        """
        steps = Transaction()  # all of whose steps run; last first
        pictures = [*self._statistics_at.pictures(), *self._rest_at.pictures()]
        # The last note is undone first: to write takes no memory, of which there may be none, and to compare may.
        for picture in sorted(pictures, key=TensorPicture.version_has_moved):
            steps.on_undo(picture.put_back)
        for module in self._modules:
            if not module.was_lazy:
                steps.on_undo(module.put_back)
        steps.undo()

    def put_back_statistics(self) -> None:
        """The same for running statistics alone, of all normalization layers that the model had."""
        steps = Transaction()
        if self._statistics_at.may_have_changed():
            for picture in self._statistics_at.pictures():
                steps.on_undo(picture.put_back)
        for place, name, buffer in self._statistics:
            if name not in place or place[name] is not buffer:
                steps.on_undo(place.__setitem__, name, buffer)
        steps.undo()

    def _entries(self) -> Iterator[tuple[str, object]]:
        pictures = {id(one.tensor): one for of in (self._statistics_at, self._rest_at) for one in of.pictures()}
        named = {id(t) for module in self._modules for place in module.places for t in place.values()}
        for module in self._modules:
            for key, value in module.entries(named):
                yield key, pictures.get(id(value), value) if isinstance(value, Tensor) else value


class _ModulePicture:
    """Attributes of one module, what is in its containers, and the tensors that are reached from there.

    Nothing is kept of a container that is empty, as most are: hooks, of which there are none.

    Args:
        name: what to call the module.
        module: the module.
        tensors: takes those that are reached and have values, by their identity.
    """

    __slots__ = ("attributes", "contents", "module", "name", "others", "places", "was_lazy")

    def __init__(self, name: str, module: nn.Module, tensors: dict[int, Tensor]) -> None:
        self.name = name
        self.module = module
        self.attributes = vars(module).copy()
        self.places: tuple[Any, Any] = (module._parameters, module._buffers)  # of torch.jit, no dictionaries
        self.contents: dict[int, tuple[Any, Any]] = {}
        self.others: Sequence[Tensor] = ()  # most modules have none, and a list for each would be felt
        self.was_lazy = False
        for place in self.places:
            if place:
                self.contents[id(place)] = place, (content := dict(place.items()))
                self._note(content.values(), tensors)
        # Of the twenty and more attributes of a module this leaves a few.
        telling = [
            (key, value)
            for key, value in self.attributes.items()
            if (kind := type(value)) not in _VALUES
            and (value if kind in _PLAIN_CONTAINERS else kind is not tuple or not _VALUES.issuperset(map(type, value)))
        ]
        for key, value in telling:
            if key == "_modules":
                self.contents[id(value)] = value, dict(value.items())
            elif key not in _PLACES:
                self._look_into(value)
        if self.others:
            self._note(self.others, tensors)

    def _note(self, own: Iterable[Tensor | None], tensors: dict[int, Tensor]) -> None:
        for tensor in own:
            if tensor is None:
                continue
            if type(tensor) in PLAIN_TENSORS or not is_lazy(tensor):
                tensors[id(tensor)] = tensor
            else:  # it has no values to keep
                self.was_lazy = True

    def _look_into(self, value: object) -> None:
        """Note a tensor, the content of a container, and what is in that."""
        if isinstance(value, _CONTAINERS):
            if id(value) not in self.contents:
                self.contents[id(value)] = value, _items_of(value)
                self._look_into_each(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):  # it cannot change, but what is in it can
            self._look_into_each(value)
        elif isinstance(value, Tensor):
            self.others = [*self.others, value]

    def _look_into_each(self, items: Collection[object]) -> None:
        if _VALUES.issuperset(map(type, items)):
            return
        for item in items:
            if type(item) not in _VALUES:
                self._look_into(item)

    def statistics(self) -> list[tuple[Any, str, Tensor]]:
        """The running statistics that it had: where, under which name, and the tensor."""
        place = self.places[1]
        found = self._statistics_elsewhere()
        if place:
            content = self._content(place)
            found += [(place, name, content[name]) for name in statistics_buffers(self.module)]
        return [one for one in found if not is_lazy(one[2])] if self.was_lazy else found

    def _statistics_elsewhere(self) -> list[tuple[Any, str, Tensor]]:
        """Of layers whose running statistics are parameters, plain attributes, or parametrized."""
        places = self.places
        if isinstance(self.module, ParametrizationList):
            if self.name.rpartition(".")[2] not in STATISTICS:
                return []
            return [(place, name, t) for place in places for name, t in self._content(place).items() if t is not None]
        found: list[tuple[Any, str, Tensor]] = []
        if places[0] and any(name in places[0] for name in STATISTICS):
            found += [
                (places[0], name, t) for name in STATISTICS if (t := self._content(places[0]).get(name)) is not None
            ]
        if self.others:
            attributes = [(name, self.attributes.get(name)) for name in STATISTICS]
            found += [(vars(self.module), name, t) for name, t in attributes if isinstance(t, Tensor)]
        return found

    def entries(self, named: set[int]) -> Iterator[tuple[str, object]]:
        """Everything that may differ, by name; but for tensors of containers that have a name elsewhere."""
        yield f"{self.name}:module", _Same(self.module)
        for key, value in self.attributes.items():
            if key not in _PLACES:
                yield f"{self.name}:{key}", self._deep_content(value)
        for place in self.places:
            for key, tensor in self._content(place).items():
                yield f"{self.name}.{key}", tensor
        for index, tensor in enumerate(self.others):
            if id(tensor) not in named:
                yield f"{self.name}:tensor {index}", tensor

    def put_back(self) -> None:
        """The attributes, and what was in containers; where nothing changed, nothing is touched."""
        steps = Transaction()
        containers = [content[0] for content in self.contents.values()]
        containers += [value for value in self.attributes.values() if isinstance(value, _CONTAINERS)]
        for container in containers:
            if not _alike(container, content := self._content(container)):
                if container is self.places[0] and _placed_by_fsdp(container, content):
                    continue
                steps.on_undo(_fill, container, content)
        if not _alike(vars(self.module), self.attributes):
            steps.on_undo(refill, vars(self.module), self.attributes)
        steps.undo()

    def _deep_content(self, value: Any, inside: frozenset[int] = frozenset()) -> Any:
        """What was in a container, and in the containers in it."""
        if not isinstance(value, (*_CONTAINERS, tuple)) or id(value) in inside:
            return value
        content = value if isinstance(value, tuple) else self._content(value)
        inside |= {id(value)}
        if isinstance(content, dict):
            return {key: self._deep_content(item, inside) for key, item in content.items()}
        return content if isinstance(content, set) else [self._deep_content(item, inside) for item in content]

    def _content(self, container: Any) -> Any:
        """What was in a container."""
        _, content = self.contents.get(id(container), (container, None))
        return {} if content is None else content


def _items_of(container: Any) -> Any:
    """A container of the builtin kind with the same items: a class of the user's may have a constructor of its own."""
    if type(container) in _PLAIN_CONTAINERS:
        return container.copy()
    kind: Any = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    return kind(container)


_VALUES = frozenset({bool, int, float, str, type(None)})  # what most attributes are, and cannot change by themselves
_CONTAINERS = (dict, list, set, deque)
_PLAIN_CONTAINERS = frozenset({dict, OrderedDict, list, set, deque})
_PLACES = frozenset({"_parameters", "_buffers"})


def _alike(now: Any, then: Any) -> bool:
    """Whether a container holds the very objects that it held, in the same order."""
    if len(now) != len(then):
        return False
    items, others = (c.items() if hasattr(c, "items") else ((None, item) for item in c) for c in (now, then))
    return all(key == name and a is b for (key, a), (name, b) in zip(items, others, strict=True))


def _placed_by_fsdp(now: Any, then: Any) -> bool:
    """Whether FSDP has put whole parameters in the places of sharded ones: it knows which are there, and when to free.

    Put back behind its back, they would stay what they are while it takes them for the others.
    """
    if list(now.keys()) != list(then):
        return False
    return any(is_sharded(now[key]) != is_sharded(then[key]) for key in then)


def _fill(container: Any, content: Any) -> None:
    """Give a container other items: those of a dictionary, or, where it was empty, of ``{}``."""
    if isinstance(container, dict):
        refill(container, content)
    elif isinstance(container, list):
        container[:] = content
    elif isinstance(container, set | deque):
        container.clear()
        add = container.update if isinstance(container, set) else container.extend
        add(content)
    else:  # of torch.jit: what is in it can be another, but nothing can come or go
        for key, value in content.items():
            if container[key] is not value:
                container[key] = value


class _Same(NamedTuple):
    """Equal to another that holds the very same object."""

    content: object


def _difference(before: object, after: object) -> str:
    """How two entries differ; an empty string where they do not."""
    if isinstance(before, TensorPicture) and isinstance(after, TensorPicture):
        return before.difference(after)
    return "" if _equal(before, after) else f"{_brief(before)}, {_brief(after)}"


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor | nn.Module):
        return False
    if isinstance(a, _Same) and isinstance(b, _Same):
        return a.content is b.content
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return len(a) == len(b) and all(
            _equal(key, other) and _equal(v, w) for (key, v), (other, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple | deque) and isinstance(b, list | tuple | deque):
        return len(a) == len(b) and all(map(_equal, a, b))
    try:
        return bool(a == b)
    except Exception:  # NumPy's arrays, for one, are neither true nor false
        return False


def _brief(value: object) -> str:
    shown = repr(value) if type(value) in _VALUES else type(value).__name__
    return shown if len(shown) < 40 else f"{shown[:37]}..."
