"""merge_rank_statistics: one set of running statistics from those of all ranks, without data.

Ranks that train with broadcast_buffers=False end an epoch with running averages of their own data each. timm's
``distribute_bn`` and the ``SyncBuffersHook`` of mmcv and mmengine average them: right for the means, but the average of
the variances is the variance *within* ranks, and leaves out how far the means of the ranks lie apart. The law of total
variance has both: ``var = sum(w * var_r) + sum(w * (mean_r - mean)^2)``, which is how Moments merge.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precisebn._reports import quoted
from precisebn._warnings import warn
from precisebn.distributed import ProcessGroup, Ranks, is_sharded
from precisebn.errors import InputError, NonFiniteStatisticsError
from precisebn.models.description import describe_layers
from precisebn.models.families import is_frozen, populations_of
from precisebn.models.interrupts import HeldBack
from precisebn.models.selection import ModuleSelection, select_modules
from precisebn.models.transaction import Transaction
from precisebn.nn.population import RunningStatistics
from precisebn.ranks.merge_report import MergedLayer, MergeReport

__all__ = ["merge_rank_statistics"]

Weights = Literal["equal", "batches"]


def merge_rank_statistics(
    model: nn.Module,
    process_group: ProcessGroup | Literal[False] | None = None,
    *,
    reduce: bool = True,
    weights: Weights = "equal",
    modules: ModuleSelection = "all",
    exclude: ModuleSelection | None = None,
) -> MergeReport:
    """Give all ranks the same running statistics: those of all of them, merged as Moments; without data, in place.

    The mean is that of the ranks' means, the variance that within ranks and between them (law of total variance); where
    timm's ``distribute_bn`` and mmengine's ``SyncBuffersHook`` average the variances, what lies between ranks is lost:
    the report says how much. Running averages lag behind the weights all the same; where there is data,
    :func:`precisebn.update_bn_stats` measures them over all ranks.

    All ranks end with the same bits, and with the same ``num_batches_tracked``: the largest of any rank, for ranks that
    train together count the same steps. Ranks that are equal already keep every bit. If anything is raised on
    any rank, no rank has changed its model.

    Args:
        model: the model, the same on all ranks but for values.
        process_group: ranks to merge: a group or a DeviceMesh of one dimension. None: all ranks, where
            torch.distributed is initialized; all of them must call.
        reduce: as in timm: True merges what all ranks have; False gives all of them what rank 0 of the group has, as it
            is, with its ``num_batches_tracked``.
        weights: ``"equal"``: every rank counts the same, right where ranks have had equally many samples lately (with a
            warning where one has tracked no mini-batch, and others have);
            ``"batches"``: as much as it has tracked mini-batches (``num_batches_tracked``), a rank without any not at
            all, and all the same where none has any. A running average with a momentum forgets: what it has seen long
            ago counts for little, however many mini-batches that was.
        modules: which layers, as in :func:`precisebn.update_bn_stats`: ``"all"``, ``"training"``, or modules, names and
            patterns, which alone take frozen layers too.
        exclude: which of them not.

    Returns:
        Of every layer, how far the means of the ranks lay apart: :class:`MergeReport`.

    Raises:
        NonFiniteStatisticsError: NaN or Inf in the running statistics of a rank (those of the others raise
            RankFailedError, and name it); or merged ones that overflow the dtype of the buffers.
        RankFailedError: another rank failed, or did not come within the timeout of the process group.
        InputError: an argument that makes no sense; ranks that differ in their layers, arguments or versions; a layer
            on the meta device; ``weights="batches"`` where a layer does not count them.

    Warns:
        UserWarning: there is no layer to merge; a rank without any mini-batch has counted as much as others.

    Example:
        >>> report = merge_rank_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> report.world_size, report.max_variance_lost  # of one rank there is nothing to merge
        (1, 0.0)
    """
    with (
        HeldBack() as interrupts,
        Ranks(process_group, let_through=interrupts.let_through, call="merge_rank_statistics") as ranks,
        Transaction() as changes,
    ):
        _check(model, reduce, weights)
        layers, skipped = _choose(model, modules, exclude)
        if not layers:
            warn(f"{type(model).__name__} has no BatchNorm layer whose running statistics could be merged")
        ranks.agree({"reduce=": reduce, "weights=": weights, **describe_layers(layers)}, _ADVICE)
        populations = _populations(layers)
        if not populations or ranks.size == 1:
            alone = (MergedLayer(one.name, one.statistics.mean.numel(), 0.0, 0.0) for one in populations)
            return MergeReport(ranks.size, reduce, weights, tuple(alone), skipped)
        devices = (one.statistics.mean.device for one in populations)
        ranks.device = next((device for device in devices if device.type != "cpu"), None)
        merged = _merge(populations, ranks, weights) if reduce else _take_over(populations, ranks)
        _check_overflow(populations, merged)
        report = MergeReport(ranks.size, reduce, weights, tuple(_layers_of(populations, merged)), skipped)
        for one, mean, var, count in zip(populations, merged.mean, merged.var, merged.num_batches, strict=True):
            _write(changes, one.statistics, mean, var, count)
        interrupts.deliver()
        ranks.commit()  # every rank has written: what is raised before this undoes it on all ranks
    return report


_ADVICE = (
    "Every rank must pass the same model, and the same reduce=, weights=, modules= and exclude=; where ranks hold "
    "other layers on purpose (stages of a pipeline), pass those that hold the same ones as process_group="
)


class _Population(NamedTuple):
    name: str
    statistics: RunningStatistics


class _Merged(NamedTuple):
    """What all ranks are to have: of each population its mean and variance, float64 on the CPU ``(C,)``."""

    mean: Sequence[Tensor]
    var: Sequence[Tensor]
    between: Sequence[Tensor]
    """The mean square distance of the ranks' means from the new one."""
    num_batches: Sequence[float]


def _check(model: nn.Module, reduce: object, weights: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, not {type(model).__name__}")
    if not isinstance(reduce, bool):
        raise InputError(f"reduce={reduce!r} must be True, to merge all ranks, or False, to send rank 0's to all")
    if weights not in ("equal", "batches"):
        raise InputError(f"weights={weights!r} must be 'equal' or 'batches'")
    if not reduce and weights != "equal":
        raise InputError(f"weights={weights!r} has no meaning with reduce=False, which sends rank 0's to all")


def _choose(
    model: nn.Module, modules: ModuleSelection, exclude: ModuleSelection | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose statistics merge, and why the others' do not."""
    selection = select_modules(model, modules, exclude)
    layers, skipped = {}, {}
    for name, layer in selection.found.items():
        populations = populations_of(layer)
        if name not in selection.chosen:
            skipped[name] = "frozen" if is_frozen(layer) and layer not in selection.excluded else "not chosen"
        elif not populations:
            skipped[name] = "no running statistics (track_running_stats=False)"
        elif is_lazy(populations[0].mean):
            skipped[name] = "lazy, without statistics yet"
        elif populations[0].mean.is_meta or is_sharded(populations[0].mean):
            where = "are on the meta device" if populations[0].mean.is_meta else "are cut into parts (DTensor)"
            raise InputError(f"the running statistics of layer {name!r} ({type(layer).__name__}) {where}")
        else:
            layers[name] = layer
    return layers, skipped


def _populations(layers: dict[str, nn.Module]) -> list[_Population]:
    """Of every layer one, or one for each domain, ``head.bn[2]``."""
    return [_Population(one.named(name), one) for name, layer in layers.items() for one in populations_of(layer)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All of them, one after the other, in float64 on the CPU."""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float64) for tensor in tensors])


def _own(populations: Sequence[_Population]) -> tuple[Tensor, Tensor, list[float]]:
    """Means and variances of this rank, ``(S,)``, and how many mini-batches each has tracked, -1 where not counted."""
    statistics = [one.statistics for one in populations]
    counts = [-1 if one.num_batches is None else one.num_batches.item() for one in statistics]
    return _flat([one.mean for one in statistics]), _flat([one.var for one in statistics]), counts


def _merge(populations: Sequence[_Population], ranks: Ranks, weights: Weights) -> _Merged:
    """The statistics of all ranks as Moments: by two all-reduces, of how far this rank's are from rank 0's.

    So ranks that are equal stay what they are to the last bit, and sums lose no digits to a mean far from zero.
    """
    mean, var, counts = _own(populations)
    sizes = [one.statistics.mean.numel() for one in populations]
    tracked = torch.tensor(counts, dtype=torch.float64, device="cpu")
    per_population = torch.ones_like(tracked) if weights == "equal" else _batches(populations, tracked, ranks)
    weight = per_population.repeat_interleave(torch.tensor(sizes, device="cpu"))
    counted = weight > 0
    _check_finite(populations, sizes, (mean, var), counted)
    origin = torch.cat([mean, var])
    ranks.broadcast(origin, 0)
    mean_0, var_0 = origin.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).chunk(2)  # of a rank that may not count

    sums = torch.cat([weight, torch.where(counted, weight * (mean - mean_0), 0.0)])
    ranks.all_reduce(sums)
    total, shift = sums.chunk(2)
    new_mean = _moved(mean_0, shift / total)
    parts = [weight * (var - var_0), weight * (mean - new_mean).square()]
    sums = torch.cat([torch.where(counted, part, 0.0) for part in parts])
    ranks.all_reduce(sums)
    within, between = (sums / total.repeat(2)).chunk(2)
    most, least = ranks.gather(counts, _most_and_least)
    if weights == "equal":
        _warn_of_initial_statistics(populations, most, least)
    new_var = _moved(var_0, within + between)
    return _Merged(new_mean.split(sizes), new_var.split(sizes), between.split(sizes), most)


def _most_and_least(counts: list[list[float]]) -> list[list[float]]:
    columns = list(zip(*counts, strict=True))
    return [[max(column) for column in columns], [min(column) for column in columns]]


def _warn_of_initial_statistics(
    populations: Sequence[_Population], most: Sequence[float], least: Sequence[float]
) -> None:
    names = [one.name for one, high, low in zip(populations, most, least, strict=True) if high > 0 and low == 0]
    if names:
        warn(
            f"{len(names)} of the {len(populations)} sets of running statistics ({quoted(names, 3)}) have seen no "
            "mini-batch on some rank (num_batches_tracked is 0), whose statistics, the initial ones as a rule, have "
            "counted as much as any; weights='batches' leaves such ranks out"
        )


def _moved(origin: Tensor, by: Tensor) -> Tensor:
    """The sum; by nothing it keeps its bits, those of -0 as well."""
    return torch.where(by == 0, origin, origin + by)


def _take_over(populations: Sequence[_Population], ranks: Ranks) -> _Merged:
    """The statistics of rank 0."""
    own_mean, own_var, counts = _own(populations)
    sizes = [one.statistics.mean.numel() for one in populations]
    if ranks.rank == 0:
        _check_finite(populations, sizes, (own_mean, own_var), torch.ones_like(own_mean, dtype=torch.bool))
    flat = torch.cat([own_mean, own_var])
    ranks.broadcast(flat, 0)
    mean, var = flat.chunk(2)
    between = (own_mean - mean).square().nan_to_num(nan=torch.inf) / ranks.size
    ranks.all_reduce(between)
    return _Merged(mean.split(sizes), var.split(sizes), between.split(sizes), ranks.gather(counts, _of_rank_0))


def _of_rank_0(counts: list[list[float]]) -> list[float]:
    return counts[0]


def _batches(populations: Sequence[_Population], counts: Tensor, ranks: Ranks) -> Tensor:
    """The weight of this rank in each population: its mini-batches, or 1 where no rank has any."""
    for one in populations:
        if one.statistics.num_batches is None:
            raise InputError(
                f"weights='batches', but layer {one.name!r} does not count its mini-batches (no num_batches_tracked); "
                "pass weights='equal', or leave it out: exclude="
            )
    total = counts.clone()
    ranks.all_reduce(total)
    return torch.where(total > 0, counts, 1.0)


def _check_finite(
    populations: Sequence[_Population], sizes: list[int], values: tuple[Tensor, ...], counted: Tensor
) -> None:
    good = torch.stack([value.isfinite() for value in values]).all(0) | ~counted
    for one, of_one in zip(populations, good.split(sizes), strict=True):
        if not bool(of_one.all()):
            raise NonFiniteStatisticsError(
                f"the running statistics of layer {one.name!r} hold NaN or Inf on this rank, so no rank was changed; "
                "measure them anew with update_bn_stats, or send those of a good rank to all"
            )


def _check_overflow(populations: Sequence[_Population], merged: _Merged) -> None:
    for one, mean, var in zip(populations, merged.mean, merged.var, strict=True):
        rounded = mean.to(one.statistics.mean.dtype), var.to(one.statistics.var.dtype)
        if not all(bool(value.isfinite().all()) for value in rounded):
            raise NonFiniteStatisticsError(
                f"the merged statistics of layer {one.name!r} overflow its {one.statistics.var.dtype} buffers (largest "
                f"variance {var.max().item():.3g}); keep BatchNorm layers in float32. The model is as it was"
            )


def _write(changes: Transaction, statistics: RunningStatistics, mean: Tensor, var: Tensor, count: float) -> None:
    changes.write(statistics.mean, mean)
    changes.write(statistics.var, var)
    if statistics.num_batches is not None:
        changes.write(statistics.num_batches, torch.full_like(statistics.num_batches, count))


def _layers_of(populations: Sequence[_Population], merged: _Merged) -> Iterator[MergedLayer]:
    """How far the means of the ranks lay apart, in standard deviations of the new statistics."""
    for one, var, between in zip(populations, merged.var, merged.between, strict=True):
        share = between / (var + one.statistics.eps)
        yield MergedLayer(
            one.name, var.numel(), share.mean().sqrt().item() if var.numel() else 0.0,
            share.max().sqrt().item() if var.numel() else 0.0,
        )  # fmt: skip
