"""Gradients: parameters that are to be trained, and get none."""

from collections.abc import Iterator

from precisebn.auditing.check import Problem, check
from precisebn.auditing.checks.optimizer import names_held
from precisebn.auditing.observations.training import TrainingStep
from precisebn.auditing.subject import Subject

__all__ = [
    "gradients_cut",
    "parameters_beside_the_loss",
    "parameters_not_used",
    "values_taken_out_of_torch",
]

_AUTOGRAD = "https://docs.pytorch.org/docs/stable/notes/autograd.html#locally-disabling-gradient-computation"
_DDP = "https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html"


@check("PBN351", "error", "trainable parameters cut off from the loss", source=_AUTOGRAD, needs=("batch",))
def gradients_cut(subject: Subject) -> Iterator[Problem]:
    """The loss is worked out from them, and autograd does not lead back to them.

    Cut off and in no optimizer that was given, they may be meant to be: a GAN's generator in the discriminator's step.
    """
    held = names_held(subject) if subject.has("optimizer") else None
    for (behind, origin), names in subject.observe(TrainingStep).gradients().cut.items():
        where = f"module {behind!r}" if behind else "the loss, or the model's own forward"
        did = "something" if origin is None else f"{origin.how} in {_place(origin.module, origin.line)}"
        for is_stepped in (True, False):
            these = [name for name in names if (held is None or name in held) == is_stepped]
            if not these:
                continue
            yield Problem(
                f"the loss depends on them, but {did} cuts their gradients off; {where} is the first behind the cut.",
                "take that away to train them; pass the loss that trains them, where it is another, as loss=; or "
                "freeze(model, ...) what is not to be trained, and say so.",
                these,
                None if is_stepped else "note",  # PBN302 says of them that no optimizer steps them
            )


@check("PBN352", "warning", "values taken out of torch", source=_AUTOGRAD, needs=("batch",))
def values_taken_out_of_torch(subject: Subject) -> Iterator[Problem]:
    """Numbers of Python and NumPy have no history: a tensor that is made of them starts anew."""
    for origin, names in subject.observe(TrainingStep).gradients().exited.items():
        yield Problem(
            f"what is worked out from them leaves torch by {origin.how} in {_place(origin.module, origin.line)}, and "
            "no gradient comes back.",
            "stay with tensors there, as torch.stack does for torch.tensor; or freeze(model, ...) what is not trained.",
            names,
        )


@check("PBN353", "note", "parameters beside the loss", source=_DDP, needs=("batch",))
def parameters_beside_the_loss(subject: Subject) -> Iterator[Problem]:
    """The forward works with them, for something that the loss does not take."""
    if names := subject.observe(TrainingStep).gradients().aside:
        yield Problem(
            "the forward works with them, but the loss does not depend on what comes of it, so they get no gradient; "
            "DistributedDataParallel waits for one.",
            "add their output to the loss (loss= is what the audit takes for it), or freeze(model, ...) them.",
            names,
        )


@check("PBN354", "note", "parameters not used in the forward", source=_DDP, needs=("batch",))
def parameters_not_used(subject: Subject) -> Iterator[Problem]:
    """No call of the forward takes them."""
    if names := subject.observe(TrainingStep).gradients().unused:
        yield Problem(
            "the forward does not use them, so they get no gradient; DistributedDataParallel waits for one, unless "
            "find_unused_parameters=True.",
            "remove what is left over, or freeze(model, ...) it.",
            names,
        )


def _place(module: str, line: str) -> str:
    named = f"module {module!r}" if module else "the model's own forward"
    return f"{named} ({line})" if line else named
