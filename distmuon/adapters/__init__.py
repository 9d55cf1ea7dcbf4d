"""distmuon under other frameworks; each module imports its own framework only."""
