"""GPT-2: LayerNorm, learned positions, no gate. Matrices are stored [in, out] (Conv1D), and q, k, v
as one."""

from __future__ import annotations

from typing import Any

from . import Fields, WeightSource
from ._common import activation, flag, positive_int, refuse_unsupported

ARCHITECTURES = ("GPT2LMHeadModel",)
PREFIX = "transformer."  # present in what transformers saves, absent in the first release


def config(hf: dict[str, Any], max_model_len: int | None) -> Fields:
    refuse_unsupported(hf)
    hidden = positive_int(hf, "n_embd")
    heads = positive_int(hf, "n_head")
    if hidden % heads:
        raise ValueError(f"config.json: n_embd ({hidden}) must be a multiple of n_head ({heads})")
    return {
        "vocab_size": positive_int(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": positive_int(hf, "n_inner", 4 * hidden),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": positive_int(hf, "n_positions", 1024),
        "norm": "layer",
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "act": activation(hf, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "learned_positions": True,
        "tie_embeddings": flag(hf, "tie_word_embeddings", True),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "attn_scale": 0.0 if flag(hf, "scale_attn_weights", True) else 1.0,
        "ropes": [],
        "layers": [(0, -1)] * positive_int(hf, "n_layer"),
    }


def weights(f: Fields) -> list[WeightSource]:
    hidden, inter = f["hidden_size"], f["intermediate_size"]
    table = (f["vocab_size"], hidden)
    sources = [
        WeightSource("wte.weight", "embed.weight", table),
        WeightSource("wpe.weight", "pos_embed.weight", (f["max_position_embeddings"], hidden)),
        *_norm("ln_f", "final_norm", hidden),
    ]
    for i in range(len(f["layers"])):
        source, slot = f"h.{i}.", f"layers.{i}."
        sources += _norm(source + "ln_1", slot + "attn_norm", hidden)
        sources += _norm(source + "ln_2", slot + "mlp_norm", hidden)
        for part, to in enumerate("qkv"):
            rows = (part * hidden, (part + 1) * hidden)
            sources += _conv1d(source + "attn.c_attn", slot + to, hidden, 3 * hidden, rows)
        sources += _conv1d(source + "attn.c_proj", slot + "o", hidden, hidden)
        sources += _conv1d(source + "mlp.c_fc", slot + "up", hidden, inter)
        sources += _conv1d(source + "mlp.c_proj", slot + "down", inter, hidden)
    if not f["tie_embeddings"]:
        sources.append(WeightSource("lm_head.weight", "lm_head.weight", table))
    return sources


def _norm(name: str, slot: str, size: int) -> list[WeightSource]:
    return [
        WeightSource(f"{name}.{part}", f"{slot}.{part}", (size,)) for part in ("weight", "bias")
    ]


def _conv1d(
    name: str, slot: str, inputs: int, outputs: int, rows: tuple[int, int] | None = None
) -> list[WeightSource]:
    return [
        WeightSource(
            f"{name}.weight", f"{slot}.weight", (inputs, outputs), transpose=True, rows=rows
        ),
        WeightSource(f"{name}.bias", f"{slot}.bias", (outputs,), rows=rows),
    ]
