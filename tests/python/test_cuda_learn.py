"""The learning path on a card, in small: the effect of each experiment by counts and bits, never by
time. Stages 1 to 3 must count there what they count on a CPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from nano_inference import _core
from nano_inference.cli import main
from nano_inference.learn import catalog
from nano_inference.learn.experiment import Result
from nano_inference.learn.run import run
from nano_inference.plot import render

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not _core.cuda_devices(), reason=_core.cuda_error() or "no card")

EXPERIMENTS = {e.key: e for s in catalog.STAGES for e in s.experiments if "cuda" in e.devices}


@cache
def result(key: str, device: str = "cuda") -> Result:
    return run(EXPERIMENTS[key], device, small=True)


def counts(key: str) -> dict[str, float]:
    return result(key).report.counts


@pytest.mark.parametrize("key", EXPERIMENTS)
def test_reports_are_whole(key: str) -> None:
    found = result(key)
    report = found.report
    assert found.expectation and report.outcome and report.rows
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.panels and render(report.panels, key).startswith("<svg")
    assert found.as_dict()["machine"] == _core.cuda_devices()[0]


# Counts that do not depend on the model's shape, which is another one on a card.
SAME = {
    "1.1": ("prompt_tokens", "logits", "tokens", "same_tokens"),
    "1.2": ("steps_without", "steps_with", "tokens_without", "tokens_with", "operations_without")
    + ("operations_with", "expected_operations_with", "same_tokens"),
    "1.4": ("kept: top_k 4", "kept: temperature 0.5", "different: temperature 0 (greedy)")
    + ("cut off: top_k 4", "cut off: top_p 0.5"),
    "2.1": ("steps: 1", "steps: 4"),
    "2.2": ("steps: static", "steps: continuous", "idle: static", "idle: continuous")
    + ("tokens", "same_tokens"),
    "2.3": ("prompt steps: whole prompt", "prompt steps: chunks, 16 rows a step")
    + ("largest step: whole prompt", "largest step: chunks, 16 rows a step")
    + ("missed: whole prompt", "missed: chunks, 16 rows a step"),
    "3.1": ("live_contiguous", "live_paged", "fit_contiguous", "fit_paged", "steps_contiguous")
    + ("steps_paged", "requests", "same_answers"),
    "3.4": ("prompt_tokens", "found_one_after_another", "found_all_arrive_together", "requests")
    + ("same_answers",),
    "3.5": ("turns", "same_answers"),
    "3.6": ("needed", "requests", "same_answers", "runs"),
}


@pytest.mark.parametrize("key", SAME)
def test_a_card_counts_what_a_cpu_counts(key: str) -> None:
    on_cpu = result(key, "cpu").report.counts
    assert {name: counts(key)[name] for name in SAME[key]} == {
        name: on_cpu[name] for name in SAME[key]
    }


def test_draws_follow_the_distribution() -> None:
    spreads = [value for name, value in counts("1.4").items() if name.startswith("spread")]
    assert len(spreads) == 6 and max(spreads) < 3


def test_no_score_of_a_prompt_is_held() -> None:
    c = counts("4.7")
    for n in (256, 512):
        assert c[f"held_fused_{n}"] == c[f"out_{n}"] == 2 * 32 * 128 * n
        assert c[f"held_naive_{n}"] >= 2 * c[f"scores_{n}"]  # before and after softmax
        assert c[f"error_{n}"] < 0.03  # of bf16


def test_split_attention_has_the_bits_of_uncut_attention() -> None:
    c = counts("4.8")
    assert c["pieces_512"] == 16 and c["pieces_1024"] == 32
    assert c["other_bits"] == c["other_bits_batch"] == 0 < c["outputs"]
    assert c["error_512"] < 0.03 and c["error_1024"] < 0.03


def test_fusion_saves_kernels_and_bytes() -> None:
    c = counts("4.10")
    for n in (1, 64):
        assert c[f"bytes_separate_{n}"] - c[f"bytes_fused_{n}"] == n * c["saved_a_row"]
        assert c[f"error_{n}"] < 0.02
        if c["counted"] == 4:
            assert c[f"kernels_fused_{n}"] == 2 and c[f"kernels_separate_{n}"] >= 4


def test_a_graph_is_the_same_kernels_in_few_launches() -> None:
    c = counts("4.9")
    assert c["same"] == c["runs"] == 2
    if c["counted"] == 2:
        assert c["kernels_eager_tiny"] >= 5 * c["layers_tiny"]
        assert c["kernels_graph_tiny"] >= 5 * c["layers_tiny"]
        assert c["calls_eager_tiny"] >= 5 * c["layers_tiny"] > 4 >= c["calls_graph_tiny"]


def test_an_answer_does_not_depend_on_its_batch_until_it_is_allowed_to() -> None:
    c = counts("4.11")
    assert c["same_invariant"] == c["batches"] == 4
    assert c["other_bits_invariant"] == c["other_tokens_invariant"] == c["other_ours"] == 0
    # Without the promise it is a matter of which product is fastest where; cut by hand, never.
    assert c["other_split"] > c["outputs"] / 2


def test_operations_and_bytes_under_the_roof() -> None:
    c = counts("4.12")
    for rows, what in ((1, "1 row"), (64, "64 rows")):
        for whose in ("ours", "cuBLAS"):
            assert c[f"operations: product, {what}, {whose}"] == 2 * rows * 256 * 256
            assert c[f"bytes: product, {what}, {whose}"] == 2 * (256 * 256 + 2 * rows * 256)
    label = "decode attention, 2 sequences"
    assert c[f"operations: {label}"] == 4 * c[f"bytes: {label}"]  # heads that share a key
    assert c["balance"] > 20


def test_the_command(tmp_path: Path) -> None:
    args = ["learn", "4.8", "--device", "cuda", "--json", "--out", str(tmp_path)]
    found = CliRunner().invoke(main, args)
    assert found.exit_code == 0
    (printed,) = json.loads(found.stdout)
    assert printed["device"] == "cuda" and printed["counts"]["other_bits"] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"4.8-cuda.svg", "4.8-cuda.json"}
