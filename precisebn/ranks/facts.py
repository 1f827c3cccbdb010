"""What of a model is compared between ranks: every parameter and buffer, and the flags that decide what they become."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precisebn.distributed import describe_shards, is_sharded, reshard, sharded_flat, whole_of
from precisebn.models.checksums import checksums
from precisebn.models.selection import named_modules
from precisebn.models.statistics_buffers import statistics_buffers, statistics_of
from precisebn.models.tensor_pictures import PLAIN_TENSORS, bytes_of

__all__ = ["Fact", "Facts", "Scale"]


class Fact(NamedTuple):
    """One thing that is to be equal on all ranks: so it is where all but ``skipped`` is; made of what JSON knows.

    Attributes:
        kind: "parameter", "statistic" (running statistics), "buffer"; or "requires_grad", "training": flags.
        name: of the tensor or the module.
        text: what it is in words: dtype and shape, or the flag itself.
        checksum: of its values; None where they are not compared, and of flags.
        size: bytes, where values can be sent as they are; else None.
        skipped: why values are not compared; empty where they are.
    """

    kind: str
    name: str
    text: str
    checksum: str | None = None
    size: int | None = None
    skipped: str = ""


class Scale(NamedTuple):
    """In which units a running mean or variance differs: what the layer divides by is ``sqrt(var + eps)``."""

    of: str
    """"mean" or "var"."""
    var: Tensor
    var_name: str
    eps: float


class Facts:
    """The facts of this rank's model.

    Attributes:
        by_key: the facts, by kind and name.
        tensors: the tensors whose values are compared, by name.
        scales: of running means and variances among them, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.scales: dict[str, Scale] = {}
        modules = list(named_modules(model, remove_duplicate=False))
        reshard(module for _, module in modules)
        in_pieces = {id(parameter) for parameter in sharded_flat(module for _, module in modules)}
        found: dict[tuple[str, str], Fact] = {}
        first_names: dict[int, str] = {}
        for prefix, module in modules:
            found["training", prefix] = Fact("training", prefix, "training" if module.training else "eval mode")
            for name, kind, tensor in _tensors(prefix, module):
                if kind == "parameter":
                    trained = "trained" if tensor.requires_grad else "frozen"
                    found["requires_grad", name] = Fact("requires_grad", name, trained)
                first = first_names.setdefault(id(tensor), name)
                if first == name:
                    found[kind, name] = self._describe(kind, name, tensor, id(tensor) in in_pieces)
                else:
                    found[kind, name] = Fact(kind, name, f"the same tensor as {first}")
            self._note_scales(prefix, module)
        sums = dict(zip(self.tensors, checksums(map(_bytes_of, self.tensors.values())), strict=True))
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if sums[name] is not None}
        self.by_key = {key: _completed(fact, sums) for key, fact in found.items()}

    def digest(self) -> str:
        """One text that is the same on two ranks just where all facts are; the order of layers does not count."""
        return hashlib.sha256(json.dumps(sorted(self.by_key.values())).encode()).hexdigest()

    def _describe(self, kind: str, name: str, tensor: Tensor, in_pieces: bool) -> Fact:
        if is_lazy(tensor):
            return Fact(kind, name, "no values yet (lazy)", skipped="lazy, without values yet")
        shape = "nested" if tensor.is_nested else tuple(tensor.shape)
        text = f"{str(tensor.dtype).removeprefix('torch.')} {shape}"
        if in_pieces:
            return Fact(kind, name, "cut by FullyShardedDataParallel", skipped=SHARDED)
        if is_sharded(tensor):
            text = f"{text} {describe_shards(tensor)}"
        whole = whole_of(tensor)
        if whole is None:
            return Fact(kind, name, text, skipped=SHARDED)
        if whole.is_meta:
            return Fact(
                kind, name, f"{text} on the meta device", skipped="on the meta device, where nothing has values"
            )
        self.tensors[name] = whole
        plain = type(whole) in PLAIN_TENSORS and whole.layout is torch.strided
        plain = plain and not (whole.is_quantized or whole.is_nested) and _is_number(whole.dtype)
        return Fact(kind, name, text, size=whole.numel() * whole.element_size() if plain else None)

    def _note_scales(self, prefix: str, module: nn.Module) -> None:
        """Which buffers of a layer are running means, and which the variances of the same populations."""
        buffers = dict(module._buffers.items())  # of torch.jit, no dictionary
        for name, one in statistics_of(module).items():
            own, var = buffers[name], buffers.get(one.var)
            if own is None or var is None or not one.role or is_lazy(own) or is_lazy(var):
                continue
            if own.shape == var.shape:
                self.scales[_joined(prefix, name)] = Scale(one.role, var, _joined(prefix, one.var), one.eps or 0.0)


SHARDED = "sharded: every rank holds a part of it"
_TENSORS = frozenset({"parameter", "statistic", "buffer"})


def _tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind and tensor of what a module itself has, buffers outside of its state dict included."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield _joined(prefix, name), "parameter", parameter
    statistics = statistics_buffers(module)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield _joined(prefix, name), "statistic" if name in statistics else "buffer", buffer


@cache
def _is_number(dtype: torch.dtype) -> bool:
    """Whether values of a dtype can be subtracted: not those that are packed or quantized."""
    if dtype.is_complex:
        return True
    try:
        torch.zeros(16, dtype=torch.uint8, device="cpu").view(dtype).double()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _bytes_of(tensor: Tensor) -> list[Tensor] | None:
    """The bits of a tensor; None of the few kinds of which torch does not show them."""
    try:
        return bytes_of(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def _completed(fact: Fact, sums: Mapping[str, str | None]) -> Fact:
    """The same with its checksum, if it is of a tensor of which there should be one."""
    if fact.kind not in _TENSORS or fact.skipped or fact.name not in sums:
        return fact
    checksum = sums[fact.name]
    unknown = "of a kind whose bits torch does not show"
    return fact._replace(checksum=checksum) if checksum is not None else fact._replace(size=None, skipped=unknown)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
