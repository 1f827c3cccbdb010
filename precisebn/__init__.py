"""precisebn: exact population statistics for BatchNorm, and modules for every choice of the batch."""

from precisebn._version import __version__
from precisebn.auditing.copies import check_copy
from precisebn.auditing.determinism import DeterminismReport, check_determinism
from precisebn.auditing.finding import Finding
from precisebn.auditing.report import AuditReport
from precisebn.auditing.run import audit
from precisebn.conversion.converters import (
    convert_batch_stat,
    convert_concat_shared,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_sync_batchnorm,
    convert_to_batchnorm,
)
from precisebn.conversion.engine import replace_batchnorm
from precisebn.conversion.shared_head import convert_shared_head
from precisebn.errors import (
    AuditError,
    BatchFormatError,
    CycleError,
    InputError,
    InsufficientDataError,
    NonFiniteStatisticsError,
    PreciseBNError,
    RankFailedError,
    RanksDifferError,
    UndoError,
)
from precisebn.freezing.freeze import freeze, frozen, unfreeze
from precisebn.freezing.parameters import trainable_parameters
from precisebn.functional import batch_norm, frozen_batch_norm
from precisebn.models.selection import get_bn_modules
from precisebn.ranks.check import check_ranks
from precisebn.ranks.merge import merge_rank_statistics
from precisebn.ranks.merge_report import MergeReport
from precisebn.ranks.report import RankReport
from precisebn.ranks.shard import shard_batchnorm
from precisebn.recalibration.recalibrated import recalibrated
from precisebn.recalibration.report import LayerReport, UpdateReport
from precisebn.recalibration.update import adapt_bn_stats, update_bn_stats
from precisebn.state.compare import diff_state
from precisebn.state.diff import StateDiff, TensorDiff
from precisebn.state.snapshot import StateSnapshot, snapshot
from precisebn.state.watch import watch_state
from precisebn.statistics.estimator import PopulationEstimator
from precisebn.statistics.moments import Moments
from precisebn.tracking.accumulate import accumulate_statistics
from precisebn.tracking.pause import pause_tracking

__all__ = [
    "__version__",
    "AuditError",
    "AuditReport",
    "BatchFormatError",
    "CycleError",
    "DeterminismReport",
    "Finding",
    "InputError",
    "InsufficientDataError",
    "LayerReport",
    "MergeReport",
    "Moments",
    "NonFiniteStatisticsError",
    "PopulationEstimator",
    "PreciseBNError",
    "RankFailedError",
    "RankReport",
    "RanksDifferError",
    "StateDiff",
    "StateSnapshot",
    "TensorDiff",
    "UndoError",
    "UpdateReport",
    "accumulate_statistics",
    "adapt_bn_stats",
    "audit",
    "batch_norm",
    "check_copy",
    "check_determinism",
    "check_ranks",
    "convert_batch_stat",
    "convert_concat_shared",
    "convert_cycle",
    "convert_domain_specific",
    "convert_frozen_batchnorm",
    "convert_ghost",
    "convert_shared_head",
    "convert_sync_batchnorm",
    "convert_to_batchnorm",
    "diff_state",
    "freeze",
    "frozen",
    "frozen_batch_norm",
    "get_bn_modules",
    "merge_rank_statistics",
    "pause_tracking",
    "recalibrated",
    "replace_batchnorm",
    "shard_batchnorm",
    "snapshot",
    "trainable_parameters",
    "unfreeze",
    "update_bn_stats",
    "watch_state",
]
