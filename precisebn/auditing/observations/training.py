"""TrainingStep: one forward and backward as in training, looked at from all sides, and undone."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from precisebn.auditing.observations.flow import Cut, GradientFlow, Origin
from precisebn.auditing.observations.loader import training_batch
from precisebn.auditing.observations.normalization import NormCall, records_calls
from precisebn.auditing.subject import Subject, Unobservable
from precisebn.auditing.tensors import parameters_once
from precisebn.distributed import is_sharded
from precisebn.models.interrupts import HeldBack
from precisebn.models.nested import tensors_in
from precisebn.models.samples import num_samples

__all__ = ["GradientReport", "TrainingStep"]


class GradientReport:
    """Which trainable parameters a loss has gradients for, and why not the others.

    Attributes:
        cut: names of parameters that the loss was worked out from and has no gradient for, by the cut; all in the order
            of the forward.
        exited: names of parameters whose values were handed over to Python or NumPy, by where, and reach the loss in no
            other way.
        aside: parameters that the forward used, for something that is not in the loss.
        unused: parameters that the forward did not use.
    """

    def __init__(self, flow: GradientFlow, loss: Tensor, without: Mapping[str, Tensor]) -> None:
        self.cut: dict[tuple[str, Origin | None], list[str]] = {}
        self.exited: dict[Origin, list[str]] = {}
        self.aside: list[str] = []
        self.unused: list[str] = []
        cuts, behind = flow.cuts_behind(loss), flow.parameters_behind(loss)
        for name, parameter in without.items():
            bit = flow.bits(parameter)
            at: Cut | None = next((cut for cut in cuts if cut.parameters & bit), None)
            exit_ = next((origin for parameters, origin in flow.exits if parameters & bit), None)
            if behind & bit:
                self.cut.setdefault((at.behind, at.origin) if at is not None else ("", None), []).append(name)
            elif exit_ is not None:
                self.exited.setdefault(exit_, []).append(name)
            elif flow.used & bit:
                self.aside.append(name)
            else:
                self.unused.append(name)


class TrainingStep:
    """One forward in training mode on the training mini-batch, and which gradients come of it.

    Attributes:
        calls: of normalization layers, in their order; also those before an exception.
        samples: in the mini-batch; None where it is of a kind (a graph, say) that does not tell.
        failure: why the forward did not end; None where it did.
    """

    def __init__(self, subject: Subject) -> None:
        subject.check_can_run()
        batch = training_batch(subject)
        tells = any(tensor.dim() for tensor in tensors_in(batch))
        self.samples = num_samples(batch) if tells else None
        self.calls: list[NormCall] = []
        self.failure: Unobservable | None = None
        self._gradients: GradientReport | Unobservable
        trainable = {name: p for name, p in parameters_once(subject.modules).values() if p.requires_grad}
        with subject.undisturbed() as interrupts, torch.inference_mode(False), torch.enable_grad():
            subject.set_training_modes()
            try:
                self._gradients = self._run(subject, batch, trainable, interrupts)
            except Unobservable as error:
                self._gradients = error

    def gradients(self) -> GradientReport:
        """Which gradients come.

        Raises:
            Unobservable: none can be looked at.
        """
        if isinstance(self._gradients, Unobservable):
            raise self._gradients
        return self._gradients

    def completed_calls(self) -> dict[str, list[NormCall]]:
        """The calls of every normalization layer that was called, by its name.

        Raises:
            Unobservable: the forward did not end.
        """
        if self.failure is not None:
            raise self.failure
        by_layer: dict[str, list[NormCall]] = {}
        for call in self.calls:
            by_layer.setdefault(call.layer, []).append(call)
        return by_layer

    def _run(
        self, subject: Subject, batch: Any, trainable: Mapping[str, Tensor], interrupts: HeldBack
    ) -> GradientReport:
        flow = GradientFlow(trainable)
        try:
            with flow, _follows_modules(subject.modules, flow), records_calls(subject.norms, self.calls, flow.paused):
                output = subject.run(batch, interrupts)
        except Exception as error:
            self.failure = Unobservable(
                f"the forward in training mode raised {type(error).__name__}: {error}; pass forward= if the model is "
                "to be called in another way"
            )
            raise self.failure from error
        if not trainable:
            raise Unobservable("the model has no trainable parameter")
        if any(is_sharded(p) for p in trainable.values()):
            raise Unobservable("parameters are sharded over ranks, where gradients belong to others; audit it before")
        try:
            with interrupts.let_through():
                with flow:
                    loss = _loss(subject, output, subject.on_device(batch))
                reached = _reached(loss, list(trainable.values()))
        except Unobservable:
            raise
        except Exception as error:
            raise Unobservable(
                f"the loss or its backward raised {type(error).__name__}: {error}; pass loss=, a function of output "
                "and batch that gives a scalar"
            ) from error
        without = {name: p for (name, p), has in zip(trainable.items(), reached, strict=True) if not has}
        return GradientReport(flow, loss, without)


def _reached(loss: Tensor, parameters: list[Tensor]) -> list[bool]:
    """Which parameters a backward from the loss comes to.

    Reentrant checkpoints take no other backward than one that accumulates: there the gradients that there are make room
    for others, and come back with everything else.
    """
    if not loss.requires_grad:
        return [False] * len(parameters)
    if not _has_reentrant_checkpoint(loss):
        return [grad is not None for grad in torch.autograd.grad(loss, parameters, allow_unused=True)]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [parameter.grad is not None for parameter in parameters]


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of a loss leads through ``torch.utils.checkpoint.CheckpointFunction``."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def _loss(subject: Subject, output: Any, batch: Any) -> Tensor:
    """What is trained on: the given loss, the output's own, or the mean squares of all that came out."""
    if subject.loss is not None:
        loss = subject.loss(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise Unobservable(f"loss= gives {type(loss).__name__}; it has to give a tensor of one number")
        return loss
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    parts = [t.square().mean() for t in tensors_in(output) if t.is_floating_point() and t.numel()]
    if not parts:
        raise Unobservable(f"the model gives {type(output).__name__} without a floating-point tensor; pass loss=")
    return torch.stack([part.to(parts[0].device, parts[0].dtype) for part in parts]).sum()


@contextmanager
def _follows_modules(modules: Mapping[str, nn.Module], flow: GradientFlow) -> Iterator[None]:
    """Within this block, a flow is told which module runs."""

    def enter(name: str) -> Any:
        return lambda module, args: flow.enter(name)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        flow.leave(module, (args, kwargs), output)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        yield
