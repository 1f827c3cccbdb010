"""precisebn: exact population statistics for BatchNorm."""

from precisebn._version import __version__
from precisebn.errors import (
    BatchFormatError,
    InputError,
    InsufficientDataError,
    NonFiniteStatisticsError,
    PreciseBNError,
    RankFailedError,
)
from precisebn.estimator import PopulationEstimator
from precisebn.functional import batch_norm
from precisebn.moments import Moments
from precisebn.report import LayerReport, UpdateReport
from precisebn.selection import get_bn_modules
from precisebn.update import adapt_bn_stats, update_bn_stats

__all__ = [
    "__version__",
    "BatchFormatError",
    "InputError",
    "InsufficientDataError",
    "LayerReport",
    "Moments",
    "NonFiniteStatisticsError",
    "PopulationEstimator",
    "PreciseBNError",
    "RankFailedError",
    "UpdateReport",
    "adapt_bn_stats",
    "batch_norm",
    "get_bn_modules",
    "update_bn_stats",
]
