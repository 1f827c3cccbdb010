"""Subject: what an audit is about, and what has been observed of it.

A model is observed as it trains: with the modes that its modules have. One that is in eval mode throughout, as models
are that have just been loaded, is observed as after the ``model.train()`` of a training loop, which layers that stay in
eval mode whatever is called (frozen ones) do not follow.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from precisebn.auditing.optimizers import Optimizers, optimizers_of
from precisebn.auditing.surroundings import Surroundings
from precisebn.errors import PreciseBNError
from precisebn.models.batches import ForwardFn, call_model, common_device, move_to
from precisebn.models.families import is_batch_norm, is_norm_with_statistics
from precisebn.models.in_use import check_free
from precisebn.models.interrupts import HeldBack
from precisebn.models.selection import named_modules
from precisebn.models.transaction import Transaction
from precisebn.models.wrappers import run_eagerly, set_wrappers_aside

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

    argument_names: ClassVar[Mapping[str, str]] = {}
    """What the user calls an argument, where that is another name."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any = None,
        *,
        optimizer: Optimizers = None,
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
    def other_modules(self) -> dict[str, nn.Module]:
        """Those of the other model, likewise; none where none was given."""
        return {} if self.other is None else dict(named_modules(self.other))

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """The layers that can keep running statistics: BatchNorm of any kind, InstanceNorm, ours."""
        return {name: m for name, m in self.modules.items() if is_batch_norm(m) or is_norm_with_statistics(m)}

    def has(self, argument: str) -> bool:
        """Whether an argument was given."""
        if argument == "batch":  # the loader's first will do
            return self.batch is not None or self.loader is not None
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
    def undisturbed(self) -> Iterator[HeldBack]:
        """A block after which all is as before it, bit for bit, however it ends.

        The model, its gradients, optimizers, the loader's generators and counters, all random generators. Wrappers
        neither broadcast nor wait for other ranks inside, and compiled code runs eagerly. Ctrl-C is held back but in
        what runs inside ``let_through()`` of what this gives, as :meth:`run` does.
        """
        self.check_free()
        with HeldBack() as interrupts:
            steps = Transaction()
            try:
                steps.on_undo(self._before.put_back)
                modules = list(self.model.modules())
                set_wrappers_aside(modules, steps)
                for module in modules:
                    if isinstance(module, DistributedDataParallel):
                        steps.put(vars(module), "require_backward_grad_sync", False)
                run_eagerly(steps)
                yield interrupts
            finally:
                steps.undo()

    def check_free(self) -> None:
        """Raise InputError where a model is under recalibration, or in a block of ``accumulate_statistics``."""
        check_free(self.model)
        if self.other is not None:
            check_free(self.other)

    def check_can_run(self) -> None:
        """What a run of the model needs, before any is made.

        Raises:
            Unobservable: a lazy module, which a run would make into another; scripted code, which shows nothing.
        """
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise Unobservable(
                    f"module {name!r} is code of torch.jit, inside of which nothing can be seen; audit the module that "
                    "it was made from"
                )
            if any(p is not None and is_lazy(p) for p in module._parameters.values()):
                raise Unobservable(
                    f"module {name!r} is lazy, and a run would initialize it; call the model on a mini-batch before"
                )

    def set_training_modes(self) -> None:
        """Put the model into the modes that it trains in; inside :meth:`undisturbed`."""
        if not any(module.training for module in self.model.modules()):
            self.set_mode(training=True)

    def set_mode(self, *, training: bool) -> None:
        """Put the whole model into one mode; inside :meth:`undisturbed`.

        Raises:
            Unobservable: it has but one.
        """
        try:
            self.model.train() if training else self.model.eval()
        except NotImplementedError as error:
            raise Unobservable(
                f"{type(self.model).__name__} refuses to change its mode, as what torch.export makes: {error}; audit "
                "the module that it was made from"
            ) from error

    def run(self, batch: Any, interrupts: HeldBack) -> Any:
        """The model's output on a mini-batch; inside :meth:`undisturbed`. The mini-batch stays as it is."""
        with interrupts.let_through():
            return self.forward_on_copy(self.model, self.on_device(batch))

    def on_device(self, batch: Any) -> Any:
        """The mini-batch on the device of the model, where it has one."""
        device = common_device(self.model)
        return batch if device is None else move_to(batch, device)

    def forward_on_copy(self, model: nn.Module, batch: Any) -> Any:
        """The forward, on a copy of the mini-batch: a model may work in place."""
        return self.forward(model, _copied(batch))

    @cached_property
    def _before(self) -> Surroundings:
        return Surroundings(self.model, optimizers_of(self.optimizer), [self.loader])


def _copied(batch: Any) -> Any:
    """A copy for a model that works in place."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors with a history, objects with a lock
        return batch
