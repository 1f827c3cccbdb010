"""What one block of accumulate_statistics gathers of a layer, and how: Moments of what the layer has normalized.

The modules of precisebn.nn hand their Moments over. The forward of any other layer is stood in for: it runs as always,
but on scratch buffers, and the Moments of what it has normalized are taken beside. Then they go into the running
statistics by one update, as those of a single mini-batch.
"""

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from precisebn import ops
from precisebn._torch import in_backward
from precisebn.distributed import Ranks
from precisebn.errors import InputError
from precisebn.models.batch_norm_calls import BatchNormCalls
from precisebn.models.families import PAUSED, normalizes_its_input, populations_of
from precisebn.models.stand_in import StandIn
from precisebn.models.tensor_pictures import same_bits
from precisebn.models.transaction import Transaction
from precisebn.nn.population import STATISTICS
from precisebn.ops.chan import merge
from precisebn.statistics.moments import Moments

__all__ = ["Averages", "Gathered", "GatheringForward", "merge_over_ranks"]


class Gathered:
    """Moments of what a layer has normalized, of each of its populations. Copies of the layer get None in its place."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.kind = type(layer).__name__
        self.layer = layer
        self.moments: Moments | None = None
        """``(K,)`` and ``(K, C)``; None before the first micro-batch, which tells the sizes of a lazy layer too."""
        self.num_populations = len(populations_of(layer))
        self.counts_batches = True
        """Whether the layer's forward adds to ``num_batches_tracked``."""
        self._moves = _momentum_of(layer) != 0.0
        self._lock = threading.RLock()
        self._is_over = False

    def alone(self) -> AbstractContextManager[object]:
        """For forwards of several threads, one at a time; a graph of torch.compile has no locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def __call__(self, moments: Moments, population: int | None) -> None:
        """Merge Moments ``(C,)`` of one population, or ``(K, C)`` of all: what a layer hands over (a Recorder)."""
        with self.alone():
            if self._is_over or self.is_bypassed():
                return
            count, mean, m2 = self._rows(moments.mean.shape[-1], moments.mean.device, population)
            new_count = moments.count.detach().reshape(-1)
            new_mean, new_m2 = moments.mean.detach().view_as(mean), moments.m2.detach().view_as(m2)
            merged = merge(count.unsqueeze(-1), mean, m2, new_count.unsqueeze(-1), new_mean, new_m2)
            mean.copy_(merged.mean)
            m2.copy_(merged.m2)
            count.add_(new_count)

    def is_bypassed(self) -> bool:
        """Whether the momentum is 0 for now, as code for SAM and VAT has it for forwards that are not to count."""
        return self._moves and _momentum_of(self.layer) == 0.0

    def end(self) -> None:
        """Take nothing any more: a forward that outlives the block does not count."""
        with self.alone():
            self._is_over = True

    def moments_or_zero(self) -> Moments:
        """The Moments, also of a layer that nothing went through."""
        if self.moments is not None:
            return self.moments
        first = populations_of(self.layer)[0].mean
        return Moments.zero(first.numel(), self.num_populations, device=first.device)

    def take(self, x: object, forward: "GatheringForward") -> None:
        """Merge the Moments of what a forward has normalized, ``(N, C, *)``, or ``(N, C)`` in one."""
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise InputError(
                f"layer {self.name!r} ({self.kind}) normalizes tensors (N, C, *); accumulate_statistics got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        count, mean, m2 = self._rows(x.shape[1], x.device, None)
        ops.accumulate(x.detach(), count, mean[0], m2[0])

    @torch.no_grad()
    def track(self, changes: Transaction) -> None:
        """Move the running statistics of the layer once."""
        if self.moments is None:
            return
        rows = zip(populations_of(self.layer), self.moments.count, self.moments.mean, self.moments.m2, strict=True)
        for one, count, mean, m2 in rows:
            mean_new, var_new, counted = one.mean.clone(), one.var.clone(), count.new_zeros((), dtype=torch.int64)
            momentum = _momentum_of(self.layer)
            if one.num_batches is not None:
                counted = one.num_batches.clone()
            elif momentum is None:
                momentum = 0.0  # an average over a number of mini-batches that nobody knows: torch leaves it alone
            ops.track(count, mean, m2, mean_new, var_new, counted, momentum)
            changes.write(one.mean, mean_new)
            changes.write(one.var, var_new)
            if one.num_batches is not None and self.counts_batches:
                changes.write(one.num_batches, counted)

    def _rows(self, num_channels: int, device: torch.device, population: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Where the Moments of one population are, or of all of them."""
        if self.moments is None:
            self.moments = Moments.zero(num_channels, self.num_populations, device=device)
        rows = slice(None) if population is None else slice(population, population + 1)
        return self.moments.count[rows], self.moments.mean[rows], self.moments.m2[rows]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Averages(Gathered):
    """Of InstanceNorm, which tracks the average over its samples of each one's mean and unbiased variance."""

    def take(self, x: object, forward: "GatheringForward") -> None:
        """Merge the averages of one micro-batch, which the forward has left in the scratch buffers."""
        assert isinstance(x, Tensor)  # the layer has normalized it
        averages = forward.scratch["running_mean"], forward.scratch["running_var"]
        mean, var = (average.detach().double() for average in averages)
        samples = x.numel() / mean.numel()  # times values per channel of a sample, the same for all that were one batch
        if self.moments is None:
            self.moments = Moments.zero(mean.numel(), 1, device=mean.device)
        count = self.moments.count + samples
        share = samples / count.unsqueeze(-1)
        self.moments = Moments(count, self.moments.mean.lerp(mean, share), self.moments.m2.lerp(var, share))

    def track(self, changes: Transaction) -> None:
        """Move the running statistics once; InstanceNorm counts no mini-batches."""
        momentum = _momentum_of(self.layer)
        if self.moments is None or not momentum:
            return
        [one] = populations_of(self.layer)
        for buffer, average in ((one.mean, self.moments.mean[0]), (one.var, self.moments.m2[0])):
            changes.write(buffer, buffer.double().lerp(average, momentum))


class GatheringForward(StandIn):
    """In the place of the forward of a layer of another library: what it writes, it writes into scratch buffers.

    Args:
        module: the layer.
        gathered: where Moments go.
    """

    def __init__(self, module: nn.Module, gathered: Gathered) -> None:
        super().__init__(module, {})
        self.gathered = gathered
        self.knows_input = isinstance(gathered, Averages) or normalizes_its_input(module)
        self.aside: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        """While a forward runs: the layer's own buffers, and its momentum where that is an attribute."""

    def take_out(self, changes: Transaction) -> None:
        """Undo what :meth:`put` has changed, when the forward under way has ended."""
        with self.alone():
            self._put_back()  # for a Ctrl-C that came when a forward was about to do so
            super().take_out(changes)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward on scratch buffers, and take what it has normalized."""
        attributes, buffers = vars(self.module), self.module._buffers
        tracks = attributes["training"] and attributes["track_running_stats"] and PAUSED not in attributes
        own: dict[str, Tensor] = {}
        for name in STATISTICS:
            buffer = buffers.get(name)
            if buffer is not None:
                own[name] = buffer
        if not tracks or not own:
            return self.original(*args, **kwargs)
        self.scratch = {name: buffer.clone() for name, buffer in own.items()}
        try:
            self.aside = own, {key: value for key, value in attributes.items() if key == "momentum"}
            buffers.update(self.scratch)
            if isinstance(self.gathered, Averages) and not self.gathered.is_bypassed():
                attributes["momentum"] = 1.0  # the averages of this micro-batch alone
            if self.knows_input:
                output = self.original(*args, **kwargs)
                self._take(args[0] if args else next(iter(kwargs.values()), None))
            else:
                output = self._watched(args, kwargs, own)
        finally:
            self._put_back()
        return output

    def _take(self, x: object) -> None:
        # In a backward it is a repetition by activation checkpointing.
        if not in_backward() and not self.gathered.is_bypassed():
            self.gathered.take(x, self)

    def _put_back(self) -> None:
        if self.aside is not None:
            own, momentum = self.aside
            vars(self.module).update(momentum)
            self.module._buffers.update(own)
            self.aside = None

    def _watched(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: dict[str, Tensor]) -> Any:
        """Run a forward of which nobody knows what it normalizes, but by what it hands to batch_norm."""
        watch = BatchNormCalls(self.scratch["running_mean"], self._take)
        output = watch.of(self.original, *args, **kwargs)
        same = {name: same_bits(self.module._buffers.get(name), buffer) for name, buffer in own.items()}
        self.gathered.counts_batches = not same.get("num_batches_tracked", True)
        if not watch.seen_own and not all(same.values()):
            raise InputError(
                f"layer {self.gathered.name!r} ({self.gathered.kind}) has a forward of its own that updates its "
                "running statistics by hand: what it normalizes is not known, so they cannot be accumulated; leave it "
                "out: accumulate_statistics(model, <the others>)"
            )
        return output


def _momentum_of(layer: nn.Module) -> float | None:
    """As a number: some subclasses compute it, or keep it as a buffer."""
    momentum: Any = getattr(layer, "momentum", None)
    return None if momentum is None else float(momentum)


def merge_over_ranks(gathered: Iterable[Gathered], ranks: Ranks) -> None:
    """Merge what ranks have gathered of the same layers, all in two all-reduces: sums first, then deviations."""
    if ranks.size == 1:
        return
    parts = [(one, one.moments_or_zero()) for one in gathered]
    device = parts[0][1].mean.device
    counts = torch.cat([m.count.unsqueeze(-1).expand_as(m.mean).flatten().to(device) for _, m in parts])
    means, m2s = (
        torch.cat([t.flatten().to(device) for t in of]) for of in ([m.mean for _, m in parts], [m.m2 for _, m in parts])
    )
    sums = torch.cat([counts, counts * means])
    ranks.all_reduce(sums)
    totals, sum_of_means = sums.chunk(2)
    common = sum_of_means / totals.clamp(min=1.0)
    m2s = m2s + counts * (means - common).square()
    ranks.all_reduce(m2s)
    sizes = [m.mean.numel() for _, m in parts]
    for (one, own), *merged in zip(parts, *(flat.split(sizes) for flat in (totals, common, m2s)), strict=True):
        total, mean, m2 = (flat.view_as(own.mean).to(own.mean.device) for flat in merged)
        one.moments = Moments(total[:, 0], mean, m2)
