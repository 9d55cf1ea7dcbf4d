"""GPU kernels written in Triton, each with a plain torch form that is used wherever they are not.

Triton is optional. The modules whose names end in `_triton` import it, and are themselves imported
only when a kernel is about to run.
"""
