"""Llama 1 to 3.x and the many models that are Llama under another name."""

from __future__ import annotations

from typing import Any

from . import Fields
from ._common import flag, llama_config, llama_weights

ARCHITECTURES = ("LlamaForCausalLM",)
weights = llama_weights


def config(hf: dict[str, Any], max_model_len: int | None) -> Fields:
    bias = flag(hf, "attention_bias", False)
    return llama_config(
        hf,
        max_model_len,
        max_positions=2048,
        handled=("attention_bias", "mlp_bias"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(hf, "mlp_bias", False),
    )
