"""Mistral: Llama with a sliding window on every layer, where the config sets one."""

from __future__ import annotations

from typing import Any

from . import Fields
from ._common import llama_config, llama_weights, positive_int

ARCHITECTURES = ("MistralForCausalLM",)
weights = llama_weights


def config(hf: dict[str, Any], max_model_len: int | None) -> Fields:
    num_layers = positive_int(hf, "num_hidden_layers")
    # null: no window; absent: the 4096 of the first Mistral 7B
    window = (
        0 if hf.get("sliding_window", 4096) is None else positive_int(hf, "sliding_window", 4096)
    )
    types = hf.get("layer_types")
    if types is not None and set(types) != {"sliding_attention" if window else "full_attention"}:
        raise ValueError(
            f"config.json: layer_types {types} do not fit sliding_window = {window or None}"
        )
    return llama_config(
        hf,
        max_model_len,
        max_positions=131072,
        kv_heads=8,
        windows=[window] * num_layers,
        handled=("sliding_window", "layer_types"),
    )
