"""The command `distmuon`: one module per command, each with `add_parser`, listed in `main`."""
