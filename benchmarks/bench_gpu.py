"""Decode, prefill and a mixed load of several models with random bf16 weights on a card, beside
what vLLM gave for the same work on the same kind of card.

    python benchmarks/bench_gpu.py [--models qwen3-0.6b,llama-3.1-8b] [--only decode,prefill,...]
        [--json] [--save]

Token ids reach Python, nothing is detokenized; the prefix cache is off and every repetition has
fresh random prompts. Decode: 128 tokens in; the time of a token is that with 256 out less that with
1 out, over 255. Prefill: one token out, each time after a rest and a prompt that is not timed (a
card that has been busy for some 35 to 80 ms lowers its clocks). Requests: 256 of 100 to
1024 tokens in and out, temperature 0.6. Times are medians of `--repeats` runs (requests: of one
run). "invariance" also runs all of it with batch_invariant off, and counts how many tokens of a
request change beside 63 others. "parts" (needs torch) times what a prefill consists of at least,
alone: the layers' products through cuBLASLt and our attention, in the engine's steps
(prefill_parts.py), and gives them as a share of the engine's prefill: 100% would be an engine that
spends time on nothing else.

Before anything is timed, 32 greedy tokens of the timed engine, and their log-probabilities, must
equal those of one without graphs and without overlap."""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import REST, commit, greedy_requests, markdown_table, run_prepared, run_requests, save

from nano_inference import _core
from nano_inference.engine_args import default_graph_sizes, plan_cache
from nano_inference.random_model import (
    LLAMA_3_1_8B,
    LLAMA_3_2_1B,
    QWEN3_0_6B,
    QWEN3_14B,
    model_config,
    random_engine,
)

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3_0_6B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "qwen3-14b": QWEN3_14B,
}
PARTS = ("decode", "prefill", "parts", "requests", "invariance")

# vLLM 0.25.1 (torch 2.11, FlashAttention-3) on one H200 with the same work: ms of a token at batch
# 1, tokens/s for the rest.
VLLM = "vLLM 0.25.1, torch 2.11, FlashAttention-3, H200"
VLLM_FIGURES: dict[str, dict[str, float]] = {
    "qwen3-0.6b": {
        "decode 1": 1.74,
        "decode 8": 3959,
        "decode 64": 22646,
        "decode 256": 38570,
        "prefill 1x4000": 172e3,
        "prefill 16x2000": 353e3,
        "256 requests": 22654,
    },
    "llama-3.2-1b": {"decode 1": 2.41, "decode 64": 24427},
    "llama-3.1-8b": {
        "decode 1": 4.94,
        "decode 8": 1586,
        "decode 64": 10467,
        "decode 256": 22293,
        "prefill 1x4000": 39.6e3,
        "prefill 16x2000": 41.9e3,
        "256 requests": 9431,
    },
    "qwen3-14b": {"decode 1": 8.63, "256 requests": 5858},
}

BATCHES = (1, 8, 64, 256)
PROMPT, OUTPUT = 128, 256  # of decode
PREFILLS = ((1, 4000), (16, 2000))
CHECKED = 32  # tokens
MAX_MODEL_LEN = 4096
MAX_BATCHED = 8192  # tokens of a step


def make_engine(
    shape: dict[str, Any], device: int, *, invariant: bool, eager: bool = False
) -> _core.Engine:
    """Started. eager: no graphs and no overlap, a small cache."""
    return started(
        random_engine(
            model_config(**shape),
            device="cuda",
            device_index=device,
            dtype="bfloat16",
            kv_cache_dtype="bfloat16",
            block_size=16,
            num_blocks=2 * MAX_MODEL_LEN // 16 if eager else 0,
            memory_fraction=0.9,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=256,
            max_num_batched_tokens=MAX_BATCHED,
            max_waiting=0,
            max_logprobs=1,
            enable_prefix_caching=False,
            batch_invariant=invariant,
            graph_sizes=[] if eager else default_graph_sizes(256),
            overlap=not eager,
            plan_cache=plan_cache(),
            trace_capacity=0,
        )
    )


def started(engine: _core.Engine) -> _core.Engine:
    engine.start()
    return engine


@dataclass
class Prompts:
    """Fresh random ones at every call, the same in every run of this program."""

    vocab_size: int
    _made: int = 0

    def __call__(self, count: int, length: int) -> list[np.ndarray]:
        self._made += 1
        rng = np.random.default_rng(self._made)
        return list(rng.integers(0, self.vocab_size, (count, length)).astype(np.int32))


# -- What is measured -----------------------------------------------------------------------------


def seconds(engine: _core.Engine, prompts: list[np.ndarray], length: int) -> float:
    """Of so many greedy tokens a prompt, from the first submit to the last token in Python."""
    requests = greedy_requests([(prompt, length) for prompt in prompts])
    begin = time.perf_counter()
    tokens = run_prepared(engine, requests)
    took = time.perf_counter() - begin
    assert all(len(ids) == length for ids in tokens)
    return took


def decode(engine: _core.Engine, prompts: Prompts, repeats: int) -> dict[str, float]:
    found = {}
    for batch in BATCHES:
        times = []
        for _ in range(repeats):
            short = seconds(engine, prompts(batch, PROMPT), 1)
            times.append((seconds(engine, prompts(batch, PROMPT), OUTPUT) - short) / (OUTPUT - 1))
        step = statistics.median(times)
        found[f"decode {batch}"] = 1e3 * step if batch == 1 else batch / step
    return found


def prefill(engine: _core.Engine, prompts: Prompts, repeats: int) -> dict[str, float]:
    found = {}
    for count, length in PREFILLS:
        times = []
        for _ in range(repeats):
            time.sleep(REST)
            seconds(engine, prompts(1, length), 1)  # what follows a pause takes longer
            times.append(seconds(engine, prompts(count, length), 1))
        found[f"prefill {count}x{length}"] = count * length / statistics.median(times)
    return found


def prefill_steps(count: int, length: int, most: int) -> list[list[tuple[int, int, int]]]:
    """Those of an engine that has all prompts when it begins, with at most so many rows each: of
    each prompt in a step its number, its rows and its context with them."""
    steps: list[list[tuple[int, int, int]]] = []
    room = 0
    for prompt in range(count):
        done = 0
        while done < length:
            if room == 0:
                steps.append([])
                room = most
            rows = min(length - done, room)
            done += rows
            room -= rows
            steps[-1].append((prompt, rows, done))
    return steps


def parts_alone(shape: dict[str, Any], device: int, repeats: int) -> dict[str, float]:
    """Milliseconds."""
    try:
        from prefill_parts import measure_parts
    except ModuleNotFoundError as error:
        raise SystemExit(f"the part 'parts' needs torch ({error}); see --only") from error
    cases = {f"{n}x{length}": prefill_steps(n, length, MAX_BATCHED) for n, length in PREFILLS}
    return measure_parts(shape, device, cases, repeats)


def with_shares(found: dict[str, float], parts: dict[str, float]) -> dict[str, float]:
    """Adds the parts, and what percentage of a whole prefill they are."""
    found = found | parts
    for count, length in PREFILLS:
        case = f"{count}x{length}"
        if f"products {case}" in parts:
            alone = parts[f"products {case}"] + parts[f"attention {case}"]
            whole = 1e3 * count * length / found[f"prefill {case}"]
            found[f"parts of prefill {case}"] = 100 * alone / whole
    return found


def mixed_load(engine: _core.Engine) -> dict[str, float]:
    """Prompt ids are drawn first, then lengths, as the figures of vLLM were taken."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    params = [
        _core.SamplingParams(
            temperature=0.6, ignore_eos=True, max_tokens=rng.randint(100, 1024), seed=i
        )
        for i in range(256)
    ]
    seconds(engine, [np.arange(100, dtype=np.int32)], 16)
    begin = time.perf_counter()
    engine.submit_all(
        [(i, *request, 0, "") for i, request in enumerate(zip(prompts, params, strict=True))]
    )
    done = tokens = 0
    while done < len(prompts):
        for output in engine.wait_outputs(60.0):
            assert not output.error, output.error
            tokens += len(output.token_ids)
            done += output.request_done
    took = time.perf_counter() - begin
    assert tokens == sum(p.max_tokens for p in params)
    return {"256 requests": tokens / took}


def tokens_that_change(engine: _core.Engine, prompts: Prompts) -> int:
    """Of 64 greedy tokens of a request, beside 63 other requests."""
    (needle,) = prompts(1, PROMPT)
    (alone,) = run_requests(engine, [(needle, 64)])
    beside = run_requests(engine, [(p, 64) for p in [*prompts(63, PROMPT), needle]])[-1]
    return sum(a != b for a, b in zip(alone, beside, strict=True))


def measure(engine: _core.Engine, parts: list[str], repeats: int) -> dict[str, float]:
    prompts = Prompts(50_000)
    seconds(engine, prompts(256, PROMPT), 4)  # touch everything once
    found: dict[str, float] = {}
    if "decode" in parts:
        found |= decode(engine, prompts, repeats)
    if "prefill" in parts or "parts" in parts:
        found |= prefill(engine, prompts, repeats)
    if "requests" in parts:
        found |= mixed_load(engine)
    if "invariance" in parts:
        found["changed tokens"] = tokens_that_change(engine, prompts)
    return found


# -- A model --------------------------------------------------------------------------------------


def checked_tokens(engine: _core.Engine) -> list[tuple[int, float]]:
    """With their log-probabilities: random weights like to say the same token again and again."""
    (prompt,) = Prompts(50_000)(1, PROMPT)
    params = _core.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=CHECKED, logprobs=0)
    engine.submit(0, prompt, params)
    found: list[tuple[int, float]] = []
    while len(found) < CHECKED:
        for output in engine.wait_outputs(60.0):
            assert not output.error, output.error
            found += [(scored.token_id, scored.logprob) for scored in output.logprobs]
    return found


def slow_tokens(shape: dict[str, Any], device: int) -> list[tuple[int, float]]:
    engine = make_engine(shape, device, invariant=True, eager=True)
    tokens = checked_tokens(engine)
    engine.shutdown()
    return tokens


def measure_model(
    name: str, device: int, parts: list[str], repeats: int
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table, and the device's name."""
    shape = MODELS[name]
    # Before there is an engine, which takes the card's memory.
    alone = parts_alone(shape, device, repeats) if "parts" in parts else {}
    want = slow_tokens(shape, device)
    results: dict[bool, dict[str, float]] = {}
    for invariant in (True, False) if "invariance" in parts else (True,):
        begin = time.perf_counter()
        engine = make_engine(shape, device, invariant=invariant)
        print(f"{name}, batch_invariant={invariant}: ready in {time.perf_counter() - begin:.1f} s")
        same = sum(a == b for a, b in zip(checked_tokens(engine), want, strict=True))
        print(f"  {same} of {CHECKED} tokens as without graphs and overlap", flush=True)
        if invariant and same != CHECKED:
            raise SystemExit(f"{name}: the timed engine computes something else; nothing is timed")
        results[invariant] = with_shares(measure(engine, parts, repeats), alone)
        backend = engine.device_name
        engine.shutdown()
        del engine  # its memory is the next one's
    return table_rows(name, results), backend


def unit_of(case: str) -> str:
    if case == "decode 1" or case.startswith(("products", "attention")):
        return "ms"
    return "%" if case.startswith("parts") else "" if case == "changed tokens" else "tokens/s"


def table_rows(name: str, results: dict[bool, dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for case, ours in results[True].items():
        theirs = VLLM_FIGURES[name].get(case)
        unit = unit_of(case)
        row: dict[str, Any] = {"model": name, "case": case, "unit": unit, "invariant": ours}
        if False in results:
            row["not invariant"] = results[False][case]
        row["vLLM"] = "" if theirs is None else theirs
        row["times vLLM"] = ""
        if theirs is not None:  # above 1: faster
            row["times vLLM"] = theirs / ours if unit == "ms" else ours / theirs
        rows.append(row)
    return rows


def driver(device: int) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", f"--id={device}", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"


def chosen(text: str, known: Any, what: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"{what} {name!r} is unknown; known: {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="qwen3-0.6b,llama-3.1-8b", help=", ".join(MODELS))
    parser.add_argument("--only", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=int, default=0, help="number of the card")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/gpu.* after each model")
    args = parser.parse_args()
    models = chosen(args.models, MODELS, "model")
    parts = chosen(args.only, PARTS, "part")
    cards = _core.cuda_devices()
    if not cards:
        raise SystemExit(_core.cuda_error())

    # Of this run alone. The commit is asked for before results/ differ from it.
    about: dict[str, Any] = {
        "card": cards[args.device],
        "driver": driver(args.device),
        "backend": "",
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or (commit() if shutil.which("git") else "unknown"),
        "beside": VLLM,
    }
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"context": about, "models": {}, "results": rows}
    for name in models:
        of_model, about["backend"] = measure_model(name, args.device, parts, args.repeats)
        result["models"][name] = MODELS[name]
        rows += of_model
        print(markdown_table(of_model), flush=True)
        if args.save:  # now: the run may be cut in the next model
            save("gpu", result, "Random bf16 weights on a card", rows)
    print(json.dumps(result, indent=2) if args.json else markdown_table(rows))


if __name__ == "__main__":
    main()
