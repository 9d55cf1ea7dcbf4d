"""Every Python block of the documentation runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.code_blocks import Block, PageError, find_blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LIMIT_SECONDS = 120

# As torchrun would start a single rank, so that a block may call init_process_group.
ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "OMP_NUM_THREADS": "1",
}


def run_in_its_own_process(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs" / "code_blocks.py"), str(page)],
        cwd=folder,
        env={**os.environ, **ONE_RANK, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_page_runs(page: Path, tmp_path: Path) -> None:
    if all(block.not_run for block in find_blocks(page.read_text(), page.name)):
        pytest.skip("no Python to run")
    done = run_in_its_own_process(page, tmp_path)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)


def test_blocks_share_a_namespace_and_a_failure_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\ny = x + 1\nassert y == 3\n```\n")
    done = run_in_its_own_process(page, tmp_path)
    assert done.returncode == 1
    assert f'File "{page}", line 9' in done.stderr
    assert "assert y == 3" in done.stderr


@pytest.mark.parametrize(("said", "status"), [("1\n2", 0), ("1\n3", 1)])
def test_printed_output_is_compared(tmp_path: Path, said: str, status: int) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nprint(1)\nprint(2)\n```\nprints\n```text output\n{said}\n```\n")
    done = run_in_its_own_process(page, tmp_path)
    assert done.returncode == status
    if status:
        assert "page.md:2: the block prints something else" in done.stderr
        assert "- 3\n+ 2" in done.stderr


def test_a_block_may_start_a_process_group(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    code = "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
    page.write_text(f"```python\n{code}assert dist.get_world_size() == 1\n```\n")
    done = run_in_its_own_process(page, tmp_path)
    assert done.returncode == 0, done.stderr


def test_blocks_are_found_with_lines_and_reasons() -> None:
    page = (
        "```bash\nls\n```\n"
        "```python\na = 1\n```\n"
        "- item\n  ```python no-run: needs two nodes\n  b = 2\n  ```\n"
        "````markdown\n```python\nnot code\n```\n````\n"
    )
    assert find_blocks(page, "page.md") == [
        Block(5, "a = 1"),
        Block(9, "b = 2", "needs two nodes"),
    ]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("text\n```python no-run\nx\n```\n", r"page\.md:2: .*no-run: why"),
        ("```python no-run:\nx\n```\n", r"page\.md:1"),
        ("```python skip\nx\n```\n", r"page\.md:1: `python skip`"),
        ("```py\nx\n```\n", "write `python`, not `py`"),
        ("```text output\nx\n```\n", r"page\.md:1: no block above"),
        ("```python\nx\n", r"page\.md:1: this fence is never closed"),
    ],
)
def test_a_block_is_never_left_out_by_accident(page: str, message: str) -> None:
    with pytest.raises(PageError, match=message):
        find_blocks(page, "page.md")
