"""QK-Clip in transformers' own models: where their queries and keys come from, and what they are.

Each model is clipped by a step with lr 0, and observed again. Only if every row that makes a head's
queries and keys was found, and no other, is each head's largest logit the threshold afterwards.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the extra distmuon[hf]")

import transformers

from distmuon import Muon, QKClip, build_param_groups
from distmuon.adapters.transformers_attention import record_attention
from distmuon.qk_clip import attention_layers

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT2 = {"vocab_size": 40, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 32}
BERT = {key: value for key, value in LLAMA.items() if key not in ("bos_token_id", "eos_token_id")}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-grouped": ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "llama-wide": ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 1, "head_dim": 10}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", LLAMA | {"num_key_value_heads": 2, "sliding_window": 5}),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoXForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForMaskedLM", BERT),
    "opt": ("OPTForCausalLM", LLAMA | {"ffn_dim": 32, "word_embed_proj_dim": 24}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", LLAMA | LATENT),
    "deepseek-v3": ("DeepseekV3ForCausalLM", LLAMA | LATENT),
    "deepseek-v3-full-rank": ("DeepseekV3ForCausalLM", LLAMA | LATENT | {"q_lora_rank": None}),
}


def build(name: str) -> nn.Module:
    kind, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    # They know each other by their configuration.
    config = model_class.config_class(**sizes)
    torch.manual_seed(1)
    model: nn.Module = model_class(config)
    for parameter in model.parameters():  # biases, too
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    return model.train()


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("grouped", ["query", "balanced"])
@pytest.mark.parametrize("name", MODELS)
def test_every_head_has_the_threshold_as_its_largest_logit(name: str, grouped: Any) -> None:
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    watch = QKClip(attention_layers(model))
    record_attention(model, watch)
    model(**tokens())
    before = watch.take()
    assert len(before) == 4
    threshold = sorted(before)[1] * 0.99  # all heads but one are clipped
    clip = QKClip(attention_layers(model), threshold=threshold, grouped=grouped)
    record_attention(model, clip)
    groups = build_param_groups(model)
    optimizer = Muon(groups, lr=0.0, qk_clip=clip)
    output = model(**tokens())
    output.logits.square().mean().backward()
    optimizer.step()
    assert clip.stats()["clipped_heads"] == 3
    model(**tokens())
    expected = [min(value, threshold) for value in before]
    torch.testing.assert_close(torch.tensor(clip.take()), torch.tensor(expected), rtol=1e-5, atol=0)


def test_observed_logits_are_those_of_eager_attention() -> None:
    model = build("llama-grouped")
    clip = QKClip(attention_layers(model))
    record_attention(model, clip)
    inputs = {"input_ids": tokens()["input_ids"]}
    model(**inputs)
    found = torch.tensor(clip.take())
    heads: list[Tensor] = []
    projections = model.get_submodule("model.layers.0.self_attn")
    for child in ("q_proj", "k_proj"):
        projections.get_submodule(child).register_forward_hook(
            lambda _module, _inputs, output: heads.append(output.unflatten(-1, (-1, 6)))
        )
    model.set_attn_implementation("eager")  # type: ignore[operator]
    probabilities = model(**inputs, output_attentions=True).attentions[0].double()
    query, key = (each.transpose(1, 2) for each in heads)
    # A token meets itself without rotation, which gives the constant that softmax has removed.
    itself = (query * key.repeat_interleave(2, dim=1)).sum(-1) / 6**0.5
    logits = probabilities.log() - probabilities.diagonal(dim1=2, dim2=3).log()[..., None]
    largest = (logits + itself[..., None]).amax(dim=(0, 2, 3))
    torch.testing.assert_close(found, largest.float(), rtol=1e-4, atol=0)


def test_evaluation_is_not_observed_and_generation_works() -> None:
    model = build("llama-grouped")
    clip = QKClip(attention_layers(model))
    record_attention(model, clip)
    with torch.no_grad():
        model(**tokens())
    generated = model.generate(**tokens(), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert generated.shape == (2, 14)
    assert max(clip.take()) == float("-inf")


def test_gradient_checkpointing_is_observed_once() -> None:
    model = build("llama")
    clip = QKClip(attention_layers(model))
    record_attention(model, clip)
    model(**tokens())
    expected = clip.take()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model(**tokens(), use_cache=False).logits.sum().backward()
    assert clip.take() == pytest.approx(expected, rel=1e-6)


def test_models_with_norms_on_queries_and_keys_are_refused() -> None:
    for kind in ("Qwen3ForCausalLM", "Olmo2ForCausalLM"):
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**LLAMA, num_key_value_heads=2, head_dim=6))
        with pytest.raises(ValueError, match=r"q_norm\).* would be inert"):
            attention_layers(model)


def test_other_attention_implementations_are_refused() -> None:
    model = build("llama")
    clip = QKClip(attention_layers(model))
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.raises(ValueError, match="uses the attention implementation 'eager'"):
        record_attention(model, clip)
