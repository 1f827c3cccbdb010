"""The loop: run the model on mini-batches until there are enough of them, on all ranks together."""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import tqdm

from precisebn._reports import counted
from precisebn.distributed import Ranks, Tally, communicates
from precisebn.errors import InsufficientDataError
from precisebn.models.batches import (
    call_model,
    common_device,
    copied,
    explain_refused_view,
    move_to,
    with_memory_format,
)
from precisebn.models.interrupts import HeldBack
from precisebn.models.samples import certain_num_samples, num_samples
from precisebn.recalibration.prior import Prior
from precisebn.recalibration.recording import Recording
from precisebn.recalibration.report import largest
from precisebn.recalibration.settings import Settings
from precisebn.statistics.estimator import MIN_BLOCKS, Population

__all__ = ["Loop", "all_within", "merged_over_ranks"]


class Loop:
    """One pass over the data.

    Args:
        settings: the arguments of the user.
        ranks: those that work together.
        interrupts: holds Ctrl-C back, but while the loader and the model are at work.

    Attributes:
        iterations: mini-batches that this rank has used so far.
        samples: samples in them.
        batches: the mini-batches that are left.
    """

    def __init__(self, settings: Settings, ranks: Ranks, interrupts: HeldBack) -> None:
        self.settings = settings
        self.ranks = ranks
        self.iterations = 0
        self.samples = 0
        self._interrupts = interrupts
        self._device = settings.device if settings.device is not None else common_device(settings.model)
        self._max_error = math.nan
        self._prior: Prior | None = None
        self._weighed: int | None = None  # mini-batches of a first pass over a loader that there is a second of
        self._in_step = ranks.size > 1 and communicates(settings.model.modules())
        self.batches: Iterator[Any] = _Interruptible(settings.data_loader, interrupts)

    def call(self, batch: Any) -> None:
        """Run the model on a mini-batch; Ctrl-C may come while it does."""
        with self._interrupts.let_through():
            if self._device is not None:
                batch = move_to(batch, self._device)
            if self.settings.memory_format is None:
                self._run_model(batch)
                return
            batch = with_memory_format(batch, self.settings.memory_format)
            with explain_refused_view(self.settings.model, self.settings.memory_format):
                self._run_model(batch)

    def _run_model(self, batch: Any) -> None:
        if self.settings.forward is not None:
            self.settings.forward(self.settings.model, batch)
        else:
            call_model(self.settings.model, batch, is_first=self.iterations == 0)

    def weigh(self, prior: Prior) -> None:
        """Tell a prior how many samples there will be, of all ranks: it is mixed in from the first mini-batch on.

        For that the loader is gone through twice; of one that can be gone through only once the mini-batches are kept,
        as copies, since it may fill the same memory anew with each. With a tolerance nobody knows: then what counts is
        the samples so far.

        Raises:
            BatchFormatError: it cannot be told how many samples a mini-batch holds.
        """
        if prior.size == 0 or not math.isfinite(prior.size):
            return
        self._prior = prior
        if self.settings.tolerance is not None:
            return
        sizes, kept = list[int](), list[Any]()
        for batch in itertools.islice(self.batches, min(self.settings.num_iters or sys.maxsize, sys.maxsize)):
            sizes.append(self._count(batch))
            if isinstance(self.settings.data_loader, Iterator):
                kept.append(copied(batch, _TWICE))
        if isinstance(self.settings.data_loader, Iterator):
            self.batches = iter(kept)
        else:
            self._weighed = len(sizes)
            self.batches = _Interruptible(self.settings.data_loader, self._interrupts)
        total, _ = self.ranks.tally(Tally(samples=sum(sizes)))
        prior.samples = float(total.samples)

    def _count(self, batch: Any) -> int:
        """Samples in a mini-batch: a guess will do for a report, but not for what a prior weighs against."""
        return num_samples(batch) if self._prior is None else certain_num_samples(batch, f"prior={self._prior.size:g}")

    def run(self, recording: Recording) -> tuple[Tally, Tally]:
        """Record mini-batches until there are enough.

        Returns:
            What the ranks have counted: sums and maxima.

        Raises:
            InsufficientDataError: the loader gave none, or fewer than ``num_iters``.
            NonFiniteStatisticsError: a layer met NaN or Inf.
        """
        settings = self.settings
        show = bool(settings.progress) and self.ranks.rank == 0
        bar_total = settings.num_iters if settings.num_iters is not None or not show else _length(settings.data_loader)
        exhausted, next_check = False, MIN_BLOCKS
        # One that is disabled still costs as much as a layer's forward.
        with tqdm.tqdm(total=bar_total, desc="BN statistics") if show else nullcontext() as bar:
            for step in itertools.count(1) if settings.num_iters is None else range(1, settings.num_iters + 1):
                if not exhausted:
                    exhausted = not self._step(recording, bar)
                if exhausted and (settings.tolerance is None or self.ranks.size == 1):
                    break
                if settings.tolerance is not None and step >= next_check:
                    if self._is_enough(settings.tolerance, recording, exhausted, bar):
                        break
                    next_check = step + self._pause(step, settings.tolerance)
        self._check_amount(exhausted)
        recording.check_finite()
        return self.ranks.tally(self._tally(recording))

    def _step(self, recording: Recording, bar: "tqdm.tqdm[Any] | None") -> bool:
        """Run one mini-batch, if there is one."""
        for batch in self._all_at_once() if self._in_step else self.batches:
            samples = self._count(batch)
            if self._prior is not None and self.settings.tolerance is not None:
                self._prior.samples = float(self.samples + samples) * self.ranks.size
            with recording.forward():
                self.call(batch)
            recording.end_batch()
            self.iterations += 1
            self.samples += samples
            self._show(bar)
            if bar is not None:
                bar.update()
            return True
        return False

    def _all_at_once(self) -> Iterator[Any]:
        """The next mini-batch, if all ranks have one: in the forward of a sharded model they wait for each other.

        Raises:
            InsufficientDataError: on all ranks, if only some have one.
        """
        batch = next(self.batches, _NO_BATCH)
        without: list[int] = self.ranks.gather(batch is _NO_BATCH, _indices)
        if 0 < len(without) < self.ranks.size:
            raise InsufficientDataError(
                f"rank(s) {', '.join(map(str, without))} of {self.ranks.size} have no mini-batch after "
                f"{self.iterations}, and others have one; the model is sharded (FSDP), so that its forward waits for "
                "all ranks: give all of them the same number of mini-batches, by drop_last=True and num_iters="
            )
        if not without:
            yield batch

    def _check_amount(self, exhausted: bool) -> None:
        settings = self.settings
        if exhausted and self._weighed is not None and self.iterations < self._weighed:
            raise InsufficientDataError(
                f"prior={settings.prior:g} has the data loader gone through twice, and it gave "
                f"{counted(self._weighed, 'mini-batch')} the first time but {self.iterations} the second; {_TWICE}, or "
                "iter(loader), whose mini-batches are kept"
            )
        if self.iterations == 0 and self.ranks.size == 1:
            raise InsufficientDataError("the data loader gave no mini-batch")
        if exhausted and settings.tolerance is None and settings.num_iters is not None:
            raise InsufficientDataError(
                f"num_iters={settings.num_iters}, but the data loader ended after "
                f"{counted(self.iterations, 'mini-batch')}; pass num_iters=None to use the whole loader, or a loader "
                "that is long enough"
            )

    def _is_enough(self, tolerance: float, recording: Recording, exhausted: bool, bar: "tqdm.tqdm[Any] | None") -> bool:
        """Whether the standard errors are within the tolerance, or no rank has data left."""
        recording.check_finite()
        total, most = self.ranks.tally(self._tally(recording, unfinished=not exhausted))
        errors: list[float] = []
        for population in merged_over_ranks(recording, self.ranks, most):
            seen = population.count > 0
            errors += population.mean_error[seen].tolist() + population.var_error[seen].tolist()
        self._max_error = largest(errors)
        self._show(bar)
        return all_within(tolerance, errors) or not total.unfinished

    def _pause(self, step: int, tolerance: float) -> int:
        """How many mini-batches until the errors are looked at again, which costs a wait for the device and the ranks.

        Errors fall with the root of the number of mini-batches: half of those that are missing by that, which the
        errors, not exact themselves, may put too high. At most as many again as there were, at least a twentieth.
        """
        missing = step * (min(self._max_error / tolerance, math.sqrt(3.0)) ** 2 - 1.0)
        return max(1, step // 20, 0 if math.isnan(missing) else int(missing / 2))

    def _tally(self, recording: Recording, unfinished: bool = False) -> Tally:
        return Tally(samples=self.samples, levels=recording.num_levels, unfinished=int(unfinished))

    def _show(self, bar: "tqdm.tqdm[Any] | None") -> None:
        if bar is None:
            return
        error = {} if math.isnan(self._max_error) else {"error": f"{self._max_error:.2g}"}
        bar.set_postfix({"samples": self.samples, **error}, refresh=False)


def merged_over_ranks(recording: Recording, ranks: Ranks, most: Tally) -> list[Population]:
    """The statistics so far, of each device's estimator."""
    results = []
    for estimator in recording.estimators:
        eps = [one.statistics.eps for one in recording.populations if one.estimator is estimator]
        eps_tensor = torch.tensor(eps, dtype=torch.float64, device=estimator.device)
        all_reduce = ranks.all_reduce if ranks.size > 1 else None
        results.append(estimator.result(eps_tensor, all_reduce=all_reduce, num_levels=most.levels))
    return results


def all_within(tolerance: float, errors: Sequence[float]) -> bool:
    """Whether there are errors, and all are known and small enough."""
    return bool(errors) and all(error <= tolerance for error in errors)  # NaN, an error not known yet, is not within


class _Interruptible(Iterator[Any]):
    """The mini-batches of a loader, in whose code Ctrl-C may come."""

    def __init__(self, loader: Iterable[Any], interrupts: HeldBack) -> None:
        self._interrupts = interrupts
        with interrupts.let_through():
            self._batches = iter(loader)

    def __next__(self) -> Any:
        with self._interrupts.let_through():
            return next(self._batches)


_NO_BATCH = object()
_TWICE = "pass a loader that can be gone through twice, such as a DataLoader or a list"


def _indices(flags: list[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception:  # a loader that does not know its length may say so in any way
        return None
