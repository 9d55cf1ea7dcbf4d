"""docs/errors.md, the entries of distmuon/errors.py and the messages of the package agree.

Looks at the source: every place that makes an exception or a warning for a user names an entry of
the page, the page has a heading for each, and none stands there that no message names.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from distmuon.checkpoint import CheckpointError
from distmuon.errors import PAGE, Entry, see, with_entry
from distmuon.failure import RankFailure, Topic, Verdict

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / PAGE).read_text()
SECTIONS = {
    part.partition("\n")[0].strip(): part.partition("\n")[2]
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
}

# Files that do not name their entries yet. Only ever shorter.
NOT_YET: frozenset[str] = frozenset()

# Words in a row by which a message is known again.
RUN = 3
# Their constructors name an entry, so the places that raise them need not.
NAMES_ITS_OWN = (
    "CheckpointError",
    "CommandError",
    "ConfigError",
    "MetricsError",
    "RankFailure",
    "SourceError",
)
# Never seen by a user: a bug, caught at once, or argparse's own wrapping.
NOT_FOR_USERS = ("AssertionError", "InUseError", "ArgumentTypeError", "SystemExit")
# The system's own error, which is caught and told with the path; and Python's for an unknown name.
WITHIN = {
    "distmuon/checkpoint/folders.py": ("OSError",),
    "distmuon/__init__.py": ("AttributeError",),
}


def built_in(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def names_an_entry(node: ast.AST) -> bool:
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("see", "with_entry")
        for call in ast.walk(node)
    )


def own_exceptions(tree: ast.Module) -> set[str]:
    """Exceptions that a file defines."""
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Failure", "Warning"))
    }


def unnamed(path: str, text: str, own: set[str]) -> Iterator[str]:
    """Every place that makes an error or warning without naming an entry."""
    skipped = (*NAMES_ITS_OWN, *NOT_FOR_USERS, *WITHIN.get(path, ()))
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or names_an_entry(node):
            continue
        func = node.func
        if isinstance(func, ast.Name):
            name = func.id
            wrong = (built_in(name) or name in own) and name not in skipped
        elif isinstance(func, ast.Attribute):
            name = func.attr
            wrong = name in ("warn", "warning") or (name in own and name not in skipped)
        else:
            continue  # type(error)(f"... {error}") keeps what the message has
        if wrong:
            yield f"{path}:{node.lineno}: {name} names no entry: add see(...) to its message"


@cache
def package() -> dict[str, str]:
    paths = sorted((ROOT / "distmuon").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def named_by(text: str) -> Iterator[str]:
    """Entries that a file names: in calls, in `entry=` and its defaults, in tables of entries."""
    for node in ast.walk(ast.parse(text)):
        given: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            given += {"see": node.args[:1], "with_entry": node.args[1:]}.get(called, [])
            given += [keyword.value for keyword in node.keywords if keyword.arg == "entry"]
        elif isinstance(node, ast.arguments):
            pairs = zip(node.kwonlyargs, node.kw_defaults, strict=True)
            given += [default for argument, default in pairs if argument.arg == "entry"]
        elif isinstance(node, ast.AnnAssign) and "Entry" in ast.unparse(node.annotation):
            given += node.value.values if isinstance(node.value, ast.Dict) else []
        for each in given:
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                yield each.value


def test_every_message_names_an_entry() -> None:
    sources = package()
    assert len(sources) > 50, "the package was not found"
    own = {name for text in sources.values() for name in own_exceptions(ast.parse(text))}
    found = [
        each
        for path, text in sources.items()
        if path not in NOT_YET
        for each in unnamed(path, text, own)
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_list_of_files_that_do_not_is_no_longer_than_it_must_be() -> None:
    sources = package()
    own = {name for text in sources.values() for name in own_exceptions(ast.parse(text))}
    assert all(any(unnamed(path, sources[path], own)) for path in NOT_YET)


def test_the_page_has_the_entries_and_no_others() -> None:
    assert sorted(SECTIONS) == sorted(get_args(Entry))
    assert list(SECTIONS) == sorted(SECTIONS), "in the order of the alphabet"


@pytest.mark.parametrize("entry", get_args(Entry))
def test_an_entry_tells_symptom_cause_and_fix(entry: str) -> None:
    told = re.findall(r"^\*\*(Symptom|Cause|Fix)\.\*\* \S", SECTIONS[entry], re.MULTILINE)
    assert told == ["Symptom", "Cause", "Fix"]


@cache
def spoken() -> str:
    """The fixed parts of all strings of the package, one a line."""
    return "\n".join(
        node.value
        for text in package().values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.mark.parametrize("entry", get_args(Entry))
def test_the_symptoms_are_what_the_package_says(entry: str) -> None:
    symptom = SECTIONS[entry].partition("**Cause.**")[0]
    for quoted in re.findall(r"`([^`]+)`", symptom):
        words = quoted.strip(" .").split()
        # Between them stand names and numbers, which are not in the source.
        runs = [" ".join(words[at : at + RUN]) for at in range(len(words) - RUN + 1)]
        if len(words) > RUN + 1:
            assert any(run in spoken() for run in runs), f"no message says {quoted!r}"


def test_every_entry_is_named_by_a_message() -> None:
    sources = package()
    named = {entry for path, text in sources.items() for entry in named_by(text)}
    assert named == set(get_args(Entry))


def test_entries_are_found_where_they_are_named() -> None:
    text = """
raise ValueError("routing" + see("text"))
raise CheckpointError(f"{x}", entry="resume")
with_entry(message, "launch")
def __init__(self, message, *, key=None, entry="desync"): ...
TABLE: dict[str, Entry] = {"attach": "rank-late"}
"""
    assert sorted(named_by(text)) == ["desync", "launch", "rank-late", "resume", "text"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("raise ValueError('bad')", True),
        ("raise ValueError('bad' + see('routing'))", False),
        ("problem = RuntimeError(f'{x}')", True),
        ("warnings.warn('old', stacklevel=2)", True),
        ("_logger.warning('Passed over %s', x)", True),
        ("_logger.warning('Passed over %s%s', x, see('text'))", False),
        ("raise OwnError('bad')", True),
        ("raise loop.OwnError('bad')", True),
        ("raise type(error)(f'Group 1: {error}')", False),
        ("raise CheckpointError('bad')", False),
        ("raise AssertionError('cannot happen')", False),
        ("raise", False),
        ("raise problem from error", False),
    ],
)
def test_a_message_without_an_entry_is_noticed(text: str, wrong: bool) -> None:
    assert bool(list(unnamed("distmuon/x.py", text, {"OwnError", "CheckpointError"}))) == wrong


def test_errors_that_name_their_own_do_so_once() -> None:
    assert str(CheckpointError("gone", entry="checkpoint-mismatch")) == (
        "gone (docs/errors.md#checkpoint-mismatch)"
    )
    inner = f"gone{see('text')}"
    assert str(CheckpointError(f"rank 1: {inner}")) == f"rank 1: {inner}"
    assert with_entry("gone", "text") == inner
    verdict = Verdict((1,), "silent", "")
    late = RankFailure(3, Topic("gather"), verdict, "ranks [1] did not arrive.")
    assert str(late).endswith("(docs/errors.md#rank-late)")


def test_configuration_errors_name_an_entry() -> None:
    pytest.importorskip("omegaconf", reason="needs the extra distmuon[train]")
    from distmuon.training.config import ConfigError
    from distmuon.training.config_file import load_config

    with pytest.raises(ConfigError, match=r"\(docs/errors\.md#config\)$") as caught:
        load_config(None, ["train.stepz=3"])
    assert str(caught.value).count(PAGE) == 1
