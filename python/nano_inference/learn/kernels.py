"""What stage 4 measures: operators on their own, with the bytes and operations that they take."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _core
from .by_hand import Decoder

F32 = npt.NDArray[np.float32]
LANES = {"reference": 1, "portable": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 32}
"""Products that one instruction adds up."""


def isas() -> list[str]:
    """Plain loops first, the best last."""
    return _core.cpu_isas()[::-1]


def seconds_of(work: Callable[[], object], budget: float = 0.3) -> float:
    """The least of repeated calls: on a machine that does other things, too, that one says what the
    code can do."""
    best, end = np.inf, time.perf_counter() + budget
    for calls in range(1000):
        began = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end and calls >= 2:
            break
    return best


def random_matrix(rows: int, columns: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def to_bf16(x: F32) -> npt.NDArray[np.uint16]:
    """Bits, rounded to the nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# -- Attention ------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """A prompt of n tokens: queries for all heads, keys and values for the KV heads."""

    q: F32  # [n, heads * dim]
    k: F32  # [n, kv_heads, dim]
    v: F32
    heads: int
    kv_heads: int
    dim: int

    @classmethod
    def random(cls, n: int, heads: int = 8, kv_heads: int = 4, dim: int = 64) -> Prompt:
        q = random_matrix(n, heads * dim, 1)
        k, v = (random_matrix(n, kv_heads * dim, s).reshape(n, kv_heads, dim) for s in (2, 3))
        return cls(q, k, v, heads, kv_heads, dim)

    @property
    def n(self) -> int:
        return len(self.q)

    @property
    def operations(self) -> int:
        """Of scores and of sums of values, for the pairs that causal attention needs."""
        return 4 * self.heads * self.dim * self.n * (self.n + 1) // 2


def materialised(p: Prompt) -> F32:
    """As in the textbook: all scores, then softmax, then the values. In numpy."""
    group = p.heads // p.kv_heads
    q = p.q.reshape(p.n, p.heads, p.dim).transpose(1, 0, 2)
    k = np.repeat(p.k.transpose(1, 2, 0), group, 0)
    v = np.repeat(p.v.transpose(1, 0, 2), group, 0)
    scores = np.matmul(q, k)
    scores *= np.float32(p.dim**-0.5)
    scores[:, np.triu(np.ones((p.n, p.n), bool), 1)] = -np.inf
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return np.ascontiguousarray(np.matmul(scores, v).transpose(1, 0, 2)).reshape(p.n, -1)


def materialised_bytes(p: Prompt) -> int:
    """Passes over the scores above: written by the product, read and written by scale, shift, exp
    and division, written by the mask (half), read by maximum, sum and the second product."""
    passes = 1 + 2 * 4 + 0.5 + 3
    return int(passes * 4 * p.heads * p.n * p.n)


class Online:
    """The engine's attention: tiles of 64 tokens, softmax as it goes, no score in memory."""

    def __init__(self, p: Prompt, isa: str = "") -> None:
        self.p, self.ops = p, _core.Ops(isa=isa)
        blocks = -(-p.n // 16)
        self.cache = self.ops.cache(blocks, 16, p.kv_heads, p.dim)
        qkv = np.concatenate([p.q, p.k.reshape(p.n, -1), p.v.reshape(p.n, -1)], 1)
        positions = np.arange(p.n, dtype=np.int32)
        self.ops.rope_kv_write(qkv, positions, positions.astype(np.int64), self.cache)
        self.tables = np.arange(blocks, dtype=np.int32)[None]
        self.rows = np.array([0, p.n], np.int32)
        self.context = np.array([p.n], np.int32)
        self.out = np.empty_like(p.q)

    def __call__(self) -> F32:
        p = self.p
        self.ops.attention(
            p.q, self.rows, self.context, self.tables, self.cache, self.out, p.dim**-0.5
        )
        return self.out


def online_bytes(p: Prompt) -> int:
    """Q in, the result out, and K and V once for each block of queries that sees them: 96 rows of a
    block are 96 * kv_heads / heads tokens (cpp/cpu/attention.cpp)."""
    tokens = 96 * p.kv_heads // p.heads
    seen = sum(min(first + tokens, p.n) for first in range(0, p.n, tokens))
    return 2 * p.q.nbytes + 2 * 4 * seen * p.kv_heads * p.dim


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python's allocator (numpy's arrays, too) held at once for it."""
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - base
    finally:
        tracemalloc.stop()


# -- Orders of summation --------------------------------------------------------------------------


def split_linear(ops: _core.Ops, x: F32, weights: Sequence[_core.Weight]) -> F32:
    """x W^T as a sum over cuts of the summation index, each a call of the operator."""
    out = np.zeros((len(x), 0), np.float32)
    columns = x.shape[1] // len(weights)
    for i, weight in enumerate(weights):
        part = x[:, i * columns : (i + 1) * columns]
        if not i:
            out = np.empty((len(x), weight_rows(weight, columns)), np.float32)
        ops.linear(part, weight, out, accumulate=i > 0)
    return out


def weight_rows(weight: _core.Weight, columns: int) -> int:
    """Output features of a float32 weight (a multiple of 32, so that nothing is padded)."""
    return weight.bytes // 4 // columns


def units_apart(a: F32, b: F32) -> npt.NDArray[np.int64]:
    """How many float32 numbers lie between a and b."""

    def order(x: F32) -> npt.NDArray[np.int64]:
        bits = x.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.abs(order(a) - order(b))


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], count: int) -> Generated:
    """`count` sampled tokens for each prompt (seed: its place), all in one batch."""
    tokens: list[list[int]] = [[] for _ in prompts]
    first_logits: list[F32] = []
    computed = [0] * len(prompts)
    fresh = [list(p) for p in prompts]
    for _ in range(count):
        logits = decoder.forward(fresh, computed)
        first_logits.append(logits[0].copy())
        computed = [c + len(f) for c, f in zip(computed, fresh, strict=True)]
        rows = [{"temperature": 1.0, "seed": i, "position": c} for i, c in enumerate(computed)]
        ids = decoder.ops.native.sample(logits, rows)["token_ids"].tolist()
        for own, token in zip(tokens, ids, strict=True):
            own.append(token)
        fresh = [[token] for token in ids]
    return Generated(tokens, first_logits)


@dataclass
class Generated:
    tokens: list[list[int]]
    logits: list[F32]
    """Of the first prompt, a step each."""


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """The place from which they are no longer equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
