"""Freezing: a layer normalizes by its running statistics, which stand still, as its parameters do.

What is often mixed up with it is pausing, :mod:`precisebn.tracking`: a layer normalizes by the mini-batch, as in
training, and does not write its running statistics.
"""
