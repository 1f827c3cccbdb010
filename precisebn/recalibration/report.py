"""UpdateReport: what a recalibration changed, layer by layer, and how far the result can be trusted."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["LayerReport", "UpdateReport"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of an :class:`UpdateReport`.

    Attributes:
        name: qualified name in the model.
        num_channels: C.
        num_batches: mini-batches that reached the layer, over all ranks.
        count: values per channel that the new statistics come from, over all ranks.
        mean_drift: how far the old running mean was from the new one, in standard deviations of the new
            (``sqrt(var + eps)``), root mean square over channels.
        max_mean_drift: the same, in the worst channel.
        var_drift: ``log`` of the old over the new ``var + eps``, root mean square over channels: 0.1 means that the
            variances were off by about 10%.
        mean_error: standard error of the new mean, in the units of ``mean_drift``, root mean square over channels; NaN
            below 8 mini-batches.
        var_error: standard error of the new variance relative to ``var + eps``, likewise.
    """

    name: str
    num_channels: int
    num_batches: int
    count: int
    mean_drift: float
    max_mean_drift: float
    var_drift: float
    mean_error: float
    var_error: float


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What :func:`precisebn.update_bn_stats` did. ``str()`` is a table, :meth:`plot` a picture.

    Attributes:
        layers: one :class:`LayerReport` for every layer whose statistics were replaced, in the model's order.
        skipped: BatchNorm layers that were chosen but left as they are, by name, with the reason.
        num_iters: mini-batches that this rank used.
        num_samples: samples in the mini-batches of all ranks.
        world_size: number of ranks whose data went in.
        estimator: ``"population"`` or ``"batch-mean"``.
        tolerance: the tolerance asked for, or None.
        converged: whether the tolerance was reached; None without one.

    Example:
        >>> import precisebn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> report = precisebn.update_bn_stats(model, [torch.randn(8, 1, 6, 6)] * 10, num_iters=None)
        >>> report.num_samples, report.layers[0].name, report.layers[0].count
        (80, '1', 1280)
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    num_iters: int
    num_samples: int
    world_size: int
    estimator: str
    tolerance: float | None
    converged: bool | None

    @property
    def max_error(self) -> float:
        """The largest standard error, of any layer's mean or variance; NaN where none is known."""
        return largest(error for layer in self.layers for error in (layer.mean_error, layer.var_error))

    @property
    def max_drift(self) -> float:
        """The largest drift of a mean, in standard deviations, of any channel of any layer; NaN without layers.

        Infinite where the old statistics were NaN.
        """
        return largest(math.inf if math.isnan(layer.max_mean_drift) else layer.max_mean_drift for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN and Inf, which JSON has not, become None)."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [plain(item) for item in value]
            return value

        result: dict[str, Any] = plain(asdict(self))
        return result

    def __str__(self) -> str:
        ranks = f" on {self.world_size} ranks" if self.world_size > 1 else ""
        lines = [
            f"{len(self.layers)} BatchNorm layers, {self.num_samples} samples in {self.num_iters} mini-batches{ranks}, "
            f"estimator {self.estimator!r}"
        ]
        if self.layers:
            width = max(5, *(len(layer.name) for layer in self.layers))
            lines.append(f"{'layer':<{width}}  {'count':>11}  {'mean drift':>10}  {'var drift':>9}  "
                         f"{'mean s.e.':>9}  {'var s.e.':>9}")  # fmt: skip
            for layer in self.layers:
                lines.append(
                    f"{layer.name:<{width}}  {layer.count:>11}  {layer.mean_drift:>10.4f}  {layer.var_drift:>9.4f}  "
                    f"{_known(layer.mean_error):>9}  {_known(layer.var_error):>9}"
                )
            lines.append("(drift: old from new; mean in new standard deviations, var as |log ratio|; s.e. likewise)")
            if all(math.isnan(layer.mean_error) for layer in self.layers):
                lines.append("(no standard errors: they take at least 8 mini-batches)")
        lines += [f"{name}: left alone: {reason}" for name, reason in self.skipped.items()]
        if self.tolerance is not None:
            verdict = "reached" if self.converged else "NOT reached"
            lines.append(f"tolerance {self.tolerance:g} {verdict}: largest standard error {self.max_error:.5f}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the drift of every layer, with the standard errors of the new statistics, into a picture file.

        Needs matplotlib (the extra ``demo`` brings it).

        Args:
            path: where to; its suffix chooses the format (png, svg, pdf).
        """
        from matplotlib.figure import Figure  # an extra: imported where it is used

        names = [layer.name for layer in self.layers]
        positions = range(len(names))
        figure = Figure(figsize=(max(6.0, 0.22 * len(names) + 2.0), 5.5), layout="constrained")
        for axes, what in zip(figure.subplots(2, 1, sharex=True), ("mean", "var"), strict=True):
            axes.bar(positions, [getattr(layer, f"{what}_drift") for layer in self.layers], color="tab:blue",
                     label="drift of the old statistics")  # fmt: skip
            axes.plot(positions, [getattr(layer, f"{what}_error") for layer in self.layers], "o", color="tab:orange",
                      markersize=4, label="standard error of the new")  # fmt: skip
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(bottom=0)
            axes.set_ylabel("mean [std]" if what == "mean" else "variance [|log ratio|]")
            axes.grid(axis="y", alpha=0.3)
        figure.axes[0].legend()
        figure.axes[0].set_title(f"Drift of BatchNorm statistics ({self.num_samples} samples)")
        figure.axes[-1].set_xticks(positions, names, rotation=90, fontsize=7)
        figure.savefig(path, dpi=120)


def _known(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.5f}"


def largest(errors: Any) -> float:
    """The largest of some standard errors, leaving out those not known yet; NaN if none is known."""
    return max((error for error in errors if not math.isnan(error)), default=math.nan)
