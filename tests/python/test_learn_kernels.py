"""Stage 4 of the learning path: what its experiments count, in small; and the forward pass by hand
that they take apart, which must have the engine's bits."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from nano_inference import _core
from nano_inference.bundled import bundled_model
from nano_inference.config import load_model
from nano_inference.learn.by_hand import Decoder, Ops
from nano_inference.learn.experiment import Result
from nano_inference.learn.kernels import (
    Online,
    Prompt,
    first_difference,
    from_bf16,
    materialised,
    online_bytes,
    split_linear,
    to_bf16,
    units_apart,
)
from nano_inference.learn.run import run
from nano_inference.learn.stage4 import EXPERIMENTS as ALL
from nano_inference.loader import load_weights
from nano_inference.plot import render

EXPERIMENTS = [e for e in ALL if "cpu" in e.devices]
PATH = bundled_model("nano-5m")
assert PATH is not None


@cache
def result(key: str) -> Result:
    return run(next(e for e in EXPERIMENTS if e.key == key), small=True)


def counts(key: str) -> dict[str, float]:
    return result(key).report.counts


def test_every_instruction_set_does_the_same_work() -> None:
    c = counts("4.1")
    assert c["isas"] == len(_core.cpu_isas()) >= 2
    assert c["weight_bytes"] == 2 * 96 * 64
    for isa in _core.cpu_isas():
        assert c[f"packed_{isa}"] == c["weight_bytes"]  # panels of 32 of 96 outputs: no padding
        for rows in (1, 8):
            assert c[f"operations_{rows}"] == 2 * rows * 96 * 64
            assert c[f"bytes_{isa}_{rows}"] == 2 * 96 * 64 + 4 * rows * (96 + 64)
            # x is rounded to bf16 (8 bits) where the bf16 dot product is used.
            assert c[f"error_{isa}_{rows}"] < (0.01 if isa == "avx512_bf16" else 1e-5)


def test_packing_changes_the_order_and_nothing_else() -> None:
    c = counts("4.2")
    assert c["stored_bytes"] == c["packed_bytes"] == 2 * 96 * 64
    assert c["same"] == c["sizes"]


def test_fusion_saves_calls_and_bytes_and_no_bit() -> None:
    c = counts("4.3")
    layers = c["layers"]
    outside = 2  # the first norm, the logits; embed is not counted
    for tokens in (1, 16):
        assert c[f"calls_fused_{tokens}"] == 9 * layers + outside
        assert c[f"calls_separate_{tokens}"] == 15 * layers + outside
        saved = c[f"bytes_separate_{tokens}"] - c[f"bytes_fused_{tokens}"]
        assert saved == tokens * c["saved_a_token"] > 0
    assert c["same"] == c["sizes"]


def test_online_softmax_needs_no_score_matrix() -> None:
    c = counts("4.4")
    for n in (64, 128):
        assert c[f"error_{n}"] < 1e-5
        assert c[f"peak_materialised_{n}"] >= c[f"scores_{n}"] == 4 * 8 * n * n
        assert c[f"peak_online_{n}"] < c[f"scores_{n}"] / 16
        assert c[f"bytes_online_{n}"] < c[f"bytes_materialised_{n}"]
    assert c["bytes_materialised_128"] == 4 * c["bytes_materialised_64"]


def test_a_cut_sum_has_other_bits_and_a_batch_has_not() -> None:
    c = counts("4.5")
    assert c["changed_by_batch"] == c["changed_1"] == 0
    for parts in (2, 4, 8):
        assert c[f"changed_{parts}"] > c["outputs"] / 2
    assert c["error_8"] < 4 * c["error"]  # other bits, but no worse


def test_an_answer_does_not_depend_on_its_batch_until_sums_are_cut() -> None:
    c = counts("4.6")
    assert c["engine_same"] == c["engine_runs"] == 6
    assert c["by_hand_same"] == 2
    assert c["logits_same_whole"] == c["logits"]
    assert c["logits_same_cut"] < c["logits"]


@pytest.mark.parametrize("key", [e.key for e in EXPERIMENTS])
def test_reports_are_whole(key: str) -> None:
    found = result(key)
    report = found.report
    assert found.expectation and report.outcome and report.rows
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.panels and render(report.panels, key).startswith("<svg")


# -- The forward pass by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("fused", [True, False])
def test_by_hand_has_the_engines_bits(isa: str, fused: bool) -> None:
    loaded = load_model(PATH, max_model_len=64)
    config = _core.EngineConfig(
        num_blocks=8, max_model_len=64, dtype=loaded.dtype, kv_cache_dtype=loaded.dtype, isa=isa
    )
    engine = _core.Engine(config, loaded.model_config)
    load_weights(engine, PATH, loaded, progress=False)
    engine.finish_loading()
    ids = np.random.default_rng(1).integers(6, 2048, 21).tolist()
    want = engine.logits(ids)

    decoder = Decoder(PATH, Ops(isa), num_seqs=2, max_len=64, fused=fused)
    whole = decoder.forward([ids], [0])[0]
    # In two chunks, beside another sequence: the same.
    decoder.forward([ids[:13], ids[:5]], [0, 0])
    chunked = decoder.forward([ids[13:], ids[5:6]], [13, 5])
    assert np.array_equal(whole, chunked[0])
    if isa == "reference" and not fused:  # its activation rounds once, from double
        assert np.abs(whole - want[-1]).max() < 0.05 * np.abs(want).max()
        return
    assert np.array_equal(whole, want[-1])
    assert np.array_equal(chunked[1], want[5])


def test_rope_tables_are_cosines_and_sines() -> None:
    inv_freq = [1.0, 0.1, 0.01]
    cos, sin = _core.Ops().rope_tables(_core.RopeConfig(inv_freq, 2.0), 50)
    for p in range(50):
        for i, f in enumerate(inv_freq):
            angle = float(np.float32(p) * np.float32(f))
            assert cos[p, i] == pytest.approx(2 * math.cos(angle), abs=3e-7)
            assert sin[p, i] == pytest.approx(2 * math.sin(angle), abs=3e-7)
    with pytest.raises(ValueError, match="num_positions"):
        _core.Ops().rope_tables(_core.RopeConfig(inv_freq), 0)


# -- The helpers, against loops in double precision -----------------------------------------------


@pytest.mark.parametrize("n", [1, 17, 65])
def test_both_attentions_are_attention(n: int) -> None:
    p = Prompt.random(n, heads=4, kv_heads=2, dim=16)
    want = np.zeros((n, 4, 16))
    for head in range(4):
        for i in range(n):
            q = p.q.reshape(n, 4, 16)[i, head].astype(np.float64)
            scores = [q @ p.k[j, head // 2].astype(np.float64) / 4 for j in range(i + 1)]
            weights = np.exp(np.array(scores) - max(scores))
            values = p.v[: i + 1, head // 2].astype(np.float64)
            want[i, head] = weights / weights.sum() @ values
    assert np.abs(materialised(p).reshape(want.shape) - want).max() < 1e-5
    assert np.abs(Online(p)().reshape(want.shape) - want).max() < 1e-5
    assert p.operations == 4 * 4 * 16 * sum(range(1, n + 1))


def test_bytes_of_online_attention_by_hand() -> None:
    p = Prompt.random(100, heads=2, kv_heads=1, dim=8)  # blocks of 48 queries see 48, 96, 100
    assert online_bytes(p) == 2 * 4 * 100 * 16 + 2 * 4 * (48 + 96 + 100) * 8


def test_split_linear_is_the_product() -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((3, 24), (64, 24)))
    ops = _core.Ops()
    for parts in (1, 2, 3):
        pieces = [np.ascontiguousarray(c) for c in np.split(w, parts, axis=1)]
        got = split_linear(ops, x, [ops.weight(piece) for piece in pieces])
        assert np.abs(got - x.astype(np.float64) @ w.astype(np.float64).T).max() < 1e-5


def test_bit_helpers() -> None:
    a = np.array([1.0, -1.0, 0.0, 2.0], np.float32)
    b = np.array([np.nextafter(np.float32(1), np.float32(2)), -1.0, -0.0, 2.0], np.float32)
    assert units_apart(a, b).tolist() == [1, 0, 0, 0]
    x = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-8, -3.5], np.float32)
    assert from_bf16(to_bf16(x)).tolist() == [1.0, 1.0, 1 + 2 * 2**-7, -3.5]  # ties to even
    assert first_difference("abcd", "abxd") == 2 and first_difference("ab", "ab") is None
