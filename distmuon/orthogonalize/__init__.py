"""Polar factors of matrices: Newton-Schulz in several forms, and exact. Pure tensors, no state."""

from distmuon.orthogonalize.api import orthogonalize

__all__ = ["orthogonalize"]
