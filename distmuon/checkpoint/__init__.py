"""Checkpoints that appear whole or not at all, and load on any number of ranks."""

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.folders import latest
from distmuon.checkpoint.loading import Loaded, load
from distmuon.checkpoint.saving import PendingSave, save

__all__ = ["CheckpointError", "Loaded", "PendingSave", "latest", "load", "save"]
