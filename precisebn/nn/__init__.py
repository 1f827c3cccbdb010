"""Normalization modules: every remedy of "Rethinking 'Batch' in BatchNorm" as a drop-in for nn.BatchNorm."""

from precisebn.nn.batch_stat import BatchStatBN
from precisebn.nn.concat import ConcatSharedBN
from precisebn.nn.cycle import CycleBatchNormList, one_cycle
from precisebn.nn.domain import DomainSpecificBN
from precisebn.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from precisebn.nn.ghost import GhostBN
from precisebn.nn.multi_input import MultiInputSequential
from precisebn.nn.shuffle import ShuffleBN, batch_shuffle, batch_unshuffle
from precisebn.nn.sync import SyncBN, sync_group
from precisebn.nn.use_domain import use_domain

__all__ = [
    "BatchStatBN",
    "ConcatSharedBN",
    "CycleBatchNormList",
    "DomainSpecificBN",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBN",
    "MultiInputSequential",
    "SyncBN",
    "ShuffleBN",
    "batch_shuffle",
    "batch_unshuffle",
    "one_cycle",
    "sync_group",
    "use_domain",
]
