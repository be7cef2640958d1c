"""What the families share: reading a config strictly, and the Llama layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import rope
from ..validation import INT32_MAX
from . import Fields, WeightSource

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Settings that change the mathematics, with the values that mean "not used". A family handles some
# of them; any other value elsewhere is refused, never ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "partial_rotary_factor": (None, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "clip_qkv": (None,),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
    "alibi": (None, False),
    "attention_chunk_size": (None,),
    "scale_attn_by_inverse_layer_idx": (None, False),
}


# Largest sizes, far above any model: all products of them, in bytes, fit into 63 bits. What is not
# here has 32 bits.
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 1000),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner"), 1 << 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 1 << 12),
}


def refuse_unsupported(hf: dict[str, Any], handled: Iterable[str] = ()) -> None:
    """ValueError naming the first setting that would change the result and is not implemented."""
    for key, neutral in NEUTRAL.items():
        if key in hf and key not in handled and hf[key] not in neutral:
            shown = "" if isinstance(hf[key], (dict, list)) else f" = {hf[key]!r}"
            raise ValueError(
                f"config.json: the setting '{key}'{shown} is not supported for this model"
            )


def positive_int(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    """A config entry that must be there (or null, or absent, with a default)."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json lacks '{key}'")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"config.json: '{key}' must be a positive integer, got {value!r}")
    most = LARGEST.get(key, INT32_MAX)
    if value > most:
        raise ValueError(f"config.json: '{key}' must be at most {most}, got {value}")
    return value


def flag(hf: dict[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"config.json: '{key}' must be true or false, got {value!r}")
    return value


def activation(hf: dict[str, Any], key: str, default: str) -> str:
    name = hf.get(key) or default
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json: unknown activation '{key}' = {name!r} (known: {known})")
    return ACTIVATIONS[name]


def windows_by_layer(hf: dict[str, Any]) -> list[int]:
    """Qwen's rule: the layers that `layer_types` names, else those from `max_window_layers` on."""
    num_layers = positive_int(hf, "num_hidden_layers")
    window = 0
    if flag(hf, "use_sliding_window", False) and hf.get("sliding_window", 4096) is not None:
        window = positive_int(hf, "sliding_window", 4096)
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        return [window if i >= first else 0 for i in range(num_layers)]
    if len(types) != num_layers:
        raise ValueError(
            f"config.json: layer_types has {len(types)} entries for {num_layers} layers"
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"config.json: layer_types has the unknown entry {kind!r}")
        if kind == "sliding_attention" and not window:
            raise ValueError(
                "config.json: layer_types asks for sliding_attention, but no sliding_window"
            )
    return [window if kind == "sliding_attention" else 0 for kind in types]


def llama_config(
    hf: dict[str, Any],
    max_model_len: int | None,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    windows: list[int] | None = None,
    handled: Iterable[str] = (),
    **fields: Any,
) -> Fields:
    """A Llama-like config. max_positions, kv_heads and head_dim are what an absent key means."""
    refuse_unsupported(hf, handled)
    hidden = positive_int(hf, "hidden_size")
    heads = positive_int(hf, "num_attention_heads")
    if hf.get("num_key_value_heads") is not None or "num_key_value_heads" in hf:
        kv_heads = None  # null means as many as heads
    if hf.get("head_dim") is None and (head_dim is None or "head_dim" in hf):
        head_dim = hidden // heads
    head_dim = positive_int(hf, "head_dim", head_dim)
    settings = rope.read_settings(
        hf, head_dim, positive_int(hf, "max_position_embeddings", max_positions)
    )
    if settings.partial_rotary_factor != 1.0:
        raise ValueError(
            "config.json: the setting 'partial_rotary_factor' is not supported for this model"
        )
    num_layers = positive_int(hf, "num_hidden_layers")
    return {
        "vocab_size": positive_int(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": positive_int(hf, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": positive_int(hf, "num_key_value_heads", kv_heads or heads),
        "head_dim": head_dim,
        "max_position_embeddings": settings.scaled_max,
        "norm": "rms",
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "act": activation(hf, "hidden_act", "silu"),
        "gated_mlp": True,
        "tie_embeddings": flag(hf, "tie_word_embeddings", False),
        "ropes": [rope.build(settings, max_model_len)],
        "layers": [(window, 0) for window in windows or [0] * num_layers],
        **fields,
    }


def llama_weights(f: Fields) -> list[WeightSource]:
    """The names of Llama and all that copied its layout."""
    hidden, inter, head_dim = f["hidden_size"], f["intermediate_size"], f["head_dim"]
    q, kv = f["num_heads"] * head_dim, f["num_kv_heads"] * head_dim
    table = (f["vocab_size"], hidden)
    matrices = [  # name in the layer, slot, shape, bias
        ("self_attn.q_proj", "q", (q, hidden), f.get("qkv_bias")),
        ("self_attn.k_proj", "k", (kv, hidden), f.get("qkv_bias")),
        ("self_attn.v_proj", "v", (kv, hidden), f.get("qkv_bias")),
        ("self_attn.o_proj", "o", (hidden, q), f.get("o_bias")),
        ("mlp.gate_proj", "gate", (inter, hidden), f.get("mlp_bias")),
        ("mlp.up_proj", "up", (inter, hidden), f.get("mlp_bias")),
        ("mlp.down_proj", "down", (hidden, inter), f.get("mlp_bias")),
    ]
    norms = [
        ("input_layernorm", "attn_norm", hidden),
        ("post_attention_layernorm", "mlp_norm", hidden),
    ]
    if f.get("qk_norm"):
        norms += [
            ("self_attn.q_norm", "q_norm", head_dim),
            ("self_attn.k_norm", "k_norm", head_dim),
        ]

    sources = [WeightSource("model.embed_tokens.weight", "embed.weight", table)]
    for i in range(len(f["layers"])):
        source, slot = f"model.layers.{i}.", f"layers.{i}."
        for name, to, size in norms:
            sources.append(WeightSource(f"{source}{name}.weight", f"{slot}{to}.weight", (size,)))
        for name, to, shape, bias in matrices:
            sources.append(WeightSource(f"{source}{name}.weight", f"{slot}{to}.weight", shape))
            if bias:
                sources.append(WeightSource(f"{source}{name}.bias", f"{slot}{to}.bias", shape[:1]))
    sources.append(WeightSource("model.norm.weight", "final_norm.weight", (hidden,)))
    if not f["tie_embeddings"]:
        sources.append(WeightSource("lm_head.weight", "lm_head.weight", table))
    return sources
