"""What `distmuon verify` does: checks of the optimizer where it is to run."""

from distmuon.selftest.lab import Lab, Mismatch, NotHere
from distmuon.selftest.run import CHECKS, Row, run_checks

__all__ = ["CHECKS", "Lab", "Mismatch", "NotHere", "Row", "run_checks"]
