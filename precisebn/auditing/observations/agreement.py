"""Agreement: the same mini-batch by mini-batch statistics and by running statistics, and nothing else that differs.

The model is in eval mode both times, dropout off; the first time alone its normalization layers, those that train, are
in training mode. So what differs is BatchNorm, and not what else acts differently in training.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from precisebn.auditing.observations.loader import training_batch
from precisebn.auditing.observations.normalization import (
    Distance,
    NormCall,
    Statistics,
    can_be_measured,
    records_calls,
)
from precisebn.auditing.subject import Subject, Unobservable
from precisebn.models.families import populations_of
from precisebn.models.interrupts import HeldBack
from precisebn.models.nested import tensors_in
from precisebn.models.random_state import RandomState

__all__ = ["Agreement", "LayerAgreement"]


class LayerAgreement(NamedTuple):
    """One normalization layer, by the mini-batch and by its running statistics.

    Attributes:
        layer: its qualified name.
        statistics: how far those of its input are from its running statistics, where the model goes by mini-batches.
        outputs: how far what it gives then is from what it gives where the model goes by running statistics.
    """

    layer: str
    statistics: Distance
    outputs: Distance


class Agreement:
    """How far apart a mini-batch comes out in training and in eval mode, for BatchNorm's part.

    Attributes:
        layers: the normalization layers that are called once, and have one population, in the order of their calls.
        outputs_apart: root mean square of the difference of the model's outputs, relative to their standard deviation;
            None where they cannot be compared, as with boxes, of which there may be different numbers.
    """

    def __init__(self, subject: Subject) -> None:
        subject.check_can_run()
        if any(t.is_meta for t in (*subject.model.parameters(), *subject.model.buffers())):
            raise Unobservable("the model is on the meta device, where there are no values")
        batch = training_batch(subject)
        with subject.undisturbed() as interrupts, torch.no_grad():
            subject.set_training_modes()
            training = [layer for layer in subject.norms.values() if layer.training and populations_of(layer)]
            subject.set_mode(training=False)
            random_state = RandomState()
            by_running, running_output, _ = _outputs(subject, batch, interrupts)
            random_state.put_back()
            for layer in training:
                vars(layer)["training"] = True
            by_batch, batch_output, calls = _outputs(subject, batch, interrupts)
        self.layers = []
        for call in calls:
            populations, name = populations_of(subject.norms[call.layer]), call.layer
            if name in by_batch and name in by_running and call.statistics is not None and len(populations) == 1:
                running = Statistics.certain(populations[0].mean, populations[0].var, call.statistics.eps)
                statistics = Distance.between(call.statistics, running)
                self.layers.append(LayerAgreement(name, statistics, Distance.between(by_batch[name], by_running[name])))
        self.outputs_apart = _apart(batch_output, running_output)


def _outputs(subject: Subject, batch: Any, interrupts: HeldBack) -> tuple[dict[str, Statistics], Any, list[NormCall]]:
    """The statistics of the output of every normalization layer that is called once, and the model's output."""
    found: dict[str, Statistics] = {}
    calls: list[NormCall] = []
    try:
        with _records_outputs(subject.norms, found), records_calls(subject.norms, calls):
            output = subject.run(batch, interrupts)
    except Exception as error:
        raise Unobservable(
            f"the forward in eval mode raised {type(error).__name__}: {error}; pass forward= if the model is to be "
            "called in another way"
        ) from error
    names = [call.layer for call in calls]
    return {name: one for name, one in found.items() if names.count(name) == 1}, output, calls


@contextmanager
def _records_outputs(norms: Mapping[str, nn.Module], found: dict[str, Statistics]) -> Iterator[None]:
    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and can_be_measured(output):
                found[name] = Statistics.of(output, eps=1e-12)

        return hook

    handles = [norm.register_forward_hook(note(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apart(one: Any, other: Any) -> float | None:
    """Root mean square of the difference of two outputs, relative to the standard deviation of the first."""
    firsts, seconds = list(tensors_in(one)), list(tensors_in(other))
    if len(firsts) != len(seconds) or any(a.shape != b.shape for a, b in zip(firsts, seconds, strict=True)):
        return None
    pairs = [(a.double(), b.double()) for a, b in zip(firsts, seconds, strict=True) if a.is_floating_point()]
    pairs = [(a, b) for a, b in pairs if a.numel() > 1 and float(a.std())]
    return max((float((a - b).square().mean().sqrt() / a.std()) for a, b in pairs), default=None)
