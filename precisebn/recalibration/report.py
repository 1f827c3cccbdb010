"""UpdateReport: what a recalibration changed, layer by layer, and how far the result can be trusted."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from precisebn import ops
from precisebn._reports import aligned, by_reason, counted, few, needs_matplotlib, plain, saved
from precisebn.recalibration.undo import Undo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerReport", "UpdateReport", "fallback_in_use", "frozen_parameters", "largest"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of an :class:`UpdateReport`.

    A channel that is constant in the data is *dead*: its variance is so small against the layer's ``eps`` that what it
    puts out varies by less than a hundredth of what a normalized channel does (``var <= eps / 10**4``). What the layer
    divides it by is ``sqrt(eps)``, a number of the layer's and not of the data: a mean that is off by 1 would be off by
    316 of these for an ``eps`` of 1e-5, and say nothing. So dead channels are counted, and left out of everything else.

    Attributes:
        name: qualified name in the model.
        num_channels: C.
        dead_channels: how many of them are constant in the data.
        num_batches: mini-batches that reached the layer, over all ranks.
        count: values per channel that the new statistics come from, over all ranks.
        mean_drift: how far the old running mean was from the new one, in standard deviations of the new
            (``sqrt(var + eps)``), root mean square over channels; 0 where all channels are dead.
        max_mean_drift: the same, in the worst channel.
        var_drift: ``log`` of the old over the new ``var + eps``, root mean square over channels: 0.1 means that the
            variances were off by about 10%.
        max_var_drift: its size in the worst channel.
        mean_error: standard error of the new mean, in the units of ``mean_drift``, root mean square over channels; NaN
            below 8 mini-batches.
        var_error: standard error of the new variance relative to ``var + eps``, likewise.
    """

    name: str
    num_channels: int
    dead_channels: int
    num_batches: int
    count: int
    mean_drift: float
    max_mean_drift: float
    var_drift: float
    max_var_drift: float
    mean_error: float
    var_error: float


@dataclass(frozen=True, slots=True, repr=False)
class UpdateReport:
    """What :func:`precisebn.update_bn_stats` did. ``str()`` is a table, ``report[name]`` a layer, ``plot()`` a picture.

    Every BatchNorm layer of the model is in ``layers`` or in ``skipped`` (a layer with a population for each of several
    domains under a name for each, ``"head.bn[1]"``).

    Attributes:
        layers: one :class:`LayerReport` for every layer whose statistics were replaced, in the model's order.
        skipped: layers that were left as they are, by name, with the reason.
        frozen: names of layers in ``layers`` all of whose parameters are frozen (``requires_grad=False``). Freezing
            parameters says nothing of statistics, but who froze these may not have meant them to be overwritten. Empty
            where the whole model is frozen, as averaged and deployed models are.
        num_iters: mini-batches that this rank used.
        num_samples: samples in the mini-batches of all ranks.
        world_size: number of ranks whose data went in.
        estimator: ``"population"`` or ``"batch-mean"``.
        tolerance: the tolerance asked for, or None.
        converged: whether the tolerance was reached; None without one.
        fallback: why plain PyTorch ran in the place of compiled kernels; empty where kernels ran.

    Example:
        >>> import precisebn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> report = precisebn.update_bn_stats(model, [torch.randn(8, 1, 6, 6)] * 10, num_iters=None)
        >>> report.num_samples, report.layers[0].name, report["1"].count
        (80, '1', 1280)
        >>> sorted(report.metrics())[:3]
        ['precisebn/dead_channels', 'precisebn/layers', 'precisebn/max_drift']
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    frozen: tuple[str, ...]
    num_iters: int
    num_samples: int
    world_size: int
    estimator: str
    tolerance: float | None
    converged: bool | None
    fallback: str
    _undo: Undo = field(default_factory=Undo, repr=False, compare=False)
    _later: Callable[[], tuple[LayerReport, ...]] | None = field(default=None, repr=False, compare=False)
    """In the place of ``layers``, what works them out when somebody asks for them, which nobody may ever."""

    def __post_init__(self) -> None:
        if self._later is not None:
            object.__delattr__(self, "layers")

    def __getattr__(self, name: str) -> Any:
        """The layers, when they are asked for first: copies and comparisons ask, too."""
        later = object.__getattribute__(self, "_later") if name == "layers" else None
        if later is not None:
            object.__setattr__(self, "layers", later())
            object.__setattr__(self, "_later", None)
        return object.__getattribute__(self, name)

    @property
    def max_error(self) -> float:
        """The largest standard error, of any layer's mean or variance; NaN where none is known."""
        return largest(error for layer in self.layers for error in (layer.mean_error, layer.var_error))

    @property
    def max_drift(self) -> float:
        """The largest drift of a mean, in standard deviations, of any channel of any layer; NaN without layers.

        Infinite where the old statistics were NaN. Dead channels are left out, see :class:`LayerReport`.
        """
        return largest(_nan_is_infinite(layer.max_mean_drift) for layer in self.layers)

    @property
    def max_var_drift(self) -> float:
        """The largest drift of a variance, as ``|log(old / new)|``, likewise: 0.7 is off by a factor of 2."""
        return largest(_nan_is_infinite(layer.max_var_drift) for layer in self.layers)

    @property
    def dead_channels(self) -> int:
        """How many channels of all layers are constant in the data."""
        return sum(layer.dead_channels for layer in self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The layer of that name.

        Raises:
            KeyError: no such layer was recalibrated; the message says why not, or which names come near.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(self._why_missing(name))

    def __contains__(self, name: object) -> bool:
        """Whether the layer of that name was recalibrated."""
        return any(layer.name == name for layer in self.layers)

    # Without this, iter() would ask for report[0], report[1], ...: what to loop over is `layers`.
    __iter__ = None

    def undo(self, force: bool = False) -> None:
        """Put the statistics back that the recalibration has replaced, bit for bit: of all layers, or of none.

        That is ``running_mean``, ``running_var`` and ``num_batches_tracked`` of every layer in ``layers``, which are
        written in place. It works also after the model was moved to another device or dtype (where the old statistics
        are rounded as all of the model was), and after a checkpoint of these very statistics was loaded. Of several
        recalibrations undo the last one first. Ctrl-C waits until it is done. On several ranks each undoes its own:
        call it on all.

        The report keeps the statistics for it, before and after, and no model alive. A copy of the report, by deepcopy
        or pickle, cannot undo.

        Args:
            force: put them back also where somebody has changed them since; pass over layers that are no longer there.

        Raises:
            UndoError: statistics have been changed since, by a forward in training mode say, or layers converted or
                removed: it names them, and nothing is put back. Or it has been undone already.
            InputError: the model, or a part of it, is being recalibrated just now.

        Example:
            >>> import precisebn, torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.BatchNorm1d(1))
            >>> report = precisebn.update_bn_stats(model, [torch.tensor([[4.0], [8.0]])], num_iters=1)
            >>> report.undo()
            >>> model[0].running_mean, model[0].running_var, model[0].num_batches_tracked
            (tensor([0.]), tensor([1.]), tensor(0))
        """
        self._undo.put_back(force)

    def metrics(self, prefix: str = "precisebn", *, per_layer: bool = False) -> dict[str, float]:
        """The report as numbers with names, as wandb, TensorBoard, MLflow and Lightning's loggers take them.

        What is not known (standard errors below 8 mini-batches, drift of no layers) is left out.

        Args:
            prefix: what every name begins with, before a slash.
            per_layer: also the drift, errors and dead channels of every layer, ``"precisebn/mean_drift/3.b1"``.

        Example:
            ``wandb.log(report.metrics())``, ``for name, value in report.metrics().items(): writer.add_scalar(name,
            value, step)``.
        """
        numbers_of: dict[str, float] = {
            "max_drift": self.max_drift,
            "max_var_drift": self.max_var_drift,
            "max_error": self.max_error,
            "dead_channels": self.dead_channels,
            "layers": len(self.layers),
            "skipped": len(self.skipped),
            "num_iters": self.num_iters,
            "num_samples": self.num_samples,
        }
        if self.converged is not None:
            numbers_of["converged"] = self.converged
        if per_layer:
            for what in ("mean_drift", "var_drift", "mean_error", "var_error", "dead_channels"):
                numbers_of.update((f"{what}/{layer.name}", getattr(layer, what)) for layer in self.layers)
        return {f"{prefix}/{name}": float(value) for name, value in numbers_of.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN and Inf, which JSON has not, become None)."""
        result = {one.name: getattr(self, one.name) for one in fields(self) if not one.name.startswith("_")}
        result["layers"] = [asdict(layer) for layer in self.layers]
        values: dict[str, Any] = plain(result)
        return values

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the drift of every layer beside the standard errors of the new statistics, on logarithmic axes.

        Needs matplotlib, which the extra ``plot`` brings.

        Args:
            path: where to save the picture as well; its suffix chooses the format (png, svg, pdf).

        Returns:
            The figure, one row for each layer.

        Raises:
            ImportError: matplotlib is not installed.
        """
        with needs_matplotlib(self):
            from precisebn.recalibration.plot import draw
        return saved(draw(self), path)

    def __repr__(self) -> str:
        """One line: the table is what ``print`` shows."""
        return (
            f"<UpdateReport: {counted(len(self.layers), 'layer')}, {counted(self.num_samples, 'sample')}, "
            f"max_drift={self.max_drift:.4g}, max_var_drift={self.max_var_drift:.4g}, max_error={self.max_error:.4g}>"
        )

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self._table(), *self._remarks()])

    def _headline(self) -> str:
        samples, batches = counted(self.num_samples, "sample"), counted(self.num_iters, "mini-batch")
        data = f"{samples} in {batches}"
        if self.world_size > 1:
            data = f"{samples} on {counted(self.world_size, 'rank')} ({batches} on this rank)"
        return f"{counted(len(self.layers), 'BatchNorm layer')}, {data}, estimator {self.estimator!r}"

    def _table(self) -> list[str]:
        if not self.layers:
            return []
        rows = [("layer", "count", "mean drift", "var drift", "mean s.e.", "var s.e.", "dead")]
        rows += [
            (layer.name, str(layer.count), f"{layer.mean_drift:.4f}", f"{layer.var_drift:.4f}",
             _known(layer.mean_error), _known(layer.var_error), str(layer.dead_channels or "-"))
            for layer in self.layers
        ]  # fmt: skip
        used = 7 if self.dead_channels else 6
        lines = aligned([row[:used] for row in rows], least=9)
        lines.append("(drift: old from new; mean in new standard deviations, var as |log ratio|; s.e. likewise)")
        if all(math.isnan(layer.mean_error) for layer in self.layers):
            lines.append("(no standard errors: they take at least 8 mini-batches)")
        if self.dead_channels:
            lines.append(
                f"(dead: channels that are constant in the data, {self.dead_channels} of "
                f"{sum(layer.num_channels for layer in self.layers)}; left out of drift and s.e.)"
            )
        return lines

    def _remarks(self) -> list[str]:
        lines = [
            f"{counted(len(names), 'layer')} left alone: {reason}: {few(names)}"
            for reason, names in by_reason(self.skipped).items()
        ]
        if len(self.layers) > 1:
            mean = max(self.layers, key=lambda layer: _nan_is_infinite(layer.max_mean_drift))
            var = max(self.layers, key=lambda layer: _nan_is_infinite(layer.max_var_drift))
            lines.insert(
                0,
                f"largest drift of a channel: mean {self.max_drift:.4f} in {mean.name}, var {self.max_var_drift:.4f} "
                f"in {var.name}",
            )
        if self.frozen:
            whose = "its" if len(self.frozen) == 1 else "their"
            lines.append(
                f"{counted(len(self.frozen), 'layer')} recalibrated although all {whose} parameters are frozen: "
                f"{few(self.frozen)}"
            )
        if self.tolerance is not None:
            verdict = "reached" if self.converged else "NOT reached"
            lines.append(f"tolerance {self.tolerance:g} {verdict}: largest standard error {self.max_error:.5f}")
        if self.fallback:
            lines.append(f"plain PyTorch ran in the place of kernels: {self.fallback}")
        return lines

    def _why_missing(self, name: object) -> str:
        if not isinstance(name, str):
            return f"layers are looked up by name, not by {type(name).__name__}; `layers` is a tuple of all"
        if name in self.skipped:
            return f"layer {name!r} was left alone: {self.skipped[name]}"
        names = [layer.name for layer in self.layers]
        near = (
            [other for other in names if other.startswith((f"{name}[", f"{name}."))]
            or [other for other in names if other.endswith(f".{name}")]
            or difflib.get_close_matches(name, names)
        )
        hint = f"did you mean {few(list(map(repr, near)))}?" if near else f"there are {few(names) or 'none'}"
        return f"no layer {name!r} was recalibrated; {hint}"


def frozen_parameters(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Names of the layers whose parameters are all frozen, in a model that trains others."""
    own = {name: list(layer.parameters()) for name, layer in layers.items() if not _trains_itself(layer)}
    frozen = tuple(name for name, ps in own.items() if ps and not any(parameter.requires_grad for parameter in ps))
    return frozen if frozen and any(parameter.requires_grad for parameter in model.parameters()) else ()


def _trains_itself(layer: nn.Module) -> bool:
    """Whether a parameter of the layer's own, not of its children, is trained: true of most, and quickly told."""
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def fallback_in_use(devices: Iterable[str]) -> str:
    """Which of these types of device have no kernels in use though they could, and why; empty if all have."""
    backend = ops.backend()
    reasons = {"cpu": (backend.cpu, backend.cpu_detail), "cuda": (backend.cuda, backend.cuda_detail)}
    found = {device: reasons[device] for device in dict.fromkeys(devices) if device in reasons}
    return "; ".join(f"{device}: {why}" for device, (kind, why) in found.items() if kind == "fallback")


def largest(errors: Iterable[float]) -> float:
    """The largest of some standard errors, leaving out those not known yet; NaN if none is known."""
    return max((error for error in errors if not math.isnan(error)), default=math.nan)


def _nan_is_infinite(drift: float) -> float:
    return math.inf if math.isnan(drift) else drift


def _known(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.5f}"
