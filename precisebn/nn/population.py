"""What modules share that take the Moments of their input: parameters, populations, and their update.

A population is one set of running statistics. Most modules keep one, in buffers of nn.BatchNorm's shape; a module with
one for each of K domains has buffers with one dimension more. A module works out the Moments of what it
normalizes and hands them to :meth:`PopulationNorm.track`, the one place where running statistics are updated; a
recalibration (:mod:`precisebn.recalibration.recording`) takes them there, exactly as they are, instead.

:class:`Recordable` is all that the rest of the library asks of such a module: which populations it keeps, to whom it
hands Moments while a recording lasts, and what ends a mini-batch. Nobody asks a module what class it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from precisebn import ops
from precisebn._torch import in_backward, is_batched, is_tracing
from precisebn.errors import InputError
from precisebn.functional import batch_norm, frozen_batch_norm, portable
from precisebn.functional._batch_norm import Running, batch_norm_and_track, tracks_in_one_call
from precisebn.nn.norm import TO_PLAIN, Norm
from precisebn.statistics.moments import Moments

__all__ = [
    "ACCUMULATOR",
    "PopulationNorm",
    "Recordable",
    "Recorder",
    "RunningStatistics",
    "STATISTICS",
    "update_running_statistics",
]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of buffers that are running statistics, in torch and wherever its conventions are followed."""

ACCUMULATOR = "_precisebn_accumulator"
"""The attribute of a layer that holds a Recorder, who takes the Moments that would update its running statistics.

Unlike a recording this changes nothing else: modes count, and repetitions by activation checkpointing do not.
"""

Recorder = Callable[[Moments, int | None], None]
"""Takes the Moments ``(C,)`` of one population, by its index, or ``(K, C)`` of all of them (None)."""


@dataclass(frozen=True, slots=True, eq=False)
class RunningStatistics:
    """One population of a layer: the buffers that keep it, or views of them, for writing to in place.

    Attributes:
        mean: running mean, ``(C,)``.
        var: running variance, ``(C,)``.
        num_batches: mini-batches tracked, ``()``; None where the layer does not count them.
        eps: what the layer adds to the variance.
        index: which population of the layer it is; None where it can have only one.
    """

    mean: Tensor
    var: Tensor
    num_batches: Tensor | None
    eps: float
    index: int | None = None

    def named(self, layer: str) -> str:
        """What to call it: the name of its layer; of one of several, with its index, ``head.bn[2]``."""
        return layer if self.index is None else f"{layer}[{self.index}]"


class Recordable(nn.Module):
    """What a module declares that keeps populations or state of a mini-batch.

    A recalibration calls :meth:`start_recording`, runs the model on mini-batches, calls :meth:`end_batch` after each,
    and :meth:`stop_recording` in the end, however it ends; then it writes into :meth:`populations`. In between, while
    :attr:`recorder` is there, the module normalizes with batch statistics whatever its mode, leaves its running
    statistics alone, and hands the Moments of whatever it normalizes to the recorder. Copies are not recorded.

    Example:
        >>> class Centered(Recordable):
        ...     "Subtracts the mean: of the mini-batch in training, else of the population."
        ...
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.zeros(channels))
        ...         self.register_buffer("var", torch.ones(channels))
        ...
        ...     def populations(self):
        ...         return [RunningStatistics(self.mean, self.var, None, eps=0.0)]
        ...
        ...     def forward(self, x):
        ...         moments = Moments.of(x)
        ...         if self.recorder is not None:
        ...             self.recorder(moments, None)
        ...         return x - (moments.mean if self.training or self.recorder else self.mean)
        >>> import precisebn
        >>> model = torch.nn.Sequential(Centered(1))
        >>> report = precisebn.update_bn_stats(model, [torch.tensor([[1.0], [3.0]])], num_iters=1)
        >>> model[0].mean, model[0].var
        (tensor([2.]), tensor([1.]))
    """

    # On the instance while a recording lasts; of the class otherwise, so that no state is left behind.
    recorder: Recorder | None = None
    """Who takes Moments now, if anyone."""

    _precisebn_accumulator: Recorder | None = None  # likewise, see ACCUMULATOR

    def populations(self) -> Sequence[RunningStatistics]:
        """The populations that it keeps, in order, all with the same number of channels; none by default."""
        return ()

    def members(self) -> Sequence[torch.nn.Module]:
        """Layers inside of it that keep its populations, one for each domain; none where it keeps them itself."""
        return ()

    def tracks(self, member: torch.nn.Module) -> bool:
        """Whether it updates the running statistics of a member itself, rather than by the member's own forward."""
        return False

    def start_recording(self, recorder: Recorder) -> None:
        """From now on Moments go to the recorder; what belongs to a mini-batch under way is set aside."""
        self.recorder = recorder

    def stop_recording(self) -> None:
        """Go on as before :meth:`start_recording`; does no harm if that never came, or was interrupted."""
        vars(self).pop("recorder", None)

    def end_batch(self, name: str) -> None:
        """A mini-batch of a recording has ended.

        Args:
            name: what to call the module in a message.

        Raises:
            PreciseBNError: it has left something half done.
        """

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: all but who takes its Moments."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("recorder", None)
        state.pop(ACCUMULATOR, None)
        return state


class PopulationNorm(Recordable, Norm):
    """Base of modules that normalize with batch statistics and keep population statistics.

    Its constructor is :class:`Norm`'s; without ``track_running_stats`` batch statistics are always used.
    """

    def _repeat(self, *, populations: int | None, affines: int | None) -> None:
        """For constructors: make running statistics ``(populations, C)``, and weight and bias ``(affines, C)``.

        With None they stay ``(C,)``.
        """
        for owned, times in ((self._buffers, populations), (self._parameters, affines)):
            for name, value in owned.items():
                if times is None or value is None:
                    continue
                repeated = value.detach().expand(times, *value.shape).clone()
                setattr(self, name, torch.nn.Parameter(repeated) if owned is self._parameters else repeated)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward normalizes with the statistics of its input, rather than with those of the population."""
        return self.training or self.running_mean is None or self.recorder is not None

    def populations(self) -> Sequence[RunningStatistics]:
        """One for each row of the buffers, or the only one."""
        mean, var, batches = map(self._buffers.get, STATISTICS)
        if mean is None or var is None:
            return ()
        if mean.dim() == 1:
            return (RunningStatistics(mean, var, batches, self.eps),)
        counts = [None] * len(mean) if batches is None else batches.unbind()
        return [
            RunningStatistics(*buffers, self.eps, index)
            for index, buffers in enumerate(zip(mean.unbind(), var.unbind(), counts, strict=True))
        ]

    def frozen(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        group: Tensor | None = None,
        population: int | None = None,
    ) -> Tensor:
        """Normalize by the running statistics, of one population or of that of each sample's group."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None  # the caller has asked uses_batch_statistics
        if population is not None:
            mean, var = portable.row(x, mean, population), portable.row(x, var, population)
        if isinstance(x, Proxy):
            if group is not None:
                raise InputError(
                    f"{self._shown()}: torch.fx cannot trace a call with a domain for each sample; {TO_PLAIN}"
                )
            return portable.frozen_batch_norm(x, mean, var, weight, bias, self.eps)
        return frozen_batch_norm(x, mean, var, weight, bias, eps=self.eps, group=group)

    def check(self, x: object) -> Tensor:
        """Return ``x``, which must be a tensor ``(N, C, *)``.

        Raises:
            InputError: it is not; or torch.fx traces a layer that takes batch statistics.
        """
        if isinstance(x, Proxy):  # stands for a tensor, in torch.fx
            if self.uses_batch_statistics:
                raise InputError(
                    f"{self._shown()}: torch.fx cannot trace what takes the statistics of its input; call eval() "
                    f"before, or {TO_PLAIN}"
                )
            return cast(Tensor, x)
        if not isinstance(x, Tensor):
            raise InputError(f"{self._shown()} takes tensors (N, {self.num_features}, *), got {type(x).__name__}")
        if x.dim() < 2 or (not is_tracing() and x.shape[1] != self.num_features):  # whose graph is of any shape
            raise InputError(
                f"{self._shown()} takes tensors (N, {self.num_features}, *), got shape {tuple(x.shape)}; build it with "
                "num_features= the number of channels, and put channels second"
            )
        return x

    def track(self, moments: Moments, population: int | None = None) -> None:
        """Update the running statistics from the Moments of a mini-batch; in training only.

        Not while a backward runs: a forward in there is a repetition by activation checkpointing, and its mini-batch
        has been counted.

        Args:
            moments: of one population ``(C,)``, or of all ``(K, C)``.
            population: its index, where there are several and the Moments are of one.
        """
        recorder, accumulator = self.recorder, self._precisebn_accumulator  # which another thread may take away
        if recorder is not None:
            recorder(moments, population)
            return
        running = self._running(population)
        if running is None:
            return
        if accumulator is not None:
            accumulator(moments, population)
            return
        update_running_statistics(self._shown(), moments, *running)

    def normalize_and_track(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, population: int | None = None
    ) -> Tensor:
        """Normalize ``(N, C, *)`` by its own statistics, and :meth:`track` these, in one call where that can be.

        Args:
            x: checked.
            weight: ``(C,)``; None is 1.
            bias: ``(C,)``; None is 0.
            population: as in :meth:`track`.
        """
        if tracks_in_one_call() and not self._moments_are_wanted():
            running = self._running(population)
            if running is not None and running.num_batches.dtype == torch.int64:
                return batch_norm_and_track(x, weight, bias, eps=self.eps, running=running)
        y, moments = batch_norm(x, weight, bias, eps=self.eps)
        self.track(moments, population)
        return y

    def _moments_are_wanted(self) -> bool:
        """By anybody but the running statistics: a recording, or a class that overrides ``track``."""
        overridden = type(self).track is not PopulationNorm.track
        return overridden or self.recorder is not None or self._precisebn_accumulator is not None

    def _running(self, population: int | None) -> Running | None:
        """What a mini-batch moves, if it moves anything now."""
        # Not as attributes, which nn.Module looks for in vain at first, and slowly.
        mean, var, batches = map(self._buffers.get, STATISTICS)
        updates = self.training and self.track_running_stats and not in_backward()
        if not updates or mean is None or var is None:
            return None
        momentum = self.momentum
        if batches is None:  # taken out by the user: as torch's, then, which counts nothing, and moves all the same
            batches = mean.new_zeros(mean.shape[:-1], dtype=torch.int64)
            momentum = 0.0 if momentum is None else momentum  # the average over nobody knows how many
        if population is not None:
            mean, var, batches = mean[population], var[population], batches[population]
        return Running(mean, var, batches, momentum)

    def _shown(self) -> str:
        return f"{type(self).__name__}({self.num_features})"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let a checkpoint with one set of statistics, or of weights, fill all populations, and all affines."""
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value = state_dict.get(prefix + name)
            single = () if name == "num_batches_tracked" else (self.num_features,)
            if own is not None and isinstance(value, Tensor) and own.shape[1:] == single == value.shape:
                state_dict[prefix + name] = value.expand(own.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script asks first."""
        raise InputError(f"{self._shown()}: torch.jit.script cannot compile it; {TO_PLAIN}")


def update_running_statistics(
    who: str, moments: Moments, mean: Tensor, var: Tensor, num_batches: Tensor, momentum: float | None
) -> None:
    """Update running statistics as torch does: ``running = (1 - momentum) * running + momentum * batch``.

    The batch's variance is unbiased. Statistics of fewer than two values per channel, which have no variance, are left
    out.

    Args:
        who: the layer, for messages.
        moments: of the mini-batch, ``(C,)`` or ``(K, C)``.
        mean: running mean, of the same shape, updated in place, as are the next two.
        var: running variance.
        num_batches: ``()`` or ``(K,)``.
        momentum: None is the average over all mini-batches.

    Raises:
        InputError: torch.vmap has given every sample statistics of its own.
    """
    if not torch.compiler.is_compiling() and is_batched(moments.mean) and not is_batched(mean):
        raise InputError(
            f"{who}: vmap gives every sample statistics of its own, which cannot all become the running statistics; "
            "call eval() before, or build the layer with track_running_stats=False"
        )
    ops.track(moments.count, moments.mean, moments.m2, mean, var, num_batches, momentum)
