"""Sufficient statistics of BatchNorm: Moments, and the estimator of the populations of many layers at once."""
