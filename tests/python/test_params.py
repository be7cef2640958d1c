"""No silently ignored parameter: one row for each field of SamplingParams and of the engine's
options. A row shows that an accepted value has an effect, and that impossible values are a
ValueError that names the field."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nano_inference import LLM, EngineArgs, QueueFullError, SamplingParams, _core
from nano_inference import engine as engine_module
from nano_inference.config import LoadedConfig, load_model
from nano_inference.engine_args import default_graph_sizes, plan_cache, plan_engine
from nano_inference.outputs import RequestOutput
from nano_inference.random_model import save_safetensors, write_random_model

PROMPT = "an example"
EOS = 257
TO_EOS = {EOS: 100.0}


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(str(model_dir), use_tqdm_on_load=False) as llm:
        yield llm


# -- SamplingParams -------------------------------------------------------------------------------


def greedy(**fields: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": 12, **fields}


def sampled(**fields: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "max_tokens": 12, "seed": 1, **fields}


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@dataclass
class Row:
    """`base` and `changed` differ in the field; effect(out of base, out of changed) shows it."""

    base: dict[str, Any]
    changed: dict[str, Any]
    effect: Callable[[RequestOutput, RequestOutput], bool]
    impossible: list[Any] = field(default_factory=list)


def differs(base: RequestOutput, changed: RequestOutput) -> bool:
    return tokens(base) != tokens(changed)


def becomes_greedy(base: RequestOutput, changed: RequestOutput) -> bool:
    """All chosen tokens are the likeliest, and were not before."""

    def ranks(output: RequestOutput) -> set[int | None]:
        choice = output.outputs[0]
        assert choice.logprobs is not None
        pairs = zip(choice.logprobs, choice.token_ids, strict=True)
        return {logprobs[token].rank for logprobs, token in pairs}

    return ranks(changed) == {1} and ranks(base) != {1}


NOT_A_NUMBER = ["x", None, float("nan"), float("inf")]
NOT_AN_INT = ["x", 1.5, True]
NOT_A_BOOL = ["yes", 1, None]
NOT_IDS = [5, "x", ["a"], [-1], [1.5], [261]]
NOT_STRINGS = [5, [""], [5], ["\ud800"]]

SAMPLING: dict[str, Row] = {
    "n": Row(
        sampled(),
        sampled(n=3),
        lambda a, b: len(a.outputs) == 1 and len({tuple(c.token_ids) for c in b.outputs}) == 3,
        [0, -1, None, 10**6, *NOT_AN_INT],
    ),
    "presence_penalty": Row(
        greedy(max_tokens=60), greedy(max_tokens=60, presence_penalty=2.0), differs,
        [2.1, -2.1, *NOT_A_NUMBER],
    ),
    "frequency_penalty": Row(
        greedy(max_tokens=60), greedy(max_tokens=60, frequency_penalty=2.0), differs,
        [2.1, -2.1, *NOT_A_NUMBER],
    ),
    "repetition_penalty": Row(
        greedy(), greedy(repetition_penalty=5.0), differs, [0.0, -1.0, *NOT_A_NUMBER]
    ),
    "temperature": Row(
        sampled(logprobs=0), sampled(logprobs=0, temperature=0), becomes_greedy,
        [-0.1, True, *NOT_A_NUMBER],
    ),
    "top_p": Row(
        sampled(logprobs=0), sampled(logprobs=0, top_p=1e-4), becomes_greedy,
        [0.0, 1.1, -1, *NOT_A_NUMBER],
    ),
    "top_k": Row(
        sampled(logprobs=0), sampled(logprobs=0, top_k=1), becomes_greedy, [-2, None, *NOT_AN_INT]
    ),
    "min_p": Row(
        sampled(logprobs=0), sampled(logprobs=0, min_p=1.0), becomes_greedy,
        [-0.1, 1.1, *NOT_A_NUMBER],
    ),
    "seed": Row(sampled(), sampled(seed=2), differs, [2**64, -(2**63) - 1, *NOT_AN_INT]),
    "stop": Row(
        greedy(allowed_token_ids=[97]),
        greedy(allowed_token_ids=[97], stop="aaa"),
        lambda a, b: a.outputs[0].text == "a" * 12 and b.outputs[0].text == "",
        NOT_STRINGS,
    ),
    "stop_token_ids": Row(
        greedy(allowed_token_ids=[97]),
        greedy(allowed_token_ids=[97], stop_token_ids=[97]),
        lambda a, b: len(tokens(a)) == 12
        and tokens(b) == [97]
        and (b.outputs[0].finish_reason, b.outputs[0].stop_reason) == ("stop", 97),
        NOT_IDS,
    ),
    "ignore_eos": Row(
        greedy(logit_bias=TO_EOS),
        greedy(logit_bias=TO_EOS, ignore_eos=True),
        lambda a, b: tokens(a) == [EOS] and tokens(b) == [EOS] * 12,
        NOT_A_BOOL,
    ),
    "max_tokens": Row(
        greedy(),
        greedy(max_tokens=None),
        lambda a, b: len(tokens(a)) == 12 and len(tokens(b)) + len(b.prompt_token_ids) == 2048,
        [0, -1, *NOT_AN_INT],
    ),
    "min_tokens": Row(
        greedy(logit_bias=TO_EOS),
        greedy(logit_bias=TO_EOS, min_tokens=5),
        lambda a, b: len(tokens(a)) == 1 and len(tokens(b)) == 6 and tokens(b)[-1] == EOS,
        [-1, 17, None, *NOT_AN_INT],
    ),
    "logprobs": Row(
        greedy(),
        greedy(logprobs=3),
        lambda a, b: a.outputs[0].logprobs is None
        and [len(entry) for entry in b.outputs[0].logprobs or []] == [3] * 12,
        [-2, 21, *NOT_AN_INT],
    ),
    "prompt_logprobs": Row(
        greedy(),
        greedy(prompt_logprobs=0),
        lambda a, b: a.prompt_logprobs is None
        and [None if e is None else list(e) for e in b.prompt_logprobs or []]
        == [None, *[[t] for t in b.prompt_token_ids[1:]]],
        [-2, 21, *NOT_AN_INT],
    ),
    "detokenize": Row(
        greedy(),
        greedy(detokenize=False),
        lambda a, b: a.outputs[0].text != "" and b.outputs[0].text == "" and tokens(a) == tokens(b),
        NOT_A_BOOL,
    ),
    "skip_special_tokens": Row(
        greedy(allowed_token_ids=[258], max_tokens=2),
        greedy(allowed_token_ids=[258], max_tokens=2, skip_special_tokens=False),
        lambda a, b: a.outputs[0].text == "" and b.outputs[0].text == "<|user|>" * 2,
        NOT_A_BOOL,
    ),
    "bad_words": Row(
        greedy(allowed_token_ids=[97, 98], logit_bias={97: 50.0}),
        greedy(allowed_token_ids=[97, 98], logit_bias={97: 50.0}, bad_words=["aa"]),
        lambda a, b: a.outputs[0].text == "a" * 12 and b.outputs[0].text == "ab" * 6,
        ["aa", *NOT_STRINGS],
    ),
    "logit_bias": Row(
        greedy(),
        greedy(logit_bias={120: 100}),
        lambda a, b: tokens(a) != [120] * 12 and tokens(b) == [120] * 12,
        [5, [1], {"a": 1.0}, {-1: 1.0}, {261: 1.0}, {1: 101}, {1: float("nan")}],
    ),
    "allowed_token_ids": Row(
        greedy(),
        greedy(allowed_token_ids=[120, 121]),
        lambda a, b: not set(tokens(a)) <= {120, 121} and set(tokens(b)) <= {120, 121},
        [[], *NOT_IDS],
    ),
    "include_stop_str_in_output": Row(
        greedy(allowed_token_ids=[97], stop="aaa"),
        greedy(allowed_token_ids=[97], stop="aaa", include_stop_str_in_output=True),
        lambda a, b: a.outputs[0].text == "" and b.outputs[0].text == "aaa",
        NOT_A_BOOL,
    ),
    "truncate_prompt_tokens": Row(
        greedy(),
        greedy(truncate_prompt_tokens=4),
        lambda a, b: b.prompt_token_ids == a.prompt_token_ids[-4:] == list(b"mple"),
        [0, -2, *NOT_AN_INT],
    ),
}  # fmt: skip


def test_truncation_to_what_fits(llm: LLM) -> None:
    params = SamplingParams(**greedy(truncate_prompt_tokens=-1))
    (cut,) = llm.generate("x" * 5000, params)
    assert len(cut.prompt_token_ids) + len(tokens(cut)) == 2048 and cut.prompt is None
    (whole,) = llm.generate(PROMPT, params)
    assert whole.prompt == PROMPT and len(whole.prompt_token_ids) == 1 + len(PROMPT)


def test_the_table_has_every_sampling_field() -> None:
    assert set(SAMPLING) == {f.name for f in fields(SamplingParams)}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_field_has_an_effect(llm: LLM, name: str) -> None:
    row = SAMPLING[name]
    base, changed = llm.generate(
        [PROMPT, PROMPT], [SamplingParams(**row.base), SamplingParams(**row.changed)]
    )
    assert row.effect(base, changed)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in SAMPLING.items() for value in row.impossible]
)
def test_impossible_sampling_value_is_named(llm: LLM, name: str, value: Any) -> None:
    # Some limits are the model's; the same call shows them before anything runs.
    before = llm.stats["steps"]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        llm.generate(PROMPT, SamplingParams(**{name: value}))
    assert llm.stats["steps"] == before


@pytest.mark.parametrize("name", SAMPLING)
def test_values_assigned_later_are_checked_too(llm: LLM, name: str) -> None:
    params = SamplingParams()
    setattr(params, name, SAMPLING[name].impossible[0])
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        llm.generate(PROMPT, params)


@pytest.mark.parametrize("name", ["temprature", "max_new_tokens", "beam_width"])
def test_unknown_sampling_field_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams does not know '{name}'"):
        SamplingParams(**{name: 1})


def test_a_misspelt_field_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", SamplingParams.FIXED)
def test_vllms_fields_that_ask_for_nothing(name: str) -> None:
    for value in SamplingParams.FIXED[name][0]:
        assert SamplingParams(**{name: value}, n=2) == SamplingParams(n=2)
    for value in ("other", 7, [1], False):
        with pytest.raises(ValueError, match=rf"^{name}=.* is not possible, only "):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 10**12) for name in ("n", "top_k", "max_tokens", "min_tokens", "logprobs")],
        *[(name, [10**12]) for name in ("stop_token_ids", "allowed_token_ids")],
        ("logit_bias", {10**12: 1.0}),
    ],
)
def test_huge_numbers_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        SamplingParams(**{name: value})


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="stop needs detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_seed_minus_one_means_none_and_negative_seeds_work(llm: LLM) -> None:
    a, b = llm.generate([PROMPT] * 2, [SamplingParams(**sampled(seed=-1)) for _ in range(2)])
    assert differs(a, b)
    c, d = llm.generate([PROMPT] * 2, [SamplingParams(**sampled(seed=-5)) for _ in range(2)])
    assert not differs(c, d)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_the_whole_vocabulary_needs_max_logprobs(name: str) -> None:
    params = SamplingParams(**{name: -1})
    message = rf"^{name}=-1 \(whole vocabulary\) needs max_logprobs=-1 at start"
    with pytest.raises(ValueError, match=message):
        params.to_core(None, 261, 0, max_logprobs=20)
    assert getattr(params.to_core(None, 261, 0, max_logprobs=-1), name) == 261


def test_minus_one_logprobs_means_the_whole_vocabulary(model_dir: Path) -> None:
    with LLM(str(model_dir), max_logprobs=-1, use_tqdm_on_load=False) as llm:
        (out,) = llm.generate(PROMPT, SamplingParams(**greedy(logprobs=-1, prompt_logprobs=-1)))
    assert out.outputs[0].logprobs is not None and out.prompt_logprobs is not None
    for entry in [*out.outputs[0].logprobs, *out.prompt_logprobs[1:]]:
        assert entry is not None and sorted(entry) == list(range(261))
        total = sum(np.exp(lp.logprob) for lp in entry.values())
        assert abs(total - 1) < 1e-4


# -- Options of LLM -------------------------------------------------------------------------------


@dataclass
class Option:
    """effect(llm started with `value` and the further `options`) shows what the value does."""

    value: Any
    effect: Callable[[LLM], bool | None]
    impossible: list[Any]
    options: dict[str, Any] = field(default_factory=dict)


def config(name: str, value: Any) -> Callable[[LLM], bool]:
    """The native engine was told. What it makes of it, its own tests show."""
    return lambda llm: getattr(llm.engine.core.config, name) == value


def run(llm: LLM, prompt: str = "abcdefgh" * 5, **params: Any) -> RequestOutput:
    return llm.generate(prompt, SamplingParams(**greedy(**params)))[0]


def steps(llm: LLM) -> list[dict[str, Any]]:
    run(llm)
    return llm.engine.core.trace()


def owners(llm: LLM) -> list[set[int]]:
    """For each step the numbers of the requests in it."""
    return [{e["request_id"] for e in s["entries"]} for s in llm.engine.core.trace()]


def prompts_are_one_piece(llm: LLM) -> bool:
    """No step has room for two of them, and none takes a part of the second."""
    llm.generate([letter * 1500 for letter in "abcdef"], SamplingParams(max_tokens=1))
    entries = [e for s in llm.engine.core.trace() for e in s["entries"]]
    return [e["num_query"] for e in entries] == [1501] * 6


def batches_do_not_overlap(llm: LLM) -> bool:
    """Two at a time, short and long ones: none starts beside a long one that runs already."""
    params = [SamplingParams(**greedy(max_tokens=n)) for n in [3, 60] * 3]
    llm.generate(["a"] * 6, params)
    starts = [s for s in llm.engine.core.trace() if s["admitted"]]
    assert sum(len(s["admitted"]) for s in starts) == 6
    return not any(s["num_decodes"] for s in starts)


def smaller_priority_goes_first(llm: LLM) -> bool:
    params = SamplingParams(**greedy(max_tokens=200))
    llm.generate(["a", "b", "c"], params, priority=[-5, 1, -1])
    first = [next(i for i, step in enumerate(owners(llm)) if r in step) for r in range(3)]
    return first[0] < first[2] < first[1]


def queue_holds_five(llm: LLM) -> bool:
    endless = SamplingParams(**greedy(max_tokens=None, ignore_eos=True))
    taken = 0
    with pytest.raises(QueueFullError):
        for _ in range(8):
            llm.engine.submit(llm.engine.prepare("a", endless))
            taken += 1
    return taken in (5, 6)  # five wait, and one may run by now


PARAMETERS = 2 * 261 * 64 + 2 * (64 * 128 + 64 * 64 + 3 * 64 * 160) + 5 * 64
NOT_A_COUNT = [0, -1, *NOT_AN_INT]
OPTIONS: dict[str, Option] = {
    "dtype": Option(
        "bfloat16", lambda llm: llm.engine.plan.weights < 4 * PARAMETERS, ["int8", None, 3]
    ),
    "kv_cache_dtype": Option(
        "half", lambda llm: llm.engine.plan.kv_block == 8192 // 2, ["fp8", "fp8_e4m3", None, 3]
    ),
    "max_model_len": Option(
        64, lambda llm: len(run(llm, "a", max_tokens=None).outputs[0].token_ids) == 62,
        [*NOT_A_COUNT, 2049],
    ),
    "block_size": Option(32, lambda llm: llm.stats["block_size"] == 32, [None, *NOT_A_COUNT]),
    "num_blocks": Option(200, lambda llm: llm.stats["blocks_total"] == 200, [3, *NOT_A_COUNT]),
    "num_gpu_blocks_override": Option(
        200, lambda llm: llm.stats["blocks_total"] == 200, [3, *NOT_A_COUNT]
    ),
    "kv_cache_memory_bytes": Option(
        # 2 layers, K and V, 2 heads of 16 float32 are 512 bytes a token, 8192 a block of 16
        8192 * 150 + 8191, lambda llm: llm.stats["blocks_total"] == 150, [8192, *NOT_A_COUNT],
    ),
    "gpu_memory_utilization": Option(
        0.001,
        lambda llm: 0 < llm.stats["blocks_total"] * 8192 <= 0.001 * llm.engine.plan.available,
        [0, 1.1, 1e-9, "x", float("nan"), float("inf")],
        {"max_num_seqs": 100_000, "max_num_batched_tokens": 100_000},
    ),
    "paged": Option(False, lambda llm: llm.stats["block_size"] == 2048, NOT_A_BOOL),
    "enable_prefix_caching": Option(
        False, lambda llm: [run(llm).num_cached_tokens for _ in "ab"] == [0, 0], NOT_A_BOOL
    ),
    "enable_chunked_prefill": Option(False, prompts_are_one_piece, NOT_A_BOOL),
    "static_batching": Option(True, batches_do_not_overlap, NOT_A_BOOL, {"max_num_seqs": 2}),
    "scheduling_policy": Option(
        "priority", smaller_priority_goes_first, ["lifo", None, 3], {"max_num_seqs": 1}
    ),
    "max_num_seqs": Option(
        3, lambda llm: len(llm.generate(["a"] * 9)) == 9
        and max(len(s["entries"]) for s in llm.engine.core.trace()) <= 3,
        NOT_A_COUNT,
    ),
    "max_num_batched_tokens": Option(
        16, lambda llm: max(s["num_tokens"] for s in steps(llm)) == 16, NOT_A_COUNT
    ),
    "max_waiting": Option(5, queue_holds_five, [-1, *NOT_AN_INT], {"max_num_seqs": 1}),
    "max_logprobs": Option(
        30, lambda llm: len((run(llm, logprobs=30).outputs[0].logprobs or [[]])[0]) == 30,
        [-2, None, *NOT_AN_INT],
    ),
    "device": Option("cpu", config("device", "cpu"), ["tpu", "cuda:x", "cuda:7777", None, 3]),
    "async_scheduling": Option(True, config("overlap", True), ["yes", 1]),
    "batch_invariant": Option(True, config("batch_invariant", True), [False, "yes", 1]),
    "num_threads": Option(
        3, lambda llm: llm.engine.core.device_name.endswith(", 3 threads"), [1025, *NOT_A_COUNT]
    ),
    "isa": Option("portable", lambda llm: "portable" in llm.engine.core.device_name,
                  ["sse9", "", 3]),
    "trace_capacity": Option(2, lambda llm: len(steps(llm)) == 2, [-1, None, *NOT_AN_INT]),
    "check_invariants": Option(True, config("check_invariants", True), NOT_A_BOOL),
    "skip_tokenizer_init": Option(
        True,
        lambda llm: llm.engine.tokenizer is None
        and llm.generate([1, 2, 3])[0].outputs[0].text == "",
        NOT_A_BOOL,
    ),
}  # fmt: skip
# Shown by tests of their own, below.
OWN_TESTS: dict[str, list[Any]] = {
    "model": ["", 3],
    "tokenizer": ["", 3],
    "revision": ["", 3],
    "download_dir": [3],
    "hf_token": [3],
    "seed": [2**64, *NOT_AN_INT],
    "enforce_eager": [True, "yes", None],
    "cudagraph_capture_sizes": [[1, 2], [], [0], [True], [1.5], "x", 5],
    "check_weights": NOT_A_BOOL,
    "use_tqdm_on_load": NOT_A_BOOL,
    "disable_log_stats": NOT_A_BOOL,
}


def start(model_dir: Path, **options: Any) -> LLM:
    return LLM(**{"model": str(model_dir), "use_tqdm_on_load": False, **options})


def test_the_table_has_every_option() -> None:
    assert not set(OPTIONS) & set(OWN_TESTS)
    assert set(OPTIONS) | set(OWN_TESTS) == {f.name for f in fields(EngineArgs)}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_has_an_effect(model_dir: Path, name: str) -> None:
    option = OPTIONS[name]
    with start(model_dir, **{name: option.value}, **option.options) as llm:
        assert option.effect(llm)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, option in OPTIONS.items() for value in option.impossible]
    + [(name, value) for name, values in OWN_TESTS.items() for value in values],
)
def test_impossible_option_is_named(model_dir: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        start(model_dir, **{name: value})


@pytest.mark.parametrize("name", EngineArgs.FIXED)
def test_vllms_options_that_ask_for_nothing(name: str) -> None:
    for value in EngineArgs.FIXED[name][0]:
        assert EngineArgs(model="x", **{name: value}) == EngineArgs(model="x")
    for value in ("other", 7, [1], object()):
        with pytest.raises(ValueError, match=rf"^{name}=.* is not possible, only "):
            EngineArgs(model="x", **{name: value})


def test_true_is_no_one_for_a_fixed_option() -> None:
    for name, value in (("tensor_parallel_size", True), ("swap_space", False)):
        with pytest.raises(ValueError, match=name):
            EngineArgs(model="x", **{name: value})


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size", "max_waiting"]
)
def test_huge_options_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*2147483647, got 90000000000"):
        EngineArgs(model="x", **{name: 90_000_000_000})


@pytest.mark.parametrize("name", ["max_model_length", "lora", "temperature"])
def test_unknown_option_is_named(model_dir: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"does not know '{name}'"):
        start(model_dir, **{name: 1})


def test_contradicting_options(model_dir: Path) -> None:
    for options, message in (
        ({"num_blocks": 200, "kv_cache_memory_bytes": 10**7}, "kv_cache_memory_bytes"),
        (
            {"num_blocks": 200, "gpu_memory_utilization": 0.9},
            "num_blocks and gpu_memory_utilization both size the cache",
        ),
        ({"num_gpu_blocks_override": 200, "gpu_memory_utilization": 0.9}, "num_gpu_blocks_overr"),
        (
            {"kv_cache_memory_bytes": 10**7, "gpu_memory_utilization": 0.9},
            "kv_cache_memory_bytes and gpu_memory_utilization",
        ),
        ({"num_blocks": 200, "num_gpu_blocks_override": 300}, "num_gpu_blocks_override"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "max_model_len"),
    ):
        with pytest.raises(ValueError, match=message):
            start(model_dir, **options)


def test_sizes_that_follow_from_others(tmp_path: Path) -> None:
    loaded = load_model(write_random_model(tmp_path, max_position_embeddings=5000))

    def sizes(**options: Any) -> tuple[int, int]:
        config = EngineArgs(model="x", **options).engine_config(loaded)
        return config.max_num_seqs, config.max_num_batched_tokens

    assert sizes() == (128, 128)
    assert sizes(max_num_batched_tokens=100) == (100, 100)
    assert sizes(max_num_seqs=3000) == (3000, 3000)
    assert sizes(enable_chunked_prefill=False) == (128, 5000)


def test_seed_of_the_llm_gives_requests_theirs(model_dir: Path) -> None:
    def texts(seed: int | None) -> list[str]:
        with start(model_dir, seed=seed) as llm:
            return [o.outputs[0].text for o in llm.generate(["a", "a"], SamplingParams())]

    first = texts(7)
    assert first[0] != first[1]
    assert texts(7) == first
    assert texts(8) != first
    assert texts(None) != texts(None)


def test_tokenizer_of_another_folder(model_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="tokenizer.json"):
        start(bare)
    with start(bare, tokenizer=str(model_dir)) as llm:
        assert run(llm, "abc").prompt_token_ids == [256, 97, 98, 99]


def test_hub_options_reach_the_hub(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def resolve(model: str, **options: Any) -> Path:
        asked.update(options, model=model)
        return model_dir

    monkeypatch.setattr(engine_module.hub, "resolve_model", resolve)
    start(Path("owner/name"), revision="v1", download_dir="/somewhere", hf_token="hf_x").close()
    assert asked == {
        "model": "owner/name",
        "revision": "v1",
        "download_dir": "/somewhere",
        "token": "hf_x",
    }


def test_check_weights(tmp_path: Path, model_dir: Path) -> None:
    from nano_inference.loader import open_checkpoint

    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    tensors = {name: np.array(t.read()) for name, t in open_checkpoint(model_dir).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_safetensors(broken / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight.*NaN"):
        start(broken, check_weights=True)
    start(broken).close()
    start(model_dir, check_weights=True).close()


def test_progress_bar_while_loading(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(model_dir, use_tqdm_on_load=True).close()
    assert "Loading weights" in capsys.readouterr().err
    start(model_dir, use_tqdm_on_load=False).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("disabled", [True, False])
def test_log_stats(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    disabled: bool,
) -> None:
    monkeypatch.setattr(engine_module, "_LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), start(model_dir, disable_log_stats=disabled) as llm:
        run(llm)
    assert ("tokens/s" in caplog.text) is not disabled


# -- Options on a card ----------------------------------------------------------------------------

GB = 10**9
# What Engine.plan_memory says of the card: 100 GB, of which 2 are in use.
CARD = {
    "weights": 16 * GB,
    "activations": GB,
    "kv_block": 2 * 10**6,
    "block_size": 16,
    "reserve": 0,
    "memory_total": 100 * GB,
    "memory_available": 98 * GB,
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """As if there were two cards; what is planned for them may be changed."""
    sizes = dict(CARD)
    monkeypatch.setattr(_core, "cuda_devices", lambda: ["NVIDIA H100", "NVIDIA H200"])
    monkeypatch.setattr(_core, "cuda_error", lambda: "")
    monkeypatch.setattr(_core.Engine, "plan_memory", staticmethod(lambda *_: sizes))
    return sizes


def on_cuda(model_dir: Path, **options: Any) -> tuple[EngineArgs, LoadedConfig]:
    args = EngineArgs(**{"model": str(model_dir), "device": "cuda", **options})
    return args, load_model(
        model_dir, dtype=args.dtype, max_model_len=args.max_model_len, device="cuda"
    )


def cuda_config(model_dir: Path, **options: Any) -> _core.EngineConfig:
    args, loaded = on_cuda(model_dir, **options)
    return args.engine_config(loaded)


@pytest.mark.parametrize(
    ("name", "kind", "index"),
    [("auto", "cuda", 0), ("cuda", "cuda", 0), ("cuda:1", "cuda", 1), ("cpu", "cpu", 0)],
)
def test_device_with_cards(
    card: dict[str, int], model_dir: Path, name: str, kind: str, index: int
) -> None:
    target = EngineArgs(device=name).target
    assert (target.kind, target.index) == (kind, index)
    config = cuda_config(model_dir, device=name)
    assert (config.device, config.device_index) == (kind, index)


def test_device_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "cuda_devices", lambda: [])
    monkeypatch.setattr(_core, "cuda_error", lambda: "the driver is missing")
    assert EngineArgs().target.kind == "cpu"
    for name in ("cuda", "cuda:0"):
        message = f"device='{name}' cannot be used: the driver is missing"
        with pytest.raises(ValueError, match=message):
            EngineArgs(device=name)


def test_device_that_is_not_there(card: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="device must be a card that is here: cuda:0 to cuda:1"):
        EngineArgs(device="cuda:2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "dtype='float32' .*'bfloat16' and 'float16'"),
        ({"kv_cache_dtype": "float"}, "kv_cache_dtype='float' .*'auto'.*'fp8'"),
        ({"kv_cache_dtype": "half"}, "kv_cache_dtype='half' .*'auto', 'bfloat16' or 'fp8'"),
        ({"block_size": 24}, "block_size=24 .*multiple of 16"),
        ({"num_threads": 2}, "num_threads=2 .*device='cpu'"),
        ({"isa": "portable"}, "isa='portable' .*device='cpu'"),
        ({"isa": "portable", "device": "auto"}, r"on cuda \(device='auto'\)"),
        ({"cudagraph_capture_sizes": [1, 300]}, r"cudagraph_capture_sizes has 300.*\(256\)"),
        ({"cudagraph_capture_sizes": [1], "enforce_eager": True}, "cudagraph_capture_sizes"),
    ],
)
def test_impossible_on_cuda(
    card: dict[str, int], model_dir: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        cuda_config(model_dir, **options)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "batch_invariant": True}),
        ({}, {"overlap": True, "max_num_seqs": 256, "max_num_batched_tokens": 8192}),
        ({}, {"block_size": 16, "graph_sizes": default_graph_sizes(256)}),
        ({"dtype": "half"}, {"dtype": "float16", "kv_cache_dtype": "float16"}),
        ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8_e4m3"}),
        ({"kv_cache_dtype": "fp8_e4m3"}, {"kv_cache_dtype": "fp8_e4m3"}),
        ({"kv_cache_dtype": "bfloat16"}, {"kv_cache_dtype": "bfloat16"}),
        ({"batch_invariant": False}, {"batch_invariant": False}),
        ({"async_scheduling": False}, {"overlap": False}),
        ({"enforce_eager": True}, {"graph_sizes": []}),
        ({"cudagraph_capture_sizes": [64, 1, 64]}, {"graph_sizes": [1, 64]}),
        ({"block_size": 64, "paged": False}, {"block_size": 64, "paged": False}),
        ({"max_num_batched_tokens": 100}, {"max_num_seqs": 100, "max_num_batched_tokens": 100}),
        ({"max_num_seqs": 10_000}, {"max_num_batched_tokens": 10_000}),
    ],
)
def test_config_on_cuda(
    card: dict[str, int], model_dir: Path, options: dict[str, Any], want: dict[str, Any]
) -> None:
    config = cuda_config(model_dir, **options)
    assert {name: getattr(config, name) for name in want} == want


def test_graph_sizes() -> None:
    assert default_graph_sizes(1) == [1]
    assert default_graph_sizes(9) == [1, 2, 4, 8, 9]
    assert default_graph_sizes(256)[:6] == [1, 2, 4, 8, 16, 24]
    assert default_graph_sizes(256)[-2:] == [248, 256]
    assert default_graph_sizes(300)[-3:] == [256, 288, 300]


def test_plan_cache(
    card: dict[str, int], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANO_INFERENCE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plan_cache() == str(tmp_path / "xdg" / "nano_inference" / "gemm_plans.txt")
    monkeypatch.setenv("NANO_INFERENCE_CACHE", str(tmp_path / "mine" / "deep"))
    assert cuda_config(model_dir).plan_cache == str(tmp_path / "mine" / "deep" / "gemm_plans.txt")
    assert (tmp_path / "mine" / "deep").is_dir()
    monkeypatch.setenv("NANO_INFERENCE_CACHE", "/proc/nothing/can/be/written/here")
    assert plan_cache() == "/proc/nothing/can/be/written/here/gemm_plans.txt"


def test_the_engine_sizes_the_cache_on_cuda(card: dict[str, int], model_dir: Path) -> None:
    """2048 tokens of 256 sequences are 32768 blocks, 65.5 GB; 90 - 2 - 17 GB are left."""
    config, plan = plan_engine(*on_cuda(model_dir))
    assert (config.num_blocks, config.memory_fraction) == (0, pytest.approx(0.9))
    assert plan.num_blocks == 256 * 128
    config, plan = plan_engine(*on_cuda(model_dir, gpu_memory_utilization=0.5))
    assert (config.num_blocks, config.memory_fraction) == (0, 0.5)
    assert plan.num_blocks == (50 - 2 - 17) * GB // card["kv_block"]


def test_a_given_size_of_the_cache_on_cuda(card: dict[str, int], model_dir: Path) -> None:
    config, plan = plan_engine(*on_cuda(model_dir, num_blocks=500))
    assert config.num_blocks == plan.num_blocks == 500
    config, _ = plan_engine(*on_cuda(model_dir, kv_cache_memory_bytes=GB))
    assert config.num_blocks == 500
    with pytest.raises(MemoryError, match="100.00 GB > 98.00 GB available"):
        plan_engine(*on_cuda(model_dir, num_blocks=50_000))
    with pytest.raises(ValueError, match="max_model_len=2048: num_blocks=3 gives 48 tokens"):
        plan_engine(*on_cuda(model_dir, num_blocks=3))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"weights": 88 * GB}, {}, ("weights 88.00 GB", "> 88.00 GB", "0.9 of the card's 100.00")),
        ({"weights": 88 * GB}, {}, ("is 90.00 GB, and 2.00 GB are in use; take a smaller",)),
        ({"memory_available": 17 * GB}, {}, ("> 7.00 GB", "83.00 GB are in use")),
        ({"weights": 87 * GB - 10**8, "kv_block": 10**7}, {}, ("max_model_len=160 would fit",)),
        ({}, {"gpu_memory_utilization": 0.1}, ("gpu_memory_utilization=0.1", "> 8.00 GB")),
    ],
)
def test_what_does_not_fit_on_the_card(
    card: dict[str, int],
    model_dir: Path,
    changes: dict[str, int],
    options: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    card.update(changes)
    with pytest.raises(MemoryError) as caught:
        plan_engine(*on_cuda(model_dir, **options))
    for word in ("does not fit", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("paged", [True, False])
def test_the_max_model_len_that_would_fit_does(
    card: dict[str, int], model_dir: Path, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    """Also with all that is taken besides, which is not known before the model is loaded."""
    token = 10**6  # bytes
    card["reserve"] = 10**9 - 5

    def plan(config: _core.EngineConfig, _: Any) -> dict[str, int]:
        slots = 16 if paged else -(-config.max_model_len // 16) * 16
        return {**card, "block_size": slots, "kv_block": slots * token}

    monkeypatch.setattr(_core.Engine, "plan_memory", staticmethod(plan))
    card["weights"] = 88 * GB - card["activations"] - card["reserve"] - 1000 * token
    assert plan_engine(*on_cuda(model_dir, paged=paged, max_model_len=1984))[1].num_tokens >= 1984
    with pytest.raises(MemoryError, match="max_model_len=992 would fit"):
        plan_engine(*on_cuda(model_dir, paged=paged))  # 2048 tokens
    _, fits = plan_engine(*on_cuda(model_dir, paged=paged, max_model_len=992))
    taken = fits.weights + fits.activations + card["reserve"] + 992 * token
    assert taken <= 88 * GB < taken + 16 * token
