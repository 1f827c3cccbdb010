"""The tensors in nested containers, wherever values are only looked at: in batches, in what calls are given and return.

(Who changes tensors and rebuilds what holds them, names them by their paths, or compares two structures, walks in a way
of its own: see :func:`precisebn.models.batches.move_to`, :func:`precisebn.state.entries.entries_of`.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["tensors_in"]


def tensors_in(value: Any, *, in_data_classes: bool = True) -> Iterator[Tensor]:
    """The tensors in nested containers, in their order: in mappings, lists, tuples, sets and data classes.

    Args:
        value: a tensor, a container, or anything else, in which there are none.
        in_data_classes: whether to look into data classes.

    Example:
        >>> import torch
        >>> [t.item() for t in tensors_in({"x": torch.tensor(1), "more": [torch.tensor(2), "no tensor"]})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        items: Any = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    elif in_data_classes and is_dataclass(value) and not isinstance(value, type):
        items = vars(value).values()
    else:
        return
    for item in items:
        yield from tensors_in(item, in_data_classes=in_data_classes)
