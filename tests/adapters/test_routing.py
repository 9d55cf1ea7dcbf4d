"""Which rule the parameters of real architectures get: 21 classes of transformers, and PEFT."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("transformers", reason="needs the extra distmuon[hf]")

import transformers

from distmuon.param_groups import Route, build_param_groups, route
from tests.adapters.architectures import ARCHITECTURES, build, tables

GOLDEN = Path(__file__).parent / "golden" / "routes.txt"


def test_the_tables_are_those_that_were_reviewed() -> None:
    reviewed = dict(
        section.split("\n", maxsplit=1) for section in GOLDEN.read_text().strip().split("\n\n")
    )
    found = {f"=== {name}": table for name, table in tables()}
    assert list(found) == list(reviewed)
    for name, table in found.items():
        assert table.splitlines() == reviewed[name].splitlines(), name


@pytest.mark.parametrize(
    ("name", "config", "settings"), ARCHITECTURES, ids=[name for name, _, _ in ARCHITECTURES]
)
def test_every_parameter_has_a_rule_and_a_reason(
    name: str, config: str, settings: dict[str, object]
) -> None:
    model = build(name, config, settings)
    routes = {each.fqn: each for each in route(model)}
    assert set(routes) == {fqn for fqn, _ in model.named_parameters()}
    assert all(each.reason for each in routes.values())
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for group in build_param_groups(model) for _, p in group["params"]]
    assert sorted(grouped) == sorted(trainable)

    kept_from_muon = (nn.Embedding, nn.LayerNorm)
    for path, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            found = routes.get(f"{path}.{leaf}")
            if found is not None and isinstance(module, kept_from_muon):
                assert found.algorithm != "muon", found
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        fqn = next(fqn for fqn, parameter in model.named_parameters() if parameter is head.weight)
        assert routes[fqn].algorithm == "adamw"
    muon = [each for each in routes.values() if each.algorithm == "muon"]
    assert all(len(each.shape) in (2, 3) and min(each.shape) > 1 for each in muon)
    # Most of a model without its vocabulary is for Muon.
    hidden = [each for each in routes.values() if each.kind not in ("embedding", "head")]
    assert sum(map(_numel, muon)) > 0.85 * sum(map(_numel, hidden))


def _numel(found: Route) -> int:
    return math.prod(found.shape)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=96,
        )
    )


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("LoraConfig", {}),
        ("LoraConfig", {"use_dora": True}),
        ("AdaLoraConfig", {"total_step": 10}),
        ("LoHaConfig", {}),
        ("LoKrConfig", {"r": 4}),
        ("OFTConfig", {"oft_block_size": 4}),
        ("HRAConfig", {}),
        ("VeraConfig", {"r": 4}),
        ("IA3Config", {"feedforward_modules": []}),
        ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 8, "topk": 2}),
    ],
)
def test_adapters_go_to_adamw_with_a_reason(method: str, settings: dict[str, object]) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = getattr(peft, method)(target_modules=["q_proj"], **settings)
    trained = [
        each for each in route(peft.get_peft_model(_llama(), config)) if each.algorithm != "frozen"
    ]
    assert trained
    for each in trained:
        assert each.algorithm == "adamw", each
        assert "LoRA factor" in each.reason or "part of an adapter" in each.reason, each
        assert (each.kind == "vector") == (_numel(each) == max(each.shape)), each


def test_whole_matrices_beside_adapters_go_to_muon() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj", "lm_head"])
    found = {
        each.fqn.split(".")[-4]: each.algorithm
        for each in route(peft.get_peft_model(_llama(), config))
        if "modules_to_save" in each.fqn
    }
    assert found == {"o_proj": "muon", "lm_head": "adamw"}
