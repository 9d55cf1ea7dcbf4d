"""The experiments of docs/experiments.md: their runs, tables and pictures.

    python -m benchmarks.experiments run                  # what is missing of all: hours
    python -m benchmarks.experiments run ratio normuon    # of some
    python -m benchmarks.experiments tables [NAME ...]    # from the results, nothing is trained
    python -m benchmarks.experiments figures [NAME ...]

Every run is the real command, `torchrun launch/train.py`. What is done is not done again: results
stand in benchmarks/results/experiments.jsonl with the configuration's checksum.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.experiment_figures import FIGURES
from benchmarks.experiment_jobs import SEEDS, Jobs, all_experiments
from benchmarks.experiment_tables import TABLES, Rows
from benchmarks.runs import ROOT, Bench, Result, checksum, read_results, say

RESULTS = ROOT / "benchmarks" / "results" / "experiments.jsonl"
IMAGES = ROOT / "docs" / "images"
RANKS = 2


def find_rows(jobs: Jobs, results: Mapping[str, Result]) -> Rows:
    """Collect what there is of an experiment.

    Args:
        jobs: of the experiment.
        results: by checksum.

    Returns:
        The results of each row in the order of the seeds; rows without any are left out.
    """
    found = {
        name: [results[key] for job in row if (key := checksum(job, RANKS)) in results]
        for name, row in jobs.items()
    }
    return {name: row for name, row in found.items() if row}


def image_path(name: str, folder: Path = IMAGES) -> Path:
    """Where an experiment's picture is."""
    return folder / f"experiment-{name.replace('_', '-')}.png"


def run(bench: Bench, jobs: Jobs) -> None:
    """Make what is missing, one seed of all rows before the next seed."""
    for seed in range(len(SEEDS)):
        for name, row in jobs.items():
            result = bench.result(row[seed])
            say(f"{name}, seed {result.seed}: {result.val_loss:.4f}")


def main() -> int:
    """Do what the command line says."""
    experiments = all_experiments()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "tables", "figures"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(experiments))
    parser.add_argument("--dir", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = options.names or list(experiments)
    for name in names:
        if name not in experiments:
            parser.error(f"unknown experiment {name!r}: choose from {', '.join(experiments)}")
    for name in names:
        if options.action == "run":
            run(Bench(options.dir, options.results, RANKS), experiments[name])
            continue
        rows = find_rows(experiments[name], read_results(options.results))
        if options.action == "tables":
            say("\n\n".join((f"### {name}", *TABLES[name](rows))) + "\n")
        else:
            IMAGES.mkdir(parents=True, exist_ok=True)
            FIGURES[name](rows).savefig(image_path(name))
            say(str(image_path(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
