"""`distmuon estimate` is within 5% of what the allocator of real ranks records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.memory import Measured, measure
from distmuon.cli.main import main
from distmuon.forecast.memory import KINDS, Kind
from distmuon.training.config_file import load_config
from tests.harness import run_ranks

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
LARGER = ("model.dim=64", "model.layers=2", "train.batch=12")
LIMIT = 0.05


def measure_here(kind: Kind, overrides: tuple[str, ...]) -> Measured:
    return measure(load_config(CONFIG, overrides), kind)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_estimated_within_five_percent(
    kind: Kind, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["estimate", str(CONFIG), *LARGER, f"--world-size={ranks}", "--device=cpu"]
    assert main([*arguments, "--json"]) == 0
    estimated = json.loads(capsys.readouterr().out)["bytes"][kind]
    found = run_ranks(ranks, measure_here, kind, LARGER)
    # The least of the ranks: their parts are equal, and a freeing by the backend's own thread is
    # not recorded, which can only add.
    held = min(each.held for each in found)
    needed = max(each.most - each.held for each in found)
    assert estimated["held"] == pytest.approx(held, rel=LIMIT)
    assert estimated["most"] == pytest.approx(held + needed, rel=LIMIT)


def test_the_table_has_what_is_held_and_what_a_step_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["estimate", "llama-3-70b", "--world-size", "64", "--reduce", "hook"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-3-70b on 64 ranks, the one that has most"
    cells = {line[:31].strip(): line[31:].split() for line in lines[3:]}
    assert cells["momentum"] == ["-", "-", "4.28", "GB"]
    # Two moments for all parameters; a 64th of them; and of the few that are AdamW's.
    assert cells["AdamW moments"] == ["564.43", "GB", "8.82", "GB", "262.83", "MB"]
    assert list(cells)[-1] == "most during a step"
