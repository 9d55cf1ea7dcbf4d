"""Names of equal layers become one, and one name stands for exactly its parameters."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from distmuon.forecast.folding import fold_names, write_ranges


def test_layers_and_experts_fold_into_one_name() -> None:
    names = [f"layers.{i}.experts.{e}.up" for i in range(1, 4) for e in range(8)]
    assert fold_names(["head", *names]) == [
        ("head", [0]),
        ("layers.{1..3}.experts.{0..7}.up", list(range(1, 25))),
    ]


def test_a_layer_that_differs_has_a_line_of_its_own() -> None:
    names = ["layers.0.up", "layers.1.up", "layers.1.down", "layers.2.up", "layers.2.down"]
    assert fold_names(names) == [("layers.{0..2}.up", [0, 1, 3]), ("layers.{1,2}.down", [2, 4])]
    # 0.0 and 0.1 and 1.0, but no 1.1: no single name covers these three.
    assert [name for name, _ in fold_names(["a.0.b.0", "a.0.b.1", "a.1.b.0"])] == [
        "a.0.b.{0,1}",
        "a.1.b.0",
    ]


def test_ranges() -> None:
    assert write_ranges([0, 1, 2, 3, 8, 10, 11]) == "0..3,8,10,11"
    assert write_ranges([5]) == "5"


def expand(name: str) -> set[str]:
    parts = re.split(r"(\{[^}]*\})", name)
    choices = []
    for part in parts:
        if not part.startswith("{"):
            choices.append([part])
            continue
        numbers: list[str] = []
        for word in part[1:-1].split(","):
            first, _, last = word.partition("..")
            numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers)
    return {"".join(chosen) for chosen in itertools.product(*choices)}


@given(st.sets(st.tuples(st.sampled_from("xy"), st.integers(0, 4), st.integers(0, 3)), min_size=1))
def test_folded_names_cover_all_names_once_and_no_others(places: set[tuple[str, int, int]]) -> None:
    names = [f"{kind}.{i}.w.{j}.weight" for kind, i, j in sorted(places)]
    covered: list[str] = []
    for folded, members in fold_names(names):
        assert expand(folded) == {names[index] for index in members}
        covered += expand(folded)
    assert sorted(covered) == sorted(names)
