"""Links between the pages of the repository lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\((?P<target>[^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(?P<title>.+)$", re.MULTILINE)
_TEST = re.compile(r"`(?P<path>tests/[\w/]+\.py)(?:::(?P<name>\w+))?`")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.finditer(_CODE.sub("", page.read_text())):
        path, _, anchor = link["target"].partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        if not target.exists():
            yield f"{page.name} links to {link['target']}, which does not exist"
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target):
            yield f"{page.name} links to {link['target']}, which has no such heading"


def missing_tests(page: Path) -> Iterator[str]:
    for found in _TEST.finditer(page.read_text()):
        file = ROOT / found["path"]
        if not file.exists():
            yield f"{page.name} names {found['path']}, which does not exist"
        elif found["name"] and f"def {found['name']}(" not in file.read_text():
            yield f"{page.name} names {found['name']}, which {found['path']} does not have"


def _anchors(page: Path) -> set[str]:
    titles = (found["title"].strip().lower() for found in _HEADING.finditer(page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [each for page in pages for each in broken_links(page)]
    assert not broken, "\n".join(broken)


def test_tests_that_are_named_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    missing = [each for page in pages for each in missing_tests(page)]
    assert not missing, "\n".join(missing)


def test_missing_tests_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`tests/docs/test_links.py::test_missing_tests_are_noticed` `tests/docs/gone.py`\n"
        "`tests/docs/test_links.py::test_gone`\n"
    )
    assert [each.split(",")[0] for each in missing_tests(page)] == [
        "page.md names tests/docs/gone.py",
        "page.md names test_gone",
    ]


def test_broken_links_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One `step`, traced\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#one-step-traced) [c](https://example.org/none)\n"
        "[d](gone.md) [e](there.md#two) `[f](gone.md)`\n"
    )
    assert [each.split(",")[0] for each in broken_links(page)] == [
        "page.md links to gone.md",
        "page.md links to there.md#two",
    ]
