"""Where a run begins: at the start, in an interrupted run, or with another run's state.

[Note: which run goes on]
A run is finished when its folder has the final weights; a run that is not, and that nobody holds,
was interrupted. `auto` goes on with the newest folder of the name if that one was interrupted and
has a checkpoint, and otherwise begins a new folder: a finished run is never touched. torchrun gives
a job one name for all its restarts, so a job that is started again finds its own folder even if a
younger run of the same name exists, and begins in it anew if it had not saved anything yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distmuon import checkpoint
from distmuon.checkpoint import CheckpointError
from distmuon.checkpoint.manifest import read_manifest
from distmuon.training.config import Config, ConfigError, RunConfig
from distmuon.training.keys import describe_keys
from distmuon.training.metrics import MetricsError, StepMetrics, read_metrics
from distmuon.training.run_folder import (
    InUseError,
    RunFolder,
    existing_folders,
    folder_error,
    make_folder,
    write_config,
)

# What a checkpoint of a run has in its metadata.
METADATA = ("config", "progress", "schedule", "text")


@dataclass(frozen=True, slots=True)
class Change:
    """A configuration key that differs from the checkpoint's.

    Attributes:
        key: such as `train.steps`.
        saved: its value there.
        now: its value here.
    """

    key: str
    saved: object
    now: object


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: of the interrupted run that goes on; None makes a new one.
        checkpoint: with whose state; None begins at step 0.
        step: of that checkpoint.
        logged: step of the last line of metrics before it.
        saved_by: ranks that wrote the checkpoint.
        changes: what is configured otherwise than there.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    step: int = 0
    logged: int = 0
    saved_by: int = 0
    changes: tuple[Change, ...] = ()


def choose_start(config: Config, *, text: str, job: str | None, held: ExitStack) -> Start:
    """Find what the run begins with, and change nothing. Only rank 0 calls this.

    Args:
        config: of this run.
        text: fingerprint of its text.
        job: torchrun's name of this job.
        held: keeps the lock of an interrupted run that goes on.

    Raises:
        ConfigError: if there is no such checkpoint, it cannot be read, or does not fit.
    """
    run = config.run
    if run.resume == "never":
        return Start()
    try:
        found = _find_interrupted(run, job=job, held=held)
    except OSError as error:
        raise folder_error(run, error) from None
    if found is not None:
        folder, newest = found
        if newest is None:
            return Start(folder=folder.path)
        return _begin_with(newest, config, text=text, folder=folder.path)
    if run.resume == "auto":
        return Start()
    return _begin_with(_find_checkpoint(Path(run.resume)), config, text=text, folder=None)


def _find_interrupted(
    run: RunConfig, *, job: str | None, held: ExitStack
) -> tuple[RunFolder, Path | None] | None:
    """Find the folder to go on in and its newest checkpoint that is whole."""
    folders = existing_folders(run)
    own = [folder for folder in folders if job is not None and folder.job() == job][-1:]
    newest = folders[-1:] if run.resume == "auto" and folders[-1:] != own else []
    for folder in (*own, *newest):
        if folder.weights.exists():
            continue
        with ExitStack() as attempt:
            try:
                attempt.enter_context(folder.hold(patience="none"))
            except InUseError:
                continue
            # With a look into the files: where one is damaged, the checkpoint before it will do.
            path = checkpoint.latest(folder.checkpoints, check="content")
            if folder in own or (path is not None and _is_called(run.name, path)):
                held.push(attempt.pop_all())
                return folder, path
    return None


def _is_called(name: str, path: Path) -> bool:
    """Tell the second run of the name "x" from the first of the name "x-2"."""
    called: str = _read_metadata(path)[0]["config"]["run"]["name"]
    return called == name


def _find_checkpoint(path: Path) -> Path:
    """Take a checkpoint, or the newest one of a run."""
    if not path.is_dir():
        raise ConfigError(f"run.resume={path}: no such folder.", key="run.resume", entry="resume")
    return checkpoint.latest(RunFolder(path).checkpoints) or checkpoint.latest(path) or path


def _begin_with(path: Path, config: Config, *, text: str, folder: Path | None) -> Start:
    metadata, saved_by = _read_metadata(path)
    progress = metadata["progress"]
    use: Literal["go on", "fork"] = "fork" if folder is None else "go on"
    changes = tuple(compare_configs(metadata["config"], config))
    _refuse_changes(path, changes, use)
    if metadata["text"] != text and use == "go on":
        raise ConfigError(
            f"run.resume: {path} was trained on another text, so its position in it means nothing "
            "here. Give it the same data.path or data.source, or use run.resume=never.",
            key="run.resume",
            entry="resume",
        )
    _refuse_too_few_steps(path, progress["step"], config, metadata["config"], use)
    return Start(
        folder=folder,
        checkpoint=path,
        step=progress["step"],
        logged=progress["logged"],
        saved_by=saved_by,
        changes=changes,
    )


def _read_metadata(path: Path) -> tuple[Mapping[str, Any], int]:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        raise ConfigError(f"run.resume: {error}", key="run.resume", entry="resume") from None
    if any(key not in manifest.metadata for key in METADATA):
        raise ConfigError(
            f"run.resume: {path} is a checkpoint of another program: its metadata has "
            f"{sorted(manifest.metadata)}, a training run's {list(METADATA)}.",
            key="run.resume",
            entry="resume",
        )
    return manifest.metadata, manifest.world_size


def compare_configs(saved: Mapping[str, Any], config: Config) -> Iterator[Change]:
    """Yield the keys whose values differ, in the order of their declaration."""
    now, defaults = asdict(config), asdict(Config())
    for info in describe_keys():
        section, key = info.name.split(".")
        # A key that came after the checkpoint: it did what is now the default. And JSON, which the
        # checkpoint went through, knows no tuples.
        value, there = (
            list(each) if isinstance(each, tuple) else each
            for each in (now[section][key], saved.get(section, {}).get(key, defaults[section][key]))
        )
        if there != value:
            yield Change(info.name, there, value)


def _refuse_changes(path: Path, changes: tuple[Change, ...], use: Literal["go on", "fork"]) -> None:
    kinds = {info.name: info.on_resume for info in describe_keys()}
    allowed = ("free",) if use == "go on" else ("free", "fork")
    wrong = [change for change in changes if kinds[change.key] not in allowed]
    if not wrong:
        return
    told = ", ".join(f"{each.key} is {each.saved!r} there, {each.now!r} here" for each in wrong)
    fixed = any(kinds[change.key] == "fixed" for change in wrong)
    way_out = (
        "The saved state means nothing to another model or optimizer"
        if fixed
        else f"To begin a new run from that state as configured here: run.resume={path}"
    )
    raise ConfigError(
        f"run.resume: {path} belongs to a run with another configuration: {told}. {way_out}. To go "
        "on, set it back; to begin at step 0 in a new folder: run.resume=never.",
        key="run.resume",
        entry="resume",
    )


def _refuse_too_few_steps(
    path: Path, step: int, config: Config, saved: Mapping[str, Any], use: Literal["go on", "fork"]
) -> None:
    steps = config.train.steps
    # An interrupted run may have done all its steps and only lack its last files.
    done = step >= steps if use == "fork" else step >= steps != saved["train"]["steps"]
    if done:
        raise ConfigError(
            f"run.resume: {path} has done {step} steps already, so train.steps={steps} leaves "
            f"nothing to do. Set train.steps above {step}, or use run.resume=never.",
            key="train.steps",
            entry="resume",
        )


def open_folder(config: Config, start: Start, *, job: str | None, held: ExitStack) -> RunFolder:
    """Make or take over the run's folder, and hold it. Only rank 0 calls this.

    A folder that exists is never written into, except that an interrupted run goes on in its own,
    and that `run.if_exists=replace` removes the files of a run, and no others, before a new one.

    Raises:
        ConfigError: if the folder cannot be made, or a running process uses the one to replace.
    """
    try:
        folder = RunFolder(start.folder) if start.folder else _open_new(config.run, start, held)
        if start.checkpoint is None or start.folder is None:
            folder.clear()
        write_config(folder, config, job=job)
    except OSError as error:
        raise folder_error(config.run, error) from None
    return folder


def _open_new(run: RunConfig, start: Start, held: ExitStack) -> RunFolder:
    folder = make_folder(run)
    if start.checkpoint and folder.path.resolve() in start.checkpoint.resolve().parents:
        raise ConfigError(
            f"run.resume={run.resume}: run.if_exists=replace would remove the run that this one "
            "begins with. Use another run.name, or run.if_exists=number.",
            key="run.if_exists",
            entry="run-folder",
        )
    try:
        # Another run may just be looking whether this one, a moment old, was interrupted.
        patience: Literal["wait", "none"] = "none" if run.if_exists == "replace" else "wait"
        held.enter_context(folder.hold(patience=patience))
    except InUseError:
        raise ConfigError(
            f"run.if_exists=replace: a running process is writing to {folder.path}. Wait for it, "
            "or use another run.name.",
            key="run.if_exists",
            entry="run-folder",
        ) from None
    return folder


def earlier_metrics(start: Start) -> list[StepMetrics]:
    """Read the lines of metrics up to the checkpoint; those after it will be written again.

    Raises:
        ConfigError: if the file is damaged: going on would write it anew without them.
    """
    if start.checkpoint is None:
        return []
    folder = RunFolder(start.folder or start.checkpoint.resolve().parents[1])
    try:
        lines = read_metrics(folder.metrics)
    except OSError:
        return []
    except MetricsError as error:
        raise ConfigError(str(error)) from None
    return [line for line in lines if line.step <= start.step]
