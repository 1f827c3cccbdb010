"""MergeReport: how far the running statistics of the ranks lay apart before they were merged."""

from dataclasses import asdict, dataclass
from typing import Any

from precisebn._reports import aligned, by_reason, counted, few, plain

__all__ = ["MergeReport", "MergedLayer"]


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One layer of a :class:`MergeReport`.

    Attributes:
        name: qualified name in the model; of a layer with several populations that of one, ``"head.bn[2]"``.
        num_channels: C.
        mean_spread: how far the running means of the ranks were from the new one, in standard deviations of the new
            statistics (``sqrt(var + eps)``), root mean square over ranks and channels.
        max_mean_spread: the same in the worst channel.
    """

    name: str
    num_channels: int
    mean_spread: float
    max_mean_spread: float

    @property
    def variance_lost(self) -> float:
        """The share of the variance that lies between ranks, which averaging variances would lose; over channels."""
        return self.mean_spread**2

    @property
    def max_variance_lost(self) -> float:
        """The same in the worst channel."""
        return self.max_mean_spread**2


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """What :func:`precisebn.merge_rank_statistics` merged; the same on every rank. ``str()`` is a table.

    Attributes:
        world_size: how many ranks were merged.
        reduce: whether they were merged, or have all got rank 0's.
        weights: "equal" or "batches".
        layers: one :class:`MergedLayer` for every population, in the order of the model.
        skipped: layers that were left as they are, by name, with the reason.
    """

    world_size: int
    reduce: bool
    weights: str
    layers: tuple[MergedLayer, ...]
    skipped: dict[str, str]

    @property
    def max_mean_spread(self) -> float:
        """The largest of any channel of any layer; 0 without layers."""
        return max((layer.max_mean_spread for layer in self.layers), default=0.0)

    @property
    def max_variance_lost(self) -> float:
        """The largest share of a channel's variance that lies between ranks; 0 without layers."""
        return self.max_mean_spread**2

    def __getitem__(self, name: str) -> MergedLayer:
        """The layer of that name.

        Raises:
            KeyError: it was not merged.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} was not merged: {self.skipped.get(name, 'there is no such BatchNorm layer')}")

    # Without this, iter() would ask for report[0], report[1], ...: what to loop over is `layers`.
    __iter__ = None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (Inf, which JSON has not, becomes None)."""
        values: dict[str, Any] = plain(asdict(self))
        return values

    def __repr__(self) -> str:
        return (
            f"<MergeReport: {counted(len(self.layers), 'layer')}, {counted(self.world_size, 'rank')}, "
            f"max_variance_lost={self.max_variance_lost:.4g}>"
        )

    def __str__(self) -> str:
        done = "merged" if self.reduce else "now those of rank 0"
        lines = [f"running statistics of {len(self.layers)} BatchNorm layer(s) on {self.world_size} rank(s), {done}"]
        if self.layers:
            rows = [
                (layer.name, f"{layer.mean_spread:.4f}", f"{layer.max_mean_spread:.4f}", f"{layer.variance_lost:.2%}")
                for layer in self.layers
            ]
            lines += aligned([("layer", "mean spread", "worst channel", "variance between"), *rows])
            lines.append("(spread of the ranks' means in standard deviations; averaging loses the variance between)")
        skipped = by_reason(self.skipped).items()
        lines += [f"{counted(len(names), 'layer')} left alone: {reason}: {few(names)}" for reason, names in skipped]
        return "\n".join(lines)
