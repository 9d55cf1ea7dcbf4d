"""Which runs each experiment of docs/experiments.md is made of: plain data.

All are the main job. Muon and AdamW share one learning rate where nothing else is said, the best of
those that AdamW was tried at, and Muon has the coefficients `p5`, whose updates have the root mean
square that their scaling says; `keller` those of the papers, whose are shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks.runs import Job

SEEDS = (0, 1, 2)
STEPS = 800
LR = 1.2e-2
ADAMW_LRS = (6e-3, 8.5e-3, 1.2e-2, 1.7e-2, 2.4e-2)
MUON_LRS = (1.2e-2, 2.4e-2, 4.8e-2)
SHORT = (280, 360, 416)
UPDATE_RMS = (0.05, 0.1, 0.2, 0.4, 0.8)
COEFFICIENTS = ("keller", "polar_express", "p5", "halley")
HIGH_LR = 0.1
THRESHOLD = 100.0
# Width of the main job's model, and one over the root of the mean over its matrices' elements of
# max(A, B): a third of them are in 64 x 64 matrices, two thirds in 64 x 256.
WIDTH = 64
MATCHED = round(((WIDTH + 2 * 4 * WIDTH) / 3) ** -0.5, 5)

# Groups of matrices by the last part of their modules' names.
KINDS = {
    "query": ("q_proj",),
    "QO": ("q_proj", "o_proj"),
    "KV": ("k_proj", "v_proj"),
    "MLP": ("up_proj", "down_proj"),
}

# Moonlight, arXiv 2502.16982. Table 8: validation loss, weight RMS of queries and of MLPs.
PAPER_UPDATE_RMS = {
    "AdamW": (3.679, 0.0101, 0.0125),
    "0.05": (3.503, 0.00574, 0.00801),
    "0.1": (3.374, 0.00844, 0.0127),
    "0.2": (3.325, 0.0157, 0.0235),
    "0.4": (3.314, 0.0295, 0.0451),
    "0.8": (3.543, 0.0723, 0.0873),
}
# Table 1: the same.
PAPER_RULES = {
    "Baseline": (2.812, 0.03586, 0.0252),
    "Update Norm": (2.789, 0.04918, 0.0501),
    "Adjusted LR": (2.789, 0.03496, 0.0489),
}

Jobs = Mapping[str, Sequence[Job]]


def adamw(lr: float, seed: int) -> Job:
    """AdamW at some learning rate."""
    overrides = (f"optimizer.lr={lr!r}", "train.eval_every=40")
    return Job(f"adamw-lr{lr:g}", "shakespeare-adamw.yaml", seed, overrides)


def muon(title: str, seed: int, /, **optimizer: object) -> Job:
    """Muon with some options of the section `optimizer`."""
    options: dict[str, object] = {"lr": LR, "ns_coefficients": "p5", **optimizer}
    overrides = (f"optimizer.{key}={value}" for key, value in options.items())
    return Job(title, "shakespeare.yaml", seed, (*overrides, "train.eval_every=40"))


def clipped(title: str, seed: int, threshold: float, /, **optimizer: object) -> Job:
    """Muon whose attention logits are looked at, and bounded if there is a threshold."""
    job = muon(title, seed, **optimizer)
    more = (f"qk_clip.threshold={threshold}", "train.log_every=10", "train.eval_every=20")
    return replace(job, overrides=(*job.overrides, *more))


def base(seed: int) -> Job:
    """Muon as it is, which all others are compared with."""
    return clipped("muon", seed, float("inf"))


def at_lr(lr: float, seed: int) -> Job:
    """Muon at some learning rate."""
    return base(seed) if lr == LR else muon(f"muon-lr{lr:g}", seed, lr=lr)


def shorter(steps: int, seed: int) -> Job:
    """Muon with a whole schedule in fewer steps."""
    job = muon(f"muon-{steps}-steps", seed)
    return replace(job, overrides=(*job.overrides, f"train.steps={steps}"))


def with_rms(rms: float, seed: int) -> Job:
    """Muon whose updates have another root mean square than 0.2."""
    scale = rms / 0.2
    return base(seed) if scale == 1 else muon(f"muon-rms{rms:g}", seed, update_scale=scale)


def with_coefficients(name: str, seed: int) -> Job:
    """Muon with a Newton-Schulz coefficient set."""
    return base(seed) if name == "p5" else muon(f"muon-{name}", seed, ns_coefficients=name)


def per_seed(make: Callable[..., Job], *values: object) -> Sequence[Job]:
    """One job for each seed."""
    return [make(*values, seed) for seed in SEEDS]


def shape_rules(coefficients: str) -> Jobs:
    """The three rules of Moonlight's table 1, by the names they have there.

    Args:
        coefficients: of Newton-Schulz.
    """
    given = {"ns_coefficients": coefficients}
    none = {"adjust_lr_fn": "none", "update_scale": round(0.2 * WIDTH**0.5, 5), **given}
    rules = {"Baseline": none, "Update Norm": {"adjust_lr_fn": "update_rms", **given}}
    jobs = {
        f"{rule}, {coefficients}": [
            muon(f"{rule.lower().replace(' ', '-')}-{coefficients}", seed, **options)
            for seed in SEEDS
        ]
        for rule, options in rules.items()
    }
    adjusted = per_seed(with_coefficients, coefficients)
    return {**jobs, f"Adjusted LR, {coefficients}": adjusted}


def all_experiments() -> dict[str, Jobs]:
    """Every experiment by its name: rows of a table, each with a job for each seed."""
    sqrt = per_seed(base)
    runaway = {"lr": HIGH_LR}
    return {
        "ratio": {
            **{f"AdamW, lr {lr:g}": per_seed(adamw, lr) for lr in ADAMW_LRS},
            **{f"Muon, lr {lr:g}": per_seed(at_lr, lr) for lr in MUON_LRS},
            **{f"Muon, {steps} steps": per_seed(shorter, steps) for steps in SHORT},
        },
        "update_rms": {
            "AdamW": per_seed(adamw, LR),
            **{f"{rms:g}": per_seed(with_rms, rms) for rms in UPDATE_RMS},
        },
        "shape_rules": {**shape_rules("p5"), **shape_rules("keller")},
        "entropy": {"AdamW": per_seed(adamw, LR), "Muon": sqrt},
        "max_dim": {
            "0.2·sqrt(max)": sqrt,
            f"0.2·max·{MATCHED:g}": [
                muon("max-dim-matched", seed, adjust_lr_fn="max_dim", update_scale=MATCHED)
                for seed in SEEDS
            ],
            "0.2·max": [muon("max-dim", seed, adjust_lr_fn="max_dim") for seed in SEEDS],
        },
        "coefficients": {name: per_seed(with_coefficients, name) for name in COEFFICIENTS},
        "normuon": {
            "Muon": sqrt,
            "NorMuon": [muon("normuon", seed, name="normuon") for seed in SEEDS],
        },
        "qk_clip": {
            f"lr {LR:g}": sqrt,
            f"lr {LR:g}, QK-Clip": [clipped("muon-clip", seed, THRESHOLD) for seed in SEEDS],
            f"lr {HIGH_LR:g}": [clipped("high", seed, float("inf"), **runaway) for seed in SEEDS],
            f"lr {HIGH_LR:g}, QK-Clip": [
                clipped("high-clip", seed, THRESHOLD, **runaway) for seed in SEEDS
            ],
        },
    }
