"""Examples that run as they are; benchmarks share their models and data."""
