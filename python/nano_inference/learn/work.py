"""What a model's step takes, from its shape: operations (a multiply-add is two), bytes that are
read. Applied to a record of Engine.trace() it counts what the engine really did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import _core

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1}


@dataclass(frozen=True)
class Work:
    """Formulas for one model."""

    model: _core.ModelConfig
    weight_size: int = 2
    """Bytes of a weight."""
    kv_size: int = 2
    """Bytes of an element of the KV cache."""

    @classmethod
    def of(cls, engine: _core.Engine, model: _core.ModelConfig) -> Work:
        config = engine.config
        return cls(model, _SIZES[config.dtype], _SIZES[config.kv_cache_dtype])

    # -- Sizes ----------------------------------------------------------------------------------

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of all layers: every row of a step is multiplied with each of them."""
        m = self.model
        attention = m.hidden_size * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
        mlp = (3 if m.gated_mlp else 2) * m.hidden_size * m.intermediate_size
        return len(m.layers) * (attention + mlp)

    @property
    def head_parameters(self) -> int:
        """Of lm_head, which only the rows that are sampled from are multiplied with."""
        return self.model.vocab_size * self.model.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Read in a step that samples, whatever its number of rows."""
        return self.weight_size * (self.layer_parameters + self.head_parameters)

    @property
    def kv_bytes(self) -> int:
        """Of one token in the cache: a key and a value for each KV head of each layer."""
        m = self.model
        return self.kv_size * 2 * len(m.layers) * m.num_kv_heads * m.head_dim

    # -- Operations and bytes -------------------------------------------------------------------

    def operations(self, rows: int, pairs: int, samples: int) -> int:
        """Of `rows` tokens that attend to `pairs` tokens altogether, and `samples` rows of logits.
        Norms, rotations and the like are left out: well below a percent."""
        m = self.model
        attention = 4 * len(m.layers) * m.num_heads * m.head_dim * pairs
        return 2 * (rows * self.layer_parameters + samples * self.head_parameters) + attention

    def prefill_operations(self, tokens: int, cached: int = 0) -> int:
        """A whole prompt behind `cached` tokens, and the logits of its last token."""
        return self.operations(tokens, causal_pairs(tokens, cached), 1)

    def decode_operations(self, context: int) -> int:
        """One token, the last of `context`."""
        return self.operations(1, context, 1)

    def decode_bytes(self, contexts: Iterable[int]) -> int:
        """A step in which sequences of these lengths get one token each: all weights once, and the
        cache of each."""
        return self.weight_bytes + self.kv_bytes * sum(contexts)

    # -- Of what was done -----------------------------------------------------------------------

    def step_operations(self, step: Mapping[str, Any]) -> int:
        entries = step["entries"]
        pairs = sum(
            causal_pairs(e["num_query"], e["context_len"] - e["num_query"]) for e in entries
        )
        samples = sum(e["num_samples"] > 0 for e in entries)
        return self.operations(step["num_tokens"], pairs, samples)

    def step_bytes(self, step: Mapping[str, Any]) -> int:
        """Weights once, and every sequence's cache once."""
        return self.decode_bytes(e["context_len"] for e in step["entries"])


def causal_pairs(tokens: int, cached: int = 0) -> int:
    """(token, token it attends to) of `tokens` new tokens behind `cached` ones: each sees what is
    before it, and itself."""
    return tokens * cached + tokens * (tokens + 1) // 2
