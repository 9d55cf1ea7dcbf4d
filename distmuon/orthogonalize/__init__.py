"""Polar factors of matrices: Newton-Schulz in several forms, and exact. Pure tensors, no state."""

from distmuon.orthogonalize.api import Orthogonalized, orthogonalize, orthogonalize_checked

__all__ = ["Orthogonalized", "orthogonalize", "orthogonalize_checked"]
