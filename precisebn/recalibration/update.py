"""Recalibration of BatchNorm statistics: PreciseBN and AdaBN.

``update_bn_stats`` replaces the running averages of BatchNorm layers by the exact statistics of given data under the
present weights ("Rethinking 'Batch' in BatchNorm", Wu & Johnson 2021, arXiv 2105.07576, section 3);
``adapt_bn_stats`` does the same for data of another domain (Li et al. 2016; Schneider et al. 2020). Both are
transactions: the model changes when all data has been seen, all at once, or not at all.
"""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from precisebn._reports import counted
from precisebn._warnings import warn
from precisebn.distributed import ProcessGroup, Ranks
from precisebn.errors import InsufficientDataError
from precisebn.models.batches import ForwardFn
from precisebn.models.description import describe_layers
from precisebn.models.interrupts import HeldBack
from precisebn.models.selection import ModuleSelection
from precisebn.recalibration.choice import choose, initialize_lazy_layers
from precisebn.recalibration.commit import Changes, Commit
from precisebn.recalibration.early_exit import EarlyExit
from precisebn.recalibration.loop import Loop, all_within
from precisebn.recalibration.prior import Prior
from precisebn.recalibration.recording import Recording
from precisebn.recalibration.report import UpdateReport, fallback_in_use, frozen_parameters, largest
from precisebn.recalibration.settings import Settings
from precisebn.recalibration.undo import Undo
from precisebn.statistics.estimator import MIN_BLOCKS, EstimatorName

__all__ = ["adapt_bn_stats", "recalibrate", "update_bn_stats"]

_ADVICE = (
    "Every rank must pass the same model in the same mode, and the same estimator=, prior=, tolerance= and, with a "
    "tolerance, num_iters=; where ranks hold other layers on purpose (stages of a pipeline), pass those that hold the "
    "same ones as process_group="
)


def update_bn_stats(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int | None = 200,
    progress: str | bool | None = None,
    *,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
    modules: ModuleSelection = "training",
    exclude: ModuleSelection | None = None,
    estimator: EstimatorName = "population",
    tolerance: float | None = None,
    process_group: ProcessGroup | Literal[False] | None = None,
    early_exit: bool = False,
) -> UpdateReport:
    """Replace the running statistics of BatchNorm layers by those of the given data under the present weights.

    A drop-in for ``fvcore.nn.update_bn_stats``: the same first four arguments with the same meaning. The model runs on
    the mini-batches without gradients, every chosen layer normalizing with the statistics of the mini-batch as in
    training; their moments merge exactly (never a difference of squares), and then ``running_mean`` and
    ``running_var`` are overwritten, in place; ``num_batches_tracked`` grows by the mini-batches seen, as in training.
    ``momentum``, modes and hooks are as before, and so are the running statistics of all other layers, also where these
    are no buffers but parameters, attributes or parametrized, which are left alone. What a forward does to anything
    else (a queue, a cache, the vectors of spectral norm) it has done, as any forward does.

    If anything at all is raised on the way, Ctrl-C included, the model is as it was, bit for bit: buffers, parameters,
    attributes, hooks, modes. (Lazy modules that the first forward has initialized stay initialized.) That takes
    the memory of another copy of the model's tensors for the time of the call.

    The forward may run a layer in several threads. No other thread should run the model meanwhile: what it sends
    through would be normalized by its own statistics, and be counted. (The model itself suffers no harm.)

    Args:
        model: any module, also wrapped by DDP, DataParallel, AveragedModel or torch.compile (compiled code is set
            aside for the duration, and stays valid). Put it into the mode it shall run in before the call, as for
            fvcore: ``model.train()``, or see ``modules``.
        data_loader: yields mini-batches; shuffled, and of the size of training's normalization batch.
        num_iters: how many mini-batches to use; None uses all there are. With ``tolerance`` it is the most to use.
        progress: ``"tqdm"`` or True shows a progress bar with the samples seen and the largest standard error.
        forward: ``forward(model, batch)`` calls the model. By default a mapping is passed as keyword arguments; a
            list or tuple of a floating-point tensor and items that hold none (labels, metadata) is passed as that
            tensor; anything else as it is, a PackedSequence too.
        device: where mini-batches are moved to; by default, the device of the model's parameters if they share one.
        memory_format: how their tensors are laid out before the model gets them: ``torch.channels_last`` those of 4
            dimensions, ``torch.channels_last_3d`` those of 5, wherever they lie in mappings, lists and tuples.
            Convolutions keep the format of their input, and on most devices are faster so; the model itself is not
            converted. The statistics are the same but for rounding.
        modules: ``"training"``: the BatchNorm layers in training mode, as long as they are (a teacher that the forward
            puts into eval mode normalizes by its running statistics, which stay as they are); ``"all"``: those in eval
            mode too, but no frozen ones; or modules, qualified names and glob patterns, which take frozen layers too
            (``"*"`` takes every layer). These two normalize with batch statistics whatever the mode of the layers, all
            other modules keep theirs: ``model.eval()`` and ``modules="all"`` recalibrates with dropout off. A forward
            for which the model switches the tracking of a layer off (:func:`precisebn.pause_tracking`,
            ``track_running_stats = False``, a momentum of 0) does not count.
        exclude: which of them not, as modules, names or patterns.
        estimator: ``"population"``: mean and biased variance of all values together, exact also for mini-batches of
            different sizes (fvcore's default too); ``"batch-mean"``: plain averages of the mini-batches' means and
            unbiased variances.
        tolerance: stop as soon as the standard error of every layer's mean (in its standard deviations) and variance
            (relative) is at most this, but not before 8 mini-batches. The errors are those of batch means: they assume
            that mini-batches are correlated, if at all, over a short part of the run, as shuffling ensures. Where the
            loader ends first, the statistics are those of all its data, and a warning tells the error. It is an error
            about the population that the data was drawn from: a loader that brings the same samples again and again
            tells nothing new of that, and its samples would count as if they did. The errors are looked at the more
            often the nearer they come; a run may so go on for some mini-batches more than it must.
        process_group: ranks whose data counts: a group or a DeviceMesh of one dimension. None: all ranks, where
            torch.distributed is initialized; all of them must call. False: this process alone. Ranks may have different
            numbers of mini-batches, or none (with ``num_iters=None`` or ``tolerance``); all end with the same
            statistics, bit for bit, and with the same ``num_batches_tracked``: the largest of any rank before, and the
            mini-batches of all. SyncBatchNorm layers normalize with the mini-batch of their rank. A sharded model
            (FSDP), whose forward waits for other ranks, needs the same number of mini-batches on every rank, and all
            ranks raise where it is not; a layer of your own with an all-reduce in it needs that too, and would hang.
        early_exit: leave every forward but the first behind the last layer that is recalibrated: worth it where that
            comes early (``modules="backbone.*"``). It is for models whose mini-batches all go through the same layers,
            and whose code behind that layer does nothing that matters here. Where a mini-batch goes through other
            layers, as far as that shows, nothing changes and an InputError is raised.

    Returns:
        What changed and how certain it is: :class:`UpdateReport`.

    Raises:
        InsufficientDataError: the loader ended before ``num_iters`` mini-batches, or gave none.
        NonFiniteStatisticsError: NaN or Inf in the input of a layer; names the layer and the mini-batch.
        BatchFormatError: the model does not take what the loader yields.
        RankFailedError: another rank failed, or did not come within the timeout of the process group.
        InputError: an argument that makes no sense; a ``view`` in the model that does not exist in ``memory_format``;
            ranks that differ in their layers, arguments or versions; running statistics that cannot be written
            (integers, inference tensors, expanded ones), or not without overwriting another layer's, with which they
            share memory; a forward inside torch.vmap; or the model, or a part of it, is being recalibrated already.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.zeros(16).long()) for _ in range(10)]
        >>> report = update_bn_stats(model, loader, num_iters=10)
        >>> report.num_samples, model[1].running_var.shape
        (160, torch.Size([8]))
    """
    return recalibrate(
        Settings(
            model=model, data_loader=data_loader, num_iters=num_iters, progress=progress, forward=forward,
            device=device, memory_format=memory_format, modules=modules, exclude=exclude, estimator=estimator,
            tolerance=tolerance, process_group=process_group, early_exit=early_exit,
        )
    )  # fmt: skip


def adapt_bn_stats(
    model: nn.Module,
    target_loader: Iterable[Any],
    prior: float = 0.0,
    num_iters: int | None = None,
    progress: str | bool | None = None,
    *,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
    modules: ModuleSelection = "all",
    exclude: ModuleSelection | None = None,
    estimator: EstimatorName = "population",
    tolerance: float | None = None,
    process_group: ProcessGroup | Literal[False] | None = None,
    early_exit: bool = False,
) -> UpdateReport:
    """Adapt BatchNorm statistics to another domain, with the present ones as a prior.

    AdaBN (Li et al. 2016, "Revisiting Batch Normalization for Practical Domain Adaptation") is ``prior=0``: the
    statistics of the target data alone. With little target data the source statistics help; following Schneider et
    al. 2020 ("Improving robustness against common corruptions by covariate shift adaptation", section 3), who count
    them as N pseudo-samples against n target samples, the new statistics are ``N / (N + n) * source +
    n / (N + n) * target``, for the mean and for the variance. (Merging the Moments of both would add the distance
    between the two means to the variance, and so widen it by the very shift that is to be removed.) As in their code
    layers normalize by these very mixtures while the target is measured, so that deeper layers are measured under what
    will be deployed; n is that of all the data, however it is cut into mini-batches. To know it, the loader is gone
    through twice; with a tolerance it is that of the samples so far. Of an iterator, which there is only once, copies
    of all mini-batches are kept, as it may use the same memory again: that takes the memory of all the data, beside
    what the iterator holds itself. Pass a loader or a list where that is too much.

    What prior to choose: none, where the shift is large or there are a hundred samples of the target; where there are
    fewer and the shift may be small, as many as there are samples at most. (``python -m benchmarks --only prior``, on
    digits: under a cut contrast 16 samples bring the error from 78% to 7% without a prior and to 15% with 16, to 55%
    with 64; under noise, from 11.1% to 11.7% without one and to 10.7% with 16.)

    Args:
        model: a trained model, its running statistics being the source's.
        target_loader: mini-batches of the target domain; labels are not used.
        prior: N, in samples; 0 or more, ``math.inf`` leaves the source statistics. A layer with a population for each
            domain weighs each against that domain's part of the samples. Samples of the target are counted by the first
            dimension of a tensor (the first of a list or tuple, if that is floating point; of a mapping, a dataclass or
            another object, all that are in it must agree), by the sequences of a PackedSequence, and by the items of a
            list of mappings or objects. Where that says nothing certain, a BatchFormatError has the remedy.
        num_iters: as in :func:`update_bn_stats`, but all of the loader by default.
        progress: as in :func:`update_bn_stats`, as are the next two.
        forward: how to call the model.
        device: where mini-batches are moved to.
        memory_format: how their tensors are laid out.
        modules: as in :func:`update_bn_stats`, but all layers by default, whatever their mode.
        exclude: as in :func:`update_bn_stats`.
        estimator: as in :func:`update_bn_stats`, as are the next two.
        tolerance: stop when the standard errors of the target statistics are below it.
        process_group: ranks whose data counts.
        early_exit: as in :func:`update_bn_stats`.

    Returns:
        As :func:`update_bn_stats`, whose exceptions are raised too.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> target = [torch.tensor([[4.0], [8.0]])]
        >>> _ = adapt_bn_stats(model, target, prior=2)
        >>> model[0].running_mean, model[0].running_var  # halfway from (0, 1) to (6, 4)
        (tensor([3.]), tensor([2.5000]))
    """
    return recalibrate(
        Settings(
            model=model, data_loader=target_loader, num_iters=num_iters, progress=progress, forward=forward,
            device=device, memory_format=memory_format, modules=modules, exclude=exclude, estimator=estimator,
            tolerance=tolerance, process_group=process_group, early_exit=early_exit, prior=prior,
            call="adapt_bn_stats",
        )
    )  # fmt: skip


def recalibrate(settings: Settings, undo: Undo | None = None) -> UpdateReport:
    """One recalibration. What is raised in it is told to the other ranks after the model has been put back.

    Args:
        settings: the arguments of the user.
        undo: what shall know how to undo it, for callers who need that even if the report never reaches them.
    """
    undo = Undo() if undo is None else undo
    with (
        HeldBack() as interrupts,
        Ranks(settings.process_group, let_through=interrupts.let_through, call=settings.call) as ranks,
    ):
        settings.check()
        settings = settings.plain()
        model = settings.model
        loop = Loop(settings, ranks, interrupts)
        choice = choose(settings)
        if choice.some_are_lazy:
            loop.batches = initialize_lazy_layers(model, loop.batches, loop.call)
            choice = choose(settings)
        if not choice.layers:
            warn(choice.why_nothing(model))
        if ranks.size > 1:
            devices = (t.device for t in chain(model.parameters(), model.buffers()))
            ranks.device = next((device for device in devices if device.type != "cpu"), None)
            ranks.agree(_description(settings, choice.layers), _ADVICE)
        if not choice.layers:
            undo.note_old(model, ())
            undo.is_needed = True
            return _report(settings, ranks, Changes(), choice.skipped, 0, 0, undo)
        prior = Prior(settings.prior)
        mixtures = prior.mixtures(choice.layers, ranks, averages=settings.estimator == "batch-mean")
        loop.weigh(prior)
        exits = EarlyExit(model, choice.layers) if settings.early_exit else None
        by_mode = settings.modules == "training"
        with Recording(model, choice.layers, settings.estimator, mixtures, exits, by_mode) as recording:
            total, most = loop.run(recording)
            recording.stop()
            commit = Commit(recording, ranks, total, most, settings.prior)
            if not commit.changes.populations and total.samples == 0 and loop.iterations == 0:
                raise InsufficientDataError("no rank's data loader gave a mini-batch")
            skipped = choice.skipped | commit.skipped
            report = _report(settings, ranks, commit.changes, skipped, loop.iterations, total.samples, undo)
            _warn_of(report, commit)  # before writing: it may have been made an error
            undo.note_old(model, commit.changes.populations)
            commit.write()
            undo.note_new(commit.changes.populations)
            interrupts.deliver()
            ranks.commit()  # every rank has written: what is raised before this undoes it on all ranks
        undo.is_needed = True
    return report


def _description(settings: Settings, layers: dict[str, nn.Module]) -> dict[str, object]:
    """What must be the same on all ranks: else they would wait for each other for ever, or end with differences."""
    return {
        "estimator=": settings.estimator,
        "prior=": settings.prior,
        "tolerance=": settings.tolerance,
        "num_iters= with a tolerance": None if settings.tolerance is None else settings.num_iters,
        **describe_layers(layers),
    }


def _report(
    settings: Settings,
    ranks: Ranks,
    changes: Changes,
    skipped: dict[str, str],
    num_iters: int,
    num_samples: int,
    undo: Undo,
) -> UpdateReport:
    devices = {one.statistics.mean.device.type for one in changes.populations}
    return UpdateReport(
        layers=(),
        skipped=skipped,
        frozen=frozen_parameters(settings.model, {one.name: one.layer for one in changes.populations}),
        num_iters=num_iters,
        num_samples=num_samples,
        world_size=ranks.size,
        estimator=settings.estimator,
        tolerance=settings.tolerance,
        converged=None if settings.tolerance is None else all_within(settings.tolerance, changes.errors),
        fallback=fallback_in_use(sorted(devices)),
        _undo=undo,
        _later=changes.reports,
    )


def _warn_of(report: UpdateReport, commit: Commit) -> None:
    """Tell where a report is not what was asked for."""
    if not commit.changes.populations:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(commit.skipped.items())[:3])
        warn(f"no BatchNorm layer was recalibrated ({reasons})")
    if report.tolerance is not None and not report.converged:
        worst = largest(commit.changes.errors)
        known = f"is {worst:.3g}" if not math.isnan(worst) else f"takes at least {MIN_BLOCKS} mini-batches to know"
        warn(
            f"tolerance={report.tolerance:g} was not reached in {counted(report.num_iters, 'mini-batch')}: the largest "
            f"standard error {known}. The statistics are updated all the same; give more data for certainty"
        )
