"""Decode and prefill of a model of Qwen3-0.6B's shape with random bf16 weights, through the engine
as a server would use it, beside the machine's own rates and transformers on torch in the same run.

    python benchmarks/bench_engine.py [--peer transformers] [--json] [--save]

Decode is bound by reading the weights (and the cache): its share is bytes read a second of the
bandwidth that machine.cpp measures just before and after. Prefill is bound by multiply-adds: its
share is of the rate that this program measures for bf16 dot products (fp32 where the CPU has none).
Times are medians over steps, from the engine's own trace; for the peer, over calls of the model."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import (
    GB,
    context,
    markdown_table,
    mean_rates,
    measure_machine,
    run_requests,
    save,
)

from nano_inference import _core
from nano_inference.random_model import QWEN3_0_6B, model_config, random_engine

SHAPE = QWEN3_0_6B
PREFILL = 512
PREFILL_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """`batch` sequences decode, each with `depth` to `depth + steps` tokens in the cache."""

    batch: int
    depth: int
    steps: int

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}, depth {self.depth}"


CASES = [Case(1, 16, 48), Case(8, 16, 48), Case(32, 16, 32), Case(1, 1024, 32), Case(8, 1024, 24)]

# -- What the work takes --------------------------------------------------------------------------


def matrix_parameters() -> int:
    """Of all layers; lm_head, which is the embedding table, apart."""
    h, heads, kv = SHAPE["hidden_size"], SHAPE["num_heads"], SHAPE["num_kv_heads"]
    attention = h * SHAPE["head_dim"] * (2 * heads + 2 * kv)
    return SHAPE["num_layers"] * (attention + 3 * h * SHAPE["intermediate_size"])


def lm_head_parameters() -> int:
    return SHAPE["vocab_size"] * SHAPE["hidden_size"]


def decode_bytes(case: Case) -> float:
    """Read in a step: all weights once, K and V of every sequence; bf16."""
    cached = case.batch * (case.depth + case.steps / 2)
    kv = SHAPE["num_layers"] * 2 * SHAPE["num_kv_heads"] * SHAPE["head_dim"]
    return 2.0 * (matrix_parameters() + lm_head_parameters() + cached * kv)


def prefill_operations(tokens: int) -> float:
    """Matrix products of all rows, causal attention, lm_head for the last row."""
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * SHAPE["num_layers"] * SHAPE["num_heads"] * SHAPE["head_dim"] * pairs
    return 2.0 * (tokens * matrix_parameters() + lm_head_parameters()) + attention


# -- Ours -----------------------------------------------------------------------------------------


def prompts(count: int, length: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, SHAPE["vocab_size"], (count, length)).astype(np.int32))


def make_engine(threads: int, isa: str) -> _core.Engine:
    longest = max(c.batch * (c.depth + c.steps + 48) for c in CASES)
    return random_engine(
        model_config(**SHAPE),
        num_threads=threads,
        isa=isa,
        block_size=16,
        num_blocks=longest // 16 + 64,
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=PREFILL,
        enable_prefix_caching=False,
        trace_capacity=10_000,
    )


def our_decode(engine: _core.Engine, case: Case) -> float:
    """Seconds a step, end of one to end of the next: scheduling and delivery are in it."""
    first = engine.stats()["steps"] + 1
    # While prompts are computed, the first sequences decode already: tokens for these steps too.
    length = case.steps + 1 + -(-case.batch * case.depth // PREFILL)
    run_requests(engine, [(p, length) for p in prompts(case.batch, case.depth, case.batch)])
    trace = engine.trace(first)
    times = [
        b["end_time"] - a["end_time"]
        for a, b in zip(trace, trace[1:], strict=False)
        if b["num_decodes"] == b["num_tokens"] == case.batch == a["num_decodes"]
    ]
    times = times[-case.steps + 1 :]
    assert len(times) >= case.steps // 2, "too few steps with the whole batch"
    return statistics.median(times)


def our_prefill(engine: _core.Engine) -> float:
    times = []
    for prompt in prompts(PREFILL_REPEATS, PREFILL, 99):
        first = engine.stats()["steps"] + 1
        run_requests(engine, [(prompt, 1)])
        (step,) = engine.trace(first)
        assert step["num_tokens"] == PREFILL
        times.append(step["end_time"] - step["start_time"])
    return statistics.median(times)


# -- The peer -------------------------------------------------------------------------------------


class Transformers:
    """transformers' own Qwen3 on torch, bf16, greedy, a growing cache of its own kind."""

    def __init__(self, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        config = transformers.Qwen3Config(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["hidden_size"],
            intermediate_size=SHAPE["intermediate_size"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_heads"],
            num_key_value_heads=SHAPE["num_kv_heads"],
            head_dim=SHAPE["head_dim"],
            tie_word_embeddings=True,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model, self.torch = model.eval(), torch
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def decode(self, case: Case) -> float:
        torch = self.torch
        with torch.inference_mode():
            prompt = torch.tensor(np.stack(prompts(1, case.depth, case.batch)), dtype=torch.long)
            out = self.model(prompt, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            cache.batch_repeat_interleave(case.batch)  # copies: each sequence has its own
            token = out.logits[:, -1].argmax(-1, keepdim=True).repeat(case.batch, 1)
            times = []
            for _ in range(case.steps):
                start = time.perf_counter()
                out = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def prefill(self) -> float:
        torch, times = self.torch, []
        with torch.inference_mode():
            for prompt in prompts(PREFILL_REPEATS, PREFILL, 99):
                ids = torch.tensor(prompt[None], dtype=torch.long)
                start = time.perf_counter()
                self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
                times.append(time.perf_counter() - start)
        return statistics.median(times)


# -- Measuring ------------------------------------------------------------------------------------


def measure(
    engine: _core.Engine, peer: Transformers | None, case: Case | None, threads: int
) -> dict[str, Any]:
    """One line of the table. The machine's rates are taken around our part."""
    before = measure_machine(threads)
    ours = our_decode(engine, case) if case else our_prefill(engine)
    rates = mean_rates(before, measure_machine(threads))
    rows = case.batch if case else PREFILL
    row: dict[str, Any] = {
        "case": case.name if case else f"prefill, {PREFILL} tokens",
        "tokens/s": rows / ours,
        "ms a step": ours * 1e3,
    }
    if case:
        row["read GB/s"] = decode_bytes(case) / ours / GB
        row["of bandwidth"] = decode_bytes(case) / ours / rates["read"]
    else:
        row["GFLOP/s"] = prefill_operations(PREFILL) / ours / GB
        row["of multiply-adds"] = prefill_operations(PREFILL) / ours / rates["bf16"]
    if peer is not None:
        theirs = peer.decode(case) if case else peer.prefill()
        row["peer tokens/s"] = rows / theirs
        row["times the peer"] = theirs / ours
    row["machine GB/s"] = rates["read"] / GB
    row["machine GFLOP/s"] = rates["bf16"] / GB
    return row


COLUMNS = ["case", "tokens/s", "ms a step", "of bandwidth", "of multiply-adds", "peer tokens/s"]
COLUMNS += ["times the peer", "machine GB/s", "machine GFLOP/s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=_core.num_threads_available())
    parser.add_argument("--isa", default="", help="instruction set; default: the best")
    parser.add_argument("--peer", choices=["transformers"], help="needs torch and transformers")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/engine.*")
    args = parser.parse_args()

    engine = make_engine(args.threads, args.isa)
    engine.start()
    peer = Transformers(args.threads) if args.peer else None
    our_decode(engine, Case(1, 16, 8))  # touch everything once
    rows = [measure(engine, peer, case, args.threads) for case in [*CASES, None]]
    about = context(args.threads, engine.device_name)
    engine.shutdown()
    if peer is not None:
        about["peer"] = peer.version
    result = {"context": about, "model": SHAPE, "dtype": "bfloat16", "results": rows}
    keys = [k for k in COLUMNS if any(k in row for row in rows)]
    table = [{k: row.get(k, "") for k in keys} for row in rows]
    print(json.dumps(result, indent=2) if args.json else markdown_table(table))
    if args.save:
        save("engine", result, "Decode and prefill, Qwen3-0.6B's shape, random weights", table)


if __name__ == "__main__":
    main()
