"""StateDiff: what differs between two states, tensor by tensor, and how it is shown."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precisebn._reports import aligned, by_reason, counted, few, needs_matplotlib, plain, saved
from precisebn.state.entries import KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STATUSES", "StateDiff", "TensorDiff"]

STATUSES = ("changed", "other shape", "only before", "only after", "not compared", "unchanged")
"""What can be said of a tensor; all but the last two are differences."""

DIFFERENT = frozenset(STATUSES[:4])
TITLES = {"parameter": "parameters", "statistic": "running statistics", "buffer": "other buffers", "value": "values"}


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor of a :class:`StateDiff`.

    *Changed* means that some bit is another one: NaN equals the same NaN, and 0.0 differs from -0.0, by a difference
    of 0. Numbers are over values that are finite on both sides, taken in float64; None where there are none.

    Attributes:
        name: qualified name, without wrappers.
        kind: ``"parameter"``, ``"statistic"`` (running statistics), ``"buffer"`` (others) or ``"value"`` (no tensor).
        status: ``"changed"``, ``"other shape"``, ``"only before"``, ``"only after"``, ``"not compared"`` or
            ``"unchanged"``.
        remark: what else there is to say: another dtype, why it was not compared.
        shared_with: other names of the same tensor.
        shape_before: None where it is on the other side alone, as the next three.
        shape_after: the same after.
        dtype_before: ``"float32"``.
        dtype_after: the same after.
        num_changed: values of which some bit differs.
        non_finite: how many of these are NaN or Inf on a side.
        max_abs: the largest ``|after - before|``.
        rms: its root mean square.
        relative: the same over the root mean square of ``before``; Inf where that is 0.
        unit: of ``drift``: ``"std"`` for a running mean: standard deviations before, ``sqrt(running_var + eps)``;
            ``"log"`` for a running variance: ``|log|`` of the ratio of ``running_var + eps``, so that 0.1 is about
            10%; empty for everything else.
        drift: root mean square over channels, in this unit.
        max_drift: in the worst channel.
    """

    name: str
    kind: str
    status: str
    remark: str = ""
    shared_with: tuple[str, ...] = ()
    shape_before: tuple[int, ...] | None = None
    shape_after: tuple[int, ...] | None = None
    dtype_before: str | None = None
    dtype_after: str | None = None
    num_changed: int | None = None
    non_finite: int = 0
    max_abs: float | None = None
    rms: float | None = None
    relative: float | None = None
    unit: str = ""
    drift: float | None = None
    max_drift: float | None = None

    @property
    def layer(self) -> str:
        """The name of the module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> float:
        """By what tables are sorted: drift where there is one, else ``relative``; Inf for what has no measure."""
        if self.status not in DIFFERENT:
            return -1.0
        if self.status != "changed" or self.non_finite:
            return math.inf
        if _is_count(self):
            return 0.0
        known = self.drift if self.drift is not None else self.relative
        return math.inf if known is None or math.isnan(known) else known


@dataclass(frozen=True, slots=True, repr=False)
class StateDiff:
    """What :func:`precisebn.diff_state` has found. ``str()`` is a table, ``diff["backbone.bn1"]`` a part, ``plot()``.

    True where anything differs: values, shapes, dtypes, or which tensors there are. Flags and notes do not count.

    Attributes:
        rows: one :class:`TensorDiff` for every tensor, in the order of ``before``, unchanged ones too. A shared tensor
            has one.
        training: modules that went from training to eval mode or back: ``(before, after)`` by name.
        requires_grad: parameters that were frozen or unfrozen, likewise.
        notes: what the reader should know of the comparison, in sentences.

    Example:
        >>> from precisebn import diff_state
        >>> import torch
        >>> before = {"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2), "w": torch.ones(3)}
        >>> after = {"bn.running_mean": torch.tensor([0.5, 0.0]), "bn.running_var": torch.ones(2), "v": torch.ones(3)}
        >>> diff = diff_state(before, after)
        >>> bool(diff), [row.name for row in diff.changed], [row.name for row in diff.only_before]
        (True, ['bn.running_mean'], ['w'])
        >>> row = diff["bn"].changed[0]
        >>> row.kind, row.max_abs, row.num_changed, f"{row.max_drift:.3f} {row.unit}"
        ('statistic', 0.5, 1, '0.500 std')
    """

    rows: tuple[TensorDiff, ...]
    training: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    requires_grad: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[TensorDiff, ...]:
        """Tensors on both sides, of one shape, whose bits or dtype differ."""
        return self._of_status("changed")

    @property
    def unchanged(self) -> tuple[TensorDiff, ...]:
        """Tensors all of whose bits are the same."""
        return self._of_status("unchanged")

    @property
    def only_before(self) -> tuple[TensorDiff, ...]:
        """Tensors that are not in ``after``."""
        return self._of_status("only before")

    @property
    def only_after(self) -> tuple[TensorDiff, ...]:
        """Tensors that are not in ``before``."""
        return self._of_status("only after")

    @property
    def other_shape(self) -> tuple[TensorDiff, ...]:
        """Tensors that have another shape."""
        return self._of_status("other shape")

    @property
    def not_compared(self) -> tuple[TensorDiff, ...]:
        """Tensors of which nothing is known; ``remark`` says why."""
        return self._of_status("not compared")

    @property
    def is_empty(self) -> bool:
        """Whether no difference was found."""
        return not self

    def __bool__(self) -> bool:
        return any(row.status in DIFFERENT for row in self.rows)

    @property
    def layers(self) -> dict[str, tuple[TensorDiff, ...]]:
        """The rows of each module that has tensors of its own, by name."""
        found: dict[str, list[TensorDiff]] = {}
        for row in self.rows:
            found.setdefault(row.layer, []).append(row)
        return {layer: tuple(rows) for layer, rows in found.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """How many tensors of each kind there are of each status; only what there is."""
        found: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            for status in STATUSES:
                if number := sum(row.kind == kind and row.status == status for row in self.rows):
                    found.setdefault(kind, {})[status] = number
        return found

    def __getitem__(self, name: str) -> "StateDiff":
        """The part of it that belongs to one tensor, to one layer, or to all layers of a module.

        Raises:
            KeyError: there is none of that name; the message says which come near.
        """
        if not isinstance(name, str):
            raise KeyError(f"layers and tensors are looked up by name, not by {type(name).__name__}; `rows` has all")

        def inside(other: str) -> bool:
            return other == name or other.startswith(f"{name}.") or not name

        rows = tuple(row for row in self.rows if any(map(inside, (row.name, *row.shared_with))))
        training, requires_grad = (
            {key: flip for key, flip in flips.items() if inside(key)} for flips in (self.training, self.requires_grad)
        )
        if not rows and not training:
            raise KeyError(self._why_missing(name))
        return replace(self, rows=rows, training=training, requires_grad=requires_grad)

    def __contains__(self, name: object) -> bool:
        try:
            return bool(self[name].rows)  # type: ignore[index]
        except KeyError:
            return False

    # Without this, iter() would ask for diff[0], diff[1], ...: what to loop over is `rows`.
    __iter__ = None

    def _of_status(self, status: str) -> tuple[TensorDiff, ...]:
        return tuple(row for row in self.rows if row.status == status)

    def _why_missing(self, name: str) -> str:
        names = {part for row in self.rows for part in (row.name, row.layer)}
        ending = sorted(other for other in names if other.endswith(f".{name}"))
        near = ending[:3] or difflib.get_close_matches(name, names)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"no tensor and no layer {name!r} was compared{hint}"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN and Inf, which JSON has not, become None)."""
        result: dict[str, Any] = plain(
            {"different": bool(self), "counts": self.counts(), **asdict(self), "layers": list(self.layers)}
        )
        return result

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw how far each tensor that has changed has moved: parameters and buffers, means, variances.

        Needs matplotlib, which the extra ``plot`` brings.

        Args:
            path: where to save the picture as well; its suffix chooses the format (png, svg, pdf).

        Returns:
            The figure, one row for each layer in which something has changed.

        Raises:
            ImportError: matplotlib is not installed.
        """
        with needs_matplotlib(self):
            from precisebn.state.plot import draw
        return saved(draw(self), path)

    def __repr__(self) -> str:
        """One line: the table is what ``print`` shows."""
        different = sum(row.status in DIFFERENT for row in self.rows)
        return f"<StateDiff: {different} of {counted(len(self.rows), 'tensor')} differ>"

    def __str__(self) -> str:
        return self.table()

    def table(self, limit: int | None = 20) -> str:
        """The table that ``str()`` shows: counts, the largest differences, flags and notes.

        Args:
            limit: how many tensors are shown, those that differ most; None: all that differ.
        """
        largest = sorted((row for row in self.rows if row.status in DIFFERENT), key=lambda row: -row.size)
        shown = largest[:limit]
        lines = [self._headline(), *aligned(self._summary())]
        if shown:
            lines += ["", *aligned([_HEAD, *map(_cells, shown)], left=("kind", "shape"))]
            if len(largest) > len(shown):
                lines.append(f"... and {len(largest) - len(shown)} more")
            lines += _legend(shown)
        return "\n".join([*lines, *self._remarks()])

    def _headline(self) -> str:
        different = [row for row in self.rows if row.status in DIFFERENT]
        if not different:
            return f"nothing differs in {counted(len(self.rows), 'tensor')}"
        layers = len({row.layer for row in different})
        whose = f"{len(different)} of {counted(len(self.rows), 'tensor')}"
        return f"{whose} differ{'s' if len(different) == 1 else ''}, in {counted(layers, 'layer')}"

    def _summary(self) -> list[Sequence[str]]:
        counts = self.counts()
        statuses = [status for status in STATUSES if any(status in of_kind for of_kind in counts.values())]
        if not statuses:
            return []
        rows = [(TITLES[kind], *(str(counts[kind].get(status, "-")) for status in statuses)) for kind in counts]
        return [("", *statuses), *rows]

    def _remarks(self) -> list[str]:
        lines = []
        for what, flips in (("training mode", self.training), ("requires_grad", self.requires_grad)):
            for value in (True, False):
                names = [repr(name) for name, (_, after) in flips.items() if after is value]
                if names:
                    lines.append(f"{what} is now {value} in {len(names)}: {few(names)}")
        reasons = by_reason({row.name: row.remark for row in self.not_compared})
        lines += [f"{len(names)} not compared: {reason}: {few(names)}" for reason, names in reasons.items()]
        return [*lines, *(f"note: {note}" for note in self.notes)]


_HEAD = ("tensor", "kind", "shape", "changed", "max |d|", "rms d", "relative", "drift")


def _cells(row: TensorDiff) -> Sequence[str]:
    """A row of the table."""
    start = (_with_shares(row), row.kind, _shapes(row))
    if row.status != "changed":
        return (*start, row.status, "", "", "", "")
    changed = "bits" if row.num_changed is None else str(row.num_changed)
    if row.non_finite:
        changed += f" ({row.non_finite} NaN/Inf)"
    drift = f"{_number(row.drift)} {row.unit}" if row.unit else ""
    relative = "" if row.unit or _is_count(row) else _number(row.relative)
    return (*start, row.remark or changed, _number(row.max_abs), _number(row.rms), relative, drift)


def _is_count(row: TensorDiff) -> bool:
    """Whether it has no size that compares with others."""
    return row.name.endswith("num_batches_tracked")


def _with_shares(row: TensorDiff) -> str:
    return f"{row.name or '(unnamed)'} (= {', '.join(row.shared_with)})" if row.shared_with else row.name or "(unnamed)"


def _shapes(row: TensorDiff) -> str:
    """One shape, or two that differ."""
    shapes = ["x".join(map(str, s)) or "()" for s in (row.shape_before, row.shape_after) if s is not None]
    return " -> ".join(dict.fromkeys(shapes))


def _legend(rows: Iterable[TensorDiff]) -> list[str]:
    """What the columns mean, of those that are there."""
    rows = list(rows)
    units = {row.unit for row in rows}
    lines = []
    if any(row.relative is not None and not row.unit and not _is_count(row) for row in rows):
        lines.append("(relative: rms d over rms before)")
    if units & {"std", "log"}:
        lines.append("(drift: rms over channels; of a mean in std before, of a variance |log ratio|)")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
