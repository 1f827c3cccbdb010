"""What buffers a recalibration can write: looked at before the first mini-batch runs, and not found out after the last.

Each population needs floating-point memory of its own. Views into one flat tensor, as sharding makes them, are fine as
long as they do not overlap, and so is one layer in several places: that has one population.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from precisebn import ops
from precisebn.errors import InputError
from precisebn.nn.population import RunningStatistics

__all__ = ["check_writable"]


def check_writable(layers: Iterable[tuple[str, nn.Module, Sequence[RunningStatistics]]]) -> None:
    """Raise where running statistics cannot be written, or not without writing others.

    Args:
        layers: by qualified name, each with its populations.

    Raises:
        InputError: statistics that are integers or complex; inference tensors; expanded tensors; tensors that share
            memory with others. Names the layers, and the remedy.
    """
    buffers: list[_Buffer] = []
    counters: list[_Buffer] = []
    for name, layer, populations in layers:
        for one in populations:
            buffers.append((one.mean, "running_mean", one, name, layer))
            buffers.append((one.var, "running_var", one, name, layer))
            if one.num_batches is not None:
                counters.append((one.num_batches, "num_batches_tracked", one, name, layer))
    for buffer in buffers:
        if buffer[0].dtype not in ops.DTYPES:
            raise InputError(_why_no_statistics(buffer))
    if not torch.is_inference_mode_enabled():  # where they can be written
        for buffer in (*buffers, *counters):
            if buffer[0].is_inference():
                raise InputError(_why_inference(buffer))
    _refuse_shared_memory(buffers)


_Buffer = tuple[Tensor, str, RunningStatistics, str, nn.Module]
"""A tensor, what it is, whose population's, and that of which layer: a plain tuple, of which a network has hundreds."""


def _shown(buffer: _Buffer) -> str:
    _, kind, one, name, layer = buffer
    return f"{kind} of layer {one.named(name)!r} ({type(layer).__name__})"


def _refuse_shared_memory(buffers: Sequence[_Buffer]) -> None:
    """In one pass over pieces of memory in the order of their addresses."""
    devices: dict[int, list[tuple[int, int, int]]] = {}
    for index, (tensor, *_) in enumerate(buffers):
        devices.setdefault(tensor.get_device(), []).extend(_extents(tensor, index))
    for extents in devices.values():
        extents.sort()
        last_end, last = 0, 0
        for begin, end, index in extents:
            if begin < last_end:
                raise InputError(_why_shared(buffers[last], buffers[index]))
            last_end, last = end, index


def _extents(tensor: Tensor, index: int) -> list[tuple[int, int, int]]:
    """The pieces of memory, from address to address, that hold its elements; each with its number."""
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # wrappers around others, which have none of their own
        return []
    if tensor.is_contiguous():
        return [(begin, begin + tensor.nbytes, index)] if tensor.nbytes else []
    size, offsets = tensor.element_size(), [0]
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = [offset + step * stride for offset in offsets for step in range(length)]
    return [(begin + offset * size, begin + (offset + 1) * size, index) for offset in offsets]


def _why_no_statistics(buffer: _Buffer) -> str:
    tensor, kind, *_ = buffer
    return (
        f"{_shown(buffer)} is {str(tensor.dtype).removeprefix('torch.')}, which cannot hold a mean or a variance; make "
        f"it floating point: layer.{kind} = layer.{kind}.to(torch.float32)"
    )


def _why_inference(buffer: _Buffer) -> str:
    _, kind, *_ = buffer
    return (
        f"{_shown(buffer)} is an inference tensor, made inside torch.inference_mode(), which nothing can write into "
        f"outside of that; copy it outside: layer.{kind} = layer.{kind}.clone()"
    )


def _why_shared(one: _Buffer, other: _Buffer) -> str:
    kind = other[1]
    if one is other:
        return (
            f"several elements of {_shown(one)} are one and the same in memory (it was expanded), so they cannot be "
            f"written; give each its own: layer.{kind} = layer.{kind}.clone()"
        )
    return (
        f"{_shown(one)} and {_shown(other)} share memory, so the statistics of the one would overwrite those of the "
        f"other; give each its own, layer.{kind} = layer.{kind}.clone(), or use one and the same module in both places"
    )
