"""recalibrated: a recalibration for the time of a block, after which the old running statistics are back."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from precisebn.distributed import ProcessGroup
from precisebn.errors import PreciseBNError, add_note
from precisebn.models.batches import ForwardFn
from precisebn.models.interrupts import HeldBack, Undisturbed
from precisebn.models.selection import ModuleSelection
from precisebn.recalibration.report import UpdateReport
from precisebn.recalibration.settings import Settings
from precisebn.recalibration.undo import Undo
from precisebn.recalibration.update import recalibrate
from precisebn.statistics.estimator import EstimatorName

__all__ = ["recalibrated"]


def recalibrated(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int | None = 200,
    progress: str | bool | None = None,
    *,
    prior: float = 0.0,
    force: bool = False,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
    modules: ModuleSelection = "training",
    exclude: ModuleSelection | None = None,
    estimator: EstimatorName = "population",
    tolerance: float | None = None,
    process_group: ProcessGroup | Literal[False] | None = None,
    early_exit: bool = False,
) -> Undisturbed[UpdateReport]:
    """Within this block a model has recalibrated running statistics; behind it the old ones, bit for bit.

    To evaluate, or to save, a model under PreciseBN's statistics in the middle of a training that goes on with its own;
    or to look at another domain. The statistics come back however the block ends, and where they were: in the same
    memory. Nothing else is put back: modes and parameters are the block's.

    Args:
        model: as in :func:`precisebn.update_bn_stats`, as are all others but two.
        data_loader: mini-batches.
        num_iters: how many of them; None for all.
        progress: whether to show a bar.
        prior: as how many samples the present statistics count, as in :func:`precisebn.adapt_bn_stats`; with 0 those
            of the data alone are taken.
        force: put the old statistics back also where the block has changed the new ones, by forwards in training mode
            say. (The alternative is :func:`precisebn.pause_tracking` around these.)
        forward: how to call the model.
        device: where mini-batches are moved to.
        memory_format: how their tensors are laid out.
        modules: which layers.
        exclude: which of them not.
        estimator: which statistics.
        tolerance: when to stop.
        process_group: ranks whose data counts; each puts its own statistics back.
        early_exit: whether to leave forwards behind the last of the layers.

    Yields:
        The report. After its :meth:`~precisebn.UpdateReport.undo` inside the block nothing is left to put back.

    Raises:
        UndoError: at the end, if somebody has changed the statistics inside the block: nothing is put back then, and
            ``report.undo(force=True)`` does it all the same. (Where the block itself raises, it becomes a note of that
            exception.)
        PreciseBNError: at the beginning, what :func:`precisebn.update_bn_stats` raises.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> with recalibrated(model, [torch.tensor([[4.0], [8.0]])], num_iters=1) as report:
        ...     model.eval()(torch.tensor([[6.0]]))
        tensor([[0.]], grad_fn=<...>)
        >>> model[0].running_mean
        tensor([0.])
    """
    settings = Settings(
        model=model, data_loader=data_loader, num_iters=num_iters, progress=progress, forward=forward, device=device,
        memory_format=memory_format, modules=modules, exclude=exclude, estimator=estimator, tolerance=tolerance,
        process_group=process_group, early_exit=early_exit, prior=prior, call="recalibrated",
    )  # fmt: skip
    return Undisturbed(_recalibrated, settings, force)


def _recalibrated(interrupts: HeldBack, settings: Settings, force: bool) -> Iterator[UpdateReport]:
    undo = Undo()  # at hand already if Ctrl-C comes in between the recalibration and the block
    ended = False
    try:
        with interrupts.let_through():  # the recalibration knows when
            report = recalibrate(settings, undo)
        yield report
        ended = True
        if undo.is_needed:
            undo.put_back(force)
    except BaseException as error:
        refused = ended and isinstance(error, PreciseBNError)
        if undo.is_needed and not refused:
            try:
                undo.put_back(force)
            except PreciseBNError as failure:  # what has led here matters more
                add_note(error, f"precisebn: the statistics from before recalibrated() are not back: {failure}")
        raise
