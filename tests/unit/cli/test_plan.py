"""`distmuon plan`: what it takes, what it prints, its exit codes, and how much it takes to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distmuon import recipes
from distmuon.cli.main import main
from tests.browser import open_in_browser, read_strictly

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "tiny.yaml")


class Unclear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.table = nn.Parameter(torch.empty(32, 8))
        self.old = nn.Linear(8, 8, bias=False)
        self.old.weight.requires_grad_(False)


def unclear() -> nn.Module:
    return Unclear()


def nothing() -> int:
    return 3


def broken() -> nn.Module:
    raise RuntimeError("no weights here")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    return code, *capsys.readouterr()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_a_training_configuration_is_planned_as_it_would_be_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = run_json(capsys, CONFIG, "model.layers=3", "--world-size", 2, "--device", "cpu")
    rows = {row["name"]: row for row in answer["parameters"]}
    query = rows["layers.{0..2}.attention.q_proj.weight"]
    assert (query["algorithm"], query["shape"], query["lr"]) == ("muon", [32, 32], 0.01)
    assert query["lr_factor"] == pytest.approx(0.2 * 32**0.5)
    assert len(query["owners"]) == 3
    norm = rows["layers.{0..2}.attention_norm.weight"]
    assert (norm["algorithm"], norm["weight_decay"], norm["lr_factor"]) == ("adamw", 0.0, None)
    assert answer["cost_model"]["bandwidth"] == 1.6e9
    assert len(answer["loads"]) == answer["ranks"] == 2
    assert answer["to_confirm"] == {}


def test_the_text_has_routes_reasons_owners_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "llama-7b", "--world-size", 64, "--reduce", "owned")
    assert code == 0
    (query,) = (line for line in out.splitlines() if "q_proj" in line)
    assert (
        query.split()
        == (
            "model.layers.{0..31}.self_attn.q_proj.weight 4096 x 4096 muon 12.8 0.1 16 of 64 ranks "
            "hidden matrix (Linear)"
        ).split()
    )
    for words in (
        "6,738,415,616 in bfloat16: 6,476,005,376 by Muon in 224 matrices, 262,410,240 by AdamW",
        "1.012 times the mean",
        "defaults for cuda, assumed, not measured",
        "to confirm  nothing",
    ):
        assert words in out
    assert [line.split("  ")[0] for line in out.splitlines()[-6:]] == [
        "average the gradients",
        "publish the parameters",
        "pieces of matrices to owners",
        "pieces of updates back",
        "agree on the step",
        "in all",
    ]


def test_strict_stops_at_a_guess_and_an_override_settles_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = f"{__name__}:unclear"
    code, out, _ = run(capsys, model)
    assert code == 0
    assert "--override 'table=muon' or =adamw" in out
    (old,) = (line for line in out.splitlines() if line.startswith("old.weight"))
    assert old.split()[4:] == ["frozen", "-", "-", "-", "requires_grad=False"]
    assert run(capsys, model, "--strict")[0] == 1
    code, out, _ = run(capsys, model, "--strict", "--override", "table=adamw")
    assert code == 0
    assert "override 'table'" in out


def test_blocks_and_recipes_are_those_of_the_optimizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuts = ("--blocks", "*.q_proj.weight=4", "--blocks", "*.up_proj.weight=1008,10000")
    _, whole, _ = run(capsys, "llama-7b", "--json")
    _, cut, _ = run(capsys, "llama-7b", "--json", *cuts, "--recipe", "keller")
    plain, changed = (
        {row["name"].rsplit(".", 2)[-2]: row for row in json.loads(text)["parameters"]}
        for text in (whole, cut)
    )
    assert changed["q_proj"]["reason"].endswith("in blocks of (1024, 1024, 1024, 1024) rows")
    assert changed["up_proj"]["reason"].endswith("in blocks of (1008, 10000) rows")
    assert changed["k_proj"]["reason"] == plain["k_proj"]["reason"]
    assert sum(json.loads(cut)["loads"]) < sum(json.loads(whole)["loads"])
    recipe = recipes.keller()
    assert changed["k_proj"]["lr"] == recipe.optimizer["lr"]
    assert changed["lm_head"]["lr"] == recipe.groups["adam_lr"]
    assert changed["k_proj"]["lr_factor"] == 1.0, "of a square matrix, as Keller Jordan scales"
    code, out, _ = run(capsys, "llama-7b", "--recipe", "normuon")
    assert code == 0
    assert "by NorMuon" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no such file"),
        ([CONFIG, "model.width=3"], "model.width"),
        ([CONFIG, "optimizer.name=adamw"], "optimizer.name=adamw"),
        ([CONFIG, "optimizer.name=shampoo"], "optimizer.name=shampoo"),
        (["llama-7b", "model.layers=3"], "belongs to a training configuration"),
        (["nowhere:build"], "No module named 'nowhere'"),
        ([f"{__name__}:nobody"], "no attribute 'nobody'"),
        ([":build"], ":build is no package.module:function"),
        (["nowhere:"], "nowhere: is no package.module:function"),
        (["configs.json"], "configs.json: no such file"),
        (["llama7b"], "Did you mean llama-7b?"),
        ([f"{__name__}:nothing"], "returned a int. Must be a torch.nn.Module"),
        ([f"{__name__}:broken"], "raised RuntimeError: no weights here"),
        (["llama-7b", "--max-split", "9"], "max_split=9. Must be <= 4"),
        (["llama-7b", "--adjust-lr-fn", "sqrt"], "Must be one of"),
        (["llama-7b", "--override", "lm_head"], "expected PATTERN=muon"),
        (["llama-7b", "--override", "nothing=muon"], "matches no parameter"),
        (["llama-7b", "--blocks", "*.q_proj.weight"], "expected PATTERN=N or PATTERN=N,N,..."),
        (["llama-7b", "--blocks", "*.q_proj.weight=2,x"], "expected PATTERN=N or PATTERN=N,N,..."),
        (["llama-7b", "--blocks", "*.q_proj.weight=3"], "blocks '*.q_proj.weight'"),
        (["llama-7b", "--blocks", "lm_head.weight=2"], "goes to AdamW"),
        (["llama-7b", "--cost-model", "nowhere.json"], "No such file"),
        (["llama-7b", "--html", "nowhere/plan.html"], "cannot be written"),
    ],
)
def test_mistakes_are_told_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "must be an object"),
        ('{"latency": 1e-5, "bandwidth": 1e10}', "has no 'flops'"),
        ('{"latency": 1e-5, "bandwidth": 1e10, "flops": -1}', "Must be > 0"),
        (
            '{"latency": 1, "bandwidth": 1, "flops": 1, "measured": {"4 by 4": 1}}',
            "'4 by 4' is no shape",
        ),
        ("", "is no JSON"),
    ],
)
def test_a_wrong_cost_model_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rates.json"
    file.write_text(content)
    code, _, err = run(capsys, CONFIG, "--cost-model", file)
    assert code == 2
    assert "rates.json" in err
    assert message in err


def test_a_measured_cost_model_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    rates = {"latency": 1e-5, "bandwidth": 1e10, "flops": 1e12, "measured": {"32x32": 0.25}}
    file.write_text(json.dumps(rates))
    answer = run_json(capsys, CONFIG, "--world-size", 4, "--cost-model", file)
    assert answer["cost_model"] == {**rates, "from": str(file)}
    (muon,) = (each for each in answer["buffers"] if each["algorithm"] == "muon")
    assert muon["prediction"]["compute"] >= 0.25


def transformers_config(folder: Path) -> Path:
    content = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "dtype": "bfloat16",
    }
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file


def test_a_transformers_configuration_is_read_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    for path in (transformers_config(tmp_path), tmp_path):
        answer = run_json(capsys, path, "--world-size", 3)
        rows = {row["name"]: row for row in answer["parameters"]}
        assert rows["model.layers.{0..2}.self_attn.k_proj.weight"]["shape"] == [16, 32]
        assert rows["lm_head.weight"]["algorithm"] == "adamw"
        assert {row["dtype"] for row in answer["parameters"]} == {"bfloat16"}
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert "no such type" in err


def test_the_page_opens_and_refers_to_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    arguments = (CONFIG, "--world-size", 3, "--html", page, "--png", picture)
    assert run(capsys, *arguments)[0] == 0
    read = read_strictly(page.read_text(encoding="utf-8"))
    assert read.images == [picture.read_bytes()]
    opened = open_in_browser(page)
    assert opened.title.endswith("tiny.yaml on 3 ranks")
    ((width, height),) = opened.images
    assert width == 2400
    assert height > 800
    assert opened.width <= 1200
    assert (opened.requests, opened.complaints) == ((), ())
    assert "layers.0.attention.q_proj.weight" in opened.text


MEASURED = """
import contextlib, io, resource, sys
from distmuon.cli.main import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = main(["plan", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_SELF)
print(code, len(out.getvalue()), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


@pytest.mark.parametrize(
    ("model", "world_size"),
    [
        ("llama-3-70b", 1024),
        ("kimi-k2-stacked", 1024),
        pytest.param("kimi-k2", 1024, marks=pytest.mark.slow),
        pytest.param("kimi-k2", 10_000, marks=pytest.mark.slow),
    ],
)
def test_large_models_on_many_ranks_are_planned_on_a_laptop(model: str, world_size: int) -> None:
    arguments = [model, "--world-size", str(world_size), "--layout", "auto", "--reduce", "hook"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    code, printed, seconds, memory = map(float, done.stdout.split())
    assert code == 0
    assert printed > 1000
    assert memory < 2 * 2**30
    # The processor's time: others may be using the machine. Even that grows when they do.
    assert seconds < (10 if world_size == 1024 else 20)


def test_a_module_that_cannot_be_imported_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unfinished_model.py").write_text("def (")
    code, out, err = run(capsys, "unfinished_model:build")
    assert (code, out) == (2, "")
    assert "unfinished_model:build: importing unfinished_model raised SyntaxError" in err


def test_values_of_a_configuration_may_stand_behind_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = run_json(capsys, CONFIG, "--world-size", 3, "optimizer.lr=0.5")
    (row, *_) = (row for row in answer["parameters"] if row["algorithm"] == "muon")
    assert row["lr"] == 0.5
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "the following arguments are required: MODEL\n" in capsys.readouterr().err


def test_a_class_that_looks_at_whole_tensors_has_them_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", "configs/tiny.yaml", "--world-size", "3", "--companion"]
    assert main([*command, "torch.optim.Adafactor"]) == 0
    said = capsys.readouterr().out
    assert "  whole at rank " in said
    assert "every rank its range" not in said
    assert "16,480 by torch.optim.Adafactor" in said
    assert "torch.optim.Adafactor keeps tensors whole, 1.49 times the mean on the fullest" in said
    assert main([*command, "torch.optim.SGD(momentum=0.9)"]) == 0
    assert "every rank its range" in capsys.readouterr().out
    assert main([*command, "torch.optim.LBFGS"]) == 2
    assert "Invalid algorithm='torch.optim.LBFGS'" in capsys.readouterr().err
    assert main(["estimate", *command[1:], "torch.optim.Adafactor"]) == 0
    assert "AdamW moments, or state of torch.optim.Adafactor " in capsys.readouterr().out
