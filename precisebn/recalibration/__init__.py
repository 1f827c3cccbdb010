"""Recalibration: running statistics replaced by the exact statistics of given data."""
