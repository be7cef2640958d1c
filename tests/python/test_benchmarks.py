"""What benchmarks/ leave in results/."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Without a card, its results in tmp_path; of two models the second fails."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_gpu")
    common = importlib.import_module("common")

    def measure_model(name: str, *_: Any) -> tuple[list[dict[str, Any]], str]:
        if name == "llama-3.1-8b":
            raise KeyboardInterrupt
        return bench.table_rows(name, {True: {"decode 1": 1.5}}), "a backend"

    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(bench, "measure_model", measure_model)
    monkeypatch.setattr(bench._core, "cuda_devices", lambda: ["a card"])
    yield bench
    for name in ("bench_gpu", "common"):  # names that others may have
        sys.modules.pop(name, None)


def test_a_run_that_is_cut_leaves_the_models_before(
    bench_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = tmp_path / "results"

    def run(models: str) -> dict[str, Any]:
        args = ["bench_gpu.py", "--save", "--commit", models, "--models", models]
        monkeypatch.setattr(sys, "argv", args)
        if "llama-3.1-8b" in models:
            with pytest.raises(KeyboardInterrupt):
                bench_gpu.main()
        else:
            bench_gpu.main()
        assert sorted(path.name for path in results.iterdir()) == ["gpu.json", "gpu.md"]
        found: dict[str, Any] = json.loads((results / "gpu.json").read_text())
        for model in found["models"]:
            assert f"| {model} | decode 1 |" in (results / "gpu.md").read_text()
        assert [row["model"] for row in found["results"]] == list(found["models"])
        assert found["context"]["backend"] == "a backend"
        return found

    assert list(run("qwen3-0.6b,qwen3-14b")["models"]) == ["qwen3-0.6b", "qwen3-14b"]
    cut = "llama-3.2-1b,llama-3.1-8b"
    found = run(cut)  # nothing of the run before
    assert list(found["models"]) == ["llama-3.2-1b"] and found["context"]["commit"] == cut
    assert run("llama-3.1-8b") == found  # cut before there was anything to save


def test_steps_of_a_prefill(bench_gpu: Any) -> None:
    assert bench_gpu.prefill_steps(1, 4000, 8192) == [[(0, 4000, 4000)]]
    assert bench_gpu.prefill_steps(2, 5, 5) == [[(0, 5, 5)], [(1, 5, 5)]]
    assert bench_gpu.prefill_steps(2, 7, 4) == [
        [(0, 4, 4)],
        [(0, 3, 7), (1, 1, 1)],
        [(1, 4, 5)],
        [(1, 2, 7)],
    ]
    steps = bench_gpu.prefill_steps(16, 2000, 8192)
    assert [sum(rows for _, rows, _ in step) for step in steps] == [8192, 8192, 8192, 7424]
    assert steps[0][-1] == (4, 192, 192) and steps[1][0] == (4, 1808, 2000)


def test_shares_of_a_prefill(bench_gpu: Any) -> None:
    parts = {"products 1x4000": 60.0, "attention 1x4000": 15.0}
    parts |= {"products 16x2000": 500.0, "attention 16x2000": 50.0}
    found = {"prefill 1x4000": 40e3, "prefill 16x2000": 32e3}  # in 100 ms and a second
    shares = bench_gpu.with_shares(found, parts)
    assert shares["parts of prefill 1x4000"] == pytest.approx(75)
    assert shares["parts of prefill 16x2000"] == pytest.approx(55)
    assert bench_gpu.with_shares(found, {}) == found
    rows = bench_gpu.table_rows("llama-3.1-8b", {True: shares, False: shares})
    assert {row["case"].split()[0]: row["unit"] for row in rows} == {
        "prefill": "tokens/s",
        "products": "ms",
        "attention": "ms",
        "parts": "%",
    }
