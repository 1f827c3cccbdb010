"""Tracking: when forwards in training mode write the running statistics, and when they do not."""
