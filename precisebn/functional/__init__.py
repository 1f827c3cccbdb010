"""Batch normalization over groups: the two differentiable functions that all modules are made of.

:func:`batch_norm` normalizes a tensor, or several tensors that share statistics, each (group, channel) with its own
mean and variance. :func:`frozen_batch_norm` normalizes with statistics that are given: batch normalization at test
time, or with frozen layers.
"""

from precisebn.functional._batch_norm import batch_norm
from precisebn.functional._frozen_batch_norm import frozen_batch_norm

__all__ = ["batch_norm", "frozen_batch_norm"]
