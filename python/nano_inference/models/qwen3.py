"""Qwen3 (dense): RMSNorm of each q and k head before the rotation; head_dim is its own number."""

from __future__ import annotations

from typing import Any

from . import Fields
from ._common import flag, llama_config, llama_weights, windows_by_layer

ARCHITECTURES = ("Qwen3ForCausalLM",)
weights = llama_weights


def config(hf: dict[str, Any], max_model_len: int | None) -> Fields:
    bias = flag(hf, "attention_bias", False)
    return llama_config(
        hf,
        max_model_len,
        max_positions=32768,
        kv_heads=32,
        head_dim=128,
        windows=windows_by_layer(hf),
        handled=("attention_bias", "sliding_window", "use_sliding_window", "layer_types"),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
    )
