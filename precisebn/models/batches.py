"""What a data loader yields: how to call a model on it, move it to a device, lay it out, and copy it."""

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from precisebn.errors import BatchFormatError, InputError, add_note
from precisebn.models.nested import tensors_in

__all__ = [
    "CHANNELS_LAST",
    "ForwardFn",
    "call_model",
    "common_device",
    "copied",
    "describe_batch",
    "explain_refused_view",
    "is_passed_as_its_first_item",
    "move_to",
    "with_memory_format",
]

ForwardFn = Callable[[nn.Module, Any], Any]
"""How to call a model on a batch: ``forward(model, batch)``; a recalibration drops what it returns."""

CHANNELS_LAST = {torch.channels_last: 4, torch.channels_last_3d: 5}
"""The memory formats that a batch can be laid out in, and how many dimensions tensors of each have."""

REFUSED_VIEW = "view size is not compatible with input tensor's size and stride"  # what torch says


def call_model(model: nn.Module, batch: Any, *, is_first: bool = False) -> Any:
    """Call the model on a batch by the form of the batch.

    A mapping becomes keyword arguments; a list or tuple of one floating-point tensor followed by no other (labels,
    strings, metadata) stands for that tensor; anything else is passed as it is, as fvcore does (a PackedSequence, too,
    which is a tuple by class alone).

    That is a guess, and whatever a model raises on its first mini-batch may mean that it was wrong. The exception then
    says what was guessed. It keeps its type, so that who catches it still does; only a TypeError, which is what a wrong
    number or kind of arguments raises, becomes a BatchFormatError (a TypeError too).

    Args:
        model: what to call.
        batch: what a loader yielded.
        is_first: no mini-batch of this form has gone through this model before.

    Returns:
        What the model returns.

    Raises:
        BatchFormatError: the call is a TypeError; the message names ``forward=``.
    """
    guess = _Guess.of(batch)
    try:
        return model(*guess.args, **guess.kwargs)
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
            first = next((key for key, value in batch.items() if _holds_floating(value)), "x")
            return cls(batch, (), batch, "as keyword arguments, model(**batch)", f"model(batch[{first!r}])")
        if not isinstance(batch, list | tuple) or not batch or isinstance(batch, PackedSequence):
            return cls(batch, (batch,), {}, "as it is, model(batch)", "model(...)")
        if not isinstance(batch[0], Tensor):
            how = f"as a whole, model(batch), because item 0 is not a tensor ({type(batch[0]).__name__})"
            return cls(batch, (batch,), {}, how, "model(*batch) or model(batch[0])")
        if not batch[0].is_floating_point():
            how = f"as a whole, model(batch), because item 0 is not floating point but {_dtype(batch[0].dtype)}"
            return cls(batch, (batch,), {}, how, "model(batch[0].float())")
        floating = next((i for i in range(1, len(batch)) if _holds_floating(batch[i])), None)
        if floating is None:
            how = "as its item 0, model(batch[0]), because no other item is floating point"
            return cls(batch, (batch[0],), {}, how, "model(*batch) or model(batch)")
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
            f"the mini-batch, {describe_batch(self.batch)}, was passed to {type(model).__name__}{has} {self.how}; if "
            f"that is wrong, pass forward=lambda model, batch: {otherwise}"
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
    return _with_items(batch, lambda item: move_to(item, device))


def with_memory_format(batch: Any, memory_format: torch.memory_format) -> Any:
    """The batch with the tensors in it that have the dimensions of ``memory_format`` laid out so.

    As for ``nn.Module.to(memory_format=)``: ``torch.channels_last`` is for tensors of 4 dimensions,
    ``torch.channels_last_3d`` for those of 5; all others pass through, and so does what is inside of objects that are
    neither mapping nor list nor tuple.
    """
    if isinstance(batch, Tensor):
        fits = batch.dim() == CHANNELS_LAST[memory_format] and batch.layout == torch.strided and not batch.is_nested
        # Not contiguous(memory_format=): it leaves the strides of images of one channel, which convolutions then take
        # for those of a contiguous tensor.
        return batch.to(memory_format=memory_format) if fits else batch
    return _with_items(batch, lambda item: with_memory_format(item, memory_format))


@contextmanager
def explain_refused_view(model: nn.Module, memory_format: torch.memory_format | None) -> Iterator[None]:
    """Say what to do where a model's ``view`` does not exist in the memory format that its input was laid out in.

    Raises:
        InputError: that; names the layer and the line of its code.
    """
    try:
        yield
    except RuntimeError as error:
        if memory_format is None or REFUSED_VIEW not in str(error):
            raise
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"memory_format={memory_format}: {_raised_in(model, error)} asks for a view that does not exist in this "
            f"format (line {line.lineno} of {line.filename}: {line.line}). Use reshape instead of view there, or leave "
            "memory_format out"
        ) from error


def _raised_in(model: nn.Module, error: Exception) -> str:
    """The innermost layer in whose forward an exception was raised."""
    names = {module: name for name, module in model.named_modules()}
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    inside = [owner for owner in owners if isinstance(owner, nn.Module) and names.get(owner)]
    return f"layer {names[inside[-1]]!r} ({type(inside[-1]).__name__})" if inside else f"the {type(model).__name__}"


def _with_items(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A mapping, list or tuple with its items changed; itself where they stay, as anything else does."""
    if isinstance(batch, Mapping):
        changed = {key: change(value) for key, value in batch.items()}
        return batch if all(changed[key] is batch[key] for key in changed) else _rebuilt(batch, changed)
    if isinstance(batch, list | tuple):
        items = [change(value) for value in batch]
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
            f"a mini-batch holds a {kind.__name__}, which cannot be rebuilt with its tensors moved or laid out "
            f"anew: {error}. Do that in the loader, or in forward="
        ) from error


def common_device(model: nn.Module) -> torch.device | None:
    """The device that holds all parameters of a model (all buffers, if it has none); None if there are several."""
    # Not model.parameters(), which takes longer than a small model's forward to name what it yields.
    modules, seen = [model], {model}
    for module in modules:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    for places in ([m._parameters for m in modules], [m._buffers for m in modules]):
        devices = {tensor.device for place in places if place for tensor in place.values() if tensor is not None}
        if devices:
            return devices.pop() if len(devices) == 1 else None
    return None


def is_passed_as_its_first_item(batch: Any) -> bool:
    """Whether :func:`call_model` passes the first item of a list or tuple in the place of the whole."""
    return isinstance(batch, list | tuple) and bool(batch) and _Guess.of(batch).args[0] is batch[0]


def copied(batch: Any, remedy: str) -> Any:
    """The batch in memory of its own, which no loader writes into and no model's in-place operation reaches back from.

    Args:
        batch: what a loader yielded.
        remedy: what to do where that cannot be copied, for the message.

    Raises:
        BatchFormatError: it cannot be copied.
    """
    memo: dict[int, Any] = {}  # deepcopy finds tensors in it, and need not copy all the memory that each is a view of
    _copy_tensors(batch, memo, set())
    try:
        return copy.deepcopy(batch, memo)
    except Exception as error:
        raise BatchFormatError(
            f"the mini-batch, {describe_batch(batch)}, cannot be copied: {error}; {remedy}"
        ) from error


def _copy_tensors(item: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Copy all tensors in nested containers and attributes of objects, each once."""
    if isinstance(item, Tensor):
        if id(item) not in memo:
            memo[id(item)] = item.detach().clone().requires_grad_(item.requires_grad)
        return
    if id(item) in seen or isinstance(item, type | nn.Module):
        return
    seen.add(id(item))
    inner = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    for value in (*inner, *getattr(item, "__dict__", {}).values()):
        _copy_tensors(value, memo, seen)


def _holds_floating(item: Any) -> bool:
    """Whether a floating-point tensor lies anywhere in nested containers; objects of classes are metadata."""
    return any(map(Tensor.is_floating_point, tensors_in(item, in_data_classes=False)))


def describe_batch(batch: Any) -> str:
    """A batch in a few words: types and shapes, two levels deep."""

    def brief(item: Any, depth: int) -> str:
        if isinstance(item, Tensor):
            shape = "(nested)" if item.is_nested else tuple(item.shape)  # torch has none for it
            return f"Tensor{shape}" + (f" of {_dtype(item.dtype)}" if item.dtype != torch.float32 else "")
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
