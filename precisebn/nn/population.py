"""What modules share that take the Moments of their input: parameters, slots of population statistics, their update.

A slot is one set of running statistics. Most modules have one, in buffers of nn.BatchNorm's shape; a module with a
population for each of K domains has K, in buffers with one dimension more. A module works out the Moments of what it
normalizes and hands them to :meth:`PopulationNorm.track`, the one place where running statistics are updated; a
recalibration (:mod:`precisebn.recalibration.recording`) takes them there, exactly as they are, instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from precisebn import ops
from precisebn._torch import in_backward
from precisebn.errors import InputError
from precisebn.functional import frozen_batch_norm
from precisebn.statistics.moments import Moments

__all__ = ["PopulationNorm", "Recorder", "in_backward", "update_running_statistics"]

Recorder = Callable[[Moments, int | None], None]
"""Takes the Moments ``(C,)`` of one slot, by its number, or ``(K, C)`` of all of them (None)."""


class PopulationNorm(_NormBase):
    """Base of modules that normalize with batch statistics and keep population statistics.

    Not a ``torch.nn.modules.batchnorm._BatchNorm``, so that nothing that treats those alike (SyncBatchNorm's
    conversion, the fusion of convolutions) replaces it by something with another meaning.

    Args:
        num_features: C.
        eps: as in :class:`torch.nn.BatchNorm2d`, as are the next five.
        momentum: None averages over all mini-batches.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are population statistics; without, batch statistics are always used.
        device: where parameters and buffers live.
        dtype: theirs.
        num_slots: K, which makes running statistics ``(K, C)``; None: one slot, ``(C,)``.
        num_affine: the same of weight and bias.
    """

    # Set on the instance while a recalibration lasts. A class attribute otherwise, so that no state is left behind.
    _recorder: Recorder | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_slots: int | None = None,
        num_affine: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if num_slots is not None and track_running_stats:
            for name, buffer in self._buffers.items():
                if buffer is not None:
                    self._buffers[name] = buffer.expand(num_slots, *buffer.shape).clone()
        if num_affine is not None and affine:
            self.weight, self.bias = (
                torch.nn.Parameter(parameter.detach().expand(num_affine, -1).clone())
                for parameter in (self.weight, self.bias)
            )

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
            mean, var = mean[slot], var[slot]
        return frozen_batch_norm(x, mean, var, weight, bias, eps=self.eps, group=group)

    def check(self, x: object) -> Tensor:
        """Return ``x``, which must be a tensor ``(N, C, *)``.

        Raises:
            InputError: it is not.
        """
        if not isinstance(x, Tensor):
            raise InputError(f"{self._shown()} takes tensors (N, {self.num_features}, *), got {type(x).__name__}")
        if x.dim() < 2 or x.shape[1] != self.num_features:
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
        update_running_statistics(moments, mean, var, batches, self.momentum)

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


def update_running_statistics(
    moments: Moments, mean: Tensor, var: Tensor, num_batches: Tensor, momentum: float | None
) -> None:
    """Update running statistics as torch does: ``running = (1 - momentum) * running + momentum * batch``.

    The batch's variance is unbiased. Statistics of fewer than two values per channel, which have no variance, are left
    out.

    Args:
        moments: of the mini-batch, ``(C,)`` or ``(K, C)``.
        mean: running mean, of the same shape, updated in place, as are the next two.
        var: running variance.
        num_batches: ``()`` or ``(K,)``.
        momentum: None is the average over all mini-batches.
    """
    ops.track(moments.count, moments.mean, moments.m2, mean, var, num_batches, momentum)
