"""Leaks: normalization batches whose samples have something in common, which tells of each what the others are."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from precisebn import ops
from precisebn.auditing.check import Problem, check
from precisebn.auditing.checks.data import normalizes_by_batch
from precisebn.auditing.observations.loader import LoaderLook
from precisebn.auditing.observations.training import TrainingStep
from precisebn.auditing.subject import Subject
from precisebn.models.families import is_batch_norm

__all__ = ["correlated_samples", "one_label", "one_source"]

_LEAKAGE = "Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 6"


@check("PBN711", "warning", "mini-batches of one label", source=_LEAKAGE, needs=("loader",))
def one_label(subject: Subject) -> Iterator[Problem]:
    """The statistics of such a mini-batch tell its label, in training; at test time they are those of all."""
    look = subject.observe(LoaderLook)
    labels = [one for one in look.labels() or () if len(one) > 1]  # a last one of one sample tells nothing
    if len(labels) < 2 or not normalizes_by_batch(subject):
        return
    everything = torch.cat([one.long().cpu() for one in labels])
    if len(everything.unique()) == 1:
        return  # nothing is known of other labels
    seen = [len(one.unique()) for one in labels]
    expected = _expected_labels(everything, [len(one) for one in labels])
    if max(seen) == 1:
        yield Problem(
            f"each of the {len(labels)} mini-batches that were looked at holds samples of one label, of "
            f"{len(everything.unique())}: BatchNorm's statistics tell it in training, and do not at test time.",
            "DataLoader(..., shuffle=True); or statistics for each by convert_domain_specific(model, num_domains).",
        )
    elif sum(seen) < 0.5 * expected:
        yield Problem(
            f"mini-batches hold {sum(seen) / len(seen):.1f} different labels, where shuffled ones would hold "
            f"{expected / len(seen):.1f}: BatchNorm's statistics tell them in training, and do not at test time.",
            "DataLoader(..., shuffle=True), or ShuffleBN where the sampling is meant.",
            severity="note",
        )


@check(
    "PBN712", "warning", "samples of a mini-batch alike", needs=("loader",), source=_LEAKAGE,
)  # fmt: skip
def correlated_samples(subject: Subject) -> Iterator[Problem]:
    """Frames of one video, crops of one image: many samples, and the statistics of few."""
    inputs = subject.observe(LoaderLook).inputs()
    if inputs is None or len(inputs) < 4 or not normalizes_by_batch(subject):
        return
    ratio = _between_to_within(inputs)
    chance = 1 + 6 * (2 / (len(inputs) - 1)) ** 0.5
    if ratio > chance:
        size = len(inputs[0])
        yield Problem(
            f"the means of mini-batches scatter {ratio:.0f} times as much (in variance) as those of independent "
            f"samples would: {size} samples count as {max(size / ratio, 1):.1f}.",
            "shuffle over sources, DataLoader(..., shuffle=True), so that a mini-batch holds samples of many.",
        )


@check("PBN713", "warning", "normalization batch of one source", source=_LEAKAGE, needs=("batch",))
def one_source(subject: Subject) -> Iterator[Problem]:
    """Regions of one image, frames of one clip: what the head normalizes together belongs together."""
    step = subject.observe(TrainingStep)
    layers = [
        call.layer for call in step.calls
        if step.samples == 1 and call.num_samples > 1 and call.by_batch and is_batch_norm(subject.norms[call.layer])
    ]  # fmt: skip
    if layers:
        yield Problem(
            "the mini-batch has one sample, and what they normalize together are parts of it: their statistics tell of "
            "each part what the others are.",
            "mini-batches of several samples; ShuffleBN(head) over ranks; or freeze(model, ..., affine=True).",
            list(dict.fromkeys(layers)),
        )


def _expected_labels(labels: Tensor, sizes: list[int]) -> float:
    """How many different labels mini-batches of these sizes would hold in all, if their samples were shuffled."""
    total = len(labels)
    counts = labels.unique(return_counts=True)[1].double()
    expected = 0.0
    for size in sizes:
        # A label is missing with probability C(total - count, size) / C(total, size).
        rest = total - counts
        log_missing = (
            torch.lgamma(rest + 1) - torch.lgamma((rest - size).clamp(min=0) + 1)
            + math.lgamma(total - size + 1) - math.lgamma(total + 1)
        )  # fmt: skip
        expected += float((1 - torch.where(rest >= size, log_missing.exp(), 0.0)).sum())
    return expected


def _between_to_within(inputs: list[Tensor]) -> float:
    """Variance of the means of mini-batches over what independent samples would give, the mean over features.

    1 for independent samples, the size of mini-batches for equal ones. The features of a sample are the means and
    standard deviations of its channels.
    """
    usable = [x for x in inputs if x.dtype in ops.DTYPES and len(x) == len(inputs[0]) and x.numel()]
    features = torch.stack([_features(x) for x in usable])  # (B, N, F)
    if features.shape[0] < 2 or features.shape[1] < 2:
        return 1.0
    within = features.var(1).mean(0)
    between = features.mean(1).var(0) * features.shape[1]
    varies = within + between > 0
    ratio = between[varies] / within[varies].clamp(min=1e-12)
    return float(ratio.mean()) if bool(varies.any()) else 1.0


@torch.no_grad()
def _features(x: Tensor) -> Tensor:
    """``(N, C, *)`` to ``(N, 2 C)``."""
    count, mean, m2 = ops.moments(x.detach(), torch.arange(len(x), device=x.device), len(x))
    return torch.cat([mean, (m2 / count.unsqueeze(-1)).sqrt()], 1).cpu()
