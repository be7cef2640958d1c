"""The metrics: what is counted, that it balances, and that dashboard and documentation know it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nano_inference import AsyncLLM, SamplingParams, __version__
from nano_inference.outputs import RequestMetrics
from nano_inference.server.metrics import Histogram, Metrics

DOCS = Path(__file__).parents[2] / "docs"
REQUEST = RequestMetrics(
    arrival_time=100.0,
    first_scheduled_time=100.5,
    first_token_time=102.0,
    last_token_time=105.0,
    finished_time=106.0,
)


def samples(metrics: Metrics) -> dict[str, float]:
    """'name{label=value,…}' -> value, of everything that /metrics shows."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for s in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))
            found[s.name + (f"{{{labels}}}" if labels else "")] = s.value
    return {name.removeprefix("nano_inference_"): value for name, value in found.items()}


def family_names(metrics: Metrics) -> set[str]:
    """As they appear in queries: counters with _total, histograms with _bucket, _sum, _count."""
    names = {re.sub(r"\{.*", "", name) for name in samples(metrics)}
    return {n if n.startswith("process_") else "nano_inference_" + n for n in names}


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(
        str(model_dir), use_tqdm_on_load=False, num_blocks=200, trace_capacity=8, max_waiting=4
    )
    yield llm
    llm.shutdown()


@pytest.fixture
def attached(llm: AsyncLLM) -> Metrics:
    metrics = Metrics()
    metrics.attach(llm, "tiny")
    return metrics


def run(llm: AsyncLLM, prompts: list[list[int]], max_tokens: int, n: int = 1) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n)

    async def read(prompt: list[int]) -> None:
        async for _ in llm.generate(prompt, params):
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*map(read, prompts))

    asyncio.run(all_of_them())


# -- Handlers -------------------------------------------------------------------------------------


def test_histogram_buckets_hold_their_bound() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value, times in ((0.5, 1), (1.0, 1), (1.5, 3), (5.0, 1), (5.1, 2)):
        histogram.observe(value, times)
    family = histogram.family("x", "doc")
    values = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert values == {
        ("x_bucket", "1.0"): 2,
        ("x_bucket", "2.0"): 5,
        ("x_bucket", "5.0"): 6,
        ("x_bucket", "+Inf"): 8,
        ("x_count", None): 8,
        ("x_sum", None): 0.5 + 1.0 + 4.5 + 5.0 + 10.2,
    }
    assert histogram.count == 8


def test_times_of_a_request() -> None:
    metrics = Metrics()
    metrics.request_started("/v1/completions")
    assert samples(metrics)["requests_in_flight{endpoint=/v1/completions}"] == 1
    metrics.request_finished(
        "/v1/completions",
        200,
        ["stop", "length"],
        REQUEST,
        prompt_tokens=30,
        generated_tokens=8,
        cached_tokens=16,
    )
    found = samples(metrics)
    assert found["requests_in_flight{endpoint=/v1/completions}"] == 0
    assert found["requests_total{endpoint=/v1/completions,status=200}"] == 1
    for reason in ("stop", "length"):
        assert (
            found[f"finished_choices_total{{endpoint=/v1/completions,finish_reason={reason}}}"] == 1
        )
    assert found["request_queue_time_seconds_sum"] == 0.5
    assert found["time_to_first_token_seconds_sum"] == 2.0
    assert found["e2e_request_latency_seconds_sum"] == 6.0
    # two choices of 4 tokens: 3 s for 3 gaps
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(1.0)
    assert found["request_prompt_tokens_sum"] == 30
    assert found["request_generation_tokens_sum"] == 8
    assert found["request_cached_tokens_sum"] == 16


def test_requests_that_the_engine_never_saw_have_no_times() -> None:
    metrics = Metrics()
    metrics.request_started("e")
    metrics.request_finished("e", 429)
    metrics.request_started("e")
    metrics.request_finished("e", 499, ["abort"], RequestMetrics(arrival_time=1.0))
    found = samples(metrics)
    assert found["requests_total{endpoint=e,status=429}"] == 1
    assert found["requests_total{endpoint=e,status=499}"] == 1
    assert found["e2e_request_latency_seconds_count"] == 0
    assert found["time_to_first_token_seconds_count"] == 0
    assert found["request_prompt_tokens_count"] == 1


def test_one_token_has_no_time_between_tokens() -> None:
    metrics = Metrics()
    metrics.request_started("e")
    metrics.request_finished("e", 200, ["length"], REQUEST, 3, 1)
    assert samples(metrics)["request_time_per_output_token_seconds_count"] == 0


def test_tokens_sent_together_share_their_time() -> None:
    metrics = Metrics()
    metrics.observe_tokens(1, 0.5)
    metrics.observe_tokens(4, 0.8)
    metrics.observe_tokens(0, 3.0)
    found = samples(metrics)
    assert found["inter_token_latency_seconds_count"] == 5
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(1.3)
    assert found["inter_token_latency_seconds_bucket{le=0.2}"] == 4


def test_methods_that_nobody_knows_make_no_new_series() -> None:
    metrics = Metrics()
    metrics.http_response("GET", 200)
    for method in ("BREW", "WHEN"):
        metrics.http_response(method, 405)
    found = samples(metrics)
    assert found["http_responses_total{method=GET,status=200}"] == 1
    assert found["http_responses_total{method=other,status=405}"] == 2


# -- Engine ---------------------------------------------------------------------------------------


def test_before_the_engine_is_there() -> None:
    found = samples(Metrics())
    assert "num_requests_running" not in found and "engine_requests_total" not in str(found)
    assert found["process_resident_memory_bytes"] > 1e6
    (build,) = [name for name in found if name.startswith("build_info")]
    assert f"version={__version__}" in build


def test_engine_counters_balance(llm: AsyncLLM, attached: Metrics) -> None:
    before = samples(attached)
    run(llm, [[7] * 20, [8] * 20], max_tokens=5, n=2)
    found = samples(attached)
    grown = {name: found[name] - before.get(name, 0) for name in found}
    assert grown["engine_requests_total{state=received}"] == 2
    assert grown["engine_requests_total{state=finished}"] == 2
    # The prompts, each once (its choices share it), and 2 x 2 answers of 5 tokens.
    assert grown["prompt_tokens_total"] == 40
    assert grown["generation_tokens_total"] == 20
    parts = ("finished", "aborted", "rejected", "failed")
    ended = sum(found[f"engine_requests_total{{state={part}}}"] for part in parts)
    pending = found["num_requests_running"] + found["num_requests_waiting"]
    assert found["engine_requests_total{state=received}"] == ended + pending
    blocks = {
        state: found[f"kv_cache_blocks{{state={state}}}"] for state in ("used", "cached", "free")
    }
    assert blocks["used"] == 0
    assert blocks["cached"] + blocks["free"] == found["kv_cache_num_blocks"] == 200
    assert found["kv_cache_usage_perc"] == 0
    assert found["engine_healthy"] == 1
    assert any("model=tiny" in name for name in found if name.startswith("build_info"))


def test_hit_rate(model_dir: Path) -> None:
    llm = AsyncLLM(str(model_dir), use_tqdm_on_load=False, num_blocks=200)
    metrics = Metrics()
    metrics.attach(llm)
    assert samples(metrics)["prefix_cache_hit_rate"] == 0
    for _ in range(2):
        run(llm, [list(range(100, 133))], max_tokens=2)
    found = samples(metrics)
    llm.shutdown()
    assert found["prompt_tokens_cached_total"] == 32
    assert found["prompt_tokens_computed_total"] == 33 + 1
    assert found["prompt_tokens_total"] == 66
    assert found["prefix_cache_hit_rate"] == pytest.approx(
        found["prefix_cache_hits_total"] / found["prefix_cache_queries_total"]
    )
    assert found["prefix_cache_hits_total"] == 32


def test_steps_are_seen_once_and_lost_ones_are_counted(llm: AsyncLLM, attached: Metrics) -> None:
    attached.observe_steps()
    first = samples(attached)
    steps = llm.stats["steps"]
    # 4 steps of a trace of 8, then 12 more
    run(llm, [[9] * 3], max_tokens=4)
    attached.observe_steps()
    attached.observe_steps()
    run(llm, [[10] * 3], max_tokens=12)
    found = samples(attached)
    assert llm.stats["steps"] == steps + 16

    def grown(name: str) -> float:
        return found[name] - first[name]

    for name in ("step_duration_seconds", "step_batch_size", "step_tokens"):
        assert grown(f"{name}_count") == 4 + 8
    assert grown("steps_unobserved_total") == 4
    assert grown("step_batch_size_sum") == 12
    assert grown("step_tokens_sum") == 3 + 3 + 8  # the second prompt's step is a lost one
    assert grown("engine_steps_total") == 16
    assert found["step_duration_seconds_sum"] > 0


def test_without_a_trace_there_are_no_step_times(model_dir: Path) -> None:
    llm = AsyncLLM(str(model_dir), use_tqdm_on_load=False, num_blocks=200, trace_capacity=0)
    metrics = Metrics()
    metrics.attach(llm)
    run(llm, [[9] * 3], max_tokens=4)
    found = samples(metrics)
    llm.shutdown()
    assert found["step_duration_seconds_count"] == found["steps_unobserved_total"] == 0
    assert found["engine_steps_total"] == 4


# -- Dashboard and documentation ------------------------------------------------------------------


def complete(metrics: Metrics) -> Metrics:
    metrics.request_started("e")
    metrics.request_finished("e", 200, ["stop"])
    metrics.http_response("GET", 200)
    return metrics


def used_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:nano_inference|process)_[a-z0-9_]+\b", text))


def test_the_dashboard_uses_our_names(attached: Metrics) -> None:
    board = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    panels = [p for p in board["panels"] if p["type"] != "row"]
    queries = [t["expr"] for p in panels for t in p["targets"]]
    assert len(panels) >= 10 and all(queries)
    used = set().union(*map(used_names, queries))
    assert used <= family_names(complete(attached))
    histograms = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    for name in histograms:
        assert f"nano_inference_{name}_seconds_bucket" in used
    ids = [p["id"] for p in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert not overlapping([p["gridPos"] for p in board["panels"]])


def overlapping(places: list[dict[str, Any]]) -> bool:
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    return len(set(cells)) != len(cells) or max(x for x, _ in cells) > 23


def test_the_documentation_lists_every_metric(attached: Metrics) -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(nano_inference_[a-z0-9_]+)", text, flags=re.M))
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in family_names(complete(attached))
        if name.startswith("nano_inference_")
    }
    assert listed == shown
