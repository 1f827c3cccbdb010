"""Ranks: layers that know nothing of the other processes, or wait for such as are not there."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from precisebn._reports import counted
from precisebn.auditing.check import Problem, check
from precisebn.auditing.norms import batch_norms, is_live
from precisebn.auditing.remedies import MEASURE
from precisebn.auditing.subject import Subject
from precisebn.distributed import number_of_ranks
from precisebn.models.families import class_family
from precisebn.models.samples import num_samples

__all__ = ["plain_batch_norm_on_several_ranks", "synchronized_batch_norm_on_one_rank"]

# Below 16 samples the error of a ResNet-50 grows quickly (Wu & He 2018, arXiv:1803.08494, figure 1; arXiv:2105.07576,
# figure 4), and statistics of all ranks are worth their all-reduce.
_FEW_SAMPLES = 16


@check(
    "PBN551", "note", "plain BatchNorm on several ranks",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html",
)  # fmt: skip
def plain_batch_norm_on_several_ranks(subject: Subject) -> Iterator[Problem]:
    """Each rank normalizes by its own samples, and keeps its own statistics: a checkpoint holds those of one."""
    ranks = number_of_ranks()
    plain = [name for name, layer in batch_norms(subject).items() if is_live(layer) and not _is_synchronized(layer)]
    if ranks < 2 or not plain:
        return
    samples = num_samples(subject.batch) if subject.batch is not None else None
    few = samples is not None and samples < _FEW_SAMPLES
    of = f" of {counted(samples, 'sample')}" if samples is not None else ""
    broadcast = any(isinstance(m, DistributedDataParallel) and m.broadcast_buffers for m in subject.model.modules())
    whose = "rank 0's are broadcast to all" if broadcast else "a checkpoint has those of the rank that saves it"
    yield Problem(
        f"Each of {ranks} ranks normalizes by its own mini-batch{of} and tracks its own statistics; {whose}.",
        f"convert_sync_batchnorm(model) normalizes by the samples of all ranks; {MEASURE}, called on all ranks, "
        "measures what all of them saw.",
        plain,
        "warning" if few else None,
    )


@check(
    "PBN552", "note", "synchronized BatchNorm on one rank",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html",
)  # fmt: skip
def synchronized_batch_norm_on_one_rank(subject: Subject) -> Iterator[Problem]:
    """It does what a plain one does, is slower, and is understood by fewer exporters."""
    waiting = [name for name, layer in batch_norms(subject).items() if _is_synchronized(layer)]
    if waiting and number_of_ranks() < 2:
        yield Problem(
            "They synchronize over ranks, but torch.distributed is not initialized, or has one: they normalize by the "
            "samples of this process alone.",
            "torch.distributed.init_process_group(...) before training; convert_to_batchnorm(model) to deploy it.",
            waiting,
        )


def _is_synchronized(layer: nn.Module) -> bool:
    family = class_family(layer)
    return family is not None and family.synchronized
