"""Checkpoints that appear whole or not at all, and load on any number of ranks."""

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.folders import latest
from distmuon.checkpoint.loading import Loaded, load
from distmuon.checkpoint.offline import consolidate, export, read_export, reshard, verify
from distmuon.checkpoint.saving import PendingSave, save

__all__ = [
    "CheckpointError",
    "Loaded",
    "PendingSave",
    "consolidate",
    "export",
    "latest",
    "load",
    "read_export",
    "reshard",
    "save",
    "verify",
]
