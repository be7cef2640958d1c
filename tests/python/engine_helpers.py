"""A tiny random model straight on the native engine, stepped by hand or by its thread."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from nano_inference import _core

VOCAB = 131
DEVICES = ["cpu", *(["cuda"] if _core.cuda_devices() else [])]


def tiny_model(**changes: Any) -> _core.ModelConfig:
    """Two layers, grouped heads, sizes that fill no vector register evenly, one sliding window."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "qk_norm": True,
        "qkv_bias": True,
        "ropes": [_core.RopeConfig([10000.0 ** (-i / 6) for i in range(6)])],
        "layers": [_core.LayerConfig(), _core.LayerConfig(window=24)],
    }
    return _core.ModelConfig(**{**fields, **changes})


def cuda_model(**changes: Any) -> _core.ModelConfig:
    """The same for a card, which has kernels for few head sizes."""
    fields: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "head_dim": 64,
        "ropes": [_core.RopeConfig([10000.0 ** (-i / 32) for i in range(32)])],
    }
    return tiny_model(**{**fields, **changes})


def random_weights(model: _core.ModelConfig, seed: int = 1) -> dict[str, np.ndarray]:
    """float32 values that keep activations near 1; read-only."""
    return _random_weights(tuple(_core.Engine.weight_slots(model).items()), seed)


@lru_cache(maxsize=4)
def _random_weights(
    slots: tuple[tuple[str, tuple[int, ...]], ...], seed: int
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = {}
    for slot, shape in slots:
        scale = 1.5 / np.sqrt(shape[1]) if len(shape) == 2 else 0.2
        shift = 1.0 if slot.endswith("norm.weight") else 0.0
        weights[slot] = (shift + scale * random.standard_normal(shape)).astype(np.float32)
        weights[slot].flags.writeable = False
    return weights


DEFAULTS: dict[str, Any] = {
    "num_blocks": 512,
    "max_model_len": 256,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 256,
    "max_logprobs": 8,
    "trace_capacity": 4096,
    "check_invariants": True,
}
ON_CPU = {"num_threads": 1, "dtype": "float32", "kv_cache_dtype": "float32"}
ON_CUDA = {
    "dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "graph_sizes": [1, 2, 4, 8, 16, 32, 64],
}


def make_engine(
    model: _core.ModelConfig | None = None, device: str = "cpu", **config: Any
) -> _core.Engine:
    model = model or (tiny_model() if device == "cpu" else cuda_model())
    fields = {"device": device, **DEFAULTS, **(ON_CPU if device == "cpu" else ON_CUDA), **config}
    if "graph_sizes" in fields:
        most = fields["max_num_seqs"]
        fields["graph_sizes"] = [size for size in fields["graph_sizes"] if size <= most]
    engine = _core.Engine(_core.EngineConfig(**fields), model)
    for slot, values in random_weights(model).items():
        engine.load_weight(slot, values, "float32")
    engine.finish_loading()
    return engine


def prompt(key: int, length: int) -> list[int]:
    """A random prompt; of two with one key, the shorter is the beginning of the longer."""
    return np.random.default_rng(key).integers(0, VOCAB, 300)[:length].tolist()


def params(max_tokens: int = 8, **fields: Any) -> _core.SamplingParams:
    defaults: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens}
    return _core.SamplingParams(**{**defaults, **fields})


@dataclass
class Got:
    """All that one choice got. Log-probabilities are kept as bytes: equal means equal bits."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[bytes] = field(default_factory=list)
    finish_reason: str = ""
    ends: int = 0
    num_cached: int = 0
    error: str = ""

    def promised(self) -> tuple[Any, ...]:
        return self.tokens, self.logprobs, self.prompt_logprobs, self.finish_reason


Results = dict[tuple[int, int], Got]


def _bits(p: _core.TokenLogprobs) -> bytes:
    floats = [p.logprob, *p.top_logprobs]
    ids = [p.token_id, p.rank, *p.top_ids]
    return struct.pack(f"{len(floats)}f{len(ids)}i", *floats, *ids)


def take(outputs: list[_core.Output], results: Results) -> int:
    """Adds outputs to results; returns how many requests they end."""
    done = 0
    for output in outputs:
        got = results.setdefault((output.request_id, output.choice), Got())
        got.tokens += output.token_ids
        got.logprobs += map(_bits, output.logprobs)
        got.prompt_logprobs += map(_bits, output.prompt_logprobs)
        got.num_cached = output.num_cached
        got.error = output.error or got.error
        if output.finish_reason:
            got.finish_reason = output.finish_reason
            got.ends += 1
        done += output.request_done
    return done


def run_all(engine: _core.Engine, before_step: Callable[[int], None] | None = None) -> Results:
    """Steps by hand until there is nothing to do."""
    results: Results = {}
    step = 0
    while True:
        if before_step:
            before_step(step)
        worked = engine.step()
        take(engine.wait_outputs(0.0), results)
        if not worked:
            return results
        step += 1


def wait_all(engine: _core.Engine, requests: int) -> Results:
    """The outputs of an engine thread until so many requests are done."""
    results: Results = {}
    while requests > 0:
        outputs = engine.wait_outputs(timeout=60.0)
        assert outputs, "the engine gave nothing for a minute"
        requests -= take(outputs, results)
    return results


def is_balanced(s: dict[str, Any]) -> bool:
    ended = s["finished"] + s["aborted"] + s["rejected"] + s["failed"]
    return bool(s["received"] == ended + s["running"] + s["waiting"])


def all_blocks_back(s: dict[str, Any]) -> bool:
    """Nothing is referenced: every block is free or cached."""
    unreferenced = s["blocks_free"] + s["blocks_cached"]
    return bool(s["blocks_used"] == 0 and unreferenced == s["blocks_total"])
