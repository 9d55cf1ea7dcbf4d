"""Train the main job with each Newton-Schulz coefficient set: same steps, same lr, several seeds.

    python benchmarks/coefficients_ab.py

Every run is the real command. A set's runs stand in DIR/SET/; what is done is not done again. The
sets differ in the length of their updates (docs/numerics.md), so one lr is not the same step for
all; --lrs compares them at more than one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

from muon_vs_adamw import Bench, say


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/coefficients_ab"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sets", nargs="+", default=["keller", "polar_express", "p5"])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1.2e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    seeds = " | ".join(f"seed {seed}" for seed in options.seeds)
    lines = [f"| set, lr | {seeds} | mean | spread |", "|---" * (len(options.seeds) + 3) + "|"]
    for name in options.sets:
        bench = Bench(options.dir / name, options.ranks, [f"optimizer.ns_coefficients={name}"])
        bench.folder.mkdir(parents=True, exist_ok=True)
        for lr in options.lrs:
            losses = [bench.result("muon", lr=lr, seed=seed).val_loss for seed in options.seeds]
            cells = " | ".join(f"{loss:.4f}" for loss in losses)
            spread = max(losses) - min(losses)
            lines.append(f"| {name}, {lr:g} | {cells} | {mean(losses):.4f} | {spread:.4f} |")
    say("\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
