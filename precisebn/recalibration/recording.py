"""Recording: while it lasts, BatchNorm layers normalize with batch statistics, and their moments are collected.

Each layer is put into eval mode, with scratch buffers in the place of its running statistics. A hook takes the moments
of the layer's input, once, and writes the batch's own mean and variance into the scratch buffers, from which the layer
then normalizes: the output is the one of training mode, while statistics are read from memory once and the layer's own
buffers are not touched at all. When the recording ends, however it ends, everything is as it was before.

The modules of :mod:`precisebn.nn` work out Moments themselves, and know best of what: they run in training mode and
hand their Moments over. One with several populations has a slot for each.

A subclass with a forward of its own may normalize something else than its input: part of it, another shape of it, or
all ranks' together. Such a layer runs in training mode, and with momentum 1 leaves its batch statistics, rounded to its
dtype, in the scratch buffers (which is how fvcore does it for all layers).
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from precisebn import ops
from precisebn.errors import BatchFormatError, CycleError, InputError, NonFiniteStatisticsError
from precisebn.models.families import normalizes_its_input
from precisebn.models.selection import named_modules
from precisebn.nn.cycle import CycleBatchNormList
from precisebn.nn.population import PopulationNorm, Recorder
from precisebn.ops.chan import merge
from precisebn.statistics.estimator import EstimatorName, PopulationEstimator
from precisebn.statistics.moments import Moments

__all__ = ["RecordedLayer", "Recording", "buffers_kept"]


class RecordedLayer(NamedTuple):
    """A population under recording: its layer and own statistics, and its slot in its device's estimator.

    The name is the layer's; with a number, ``head.bn[2]``, where the layer has several populations.
    """

    name: str
    module: _NormBase
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None
    estimator: PopulationEstimator
    slot: int


class Recording(AbstractContextManager["Recording"]):
    """Records the named layers of a model, from ``with`` to its end.

    Args:
        model: the model; wrappers in it (DDP, DataParallel, torch.compile) stand aside for the duration, and all its
            buffers are as before afterwards.
        layers: what to record, by qualified name. Layers need running statistics and initialized parameters.
        kind: which statistics to estimate, see :class:`precisebn.statistics.estimator.PopulationEstimator`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, _NormBase], kind: EstimatorName) -> None:
        self.model = model
        self.kind = kind
        populations = {name: list(_populations(name, layer)) for name, layer in layers.items()}
        by_device: dict[torch.device, list[str]] = {}
        for name, slots in populations.items():
            by_device.setdefault(slots[0].running_mean.device, []).append(name)
        self.estimators: list[PopulationEstimator] = []
        place: dict[str, tuple[PopulationEstimator, int]] = {}
        for device, names in by_device.items():
            sizes = [population.running_mean.numel() for name in names for population in populations[name]]
            self.estimators.append(PopulationEstimator(sizes, kind=kind, device=device))
            first = 0
            for name in names:
                place[name] = self.estimators[-1], first
                first += len(populations[name])
        self.layers = [
            RecordedLayer(*population, place[name][0], place[name][1] + k)
            for name, slots in populations.items()
            for k, population in enumerate(slots)
        ]
        self._written: set[str] = set()
        self._execution_order: dict[int, None] = {}
        self._cycles = {name: m for name, m in named_modules(model) if isinstance(m, CycleBatchNormList)}
        self._undo = ExitStack()

    def __enter__(self) -> "Recording":
        with ExitStack() as stack:  # whatever fails from here on, what was changed so far is changed back
            stack.enter_context(torch.no_grad())
            stack.enter_context(_eager())
            stack.enter_context(_wrappers_aside(self.model))
            stack.enter_context(buffers_kept(self.model))
            for cycle in self._cycles.values():
                for attribute in ("_pos", "_left_at"):
                    stack.callback(setattr, cycle, attribute, getattr(cycle, attribute))
                cycle.reset()  # a forward that was interrupted may have left a cycle unfinished
            for index, layer in enumerate(self.layers):
                if not isinstance(layer.module, PopulationNorm):
                    self._record(index, layer, stack)
                elif index == 0 or self.layers[index - 1].module is not layer.module:
                    self._record_moments(index, layer.module, stack)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, traceback)

    def writes_statistics(self, layer: RecordedLayer) -> bool:
        """False for a layer whose own forward was never seen to write running statistics: nothing is known of it."""
        known = isinstance(layer.module, PopulationNorm) or normalizes_its_input(layer.module)
        return known or layer.name in self._written

    @property
    def num_levels(self) -> int:
        """The largest number of block sizes of any estimator."""
        return max((estimator.num_levels for estimator in self.estimators), default=0)

    def end_batch(self) -> None:
        """Close a mini-batch.

        Raises:
            CycleError: a CycleBatchNormList was not called on every domain.
            NonFiniteStatisticsError: a layer on the CPU met NaN or Inf. (On other devices :meth:`check_finite` at the
                end tells the same: asking every time would make the host wait for the device.)
        """
        for name, cycle in self._cycles.items():
            if cycle._pos:
                raise CycleError(
                    f"layer {name!r} (CycleBatchNormList({cycle.length})) was left after {cycle._pos} of "
                    f"{cycle.length} calls in a mini-batch; call it on every domain, in order"
                )
        on_cpu = [estimator for estimator in self.estimators if estimator.device.type == "cpu"]
        finite = all(estimator.current_is_finite() for estimator in on_cpu)
        for estimator in self.estimators:
            estimator.end_batch()
        if not finite:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise if any layer has met NaN or Inf, naming the first layer, as the model runs, of the first mini-batch."""
        if not any(bool((estimator.first_nonfinite >= 0).any()) for estimator in self.estimators):
            return
        firsts: dict[int, int] = {}
        for index in self._execution_order:
            layer = self.layers[index]
            first = layer.estimator.first_nonfinite.split(layer.estimator.num_channels)[layer.slot]
            if bool((first >= 0).any()):
                firsts[index] = int(first[first >= 0].min())
        iteration = min(firsts.values())
        layer = self.layers[next(index for index, first in firsts.items() if first == iteration)]
        raise NonFiniteStatisticsError(
            f"the input of layer {layer.name!r} ({type(layer.module).__name__}) held NaN or Inf, or values whose "
            f"variance overflows, in mini-batch {iteration} (counted from 0); the model is as it was. Check that "
            "mini-batch and the layers before this one; half precision may need autocast to bfloat16"
        )

    def _record(self, index: int, layer: RecordedLayer, stack: ExitStack) -> None:
        """Put one layer under recording, and on ``stack`` what puts it back."""
        module = layer.module
        # They start as the layer's own: modules such as torch.ao's ConvBn2d read them before the layer runs.
        scratch_mean, scratch_var = layer.running_mean.clone(), layer.running_var.clone()
        stack.callback(setattr, module, "training", module.training)
        module._buffers["running_mean"], module._buffers["running_var"] = scratch_mean, scratch_var
        if normalizes_its_input(module):
            module.training = False
            hook = self._hook(index, layer, scratch_mean, scratch_var)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        else:
            stack.callback(setattr, module, "momentum", module.momentum)
            module.training, module.momentum = True, 1.0
            before, after = self._hooks_around(index, layer, scratch_mean, scratch_var)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def _record_moments(self, index: int, module: PopulationNorm, stack: ExitStack) -> None:
        """The same for a layer that hands over its Moments, whose populations are those from ``index`` on."""
        stack.callback(setattr, module, "training", module.training)
        module.training = True
        module._recorder = self._recorder(index, module)
        stack.callback(delattr, module, "_recorder")

    def _recorder(self, index: int, module: PopulationNorm) -> Recorder:
        layer, num_slots = self.layers[index], module.num_slots or 1
        counts, means, m2s = layer.estimator.slots(layer.slot, num_slots)
        order, averaging = self._execution_order, self.kind == "batch-mean"

        def record(moments: Moments, slot: int | None) -> None:
            first, last = (0, num_slots) if slot is None else (slot, slot + 1)
            count, mean, m2 = counts[first:last], means[first:last], m2s[first:last]
            new_count, new_mean, new_m2 = moments.count.reshape(-1), moments.mean.view_as(mean), moments.m2.view_as(m2)
            # A single population of one value was refused by the layer itself; looking would make the host wait.
            if averaging and last - first > 1 and bool((new_count == 1).any()):
                raise InputError(
                    f"layer {layer.name!r} got one value per channel of a domain: it has no unbiased variance, which "
                    "estimator='batch-mean' averages; use larger mini-batches or estimator='population'"
                )
            for k in range(first, last):
                order.setdefault(index + k)
            merged = merge(count.unsqueeze(-1), mean, m2, new_count.unsqueeze(-1), new_mean, new_m2)
            mean.copy_(merged.mean)
            m2.copy_(merged.m2)
            count.add_(new_count)

        return record

    def _hook(
        self, index: int, layer: RecordedLayer, batch_mean: Tensor, batch_var: Tensor
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        count, mean, m2 = layer.estimator.slot(layer.slot)
        num_channels, min_count = mean.numel(), 2 if self.kind == "batch-mean" else 0
        order, accumulate = self._execution_order, ops.accumulate
        may_overflow = batch_var.dtype == torch.float16

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                raise BatchFormatError(
                    f"layer {layer.name!r} takes a tensor (N, {num_channels}, *), got {type(x).__name__}"
                )
            if x.dim() < 2 or x.shape[1] != num_channels:
                raise InputError(
                    f"layer {layer.name!r} ({type(module).__name__}) takes tensors (N, {num_channels}, *), got shape "
                    f"{tuple(x.shape)}; check the mini-batch, or say how the model takes it: forward="
                )
            if x.device != mean.device:
                raise InputError(f"layer {layer.name!r} is on {mean.device}, but its input on {x.device}; pass device=")
            if not x.is_floating_point():
                raise InputError(
                    f"layer {layer.name!r} ({type(module).__name__}) takes floating-point tensors, got {x.dtype}; "
                    "convert the mini-batch, or say how the model takes it: forward="
                )
            if 0 < x.numel() < min_count * num_channels:
                raise InputError(
                    f"layer {layer.name!r} got one value per channel, shape {tuple(x.shape)}: it has no unbiased "
                    "variance, which estimator='batch-mean' averages; use larger mini-batches or estimator='population'"
                )
            order.setdefault(index)
            accumulate(x, count, mean, m2, batch_mean, batch_var)
            if may_overflow:  # the layer would divide by Inf and hand zeros on: as bad as Inf in its input
                m2.masked_fill_(batch_var.isinf(), float("inf"))

        return record

    def _hooks_around(
        self, index: int, layer: RecordedLayer, batch_mean: Tensor, batch_var: Tensor
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """What runs before and after a layer whose own forward writes the statistics of the batch."""
        count, mean, m2 = layer.estimator.slot(layer.slot)
        num_channels = mean.numel()

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            # What it would find in training, but for NaN, of which a momentum of 1 leaves 0 * NaN.
            batch_mean.copy_(layer.running_mean).nan_to_num_()
            batch_var.copy_(layer.running_var).nan_to_num_()
            module._buffers["running_mean"], module._buffers["running_var"] = batch_mean, batch_var

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            n = 0 if x is None else x.numel() // num_channels
            # Some layers write into their buffers, some put new tensors in their place, some do neither.
            new_mean, new_var = module._buffers["running_mean"], module._buffers["running_var"]
            if n == 0 or new_mean is None or new_var is None:
                return
            if layer.name not in self._written and not (
                torch.equal(new_mean, layer.running_mean.nan_to_num())
                and torch.equal(new_var, layer.running_var.nan_to_num())
            ):
                self._written.add(layer.name)
            self._execution_order.setdefault(index)
            num_values = count.new_full((1,), n)
            merged = merge(count, mean, m2, num_values, new_mean.double(), new_var.double() * (n - 1))
            mean.copy_(merged.mean)
            m2.copy_(merged.m2)
            count.add_(num_values)

        return before, after


class _Population(NamedTuple):
    """The first fields of a RecordedLayer: what is known before there are estimators."""

    name: str
    module: _NormBase
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None


def _populations(name: str, layer: _NormBase) -> Iterator[_Population]:
    mean, var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None:
        raise InputError(f"layer {name!r} keeps no running statistics, so there is nothing to record for it")
    if mean.dim() == 1:
        yield _Population(name, layer, mean, var, tracked)
        return
    for k in range(len(mean)):
        yield _Population(f"{name}[{k}]", layer, mean[k], var[k], None if tracked is None else tracked[k])


def _eager() -> AbstractContextManager[Any]:
    """Run torch.compile'd code eagerly, where hooks are seen, and leave its compiled form in place for later.

    Nothing can have been compiled before torch._dynamo is imported, and importing it takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return ExitStack()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _wrappers_aside(model: nn.Module) -> Iterator[None]:
    """Keep data-parallel wrappers from touching buffers.

    DDP would broadcast rank 0's over everyone's scratch buffers at every forward, and hang where ranks have different
    numbers of mini-batches; DataParallel would run replicas, whose buffers are copies.
    """
    ddp = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    dp = [m for m in model.modules() if isinstance(m, DataParallel)]
    sync_flags = [m.require_forward_param_sync for m in ddp]
    device_ids = [m.device_ids for m in dp]
    try:
        for wrapper in ddp:
            wrapper.require_forward_param_sync = False
        for parallel in dp:
            parallel.device_ids = []
        yield
    finally:
        for wrapper, flag in zip(ddp, sync_flags, strict=True):
            wrapper.require_forward_param_sync = flag
        for parallel, ids in zip(dp, device_ids, strict=True):
            parallel.device_ids = ids


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its place and its value back at the end.

    Recorded layers have scratch buffers in the place of theirs, and other layers keep state too: InstanceNorm, spectral
    norm, BatchNorm layers that were not chosen. A buffer that a forward has registered stays if all went well, like the
    attributes that go with it, and goes if not.
    """
    places = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    tensors = {t for _, buffers in places for t in buffers.values() if t is not None}
    values = [(t, t._version, t.clone()) for t in tensors if _can_be_kept(t)]
    failed = True
    try:
        yield
        failed = False
    finally:
        for place, buffers in places:
            registered = {} if failed else {k: v for k, v in place.items() if buffers.get(k) is None}
            place.clear()
            place.update(buffers | registered)
        # First those that are known to have changed: that takes no memory, of which there may be none left.
        for tensor, version, value in values:
            if tensor._version != version:
                if tensor.shape != value.shape:  # torch.ao's observers resize theirs
                    tensor.resize_(value.shape)
                tensor.copy_(value)
        for tensor, version, value in values:  # .data changes without a new version
            if tensor._version == version and tensor.device.type == "cpu" and not torch.equal(tensor, value):
                tensor.copy_(value)


def _can_be_kept(tensor: Tensor) -> bool:
    """Inference tensors cannot change, uninitialized and meta ones have nothing to keep; sparse ones are constants."""
    return not (is_lazy(tensor) or tensor.is_inference() or tensor.is_meta or tensor.layout != torch.strided)
