"""Normalization modules: every remedy of "Rethinking 'Batch' in BatchNorm" as a drop-in for nn.BatchNorm."""

from precisebn.nn.batch_stat import BatchStatBN
from precisebn.nn.concat import ConcatSharedBN
from precisebn.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from precisebn.nn.ghost import GhostBN

__all__ = [
    "BatchStatBN",
    "ConcatSharedBN",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBN",
]
