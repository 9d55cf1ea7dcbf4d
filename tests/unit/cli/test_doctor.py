"""`distmuon doctor` names what is known to be bad, and nothing else."""

from __future__ import annotations

import json
import platform
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon.cli import doctor_rules
from distmuon.cli.doctor import as_markdown
from distmuon.cli.doctor_facts import PACKAGES, Facts, Gpu, gather_facts
from distmuon.cli.doctor_rules import RULES, diagnose, numbers
from distmuon.cli.main import main

ROOT = Path(__file__).parents[3]
VERSIONS = {
    **dict.fromkeys(PACKAGES, "1.0"),
    "torch": "2.13.0+cpu",
    "accelerate": "1.15.2",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
}
OLD_GPU = Gpu("T4", (7, 5), 16 * 2**30)
GPU = Gpu("H100", (9, 0), 80 * 2**30)
# A machine with nothing wrong, as far as a CPU can have that.
GOOD = Facts(
    python="3.11.9",
    system="Linux",
    versions=VERSIONS,
    cores=8,
    threads=2,
    cpu="AVX512",
    bfloat16=True,
    matmul="ieee",
    cuda="",
    nccl="",
    gpus=(),
    backends=("gloo",),
    named=True,
    variables={"OMP_NUM_THREADS": "2"},
)


def with_version(**versions: str) -> dict[str, Any]:
    return {"versions": VERSIONS | versions}


# What is changed, the level, and words of what is said: every rule at least once.
BAD: list[tuple[dict[str, Any], str, str]] = [
    (with_version(torch="2.8.0"), "problem", "older than 2.9"),
    (with_version(torch="2.14.0"), "warning", "torch 2.14.0 has not been tested"),
    (with_version(numpy=""), "problem", "numpy is missing"),
    (with_version(deepspeed="0.18.9"), "problem", "DeepSpeed 0.18.9 is older than 0.19"),
    (with_version(deepspeed="0.20.1"), "warning", "0.19.8 has"),
    (with_version(accelerate="1.16.0"), "warning", "accelerate 1.16.0 is outside"),
    (with_version(accelerate="1.9.0"), "warning", "accelerate 1.9.0 is outside"),
    (with_version(transformers="4.57.1"), "warning", "transformers>=5.23,<5.24"),
    (with_version(safetensors=""), "note", "distmuon[checkpoint]"),
    (with_version(omegaconf=""), "note", "distmuon[train]"),
    ({"variables": {}}, "note", "OMP_NUM_THREADS is not set"),
    (
        {"variables": {"LOCAL_WORLD_SIZE": "8"}},
        "warning",
        "8 ranks of 2 threads on 8 cores. Set OMP_NUM_THREADS=1.",
    ),
    ({"bfloat16": False}, "warning", "no bfloat16 products"),
    ({"named": False}, "problem", "GLOO_SOCKET_IFNAME"),
    ({"matmul": "tf32"}, "note", "computed in tf32"),
    ({"cuda": "12.8"}, "warning", "sees no GPU"),
    ({"gpus": (OLD_GPU,), "backends": ("gloo", "nccl")}, "note", "older than Ampere"),
    ({"gpus": (GPU,)}, "problem", "no nccl"),
    ({"gpus": (GPU,), "backends": ("gloo", "nccl")}, "warning", "Run `distmuon verify`"),
    (
        {"variables": {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}},
        "warning",
        "Unset it",
    ),
]


@pytest.mark.parametrize(("change", "level", "words"), BAD)
def test_what_is_bad_is_named_with_its_cure(change: dict[str, Any], level: str, words: str) -> None:
    before = diagnose(GOOD)
    new = [found for found in diagnose(replace(GOOD, **change)) if found not in before]
    said = [found for found in new if words in f"{found.what} {found.cure}"]
    assert [found.level for found in said] == [level], new
    assert all(found.cure for found in new)


def test_a_good_machine_has_no_problem_and_every_rule_has_spoken() -> None:
    assert {found.level for found in diagnose(GOOD)} <= {"note"}
    spoken = {
        rule.__name__
        for rule in RULES
        for change, _, _ in BAD
        if list(rule(replace(GOOD, **change))) != list(rule(GOOD))
    }
    assert spoken == {rule.__name__ for rule in RULES}


def test_the_worst_comes_first() -> None:
    found = diagnose(replace(GOOD, named=False, bfloat16=False, matmul="tf32"))
    levels = [finding.level for finding in found]
    assert levels == sorted(levels, key=["problem", "warning", "note"].index)
    assert levels[0] == "problem"


def test_the_versions_are_those_of_the_package_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        name: f"{name}>={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
        for name, (low, high) in doctor_rules.TESTED.items()
    }
    assert wanted["accelerate"] in extras["accelerate"]
    assert wanted["transformers"] in extras["hf"]
    assert f"torch>={'.'.join(map(str, doctor_rules.OLDEST_TORCH))}" in project["dependencies"]
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert numbers(pinned["torch"]) in doctor_rules.TESTED_TORCH


def test_the_report_of_this_machine_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    facts = gather_facts()
    assert facts.versions["torch"] == torch.__version__
    text = as_markdown(facts, diagnose(facts))
    assert f"| torch | {torch.__version__} |" in text
    assert "| backends | gloo" in text
    assert platform.node() not in text.split(), "a report says nothing about whose machine it is"
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        assert {line.count("|") for line in table.splitlines()} == {3}
    code = main(["doctor"])
    assert capsys.readouterr().out.strip() == text
    assert main(["doctor", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (code == 0)
    assert answer["facts"]["threads"] == torch.get_num_threads()
