"""Subject: what an audit is about, and what has been observed of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from precisebn.errors import PreciseBNError
from precisebn.models.batches import ForwardFn, call_model
from precisebn.models.families import is_batch_norm, is_norm_with_statistics
from precisebn.models.random_state import RandomState
from precisebn.models.selection import named_modules
from precisebn.models.snapshot import Snapshot

__all__ = ["LossFn", "Subject", "Unobservable"]

LossFn = Callable[[Any, Any], Tensor]
"""What is trained on: ``loss(output, batch)``, a scalar."""

Observation = TypeVar("Observation")


class Unobservable(PreciseBNError):
    """Something that a check needs to see cannot be seen; the message says why, and what to pass."""


class Subject:
    """A model, what was given with it, and what has been observed of it, each thing once for all checks.

    Args:
        model: what is audited.
        batch: a mini-batch of training, or None.
        optimizer: what trains it; several, where several do.
        loss: ``loss(output, batch)``; by default the output's own ``loss``, or the mean of its squares.
        loader: mini-batches as in training.
        other: a model that should share nothing with it.
        num_steps: optimizer steps of the training run.
        forward: ``forward(model, batch)``, which gives the output; as for :func:`precisebn.update_bn_stats` by default.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any = None,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        loss: LossFn | None = None,
        loader: Iterable[Any] | None = None,
        other: nn.Module | None = None,
        num_steps: int | None = None,
        forward: ForwardFn | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.optimizer = optimizer
        self.loss = loss
        self.loader = loader
        self.other = other
        self.num_steps = num_steps
        self.forward: ForwardFn = forward or call_model
        self._seen: dict[Any, Any] = {}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules by qualified name, without the names of wrappers, each once."""
        return dict(named_modules(self.model))

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """The layers that can keep running statistics: BatchNorm of any kind, InstanceNorm, ours."""
        return {name: m for name, m in self.modules.items() if is_batch_norm(m) or is_norm_with_statistics(m)}

    def has(self, argument: str) -> bool:
        """Whether an argument was given."""
        return getattr(self, argument) is not None

    def observe(self, kind: Callable[["Subject"], Observation]) -> Observation:
        """What ``kind(subject)`` gives, worked out once.

        Raises:
            Unobservable: it could not be worked out.
        """
        if kind not in self._seen:
            try:
                self._seen[kind] = kind(self)
            except Unobservable as error:
                self._seen[kind] = error
        seen = self._seen[kind]
        if isinstance(seen, Unobservable):
            raise seen
        observation: Observation = seen
        return observation

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A block after which the model and all random generators are as before it, bit for bit."""
        snapshot, random_state = self._snapshot, RandomState()
        try:
            yield
        finally:
            snapshot.put_back()
            random_state.put_back()

    @cached_property
    def _snapshot(self) -> Snapshot:
        return Snapshot(self.model)
