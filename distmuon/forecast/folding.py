"""Many names of equal layers as one: `layers.{0..79}.mlp.up_proj.weight`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

# The numbers in a name, and in a folded name the sets of them, as sorted tuples.
_Numbers = tuple[int, ...]
_Sets = tuple[_Numbers, ...]
# A whole part of a dotted name.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def fold_names(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Write names that differ only in numbers as one, exactly: no name that is missing is covered.

    Args:
        names: Dotted names, each once.

    Returns:
        Each folded name and the indices of the names that it stands for, in order; the folded names
        in the order of their first.
    """
    by_pattern: defaultdict[str, dict[_Numbers, int]] = defaultdict(dict)
    for index, name in enumerate(names):
        pattern, numbers = _take_apart(name)
        by_pattern[pattern][numbers] = index
    folded: list[tuple[str, list[int]]] = []
    for pattern, places in by_pattern.items():
        products = _products(places)
        for sets in products:
            wanted = [frozenset(numbers) for numbers in sets]
            members = [
                place
                for numbers, place in places.items()
                if len(products) == 1 or all(map(_contains, wanted, numbers))
            ]
            folded.append((pattern.format(*map(_write, sets)), members))
    return sorted(folded, key=lambda pair: pair[1][0])


def _contains(numbers: frozenset[int], number: int) -> bool:
    return number in numbers


def _take_apart(name: str) -> tuple[str, _Numbers]:
    """The pattern of a name, for `str.format`, and its numbers."""
    words = name.replace("{", "{{").replace("}", "}}")
    return _NUMBER.sub("{}", words), tuple(map(int, _NUMBER.findall(words)))


def _products(tuples: Iterable[_Numbers]) -> list[_Sets]:
    """Sets whose products are the tuples: equal rests share one set of first numbers."""
    by_first: defaultdict[int, list[_Numbers]] = defaultdict(list)
    for numbers in tuples:
        if not numbers:
            return [()]
        by_first[numbers[0]].append(numbers[1:])
    by_rest: defaultdict[_Sets, list[int]] = defaultdict(list)
    for first, rests in by_first.items():
        for rest in _products(rests):
            by_rest[rest].append(first)
    return [(tuple(sorted(firsts)), *rest) for rest, firsts in by_rest.items()]


def _write(numbers: _Numbers) -> str:
    """Such as `7`, `{0..79}` or `{0..3,8,12..15}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    return f"{{{write_ranges(numbers)}}}"


def write_ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with runs of three and more as `first..last`.

    Args:
        numbers: Ascending, each once.
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = (f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return ",".join(words)
