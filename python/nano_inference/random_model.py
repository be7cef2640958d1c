"""Models with random weights, to try, test and measure things with: a tiny Llama as files, with a
tokenizer of bytes, or any shape straight in an engine. Their text means nothing."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from . import _core

SPECIAL_TOKENS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_random_model(folder: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """Writes a model that transformers can read, too. `config` overrides entries of config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "float32",
        **config,
    }
    save_safetensors(folder / "model.safetensors", _weights(hf, seed))
    _write_tokenizer(folder)
    _write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    _write_json(folder / "config.json", hf)
    return folder


def save_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
    """float32 tensors as one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, data in tensors.items():
        begin, end = end, end + data.nbytes
        header[name] = {"dtype": "F32", "shape": list(data.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in tensors.values():
            file.write(data.astype("<f4").tobytes())


def _weights(hf: dict[str, Any], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    import numpy as np

    rng = np.random.default_rng(seed)
    hidden, inner, dim = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    q, kv = hf["num_attention_heads"] * dim, hf["num_key_value_heads"] * dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        values = rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)
        return values.astype(np.float32)

    ones = np.ones(hidden, np.float32)
    tensors = {"model.embed_tokens.weight": matrix(hf["vocab_size"], hidden, 8.0)}
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": ones,
            layer + "self_attn.q_proj.weight": matrix(q, hidden),
            layer + "self_attn.k_proj.weight": matrix(kv, hidden),
            layer + "self_attn.v_proj.weight": matrix(kv, hidden),
            layer + "self_attn.o_proj.weight": matrix(hidden, q),
            layer + "post_attention_layernorm.weight": ones,
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    tensors["model.norm.weight"] = ones
    if not hf["tie_word_embeddings"]:
        # Letters and spaces get large logits, all other bytes the logit 0: the text is printable.
        head = matrix(hf["vocab_size"], hidden, 5.0)
        likely = [ord(c) for c in "abcdefghijklmnopqrstuvwxyz ,."]
        head[[i for i in range(len(head)) if i not in likely]] = 0.0
        tensors["lm_head.weight"] = head
    return tensors


def _write_tokenizer(folder: Path) -> None:
    """Token i < 256 is the byte i; the special tokens follow."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    from .tokenizer import BYTE_OF_CHAR

    tokenizer = Tokenizer(models.BPE(vocab=BYTE_OF_CHAR, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- Without files --------------------------------------------------------------------------------

QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_layers": 28,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
}
LLAMA_3_2_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_layers": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 64,
    "rope_theta": 5e5,
    "qk_norm": False,
}
LLAMA_3_1_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 5e5,
    "qk_norm": False,
    "tie_embeddings": False,
}
QWEN3_14B = {
    "vocab_size": 151_936,
    "hidden_size": 5120,
    "intermediate_size": 17_408,
    "num_layers": 40,
    "num_heads": 40,
    "num_kv_heads": 8,
    "head_dim": 128,
    "tie_embeddings": False,
}


def model_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float = 1e6,
    qk_norm: bool = True,
    tie_embeddings: bool = True,
) -> _core.ModelConfig:
    """A model built as Qwen3 is, or, without qk_norm, as Llama 3."""
    from . import _core

    inv_freq = [rope_theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    return _core.ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=40960,
        qk_norm=qk_norm,
        tie_embeddings=tie_embeddings,
        ropes=[_core.RopeConfig(inv_freq)],
        layers=[_core.LayerConfig()] * num_layers,
    )


def random_engine(model: _core.ModelConfig, **config: Any) -> _core.Engine:
    """An engine with random bf16 weights, loaded and not yet started."""
    import numpy as np

    from . import _core

    engine = _core.Engine(_core.EngineConfig(**config), model)
    slots = _core.Engine.weight_slots(model)
    pool = bf16_pool(max(map(math.prod, slots.values())))
    rng = np.random.default_rng(2)
    begins = {name: int(rng.integers(len(pool))) for name in slots}

    def load(name: str) -> None:
        if "norm" in name:
            engine.load_weight(name, np.ones(slots[name], np.float32), "float32")
        else:
            engine.load_weight(name, pool_view(pool, begins[name], slots[name]), "bfloat16")

    threads = 8 if engine.config.device == "cuda" else 1  # a CPU's weights are loaded one by one
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(load, slots))
    engine.finish_loading()
    return engine


_POOL = 1 << 25  # 64 MiB of bf16


def bf16_pool(largest: int) -> npt.NDArray[np.uint16]:
    """Values of N(0, 0.02) as bf16 bits, for tensors of up to `largest` elements: twice as many, so
    that tensors begin at different places, but no more than _POOL."""
    import numpy as np

    size = min(_POOL, 2 * largest + 1)
    values = np.random.default_rng(1).standard_normal(size, dtype=np.float32) * np.float32(0.02)
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def pool_view(
    pool: npt.NDArray[np.uint16], begin: int, shape: tuple[int, ...]
) -> npt.NDArray[np.uint16]:
    """A tensor made of the pool, not copied. Rows of one that is larger than the pool overlap: each
    is the row before, shifted."""
    import numpy as np

    columns = shape[-1]
    rows = math.prod(shape[:-1])
    step = columns if rows * columns <= len(pool) else (len(pool) - columns) // rows
    begin %= len(pool) - (rows - 1) * step - columns + 1
    strides = (step * 2, 2)[-len(shape) :]
    return np.lib.stride_tricks.as_strided(pool[begin:], shape, strides, writeable=False)
