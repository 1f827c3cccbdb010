"""Freezing and pausing: two things that are often mixed up.

**Freeze**: a layer normalizes by its running statistics, which stand still, as its parameters do.
**Pause**: a layer normalizes by the mini-batch as in training, and does not write its running statistics.
"""

from precisebn.freezing.freeze import freeze, frozen, unfreeze
from precisebn.freezing.parameters import trainable_parameters
from precisebn.freezing.pause import pause_tracking

__all__ = ["freeze", "frozen", "pause_tracking", "trainable_parameters", "unfreeze"]
