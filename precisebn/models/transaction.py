"""Changes to a model, each with how to undo it: what every function that changes one is made of.

The undo is noted before its change is made, and undoing goes through all notes, last first, whatever any of them
raises: so a model that could be put back in part only is put back in all other parts. Where the changes are to be
undone even if Ctrl-C comes at an unlucky instant, :class:`precisebn.models.interrupts.HeldBack` goes around the whole.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from precisebn.errors import add_note

__all__ = ["Transaction", "refill"]


class Transaction(AbstractContextManager["Transaction"]):
    """Notes of changes: kept where the block ends well, undone where it does not.

    Example:
        >>> settings = {"eps": 1e-5}
        >>> with Transaction() as changes:
        ...     changes.put(settings, "eps", 1e-3)
        ...     raise RuntimeError("something fails")
        Traceback (most recent call last):
        RuntimeError: something fails
        >>> settings
        {'eps': 1e-05}
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.keep()
            return
        try:
            self.undo()
        except Exception as failure:  # the error that led here matters more
            add_note(error, f"precisebn: putting the model back raised, too: {failure!r}")

    def on_undo(self, undo: Callable[..., object], *arguments: Any) -> None:
        """Note how to undo a change that the caller is about to make; it must do no harm if the change never came."""
        self._undo.append((undo, arguments))

    def put(self, place: MutableMapping[Any, Any], key: Any, value: object) -> None:
        """Put an item into a dictionary: an attribute into ``vars(module)``, a buffer into ``module._buffers``."""
        if key in place:
            self.on_undo(place.__setitem__, key, place[key])
        else:
            self.on_undo(place.pop, key, None)
        place[key] = value

    def drop(self, place: MutableMapping[Any, Any], key: Any) -> None:
        """Take an item out of a dictionary, if it is there."""
        if key in place:
            self.on_undo(place.__setitem__, key, place[key])
            del place[key]

    def update(self, place: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> None:
        """Put several items into a dictionary, as :meth:`put` does one, under a single note."""
        before = {key: place[key] for key in items if key in place}
        new = () if len(before) == len(items) else items.keys() - before.keys()
        self.on_undo(_put_items_back, place, before, new)
        place.update(items)

    def set(self, target: object, name: str, value: object) -> None:
        """Set an attribute."""
        self.on_undo(setattr, target, name, getattr(target, name))
        setattr(target, name, value)

    def fill(self, place: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> None:
        """Replace all items of a dictionary."""
        self.on_undo(refill, place, dict(place))
        refill(place, content)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Write values into a tensor, in place; in the shape that it has."""
        with torch.no_grad():
            self.on_undo(_write, tensor, tensor.clone())
            tensor.copy_(value)

    def keep(self) -> None:
        """Forget how to undo what was done so far."""
        self._undo.clear()

    def undo(self) -> None:
        """Undo all changes, last first; each of them, whatever others raise.

        Raises:
            BaseException: the first one that was raised on the way.
        """
        failures: list[BaseException] = []
        while self._undo:
            undo, arguments = self._undo.pop()
            try:
                undo(*arguments)
            except BaseException as failure:  # not even a KeyboardInterrupt stops the steps that are left
                failures.append(failure)
        if failures:
            raise failures[0]


def refill(place: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> None:
    """Give a dictionary other items, in their order; it is never empty in between."""
    for key in [key for key in place if key not in content]:
        del place[key]
    in_order = list(place) == list(content)[: len(place)]
    for key, value in content.items():
        if not in_order:
            place.pop(key, None)
        place[key] = value


def _put_items_back(place: MutableMapping[Any, Any], before: Mapping[Any, Any], new: Iterable[Any]) -> None:
    """Make some items what they were, and let go of those that were not there."""
    place.update(before)
    for key in new:
        place.pop(key, None)


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
