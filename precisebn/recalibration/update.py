"""Recalibration of BatchNorm statistics: PreciseBN and AdaBN.

``update_bn_stats`` replaces the running averages of BatchNorm layers by the exact statistics of given data under the
present weights ("Rethinking 'Batch' in BatchNorm", Wu & Johnson 2021, arXiv 2105.07576, section 3);
``adapt_bn_stats`` does the same for data of another domain (Li et al. 2016; Schneider et al. 2020). Both are
transactions: the model changes when all data has been seen, all at once, or not at all.
"""

import itertools
import math
import numbers
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import tqdm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from precisebn.distributed import ProcessGroup, Ranks, Tally
from precisebn.errors import InputError, InsufficientDataError, NonFiniteStatisticsError, RankFailedError
from precisebn.models.batches import ForwardFn, call_model, common_device, move_to, num_samples
from precisebn.models.selection import ModuleSelection, find_bn, select_bn
from precisebn.nn.frozen import FrozenNorm
from precisebn.nn.population import PopulationNorm
from precisebn.recalibration.recording import RecordedLayer, Recording, buffers_kept
from precisebn.recalibration.report import (
    LayerReport,
    UpdateReport,
    fallback_in_use,
    frozen_parameters,
    largest,
    reason_left_alone,
)
from precisebn.statistics.estimator import ESTIMATORS, MIN_BLOCKS, EstimatorName, Population

__all__ = ["adapt_bn_stats", "update_bn_stats"]


def update_bn_stats(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int | None = 200,
    progress: str | bool | None = None,
    *,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    modules: ModuleSelection = "training",
    estimator: EstimatorName = "population",
    tolerance: float | None = None,
    process_group: ProcessGroup | Literal[False] | None = None,
) -> UpdateReport:
    """Replace the running statistics of BatchNorm layers by those of the given data under the present weights.

    A drop-in for ``fvcore.nn.update_bn_stats``: the same first four arguments with the same meaning. The model runs on
    the mini-batches without gradients, every chosen layer normalizing with the statistics of the mini-batch as in
    training; their moments merge exactly (never a difference of squares), and then ``running_mean`` and
    ``running_var`` are overwritten, in place. Nothing else in the model changes: ``momentum``, modes, hooks and all
    other buffers are as before; ``num_batches_tracked`` grows by the mini-batches seen, as in training.

    If anything at all is raised on the way, the model is as it was, bit for bit. (Lazy modules that the first forward
    has initialized stay initialized.)

    Args:
        model: any module, also wrapped by DDP, DataParallel, AveragedModel or torch.compile (compiled code is set
            aside for the duration, and stays valid). Put it into the mode it shall run in before the call, as for
            fvcore: ``model.train()``, or see ``modules``.
        data_loader: yields mini-batches; shuffled, and of the size of training's normalization batch.
        num_iters: how many mini-batches to use; None uses all there are. With ``tolerance`` it is the most to use.
        progress: ``"tqdm"`` or True shows a progress bar with the samples seen and the largest standard error.
        forward: ``forward(model, batch)`` calls the model. By default a mapping is passed as keyword arguments; a
            list or tuple of a floating-point tensor and items that hold none (labels, metadata) is passed as that
            tensor; anything else as it is.
        device: where mini-batches are moved to; by default, the device of the model's parameters if they share one.
        modules: ``"training"``: the BatchNorm layers in training mode; ``"all"``: all of them; or modules, qualified
            names and glob patterns, which alone take frozen layers too. Chosen layers normalize with batch statistics
            whatever their mode, all other modules keep theirs: ``model.eval()`` and ``modules="all"`` recalibrates with
            dropout off.
        estimator: ``"population"``: mean and biased variance of all values together, exact also for mini-batches of
            different sizes (fvcore's default too); ``"batch-mean"``: plain averages of the mini-batches' means and
            unbiased variances.
        tolerance: stop as soon as the standard error of every layer's mean (in its standard deviations) and variance
            (relative) is at most this, but not before 8 mini-batches. The errors are those of batch means: they assume
            that mini-batches are correlated, if at all, over a short part of the run, as shuffling ensures.
        process_group: ranks whose data counts. None: all ranks, where torch.distributed is initialized; all of them
            must call. False: this process alone. Ranks may have different numbers of mini-batches, or none (with
            ``num_iters=None`` or ``tolerance``); all end with the same statistics, bit for bit. SyncBatchNorm layers
            normalize with the mini-batch of their rank. A model whose forward communicates by itself (FSDP, a layer
            of your own with an all-reduce in it) needs the same number of mini-batches on every rank.

    Returns:
        What changed and how certain it is: :class:`UpdateReport`.

    Raises:
        InsufficientDataError: the loader ended before ``num_iters`` mini-batches, or gave none.
        NonFiniteStatisticsError: NaN or Inf in the input of a layer; names the layer and the mini-batch.
        BatchFormatError: the model does not take what the loader yields.
        RankFailedError: another rank failed.
        InputError: an argument that makes no sense.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.zeros(16).long()) for _ in range(10)]
        >>> report = update_bn_stats(model, loader, num_iters=10)
        >>> report.num_samples, model[1].running_var.shape
        (160, torch.Size([8]))
    """
    return _Run(
        model, data_loader, num_iters, progress, forward, device, modules, estimator, tolerance, process_group
    ).execute()


def adapt_bn_stats(
    model: nn.Module,
    target_loader: Iterable[Any],
    prior: float = 0.0,
    num_iters: int | None = None,
    progress: str | bool | None = None,
    *,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    modules: ModuleSelection = "all",
    estimator: EstimatorName = "population",
    tolerance: float | None = None,
    process_group: ProcessGroup | Literal[False] | None = None,
) -> UpdateReport:
    """Adapt BatchNorm statistics to another domain, with the present ones as a prior.

    AdaBN (Li et al. 2016, "Revisiting Batch Normalization for Practical Domain Adaptation") is ``prior=0``: the
    statistics of the target data alone. With little target data the source statistics help; following Schneider et
    al. 2020 ("Improving robustness against common corruptions by covariate shift adaptation", section 3), who count
    them as N pseudo-samples against n target samples, the new statistics are ``N / (N + n) * source +
    n / (N + n) * target``, for the mean and for the variance. (Merging the Moments of both would add the distance
    between the two means to the variance, and so widen it by the very shift that is to be removed.)

    Args:
        model: a trained model, its running statistics being the source's.
        target_loader: mini-batches of the target domain; labels are not used.
        prior: N, in samples; 0 or more, ``math.inf`` leaves the source statistics. A layer with a population for each
            domain weighs each against that domain's part of the samples.
        num_iters: as in :func:`update_bn_stats`, but all of the loader by default.
        progress: as in :func:`update_bn_stats`, as are the next two.
        forward: how to call the model.
        device: where mini-batches are moved to.
        modules: as in :func:`update_bn_stats`, but all layers by default, whatever their mode.
        estimator: as in :func:`update_bn_stats`, as are the next two.
        tolerance: stop when the standard errors of the target statistics are below it.
        process_group: ranks whose data counts.

    Returns:
        As :func:`update_bn_stats`, whose exceptions are raised too.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> target = [torch.tensor([[4.0], [8.0]])]
        >>> _ = adapt_bn_stats(model, target, prior=2)
        >>> model[0].running_mean, model[0].running_var  # halfway from (0, 1) to (6, 4)
        (tensor([3.]), tensor([2.5000]))
    """
    if not _is_number(prior) or not prior >= 0:  # NaN is not either
        raise InputError(f"prior={prior!r} must be a number of samples, 0 or more")
    return _Run(
        model, target_loader, num_iters, progress, forward, device, modules, estimator, tolerance, process_group, prior
    ).execute()


@dataclass
class _Run:
    """One recalibration: its arguments, and what is known so far."""

    model: nn.Module
    data_loader: Iterable[Any]
    num_iters: int | None
    progress: str | bool | None
    forward: ForwardFn | None
    device: torch.device | str | None
    modules: ModuleSelection
    estimator: EstimatorName
    tolerance: float | None
    process_group: ProcessGroup | Literal[False] | None
    prior: float = 0.0

    iterations: int = field(default=0, init=False)
    samples: int = field(default=0, init=False)
    max_error: float = field(default=math.nan, init=False)
    skipped: dict[str, str] = field(default_factory=dict, init=False)

    def execute(self) -> UpdateReport:
        ranks = Ranks(self.process_group)
        try:
            self._check_arguments()
            self.device = self.device if self.device is not None else common_device(self.model)
            ranks.device = next((p.device for p in _tensors(self.model) if p.device.type != "cpu"), None)
            batches = iter(self.data_loader)
            layers, batches = self._choose_layers(batches)
            self._agree_on_layers(ranks, layers)
            if not layers:
                return self._report(ranks, {}, [])
            with Recording(self.model, layers, self.estimator) as recording:
                self._consume(batches, recording, ranks)
                recording.check_finite()
                total, most = ranks.meet(self._tally(recording))
            changes = self._changes(ranks, recording, total, most)
            report = self._checked_report(ranks, changes)
            ranks.meet(Tally())  # every rank has got this far, so every rank may write
        except RankFailedError:
            raise
        except BaseException:
            ranks.tell_failure()
            raise
        _write(changes)
        return report

    def _check_arguments(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be an nn.Module, not {type(self.model).__name__}")
        if self.num_iters is not None and (
            isinstance(self.num_iters, bool) or not isinstance(self.num_iters, numbers.Integral)
        ):
            raise InputError(f"num_iters={self.num_iters!r} must be a whole number, or None for the whole loader")
        if self.num_iters is not None and self.num_iters < 1:
            raise InputError(f"num_iters={self.num_iters} must be at least 1; None uses the whole loader")
        if self.progress not in (None, False, True, "tqdm"):
            raise InputError(f"progress={self.progress!r} must be 'tqdm', True, False or None")
        if self.estimator not in ESTIMATORS:
            raise InputError(f"estimator={self.estimator!r} must be one of {', '.join(map(repr, ESTIMATORS))}")
        if self.tolerance is not None and not (_is_number(self.tolerance) and 0 < self.tolerance < math.inf):
            raise InputError(f"tolerance={self.tolerance!r} must be a positive number, such as 0.01, or None")
        # NumPy's numbers are as good, but the report is of plain ones, and ranks compare how numbers are written.
        self.num_iters = None if self.num_iters is None else int(self.num_iters)
        self.tolerance = None if self.tolerance is None else float(self.tolerance)
        self.prior = float(self.prior)
        if self.forward is not None and not callable(self.forward):
            raise InputError(f"forward={self.forward!r} must be a callable forward(model, batch)")
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise InputError(f"device={self.device!r} is no device, such as 'cuda:0' or 'cpu': {error}") from error
        if not isinstance(self.data_loader, Iterable) and not hasattr(self.data_loader, "__getitem__"):
            raise InputError(f"data_loader must yield mini-batches; {type(self.data_loader).__name__} is not iterable")

    def _choose_layers(self, batches: Iterator[Any]) -> tuple[dict[str, _NormBase], Iterator[Any]]:
        """The layers to recalibrate, initialized; and the mini-batches, none of them lost."""
        chosen = select_bn(self.model, self.modules)
        if any(is_lazy(tensor) for layer in find_bn(self.model).values() for tensor in _tensors(layer)):
            batches = self._initialize_lazy_modules(batches)
        layers = {}
        for name, layer in find_bn(self.model).items():
            if name not in chosen:
                self.skipped[name] = reason_left_alone(layer, self.modules)
        for name, layer in chosen.items():
            if layer.running_mean is None or layer.running_var is None:
                self.skipped[name] = "no running statistics (track_running_stats=False)"
            elif is_lazy(layer.running_mean):
                self.skipped[name] = "lazy, and not reached by the first mini-batch"
            else:
                layers[name] = layer
        if not layers:
            warnings.warn(self._why_nothing_to_do(chosen), stacklevel=4)
        return layers, batches

    def _initialize_lazy_modules(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Run the first mini-batch once, with all BatchNorm layers in eval mode so that no statistics move."""
        first = next(batches, None)
        if first is None:
            raise InsufficientDataError("the data loader gave no mini-batch, so lazy BatchNorm layers have no size yet")
        layers = list(find_bn(self.model).values())
        modes = [layer.training for layer in layers]
        try:
            for layer in layers:
                layer.training = False
            with torch.no_grad(), buffers_kept(self.model):
                self._call(first)
        finally:
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode
        return itertools.chain([first], batches)

    def _why_nothing_to_do(self, chosen: dict[str, _NormBase]) -> str:
        kind = type(self.model).__name__
        found = find_bn(self.model)
        if chosen:
            return f"none of the {len(chosen)} BatchNorm layers chosen in {kind} keeps running statistics"
        if found and all(isinstance(layer, FrozenNorm) for layer in found.values()):
            return (
                f"all {len(found)} BatchNorm layers of {kind} are frozen, so nothing was recalibrated; name them in "
                "modules= to recalibrate them all the same"
            )
        if found:
            return (
                f"none of the {len(found)} BatchNorm layers of {kind} is in training mode, so nothing was "
                "recalibrated; call model.train() before, or pass modules='all'"
            )
        return (
            f"{kind} has no BatchNorm layer, so nothing was recalibrated; frozen, scripted (torch.jit) and quantized "
            "BatchNorm has no statistics to update: recalibrate before such a conversion"
        )

    def _agree_on_layers(self, ranks: Ranks, layers: dict[str, _NormBase]) -> None:
        channels = {
            name: 0 if layer.running_mean is None else layer.running_mean.numel() for name, layer in layers.items()
        }
        # Ranks that check the tolerance at different steps would wait for each other for ever.
        arguments = (self.estimator, self.prior, self.tolerance, None if self.tolerance is None else self.num_iters)
        fingerprint = zlib.crc32(repr((channels, arguments)).encode())
        own = Tally(layers=len(layers), channels=sum(channels.values()), fingerprint=fingerprint)
        total, most = ranks.meet(own)
        if total != Tally(*(ranks.size * number for number in most)):
            raise _ranks_differ(own, most)

    def _call(self, batch: Any) -> None:
        if self.device is not None:
            batch = move_to(batch, self.device)
        if self.forward is not None:
            self.forward(self.model, batch)
        else:
            call_model(self.model, batch, is_first=self.iterations == 0)

    def _consume(self, batches: Iterator[Any], recording: Recording, ranks: Ranks) -> None:
        """Run the model on mini-batches until there are enough."""
        show = bool(self.progress) and ranks.rank == 0
        bar_total = self.num_iters if self.num_iters is not None or not show else _length(self.data_loader)
        exhausted = False
        next_check = MIN_BLOCKS
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm.tqdm(total=bar_total, desc="BN statistics", disable=not show))
            for step in itertools.count(1) if self.num_iters is None else range(1, self.num_iters + 1):
                if not exhausted:
                    exhausted = not self._step(batches, recording, bar)
                if exhausted and (self.tolerance is None or ranks.size == 1):
                    break
                if self.tolerance is not None and step >= next_check:
                    next_check = step + max(1, step // 20)  # each check costs a wait for the device and for the ranks
                    if self._is_enough(self.tolerance, recording, ranks, exhausted, bar):
                        break
        if self.iterations == 0 and ranks.size == 1:
            raise InsufficientDataError("the data loader gave no mini-batch")
        if exhausted and self.tolerance is None and self.num_iters is not None:
            raise InsufficientDataError(
                f"num_iters={self.num_iters}, but the data loader ended after {self.iterations} mini-batches; pass "
                "num_iters=None to use the whole loader, or a loader that is long enough"
            )

    def _step(self, batches: Iterator[Any], recording: Recording, bar: "tqdm.tqdm[Any]") -> bool:
        """Run one mini-batch, if there is one."""
        for batch in batches:
            self._call(batch)
            recording.end_batch()
            self.iterations += 1
            self.samples += num_samples(batch)
            self._show(bar)
            bar.update()
            return True
        return False

    def _show(self, bar: "tqdm.tqdm[Any]") -> None:
        if bar.disable:
            return
        error = {} if math.isnan(self.max_error) else {"error": f"{self.max_error:.2g}"}
        bar.set_postfix({"samples": self.samples, **error}, refresh=False)

    def _is_enough(
        self, tolerance: float, recording: Recording, ranks: Ranks, exhausted: bool, bar: "tqdm.tqdm[Any]"
    ) -> bool:
        """Whether the standard errors are within the tolerance, or no rank has data left."""
        recording.check_finite()
        total, most = ranks.meet(self._tally(recording, unfinished=not exhausted))
        errors: list[float] = []
        for population in _populations(recording, ranks, most):
            seen = population.count > 0
            errors += population.mean_error[seen].tolist() + population.var_error[seen].tolist()
        self.max_error = largest(errors)
        self._show(bar)
        return _all_within(tolerance, errors) or not total.unfinished

    def _tally(self, recording: Recording, unfinished: bool = False) -> Tally:
        return Tally(samples=self.samples, levels=recording.num_levels, unfinished=int(unfinished))

    def _changes(self, ranks: Ranks, recording: Recording, total: Tally, most: Tally) -> "list[_Change]":
        """Merge the ranks, and work out the new statistics of every layer that was reached."""
        self.samples = total.samples
        populations = {
            estimator: population.cpu()
            for estimator, population in zip(recording.estimators, _populations(recording, ranks, most), strict=True)
        }
        changes: list[_Change] = []
        for layer, old in zip(recording.layers, _old_statistics(recording, ranks, self.prior), strict=True):
            population = populations[layer.estimator]
            if population.num_batches[layer.slot] == 0:
                several = isinstance(layer.module, PopulationNorm) and layer.module.num_slots is not None
                what = "sample of the domain was seen" if several else "mini-batch came through __call__"
                self.skipped[layer.name] = f"no {what}"
            elif self.iterations and not recording.writes_statistics(layer):
                self.skipped[layer.name] = "own forward does not write running statistics in training mode"
            else:
                samples = self._samples_of(layer, recording, population.count)
                changes.append(_Change.of(layer, population, old, self.prior, samples))
        if not changes and self.samples == 0 and self.iterations == 0:
            raise InsufficientDataError("no rank's data loader gave a mini-batch")
        return changes

    def _samples_of(self, layer: RecordedLayer, recording: Recording, count: Tensor) -> float:
        """How many samples a population is of: where a layer has several, each has its part, by numbers of values."""
        slots = [other.slot for other in recording.layers if other.module is layer.module]
        if self.prior == 0 or len(slots) == 1:
            return self.samples
        return self.samples * float(count[layer.slot] / count[slots].sum())

    def _checked_report(self, ranks: Ranks, changes: "list[_Change]") -> UpdateReport:
        """The report, with a warning where it is not what was asked for: before writing, for it may be an error."""
        changed = {change.layer.name: change.layer.module for change in changes}
        report = self._report(ranks, changed, [change.report() for change in changes])
        if not changes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])
            warnings.warn(f"no BatchNorm layer was recalibrated ({reasons})", stacklevel=4)
        if self.tolerance is not None and not report.converged:
            worst = report.max_error
            known = f"is {worst:.3g}" if not math.isnan(worst) else f"takes at least {MIN_BLOCKS} mini-batches to know"
            warnings.warn(
                f"tolerance={self.tolerance:g} was not reached in {self.iterations} mini-batches: the largest standard "
                f"error {known}. The statistics are updated all the same; give more data for certainty",
                stacklevel=4,
            )
        return report

    def _report(self, ranks: Ranks, changed: dict[str, _NormBase], layers: list[LayerReport]) -> UpdateReport:
        errors = [error for layer in layers for error in (layer.mean_error, layer.var_error)]
        return UpdateReport(
            layers=tuple(layers),
            skipped=self.skipped,
            frozen=frozen_parameters(self.model, changed),
            num_iters=self.iterations,
            num_samples=self.samples,
            world_size=ranks.size,
            estimator=self.estimator,
            tolerance=self.tolerance,
            converged=None if self.tolerance is None else _all_within(self.tolerance, errors),
            fallback=fallback_in_use(t.device.type for layer in changed.values() for t in layer.buffers()),
        )


@dataclass(frozen=True)
class _Change:
    """The new statistics of one layer, float64 and in the dtype of its buffers, beside the old."""

    layer: RecordedLayer
    old: tuple[Tensor, Tensor]
    mean: Tensor
    var: Tensor
    new_mean: Tensor
    new_var: Tensor
    count: int
    num_batches: int
    mean_error: float
    var_error: float

    @staticmethod
    def of(
        layer: RecordedLayer, population: Population, old: tuple[Tensor, Tensor], prior: float, samples: float
    ) -> "_Change":
        """What a population means for one layer, the old statistics counting as ``prior`` samples.

        Raises:
            NonFiniteStatisticsError: the statistics do not fit the dtype of the layer's buffers.
        """
        sizes, slot = layer.estimator.num_channels, layer.slot
        mean, var = population.mean.split(sizes)[slot], population.var.split(sizes)[slot]
        if prior > 0:
            if not all(bool(tensor.isfinite().all()) for tensor in old):
                raise NonFiniteStatisticsError(
                    f"the present statistics of layer {layer.name!r} hold NaN or Inf: no prior; pass prior=0"
                )
            weight = prior / (prior + samples) if math.isfinite(prior) else 1.0
            mean, var = torch.lerp(mean, old[0], weight), torch.lerp(var, old[1], weight)
        new_mean, new_var = mean.to(layer.running_mean.dtype), var.to(layer.running_var.dtype)
        if not bool(torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()):
            raise NonFiniteStatisticsError(
                f"the new statistics of layer {layer.name!r} overflow its {layer.running_var.dtype} buffers (largest "
                f"variance {var.max().item():.3g}); keep BatchNorm layers in float32. The model is as it was"
            )
        return _Change(
            layer, old, mean, var, new_mean, new_var, int(population.count[slot]), int(population.num_batches[slot]),
            float(population.mean_error[slot]), float(population.var_error[slot]),
        )  # fmt: skip

    def report(self) -> LayerReport:
        """Compare with the statistics that the layer still has."""
        return LayerReport.comparing(
            self.layer.name,
            self.old,
            (self.mean, self.var),
            self.layer.module.eps,
            num_batches=self.num_batches,
            count=self.count,
            mean_error=self.mean_error,
            var_error=self.var_error,
        )


def _populations(recording: Recording, ranks: Ranks, most: Tally) -> list[Population]:
    """The statistics so far, of each device's estimator, over all ranks."""
    results = []
    for estimator in recording.estimators:
        modules = [layer.module for layer in recording.layers if layer.estimator is estimator]
        eps = torch.tensor([m.eps for m in modules], dtype=torch.float64, device=estimator.num_batches.device)
        all_reduce = ranks.all_reduce if ranks.size > 1 else None
        results.append(estimator.result(eps, all_reduce=all_reduce, num_levels=most.levels))
    return results


def _old_statistics(recording: Recording, ranks: Ranks, prior: float) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance that each layer has, float64 on the CPU; as a prior, their averages over the ranks.

    Ranks that trained together have slightly different running averages, and must not end with different statistics.
    """
    sizes = [layer.running_mean.numel() for layer in recording.layers]
    stats = [stat.double().cpu() for layer in recording.layers for stat in (layer.running_mean, layer.running_var)]
    if prior > 0 and ranks.size > 1:
        flat = torch.cat(stats).div_(ranks.size)
        ranks.all_reduce(flat)
        stats = list(flat.split([size for size in sizes for _ in range(2)]))
    return list(zip(stats[0::2], stats[1::2], strict=True))


def _write(changes: list[_Change]) -> None:
    """Overwrite the statistics of all layers in place; if that is interrupted, of none."""
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for change in changes:
        targets += [change.layer.running_mean, change.layer.running_var]
        values += [change.new_mean, change.new_var]
        tracked = change.layer.num_batches_tracked
        if tracked is not None:
            targets.append(tracked)
            values.append(tracked + change.num_batches)
    with torch.no_grad():
        before = [target.clone() for target in targets]
        try:
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
        except BaseException:
            for target, value in zip(targets, before, strict=True):
                target.copy_(value)
            raise


def _ranks_differ(own: Tally, most: Tally) -> InputError:
    return InputError(
        f"ranks chose different BatchNorm layers, or have different arguments: this one has {own.layers} layers with "
        f"{own.channels} channels, another {most.layers} with {most.channels}. Every rank must pass the same model in "
        "the same mode, and the same estimator=, tolerance= and, with a tolerance, num_iters="
    )


def _all_within(tolerance: float, errors: list[float]) -> bool:
    return bool(errors) and all(error <= tolerance for error in errors)  # NaN, an error not known yet, is not within


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception:  # a loader that does not know its length may say so in any way
        return None
