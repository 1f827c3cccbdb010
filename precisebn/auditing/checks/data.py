"""Data: how the loader draws its mini-batches."""

from collections.abc import Iterator

from precisebn.auditing.check import Problem, check
from precisebn.auditing.observations.loader import LoaderLook
from precisebn.auditing.subject import Subject
from precisebn.models.families import is_batch_norm, is_frozen

__all__ = ["last_of_one_sample", "normalizes_by_batch", "not_shuffled"]


@check(
    "PBN701", "warning", "last mini-batch of one sample", source="https://github.com/pytorch/pytorch/issues/7716",
    needs=("loader",),
)  # fmt: skip
def last_of_one_sample(subject: Subject) -> Iterator[Problem]:
    """Where values per channel are one, BatchNorm raises; elsewhere it takes one sample's statistics for all data's."""
    look = subject.observe(LoaderLook)
    if look.last_size == 1 and max(look.sizes) > 1 and normalizes_by_batch(subject):
        yield Problem(
            f"mini-batches have {max(look.sizes)} samples, and the last of an epoch has one: its statistics are those "
            "of one sample, and where that is one value per channel BatchNorm raises ValueError.",
            "DataLoader(..., drop_last=True).",
        )


@check(
    "PBN703", "note", "loader not shuffled", needs=("loader",),
    source="https://docs.pytorch.org/docs/stable/data.html#data-loading-order-and-sampler",
)  # fmt: skip
def not_shuffled(subject: Subject) -> Iterator[Problem]:
    """The running average forgets: at the end of an epoch it is that of the last part of the data set."""
    look = subject.observe(LoaderLook)
    if not look.is_sequential or len(look.batches) < 2 or not normalizes_by_batch(subject):
        return
    labels = look.labels()
    one_label = not look.is_all and labels is not None and len({int(label) for of in labels for label in of}) == 1
    seen = f", and the first {len(look.batches)} mini-batches are all of one label" if one_label else ""
    yield Problem(
        f"samples come in the order of the data set{seen}: running statistics are those of its last part at the end of "
        "an epoch.",
        "DataLoader(..., shuffle=True) for training and for update_bn_stats.",
        severity="warning" if one_label else None,
    )


def normalizes_by_batch(subject: Subject) -> bool:
    """Whether any BatchNorm layer takes the statistics of mini-batches when the model trains."""
    layers = [layer for layer in subject.norms.values() if is_batch_norm(layer) and not is_frozen(layer)]
    trains = any(module.training for module in subject.modules.values())
    return any(layer.training or not trains for layer in layers)
