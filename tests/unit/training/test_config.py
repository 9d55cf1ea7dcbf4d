from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from distmuon.training.config import Config, ConfigError, Launch, TrainConfig
from distmuon.training.config_file import keys_help, load_config, to_yaml
from distmuon.training.data import check_batch
from distmuon.training.keys import describe_keys
from distmuon.training.main import main

ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("text", ["2e-2", "0.02", "2.0e-02", "+2E-2"])
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"optimizer:\n  lr: {text}\n")
    assert load_config(path).optimizer.lr == 0.02
    assert load_config(None, [f"optimizer.lr={text}"]).optimizer.lr == 0.02


def test_the_command_line_overrules_the_file_which_overrules_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 7\n  batch: 4\n")
    config = load_config(path, ["train.steps=8", "train.steps=9", "optimizer.betas=[0.8,0.9]"])
    assert (config.train.steps, config.train.batch, config.train.clip) == (9, 4, 1.0)
    assert config.optimizer.betas == (0.8, 0.9)


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None, ["data.path=a b.txt", "sample.prompt='x: #y'", "optimizer.ns_steps=7", "run.seed=3"]
    )
    assert config.data.path == "a b.txt"
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("train.lr=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("steps=1", "train.steps"),
        ("train.stesp=1", "train.steps"),
        ("trian.batch=1", "train.batch"),
        ("model.n_layers=1", "model.layers"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(override: str, suggestion: str) -> None:
    message = refusal(None, override)
    assert f"unknown key '{override.split('=')[0]}'" in message
    assert f"Did you mean '{suggestion}'" in message


def test_a_key_like_no_other_gets_the_list_of_its_section() -> None:
    assert "train.steps, train.batch" in refusal(None, "train.xyzzy=1")


def test_an_error_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 5\n  bacth: 8\n")
    assert refusal(path).startswith(f"{path}:3: unknown key 'train.bacth'")
    path = write(tmp_path, "train:\n  steps: 5\n  batch: many\n")
    assert refusal(path).startswith(f"{path}:3: train.batch: Value 'many'")
    path = write(tmp_path, "train:\n  steps: 0\n")
    assert refusal(path).startswith(f"{path}:2: Invalid train.steps=0. Must be >= 1.")


def test_a_range_error_blames_what_set_the_value_last(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 5\n")
    assert refusal(path, "train.steps=-1").startswith("command line 'train.steps=-1': Invalid")


def test_two_overrides_may_be_right_only_together() -> None:
    config = load_config(None, ["model.dim=30", "model.heads=5"])
    assert (config.model.dim, config.model.heads) == (30, 5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=abc", "Expected int"),
        ("train.steps=1.5", "Expected int"),
        ("optimizer.lr=fast", "Expected float"),
        ("optimizer.lr=", "Expected float"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.name=ftrl", "['muon', 'normuon', 'adamw', 'adam', 'sgd'"),
        ("optimizer.adjust_lr_fn=moonlight", "match_rms_adamw"),
        ("run.device=tpu", "['auto', 'cpu', 'cuda']"),
        ("train=3", "expected a section with keys, such as train.steps="),
        ("train.steps.x=3", "unknown key 'train.steps.x'"),
        ("optimizer.lr", "expected section.key=value"),
        ("--optimizer.lr=1", "expected section.key=value"),
    ],
)
def test_a_wrong_type_or_form_is_refused(override: str, expected: str) -> None:
    message = refusal(None, override)
    assert f"command line '{override}'" in message
    assert expected in message


@pytest.mark.parametrize(
    "override",
    [
        "run.name=a/b",
        "run.name=..",
        "run.dir=''",
        "run.resume=''",
        "run.save_every=-1",
        "run.keep_latest=-1",
        "run.seed=-1",
        "run.timeout_s=0",
        "run.timeout_s=.inf",
        "run.timeout_s=1e300",
        "run.seed=9223372036854775808",
        "data.context=1",
        "data.val_fraction=0",
        "data.val_fraction=1",
        "data.val_windows=0",
        "model.layers=0",
        "model.dim=66",
        "model.dim=20",
        "model.heads=0",
        "model.rope_base=0",
        "model.rope_base=1e300",
        "optimizer.lr=0",
        "optimizer.lr=-1e-3",
        "optimizer.lr=.nan",
        "optimizer.lr=.inf",
        "optimizer.lr=1e38",  # over 1 - betas[0] it is more than float32 holds
        "optimizer.lr=1e-300",
        "optimizer.weight_decay=.nan",
        "optimizer.weight_decay=1e40",
        "optimizer.eps=1e300",  # infinite in float32: the weights would never move
        "optimizer.eps=1e-300",  # 0 in float32: 0 / 0 where there was no gradient
        "optimizer.update_scale=1e300",
        "optimizer.max_update_rms=1e300",
        "optimizer.weight_decay=-0.1",
        "optimizer.betas=[0.9,1.0]",
        "optimizer.eps=0",
        "optimizer.momentum=1",
        "optimizer.ns_steps=0",
        "train.steps=0",
        "train.batch=0",
        "train.accumulation=0",
        "train.warmup=1",
        "train.final_lr=1.1",
        "train.clip=-1",
        "train.clip=.nan",
        "train.clip=1e300",
        "train.log_every=0",
        "train.eval_every=0",
        "sample.prompt=''",
        "sample.length=-1",
        "sample.temperature=-1",
        "sample.temperature=1e-300",
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    # model.heads=0 shows in model.heads; a width that does not fit the heads shows in model.dim.
    assert f"Invalid {override.split('=')[0]}=" in refusal(None, override)


def test_values_that_are_wrong_together_say_what_would_fit() -> None:
    said = refusal(None, "optimizer.lr=1e38")
    assert "lr / (1 - betas[0]) is 1e+39, and float32 ends at 3.4e+38" in said
    said = refusal(None, "optimizer.lr=0.5", "optimizer.weight_decay=3")
    assert "Invalid optimizer.weight_decay=3.0. Must be at most 1 / optimizer.lr, 2:" in said
    said = refusal(None, "optimizer.max_update_rms=0.2", "optimizer.name=adamw")
    assert "Must be null with optimizer.name=adamw" in said
    # Adam's decay goes through its moments, which no sign comes of.
    assert load_config(
        None, ["optimizer.lr=0.5", "optimizer.weight_decay=3", "optimizer.name=adam"]
    )


def test_half_a_character_is_refused_where_it_stands(tmp_path: Path) -> None:
    # So Python reads an argument whose bytes are no UTF-8.
    assert refusal(None, "sample.prompt=\udcff").startswith("command line 'sample.prompt=")
    path = write(tmp_path, 'sample:\n  prompt: "\\ud800"\n')
    assert refusal(path).startswith(f"{path}: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: [1\n", "not valid YAML"),
        ("train:\n  steps: 1\n  steps: 2\n", "3: key 'train.steps' stands twice, first at"),
        ("- a\n- b\n", "expected sections such as 'train:'"),
        ("just words\n", "expected sections such as 'train:'"),
        ("train: 5\n", "train: expected a section with keys"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(str(path))
    assert expected in message


def test_a_missing_file_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "")
    message = refusal(tmp_path / "runn.yaml")
    assert "no such file" in message
    assert f"Did you mean {tmp_path / 'run.yaml'}?" in message


def test_a_folder_or_binary_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("batch", "accumulation", "world", "expected"),
    [(24, 1, 2, 12), (24, 3, 4, 2), (5, 1, 5, 1)],
)
def test_the_batch_is_divided_over_ranks_and_passes(
    batch: int, accumulation: int, world: int, expected: int
) -> None:
    assert check_batch(TrainConfig(batch=batch, accumulation=accumulation), world) == expected


def test_a_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch=24.*multiple of 14.*such as 14 or 28"):
        check_batch(TrainConfig(batch=24, accumulation=2), 7)
    with pytest.raises(ConfigError, match=r"such as 5\."):
        check_batch(TrainConfig(batch=3), 5)


@pytest.mark.parametrize("name", ["shakespeare.yaml", "shakespeare-adamw.yaml", "tiny.yaml"])
def test_the_configurations_in_the_repository_are_valid(name: str) -> None:
    config = load_config(ROOT / "configs" / name)
    for world_size in (1, 2, 3, 4):
        check_batch(config.train, world_size)


def test_the_two_shakespeare_runs_differ_in_name_and_optimizer_only() -> None:
    muon = load_config(ROOT / "configs/shakespeare.yaml")
    adamw = load_config(ROOT / "configs/shakespeare-adamw.yaml")
    overrides = ["run.name=shakespeare-adamw", "optimizer.name=adamw"]
    assert load_config(ROOT / "configs/shakespeare.yaml", overrides) == adamw
    assert (muon.optimizer.name, adamw.optimizer.name) == ("muon", "adamw")


def test_the_help_and_the_documentation_name_every_key_with_its_default() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    text = keys_help()
    for info in describe_keys():
        assert f"{info.name}={info.default}" in text
        assert info.meaning in text
        kind = info.type.replace("|", "\\|")
        row = f"| `{info.name}` | `{info.default}` | {kind} | {info.meaning} |"
        assert row in page, f"docs/training.md needs the row\n{row}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "Did you mean 'optimizer.lr'?"),
        ("data.path=no/such/file", "data.path=no/such/file: no such file or folder."),
        ("run.device=cuda", "run.device=cuda, but torch sees no CUDA device."),
    ],
)
def test_a_users_mistake_exits_2_and_is_told_once(
    override: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["data.source=pydoc", override]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count(message) == 1
    assert printed.out == ""


def test_an_unknown_flag_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lr", "0.1"]) == 2
    assert "section.key=value" in capsys.readouterr().err


def test_help_lists_the_keys_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert keys_help() in capsys.readouterr().out


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distmuon.training.main.EXTRAS", ("rich", "no_such_package_of_distmuon"))
    assert main([]) == 2
    error = capsys.readouterr().err
    assert "no_such_package_of_distmuon" in error
    assert "pip install 'distmuon[train]'" in error
    assert "rich" not in error


def test_the_launch_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CI", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert Launch.from_environment() == Launch()
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Launch.from_environment() == Launch(5, 8, 1, 4, "plain", "user")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert Launch.from_environment().job is None, "what torchrun calls a job without --rdzv-id"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert Launch.from_environment().job == "job7"
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK='first'"):
        Launch.from_environment()
