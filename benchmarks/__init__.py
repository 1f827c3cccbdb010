"""Benchmarks of precisebn against its peers; ``python -m benchmarks --help``."""

import os

# torch's profiler, by which memory and launches are counted, announces every start and stop below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
