"""Runs of the real training command whose results are kept, so that nothing is trained twice.

A `Job` says what to run and a `Result` what came out: a line of a results file, found again by the
checksum of the configuration. Names and folders are no part of that.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from distmuon.training.metrics import StepMetrics, read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


@dataclass(frozen=True, slots=True)
class Job:
    """A training run to be made.

    Attributes:
        name: of its folder, without the seed.
        config: file in `configs/`.
        seed: of weights and batches.
        overrides: such as "optimizer.lr=0.01"; later ones win.
    """

    name: str
    config: str
    seed: int
    overrides: tuple[str, ...]

    def arguments(self) -> tuple[str, ...]:
        """What it is on the command line."""
        fixed = ("data.source=shakespeare", "sample.length=0", "run.save_every=0")
        return (*fixed, f"run.seed={self.seed}", *self.overrides)


def checksum(job: Job, ranks: int) -> str:
    """Name what a job trains, whatever its name and folder are.

    Args:
        job: the job.
        ranks: number of ranks.

    Returns:
        SHA-256 of what its file and its overrides say, and of the ranks.
    """
    file = yaml.safe_load((CONFIGS / job.config).read_text(encoding="utf-8"))
    said = {f"{name}.{key}": file[name][key] for name in file for key in file[name]}
    for override in job.arguments():
        key, _, value = override.partition("=")
        said[key] = yaml.safe_load(value)
    del said["run.name"]
    text = json.dumps({**said, "ranks": ranks}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Weight(NamedTuple):
    """What a trained matrix is like.

    Attributes:
        rms: root mean square of its elements.
        entropy: of its singular values; see `svd_entropy`.
    """

    rms: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run, a line of a results file.

    Attributes:
        config: from `checksum`.
        name: of the job.
        seed: of weights and batches.
        steps: optimizer steps.
        loss: mean training loss since the line of metrics before the last, nats per byte.
        validation: step and validation loss, nats per byte, of every validation.
        logits: step and largest attention logit of that step, where it was recorded.
        clipped: heads that QK-Clip scaled in the steps of `logits`.
        weights: of each matrix of the blocks by its name.
        optimizer_ms: mean over the lines of metrics, milliseconds, rank 0.
        wall_s: seconds of the whole command.
        ranks: number of ranks.
        torch: version.
        machine: processor architecture and system.
    """

    config: str
    name: str
    seed: int
    steps: int
    loss: float
    validation: tuple[tuple[int, float], ...]
    logits: tuple[tuple[int, float], ...]
    clipped: int
    weights: Mapping[str, Weight]
    optimizer_ms: float
    wall_s: float
    ranks: int
    torch: str
    machine: str

    @property
    def val_loss(self) -> float:
        """Validation loss after the last step, nats per byte."""
        return self.validation[-1][1]


def read_results(file: Path) -> dict[str, Result]:
    """Read a results file; the later of two lines with the same checksum counts.

    Args:
        file: JSON Lines; none is no results.
    """
    if not file.exists():
        return {}
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        read = json.loads(line)
        for key in ("validation", "logits"):
            read[key] = tuple((step, value) for step, value in read[key])
        read["weights"] = {key: Weight(*value) for key, value in read["weights"].items()}
        found[read["config"]] = Result(**read)
    return found


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how the runs are made.

    Attributes:
        folder: for the runs.
        results: the results file.
        ranks: number of ranks of every run.
    """

    folder: Path
    results: Path
    ranks: int

    def result(self, job: Job) -> Result:
        """Return the result of a job; make the run if there is none yet.

        Raises:
            subprocess.CalledProcessError: if the run fails.
        """
        key = checksum(job, self.ranks)
        known = read_results(self.results).get(key)
        if known is not None:
            return known
        name = f"{job.name}-seed{job.seed}"
        places = (f"run.name={name}", f"run.dir={self.folder}")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(self.ranks), str(ROOT / "launch" / "train.py")),
            *("--config", str(CONFIGS / job.config), *places),
            *("run.if_exists=replace", "run.resume=never", *job.arguments()),
        ]
        say(f"{name}: {' '.join(command)}")
        began = time.perf_counter()
        subprocess.run(command, check=True)
        lines = read_metrics(self.folder / name / "metrics.jsonl")
        clips = [(line.step, line.qk_clip) for line in lines if line.qk_clip is not None]
        result = Result(
            config=key,
            name=job.name,
            seed=job.seed,
            steps=lines[-1].step,
            loss=round(lines[-1].loss, 6),
            validation=_losses(lines),
            logits=tuple((step, round(clip["max_logit"], 3)) for step, clip in clips),
            clipped=sum(int(clip["clipped_heads"]) for _, clip in clips),
            weights=describe_weights(load_file(self.folder / name / "model.safetensors")),
            optimizer_ms=round(mean(line.optimizer_ms for line in lines), 3),
            wall_s=round(time.perf_counter() - began, 1),
            ranks=self.ranks,
            torch=torch.__version__,
            machine=f"{platform.machine()} {platform.system()}",
        )
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        return result


def _losses(lines: Sequence[StepMetrics]) -> tuple[tuple[int, float], ...]:
    return tuple((x.step, round(x.val_loss, 6)) for x in lines if x.val_loss is not None)


def describe_weights(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Describe the matrices of the transformer's blocks.

    Args:
        tensors: the model's, by name.
    """
    return {
        name: Weight(round(float(tensor.square().mean().sqrt()), 6), round(svd_entropy(tensor), 6))
        for name, tensor in sorted(tensors.items())
        if name.startswith("layers.") and tensor.ndim == 2
    }


def svd_entropy(matrix: Tensor) -> float:
    """Entropy of a matrix's squared singular values, as a share of the largest possible.

    `-1/log(n) * sum of p_i log(p_i)` with `p_i = s_i²/sum of s²` over the n singular values: 1
    where all are equal, 0 for rank one.

    Args:
        matrix: [m, n].

    Source: Moonlight, arXiv 2502.16982, section 3.4.
    """
    squares = torch.linalg.svdvals(matrix.double()).square()
    shares = squares / squares.sum()
    return float(torch.special.entr(shares).sum()) / math.log(len(shares))


def say(text: str) -> None:
    """Print at once, so that the output of the runs stands in between."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
