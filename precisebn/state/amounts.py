"""How far two tensors are apart: bit by bit first, and in numbers where bits differ, in pieces of bounded memory.

Tensors that are equal cost a comparison of integers at the speed of memory. Where a bit differs, the difference is
taken in float64, piece by piece, so that the scratch memory does not grow with the tensor, nor the error with its size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from precisebn.distributed import is_sharded
from precisebn.models.tensor_pictures import dense_parts
from precisebn.state.entries import place_of

__all__ = ["Amounts", "NotComparable", "amounts_between", "in_units_of", "log_ratio"]

PIECE = 16 << 20
"""Bytes that are compared at a time; what is not contiguous is copied in such pieces."""
ELEMENTS = 1 << 17
"""Values whose difference is taken at a time: 1 MiB of float64 for each side stays in most caches."""

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Devices whose pieces are compared on the CPU."""

Release = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much has changed; numbers are over all values that are finite on both sides, and None where not known.

    Attributes:
        equal: whether all bits are equal.
        num_changed: values of which some bit differs.
        non_finite: values that differ and are NaN or Inf on a side; they are in no other number.
        max_abs: the largest ``|after - before|``.
        rms: its root mean square.
        relative: the same over the root mean square of ``before``; Inf where that is 0.
        remark: why there are no numbers.
        same: whether both are one and the same tensor, at which nobody looked.
    """

    equal: bool
    num_changed: int | None = 0
    non_finite: int = 0
    max_abs: float | None = 0.0
    rms: float | None = 0.0
    relative: float | None = 0.0
    remark: str = ""
    same: bool = False


class NotComparable(Exception):
    """Two tensors whose values cannot be compared; the message says why."""


def amounts_between(
    before: Tensor, after: Tensor, *, release: tuple[Release | None, Release | None] = (None, None)
) -> Amounts:
    """Compare two tensors of one shape.

    Args:
        before: any tensor.
        after: another; of another dtype it differs, however near the values are.
        release: called with pieces of ``before`` and of ``after`` that have been read.

    Raises:
        NotComparable: there are no values on a side, or the two are of kinds that do not meet.
    """
    for side, other, name in ((before, after, "before"), (after, before, "after")):
        if side.is_meta:
            raise NotComparable(f"no values on the meta device ({name})")
        if is_sharded(side) and not is_sharded(other):
            raise NotComparable(f"sharded over ranks in {name} alone")
    if place_of(before) == place_of(after):
        return Amounts(equal=True, same=True)
    with torch.no_grad():
        before, after = before.detach(), after.detach()
        if _is_dense(before) and _is_dense(after):
            return _dense(before, after, release)
        return _by_parts(before, after)


def in_units_of(before: Tensor, after: Tensor, variance: Tensor, eps: float) -> tuple[float, float]:
    """Largest and root mean square difference of two means, in standard deviations ``sqrt(variance + eps)``.

    Over channels where all of these are finite; NaN where there is none.
    """
    old, new, var = (tensor.detach().cpu().double() for tensor in (before, after, variance))
    return _largest_and_rms((new - old) / (var + eps).sqrt())


def log_ratio(before: Tensor, after: Tensor, eps: float) -> tuple[float, float]:
    """Largest and root mean square ``|log((after + eps) / (before + eps))|`` of two variances, likewise."""
    old, new = (tensor.detach().cpu().double() + eps for tensor in (before, after))
    return _largest_and_rms(new.log() - old.log())


def _largest_and_rms(values: Tensor) -> tuple[float, float]:
    values = values[values.isfinite()].abs()
    if not values.numel():
        return math.nan, math.nan
    return values.max().item(), values.square().mean().sqrt().item()


# ---- Dense tensors ---------------------------------------------------------------------------------------------------


def _is_dense(tensor: Tensor) -> bool:
    """Whether it is strided memory of values that can be converted to float64, piece by piece."""
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain and not hasattr(tensor, "__tensor_flatten__")


def _dense(before: Tensor, after: Tensor, release: tuple[Release | None, Release | None]) -> Amounts:
    same_dtype = before.dtype == after.dtype
    if same_dtype and all(_equal_bits(x, y) for x, y in _pieces(before, after, PIECE, release)):
        return Amounts(equal=True)
    for dtype in (before.dtype, after.dtype):
        if not _converts(dtype):
            why = f"torch cannot compute with {str(dtype).removeprefix('torch.')}"
            if same_dtype:
                return Amounts(False, None, 0, None, None, None, why)
            raise NotComparable(why)
    sums = _Sums()
    for x, y in _pieces(before, after, PIECE, release):
        for a, b in zip(x.split(ELEMENTS), y.split(ELEMENTS), strict=True):
            sums.add(a, b)
    return sums.amounts(lambda: _pieces(before, after, PIECE, release))


@cache
def _converts(dtype: torch.dtype) -> bool:
    """Whether torch can convert it to float64 or complex128; it cannot with 4-bit floats."""
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(torch.complex128 if dtype.is_complex else torch.float64)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _equal_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two contiguous vectors have the same bits, compared as the widest integers that their memory allows."""
    widths = (8, 4, 2, 1)
    sizes = (x.nbytes, *(t.storage_offset() * t.element_size() for t in (x, y)))
    width = next(width for width in widths if not any(size % width for size in sizes))
    return torch.equal(x.view(_INTEGERS[width]), y.view(_INTEGERS[width]))


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _pieces(
    before: Tensor, after: Tensor, nbytes: int, release: tuple[Release | None, Release | None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The values of both in contiguous vectors on one device, a piece at a time."""
    elements = max(1, nbytes // max(before.element_size(), after.element_size()))
    for x, y in _split(*_in_order_of_memory(before, after), elements):
        a, b = _flat(x), _flat(y)
        if x.device != y.device or x.device.type in WITHOUT_FLOAT64:
            a, b = a.cpu(), b.cpu()
        yield a, b
        for piece, forget in zip((x, y), release, strict=True):
            if forget is not None:
                forget(piece)


def _flat(piece: Tensor) -> Tensor:
    flat = piece.resolve_conj().resolve_neg().reshape(-1).contiguous()
    return flat if flat.stride(0) == 1 else flat.as_strided(flat.shape, (1,))  # of a single value it may be anything


def _in_order_of_memory(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The same permutation of both, so that channels_last too can be read from one end to the other."""
    order = sorted(range(before.dim()), key=before.stride, reverse=True)  # stable: of equal strides, the first first
    x, y = before.permute(order), after.permute(order)
    return (x.view(-1), y.view(-1)) if x.is_contiguous() and y.is_contiguous() else (x, y)


def _split(x: Tensor, y: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of at most so many values, by the first dimension and, where that is not enough, by the next."""
    if x.numel() <= elements:
        if x.numel():
            yield x, y
        return
    row = x.numel() // x.shape[0]
    if row > elements:
        for i in range(x.shape[0]):
            yield from _split(x[i], y[i], elements)
    else:
        rows = elements // row
        for start in range(0, x.shape[0], rows):  # not by split, which makes all the views at once
            yield x[start : start + rows], y[start : start + rows]


class _Sums:
    """Sums over the differences of pieces, in float64.

    Squares of what is beyond 1e150 or below 1e-150 are not numbers of float64's range; these values are divided by the
    largest before, in a second pass.
    """

    def __init__(self, unit: float = 1.0, unit_before: float = 1.0) -> None:
        self.unit, self.unit_before = unit, unit_before
        self.count = self.count_before = self.num_changed = self.non_finite = 0
        self.largest = self.largest_before = 0.0
        self.squares = self.squares_before = 0.0
        self._scratch: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in one piece."""
        same = x.dtype == y.dtype and _equal_bits(x, y)
        dtype = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
        a = self._space(0, dtype, x).copy_(x)
        finite = self._add_before(a)
        if same:
            self.count += finite
            return
        self.count += x.numel()
        d = self._space(1, dtype, x).copy_(y)
        if x.dtype == y.dtype:
            self.num_changed += self._num_different(x, y)
        else:
            self.num_changed += int((torch.ne(a, d) & ~(a.isnan() & d.isnan())).count_nonzero())
        d.sub_(a)
        largest = _largest(d)
        if not math.isfinite(largest):  # NaN and Inf; or an overflow, of which there is nothing to leave out
            b = y.to(dtype)
            known = a.isfinite() & b.isfinite()
            differs = _differs(x, y) if x.dtype == y.dtype else torch.ne(a, b) & ~(a.isnan() & b.isnan())
            self.non_finite += int((differs & ~known).count_nonzero())
            self.count -= int((~known).count_nonzero())
            d = d[known]
            largest = _largest(d)
        self.largest = max(self.largest, largest)
        self.squares += _squares(d, self.unit)

    def _add_before(self, values: Tensor) -> int:
        """The sum of squares of ``before``; returns how many values are finite.

        Where the sum is in range, all of them are: one pass is enough.
        """
        squares = _squares(values, self.unit_before)
        if 1e-280 < squares < 1e280:
            largest = math.sqrt(squares / values.numel()) * self.unit_before  # at least: near enough to divide by
        else:
            values = values[values.isfinite()]
            largest, squares = _largest(values), _squares(values, self.unit_before)
        self.largest_before = max(self.largest_before, largest)
        self.count_before += values.numel()
        self.squares_before += squares
        return values.numel()

    def _num_different(self, x: Tensor, y: Tensor) -> int:
        """Values of which some bit differs."""
        if x.element_size() > 8:
            return int(_differs(x, y).count_nonzero())
        x, y = (t.view(_INTEGERS[t.element_size()]) for t in (x, y))
        return int(torch.bitwise_xor(x, y, out=self._space(2, x.dtype, x)).count_nonzero())

    def _space(self, which: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Scratch memory, the same again for every piece: to allocate it would take longer than to fill it."""
        key = (which, dtype, like.device)
        if key not in self._scratch or len(self._scratch[key]) < len(like):
            self._scratch[key] = torch.empty(len(like), dtype=dtype, device=like.device)
        return self._scratch[key][: len(like)]

    def amounts(self, pieces: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Amounts:
        """The result; ``pieces`` gives all of them again, for a second pass."""
        if _beyond(self.largest) or _beyond(self.largest_before):
            again = _Sums(_unit(self.largest), _unit(self.largest_before))
            for x, y in pieces():
                for a, b in zip(x.split(ELEMENTS), y.split(ELEMENTS), strict=True):
                    again.add(a, b)
            return again._result()
        return self._result()

    def _result(self) -> Amounts:
        rms = _root(self.squares, self.count) * self.unit
        rms_before = _root(self.squares_before, self.count_before) * self.unit_before
        relative = rms / rms_before if rms_before else math.inf if rms else 0.0
        return Amounts(False, self.num_changed, self.non_finite, self.largest, rms, relative)


def _differs(x: Tensor, y: Tensor) -> Tensor:
    """Where bits differ, value by value."""
    if x.element_size() > 8:  # complex128: two numbers a value
        return torch.ne(torch.view_as_real(x).view(torch.int64), torch.view_as_real(y).view(torch.int64)).any(1)
    width = _INTEGERS[x.element_size()]
    return torch.ne(x.view(width), y.view(width))


def _largest(values: Tensor) -> float:
    """The largest size; NaN where there is one."""
    if not values.numel():
        return 0.0
    if values.is_complex():
        return values.abs().max().item()
    low, high = values.amin().item(), values.amax().item()
    return math.nan if math.isnan(low) else max(-low, high)


def _squares(values: Tensor, unit: float) -> float:
    """The sum of squared sizes, in these units."""
    if values.is_complex():
        values = torch.view_as_real(values).view(-1)
    if unit != 1.0:
        values = values / unit
    return torch.dot(values, values).item()


def _beyond(largest: float) -> bool:
    return largest != 0 and math.isfinite(largest) and not 1e-150 < largest < 1e150


def _unit(largest: float) -> float:
    return largest if _beyond(largest) else 1.0


def _root(squares: float, count: int) -> float:
    return math.sqrt(squares / count) if count else 0.0


# ---- Others ----------------------------------------------------------------------------------------------------------


def _by_parts(before: Tensor, after: Tensor) -> Amounts:
    """Of sparse and quantized tensors, shards, and classes made of other tensors: each part for itself.

    There are numbers where values alone differ, and not where they stand or how they are scaled.
    """
    if type(before) is not type(after) or before.layout != after.layout:
        kinds = (f"{type(t).__name__} ({str(t.layout).removeprefix('torch.')})" for t in (before, after))
        raise NotComparable(" does not meet ".join(kinds))
    if before.is_quantized and after.is_quantized:
        values = _dense(before.dequantize(), after.dequantize(), (None, None))
        return values if torch.equal(before, after) else replace(values, equal=False)
    if before.is_nested:  # the caller knows that their parts have the same shapes
        before, after = (torch.cat([part.flatten() for part in whole.unbind()]) for whole in (before, after))
        return _dense(before, after, (None, None))
    parts = [[_tensor(part) for part in dense_parts(whole)] for whole in (before, after)]
    pairs = list(zip(*parts, strict=False))
    if len(parts[0]) == len(parts[1]) and all(a.shape == b.shape for a, b in pairs):
        found = [(a, _dense(a, b, (None, None))) for a, b in pairs]
        differ = [(part, amounts) for part, amounts in found if not amounts.equal]
        if not differ:
            return Amounts(equal=True)
        if len(differ) == 1 and (differ[0][0].is_floating_point() or differ[0][0].is_complex() or len(pairs) == 1):
            return differ[0][1]
    return Amounts(False, None, 0, None, None, None, "other parts than values differ")


def _tensor(part: Tensor | torch.UntypedStorage) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach()
    return torch.empty(0, dtype=torch.uint8, device=part.device).set_(part)
