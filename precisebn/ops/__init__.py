"""The operators that carry all of precisebn's arithmetic: one a file, of which this page hands on the names.

==============================  =============================================  ========================
operator                        gives                                          reads
==============================  =============================================  ========================
:func:`moments`                 count, mean, m2 per (group, channel)           x once
:func:`accumulate`              the same, merged into running accumulators     x once
``coefficients``                statistics and affine as center, scale, shift  tensors (G, C)
:func:`normalize`               (x - center) * scale + shift                   x once
:func:`track`                   running statistics, updated                    tensors (G, C)
:func:`backward_reduce`         sum dy, sum dy * (x - mean)                    dy, x once
``backward_coefficients``       the center, a, b, c below; the affine's        tensors (G, C)
                                gradients
:func:`backward_apply`          a * dy + b * (x - center) + c                  dy, x once
==============================  =============================================  ========================

Those that read tensors (G, C) alone do what a dozen operators of torch would: of a small layer these would take most of
the time, and on a GPU each is a launch. For the same reason the usual sequences of operators are operators themselves:

=======================  ===========================================================================================
``normalize_batch``      ``moments``, ``coefficients`` and ``normalize``
``normalize_and_track``  ``normalize_batch`` and ``track``
``backward_batch``       ``backward_reduce``, ``backward_coefficients`` and ``backward_apply``
``backward_frozen``      the same where the statistics are constants
=======================  ===========================================================================================

An operator's file (``moments.py`` of ``moments``) holds its schema, which stands nowhere else, its wrapper with the
checks of what users pass, its fallback in plain PyTorch, which is its specification and runs wherever a kernel is
missing, the shapes of its results, and its derivative. :mod:`~precisebn.ops.registry` makes them known to torch;
kernels, in ``csrc/cpu`` and ``csrc/cuda``, register themselves. Callers never ask which runs; :func:`backend` tells.

The wrappers are for users. The library itself calls ``raw.NAME``, without checks and derivatives, or
``differentiable.NAME``, with derivatives alone.
"""

from precisebn.ops.accumulate import accumulate
from precisebn.ops.backend import Backend, backend
from precisebn.ops.backward_apply import backward_apply
from precisebn.ops.backward_reduce import backward_reduce
from precisebn.ops.checks import DTYPES, check_input, compute_dtype
from precisebn.ops.moments import moments
from precisebn.ops.normalize import normalize
from precisebn.ops.operator import differentiable, raw
from precisebn.ops.track import track

__all__ = [
    "DTYPES",
    "Backend",
    "accumulate",
    "backend",
    "backward_apply",
    "backward_reduce",
    "check_input",
    "compute_dtype",
    "differentiable",
    "moments",
    "normalize",
    "raw",
    "track",
]
