"""What modules share that take the Moments of their input: parameters, slots of population statistics, their update.

A slot is one set of running statistics. Most modules have one, in buffers of nn.BatchNorm's shape; a module with a
population for each of K domains has K, in buffers with one dimension more. A module works out the Moments of what it
normalizes and hands them to :meth:`PopulationNorm.track`, the one place where running statistics are updated; a
recalibration (:mod:`precisebn.recalibration.recording`) takes them there, exactly as they are, instead.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy

from precisebn import ops
from precisebn._torch import in_backward, is_batched, is_tracing
from precisebn.errors import InputError
from precisebn.functional import frozen_batch_norm, portable
from precisebn.nn.norm import TO_PLAIN, Norm
from precisebn.statistics.moments import Moments

__all__ = ["PopulationNorm", "Recorder", "in_backward", "update_running_statistics"]

Recorder = Callable[[Moments, int | None], None]
"""Takes the Moments ``(C,)`` of one slot, by its number, or ``(K, C)`` of all of them (None)."""


class PopulationNorm(Norm):
    """Base of modules that normalize with batch statistics and keep population statistics.

    Its constructor is :class:`Norm`'s; without ``track_running_stats`` batch statistics are always used.
    """

    # Set on the instance while a recalibration lasts. A class attribute otherwise, so that no state is left behind.
    _recorder: Recorder | None = None

    def _repeat(self, *, populations: int | None = None, affines: int | None = None) -> None:
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
    def num_slots(self) -> int | None:
        """K, or None for a single slot whose buffers have no dimension for it."""
        return None if self.running_mean is None or self.running_mean.dim() == 1 else len(self.running_mean)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward normalizes with the statistics of its input, rather than with those of the population."""
        return self.training or self.running_mean is None

    def frozen(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        group: Tensor | None = None,
        slot: int | None = None,
    ) -> Tensor:
        """Normalize by the running statistics, of one slot or of each sample's group."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None  # the caller has asked uses_batch_statistics
        if slot is not None:
            mean, var = portable.row(x, mean, slot), portable.row(x, var, slot)
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

    def track(self, moments: Moments, slot: int | None = None) -> None:
        """Update the running statistics from the Moments of a mini-batch; in training only.

        Not while a backward runs: a forward in there is a repetition by activation checkpointing, and its mini-batch
        has been counted.

        Args:
            moments: of one slot ``(C,)``, or of all ``(K, C)``.
            slot: which one, where there are several and the Moments are of one.
        """
        if self._recorder is not None:
            self._recorder(moments, slot)
            return
        # Not as attributes, which nn.Module looks for in vain at first, and slowly.
        mean, var, batches = map(self._buffers.get, ("running_mean", "running_var", "num_batches_tracked"))
        updates = self.training and self.track_running_stats and not in_backward()
        if not updates or mean is None or var is None or batches is None:
            return
        if slot is not None:
            mean, var, batches = mean[slot], var[slot], batches[slot]
        update_running_statistics(self._shown(), moments, mean, var, batches, self.momentum)

    def _shown(self) -> str:
        return f"{type(self).__name__}({self.num_features})"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let a checkpoint with one set of statistics, or of weights, fill every slot."""
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
