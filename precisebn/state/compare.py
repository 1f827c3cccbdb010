"""diff_state: what differs between two models, snapshots, state dicts or checkpoint files."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from precisebn import _warnings
from precisebn.errors import InputError
from precisebn.state.amounts import Amounts, NotComparable, amounts_between, in_units_of, log_ratio
from precisebn.state.checkpoints import state_of_file, state_of_mapping
from precisebn.state.diff import StateDiff, TensorDiff
from precisebn.state.entries import KINDS, Entry, State, Uninitialized
from precisebn.state.names import Side, aligned, check_common
from precisebn.state.snapshot import StateSnapshot, state_of_model

__all__ = ["Comparable", "compare_states", "diff_state"]

Comparable = nn.Module | StateSnapshot | Mapping[Any, Any] | str | os.PathLike[str]
"""What can be a side: a model, a snapshot, a state dict or checkpoint, the path of a file with one."""

EPS = 1e-5
"""nn.BatchNorm's default, where a side has no layers that say theirs."""


def diff_state(before: Comparable, after: Comparable) -> StateDiff:
    """Say which parameters, running statistics and other buffers differ, and by how much.

    Bits are compared first, at the speed of memory or of the disk; numbers are worked out in float64 for what differs.
    Tensors are read one after the other and in pieces, so that memory does not grow with a file. Nothing is changed.

    Args:
        before: a model; what :func:`snapshot` returned; a state dict, also with mappings and lists in it, as an
            optimizer's; a checkpoint that holds the model under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``
            (the first of these, where the checkpoint has no tensors beside it; pass ``checkpoint["model_ema"]`` for any
            other); or the path of a file: of torch.save, which is read with ``weights_only=True``, of safetensors, or
            the ``.index.json`` of several.
        after: the same. The two need not be of one sort.

    Names are compared without what DDP, torch.compile and averages put in front of them (``module.``, ``_orig_mod.``).
    Of shared tensors each is compared once; a file that keeps only one of their names has all of them. Without a
    module at hand, running statistics are told by their names, other floating-point tensors count as parameters, and
    integers as buffers. Buffers that are in no state dict (``persistent=False``) are not missed in one. Of tensors that
    are sharded over ranks, each rank compares its part.

    Raises:
        InputError: a path without a file, a file that holds no checkpoint or more than tensors, something else that
            cannot be compared, or two sides that have no name in common.

    Example:
        >>> import copy, torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> before = copy.deepcopy(model.state_dict())
        >>> _ = model[1](torch.tensor([[0.0, 2.0], [1.0, 2.0]]))
        >>> print(diff_state(before, model))  # doctest: +NORMALIZE_WHITESPACE
        3 of 7 tensors differ, in 1 layer
                            changed  unchanged
        parameters                -          4
        running statistics        3          -
        <BLANKLINE>
        tensor                 kind       shape  changed  max |d|   rms d       drift
        1.running_mean         statistic  2            2      0.2   0.146   0.146 std
        1.running_var          statistic  2            2      0.1  0.0791  0.0829 log
        1.num_batches_tracked  statistic  ()      0 to 1        1       1
        (drift: rms over channels; of a mean in std before, of a variance |log ratio|)
    """
    states = [_state_of(side, name) for side, name in ((before, "before"), (after, "after"))]
    check_common(*states)
    diff, same_memory = compare_states(*states)
    if same_memory and same_memory == len(diff.rows):
        _warnings.warn(
            "before and after are the same tensors, so that no change can show: state_dict() does not copy; take "
            "snapshot(model) before, or copy.deepcopy(model.state_dict())"
        )
    return diff


def _state_of(given: Any, name: str) -> State:
    if isinstance(given, StateSnapshot):
        return replace(given.state, source=name)
    if isinstance(given, nn.Module):
        return replace(state_of_model(given), source=f"{name}.state_dict()")
    if isinstance(given, Mapping):
        return state_of_mapping(given, name)
    if isinstance(given, str | os.PathLike):
        return state_of_file(Path(os.fspath(given)), name)
    remedy = "; pass its state_dict()" if hasattr(given, "state_dict") else ""
    what = "a model, a snapshot, a state dict or the path of a checkpoint"
    raise InputError(f"{name} must be {what}, not {type(given).__name__}{remedy}")


def compare_states(before: State, after: State) -> tuple[StateDiff, int]:
    """The differences, and how many tensors were one and the same on both sides."""
    b, a = aligned(before, after)
    asked = [kinds for kinds in (before.kinds, after.kinds) if kinds is not None]
    allowed = frozenset(KINDS).intersection(*asked)
    rows, same_memory, hidden = [], 0, 0
    for names, old, new in _pairs(b, a):
        kind = _kind(old, new)
        if kind not in allowed:
            continue
        if _in_no_state_dict(old, new, after) or _in_no_state_dict(new, old, before):
            hidden += 1
            continue
        row, same = _Comparison(b, a, names, kind).row(old, new)
        rows.append(row)
        same_memory += same
    notes = [*before.notes, *after.notes, *b.notes(before), *a.notes(after)]
    if hidden:
        what = "buffer is in no state dict, and is" if hidden == 1 else "buffers are in no state dict, and are"
        notes.append(f"{hidden} {what} left out (persistent=False)")
    notes += [*_sharing(b, a, "no longer share"), *_sharing(a, b, "share now, and did not before,")]
    if any(row.unit for row in rows) and not any(side.knows_eps for side in (b, a)):
        notes.append(f"eps taken to be {EPS:g}: state dicts do not say theirs")
    training, requires_grad = (
        {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}
        for old, new in ((before.training, after.training), (before.requires_grad, after.requires_grad))
    )
    return StateDiff(tuple(rows), training, requires_grad, tuple(dict.fromkeys(notes))), same_memory


def _in_no_state_dict(entry: Entry | None, other: Entry | None, on: State) -> bool:
    """Whether nothing else could be expected than that it is missing there."""
    return entry is not None and other is None and not entry.persistent and not on.whole


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def _pairs(before: Side, after: Side) -> Iterator[tuple[list[str], Entry | None, Entry | None]]:
    """What belongs together, under the names that it has on either side; each pair once."""
    found: dict[tuple[int, int], tuple[list[str], Entry | None, Entry | None]] = {}
    for name in dict.fromkeys([*before.entries, *after.entries]):
        old, new = before.entries.get(name), after.entries.get(name)
        if old is None and new is not None:
            old = _under_another_name(new, after, before)
        elif new is None and old is not None:
            new = _under_another_name(old, before, after)
        found.setdefault((id(old), id(new)), ([], old, new))[0].append(name)
    yield from found.values()


def _under_another_name(entry: Entry, side: Side, other: Side) -> Entry | None:
    """Of a shared tensor: safetensors, for one, keeps a single of its names."""
    return next((other.entries[name] for name in side.names(entry) if name in other.entries), None)


def _kind(old: Entry | None, new: Entry | None) -> str:
    """What a module says counts more than what a name looks like."""
    entries = [entry for entry in (old, new) if entry is not None]
    return next((entry.kind for entry in entries if entry.certain), entries[0].kind)


def _sharing(side: Side, other: Side, what: str) -> Iterator[str]:
    """Names of one tensor on this side that are several on the other."""
    for entry in {id(entry): entry for entry in side.entries.values() if len(entry.names) > 1}.values():
        names = [name for name in side.names(entry) if name in other.entries]
        if len({id(other.entries[name]) for name in names}) > 1:
            yield f"{' and '.join(map(repr, names))} {what} memory"


class _Comparison:
    """One pair to compare."""

    def __init__(self, before: Side, after: Side, names: list[str], kind: str) -> None:
        self.before, self.after, self.names, self.kind = before, after, names, kind

    def row(self, old: Entry | None, new: Entry | None) -> tuple[TensorDiff, bool]:
        """What differs, and whether both are one and the same tensor."""
        a, b = (None if entry is None else entry.load() for entry in (old, new))
        status, remark = "", ""
        facts: dict[str, Any] = {}
        same = False
        if old is None or new is None:
            status = "only after" if old is None else "only before"
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            status, remark, facts, same = self._tensors(a, b, old, new)
        else:
            status, remark = _values(a, b)
        for side, value in (("before", a), ("after", b)):
            if isinstance(value, Tensor):
                facts[f"shape_{side}"] = _shape(value)
                facts[f"dtype_{side}"] = _dtype(value)
        return TensorDiff(self.names[0], self.kind, status, remark, tuple(self.names[1:]), **facts), same

    def _tensors(self, a: Tensor, b: Tensor, old: Entry, new: Entry) -> tuple[str, str, dict[str, Any], bool]:
        if _extent(a) != _extent(b):
            return "other shape", "", {}, False
        try:
            amounts = amounts_between(a, b, release=(self.before.release, self.after.release))
        except NotComparable as reason:
            return "not compared", str(reason), {}, False
        if amounts.equal:
            return "unchanged", "", {}, amounts.same
        remark = f"{_dtype(a)} to {_dtype(b)}" if a.dtype != b.dtype else ""
        facts = {name: getattr(amounts, name) for name in ("num_changed", "non_finite", "max_abs", "rms", "relative")}
        facts |= self._drift(a, b, old, new, amounts)
        if a.numel() == 1 and amounts.max_abs is not None and _is_plain(a) and not (remark or "unit" in facts):
            remark = f"{_brief(a.item())} to {_brief(b.item())}"
        return "changed", ", ".join(filter(None, (remark, amounts.remark))), facts, False

    def _drift(self, a: Tensor, b: Tensor, old: Entry, new: Entry, amounts: Amounts) -> dict[str, Any]:
        """Of running statistics, in units that mean the same in every layer."""
        statistic = old.statistic or new.statistic
        if statistic is None or not statistic.role or amounts.max_abs is None or not _is_plain(a):
            return {}
        eps = next((s.eps for s in (old.statistic, new.statistic) if s is not None and s.eps is not None), EPS)
        if statistic.role == "var":
            unit, (worst, drift) = "log", log_ratio(a, b, eps)
        else:
            named_by = self.before if old.statistic is not None else self.after
            variance = self.before.tensor(named_by.rename(statistic.var))
            if variance is None or variance.shape != a.shape or variance.is_meta:
                return {}
            unit, (worst, drift) = "std", in_units_of(a, b, variance, eps)
        return {} if math.isnan(drift) else {"unit": unit, "drift": drift, "max_drift": worst}


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _values(a: Any, b: Any) -> tuple[str, str]:
    """Compare what is no tensor, on a side at least."""
    for value, side in ((a, "before"), (b, "after")):
        if isinstance(value, Uninitialized):
            return "not compared", f"not initialized yet ({side})"
    if isinstance(a, Tensor) != isinstance(b, Tensor) or type(a) is not type(b):
        return "changed", f"{type(a).__name__} to {type(b).__name__}"
    if not isinstance(a, _PLAIN):
        return "not compared", f"a value of {type(a).__name__}"
    if a == b or (a != a and b != b):
        return "unchanged", ""
    return "changed", f"{_brief(a)} to {_brief(b)}"


def _is_plain(tensor: Tensor) -> bool:
    """Whether it holds its values itself, and is no shard or wrapper."""
    return not hasattr(tensor, "__tensor_flatten__")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; of a nested tensor -1 where its parts differ."""
    if not tensor.is_nested:
        return tuple(tensor.shape)
    parts = [part.shape for part in tensor.unbind()]
    return len(parts), *(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*parts, strict=True))


def _extent(tensor: Tensor) -> object:
    """What is equal where every value of one has its counterpart in the other: of a nested tensor, of its parts."""
    return [part.shape for part in tensor.unbind()] if tensor.is_nested else tensor.shape


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 40 else f"{shown[:37]}..."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
