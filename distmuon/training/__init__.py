"""The main job: train a language model on real text with Muon under ZeRO-1.

Uses the optimizer as any user does. Needs the extra `train` (`pip install 'distmuon[train]'`).
"""
