"""What `distmuon bench` measures: rates of a machine, phases of a step, a contest of optimizers."""
