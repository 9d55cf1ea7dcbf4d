"""Damaged and malicious checkpoints are refused by file name, on every rank, and never executed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmuon import checkpoint
from distmuon.checkpoint.files import Reader, hash_file
from distmuon.checkpoint.manifest import dump, read_manifest
from tests.distributed.checkpoint_runs import assert_same, build, snapshot, train
from tests.harness import run_ranks

SHARD = "rank-00001.safetensors"
# Left by whatever should never have been executed.
EXECUTED = "distmuon-executed"


class Malice:
    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / EXECUTED}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def flip_a_byte(folder: Path) -> str:
    content = bytearray((folder / SHARD).read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    (folder / SHARD).write_bytes(content)
    return f"{SHARD} is damaged: its SHA-256"


def truncate(folder: Path) -> str:
    size = (folder / SHARD).stat().st_size
    os.truncate(folder / SHARD, size - 1)
    return f"{SHARD} has {size - 1} bytes; the manifest says {size}"


def lose_a_shard(folder: Path) -> str:
    (folder / SHARD).unlink()
    return f"{SHARD} is missing"


def add_a_pickle(folder: Path) -> str:
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Malice(folder.parent)))
    return "optimizer.pt is not part of the checkpoint"


def put_a_pickle_in_a_shards_place(folder: Path) -> str:
    torch.save({"momentum_buffer": Malice(folder.parent)}, folder / SHARD)
    _forge(folder)
    return f"{SHARD} cannot be read"


def put_a_broken_shard_in_place(folder: Path) -> str:
    shutil.copy(folder / "rank-00000.safetensors", folder / SHARD)
    _forge(folder)
    return f"{SHARD} should hold"


def _forge(folder: Path) -> None:
    """Make the manifest agree with the file: sizes and hashes do not protect from malice."""
    manifest = read_manifest(folder)
    text = dump(manifest)
    for entry in manifest.files:
        file = folder / entry.name
        text = text.replace(entry.sha256, hash_file(file))
        text = text.replace(f'"size": {entry.size}', f'"size": {file.stat().st_size}')
    _rewrite(folder, json.loads(text))


def _rewrite(folder: Path, body: dict[str, Any]) -> None:
    from distmuon.checkpoint.manifest import _checksum

    body.pop("checksum")
    (folder / "manifest.json").write_text(json.dumps({**body, "checksum": _checksum(body)}))


def lose_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "has no manifest.json"


def truncate_the_manifest(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 700)
    return "manifest.json is damaged"


def change_a_digit_in_the_manifest(folder: Path) -> str:
    text = (folder / "manifest.json").read_text()
    assert '"lr": 0.005' in text
    (folder / "manifest.json").write_text(text.replace('"lr": 0.005', '"lr": 0.006'))
    return "manifest.json is damaged: its checksum"


def come_from_the_future(folder: Path) -> str:
    body = json.loads((folder / "manifest.json").read_text())
    _rewrite(folder, {**body, "format_version": 2})
    return "manifest.json has format version 2; this distmuon reads version 1"


def lead_out_of_the_folder(folder: Path) -> str:
    body = json.loads((folder / "manifest.json").read_text())
    body["files"][1]["name"] = f"../whole/{SHARD}"
    _rewrite(folder, body)
    return f"names '../whole/{SHARD}'"


def leave_a_gap(folder: Path) -> str:
    body = json.loads((folder / "manifest.json").read_text())
    body["tensors"]["optimizer/momentum_buffer/wide"]["pieces"].pop()
    _rewrite(folder, body)
    return "The pieces of optimizer/momentum_buffer/wide"


DAMAGES = (
    flip_a_byte,
    truncate,
    lose_a_shard,
    add_a_pickle,
    put_a_pickle_in_a_shards_place,
    put_a_broken_shard_in_place,
    lose_the_manifest,
    truncate_the_manifest,
    change_a_digit_in_the_manifest,
    come_from_the_future,
    lead_out_of_the_folder,
    leave_a_gap,
)


def save_one(folder: Path) -> None:
    model, optimizer = build(torch.float32, dist.group.WORLD, seed=1)
    train(model, optimizer, range(2))
    checkpoint.save(folder, optimizer, model=model, metadata={"step": 2})


def load_all(folder: Path) -> list[str]:
    messages = []
    model, optimizer = build(torch.float32, dist.group.WORLD, seed=2)
    train(model, optimizer, range(1))
    before = snapshot(model, optimizer)
    for damage in DAMAGES:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.load(folder / damage.__name__, optimizer, model=model)
        messages.append(str(caught.value))
        assert_same(snapshot(model, optimizer), before)
    # The ranks are still together.
    model, optimizer = build(torch.float32, dist.group.WORLD, seed=2)
    checkpoint.load(folder / "whole", optimizer, model=model)
    return messages


def test_i6_damage_is_refused_by_file_name_on_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(2, save_one, tmp_path / "whole")
    expected = []
    for damage in DAMAGES:
        folder = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "whole", folder)
        expected.append(damage(folder))
    for messages in run_ranks(3, load_all, tmp_path):
        for part, message in zip(expected, messages, strict=True):
            assert part in message, message
    assert not (tmp_path / EXECUTED).exists()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) is not None
    for damage, reason in zip(DAMAGES, expected, strict=True):
        if damage not in (flip_a_byte, put_a_pickle_in_a_shards_place, put_a_broken_shard_in_place):
            assert f"Passed over {tmp_path / damage.__name__}" in caplog.text
            assert reason in caplog.text
    assert not (tmp_path / EXECUTED).exists()


def test_latest_looks_into_the_files_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(2, save_one, tmp_path / "older")
    run_ranks(2, save_one, tmp_path / "newer")
    reason = flip_a_byte(tmp_path / "newer")
    assert checkpoint.latest(tmp_path) == tmp_path / "newer", "sizes and manifest are right"
    assert checkpoint.latest(tmp_path, check="content") == tmp_path / "older"
    assert reason in caplog.text
    flip_a_byte(tmp_path / "older")
    assert checkpoint.latest(tmp_path, check="content") is None


def test_the_pickle_of_these_tests_does_run_where_pickles_are_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path)))
    assert (tmp_path / EXECUTED).exists()


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    model, optimizer = build(torch.float32, None, seed=1)
    path = checkpoint.save(tmp_path / "a", optimizer, model=model).wait()
    (path / ".nfs0001").write_bytes(pickle.dumps(Malice(tmp_path)))
    checkpoint.load(path, optimizer, model=model)
    assert not (tmp_path / EXECUTED).exists()


def test_only_files_with_the_range_are_opened(tmp_path: Path) -> None:
    run_ranks(2, save_one, tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    name = "optimizer/momentum_buffer/wide"
    first, second = manifest.tensors[name].pieces
    whole = Reader(tmp_path / "a", manifest).whole(name).view(-1)
    (tmp_path / "a" / manifest.files[second.file].name).unlink()
    reader, part = Reader(tmp_path / "a", manifest), torch.empty(first.numel - 5)
    reader.read_into(name, 5, part)
    assert torch.equal(part, whole[5 : first.numel])
    with pytest.raises(checkpoint.CheckpointError, match=manifest.files[second.file].name):
        reader.read_into(name, 6, part)


def test_latest_goes_by_the_moment_of_saving_and_survives_a_clock_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    assert checkpoint.latest(tmp_path) is None
    for name in ("step-9", "step-10", "step-2"):
        monkeypatch.setattr("time.time_ns", lambda: 10**18)
        checkpoint.save(tmp_path / name, metadata={"name": name})
        assert checkpoint.latest(tmp_path) == tmp_path / name
    monkeypatch.setattr("time.time_ns", lambda: 10**17)
    checkpoint.save(tmp_path / "step-3")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-3"


def test_a_checkpoint_of_the_same_name_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    model, optimizer = build(torch.float32, None, seed=1)
    for step in range(2):
        train(model, optimizer, range(step, step + 1))
        checkpoint.save(tmp_path / "a", optimizer, model=model, metadata={"step": step})
    expected = snapshot(model, optimizer)
    model, optimizer = build(torch.float32, None, seed=2)
    assert checkpoint.load(tmp_path / "a", optimizer, model=model).metadata == {"step": 1}
    assert_same(snapshot(model, optimizer), expected)
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("It was a dark and stormy night.")
    for name, message in (("thesis", r"chapter-1\.tex is not part"), (".a", "hidden names")):
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.save(tmp_path / name, optimizer)
    assert (tmp_path / "thesis" / "chapter-1.tex").exists()


def test_links_to_checkpoints_are_read_but_neither_replaced_nor_counted(tmp_path: Path) -> None:
    """A link "last" was counted by keep_latest, renamed, and left behind under a hidden name."""
    _, optimizer = build(torch.float32, None, seed=1)
    link = tmp_path / "last"
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / f"step-{step}", optimizer, keep_latest=2)
        link.unlink(missing_ok=True)
        link.symlink_to(f"step-{step}")
    assert sorted(os.listdir(tmp_path)) == ["last", "step-2", "step-3"]
    checkpoint.load(link, optimizer)
    with pytest.raises(checkpoint.CheckpointError, match=r"symbolic link\. Save to .*step-3"):
        checkpoint.save(link, optimizer)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-2", "step-3"]
