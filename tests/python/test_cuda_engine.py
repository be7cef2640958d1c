"""The engine on a card: models against transformers, the promises, graphs, overlap, fp8 caches.

Promises 3, 4, 5 and 11 are in test_promises.py, which runs on every device, operators in
test_ops.py. For the other files hide the card (CUDA_VISIBLE_DEVICES=""): device="auto" would take
it, and the tiny models of most tests have heads that only the CPU can do.
"""

from __future__ import annotations

import json
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from engine_helpers import (
    Results,
    all_blocks_back,
    cuda_model,
    is_balanced,
    make_engine,
    params,
    prompt,
    run_all,
    wait_all,
)
from nano_inference import LLM, SamplingParams, _core, bundled
from test_families import BASE_CASE, CASES, decisive_prompt, reference_logits
from test_promises import (
    NEEDLE,
    NEEDLES,
    alone,
    differences,
    events,
    neighbour,
    run_in_company,
    submit_needle,
)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from training import data, evaluate, skills  # noqa: E402
from training import tokenizer as training_tokenizer  # noqa: E402

pytestmark = pytest.mark.skipif(not _core.cuda_devices(), reason=_core.cuda_error() or "no card")

TYPES = ["bfloat16", "float16"]
HEAD_SIZES = ("64", "96", "128", "256")

# -- Models against transformers ------------------------------------------------------------------

# The golden cases with heads of 64 (of 128 where a case is about them).
SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 160}
GPT2_SIZES["n_inner"] = 328


def make(name: str, path: Path) -> Any:
    family, overrides = CASES[name]
    sizes = GPT2_SIZES if family == "GPT2" else SIZES
    mine = {key: value for key, value in overrides.items() if key not in sizes}
    if "head_dim" in overrides:
        mine["head_dim"] = 128
    config = getattr(transformers, f"{family}Config")(**{**sizes, **mine})
    return tiny.save_model(path, config, seed=len(name))


def build(path: Path, dtype: str, **config: Any) -> _core.Engine:
    fields = {"dtype": dtype, "kv_cache_dtype": dtype, "device": "cuda", **config}
    return tiny.build_engine(path, max_model_len=160, **fields)


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, dtype: str, tmp_path: Path) -> None:
    """RMS error against float32 at most twice that of transformers in the same type."""
    model = make(name, tmp_path)
    ids = np.random.default_rng(3).integers(0, 97, 70).tolist()
    exact = reference_logits(model, ids)
    theirs = rms(reference_logits(model.to(getattr(torch, dtype)), ids) - exact)
    got = build(tmp_path, dtype).logits(ids)
    assert got.shape == exact.shape
    assert 0.0 < rms(got - exact) <= 2 * theirs


@pytest.mark.parametrize("name", BASE_CASE)
def test_greedy_tokens(name: str, tmp_path: Path) -> None:
    """Through scheduler, cache, graphs and sampler; the prompt's best tokens lead by more than what
    float16 may be wrong by."""
    model = make(name, tmp_path)
    ids, want = decisive_prompt(model, 33, tolerance=2e-3)
    for graph_sizes in ([], [1, 2, 4, 8]):
        engine = build(tmp_path, "float16", graph_sizes=graph_sizes)
        assert tiny.greedy(engine, ids, 64) == want


def test_other_head_sizes_are_refused(model_dir: Path) -> None:
    """Before a weight is read, with those that are supported."""
    with pytest.raises(ValueError, match="16") as caught:
        LLM(str(model_dir), device="cuda", use_tqdm_on_load=False)
    assert all(size in str(caught.value) for size in HEAD_SIZES)


# -- Promise 1: same request, same bytes ----------------------------------------------------------

GRAPHS = [1, 2, 4, 8, 16, 32, 64]
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"graph_sizes": [], "overlap": False},
    "graphs": {"graph_sizes": GRAPHS, "overlap": False},
    "overlap": {"graph_sizes": [], "overlap": True},
    "both": {"graph_sizes": GRAPHS, "overlap": True},
}
NUMBERS = [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "fp8_e4m3")]


def on_card(dtype: str = "bfloat16", kv: str = "bfloat16", **config: Any) -> dict[str, Any]:
    return {"device": "cuda", "dtype": dtype, "kv_cache_dtype": kv, **config}


@pytest.mark.parametrize(("dtype", "kv"), NUMBERS)
def test_same_request_same_bytes(dtype: str, kv: str) -> None:
    expected = alone(**on_card(dtype, kv, **WAYS["eager"]))
    assert len(expected) == 6
    assert all(len(got.tokens) == 14 for got in expected.values())
    for way in WAYS.values():
        numbers = on_card(dtype, kv, **way)

        for neighbours in (1, 8, 64):
            engine = make_engine(**numbers, max_num_batched_tokens=300)
            results = run_in_company(engine, neighbours, neighbours, abort=neighbours > 1)
            assert differences(expected, results) == []

        for tokens in (9, 23, 70):  # the prompts are cut into pieces
            engine = make_engine(**numbers, max_num_seqs=9, max_num_batched_tokens=tokens)
            assert differences(expected, run_in_company(engine, 6, 2)) == []

        engine = make_engine(**numbers)  # the prompt is in the cache already
        submit_needle(engine, 0)
        run_all(engine)
        results = run_in_company(engine, 5, 3)
        assert differences(expected, results) == []
        assert results[NEEDLE, 0].num_cached == 48

        engine = make_engine(**numbers, num_blocks=11, max_num_batched_tokens=70)
        results = run_in_company(engine, 8, 4, abort=True, last=True)
        assert differences(expected, results) == []
        assert any(request >= NEEDLE for request, _ in events(engine, "preempted"))


@pytest.mark.parametrize("way", WAYS)
def test_same_bytes_from_a_running_engine(way: str) -> None:
    """Arrivals from several threads at times that nobody chose."""
    expected = alone(**on_card(**WAYS["eager"]))
    engine = make_engine(**on_card(**WAYS[way]), max_num_seqs=12, max_num_batched_tokens=48)
    engine.start()

    def submit(first: int) -> None:
        chance = random.Random(first)
        for number in range(first, first + 12):
            engine.submit(number, *neighbour(chance, number))
            time.sleep(chance.random() / 500)

    threads = [threading.Thread(target=submit, args=(first,)) for first in (1, 101, 201)]
    for thread in threads:
        thread.start()
    for index in range(len(NEEDLES)):
        submit_needle(engine, index)
    results = wait_all(engine, 36 + len(NEEDLES))
    for thread in threads:
        thread.join()
    stats = engine.stats()
    engine.shutdown()
    assert differences(expected, results) == []
    assert is_balanced(stats) and all_blocks_back(stats)


def wide_results(*, invariant: bool, neighbours: int) -> Results:
    """The first needle, on a model whose sums are long enough to be split (K of 2048 and 8192)."""
    model = cuda_model(
        hidden_size=2048, intermediate_size=8192, num_heads=8, layers=[_core.LayerConfig()]
    )
    way = on_card(**WAYS["eager"], batch_invariant=invariant)
    engine = make_engine(model, **way, max_num_batched_tokens=4096)
    submit_needle(engine, 0)
    chance = random.Random(7)
    for number in range(1, neighbours + 1):
        engine.submit(number, prompt(number, chance.randint(30, 60)), params(20))
    return {key: got for key, got in run_all(engine).items() if key == (NEEDLE, 0)}


def test_the_comparison_finds_a_batch_dependent_reduction() -> None:
    """The inverse test. Without the promise the fastest plan is taken for each number of rows, and
    plans for few rows split a sum of 8192 among blocks, which plans for many rows need not: the
    needle's bytes change with its company. With the promise they do not, on the same model."""
    companies = (3, 15, 40, 63)
    expected = wide_results(invariant=True, neighbours=0)
    for neighbours in companies:
        results = wide_results(invariant=True, neighbours=neighbours)
        assert differences(expected, results) == []
    expected = wide_results(invariant=False, neighbours=0)
    others = [wide_results(invariant=False, neighbours=n) for n in companies]
    assert any(differences(expected, results) for results in others)


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_replayed_graph_equals_its_launches(batch: int, overlap: bool) -> None:
    """Also where the batch is padded to the next size (3, 50)."""

    def run(graph_sizes: list[int]) -> Results:
        engine = make_engine(**on_card(graph_sizes=graph_sizes, overlap=overlap))
        for number in range(batch):
            wants = params(40, logprobs=4, temperature=float(number % 2), seed=number)
            engine.submit(number, prompt(number, 5 + number), wants)
        return run_all(engine)

    expected = run([])
    assert len(expected) == batch
    assert differences(expected, run(GRAPHS)) == []


def test_more_choices_than_rows_that_a_product_normalises() -> None:
    engine = make_engine(device="cuda", max_num_seqs=32)
    few, many = (params(4, temperature=0.8, seed=5, n=n) for n in (2, 20))
    engine.submit(1, prompt(3, 7), many)
    results = run_all(engine)
    engine.submit(2, prompt(3, 7), few)
    results.update(run_all(engine))
    for choice in range(2):
        assert results[1, choice].tokens == results[2, choice].tokens
    assert len({tuple(results[1, choice].tokens) for choice in range(20)}) > 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_follows_large_products_changes_no_bit(head_dim: int, tmp_path: Path) -> None:
    """Gate, rotation and writing into the cache, as operators of their own or (on Hopper) as parts
    of products of many rows, as the file of plans says. Two choices a request copy blocks."""
    plans, half = tmp_path / "plans.txt", head_dim // 2
    rope = _core.RopeConfig([10000.0 ** (-i / half) for i in range(half)])

    def run(large: str) -> Results:
        if plans.exists():
            rows = [line.split() for line in plans.read_text().splitlines()]
            assert any(row[3] == "1024" for row in rows)
            fused = [[*row[:9], large, large, *row[11:]] for row in rows]
            plans.write_text("".join(" ".join(row) + "\n" for row in fused))
        model = cuda_model(head_dim=head_dim, ropes=[rope])
        numbers = on_card(plan_cache=str(plans), max_num_batched_tokens=1024)
        engine = make_engine(model, **numbers)
        for number in range(8):
            wants = params(12, n=2, logprobs=2, prompt_logprobs=2, temperature=1.0, seed=number)
            engine.submit(number, prompt(number, 150 + number), wants)
        return run_all(engine)

    run("0")  # plans are measured
    expected = run("0")
    assert len(expected) == 16
    assert differences(expected, run("1")) == []


# -- The bundled model ----------------------------------------------------------------------------

MAIN = bundled.bundled_model(bundled.DEFAULT)
SCORES = json.loads((ROOT / "training/logs/scores.json").read_text())


def load_bundled(**options: Any) -> evaluate.Engine:
    return evaluate.Engine(bundled.DEFAULT, device="cuda", use_tqdm_on_load=False, **options)


@pytest.fixture(scope="module")
def engine() -> Iterator[evaluate.Engine]:
    loaded = load_bundled()
    yield loaded
    loaded.llm.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return training_tokenizer.Tokenizer.from_file(str(MAIN / "tokenizer.json"))


def test_llm(engine: evaluate.Engine) -> None:
    llm = engine.llm
    core, plan = llm.engine.core, llm.engine.plan
    assert core.config.device == "cuda" and core.device_name.startswith("NVIDIA")
    assert (core.config.dtype, core.config.kv_cache_dtype) == ("bfloat16", "bfloat16")
    assert plan.num_blocks == core.num_blocks == llm.stats["blocks_total"]
    assert plan.num_tokens >= llm.engine.loaded.max_model_len
    assert {"config and tokenizer", "weights"} < set(llm.engine.phases)
    question = [{"role": "user", "content": "What is 345 + 278?"}]
    (answer,) = llm.chat(question, SamplingParams(temperature=0), use_tqdm=False)
    assert answer.outputs[0].text == "623"
    sampled = SamplingParams(temperature=0.8, seed=3, max_tokens=60)
    (story,) = llm.generate("Once upon a time", sampled, use_tqdm=False)
    pieces = [piece.outputs[0].text for piece in llm.stream("Once upon a time", sampled)]
    assert "".join(pieces) == story.outputs[0].text and len(pieces) > 1
    assert is_balanced(llm.stats) and all_blocks_back(llm.stats)


def test_options_of_llm() -> None:
    """The same answer whatever is chosen, within what each choice promises."""
    want: list[int] | None = None
    for options in (
        {},
        {"enforce_eager": True, "async_scheduling": False},
        {"cudagraph_capture_sizes": [4], "max_num_seqs": 5, "block_size": 32},
        {"paged": False, "max_num_seqs": 2, "enable_prefix_caching": False},
        {"num_blocks": 200, "max_num_batched_tokens": 64},
        {"gpu_memory_utilization": 0.3, "device": "cuda:0"},
    ):
        fields = {"device": "cuda", "use_tqdm_on_load": False, **options}
        with LLM(bundled.DEFAULT, **fields) as llm:
            wants = SamplingParams(temperature=0.7, seed=1, max_tokens=80, logprobs=1)
            outputs = llm.generate(["Once upon a time"] * 3, wants, use_tqdm=False)
        got = [output.outputs[0].token_ids for output in outputs]
        want = want or got[0]
        assert got == [want] * 3, options


def test_a_card_that_is_too_full_is_said_before_loading() -> None:
    with pytest.raises(MemoryError, match=r"weights .* activations .* in use"):
        LLM(bundled.DEFAULT, device="cuda", gpu_memory_utilization=1e-4)


def test_answers_are_those_of_the_model_card(engine: evaluate.Engine, tokenizer: Any) -> None:
    """Per skill within half a point of the CPU's score on the same 500 questions."""
    kept = SCORES["engine"]["skills"]
    found = evaluate.score_skills(engine, tokenizer, 500)
    assert {*skills.SKILLS, "retrieval at 900"} <= found.keys()
    for skill, score in found.items():
        assert score["percent"] >= 95, (skill, score["wrong"])
        assert abs(score["percent"] - kept[skill]["percent"]) <= 0.5, (skill, score["wrong"])


def test_greedy_answers_are_transformers(engine: evaluate.Engine, tokenizer: Any) -> None:
    """64 tokens of a trained model, which is sure of them: equal to float32's."""
    asked = ["Count from 21 to 40.", 'Copy: "lanterns and harbours".', "Sort: 42, 7, 19, 3"]
    prompts = [evaluate.chat_ids(tokenizer, text) for text in asked]
    model = transformers.AutoModelForCausalLM.from_pretrained(MAIN, dtype=torch.float32)
    wants = SamplingParams(temperature=0, max_tokens=64)
    outputs = engine.llm.generate(prompts, wants, use_tqdm=False)
    for ids, output in zip(prompts, outputs, strict=True):
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=64,
        )
        assert output.outputs[0].token_ids == made[0, len(ids) :].tolist()


def test_an_fp8_cache_costs_less_than_a_percent(engine: evaluate.Engine, tokenizer: Any) -> None:
    """Of perplexity, on held-out stories; with it the cache holds twice as many tokens."""
    writer = data.Writer(tokenizer, "evaluation stories", test=True)
    texts = [
        [training_tokenizer.BOS, *writer.encode(writer.story().text), training_tokenizer.END]
        for _ in range(60)
    ]
    fp8 = load_bundled(kv_cache_dtype="fp8")
    assert fp8.llm.engine.core.config.kv_cache_dtype == "fp8_e4m3"
    assert 2 * fp8.llm.engine.plan.kv_block == engine.llm.engine.plan.kv_block
    ours, exact = fp8.nll(texts), engine.nll(texts)
    fp8.llm.close()
    assert ours != exact
    assert math.exp(ours - exact) == pytest.approx(1.0, abs=0.01)
