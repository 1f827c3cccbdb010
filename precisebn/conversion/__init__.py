"""Conversion: other layers in the places of BatchNorm layers, and back."""
