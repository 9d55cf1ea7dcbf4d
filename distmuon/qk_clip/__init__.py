"""QK-Clip (MuonClip): bound attention logits by scaling query and key weights after the step."""

from distmuon.qk_clip.clip import QKClip
from distmuon.qk_clip.layers import (
    AttentionLayer,
    HeadRows,
    attention_layer,
    head_rows,
    latent_attention_layer,
)
from distmuon.qk_clip.max_logits import Measure, max_logit_bound, max_logits
from distmuon.qk_clip.models import attention_layers
from distmuon.qk_clip.recording import record

__all__ = [
    "AttentionLayer",
    "HeadRows",
    "Measure",
    "QKClip",
    "attention_layer",
    "attention_layers",
    "head_rows",
    "latent_attention_layer",
    "max_logit_bound",
    "max_logits",
    "record",
]
