"""What a data loader yields: how to call a model on it, move it to a device, and count its samples."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from precisebn.errors import BatchFormatError, InputError, add_note

__all__ = ["ForwardFn", "call_model", "common_device", "move_to", "num_samples"]

ForwardFn = Callable[[nn.Module, Any], Any]
"""How to call a model on a batch: ``forward(model, batch)``; what it returns is dropped."""


def call_model(model: nn.Module, batch: Any, *, is_first: bool = False) -> None:
    """Call the model on a batch by the form of the batch.

    A mapping becomes keyword arguments; a list or tuple of one floating-point tensor followed by no other (labels,
    strings, metadata) stands for that tensor; anything else is passed as it is, as fvcore does.

    That is a guess, and whatever a model raises on its first mini-batch may mean that it was wrong. The exception then
    says what was guessed. It keeps its type, so that who catches it still does; only a TypeError, which is what a wrong
    number or kind of arguments raises, becomes a BatchFormatError (a TypeError too).

    Args:
        model: what to call.
        batch: what a loader yielded.
        is_first: no mini-batch of this form has gone through this model before.

    Raises:
        BatchFormatError: the call is a TypeError; the message names ``forward=``.
    """
    guess = _Guess.of(batch)
    try:
        model(*guess.args, **guess.kwargs)
    except TypeError as error:
        raise BatchFormatError(f"{guess.explained(model)}. It raised TypeError: {_first_line(error)}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise  # no other way to pass a mini-batch makes it smaller
    except Exception as error:
        if is_first:
            add_note(error, f"precisebn: {guess.explained(model)}")
        raise


class _Guess(NamedTuple):
    """How a batch is passed on: the arguments, how that was decided, and what else it could mean."""

    batch: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    how: str
    otherwise: str

    @classmethod
    def of(cls, batch: Any) -> "_Guess":
        if isinstance(batch, Mapping):
            first = next((key for key, value in batch.items() if _holds(value, Tensor.is_floating_point)), "x")
            return cls(batch, (), batch, "as keyword arguments, model(**batch)", f"model(batch[{first!r}])")
        if not isinstance(batch, list | tuple) or not batch:
            return cls(batch, (batch,), {}, "as it is, model(batch)", "model(...)")
        if not isinstance(batch[0], Tensor):
            how = f"as a whole, model(batch), because item 0 is not a tensor ({type(batch[0]).__name__})"
            return cls(batch, (batch,), {}, how, "model(*batch) or model(batch[0])")
        if not batch[0].is_floating_point():
            how = f"as a whole, model(batch), because item 0 is not floating point but {_dtype(batch[0].dtype)}"
            return cls(batch, (batch,), {}, how, "model(batch[0].float())")
        floating = next((i for i in range(1, len(batch)) if _holds(batch[i], Tensor.is_floating_point)), None)
        if floating is None:
            how = "as its item 0, model(batch[0]), because no other item is floating point"
            return cls(batch, (batch[0],), {}, how, "model(*batch)")
        holds = "is" if isinstance(batch[floating], Tensor) else "holds"
        how = f"as a whole, model(batch), because item {floating} {holds} floating point, too"
        return cls(batch, (batch,), {}, how, "model(batch[0]) or model(*batch)")

    def explained(self, model: nn.Module) -> str:
        """What was guessed for this model, and what to do if that was wrong."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        has, otherwise = "", self.otherwise
        if dtype is not None and self._is_cast_to(dtype):
            has = f" (whose parameters are {_dtype(dtype)})"
            otherwise = f"model({'batch' if self.args[0] is self.batch else 'batch[0]'}.to({dtype}))"
        return (
            f"the mini-batch, {_describe(self.batch)}, was passed to {type(model).__name__}{has} {self.how}; if that "
            f"is wrong, pass forward=lambda model, batch: {otherwise}"
        )

    def _is_cast_to(self, dtype: torch.dtype) -> bool:
        """Whether a tensor of pixels or numbers was passed that does not have this dtype; integers may be indices."""
        x = self.args[0] if self.args else None
        return isinstance(x, Tensor) and x.dtype != dtype and (x.is_floating_point() or x.dtype == torch.uint8)


def move_to(batch: Any, device: torch.device | str) -> Any:
    """The batch with every tensor in it on ``device``; containers are rebuilt, anything else is passed through.

    Reaches into mappings, lists, tuples and named tuples, and calls ``.to(device)`` of objects that have it
    (transformers' BatchEncoding, PyG's Data, packed sequences).
    """
    if isinstance(batch, Tensor):
        # A copy to the host that does not block may be read before it is there.
        return batch.to(device, non_blocking=torch.device(device).type != "cpu")
    if not isinstance(batch, Mapping | list) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: move_to(value, device) for key, value in batch.items()}
        return batch if all(moved[key] is batch[key] for key in moved) else _rebuilt(batch, moved)
    if isinstance(batch, list | tuple):
        items = [move_to(value, device) for value in batch]
        return batch if all(a is b for a, b in zip(items, batch, strict=True)) else _rebuilt(batch, items)
    return batch


def _rebuilt(batch: Any, items: Any) -> Any:
    """A container of the batch's own type with other items in it."""
    kind = type(batch)
    try:
        if isinstance(batch, Mapping):
            copied = copy.copy(batch)
            copied.update(items)  # type: ignore[attr-defined]
            return copied
        return kind(*items) if hasattr(batch, "_fields") else kind(items)
    except Exception as error:
        raise InputError(
            f"a mini-batch holds a {kind.__name__}, which cannot be rebuilt on another device: {error}. Move "
            "mini-batches in the loader, or in forward="
        ) from error


def common_device(model: nn.Module) -> torch.device | None:
    """The device that holds all parameters of a model (all buffers, if it has none); None if there are several."""
    # Not model.parameters(), which takes longer than a small model's forward to name what it yields.
    modules = list(model.modules())
    devices = {p.device for m in modules for p in m._parameters.values() if p is not None}
    devices = devices or {b.device for m in modules for b in m._buffers.values() if b is not None}
    return devices.pop() if len(devices) == 1 else None


def num_samples(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor, or the length of a list of samples."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        return num_samples(next((value for value in batch.values() if _holds(value, _has_dimensions)), None))
    if isinstance(batch, list | tuple) and batch:
        return len(batch) if _is_list_of_samples(batch) else num_samples(batch[0])
    return 1


def _is_list_of_samples(batch: Any) -> bool:
    """Detection's form: a list with one mapping, or one image without a batch dimension, for each sample."""
    if all(isinstance(item, Tensor) for item in batch):
        return isinstance(batch, list) and len({item.dim() for item in batch}) == 1 and batch[0].dim() == 3
    return all(isinstance(item, Mapping) for item in batch) or not isinstance(batch[0], Tensor | Mapping | list | tuple)


def _holds(item: Any, wanted: Callable[[Tensor], bool]) -> bool:
    """Whether a tensor that is ``wanted`` lies anywhere in nested containers."""
    if isinstance(item, Tensor):
        return wanted(item)
    if isinstance(item, Mapping):
        return any(_holds(value, wanted) for value in item.values())
    if isinstance(item, list | tuple):
        return any(_holds(value, wanted) for value in item)
    return False


def _has_dimensions(tensor: Tensor) -> bool:
    return tensor.dim() > 0


def _describe(batch: Any) -> str:
    """A batch in a few words: types and shapes, two levels deep."""

    def brief(item: Any, depth: int) -> str:
        if isinstance(item, Tensor):
            return f"Tensor{tuple(item.shape)}" + (f" of {_dtype(item.dtype)}" if item.dtype != torch.float32 else "")
        if depth and isinstance(item, Mapping):
            inner = ", ".join(f"{key!r}: {brief(value, depth - 1)}" for key, value in list(item.items())[:4])
            return f"{type(item).__name__}({inner}{', ...' if len(item) > 4 else ''})"
        if depth and isinstance(item, list | tuple):
            inner = ", ".join(brief(value, depth - 1) for value in item[:4])
            return f"{type(item).__name__}({inner}{', ...' if len(item) > 4 else ''})"
        return type(item).__name__

    return brief(batch, 2)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    """What an error says first: torch follows up with the signatures of a function, a thousand characters of them."""
    first, *rest = str(error).splitlines() or [""]
    return first[:300] + (" ..." if rest or len(first) > 300 else "")
