"""Ranks of a model: whether they hold the same tensors, and what makes them so."""
