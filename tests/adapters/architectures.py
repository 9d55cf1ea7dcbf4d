"""Small configurations of real transformers models, and their routes as one text.

    python -m tests.adapters.architectures > tests/adapters/golden/routes.txt

rewrites the golden file. Read the difference line by line before committing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from distmuon.param_groups import format_routes, route

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}

# The class of the model, the class of its configuration, and what differs from its defaults. No two
# kinds of dimensions are equal where a test could mistake one for the other.
ARCHITECTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 40}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 56},
    ),
    ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, **_EXPERTS, "head_dim": 8}),
    (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**_GROUPED, **_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 24}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_SIZES, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": 24, "q_lora_rank": 12, "kv_lora_rank": 10}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8},
    ),
    (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8}),
    ("PhiForCausalLM", "PhiConfig", _SIZES),
    ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4}
        | {"time_step_rank": 3},
    ),
    (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4}
        | {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    ),
    (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "image_size": 16, "patch_size": 4, "num_labels": 7},
    ),
    ("BertForMaskedLM", "BertConfig", {**_SIZES, "max_position_embeddings": 40}),
    (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_SIZES, "max_position_embeddings": 40, "num_labels": 3},
    ),
    ("T5ForConditionalGeneration", "T5Config", _T5),
    (
        "T5ForSequenceClassification",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "num_labels": 3, "tie_word_embeddings": False},
    ),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"vocab_size": 96, "num_mel_bins": 8, "max_source_positions": 20}
        | {"max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 1},
    ),
)


def build(name: str, config_name: str, settings: dict[str, Any]) -> nn.Module:
    """A model of shapes only: nothing is allocated or initialized."""
    config = getattr(transformers, config_name)(**settings)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(config)
    return model


def tables() -> Iterator[tuple[str, str]]:
    """The name of each model and the table of its routes."""
    for name, config_name, settings in ARCHITECTURES:
        yield name, format_routes(route(build(name, config_name, settings)))


if __name__ == "__main__":
    print("\n\n".join(f"=== {name}\n{table}" for name, table in tables()))
