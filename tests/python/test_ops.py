"""Every operator on every device of this machine (see reference.py) against numpy.

Bounds: an fp32 sum of products may be off by 20 eps * sum |a b|; where results are 16-bit numbers,
2 of their units come on top, and inputs are rounded beforehand. A bf16 dot product of a CPU rounds
x first; it may be off by twice the error of a plain loop that does the same. Outputs lie in a
larger array full of sentinels and start as NaN: a stray write or a forgotten element is seen.
Promise 1 (a row's result is its own) is checked by ==."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import reference as ref
from nano_inference import _core

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

ISAS = ref.ISAS
ops_for = ref.ops_for
TOLERANCE = 20 * ref.EPS
SENTINEL = np.float32(-12345.678)

each_isa = pytest.mark.parametrize("isa", ISAS)
each_device = pytest.mark.parametrize("device", ref.DEVICES)
each_weight = pytest.mark.parametrize(
    "device,dtype", [(d, t) for d in ref.DEVICES for t in ref.weight_dtypes(d)]
)
each_cache = pytest.mark.parametrize(
    "device,dtype", [(d, t) for d in ref.DEVICES for t in ref.cache_dtypes(d)]
)


class Guarded:
    """A matrix inside a larger array: `view` is it, `check` sees what was written around it."""

    def __init__(self, rows: int, cols: int, values: Array | None = None, pad: int = 5) -> None:
        self.whole = np.full((rows + 2, cols + 2 * pad), SENTINEL, np.float32)
        self.inside = (slice(1, rows + 1), slice(pad, pad + cols))
        self.view = self.whole[self.inside]
        self.view[...] = np.nan if values is None else values

    def check(self) -> Floats:
        around = self.whole.copy()
        around[self.inside] = SENTINEL
        assert np.all(around == SENTINEL), "a write outside of the output"
        assert not np.isnan(self.view).any(), "an element was not written"
        return self.view.copy()


def normal(rng: np.random.Generator, *shape: int, device: str = "portable") -> Floats:
    """As the device's activations can hold them."""
    return ref.rounded(rng.standard_normal(shape, dtype=np.float32), ref.activation_dtype(device))


def strided(x: Floats) -> Floats:
    """The same rows, further apart."""
    return Guarded(*x.shape, x).view


def assert_close(
    got: Array, want: Array, bound: Array, what: str = "", device: str = "portable"
) -> None:
    bound = bound + 2 * ref.ulp(want, ref.activation_dtype(device))
    off = np.abs(got.astype(np.float64) - want)
    worst = np.unravel_index(np.argmax(off - bound), off.shape)
    assert np.all(off <= bound), (
        f"{what} at {worst}: got {got[worst]}, want {want[worst]}, "
        f"off by {off[worst]:.3g}, allowed {bound[worst]:.3g}"
    )


def assert_same(a: Array, b: Array, what: str = "") -> None:
    """Bit for bit."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert a.tobytes() == b.tobytes(), f"{what}: {np.argwhere(a != b)[:5].tolist()} differ"


# -- Instruction sets -----------------------------------------------------------------------------


def test_isas_are_those_of_the_machine() -> None:
    assert ISAS[-1] == "reference" and "portable" in ISAS and len(set(ISAS)) == len(ISAS)
    if platform.machine() != "x86_64":
        return
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs = {"avx2": {"avx2", "fma", "f16c"}, "avx512": avx512, "avx512_bf16": avx512}
    needs["avx512_bf16"] = avx512 | {"avx512_bf16"}
    for isa, wanted in needs.items():
        assert (isa in ISAS) == (wanted <= flags), isa


@each_isa
@pytest.mark.parametrize("threads", [1, 2])
def test_name_says_isa_and_threads(isa: str, threads: int) -> None:
    assert _core.Ops(isa=isa, num_threads=threads).name.startswith(f"{isa}, {threads} thread")


def test_environment_chooses_the_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANO_INFERENCE_CPU_ISA", "portable")
    assert _core.Ops().name.startswith("portable")
    assert _core.Ops(isa="reference").name.startswith("reference")
    monkeypatch.setenv("NANO_INFERENCE_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="NANO_INFERENCE_CPU_ISA.*mmx.*portable"):
        _core.Ops()


def test_unknown_isa_and_device() -> None:
    with pytest.raises(ValueError, match="sse9.*portable, reference"):
        _core.Ops(isa="sse9")
    with pytest.raises(ValueError, match="abacus"):
        _core.Ops(device="abacus")


# -- linear ---------------------------------------------------------------------------------------

LINEAR_SHAPES = [
    (1, 1, 1),
    (1, 33, 7),
    (2, 32, 64),
    (3, 31, 65),
    (5, 64, 33),
    (8, 96, 128),
    (13, 70, 257),
    (33, 50, 100),
    (65, 129, 96),
    (4, 40, 1025),
]


def naive_linear(x: Floats, w: Floats, bias: Array | None, before: Array | None) -> Floats:
    out = np.zeros((len(x), len(w)), np.float32)
    for k in range(x.shape[1]):
        out += x[:, k, None] * w[None, :, k]
    for extra in (bias, before):
        out = out if extra is None else out + extra
    return out


def check_linear(
    got: Floats,
    x: Floats,
    w: Floats,
    bias: Array | None,
    before: Array | None,
    device: str,
    dtype: str,
) -> None:
    want, size = ref.linear(x, w, bias)
    rounding = np.zeros_like(want)  # of the product, before it is added to what is there
    if before is not None:
        rounding = 2 * ref.ulp(want, ref.activation_dtype(device))
        want, size = want + before, size + np.abs(before)
    if device in ref.CUDA:
        naive = ref.rounded(naive_linear(x, w, bias, None), dtype)
        naive = naive if before is None else ref.rounded(naive + before, dtype)
        bound = 2 * np.abs(naive - want).max()
        assert_close(got, want, bound, "the relative rule", device)
    if device != "avx512_bf16" or dtype != "bfloat16":
        assert_close(got, want, TOLERANCE * size + rounding, device=device)
        return
    # The bf16 dot product: x is rounded first, then the same fp32 sum …
    x16 = ref.rounded(x, "bfloat16")
    exact, size16 = ref.linear(x16, w, bias)
    if before is not None:
        exact, size16 = exact + before, size16 + np.abs(before)
    assert_close(got, exact, TOLERANCE * size16)
    # … so the whole error is at most twice that of a plain loop over bf16 inputs.
    naive = naive_linear(x16, w, bias, before)
    off, plain = np.abs(got - want).max(), np.abs(naive - want).max()
    assert off <= 2 * plain + TOLERANCE * size.max()


@each_weight
@pytest.mark.parametrize("source", ref.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear(device: str, dtype: str, source: str, bias: bool, accumulate: bool) -> None:
    ops, rng = ops_for(device), np.random.default_rng(1)
    for m, n, k in LINEAR_SHAPES:
        x = strided(normal(rng, m, k, device=device))
        given = ref.to_bits(normal(rng, n, k), source)
        b = normal(rng, n, device=device) if bias else None
        before = normal(rng, m, n, device=device) if accumulate else None
        out = Guarded(m, n, before)
        ops.linear(x, ops.weight(given, source, dtype, b), out.view, accumulate)
        w = ref.rounded(ref.from_bits(given, source), dtype)
        check_linear(out.check(), x, w, b, before, device, dtype)


@each_weight
def test_weight_rows_may_be_far_apart(device: str, dtype: str) -> None:
    ops, rng = ops_for(device), np.random.default_rng(2)
    w, x = normal(rng, 37, 51), normal(rng, 3, 51)
    for source in ref.DTYPES:
        dense = ref.to_bits(w, source)
        wide = np.zeros((37, 80), dense.dtype)
        wide[:, 7:58] = dense
        a, b = np.empty((3, 37), np.float32), np.empty((3, 37), np.float32)
        ops.linear(x, ops.weight(dense, source, dtype), a)
        ops.linear(x, ops.weight(wide[:, 7:58], source, dtype), b)
        assert_same(a, b)


@each_weight
def test_linear_rows_are_independent(device: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    x, w, b = normal(rng, 65, 129), normal(rng, 300, 129), normal(rng, 300)
    whole = np.empty((65, 300), np.float32)
    ops_for(device).linear(x, ops_for(device).weight(w, dtype=dtype, bias=b), whole)
    for threads in (1, 2):
        ops = ops_for(device, threads)
        weight = ops.weight(w, dtype=dtype, bias=b)
        for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 24, 31, 32, 33, 64, 65):
            for first in range(0, 65, size):
                rows = x[first : first + size]
                out = np.empty((len(rows), 300), np.float32)
                ops.linear(rows, weight, out)
                assert_same(out, whole[first : first + size], f"{threads} threads, {size} rows")
                if first > 0 and size < 16:
                    break


@each_weight
def test_a_bad_row_spoils_only_itself(device: str, dtype: str) -> None:
    ops, rng = ops_for(device), np.random.default_rng(4)
    x, weight = normal(rng, 9, 33), ops.weight(normal(rng, 40, 33), dtype=dtype)
    good, bad = np.empty((9, 40), np.float32), np.empty((9, 40), np.float32)
    ops.linear(x, weight, good)
    spoilt = x.copy()
    spoilt[4] = np.nan
    spoilt[6, -1] = np.inf  # beside the padding of an odd K
    ops.linear(spoilt, weight, bad)
    assert np.isnan(bad[4]).all() and not np.isfinite(bad[6]).any()
    assert np.isinf(bad[6]).all(), "infinity met the zeros of the padding"
    keep = [0, 1, 2, 3, 5, 7, 8]
    assert_same(bad[keep], good[keep])


@each_device
def test_weights_at_the_edges_of_their_type(device: str) -> None:
    """Conversion keeps infinities, signed zeros, subnormals and the largest numbers, and rounds
    ties to even."""
    tricky = np.array(
        [0.0, -0.0, 1.0, -2.5, 65504.0, 65519.9, 65520.0, 1e-7, 6e-8, 2.98e-8, 2.9e-8, -5.96e-8]
        + [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9 + 2**-20, 1 + 2**-11, 1 + 3 * 2**-11, 3.3e38, 1e-30]
        + [np.inf, -np.inf, np.nan],
        np.float32,
    )
    ops = ops_for(device)
    ids, positions = np.arange(len(tricky), dtype=np.int32), np.zeros(len(tricky), np.int32)
    for source in ref.DTYPES:
        given = ref.to_bits(tricky, source)
        for dtype in ref.weight_dtypes(device):
            out = np.empty((len(tricky), 1), np.float32)
            ops.embed(ids, positions, ops.weight(given[:, None], source, dtype), out)
            want = ref.rounded(ref.from_bits(given, source), dtype)
            np.testing.assert_array_equal(out[:, 0], want, err_msg=f"{source} to {dtype}")
            finite = ~np.isnan(want)
            assert np.all(np.signbit(out[finite, 0]) == np.signbit(want[finite]))


# -- embed, gather_rows ---------------------------------------------------------------------------


@each_weight
def test_embed(device: str, dtype: str) -> None:
    ops, rng = ops_for(device), np.random.default_rng(5)
    for vocab, hidden, tokens in [(1, 1, 1), (50, 33, 7), (70, 64, 65), (129, 100, 3)]:
        table, learned = normal(rng, vocab, hidden), normal(rng, 40, hidden)
        ids = rng.integers(0, vocab, tokens, dtype=np.int32)
        positions = rng.integers(0, 40, tokens, dtype=np.int32)
        w, p = ops.weight(table, dtype=dtype), ops.weight(learned, dtype=dtype)
        rows, added = ref.rounded(table, dtype)[ids], ref.rounded(learned, dtype)[positions]

        out = Guarded(tokens, hidden)
        ops.embed(ids, positions, w, out.view)
        assert_same(out.check(), rows)
        out = Guarded(tokens, hidden)
        ops.embed(ids, positions, w, out.view, position_table=p, scale=3.3)
        scaled = rows.astype(np.float64) * np.float32(3.3)
        bound = 2 * ref.EPS * (np.abs(scaled) + np.abs(added))
        assert_close(out.check(), scaled + added, bound, device=device)
        for i in range(tokens):  # alone
            alone = Guarded(1, hidden)
            ops.embed(ids[i : i + 1], positions[i : i + 1], w, alone.view, p, 3.3)
            assert_same(alone.check()[0], out.view[i].copy())


@each_device
def test_gather_rows(device: str) -> None:
    ops, rng = ops_for(device), np.random.default_rng(6)
    for rows, cols in [(1, 1), (9, 33), (40, 128)]:
        x = strided(normal(rng, rows, cols, device=device))
        wanted = rng.integers(0, rows, 13).astype(np.int32)
        out = Guarded(13, cols)
        ops.gather_rows(x, wanted, out.view)
        assert_same(out.check(), x[wanted])
    ops.gather_rows(x, np.zeros(0, np.int32), np.empty((0, cols), np.float32))


# -- Norms ----------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_and_add_norm(device: str, kind: str) -> None:
    ops, rng = ops_for(device), np.random.default_rng(7)
    dtype = ref.activation_dtype(device)
    for rows, n in [
        (1, 1),
        (3, 2),
        (5, 7),
        (2, 16),
        (65, 33),
        (4, 64),
        (3, 100),
        (9, 257),
        (2, 1024),
    ]:
        for bias, eps, offset in [(False, 1e-6, 0.0), (True, 1e-5, 3.0), (True, 0.0, 0.0)]:
            if eps == 0.0 and n < 7:
                continue  # ill-conditioned: the variance of one or two numbers may vanish
            given = ref.rounded(normal(rng, rows, n) + np.float32(offset), dtype)
            w, b = normal(rng, n), normal(rng, n) if bias else None
            x = Guarded(rows, n, given)
            out = Guarded(rows, n)
            ops.norm(x.view, w, out.view, b, kind, eps)
            want, size = ref.norm(given, w, b, kind, eps)
            assert_close(out.check(), want, TOLERANCE * size, f"norm, {rows} x {n}", device)
            assert_same(x.check(), given, "norm changed its input")

            delta, out = normal(rng, rows, n, device=device), Guarded(rows, n)
            residual = Guarded(rows, n, given)
            ops.add_norm(delta, residual.view, w, out.view, b, kind, eps)
            total = ref.rounded(given + delta, dtype)  # exactly
            assert_same(residual.check(), total, "the residual is the sum")
            want, size = ref.norm(total, w, b, kind, eps)
            assert_close(out.check(), want, TOLERANCE * size, f"add_norm, {rows} x {n}", device)

            alone = np.empty((1, n), np.float32)
            last = given[-1:].copy()
            ops_for(device, 1).add_norm(delta[-1:], last, w, alone, b, kind, eps)
            assert_same(alone[0], out.view[-1].copy(), "alone")


@each_device
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_zeros_and_large_numbers(device: str, kind: str) -> None:
    x = np.zeros((3, 40), np.float32)
    x[1] = 1e4 if device == "cuda_f16" else 1e15
    x[2, ::2], x[2, 1::2] = 1e4, 1e4 + 1
    x = ref.rounded(x, ref.activation_dtype(device))
    w, out = np.ones(40, np.float32), np.full((3, 40), np.nan, np.float32)
    ops_for(device).norm(x, w, out, None, kind, 1e-6)
    want, size = ref.norm(x, w, None, kind, 1e-6)
    assert_close(out, want, TOLERANCE * size, device=device)


# -- Activations ----------------------------------------------------------------------------------

TRICKY = [0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 10.0, -10.0, 14.0, -14.0, 40.0, -40.0]
TRICKY += [85.0, -85.0, 87.5, -87.5, 90.0, -90.0, 1e4, -1e4, 1e30, -1e30]


@each_device
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_activation(device: str, act: str, gated: bool) -> None:
    ops, rng = ops_for(device), np.random.default_rng(8)
    for rows, n in [(1, 1), (2, 7), (5, 33), (65, 16), (3, 100)]:
        x = normal(rng, rows, 2 * n if gated else n) * 4
        if n == 33:
            x[0, : len(TRICKY)] = TRICKY
        if device == "cuda_f16":
            x = np.clip(x, -1e3, 1e3)  # and no product beyond its largest number
        x = ref.rounded(x, ref.activation_dtype(device))
        given = Guarded(*x.shape, x)
        out = Guarded(rows, n)
        ops.activation(given.view, act, gated, out.view)
        assert_same(given.check(), x, "the input was changed")
        want, size = ref.activation(x[:, :n], act)
        if gated:
            up = x[:, n:].astype(np.float64)
            want, size = want * up, (size + np.abs(want)) * np.abs(up)
        bound = TOLERANCE * size
        if device in ref.CUDA:  # 1 + tanh is as exact as tanh is, far in the tail as well
            bound = bound + 2 * ref.EPS * np.abs(x[:, :n] * (up if gated else 1))
        assert_close(out.check(), want, bound, act, device)
        alone = np.empty((1, n), np.float32)
        ops.activation(x[-1:], act, gated, alone)
        assert_same(alone[0], out.view[-1].copy(), "alone")


@each_device
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu", "relu"])
def test_activation_keeps_nan(device: str, act: str) -> None:
    """A NaN must show in the output and not turn into a plausible number."""
    x, out = np.ones((1, 37), np.float32), np.empty((1, 37), np.float32)
    x[0, [3, 36]] = np.nan
    ops_for(device).activation(x, act, False, out)
    assert np.flatnonzero(np.isnan(out[0])).tolist() == [3, 36]


# -- RoPE and the cache ---------------------------------------------------------------------------


def rope_tables(positions: int, rotary_dim: int) -> tuple[Floats, Floats]:
    inv_freq = 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angle = np.arange(positions)[:, None] * inv_freq[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


# Of 8-bit caches; powers of two, so that scaling leaves the mantissas.
K_SCALE, V_SCALE = 0.5, 2.0


def stored(x: Array, dtype: str, scale: float) -> Floats:
    """What comes out of a cache."""
    return (
        ref.rounded(x / scale, dtype) * np.float32(scale)
        if "fp8" in dtype
        else ref.rounded(x, dtype)
    )


def new_cache(
    ops: _core.Ops, blocks: int, block_size: int, kv_heads: int, d: int, dtype: str
) -> _core.Cache:
    scales = (K_SCALE, V_SCALE) if "fp8" in dtype else (1.0, 1.0)
    return ops.cache(blocks, block_size, kv_heads, d, dtype, *scales)


def filled_cache(
    ops: _core.Ops, blocks: int, block_size: int, kv_heads: int, d: int, dtype: str, value: float
) -> _core.Cache:
    """A cache with `value` in every slot."""
    cache = new_cache(ops, blocks, block_size, kv_heads, d, dtype)
    slots = np.arange(blocks * block_size, dtype=np.int64)
    qkv = np.full((len(slots), (1 + 2 * kv_heads) * d), value, np.float32)
    ops.rope_kv_write(qkv, np.zeros(len(slots), np.int32), slots, cache)
    return cache


# (heads, kv_heads, head_dim, rotary_dim)
ROPE_SHAPES = [
    (1, 1, 6, 6),
    (4, 2, 20, 12),
    (3, 3, 64, 64),
    (8, 1, 80, 32),
    (2, 2, 128, 128),
    (2, 1, 6, 0),
]
ROPE_SHAPES += [(2, 1, 256, 64), (4, 2, 64, 48), (3, 1, 96, 96)]


@pytest.mark.parametrize(
    "device,dtype,shape",
    [
        (device, dtype, shape)
        for device in ref.DEVICES
        for dtype in ref.cache_dtypes(device)
        for shape in ROPE_SHAPES
        if ref.supported(device, head_dim=shape[2])
    ],
    ids=str,
)
def test_rope_kv_write(device: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    heads, kv_heads, d, rotary = shape
    ops, rng = ops_for(device), np.random.default_rng(9)
    cos, sin = rope_tables(60, rotary) if rotary else (None, None)
    for block_size, qk_norm in [
        (1, False),
        (2, True),
        (4, False),
        (8, True),
        (16, True),
        (32, False),
        (48, True),
    ]:
        if not ref.supported(device, block_size=block_size):
            continue
        blocks = -(-50 // block_size)
        tokens = 19
        positions = rng.integers(0, 60, tokens, dtype=np.int32)
        slots = rng.permutation(blocks * block_size)[:tokens].astype(np.int64)
        slots[[3, 11]] = -1
        x = normal(rng, tokens, (heads + 2 * kv_heads) * d, device=device)
        qw, kw = (normal(rng, d), normal(rng, d)) if qk_norm else (None, None)
        cache = filled_cache(ops, blocks, block_size, kv_heads, d, dtype, 7.0)
        given = Guarded(*x.shape, x)
        ops.rope_kv_write(given.view, positions, slots, cache, cos, sin, qw, kw, 1e-6)
        got = given.check()[:, : heads * d].reshape(tokens, heads, d)

        q, k, v = np.split(x.reshape(tokens, -1, d), [heads, heads + kv_heads], 1)
        want, size = expected_rope(q, qw, positions, cos, sin)
        assert_close(got, want, TOLERANCE * size, "q", device)
        keys, values = cache.read()
        written = slots >= 0
        want, size = expected_rope(k, kw, positions, cos, sin)
        want, size = want[written].transpose(1, 0, 2), size[written].transpose(1, 0, 2)
        bound = TOLERANCE * size * (1 if dtype == "float32" else 1.01)
        scale = K_SCALE if "fp8" in dtype else 1.0
        bound = bound + ref.half_ulp(want / scale, dtype) * scale
        assert_close(keys[:, slots[written]], want, bound, "k")
        assert_same(
            values[:, slots[written]],
            np.ascontiguousarray(stored(v[written], dtype, V_SCALE).transpose(1, 0, 2)),
            "v",
        )
        rest = np.setdiff1d(np.arange(blocks * block_size), slots)
        assert np.all(keys[:, rest] == 7) and np.all(values[:, rest] == 7), "another slot changed"


def expected_rope(
    x: Floats, weight: Floats | None, positions: Array, cos: Floats | None, sin: Floats | None
) -> tuple[Array, Array]:
    value, size = x.astype(np.float64), np.abs(x.astype(np.float64))
    if weight is not None:
        value, size = ref.norm(x, weight, None, "rms", 1e-6)
    if cos is not None and sin is not None:
        value, size = ref.rotate(value, cos[positions], sin[positions])
    return value, size


@each_cache
def test_rope_kv_write_rows_are_independent(device: str, dtype: str) -> None:
    """The same values in the cache for all block sizes, thread counts and cuts."""
    rng = np.random.default_rng(10)
    heads, kv_heads, d, tokens = 4, 2, 64 if device in ref.CUDA else 20, 33
    x, positions = (
        normal(rng, tokens, (heads + 2 * kv_heads) * d),
        np.arange(tokens, dtype=np.int32),
    )
    qw, kw = normal(rng, d), normal(rng, d)
    cos, sin = rope_tables(tokens, 12)
    seen = []
    sizes = (32, 16, 48, 64) if device in ref.CUDA else (1, 8, 48, 2)
    for block_size, threads, cut in zip(
        (16, *sizes), (2, 2, 1, 2, 1), (33, 1, 7, 20, 33), strict=True
    ):
        ops = ops_for(device, threads)
        cache = new_cache(ops, -(-tokens // block_size), block_size, kv_heads, d, dtype)
        qkv = x.copy()
        for i in range(0, tokens, cut):
            rows = slice(i, min(i + cut, tokens))
            slots = np.arange(rows.start, rows.stop, dtype=np.int64)
            ops.rope_kv_write(qkv[rows], positions[rows], slots, cache, cos, sin, qw, kw)
        seen.append((qkv[:, : heads * d].copy(), cache.read()[:, :, :tokens].copy()))
    for q, kv in seen[1:]:
        assert_same(q, seen[0][0], "q")
        assert_same(kv, seen[0][1], "cache")


@pytest.mark.parametrize(
    "device,dtype",
    [(d, "float16") for d in ref.DEVICES if d != "cuda_bf16"] + [(d, "fp8_e4m3") for d in ref.CUDA],
)
def test_a_narrow_cache_saturates(device: str, dtype: str) -> None:
    """An infinity would turn the rows of other tokens of its tile into NaN: 0 * inf."""
    ops, d = ops_for(device), 64
    largest = 65504 if dtype == "float16" else 448
    values = np.zeros(d, np.float32)
    values[:6] = [1e6, -1e6, np.inf, 65519.0 if dtype == "float16" else 449.0, largest, 1.0]
    x = np.concatenate([np.zeros(d, np.float32), values, -values])[None].copy()
    cache = ops.cache(1, 16, 1, d, dtype)
    ops.rope_kv_write(x, np.zeros(1, np.int32), np.array([3], np.int64), cache)
    want = np.zeros(d, np.float32)
    want[:6] = [largest, -largest, largest, largest, largest, 1]
    keys, vals = cache.read()
    np.testing.assert_array_equal(keys[0, 3], want)
    np.testing.assert_array_equal(vals[0, 3], -want)


@each_cache
@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_copy_blocks(device: str, dtype: str, block_size: int) -> None:
    ops, rng = ops_for(device), np.random.default_rng(11)
    kv_heads, d, blocks = 3, 20, 7
    if device in ref.CUDA:
        d, block_size = 64, 16 * block_size
    cache = new_cache(ops, blocks, block_size, kv_heads, d, dtype)
    slots = np.arange(blocks * block_size, dtype=np.int64)
    qkv = normal(rng, len(slots), (1 + 2 * kv_heads) * d)
    ops.rope_kv_write(qkv, np.zeros(len(slots), np.int32), slots, cache)
    want = cache.read().reshape(2, kv_heads, blocks, block_size, d).copy()
    ops.copy_blocks(cache, [])
    ops.copy_blocks(cache, [(0, 3), (5, 1), (0, 6)])
    want[:, :, 3], want[:, :, 1], want[:, :, 6] = want[:, :, 0], want[:, :, 5], want[:, :, 0]
    assert_same(cache.read(), want.reshape(2, kv_heads, -1, d))


# -- Attention ------------------------------------------------------------------------------------


class Batch:
    """Sequences with random contents in randomly chosen blocks of a cache whose other slots are
    NaN: whoever reads a slot that is not the sequence's gets NaN."""

    def __init__(
        self,
        device: str,
        lengths: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        d: int = 20,
        block_size: int = 16,
        dtype: str = "float32",
        seed: int = 12,
        poison: float = np.nan,
        threads: int = 2,
    ) -> None:
        rng = np.random.default_rng(seed)
        if not ref.supported(device, head_dim=d):
            d = 64
        if not ref.supported(device, block_size=block_size):
            block_size *= 16
        if dtype != "fp8_e4m3":
            dtype = ref.cache_dtype(device, dtype)
        self.device, self.ops = device, ops_for(device, threads)
        ops, self.heads, self.d, self.scale = self.ops, heads, d, d**-0.5
        self.qkv = [normal(rng, n, (heads + 2 * kv_heads) * d, device=device) for n in lengths]
        counts = [-(-n // block_size) for n in lengths]
        order = np.random.default_rng(seed + block_size).permutation(sum(counts) + 3)
        self.width = max(counts) + 1
        self.cache = filled_cache(ops, len(order), block_size, kv_heads, d, dtype, poison)
        self.tables, used = [], 0
        for x, count in zip(self.qkv, counts, strict=True):
            table = np.full(self.width, order[-1], np.int32)
            table[:count] = order[used : used + count]
            used += count
            self.tables.append(table)
            at = np.arange(len(x))
            slots = table[at // block_size].astype(np.int64) * block_size + at % block_size
            ops.rope_kv_write(x.copy(), at.astype(np.int32), slots, self.cache)
        self.q = [x[:, : heads * d].reshape(-1, heads, d) for x in self.qkv]
        kv = [x[:, heads * d :].reshape(-1, 2, kv_heads, d) for x in self.qkv]
        self.k = [stored(x[:, 0], dtype, K_SCALE) for x in kv]
        self.v = [stored(x[:, 1], dtype, V_SCALE) for x in kv]

    def run(
        self, items: list[tuple[int, int, int]], window: int = 0, softcap: float = 0.0
    ) -> list[Floats]:
        """items (sequence, first row, rows): their outputs [rows, heads, d]."""
        rows = np.concatenate([self.q[s][first : first + n] for s, first, n in items])
        out = Guarded(len(rows), self.heads * self.d)
        self.ops.attention(
            strided(rows.reshape(len(rows), -1)),
            np.cumsum([0] + [n for _, _, n in items]).astype(np.int32),
            np.array([first + n for _, first, n in items], np.int32),
            np.stack([self.tables[s] for s, _, _ in items]),
            self.cache,
            out.view,
            self.scale,
            window,
            softcap,
        )
        got = out.check().reshape(-1, self.heads, self.d)
        return np.split(got, np.cumsum([n for _, _, n in items])[:-1])

    def check(
        self, items: list[tuple[int, int, int]], window: int = 0, softcap: float = 0.0
    ) -> None:
        dtype = ref.activation_dtype(self.device)
        narrow = float(ref.ulp(np.ones(1), dtype)[0]) / 2  # of probabilities before they meet V
        for (s, first, n), got in zip(items, self.run(items, window, softcap), strict=True):
            context = slice(first + n)
            expect = functools.partial(
                ref.attention,
                self.q[s][first : first + n],
                self.k[s][context],
                self.v[s][context],
                first,
                self.scale,
                window,
                softcap,
            )
            want, size = expect(narrow / TOLERANCE)
            what = f"sequence {s}, rows {first}+{n}"
            assert_close(got, want, TOLERANCE * size, what, self.device)
            if self.device in ref.CUDA:  # on the whole, twice the error of rounding what is right
                plain, fp32 = rms(ref.rounded(want, dtype) - want), TOLERANCE * rms(expect()[1])
                assert rms(got - want) <= 2 * plain + fp32, what


def rms(x: Array) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


@each_cache
@pytest.mark.parametrize("d", [6, 20, 64, 80, 128, 256])
def test_attention_head_dims(device: str, dtype: str, d: int) -> None:
    batch = Batch(device, [70, 1, 17], d=d, dtype=dtype)
    batch.check([(0, 0, 70)])
    batch.check([(1, 0, 1), (0, 69, 1), (2, 3, 14)])


@each_device
@pytest.mark.parametrize(
    "heads,kv_heads", [(1, 1), (3, 3), (4, 2), (3, 1), (8, 1), (10, 2), (14, 2), (16, 2)]
)
def test_attention_groups(device: str, heads: int, kv_heads: int) -> None:
    batch = Batch(device, [67, 5], heads=heads, kv_heads=kv_heads, d=24, dtype="bfloat16")
    batch.check([(0, 66, 1), (1, 4, 1)])
    batch.check([(1, 0, 5), (0, 2, 65)])


@each_device
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 32, 48])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 100])
def test_attention_blocks_and_windows(device: str, block_size: int, window: int) -> None:
    batch = Batch(device, [200, 64, 65, 3], block_size=block_size, d=16, dtype="float16")
    batch.check([(1, 63, 1), (2, 64, 1), (3, 0, 3), (0, 120, 80)], window)
    batch.check([(0, 0, 200), (2, 0, 65)], window)


@each_cache
def test_attention_rows_are_independent(device: str, dtype: str) -> None:
    """One prefill, chunks, single decodes, neighbours, threads, block sizes: the same bits."""
    n = 150
    whole = Batch(device, [n, 40, 90], dtype=dtype).run([(0, 0, n)])[0]
    for block_size, threads in [(16, 1), (16, 2), (1, 2), (4, 1), (48, 2)]:
        batch = Batch(device, [n, 40, 90], dtype=dtype, block_size=block_size, threads=threads)
        for cuts in (
            [0, n],
            [0, 1, 64, 128, n],
            [0, 63, 65, 130, 149, n],
            list(range(0, n, 11)) + [n],
        ):
            for first, last in zip(cuts, cuts[1:], strict=False):
                got = batch.run([(0, first, last - first)])[0]
                assert_same(got, whole[first:last], f"rows {first} to {last}")
        rows = [0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 149]
        alone = [batch.run([(0, r, 1)])[0] for r in rows]
        beside = batch.run([(1, 39, 1)] + [(0, r, 1) for r in rows] + [(2, 7, 80), (1, 0, 20)])
        for r, a, b in zip(rows, alone, beside[1:], strict=False):
            assert_same(a, whole[r : r + 1], f"row {r} alone")
            assert_same(b, whole[r : r + 1], f"row {r} beside others")


@each_device
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_attention_softcap(device: str, softcap: float) -> None:
    batch = Batch(device, [200, 40])
    if device not in ref.CUDA:
        with pytest.raises(ValueError, match="soft cap"):
            batch.run([(0, 0, 200)], softcap=softcap)
        return
    batch.check([(0, 0, 200), (1, 39, 1)], 0, softcap)
    batch.check([(0, 199, 1), (1, 3, 37)], 70, softcap)


@each_device
def test_attention_window_rows_are_independent(device: str) -> None:
    n, window = 180, 70
    batch = Batch(device, [n, 30])
    whole = batch.run([(0, 0, n)], window)[0]
    for first, last in [(0, 1), (1, 66), (66, 130), (130, 180), (69, 70), (70, 71), (179, 180)]:
        got = batch.run([(1, 0, 30), (0, first, last - first)], window)[1]
        assert_same(got, whole[first:last], f"rows {first} to {last}")


@each_cache
def test_a_later_token_never_reaches_back(device: str, dtype: str) -> None:
    """Rows computed before a token whose K and V are NaN or infinite are the same as without it,
    although it lies in the same tile and block."""
    for poison in (np.nan, np.inf):
        good, bad = Batch(device, [80], dtype=dtype), Batch(device, [80], dtype=dtype)
        x = bad.qkv[0][70:71].copy()
        x[:, bad.heads * bad.d :] = poison
        slot = np.array([int(bad.tables[0][70 // 16]) * 16 + 70 % 16], np.int64)
        bad.ops.rope_kv_write(x, np.array([70], np.int32), slot, bad.cache)
        want = good.run([(0, 0, 70)])[0]
        assert_same(bad.run([(0, 0, 70)])[0], want)
        assert_same(bad.run([(0, 5, 60)])[0], want[5:65])


@each_device
@pytest.mark.parametrize("size", [1e3, 1e-20])
def test_attention_extreme_scores(device: str, size: float) -> None:
    """Scores far apart (one token takes all) or all equal: no overflow, and no lost mean."""
    batch = Batch(device, [130])
    batch.q[0] = ref.rounded(batch.q[0] * np.float32(size), ref.activation_dtype(device))
    batch.check([(0, 0, 130)])


# -- Bad calls ------------------------------------------------------------------------------------


def bad_calls() -> Iterator[Any]:
    ops = ops_for("portable")
    f = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    i = lambda *values: np.array(values, np.int32)  # noqa: E731
    w, table = ops.weight(f(6, 4)), ops.weight(f(3, 4))
    cache = ops.cache(4, 16, 2, 8)
    slots = np.array([0, 1], np.int64)
    read_only = f(2, 6)
    read_only.flags.writeable = False

    def attend(**change: Any) -> Any:
        args = dict(
            q=f(3, 16), cu_seqlens_q=i(0, 1, 3), context_lens=i(5, 2), scale=1.0, cache=cache,
            block_tables=np.zeros((2, 1), np.int32), out=f(3, 16), window=0,
        )  # fmt: skip
        return lambda: ops.attention(**(args | change))

    def rope(**change: Any) -> Any:
        args = dict(qkv=f(2, 48), positions=i(0, 1), slots=slots, cache=cache)
        return lambda: ops.rope_kv_write(**(args | change))

    def sample(**row: Any) -> Any:
        return lambda: ops.sample(f(1, 10), [row], max_logprobs=3)

    yield "weight of 1 dimension", "2 dimensions", lambda: ops.weight(f(4))
    yield "empty weight", "empty", lambda: ops.weight(f(4, 0))
    yield "weight with strange dtype", "dtype.*int8.*float32", lambda: ops.weight(f(4, 4), "int8")
    yield "weight of 8 bytes", "4 bytes, got 8", lambda: ops.weight(np.ones((4, 4)))
    yield "weight of integers", "float32", lambda: ops.weight(np.ones((4, 4), np.int32))
    yield "bf16 as float16", "bfloat16", lambda: ops.weight(f(2, 2).astype(np.float16), "bfloat16")
    yield "transposed weight", "contiguous rows", lambda: ops.weight(f(4, 6).T)
    yield "bias too short", "bias.*6", lambda: ops.weight(f(6, 4), bias=f(5))
    yield (
        "misaligned",
        "aligned",
        lambda: ops.weight(np.zeros(65, np.uint8)[1:].view(np.float32).reshape(4, 4)),
    )

    yield "linear: x too wide", "5 features.*4", lambda: ops.linear(f(2, 5), w, f(2, 6))
    yield "linear: out too small", r"out must be \[2, 6\]", lambda: ops.linear(f(2, 4), w, f(1, 6))
    yield "linear: out too narrow", "out", lambda: ops.linear(f(2, 4), w, f(2, 5))
    yield "linear: out of another type", None, lambda: ops.linear(f(2, 4), w, np.ones((2, 6)))
    yield "linear: out read only", "writeable", lambda: ops.linear(f(2, 4), w, read_only)
    yield "linear: transposed x", "contiguous rows", lambda: ops.linear(f(4, 2).T, w, f(2, 6))
    yield "linear: x of 3 dimensions", "2 dimensions", lambda: ops.linear(f(1, 2, 4), w, f(2, 6))
    yield "linear: no array", None, lambda: ops.linear("x", w, f(2, 6))

    yield "embed: token too large", "token_ids.*6", lambda: ops.embed(i(6), i(0), w, f(1, 4))
    yield "embed: token negative", "token_ids.*-1", lambda: ops.embed(i(-1), i(0), w, f(1, 4))
    yield "embed: token of 64 bits", None, lambda: ops.embed(np.array([2**32]), i(0), w, f(1, 4))
    yield "embed: positions short", "position", lambda: ops.embed(i(0, 1), i(0), w, f(2, 4))
    yield "embed: position too large", "positions", lambda: ops.embed(i(0), i(3), w, f(1, 4), table)
    yield (
        "embed: tables of unlike width",
        "position_table",
        lambda: ops.embed(i(0), i(0), w, f(1, 4), ops.weight(f(3, 9))),
    )
    yield "embed: out", "out", lambda: ops.embed(i(0), i(0), w, f(1, 5))

    yield "norm: no weight", "weight", lambda: ops.norm(f(1, 4), None, f(1, 4))
    yield "norm: weight", "weight.*4", lambda: ops.norm(f(1, 4), f(3), f(1, 4))
    yield "norm: bias", "bias.*4", lambda: ops.norm(f(1, 4), f(4), f(1, 4), f(9))
    yield "norm: kind", "batch", lambda: ops.norm(f(1, 4), f(4), f(1, 4), kind="batch")
    yield "add_norm: residual", "residual", lambda: ops.add_norm(f(1, 4), f(2, 4), f(4), f(1, 4))

    yield (
        "activation: name",
        "swish.*silu",
        lambda: ops.activation(f(1, 4), "swish", False, f(1, 4)),
    )
    yield "activation: odd", "even", lambda: ops.activation(f(1, 5), "silu", True, f(1, 2))
    yield "activation: out", "out", lambda: ops.activation(f(1, 4), "silu", True, f(1, 4))
    yield "gather: row", "rows", lambda: ops.gather_rows(f(2, 4), i(0, 2), f(2, 4))

    yield "cache: block size", "block_size.*12", lambda: ops.cache(1, 12, 1, 8)
    yield "cache: nothing", "positive", lambda: ops.cache(0, 16, 1, 8)
    yield "cache: too large", "large", lambda: ops.cache(2**31 - 1, 16, 2**31 - 1, 2**31 - 1)
    yield "cache: dtype", "int4", lambda: ops.cache(1, 16, 1, 8, "int4")
    yield "cache: fp8", "fp8.*CPU.*bfloat16", lambda: ops.cache(1, 16, 1, 8, "fp8_e4m3")
    yield "cache: scale", "k_scale.*fp8", lambda: ops.cache(1, 16, 1, 8, k_scale=2.0)
    yield "cache: no scale", "positive", lambda: ops.cache(1, 16, 1, 8, v_scale=0.0)
    yield "activations", "computes in float32", lambda: _core.Ops(activation_dtype="bfloat16")
    yield "isa of a card", "isa.*cuda", lambda: _core.Ops("cuda", "portable")
    yield "copy: block", "out of range", lambda: ops.copy_blocks(cache, [(0, 4)])
    yield "copy: negative", "out of range", lambda: ops.copy_blocks(cache, [(-1, 0)])

    yield "rope: slot too large", "slot 64", rope(slots=np.array([0, 64], np.int64))
    yield "rope: slot -2", "slot -2", rope(slots=np.array([0, -2], np.int64))
    yield "rope: slots of floats", None, rope(slots=np.array([0.0, 1.0]))
    yield "rope: columns", "columns", rope(qkv=f(2, 44))
    yield "rope: no q", "columns", rope(qkv=f(2, 32))
    yield "rope: position", "positions", rope(positions=i(0, 9), cos=f(9, 4), sin=f(9, 4))
    yield "rope: cos alone", "together", rope(cos=f(9, 4))
    yield "rope: too many dimensions", "10.*8", rope(cos=f(9, 5), sin=f(9, 5))
    yield "rope: shapes differ", "one shape", rope(cos=f(9, 4), sin=f(8, 4))
    yield "rope: q_norm", "q_norm.*8", rope(q_norm=f(4))

    yield "attention: rows", "cu_seqlens_q", attend(cu_seqlens_q=i(0, 1, 4))
    yield "attention: not from 0", "cu_seqlens_q", attend(cu_seqlens_q=i(1, 1, 3))
    yield (
        "attention: descending",
        "cu_seqlens_q",
        attend(cu_seqlens_q=i(0, 1000, 3), context_lens=i(2000, 9)),
    )
    yield "attention: context too short", "context of 1", attend(context_lens=i(5, 1))
    yield "attention: context too long", "block table", attend(context_lens=i(17, 2))
    yield "attention: block", "block_tables", attend(block_tables=np.full((2, 1), 4, np.int32))
    yield (
        "attention: negative block",
        "block_tables",
        attend(block_tables=np.full((2, 1), -1, np.int32)),
    )
    yield "attention: tables", "block_tables", attend(block_tables=np.zeros((1, 1), np.int32))
    yield "attention: columns", "columns", attend(q=f(3, 15), out=f(3, 15))
    yield "attention: heads", "multiple", attend(q=f(3, 24), out=f(3, 24))
    yield "attention: window", "window", attend(window=-1)
    yield "attention: softcap", "softcap", attend(softcap=-1.0)
    yield "attention: out", "out", attend(out=f(3, 8))

    yield "sample: field", "temprature", sample(temprature=1.0)
    yield "sample: type", "temperature", sample(temperature="hot")
    yield "sample: token", "token 10", sample(counts={10: 1})
    yield "sample: bias", "token -1", sample(bias={-1: 1.0})
    yield "sample: target", "token 10", sample(target=10)
    yield "sample: mask", "mask.*10", sample(mask=np.ones(9, bool))
    yield "sample: logprobs", "num_logprobs", sample(num_logprobs=4)
    yield "sample: negative seed", "seed", sample(seed=-1)
    yield "sample: rows", "one dict", lambda: ops.sample(f(2, 4), [{}])
    yield "sample: no vocabulary", "columns", lambda: ops.sample(f(1, 0), [{}])
    yield "sample: max_logprobs", "max_logprobs", lambda: ops.sample(f(1, 4), [{}], 5)


@pytest.mark.parametrize(
    "message,call", [pytest.param(m, c, id=name) for name, m, c in bad_calls()]
)
def test_bad_calls_are_refused(message: str | None, call: Any) -> None:
    """ValueError that names the culprit; what is no array of that type at all is a TypeError."""
    with pytest.raises(ValueError if message else TypeError, match=message):
        call()


def test_what_a_card_cannot_do_is_refused() -> None:
    """With the list of what it can."""
    assert ops_for("staged_cpu").activation_dtype == "float32"
    if not _core.cuda_devices():
        with pytest.raises(RuntimeError, match="CUDA cannot be used: ."):
            _core.Ops("cuda")
    for device in ref.CUDA:
        ops, dtype = ops_for(device), ref.activation_dtype(device)
        assert ops.activation_dtype == dtype
        x = np.ones((4, 4), np.float32)
        with pytest.raises(ValueError, match=f"float32.*{dtype}"):
            ops.weight(x)
        with pytest.raises(ValueError, match=f"float32.*{dtype}.*fp8_e4m3"):
            ops.cache(4, 16, 2, 64)
        with pytest.raises(ValueError, match="head_dim 80.*64, 96, 128, 256"):
            ops.cache(4, 16, 2, 80, dtype)
        with pytest.raises(ValueError, match="block_size.*multiple of 16.*8"):
            ops.cache(4, 8, 2, 64, dtype)
    if ref.CUDA:
        with pytest.raises(ValueError, match="bfloat16 or float16.*float32"):
            _core.Ops("cuda", activation_dtype="float32")


def test_copies_for_a_card_change_nothing() -> None:
    """The staging layer over a CPU, as over a card, gives the CPU's bits."""
    rng, results = np.random.default_rng(13), []
    x, w, b = normal(rng, 5, 70), normal(rng, 40, 70), normal(rng, 40)
    for device in ("portable", "staged_cpu"):
        ops, out = ops_for(device), np.empty((5, 40), np.float32)
        ops.linear(x, ops.weight(w, dtype="float16", bias=b), out)
        attended = Batch(device, [70, 20], dtype="bfloat16").run([(0, 3, 60), (1, 19, 1)])
        results.append([out, *attended])
    for plain, staged in zip(*results, strict=True):
        assert_same(plain, staged)
