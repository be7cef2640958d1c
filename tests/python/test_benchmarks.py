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
