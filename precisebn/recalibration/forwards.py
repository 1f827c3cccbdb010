"""Recorded forwards: what runs in the place of a layer's own forward.

While such a forward runs, and only then, the layer is in another mode; and scratch buffers are in the place of its
running statistics, where it does not hand over its Moments. Copies that are made meanwhile have the layer's own, and
nothing of the recording. Forwards of one layer by several threads come one after the other
(:class:`precisebn.models.stand_in.StandIn`).

A model may say itself, in its forward, that one of a layer's is not to move the running statistics: it puts a teacher
into eval mode, or pauses the tracking of a perturbed input. Such forwards do not count here either.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precisebn import ops
from precisebn._torch import is_batched, outside_of_transforms, unwrapped
from precisebn.errors import BatchFormatError, InputError
from precisebn.models.batch_norm_calls import BatchNormCalls
from precisebn.models.families import populations_of
from precisebn.models.stand_in import StandIn
from precisebn.nn.population import Recordable
from precisebn.ops.chan import merge
from precisebn.recalibration.prior import Mixture
from precisebn.statistics.moments import Moments

__all__ = ["INSIDE_VMAP", "DeclaredForward", "InputForward", "Slot", "UnknownForward"]

INSIDE_VMAP = (
    "runs inside torch.vmap, where it cannot be seen which values belong to one mini-batch; call the model without "
    "vmap: forward="
)


class Slot:
    """Where the Moments of one population of the mini-batch go, and what is to be known of its inputs.

    Args:
        name: of the layer, for messages.
        kind: the name of its class.
        moments: count ``(1,)``, mean and m2 ``(C,)``, float64, merged in place.
        averages: whether mini-batches' unbiased variances are averaged, which a single value has not.
        reached: called when something is merged.
    """

    __slots__ = ("count", "device", "fewest", "kind", "m2", "mean", "name", "num_channels", "reached")

    def __init__(
        self,
        name: str,
        kind: str,
        moments: tuple[Tensor, Tensor, Tensor],
        averages: bool,
        reached: Callable[[], object],
    ) -> None:
        self.name = name
        self.kind = kind
        self.count, self.mean, self.m2 = moments
        self.num_channels = self.mean.numel()
        self.device = self.mean.device
        self.fewest = 2 * self.num_channels if averages else 0
        self.reached = reached

    def merge(self, x: object, batch_mean: Tensor | None = None, batch_var: Tensor | None = None) -> None:
        """Merge the Moments of ``(N, C, *)``; write its own mean and variance, if asked for."""
        if not (
            isinstance(x, Tensor)
            and x.dim() > 1
            and x.shape[1] == self.num_channels
            and x.device == self.device
            and x.is_floating_point()
            and not 0 < x.numel() < self.fewest
            and not is_batched(x)
        ):
            raise self._refusal(x)
        self.reached()
        ops.accumulate(x, self.count, self.mean, self.m2, batch_mean, batch_var)

    def _refusal(self, x: object) -> InputError | BatchFormatError:
        layer = f"layer {self.name!r} ({self.kind})"
        wanted = f"(N, {self.num_channels}, *)"
        if not isinstance(x, Tensor):
            return BatchFormatError(f"layer {self.name!r} takes a tensor {wanted}, got {type(x).__name__}")
        if is_batched(x):
            return InputError(f"{layer} {INSIDE_VMAP}")
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            return InputError(
                f"{layer} takes tensors {wanted}, got shape {tuple(x.shape)}; check the mini-batch, or say how the "
                "model takes it: forward="
            )
        if x.device != self.device:
            return InputError(f"layer {self.name!r} is on {self.device}, but its input on {x.device}; pass device=")
        if not x.is_floating_point():
            return InputError(
                f"{layer} takes floating-point tensors, got {x.dtype}; convert the mini-batch, or say how the model "
                "takes it: forward="
            )
        return InputError(
            f"layer {self.name!r} got one value per channel, shape {tuple(x.shape)}: it has no unbiased variance, "
            "which estimator='batch-mean' averages; use larger mini-batches or estimator='population'"
        )


class _RecordedForward(StandIn):
    """Takes the place of the forward while a recording lasts; to be given ``record`` and ``pass_over``.

    Args:
        module: the layer.
        scratch: what lies in the place of some of its buffers meanwhile, by name.
        by_mode: whether it is recorded because it is in training mode, so that it is not while the model has put it
            into eval mode; it then normalizes by its own running statistics.
        aside: called when a forward does not count.
    """

    __slots__ = ("aside", "at_outset", "by_mode", "tracks")

    def __init__(
        self, module: nn.Module, scratch: Mapping[str, Tensor], by_mode: bool, aside: Callable[[], object]
    ) -> None:
        super().__init__(module, scratch)
        self.by_mode = by_mode
        self.aside = aside
        self.at_outset = _settings(vars(module))
        self.tracks = _tracks(vars(module))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Record a forward, unless the model has set the layer aside since the recording began."""
        attributes = vars(self.module)
        if _settings(attributes) != self.at_outset:
            if self.by_mode and not attributes["training"]:
                self.aside()
                return self._by_own_statistics(*args, **kwargs)
            if self.tracks and not _tracks(attributes):
                self.aside()
                return self.pass_over(args, kwargs)
        return self.record(args, kwargs)

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run, and take the Moments of what is normalized."""
        raise NotImplementedError

    def pass_over(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run as :meth:`record` does, by the statistics of the mini-batch, and take nothing."""
        raise NotImplementedError

    def _by_own_statistics(self, *args: Any, **kwargs: Any) -> Any:
        """Run as it would without a recording."""
        buffers, scratch = self.module._buffers, self.scratch
        aside = {name: scratch[name] for name in self.own if buffers.get(name) is scratch[name]}
        recorder = {key: value for key, value in vars(self.module).items() if key == "recorder"}
        try:
            buffers.update({name: self.own[name] for name in aside})
            for key in recorder:
                del vars(self.module)[key]
            return self.original(*args, **kwargs)
        finally:
            buffers.update(aside)
            vars(self.module).update(recorder)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Run in eval mode, by the statistics in the scratch buffers."""
        attributes, buffers = vars(self.module), self.module._buffers
        training, mean, var = attributes["training"], buffers.get("running_mean"), buffers.get("running_var")
        try:
            attributes["training"] = False
            # Where they are already, as a rule; torch.func.functional_call has put others in their place.
            buffers["running_mean"], buffers["running_var"] = self.scratch["running_mean"], self.scratch["running_var"]
            return self.original(*args, **kwargs)
        finally:
            attributes["training"] = training
            buffers["running_mean"], buffers["running_var"] = mean, var


class _MeasuredForward(_RecordedForward):
    """Of a layer that does not hand its Moments over.

    Attributes:
        slot: where Moments go.
        mixture: with what to mix the mini-batch's own statistics before the layer normalizes by them.
    """

    __slots__ = ("mixture", "slot")

    slot: Slot
    mixture: Mixture | None

    def pass_over(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        slot, mixture = (self.slot.count, self.slot.mean, self.slot.m2), self.mixture
        before = [part.clone() for part in slot]
        try:
            self.mixture = None
            return self.record(args, kwargs)
        finally:
            self.mixture = mixture
            for part, old in zip(slot, before, strict=True):
                part.copy_(old)


class InputForward(_MeasuredForward):
    """Of a layer that normalizes the very tensor that it is called with.

    One pass takes its Moments and writes the mini-batch's own mean and variance into scratch buffers, from which the
    layer, in eval mode for this call, then normalizes: what comes out is the output of training mode. They start as
    copies of its own, and stay until the next mini-batch: modules such as torch.ao's ConvBn2d read them before.

    Args:
        module: the layer.
        slot: where Moments go.
        scratch: copies of its running mean and variance.
        by_mode: see :class:`_RecordedForward`, as is the next one.
        aside: called when a forward does not count.
        mixture: with what to mix the mini-batch's own statistics before the layer normalizes by them.
    """

    __slots__ = ("may_overflow", "mean", "var")

    def __init__(
        self,
        module: nn.Module,
        slot: Slot,
        scratch: Mapping[str, Tensor],
        by_mode: bool,
        aside: Callable[[], object],
        mixture: Mixture | None,
    ) -> None:
        super().__init__(module, scratch, by_mode, aside)
        self.slot = slot
        self.mixture = mixture
        self.mean, self.var = scratch["running_mean"], scratch["running_var"]
        self.may_overflow = self.var.dtype == torch.float16

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        self.slot.merge(x, self.mean, self.var)
        if self.may_overflow:  # the layer would divide by Inf and hand zeros on: as bad as Inf in its input
            self.slot.m2.masked_fill_(self.var.isinf(), float("inf"))
        if self.mixture is not None and x.numel():
            _mix(self.mixture, x.numel() / self.slot.num_channels, self.mean, self.var)
        return self._evaluate(*args, **kwargs)


class UnknownForward(_MeasuredForward):
    """Of a subclass with a forward of its own, which may normalize part of its input, or something else altogether.

    It runs in training mode on scratch buffers. What it hands to ``batch_norm`` together with them is what it
    normalizes, and the Moments of that are exact. A forward that calls no such function, and works its statistics out
    by hand, has to show what they are of: of the tensors that it may have normalized, one has the very mean and
    variance that it left in the scratch buffers (with a momentum of 1, so as they are). Else nothing is known of it,
    and it is left alone: a number that might not be so would be worse than none.

    Args:
        module: the layer.
        slot: where Moments go.
        scratch: copies of its running mean, variance and number of mini-batches.
        by_mode: see :class:`_RecordedForward`, as is the next one.
        aside: called when a forward does not count.
        refuse: called with the reason if nothing is known of what it normalizes.
        mixture: with what to mix the statistics that it normalizes by. It then runs a second time, in eval mode.
    """

    __slots__ = ("refuse",)

    def __init__(
        self,
        module: nn.Module,
        slot: Slot,
        scratch: Mapping[str, Tensor],
        by_mode: bool,
        aside: Callable[[], object],
        refuse: Callable[[int], None],
        mixture: Mixture | None,
    ) -> None:
        super().__init__(module, scratch, by_mode, aside)
        self.slot = slot
        self.refuse = refuse
        self.mixture = mixture

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.mixture is None:
            return self._measure(*args, **kwargs)
        slot = (self.slot.count, self.slot.mean, self.slot.m2)
        old_count, old_mean, old_m2 = (part.clone() for part in slot)
        for part in slot:
            part.zero_()
        output = self._measure(*args, **kwargs)
        count, mean, m2 = (part.clone() for part in slot)
        for part, merged in zip(slot[1:], merge(old_count, old_mean, old_m2, count, mean, m2), strict=True):
            part.copy_(merged)
        self.slot.count.add_(old_count)
        if not count.item():
            return output
        scratch = self.scratch["running_mean"], self.scratch["running_var"]
        for buffer, own in zip(scratch, (mean, m2 / count), strict=True):
            buffer.copy_(own)
        _mix(self.mixture, count.item(), *scratch)
        return self._evaluate(*args, **kwargs)

    def _measure(self, *args: Any, **kwargs: Any) -> Any:
        """Run in training mode, and merge what is normalized."""
        for name, buffer in self.scratch.items():
            # What it would find in training, but for NaN, of which a momentum of 1 leaves 0 * NaN.
            buffer.copy_(self.own[name])
            if buffer.is_floating_point():
                buffer.nan_to_num_()
        before = self.scratch["running_mean"].clone(), self.scratch["running_var"].clone()
        watch = BatchNormCalls(self.scratch["running_mean"], self.slot.merge)
        attributes, buffers = vars(self.module), self.module._buffers
        measuring = {"training": True, "momentum": 1.0, "track_running_stats": True}
        aside = {key: attributes[key] for key in measuring if key in attributes}  # a subclass may compute its momentum
        try:
            attributes.update(measuring)
            buffers.update(self.scratch)
            output = watch.of(self.original, *args, **kwargs)
            # Some layers write into their buffers, some put new tensors in their place, some do neither.
            written = buffers.get("running_mean"), buffers.get("running_var")
        finally:
            attributes.update(aside)
            for key in measuring.keys() - aside.keys():
                del attributes[key]
            buffers.update(self.scratch)
        if not watch.seen_own:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self._judge(before, written, [*watch.others, *tensors[:1]])
        return output

    def _judge(
        self, before: tuple[Tensor, Tensor], written: tuple[Tensor | None, Tensor | None], candidates: list[Tensor]
    ) -> None:
        """Merge the one tensor whose statistics were written; refuse the layer if there is none."""
        mean, var = written
        if any(x.numel() == 0 for x in candidates):
            return  # an empty mini-batch counts for nothing
        if mean is None or var is None or (torch.equal(mean, before[0]) and torch.equal(var, before[1])):
            self.refuse(WRITES_NOTHING)
            return
        for x in candidates:
            if _statistics_are_of(x, mean, var):
                self.slot.merge(x)
                return
        if not (mean.isfinite().all() and var.isfinite().all()) and candidates:
            self.slot.merge(candidates[-1])  # NaN has no statistics to recognize it by; to be reported as what it is
            return
        self.refuse(NOT_UNDERSTOOD)


class DeclaredForward(_RecordedForward):
    """Of a layer that hands its Moments over.

    Where a prior is to be mixed in, it is measured first, and runs in eval mode then. The first run says which Moments
    are of which population; its output is dropped. The second normalizes by the mixtures, which lie in the layer's own
    running statistics: the recording puts those back.

    Args:
        module: the layer, under recording.
        by_mode: see :class:`_RecordedForward`, as is the next one.
        aside: called when a forward does not count.
        mixture: with what to mix.
    """

    __slots__ = ("mixture",)

    def __init__(
        self, module: Recordable, by_mode: bool, aside: Callable[[], object], mixture: Mixture | None = None
    ) -> None:
        super().__init__(module, {}, by_mode, aside)
        self.mixture = mixture

    def pass_over(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        attributes = vars(self.module)
        recorder = attributes["recorder"]
        try:
            attributes["recorder"] = _take_nothing
            return self.original(*args, **kwargs)
        finally:
            attributes["recorder"] = recorder

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.mixture is None:
            return self.original(*args, **kwargs)
        return self._record_mixed(self.mixture, *args, **kwargs)

    def _record_mixed(self, mixture: Mixture, *args: Any, **kwargs: Any) -> Any:
        attributes = vars(self.module)
        recorder, training = attributes["recorder"], attributes["training"]
        populations = populations_of(self.module)
        with outside_of_transforms():
            mean = torch.stack([torch.zeros_like(one.mean, dtype=torch.float64) for one in populations])
            own = Moments(mean.new_zeros(len(populations)), mean, torch.zeros_like(mean))

        def note(moments: Moments, population: int | None) -> None:
            nonlocal own
            moments = Moments(moments.count, moments.mean.detach(), moments.m2.detach())
            recorder(moments, population)
            plain = Moments(unwrapped(moments.count), unwrapped(moments.mean), unwrapped(moments.m2))
            with outside_of_transforms():
                own = own + _spread_out(plain, population, own)

        try:
            attributes["recorder"] = note
            output = self.original(*args, **kwargs)
            counts = own.count.tolist()
            if not any(counts):
                return output
            with outside_of_transforms():
                mixed = mixture.of(counts, own.mean, own.m2 / own.count.clamp(min=1.0).unsqueeze(-1))
                for one, one_mean, one_var in zip(populations, *mixed, strict=True):
                    one.mean.copy_(one_mean)
                    one.var.copy_(one_var)
            del attributes["recorder"]
            attributes["training"] = False
            return self.original(*args, **kwargs)
        finally:
            attributes.update(recorder=recorder, training=training)


def _settings(attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """What says whether a forward of a layer counts."""
    return attributes["training"], attributes.get("track_running_stats"), attributes.get("momentum")


def _tracks(attributes: Mapping[str, Any]) -> bool:
    """Whether a forward in training mode moves the running statistics of a layer, by its attributes."""
    return bool(attributes.get("track_running_stats", True) and attributes.get("momentum") != 0)


def _take_nothing(moments: Moments, population: int | None) -> None:
    """A recorder of what is not to count."""


def _spread_out(moments: Moments, population: int | None, like: Moments) -> Moments:
    """Moments of one population, or of all of them, as rows of all."""
    if population is None:
        return Moments(moments.count.reshape(-1), moments.mean.view_as(like.mean), moments.m2.view_as(like.m2))
    rows = Moments(torch.zeros_like(like.count), torch.zeros_like(like.mean), torch.zeros_like(like.m2))
    for row, own in ((rows.count, moments.count), (rows.mean, moments.mean), (rows.m2, moments.m2)):
        row[population] = own
    return rows


def _mix(mixture: Mixture, count: float, mean: Tensor, var: Tensor) -> None:
    """Replace the statistics ``(C,)`` of a layer's one population by their mixture, in place."""
    with outside_of_transforms():  # torch.func lets nobody write into tensors from outside of it
        (mixed_mean,), (mixed_var,) = mixture.of([count], mean.unsqueeze(0), var.unsqueeze(0))
        mean.copy_(mixed_mean)
        var.copy_(mixed_var)


WRITES_NOTHING, NOT_UNDERSTOOD = 1, 2
REASONS: Mapping[int, str] = {
    WRITES_NOTHING: "a forward of its own, which writes no running statistics in training mode",
    NOT_UNDERSTOOD: "a forward of its own, of which it is not known what it normalizes",
}


def _statistics_are_of(x: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether a mean and a variance, worked out by hand in float32 or better, are those of ``(N, C, *)``.

    The bound is that of ``E[x^2] - E[x]^2`` from sums that are right to some tens of units in the last place, and of
    one rounding to the dtype of the buffers. It does not matter whether the variance is the unbiased one.
    """
    if x.dim() < 2 or x.shape[1] != mean.numel() or x.device != mean.device or not x.is_floating_point():
        return False
    moments = Moments.of(x)
    n = float(moments.count)
    variance = moments.m2 / n
    bound = 64 * torch.finfo(torch.float32).eps + torch.finfo(mean.dtype).eps
    square = variance + moments.mean.square()
    same_mean = (mean.double() - moments.mean).abs() <= bound * square.sqrt()
    unbiased = variance * (n / max(n - 1, 1))
    same_var = ((var.double() - variance).abs() <= bound * square) | ((var.double() - unbiased).abs() <= bound * square)
    return bool((same_mean & same_var).all())
