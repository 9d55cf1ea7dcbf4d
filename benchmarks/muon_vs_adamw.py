"""Compare Muon with AdamW, both under ZeRO-1, at the same number of steps.

    python benchmarks/muon_vs_adamw.py

1. AdamW with each learning rate, first seed: the best of them must not be the smallest or largest.
2. AdamW at its best learning rate, all seeds.
3. Muon at that same learning rate, all seeds; Muon's own is not searched for.

Every run is the real command, `torchrun launch/train.py`. What is done is not done again: results
stand in DIR/results.jsonl with the configuration's checksum. The exit code is 1 if the mean gap is
not larger than --gap. The claim is per step; a Muon step costs more time than one of AdamW.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from distmuon.training.config_file import load_config, to_yaml
from distmuon.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"muon": "shakespeare.yaml", "adamw": "shakespeare-adamw.yaml"}


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run, a line of results.jsonl.

    Attributes:
        config: SHA-256 of the resolved configuration and the number of ranks.
        optimizer: "muon" or "adamw".
        lr: peak learning rate.
        seed: of weights and batches.
        steps: optimizer steps.
        val_loss: at the last step, nats per byte.
        optimizer_ms: mean over the logged intervals, milliseconds, rank 0.
        wall_s: seconds of the whole command.
        ranks: number of ranks.
        commit: of the checkout, with "-dirty" if it was changed.
        torch: version.
        machine: processor architecture and system.
    """

    config: str
    optimizer: str
    lr: float
    seed: int
    steps: int
    val_loss: float
    optimizer_ms: float
    wall_s: float
    ranks: int
    commit: str
    torch: str
    machine: str


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how the runs are made.

    Attributes:
        folder: for the runs and the results.
        ranks: number of ranks of every run.
        overrides: configuration keys for every run.
    """

    folder: Path
    ranks: int
    overrides: Sequence[str]

    def result(self, optimizer: str, *, lr: float, seed: int) -> Result:
        """Return the result of a run; make the run if there is none yet."""
        config = ROOT / "configs" / CONFIGS[optimizer]
        name = f"{optimizer}-lr{lr:g}-seed{seed}"
        overrides = (
            f"run.name={name}",
            f"run.dir={self.folder}",
            "run.if_exists=replace",
            "run.resume=never",
            "run.save_every=0",
            f"run.seed={seed}",
            f"optimizer.lr={lr!r}",
            "data.source=shakespeare",
            "sample.length=0",
            *self.overrides,
        )
        resolved = to_yaml(load_config(config, overrides)) + f"ranks: {self.ranks}\n"
        checksum = hashlib.sha256(resolved.encode()).hexdigest()
        for known in self._known():
            if known.config == checksum:
                return known
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(self.ranks), str(ROOT / "launch" / "train.py")),
            *("--config", str(config), *overrides),
        ]
        say(f"{name}: {' '.join(command)}")
        began = time.perf_counter()
        subprocess.run(command, check=True)
        lines = read_metrics(self.folder / name / "metrics.jsonl")
        last = lines[-1]
        assert last.val_loss is not None
        result = Result(
            config=checksum,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            steps=last.step,
            val_loss=last.val_loss,
            optimizer_ms=mean(line.optimizer_ms for line in lines),
            wall_s=time.perf_counter() - began,
            ranks=self.ranks,
            commit=git_commit(),
            torch=torch.__version__,
            machine=f"{platform.machine()} {platform.system()}",
        )
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        return result

    @property
    def _file(self) -> Path:
        return self.folder / "results.jsonl"

    def _known(self) -> list[Result]:
        if not self._file.exists():
            return []
        lines = self._file.read_text(encoding="utf-8").splitlines()
        return [Result(**json.loads(line)) for line in lines]


def git_commit() -> str:
    """Name the commit that is checked out."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def say(text: str) -> None:
    """Print at once, so that the output of the runs stands in between."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sweep_table(results: Sequence[Result]) -> str:
    """Format AdamW's losses at each learning rate as Markdown."""
    head = "| AdamW lr | " + " | ".join(f"{result.lr:g}" for result in results) + " |"
    rule = "|---" * (len(results) + 1) + "|"
    row = "| val loss | " + " | ".join(f"{result.val_loss:.4f}" for result in results) + " |"
    return "\n".join((head, rule, row))


def seeds_table(adamw: Sequence[Result], muon: Sequence[Result]) -> str:
    """Format the losses of both optimizers at every seed as Markdown."""
    seeds = " | ".join(f"seed {result.seed}" for result in adamw)
    lines = [f"| val loss | {seeds} | mean | spread |", "|---" * (len(adamw) + 3) + "|"]
    gaps = [a.val_loss - m.val_loss for a, m in zip(adamw, muon, strict=True)]
    rows = {
        f"AdamW, lr {adamw[0].lr:g}": [result.val_loss for result in adamw],
        f"Muon, lr {muon[0].lr:g}": [result.val_loss for result in muon],
        "gap": gaps,
    }
    for name, values in rows.items():
        cells = " | ".join(f"{value:.4f}" for value in values)
        spread = max(values) - min(values)
        lines.append(f"| {name} | {cells} | {mean(values):.4f} | {spread:.4f} |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/muon_vs_adamw"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lrs", type=float, nargs="+", default=[6e-3, 1.2e-2, 2.4e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage", choices=("sweep", "all"), default="all")
    parser.add_argument("--gap", type=float, default=0.10, help="nats per byte")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.dir, options.ranks, options.set)

    rates = sorted(options.lrs)
    first = options.seeds[0]
    sweep = [bench.result("adamw", lr=lr, seed=first) for lr in rates]
    say("\n" + sweep_table(sweep))
    best = min(sweep, key=lambda result: result.val_loss)
    if best.lr in (rates[0], rates[-1]):
        say(f"AdamW's best lr {best.lr:g} is the last one tried on its side: try further --lrs.")
        return 1
    if options.stage == "sweep":
        return 0
    adamw = [bench.result("adamw", lr=best.lr, seed=seed) for seed in options.seeds]
    muon = [bench.result("muon", lr=best.lr, seed=seed) for seed in options.seeds]
    say("\n" + seeds_table(adamw, muon))
    gap = mean(result.val_loss for result in adamw) - mean(result.val_loss for result in muon)
    say(f"\ngap {gap:.4f} nats per byte at step {best.steps}, required more than {options.gap:g}")
    return 0 if gap > options.gap else 1


if __name__ == "__main__":
    sys.exit(main())
