"""A Llama's forward pass, written out in Python over the engine's own operators (_core.Ops), so
that an operator can be taken apart, counted or given another order of summation.
cpp/model/decoder.cpp is the same in C++; as long as nothing is switched, the logits are equal bit
by bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core, loader
from ..config import load_model

F32 = npt.NDArray[np.float32]
Split = Callable[[int], int]
_SOURCE = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}


def whole(rows: int) -> int:
    """One chain a sum, whatever the number of rows: the engine's rule."""
    return 1


class Ops:
    """The operators that a layer needs, with what they move. An operator reads its inputs and
    writes its outputs once; weights count as they lie in memory."""

    def __init__(self, isa: str = "", num_threads: int = 0, split: Split = whole) -> None:
        self.native = _core.Ops(isa=isa, num_threads=num_threads)
        self.split = split
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def count(self, name: str, moved: int) -> None:
        self.calls[name] += 1
        self.bytes[name] += moved

    def reset(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def linear(self, x: F32, parts: Sequence[_core.Weight], out: F32) -> None:
        """out = x W^T. `parts` are W's columns, cut evenly; more than one: a split sum."""
        begin = 0
        for i, part in enumerate(parts):
            columns = x.shape[1] * (i + 1) // len(parts) - begin
            self.native.linear(x[:, begin : begin + columns], part, out, accumulate=i > 0)
            self.count("linear", 4 * len(x) * columns + part.bytes + out.nbytes * (1 + (i > 0)))
            begin += columns

    def norm(self, x: F32, weight: F32, out: F32, eps: float) -> None:
        self.native.norm(x, weight, out, eps=eps)
        self.count("norm", x.nbytes + out.nbytes)

    def add_norm(self, x: F32, residual: F32, weight: F32, out: F32, eps: float) -> None:
        self.native.add_norm(x, residual, weight, out, eps=eps)
        self.count("add_norm", x.nbytes + 2 * residual.nbytes + out.nbytes)

    def add(self, x: F32, residual: F32) -> None:
        np.add(residual, x, out=residual)
        self.count("add", x.nbytes + 2 * residual.nbytes)

    def activation(self, x: F32, act: str, gated: bool, out: F32) -> None:
        self.native.activation(x, act, gated, out)
        self.count("activation", x.nbytes + out.nbytes)

    def multiply(self, x: F32, out: F32) -> None:
        np.multiply(out, x, out=out)
        self.count("multiply", x.nbytes + 2 * out.nbytes)


class Decoder:
    """A model of Llama's layout (no biases, no q and k norms) with a cache of `num_seqs` times
    `max_len` tokens; `fused=False` takes the fused operators apart."""

    def __init__(
        self, path: Path, ops: Ops, *, num_seqs: int = 1, max_len: int = 256, fused: bool = True
    ) -> None:
        loaded = load_model(path, max_model_len=max_len)
        config = self.config = loaded.model_config
        if loaded.architecture != "LlamaForCausalLM" or config.qkv_bias or config.mlp_bias:
            raise ValueError(f"{path} is no Llama without biases")
        self.ops, self.fused, self.dtype = ops, fused, loaded.dtype
        self.layers = [_Layer(i) for i in range(len(config.layers))]
        self._slots: dict[str, npt.NDArray[Any]] = {}
        loader.load_weights(self, path, loaded, progress=False)  # type: ignore[arg-type]
        self._weights: dict[tuple[tuple[str, ...], int], list[_core.Weight]] = {}
        self.blocks = -(-max_len // 16)
        self.caches = [
            ops.native.cache(
                num_seqs * self.blocks, 16, config.num_kv_heads, config.head_dim, self.dtype
            )
            for _ in self.layers
        ]
        self.cos, self.sin = ops.native.rope_tables(config.ropes[0], max_len)

    def load_weight(self, slot: str, data: npt.NDArray[Any], dtype: str) -> None:
        """What loader.load_weights fills."""
        self._slots[slot] = np.array(data)

    def norm_weight(self, slot: str) -> F32:
        values = self._slots[f"{slot}.weight"]
        if values.dtype == np.uint16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(values, np.float32)

    def weight(self, names: Sequence[str], cuts: int = 1) -> list[_core.Weight]:
        """The weights `names`, one below the other, their columns cut into so many parts."""
        key = (tuple(names), cuts)
        if key not in self._weights:
            full = np.concatenate([self._slots[f"{name}.weight"] for name in names])
            source = _SOURCE[full.dtype.name]
            edges = [full.shape[1] * i // cuts for i in range(cuts + 1)]
            self._weights[key] = [
                self.ops.native.weight(np.ascontiguousarray(full[:, a:b]), source, self.dtype)
                for a, b in zip(edges, edges[1:], strict=False)
            ]
        return self._weights[key]

    def linear(self, x: F32, names: Sequence[str], out: F32) -> None:
        self.ops.linear(x, self.weight(names, self.ops.split(len(x))), out)

    def forward(self, tokens: Sequence[Sequence[int]], computed: Sequence[int]) -> F32:
        """Logits of the last token of each sequence; sequence s has `computed[s]` tokens in the
        cache already."""
        lens = [len(t) for t in tokens]
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        context = np.array([c + n for c, n in zip(computed, lens, strict=True)], np.int32)
        positions = np.concatenate(
            [np.arange(c, c + n) for c, n in zip(computed, lens, strict=True)]
        ).astype(np.int32)
        tables = np.arange(len(lens) * self.blocks, dtype=np.int32).reshape(len(lens), -1)
        owner = np.repeat(np.arange(len(lens)), lens)
        slots = owner * self.blocks * 16 + positions.astype(np.int64)
        step = _Step(positions, slots.astype(np.int64), starts, context, tables)

        ids = np.concatenate([np.asarray(t, np.int32) for t in tokens])
        c = self.config
        x = np.empty((len(ids), c.hidden_size), np.float32)
        self.ops.native.embed(ids, positions, self.weight(["embed"])[0], x)
        normed = np.empty_like(x)
        self.ops.norm(x, self.norm_weight("layers.0.attn_norm"), normed, c.norm_eps)
        for layer in self.layers:
            self._layer(layer, step, x, normed)
        last = np.ascontiguousarray(normed[starts[1:] - 1])
        logits = np.empty((len(lens), c.vocab_size), np.float32)
        self.linear(last, ["embed" if c.tie_embeddings else "lm_head"], logits)
        return logits

    def _layer(self, layer: _Layer, step: _Step, residual: F32, normed: F32) -> None:
        """decoder.cpp: Decoder::layer."""
        c, ops, p = self.config, self.ops, layer.prefix
        rows, d = len(residual), c.head_dim
        q, kv = c.num_heads * d, c.num_kv_heads * d
        qkv = np.empty((rows, q + 2 * kv), np.float32)
        if self.fused:
            self.linear(normed, [p + "q", p + "k", p + "v"], qkv)
        else:
            self.linear(normed, [p + "q"], qkv[:, :q])
            self.linear(normed, [p + "k"], qkv[:, q : q + kv])
            self.linear(normed, [p + "v"], qkv[:, q + kv :])
        cache = self.caches[layer.index]
        ops.native.rope_kv_write(qkv, step.positions, step.slots, cache, self.cos, self.sin)
        element = 4 if self.dtype == "float32" else 2
        ops.count("rope_kv_write", 2 * 4 * rows * q + (4 + element) * rows * 2 * kv)
        attn = np.empty((rows, q), np.float32)
        ops.native.attention(
            qkv[:, :q], step.starts, step.context, step.tables, cache, attn, 1 / math.sqrt(d)
        )
        ops.count("attention", 2 * attn.nbytes + int(step.context.sum()) * 2 * kv * element)
        delta = np.empty_like(residual)
        self.linear(attn, [p + "o"], delta)
        self._add_norm(delta, residual, p + "mlp_norm", normed)

        inner = c.intermediate_size
        gate_up = np.empty((rows, 2 * inner), np.float32)
        act = np.empty((rows, inner), np.float32)
        if self.fused:
            self.linear(normed, [p + "gate", p + "up"], gate_up)
            ops.activation(gate_up, c.act, True, act)
        else:
            self.linear(normed, [p + "gate"], gate_up[:, :inner])
            self.linear(normed, [p + "up"], gate_up[:, inner:])
            ops.activation(gate_up[:, :inner], c.act, False, act)
            ops.multiply(gate_up[:, inner:], act)
        self.linear(act, [p + "down"], delta)
        last = layer.index + 1 == len(self.layers)
        after = "final_norm" if last else f"layers.{layer.index + 1}.attn_norm"
        self._add_norm(delta, residual, after, normed)

    def _add_norm(self, delta: F32, residual: F32, name: str, out: F32) -> None:
        weight, eps = self.norm_weight(name), self.config.norm_eps
        if self.fused:
            self.ops.add_norm(delta, residual, weight, out, eps)
        else:
            self.ops.add(delta, residual)
            self.ops.norm(residual, weight, out, eps)


class _Layer:
    def __init__(self, index: int) -> None:
        self.index, self.prefix = index, f"layers.{index}."


class _Step:
    """The arrays of core/step_inputs.h that the operators take."""

    def __init__(
        self,
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int32],
        context: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
    ) -> None:
        self.positions, self.slots, self.starts = positions, slots, starts
        self.context, self.tables = context, tables
