"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; a window on the upper layers if asked for."""

from __future__ import annotations

from typing import Any

from . import Fields
from ._common import llama_config, llama_weights, windows_by_layer

ARCHITECTURES = ("Qwen2ForCausalLM",)
weights = llama_weights


def config(hf: dict[str, Any], max_model_len: int | None) -> Fields:
    return llama_config(
        hf,
        max_model_len,
        max_positions=32768,
        kv_heads=32,
        windows=windows_by_layer(hf),
        handled=("sliding_window", "use_sliding_window", "layer_types"),
        qkv_bias=True,
    )
