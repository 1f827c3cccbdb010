"""What a run of a model touches besides the model: gradients, optimizers, generators, the loader; as a picture to put
back.

A :class:`precisebn.models.snapshot.Snapshot` is of the model, and knows nothing of what lies in other objects. What
belongs to training is reached from these: the moments of an optimizer, the generator of a sampler, the epoch that a
loader counts in an attribute. A :class:`ObjectsPicture` follows attributes and containers and notes what is there.
"""

import math
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from precisebn.auditing.generators import setter_and_state
from precisebn.models.random_state import RandomState
from precisebn.models.snapshot import Snapshot
from precisebn.models.tensor_pictures import TensorPictures
from precisebn.models.transaction import Transaction

__all__ = ["MOST_ITEMS", "ObjectsPicture", "Surroundings"]


class Surroundings:
    """A model with all that trains it, as they are now: to put back bit for bit.

    Args:
        model: its parameters, their gradients, buffers, attributes, hooks, modes; generators in its attributes.
        optimizers: their state and parameter groups.
        others: loaders, samplers and data sets: their attributes and generators, but not the data.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[object] = (), others: Iterable[object] = ()) -> None:
        self._random = RandomState()
        self._model = Snapshot(model)
        parameters = list(model.parameters())
        known = {id(t) for t in (*parameters, *model.buffers())}
        self._gradients = [(p, p.grad) for p in parameters]
        self._values_of_gradients = TensorPictures(grad for _, grad in self._gradients if grad is not None)
        inside = [value for module in model.modules() for key, value in vars(module).items() if key not in _OF_MODULES]
        self._objects = [
            ObjectsPicture(optimizers, tensors=True, known=known),
            ObjectsPicture([*others, *inside], tensors=False, most_items=MOST_ITEMS, known=known),
        ]

    def put_back(self) -> None:
        """Make all of it what it was, whatever is raised on the way.

        Raises:
            Exception: the first of those on the way.
        """
        steps = Transaction()
        steps.on_undo(self._random.put_back)
        for one in self._objects:
            steps.on_undo(one.put_back)
        steps.on_undo(self._model.put_back)
        for picture in self._values_of_gradients.pictures():
            steps.on_undo(picture.put_back)
        for parameter, grad in self._gradients:
            if parameter.grad is not grad:
                steps.on_undo(setattr, parameter, "grad", grad)
        steps.undo()


class ObjectsPicture:
    """The attributes and containers that are reached from some objects, and the states of generators among them.

    Not looked into are modules, which a Snapshot is for, and what belongs to running threads and processes.

    Args:
        roots: where to begin.
        tensors: whether to keep the values of tensors as well, which takes their memory once more.
        most_items: larger containers are data, and not looked into.
        known: identities of tensors that somebody else keeps.

    Attributes:
        iterators: generators, and Python's own iterators: what is taken out of them cannot be put back.
    """

    def __init__(
        self, roots: Iterable[object], *, tensors: bool, most_items: float = math.inf, known: Iterable[int] = ()
    ) -> None:
        self._most_items = most_items
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Callable[[Any], object], Any]] = []
        self.iterators: list[Iterator[Any]] = []
        found: dict[int, Tensor] = {}
        seen = set(known)
        waiting = list(roots)
        keep = []  # or another object could get the identity of a temporary one
        while waiting:
            one = waiting.pop()
            if id(one) in seen or isinstance(one, _NOTHING_INSIDE) or type(one).__module__.startswith(_RUNNING):
                continue
            seen.add(id(one))
            keep.append(one)
            generator = setter_and_state(one)
            if generator is not None:
                self._generators.append(generator)
            elif isinstance(one, Tensor):
                found[id(one)] = one
            elif isinstance(one, (*_CONTAINERS, tuple)):
                waiting += self._look_into(one)
            elif isinstance(one, Iterator) and not hasattr(one, "__dict__"):
                self.iterators.append(one)
            elif hasattr(one, "__dict__"):
                waiting += self._look_into(vars(one))
        self._tensors = TensorPictures(found.values()) if tensors else None

    def put_back(self) -> None:
        """Fill containers with what was in them, and let generators go on from where they were."""
        steps = Transaction()
        for set_state, state in self._generators:
            steps.on_undo(set_state, state)
        for picture in self._tensors.pictures() if self._tensors is not None else ():
            steps.on_undo(picture.put_back)
        for container, content in self._contents:
            if not _same_items(container, content):
                steps.on_undo(_fill, container, content)
        steps.undo()

    def _look_into(self, container: Any) -> list[object]:
        """Note what is in a container; what of that is to be looked at in turn."""
        if len(container) > self._most_items:
            return []
        if not isinstance(container, tuple):
            kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
            self._contents.append((container, kind(container)))
        if isinstance(container, dict):
            return [value for key, value in container.items() if key != "_iterator"]  # of a loader with workers
        return list(container)


MOST_ITEMS = 1000
"""As many items as a container of settings may have; what has more is a data set."""

_CONTAINERS: tuple[Any, ...] = (dict, list, set, deque)
_NOTHING_INSIDE = (
    bool, int, float, complex, str, bytes, type(None), type, nn.Module, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, torch.dtype, torch.device,
)  # fmt: skip
_RUNNING = ("multiprocessing", "torch.multiprocessing", "threading", "_thread", "queue", "concurrent", "logging")
_OF_MODULES = frozenset(vars(nn.Module()))


def _same_items(now: Any, then: Any) -> bool:
    """Whether a container holds the very objects that it held, in the same order; a set, equal ones."""
    if len(now) != len(then):
        return False
    if isinstance(now, set):
        return bool(now == then)
    if isinstance(now, dict):
        pairs = zip(now.items(), then.items(), strict=True)
        return all(a is b and value is other for (a, value), (b, other) in pairs)
    return all(a is b for a, b in zip(now, then, strict=True))


def _fill(container: Any, content: Any) -> None:
    """Not in one step, as for dictionaries that others read meanwhile: keys may be tensors, which do not compare."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)
