"""Modes: layers that are not in the mode that they are thought to be in."""

from collections.abc import Iterator

from precisebn.auditing.check import Problem, check
from precisebn.auditing.subject import Subject
from precisebn.models.families import PAUSED, is_frozen, populations_of

__all__ = ["frozen_parameters_with_live_statistics"]


@check(
    "PBN101", "error", "frozen parameters, live running statistics",
    source="https://github.com/pytorch/pytorch/issues/16149",
)  # fmt: skip
def frozen_parameters_with_live_statistics(subject: Subject) -> Iterator[Problem]:
    """``requires_grad = False`` stops weight and bias; running statistics are buffers, and move with every forward."""
    live = [
        name
        for name, layer in subject.norms.items()
        if layer.training and populations_of(layer) and not is_frozen(layer) and PAUSED not in vars(layer)
        and (own := list(layer.parameters(recurse=False))) and not any(p.requires_grad for p in own)
    ]  # fmt: skip
    if live and len(live) < len(subject.norms):
        yield Problem(
            "their weight and bias are frozen, their running statistics move with every forward in training mode.",
            "freeze(model, ...) holds both still, whoever calls train().",
            live,
        )
