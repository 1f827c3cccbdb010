"""Recording: while it lasts, BatchNorm layers normalize with batch statistics, and their Moments are collected.

A layer that declares its populations (:class:`precisebn.nn.population.Recordable`) hands its Moments over. Of any other
the forward is recorded, see :mod:`precisebn.recalibration.forwards`. The running statistics themselves are not touched.
When a recording ends well, the model is what a forward has made of it, but for running statistics, which are all as
before. When it ends badly, the model is as before, bit for bit.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from precisebn._torch import is_batched, outside_of_transforms, unwrapped
from precisebn.distributed import reshard
from precisebn.errors import InputError, NonFiniteStatisticsError
from precisebn.models.copies import Copies
from precisebn.models.families import is_batch_norm, normalizes_its_input, populations_of
from precisebn.models.in_use import claim, release
from precisebn.models.selection import named_modules
from precisebn.models.snapshot import Snapshot
from precisebn.models.transaction import Transaction
from precisebn.models.wrappers import run_eagerly, set_wrappers_aside
from precisebn.nn.population import Recordable, Recorder, RunningStatistics
from precisebn.ops.chan import merge
from precisebn.recalibration.early_exit import EarlyExit
from precisebn.recalibration.forwards import INSIDE_VMAP, DeclaredForward, InputForward, Slot, UnknownForward
from precisebn.recalibration.prior import Mixture
from precisebn.statistics.estimator import EstimatorName, PopulationEstimator
from precisebn.statistics.moments import Moments

__all__ = ["BEING_RECALIBRATED", "RecordedPopulation", "Recording"]

BEING_RECALIBRATED = (
    "is being recalibrated already, by another thread or by the code that runs the model; wait for that to end, or "
    "recalibrate a copy of the model"
)


class RecordedPopulation(NamedTuple):
    """A population under recording: whose it is, its buffers, and its place in its device's estimator.

    The name is that of :meth:`RunningStatistics.named`.
    """

    name: str
    layer: nn.Module
    statistics: RunningStatistics
    estimator: PopulationEstimator
    position: int
    prior: Tensor | None = None
    """Of a mixture: the present mean and variance of all ranks, ``(2, C)``."""

    @property
    def present(self) -> Sequence[Tensor]:
        """Mean and variance before: with a prior those of all ranks, else the buffers' own."""
        return (self.statistics.mean, self.statistics.var) if self.prior is None else self.prior.unbind()


class Recording(AbstractContextManager["Recording"]):
    """Records the named layers of a model, from ``with`` to its end.

    Args:
        model: the model; wrappers in it (DDP, DataParallel, torch.compile) stand aside for the duration.
        layers: what to record, by qualified name. Layers need running statistics and initialized parameters.
        kind: which statistics to estimate, see :class:`precisebn.statistics.estimator.PopulationEstimator`.
        mixtures: of layers that are not to normalize by the mini-batch's own statistics, by the layers' names.
        exits: ends forwards early, if asked for.
        by_mode: whether layers are recorded because they are in training mode, and so only as long as they are.

    Raises:
        InputError: a layer without running statistics; on entering: the model, or a part of it, is being recorded
            already, by another thread or by the very code that runs the model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        kind: EstimatorName,
        mixtures: Mapping[str, Mixture] | None = None,
        exits: EarlyExit | None = None,
        by_mode: bool = False,
    ) -> None:
        self.model = model
        self._by_mode = by_mode
        self._exits = exits
        self._mixtures = mixtures or {}
        self.kind = kind
        self.populations: list[RecordedPopulation] = []
        self.estimators: list[PopulationEstimator] = []
        self.refused: dict[int, int] = {}
        """Populations, by their number here, of whose layer's forward nothing is known, with the reason."""
        self.set_aside: set[nn.Module] = set()
        """Layers with forwards that the model itself has kept from moving their running statistics."""
        self._layers: list[_Layer] = []
        self._place(layers)
        self._execution_order: dict[int, None] = {}
        self._with_ends: list[tuple[str, Recordable]] = []
        self._temporary = Transaction()
        self._sharded: list[nn.Module] = []
        self._before: Snapshot | None = None
        self._stopped = False
        self._lock = threading.RLock()
        self._takes = True
        """Whether Moments that layers hand over count, yet or still."""

    def __enter__(self) -> "Recording":
        modules = list(named_modules(self.model))
        temporary = self._temporary
        try:
            claim(self, [module for _, module in modules], name=type(self.model).__name__, doing=BEING_RECALIBRATED)
            self._sharded = reshard(module for _, module in modules)
            self._before = Snapshot(self.model, modules)
            temporary.on_undo(torch.set_grad_enabled, torch.is_grad_enabled())
            torch.set_grad_enabled(False)
            run_eagerly(temporary)
            temporary.on_undo(self._take_no_more)
            set_wrappers_aside([module for _, module in modules], temporary)
            for layer in self._layers:
                self._record(layer)
            for name, module in modules:
                if isinstance(module, Recordable) and not is_batch_norm(module):  # it has a state, and no Moments
                    self._start(name, module, _no_recorder)
            if self._exits is not None:
                self._exits.put(temporary)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        steps = Transaction()  # each of which runs, whatever another raises; the last one first
        steps.on_undo(release, self)
        if self._before is not None:
            if error is not None:
                steps.on_undo(self._before.put_back)
            elif not self._stopped:
                steps.on_undo(self._before.put_back_statistics)
        steps.on_undo(self._temporary.undo)
        if error is None:
            steps.undo()
        else:
            steps.__exit__(kind, error, traceback)

    def stop(self) -> None:
        """No more mini-batches: the model runs as before, and running statistics are what they were, to be written now.

        Should the block end with an exception all the same, then everything else is put back, too.
        """
        assert self._before is not None  # inside the block
        steps = Transaction()
        steps.on_undo(self._before.put_back_statistics)
        steps.on_undo(self._temporary.undo)
        steps.undo()
        reshard(self._sharded)  # gathered parameters, in the places of the sharded, have no gradients
        self._stopped = True

    @property
    def num_levels(self) -> int:
        """The largest number of block sizes of any estimator."""
        return max((estimator.num_levels for estimator in self.estimators), default=0)

    def forward(self) -> AbstractContextManager[None]:
        """The context in which the model runs on a mini-batch."""
        return nullcontext() if self._exits is None else self._exits.forward()

    def end_batch(self) -> None:
        """Close a mini-batch.

        Raises:
            PreciseBNError: a module was left half done, as a CycleBatchNormList that was not called on every domain.
            NonFiniteStatisticsError: a layer on the CPU met NaN or Inf. (On other devices :meth:`check_finite`
                tells the same, at the end and when a tolerance is asked after: asking every time would make the host
                wait for the device.)
        """
        for name, module in self._with_ends:
            module.end_batch(name)
        are_finite = [estimator.end_batch() or estimator.device.type != "cpu" for estimator in self.estimators]
        if not all(are_finite):
            self.check_finite()

    def was_called(self, index: int) -> bool:
        """Whether a forward of a population's layer was recorded, by its number here, of no sample perhaps."""
        return index in self._execution_order

    def check_finite(self) -> None:
        """Raise if any layer has met NaN or Inf, naming the first layer, as the model runs, of the first mini-batch."""
        if not any(estimator.met_nonfinite() for estimator in self.estimators):
            return
        firsts: dict[int, int] = {}
        for index in self._execution_order:
            one = self.populations[index]
            first = one.estimator.first_nonfinite.split(one.estimator.num_channels)[one.position]
            if bool((first >= 0).any()):
                firsts[index] = int(first[first >= 0].min())
        iteration = min(firsts.values())
        one = self.populations[next(index for index, first in firsts.items() if first == iteration)]
        raise NonFiniteStatisticsError(
            f"the input of layer {one.name!r} ({type(one.layer).__name__}) held NaN or Inf, or values whose "
            f"variance overflows, in mini-batch {iteration} (counted from 0); the model is as it was. Check that "
            "mini-batch and the layers before this one; half precision may need autocast to bfloat16"
        )

    # ---- Layers -----------------------------------------------------------------------------------------------------

    def _place(self, layers: Mapping[str, nn.Module]) -> None:
        """Give every population its place in an estimator, of which there is one for each device."""
        sizes: dict[torch.device, list[int]] = {}
        found: list[tuple[str, nn.Module, RunningStatistics, int, Tensor | None]] = []
        for name, module in layers.items():
            populations = populations_of(module)
            if not populations:
                raise InputError(f"layer {name!r} keeps no running statistics, so there is nothing to record for it")
            self._layers.append(_Layer(name, module, len(found), len(populations)))
            mixture = self._mixtures.get(name)
            priors = [None] * len(populations) if mixture is None else mixture.present.unbind()
            for one, prior in zip(populations, priors, strict=True):
                of_device = sizes.setdefault(one.mean.device, [])
                found.append((one.named(name), module, one, len(of_device), prior))
                of_device.append(one.mean.numel())
        estimators = {
            device: PopulationEstimator(channels, kind=self.kind, device=device) for device, channels in sizes.items()
        }
        self.estimators += estimators.values()
        self.populations += [
            RecordedPopulation(shown, module, one, estimators[one.mean.device], position, prior)
            for shown, module, one, position, prior in found
        ]
        recorded = [one.statistics for one in self.populations if not isinstance(one.layer, Recordable)]
        self._scratch = iter(Copies([buffer for one in recorded for buffer in (one.mean, one.var)]))

    def _record(self, layer: "_Layer") -> None:
        """Put one layer under recording, and among what is temporary how it comes out again."""
        module, mixture = layer.module, self._mixtures.get(layer.name)
        aside = partial(self.set_aside.add, module)
        if isinstance(module, Recordable):
            self._start(layer.name, module, self._recorder(layer))
            DeclaredForward(module, self._by_mode, aside, mixture).put(self._temporary)
            return
        index, one = layer.first, self.populations[layer.first]
        moments = one.estimator.slot(one.position)
        averages = self.kind == "batch-mean"
        slot = Slot(layer.name, type(module).__name__, moments, averages, partial(self._reached, index))
        scratch = {name: next(self._scratch) for name in ("running_mean", "running_var")}
        if normalizes_its_input(module):
            InputForward(module, slot, scratch, self._by_mode, aside, mixture).put(self._temporary)
        else:
            if one.statistics.num_batches is not None:
                scratch["num_batches_tracked"] = one.statistics.num_batches.clone()
            refuse = partial(self._refuse, index)
            UnknownForward(module, slot, scratch, self._by_mode, aside, refuse, mixture).put(self._temporary)

    def _start(self, name: str, module: Recordable, recorder: Recorder) -> None:
        self._with_ends.append((name, module))
        self._temporary.on_undo(module.stop_recording)
        module.start_recording(recorder)

    def _reached(self, index: int) -> None:
        self._execution_order.setdefault(index)
        if self._exits is not None:
            self._exits.reached(self.populations[index].layer)

    def _refuse(self, index: int, reason: int) -> None:
        self.refused.setdefault(index, reason)

    def _recorder(self, layer: "_Layer") -> Recorder:
        """What takes the Moments of a layer that hands them over."""
        one = self.populations[layer.first]
        counts, means, m2s = one.estimator.slots(one.position, layer.number)
        averaging = self.kind == "batch-mean"

        def record(moments: Moments, population: int | None) -> None:
            first, last = (0, layer.number) if population is None else (population, population + 1)
            count, mean, m2 = counts[first:last], means[first:last], m2s[first:last]
            if is_batched(moments.mean):
                raise InputError(f"layer {layer.name!r} ({type(layer.module).__name__}) {INSIDE_VMAP}")
            with outside_of_transforms():  # torch.func lets nobody write into tensors from outside of it
                # Gradients are on where the model asks for them, and in threads of its own.
                new_count, new_mean, new_m2 = (unwrapped(t).detach() for t in (moments.count, moments.mean, moments.m2))
                new_count, new_mean, new_m2 = new_count.reshape(-1), new_mean.view_as(mean), new_m2.view_as(m2)
            # A single population of one value was refused by the layer itself; looking would make the host wait.
            if averaging and last - first > 1 and bool((new_count == 1).any()):
                raise InputError(
                    f"layer {layer.name!r} got one value per channel of a domain: it has no unbiased variance, which "
                    "estimator='batch-mean' averages; use larger mini-batches or estimator='population'"
                )
            for index in range(layer.first + first, layer.first + last):
                self._reached(index)
            with self._lock, outside_of_transforms():
                if self._takes:
                    merged = merge(count.unsqueeze(-1), mean, m2, new_count.unsqueeze(-1), new_mean, new_m2)
                    mean.copy_(merged.mean)
                    m2.copy_(merged.m2)
                    count.add_(new_count)

        return record

    def _take_no_more(self) -> None:
        """A forward of another thread that has outlived the recording does not count."""
        with self._lock:
            self._takes = False


class _Layer(NamedTuple):
    name: str
    module: nn.Module
    first: int
    """The number of its first population."""
    number: int
    """How many it has."""


def _no_recorder(moments: Moments, population: int | None) -> None:
    """For modules that keep no population, and so have no Moments to hand over."""
