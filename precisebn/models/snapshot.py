"""Snapshot: all of a model as it is now; comparable, able to say what differs, and to put everything back.

What belongs to a model: the modules in it, their attributes and modes, the hooks and other things in their lists and
dictionaries, and every tensor that is reached from there (parameters, buffers, tensors in attributes): its identity,
its memory, its shape and its bits. What lies inside other objects (a NumPy array, a random generator) does not.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precisebn._torch import flattened
from precisebn.models.transaction import Transaction, refill
from precisebn.nn.population import STATISTICS, Recordable

__all__ = ["Snapshot", "same_bits"]


class Snapshot:
    """A picture of a model, equal to another where nothing differs.

    It costs the memory of the model's tensors. The modules, tensors and objects in it are the model's own.

    Args:
        model: what to take a picture of.

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

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_ModulePicture(name, module) for name, module in model.named_modules()]
        # Running statistics apart from the rest: whether any has changed is asked at the end of every good run.
        self._statistics = [place for module in self._modules for place in module.statistics()]
        statistics = {id(buffer): buffer for _, _, buffer in self._statistics}  # not by hash, which is slow for tensors
        rest = {id(t): t for module in self._modules for t in module.tensors if id(t) not in statistics}
        self._statistics_at, self._rest_at = _Tensors(statistics.values()), _Tensors(rest.values())

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
        for picture in sorted(pictures, key=_TensorPicture.version_has_moved):
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
    """

    __slots__ = ("attributes", "contents", "module", "name", "others", "places", "tensors", "was_lazy")

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.attributes = vars(module).copy()
        self.places: tuple[Any, Any] = (module._parameters, module._buffers)  # of torch.jit, no dictionaries
        self.contents: dict[int, tuple[Any, Any]] = {}
        self.tensors: list[Tensor] = []
        self.others: Sequence[Tensor] = ()  # most modules have none, and a list for each would be felt
        for place in self.places:
            if place:
                self.contents[id(place)] = place, (content := dict(place.items()))
                self.tensors += [t for t in content.values() if t is not None]
        # Of the twenty and more attributes of a module this leaves a few.
        telling = [
            (key, value)
            for key, value in self.attributes.items()
            if (kind := type(value)) not in _VALUES and (kind not in _DICTIONARIES or value)
        ]
        for key, value in telling:
            if key == "_modules":
                self.contents[id(value)] = value, dict(value.items())
            elif key not in _PLACES:
                self._look_into(value)
        self.tensors += self.others
        self.was_lazy = not _PLAIN_TENSORS.issuperset(map(type, self.tensors)) and any(map(is_lazy, self.tensors))
        if self.was_lazy:
            self.tensors = [t for t in self.tensors if not is_lazy(t)]  # which have no values to keep

    def _look_into(self, value: object) -> None:
        """Note a tensor, the content of a container, and what is in that."""
        if isinstance(value, _CONTAINERS):
            if id(value) not in self.contents:
                self.contents[id(value)] = value, value.copy()
                self._look_into_each(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):  # it cannot change, but what is in it can
            self._look_into_each(value)
        elif isinstance(value, Tensor):
            self.others = [*self.others, value]

    def _look_into_each(self, items: Iterable[object]) -> None:
        for item in items:
            if type(item) not in _VALUES:
                self._look_into(item)

    def statistics(self) -> list[tuple[Any, str, Tensor]]:
        """The running statistics that it had: where, under which name, and the buffer."""
        place = self.places[1]
        if not place:
            return []
        found = [(name, self._content(place).get(name)) for name in (*STATISTICS, *self._declared())]
        return [(place, name, t) for name, t in found if t is not None and not (self.was_lazy and is_lazy(t))]

    def _declared(self) -> list[str]:
        """Names of other buffers that hold populations, wholly or in part, of a module that declares such."""
        others = [(name, t) for name, t in self.places[1].items() if t is not None and name not in STATISTICS]
        if not others or not isinstance(self.module, Recordable):
            return []
        populations = [(one.mean, one.var, one.num_batches) for one in self.module.populations()]
        memory = {_memory(t) for tensors in populations for t in tensors if t is not None}
        return [name for name, t in others if (address := _memory(t)) and address in memory]

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


_VALUES = frozenset({bool, int, float, str, type(None)})  # what most attributes are, and cannot change by themselves
_CONTAINERS = (dict, list, set, deque)
_DICTIONARIES = frozenset({dict, OrderedDict})
_PLACES = frozenset({"_parameters", "_buffers"})
_PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})


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
    if "torch.distributed.tensor" not in sys.modules or list(now.keys()) != list(then):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(now[key], DTensor) != isinstance(then[key], DTensor) for key in then)


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


# ---- Tensors --------------------------------------------------------------------------------------------------------


class _TensorPicture:
    """One tensor: which it is, the memory that it lies in, and its bits.

    Attributes:
        alias: another tensor of the same memory, which keeps its shape when ``tensor.data`` is set to something else.
        value: its bits, in a tensor alike; or of its whole memory, for dtypes and layouts that torch cannot copy; or
            None, where there are none (meta tensors).
    """

    def __init__(
        self, tensor: Tensor, version: int | None, requires_grad: bool, alias: Tensor | None, value: Any
    ) -> None:
        self.tensor = tensor
        self.version = version
        self.requires_grad = requires_grad
        self.alias = alias
        self.value = value

    def version_has_moved(self) -> bool:
        """Whether it has certainly been written to."""
        return _version(self.tensor) != self.version

    def put_back(self) -> None:
        """Its memory, its shape and its bits; where nothing changed, nothing is written."""
        if self.alias is not None and not _same_place(self.tensor, self.alias):
            self.tensor.data = self.alias
        if self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.value is None:
            return
        if isinstance(self.value, torch.UntypedStorage):
            memory = self.tensor.untyped_storage()
            if not same_bits(memory, self.value):
                memory.copy_(self.value)
        elif self.version_has_moved() or not same_bits(self.tensor, self.value):
            with torch.no_grad():
                self.tensor.copy_(self.value)

    def difference(self, later: "_TensorPicture") -> str:
        """How another picture differs: in what, or not at all (an empty string)."""
        if self.tensor is not later.tensor:
            return "another tensor"
        if not _same_place(self.alias, later.alias):
            return "another place in memory, or shape"
        if self.requires_grad != later.requires_grad:
            return "requires_grad"
        return "" if same_bits(self.value, later.value) else "values"


_USUAL = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64})


class _Tensors:
    """Pictures of many tensors, the usual ones copied many at a time: one by one would take as long as a forward."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._odd: list[_TensorPicture] = []
        usual: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        with torch.no_grad():
            for tensor in tensors:
                if (
                    type(tensor) in _PLAIN_TENSORS
                    and tensor.dtype in _USUAL
                    and tensor.layout is torch.strided
                    and not tensor.is_nested
                    and tensor.is_contiguous()
                    and not tensor.is_inference()
                    and not tensor.is_meta
                ):
                    usual.setdefault((tensor.dtype, tensor.device), []).append(tensor)
                else:
                    version, alias_and_value = _version(tensor), _alias_and_value(tensor)
                    self._odd.append(_TensorPicture(tensor, version, tensor.requires_grad, *alias_and_value))
            self._groups = [_Group(group) for group in usual.values()]

    def pictures(self) -> Iterator[_TensorPicture]:
        """One of each tensor."""
        yield from self._odd
        for group in self._groups:
            yield from group.pictures()

    def may_have_changed(self) -> bool:
        """Whether any of them may have."""
        return bool(self._odd) or any(group.may_have_changed() for group in self._groups)


class _Group:
    """Contiguous tensors of one dtype and device, whose values are one flat copy."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.versions = [t._version for t in tensors]
        self.requires_grad = [t.requires_grad for t in tensors]
        self.aliases = [t.data for t in tensors]
        self.value = flattened(self.aliases)

    def pictures(self) -> Iterator[_TensorPicture]:
        values = self.value.split([alias.numel() for alias in self.aliases])
        everything = zip(self.tensors, self.versions, self.requires_grad, self.aliases, values, strict=True)
        for tensor, version, requires_grad, alias, value in everything:
            yield _TensorPicture(tensor, version, requires_grad, alias, value.view(alias.shape))

    def may_have_changed(self) -> bool:
        """``.data`` changes without a new version; to look at the bits on another device would be to wait for it."""
        now, then = ([(t.data_ptr(), t.shape, t.stride()) for t in of] for of in (self.tensors, self.aliases))
        if now != then:
            return True
        if self.value.device.type != "cpu":
            return [t._version for t in self.tensors] != self.versions
        return not torch.equal(flattened(self.aliases).view(torch.uint8), self.value.view(torch.uint8))


def _alias_and_value(tensor: Tensor) -> tuple[Tensor | None, Any]:
    """What can be kept of a tensor of any kind."""
    if tensor.is_meta:
        return None, None
    alias = _first_that_works(tensor.detach)
    if tensor.layout is torch.strided and _first_that_works(lambda: 0 in tensor.stride() and tensor.numel() > 1):
        return alias, tensor.untyped_storage().clone()  # an expanded tensor, to which nothing can be copied
    attempts: tuple[Callable[[], Any], ...] = (tensor.clone, lambda: tensor.untyped_storage().clone())
    return alias, _first_that_works(*attempts)


def _first_that_works(*attempts: Callable[[], Any]) -> Any:
    """Some dtypes and layouts have only a few operations; which, differs between versions of torch."""
    for attempt in attempts:
        try:
            return attempt()
        except Exception:  # NotImplementedError and RuntimeError, as far as seen
            continue
    return None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int | None:
    """Where the memory begins that a tensor lies in, or is a view of."""
    address: int | None = _first_that_works(lambda: tensor.untyped_storage().data_ptr())
    return address


class _Geometry(NamedTuple):
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _geometry(tensor: Tensor) -> _Geometry | None:
    """None for what has no memory of its own: sparse and opaque tensors, wrappers around others."""
    geometry: _Geometry | None = _first_that_works(
        lambda: _Geometry(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    )
    return geometry


def _same_place(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return _geometry(a) == _geometry(b)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors, or pieces of memory, are equal bit by bit: NaN equals NaN, 0 differs from -0."""
    if a is None or b is None:
        return a is b
    pairs = [(_bytes(part), _bytes(other)) for part, other in zip(_parts(a), _parts(b), strict=True)]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _parts(tensor: Any) -> list[Any]:
    """The dense tensors that a tensor is made of."""
    if isinstance(tensor, torch.UntypedStorage):
        return [tensor]
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for item in inner if isinstance(item, Tensor) for part in _parts(item)]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_nested:
        return [tensor.untyped_storage()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


@torch.no_grad()
def _bytes(dense: Any) -> Tensor:
    if isinstance(dense, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8, device=dense.device).set_(dense)
    flat: Tensor = dense.detach().contiguous().view(-1)
    return flat.new_empty(0, device="cpu") if flat.is_meta else flat.view(torch.uint8)


# ---- Anything else --------------------------------------------------------------------------------------------------


class _Same(NamedTuple):
    """Equal to another that holds the very same object."""

    content: object


def _difference(before: object, after: object) -> str:
    """How two entries differ; an empty string where they do not."""
    if isinstance(before, _TensorPicture) and isinstance(after, _TensorPicture):
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
