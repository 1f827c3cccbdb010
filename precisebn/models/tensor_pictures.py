"""Pictures of tensors: of each its identity, its memory, its shape and its bits; to compare, and to put back."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from precisebn._torch import flattened

__all__ = ["PLAIN_TENSORS", "TensorPicture", "TensorPictures", "bytes_of", "dense_parts", "memory_of", "same_bits"]

PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
"""The classes of tensors that do what torch's own do."""


@dataclass(eq=False)
class TensorPicture:
    """One tensor: which it is, the memory that it lies in, and its bits.

    Attributes:
        version: how often torch had written to it; None of an inference tensor, of which nobody counts.
        alias: another tensor of the same memory, which keeps its shape when ``tensor.data`` is set to something else.
        value: its bits, in a tensor alike; or of its whole memory, for dtypes and layouts that torch cannot copy; or
            None, where there are none (meta tensors).
    """

    tensor: Tensor
    version: int | None
    requires_grad: bool
    alias: Tensor | None
    value: Any

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

    def difference(self, later: "TensorPicture") -> str:
        """How another picture differs: in what, or not at all (an empty string)."""
        if self.tensor is not later.tensor:
            return "another tensor"
        if not _same_place(self.alias, later.alias):
            return "another place in memory, or shape"
        if self.requires_grad != later.requires_grad:
            return "requires_grad"
        return "" if same_bits(self.value, later.value) else "values"


_USUAL = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64})
_Kind = tuple[torch.dtype, torch.device, torch.layout, bool]
_kind_of: Callable[[Tensor], _Kind] = attrgetter("dtype", "device", "layout", "is_nested")


def _is_usual(dtype: torch.dtype, device: torch.device, layout: torch.layout, is_nested: bool) -> bool:
    """Whether contiguous tensors of this kind can be copied many at a time."""
    return dtype in _USUAL and device.type != "meta" and layout is torch.strided and not is_nested


class TensorPictures:
    """Pictures of many tensors, the usual ones copied many at a time: one by one would take as long as a forward."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._odd: list[TensorPicture] = []
        usual: dict[_Kind, list[Tensor] | None] = {}
        with torch.no_grad():
            for tensor in tensors:
                if type(tensor) in PLAIN_TENSORS:
                    kind = _kind_of(tensor)
                    if kind not in usual:
                        usual[kind] = [] if _is_usual(*kind) else None
                    alike = usual[kind]
                    if alike is not None and tensor.is_contiguous() and not tensor.is_inference():
                        alike.append(tensor)
                        continue
                version, alias_and_value = _version(tensor), _alias_and_value(tensor)
                self._odd.append(TensorPicture(tensor, version, tensor.requires_grad, *alias_and_value))
            self._groups = [_Group(group) for group in usual.values() if group]

    def pictures(self) -> Iterator[TensorPicture]:
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

    def pictures(self) -> Iterator[TensorPicture]:
        values = self.value.split([alias.numel() for alias in self.aliases])
        everything = zip(self.tensors, self.versions, self.requires_grad, self.aliases, values, strict=True)
        for tensor, version, requires_grad, alias, value in everything:
            yield TensorPicture(tensor, version, requires_grad, alias, value.view(alias.shape))

    def may_have_changed(self) -> bool:
        """``.data`` changes without a new version; to look at the bits on another device would be to wait for it."""
        if {(t.dtype, t.device) for t in self.tensors} != {(self.value.dtype, self.value.device)}:
            return True
        if not all(map(Tensor.is_set_to, self.tensors, self.aliases)):
            return True  # in other memory, or of another shape
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


def memory_of(tensor: Tensor) -> int | None:
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
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(bytes_of(a), bytes_of(b), strict=True))


def bytes_of(tensor: Any) -> list[Tensor]:
    """The values of a tensor in their order, or a piece of memory, as bytes: a flat uint8 tensor for each dense part.

    Of two tensors of one shape and dtype these are the same just where the values are, bit by bit, in whatever order
    they lie in memory. Meta tensors have none.
    """
    return [_bytes(plain) for part in dense_parts(tensor) for plain in _plain_parts(part)]


def dense_parts(tensor: Any) -> list[Any]:
    """The dense tensors that a tensor is made of."""
    if isinstance(tensor, torch.UntypedStorage):
        return [tensor]
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for item in inner if isinstance(item, Tensor) for part in dense_parts(item)]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_nested:
        return [tensor.untyped_storage()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


def _plain_parts(dense: Any) -> list[Any]:
    """A tensor whose memory is its values; of a quantized one its integers, and what scales them.

    (A process in which a qint8 or qint32 tensor is viewed as bytes is killed, by torch 2.10 to 2.13 at least.)
    """
    if isinstance(dense, torch.UntypedStorage) or not dense.is_quantized:
        return [dense]
    if dense.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([dense.q_scale(), dense.q_zero_point()], dtype=torch.float64, device="cpu")
        return [dense.int_repr(), scale]
    return [dense.int_repr(), dense.q_per_channel_scales(), dense.q_per_channel_zero_points()]


@torch.no_grad()
def _bytes(dense: Any) -> Tensor:
    if isinstance(dense, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8, device=dense.device).set_(dense)
    flat: Tensor = dense.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.new_empty(0, device="cpu") if flat.is_meta else flat.view(torch.uint8)
