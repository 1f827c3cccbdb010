"""Benchmarks of precisebn against its peers; ``python -m benchmarks --help``."""
