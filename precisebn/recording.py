"""Recording: while it lasts, BatchNorm layers normalize with batch statistics, and their moments are collected.

Each layer is put into eval mode, with scratch buffers in the place of its running statistics. A hook takes the moments
of the layer's input, once, and writes the batch's own mean and variance into the scratch buffers, from which the layer
then normalizes: the output is the one of training mode, for any subclass with any forward, while statistics are read
from memory once and the layer's own buffers are not touched at all. When the recording ends, however it ends,
everything is as it was before.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from precisebn import ops
from precisebn.errors import InputError, NonFiniteStatisticsError
from precisebn.estimator import EstimatorName, PopulationEstimator

__all__ = ["RecordedLayer", "Recording"]


class RecordedLayer(NamedTuple):
    """A layer under recording: its name, its module and own statistics, and its slot in its device's estimator."""

    name: str
    module: _BatchNorm
    running_mean: Tensor
    running_var: Tensor
    estimator: PopulationEstimator
    slot: int


class Recording(AbstractContextManager["Recording"]):
    """Records the named layers of a model, from ``with`` to its end.

    Args:
        model: the model; wrappers in it (DDP, DataParallel, torch.compile) stand aside for the duration, and all its
            buffers are as before afterwards.
        layers: what to record, by qualified name. Layers need running statistics and initialized parameters.
        kind: which statistics to estimate, see :class:`precisebn.estimator.PopulationEstimator`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, _BatchNorm], kind: EstimatorName) -> None:
        self.model = model
        self.kind = kind
        stats = {name: _running_stats(name, layer) for name, layer in layers.items()}
        by_device: dict[torch.device, list[str]] = {}
        for name, (mean, _) in stats.items():
            by_device.setdefault(mean.device, []).append(name)
        self.estimators: list[PopulationEstimator] = []
        place: dict[str, tuple[PopulationEstimator, int]] = {}
        for device, names in by_device.items():
            self.estimators.append(PopulationEstimator([stats[n][0].numel() for n in names], kind=kind, device=device))
            place.update((name, (self.estimators[-1], slot)) for slot, name in enumerate(names))
        self.layers = [RecordedLayer(name, layer, *stats[name], *place[name]) for name, layer in layers.items()]
        self._execution_order: dict[int, None] = {}
        self._undo = ExitStack()

    def __enter__(self) -> "Recording":
        with ExitStack() as stack:  # whatever fails from here on, what was changed so far is changed back
            stack.enter_context(torch.no_grad())
            stack.enter_context(_eager())
            stack.enter_context(_wrappers_aside(self.model))
            stack.enter_context(_buffers_kept(self.model))
            for index, layer in enumerate(self.layers):
                self._record(index, layer, stack)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    @property
    def num_levels(self) -> int:
        """The largest number of block sizes of any estimator."""
        return max((estimator.num_levels for estimator in self.estimators), default=0)

    def end_batch(self) -> None:
        """Close a mini-batch.

        Raises:
            NonFiniteStatisticsError: a layer on the CPU met NaN or Inf. (On other devices :meth:`check_finite` at the
                end tells the same: asking every time would make the host wait for the device.)
        """
        for estimator in self.estimators:
            estimator.end_batch()
        if any(estimator.population.buffer.device.type == "cpu" for estimator in self.estimators):
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
        scratch_mean, scratch_var = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)
        stack.callback(setattr, module, "training", module.training)
        module.training = False
        module._buffers["running_mean"], module._buffers["running_var"] = scratch_mean, scratch_var
        hook = self._hook(index, layer, scratch_mean, scratch_var)
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _hook(
        self, index: int, layer: RecordedLayer, batch_mean: Tensor, batch_var: Tensor
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        count, mean, m2 = layer.estimator.slot(layer.slot)
        num_channels, min_count = mean.numel(), 2 if self.kind == "batch-mean" else 0
        order, accumulate = self._execution_order, ops.accumulate

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != num_channels:
                got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise InputError(f"layer {layer.name!r} takes tensors (N, {num_channels}, *), got {got}")
            if 0 < x.numel() < min_count * num_channels:
                raise InputError(
                    f"layer {layer.name!r} got one value per channel, shape {tuple(x.shape)}: it has no unbiased "
                    "variance, which estimator='batch-mean' averages; use larger mini-batches or estimator='population'"
                )
            order.setdefault(index)
            accumulate(x, count, mean, m2, batch_mean, batch_var)

        return record


def _running_stats(name: str, layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise InputError(f"layer {name!r} keeps no running statistics, so there is nothing to record for it")
    return mean, var


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
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its place and its value back at the end.

    Recorded layers have scratch buffers in the place of theirs, and other layers keep state too: InstanceNorm, spectral
    norm, BatchNorm layers that were not chosen.
    """
    places = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    tensors = {t for _, buffers in places for t in buffers.values() if t is not None}
    values = [(t, t._version, t.clone()) for t in tensors if not t.is_inference()]  # inference tensors cannot change
    try:
        yield
    finally:
        for place, buffers in places:
            place.clear()
            place.update(buffers)
        for tensor, version, value in values:
            if tensor._version != version:
                tensor.copy_(value)
