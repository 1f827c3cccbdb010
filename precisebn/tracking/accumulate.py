"""accumulate_statistics: one update of the running statistics for several micro-batches.

With gradient accumulation an optimizer step sees k micro-batches, and running statistics move k times, by a momentum
that was chosen for once (pytorch issue 46516). Here the Moments of the micro-batches merge (Chan, Golub & LeVeque
1979), and are tracked once, as one forward of all of them together would have been. What normalizes stays the
micro-batch: that no accumulation can change, since the first has gone through the network before the last one comes.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from torch import nn

from precisebn.distributed import ProcessGroup, Ranks
from precisebn.errors import InputError
from precisebn.models.families import (
    class_family,
    is_batch_norm,
    is_frozen,
    is_instance_norm,
    is_norm_with_statistics,
    populations_of,
)
from precisebn.models.in_use import claim, release
from precisebn.models.interrupts import HeldBack, Undisturbed
from precisebn.models.transaction import Transaction
from precisebn.nn.frozen import FrozenNorm
from precisebn.nn.population import ACCUMULATOR, PopulationNorm, Recordable
from precisebn.tracking.gathering import Averages, Gathered, GatheringForward, merge_over_ranks
from precisebn.tracking.layers import select_tracking

__all__ = ["accumulate_statistics"]


def accumulate_statistics(model: nn.Module, *modules: str | nn.Module) -> Undisturbed[nn.Module]:
    """Within this block running statistics stand still; at its end they move once, for all micro-batches together.

    Every layer in training mode normalizes each micro-batch by its own statistics, as always. Their Moments merge in
    float64, and at the end each layer tracks them with its momentum, as it would have tracked one forward of all
    micro-batches concatenated: ``running_mean`` from the mean and ``running_var`` from the unbiased variance of all
    values, which includes how far the micro-batches' means lie apart; ``num_batches_tracked`` grows by one. Layers that
    nothing went through in training mode stay as they are, and all of them do if the block raises.

    A micro-batch counts once also under activation checkpointing, whose repetition of a forward inside the backward
    makes nn.BatchNorm count it twice (pytorch issue 96136): put the backward inside the block, also if there is only
    one micro-batch.

    It goes with the others of its kind: forwards inside :func:`precisebn.pause_tracking` do not count, nor those of
    layers in eval mode or frozen. Forwards of several threads all count, if a layer is done before the block is. Under
    DistributedDataParallel each rank accumulates its own, as it tracks its own without. SyncBatchNorm, whose statistics
    are those of all ranks, merges them at the end of the block, which all ranks of its group must then reach.
    torch.compile's graphs hold it, after one compilation more; but a subclass of BatchNorm with a forward of its own,
    or a checkpoint around a layer, breaks them (``fullgraph=True`` says so).

    Args:
        model: the model.
        modules: where: modules of the model, qualified names, glob patterns over qualified names; none: everywhere.
            BatchNorm of torch, subclasses of it, InstanceNorm with running statistics, the modules of precisebn.nn.

    Raises:
        InputError: something that matches no layer with running statistics; such a layer in training mode in code of
            torch.jit or torch.export; a layer that is recalibrated or in such a block already; inside the block, a
            layer with a forward of its own that works its statistics out by hand.
        RankFailedError: at the end, with SyncBatchNorm: another rank has failed. Nothing has been tracked.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm1d(1, momentum=0.5))
        >>> with accumulate_statistics(model):
        ...     for micro_batch in (torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])):
        ...         model(micro_batch).sum().backward()
        >>> model[0].running_mean, model[0].num_batches_tracked  # halfway from 0 to 3
        (tensor([1.5000]), tensor(1))
    """
    return Undisturbed(_accumulated, model, modules)


def _accumulated(interrupts: HeldBack, model: nn.Module, modules: Iterable[str | nn.Module]) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    layers = select_tracking(model, modules, _keeps_statistics, "accumulate_statistics")
    block = _Block(model, layers, interrupts)
    try:
        block.begin()
        yield model
        block.finish()
    except BaseException as error:
        block.tell_other_ranks(error)
        raise
    finally:
        block.close()


def _keeps_statistics(module: nn.Module) -> bool:
    return is_norm_with_statistics(module) or is_batch_norm(module)


class _Block:
    """The layers of one block, and what has been gathered of each.

    Args:
        model: the model.
        layers: some of its layers, by name.
        interrupts: hold Ctrl-C back but in the body of the block, and where ranks wait for each other.

    Raises:
        InputError: a layer that updates its statistics in a way of its own; DataParallel on several devices.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], interrupts: HeldBack) -> None:
        self.model = model
        self._interrupts = interrupts
        self.gathered = {
            layer: Averages(name, layer) if is_instance_norm(layer) else Gathered(name, layer)
            for name, layer in layers.items()
            if len(populations_of(layer)) > 0 and not isinstance(layer, FrozenNorm)
        }
        owners = [module for module in model.modules() if isinstance(module, Recordable)]
        self._tracked_for = {member for owner in owners for member in owner.members() if owner.tracks(member)}
        for layer, gathered in self.gathered.items():
            if isinstance(layer, Recordable) and not isinstance(layer, PopulationNorm):
                raise InputError(
                    f"layer {gathered.name!r} ({type(layer).__name__}) updates its running statistics in a way of its "
                    "own, so they cannot be accumulated; leave it out: accumulate_statistics(model, <the others>)"
                )
        if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
            raise InputError(
                "DataParallel runs copies of the layers, whose statistics cannot be accumulated; use "
                "DistributedDataParallel, or pass its `module`"
            )
        self._changes = Transaction()
        self._is_open = False

    def begin(self) -> None:
        """From now on layers hand over what they would track."""
        claim(
            self, self.gathered, name=type(self.model).__name__,
            doing="is in a block of precisebn.accumulate_statistics; do that outside of the block",
        )  # fmt: skip
        self._is_open = True
        for layer, gathered in self.gathered.items():
            if isinstance(layer, PopulationNorm) or layer in self._tracked_for:
                self._changes.put(vars(layer), ACCUMULATOR, gathered)
            else:
                GatheringForward(layer, gathered).put(self._changes)
            self._changes.on_undo(gathered.end)

    def close(self) -> None:
        """Layers are what they were before, when the forwards under way have ended; more than once does no harm."""
        try:
            self._changes.undo()
        finally:
            release(self)
            self._is_open = False

    def finish(self) -> None:
        """Track all that was gathered; all of it, or nothing."""
        self.close()
        for group, of_group in self._synchronized():
            with self._ranks(group) as ranks:
                merge_over_ranks(of_group, ranks)
        with Transaction() as changes:
            for layer, gathered in self.gathered.items():
                if not is_frozen(layer):
                    gathered.track(changes)

    def tell_other_ranks(self, error: BaseException) -> None:
        """Of an exception that has left the block, so that none waits for this one."""
        if self._is_open:
            for group, _ in self._synchronized():
                with suppress(Exception, type(error)), self._ranks(group):
                    raise error

    def _ranks(self, group: ProcessGroup | None) -> Ranks:
        return Ranks(group, let_through=self._interrupts.let_through, call="accumulate_statistics")

    def _synchronized(self) -> list[tuple[ProcessGroup | None, list[Gathered]]]:
        """What was gathered of layers that normalize by the statistics of all ranks, by process group."""
        groups: dict[int, tuple[ProcessGroup | None, list[Gathered]]] = {}
        for layer, gathered in self.gathered.items():
            family = class_family(layer)
            # SyncBN, a PopulationNorm, hands over Moments of all ranks; of the others each rank has gathered its own.
            if family is not None and family.synchronized and not isinstance(layer, PopulationNorm):
                group = getattr(layer, "process_group", None)
                groups.setdefault(id(group), (group, []))[1].append(gathered)
        return list(groups.values())
