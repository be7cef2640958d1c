"""Static against continuous batching, and one contiguous reservation a sequence against paging, on
one mixed workload with the same memory for the cache. A small model with random weights; every mode
must give the same tokens.

    python benchmarks/bench_batching.py [--json] [--save]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from common import context, markdown_table, run_requests, save

from nano_inference.random_model import model_config, random_engine

MODEL = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
CACHE_SLOTS = 8192  # tokens that the cache holds, in every mode
MAX_MODEL_LEN = 1024
BLOCK_SIZE = 16
MODES = {
    "unpaged, static": dict(paged=False, static_batching=True),
    "unpaged, continuous": dict(paged=False, static_batching=False),
    "paged, static": dict(paged=True, static_batching=True),
    "paged, continuous": dict(paged=True, static_batching=False),
}


def workload(count: int) -> list[tuple[np.ndarray, int]]:
    """Chat-like lengths: most short, a few long, prompt and output unrelated; all come at once."""
    rng = np.random.default_rng(7)

    def lengths() -> np.ndarray:
        return np.clip(np.exp(rng.normal(4.4, 0.9, count)), 8, 480).astype(int)

    return [
        (rng.integers(0, MODEL["vocab_size"], prompt).astype(np.int32), int(output))
        for prompt, output in zip(lengths(), lengths(), strict=True)
    ]


def live_slots(trace: list[dict[str, Any]], block_size: int) -> tuple[float, float]:
    """Slots that hold a token which will still be read, and slots taken from the cache: sums over
    the steps, as it is after each."""
    held: dict[tuple[int, int], int] = {}
    live = taken = 0
    for step in trace:
        for key in step["preempted"]:
            held.pop(key, None)
        for entry in step["entries"]:
            held[entry["request_id"], entry["choice"]] = entry["context_len"]
        for request_id, choice, _ in step["finished"]:
            held.pop((request_id, choice), None)
        live += sum(held.values())
        taken += step["blocks_used"] * block_size
    return live, taken


def run_mode(name: str, requests: list[tuple[np.ndarray, int]], threads: int) -> dict[str, Any]:
    paged = bool(MODES[name]["paged"])
    block_size = BLOCK_SIZE if paged else MAX_MODEL_LEN
    engine = random_engine(
        model_config(**MODEL),
        num_threads=threads,
        block_size=BLOCK_SIZE,
        num_blocks=CACHE_SLOTS // block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        trace_capacity=100_000,
        **MODES[name],
    )
    engine.start()
    start = time.perf_counter()
    tokens = run_requests(engine, requests)
    seconds = time.perf_counter() - start
    stats, trace = engine.stats(), engine.trace()
    engine.shutdown()
    assert stats["block_size"] == block_size
    live, taken = live_slots(trace, block_size)
    generated = sum(len(t) for t in tokens)
    return {
        "mode": name,
        "output tokens/s": generated / seconds,
        "seconds": seconds,
        "steps": stats["steps"],
        "mean sequences a step": sum(len(s["entries"]) for s in trace) / len(trace),
        "preemptions": stats["preemptions"],
        "live of allocated slots": live / taken,
        "live of all slots": live / (CACHE_SLOTS * len(trace)),
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/batching.*")
    args = parser.parse_args()

    requests = workload(args.requests)
    rows = [run_mode(name, requests, args.threads) for name in MODES]
    tokens = [row.pop("tokens") for row in rows]
    same = all(t == tokens[0] for t in tokens)
    result = {
        "context": context(args.threads, "cpu"),
        "workload": {
            "requests": len(requests),
            "prompt tokens": sum(len(p) for p, _ in requests),
            "output tokens": sum(n for _, n in requests),
            "cache slots": CACHE_SLOTS,
        },
        "same tokens in all modes": same,
        "modes": rows,
    }
    print(json.dumps(result, indent=2) if args.json else markdown_table(rows))
    if args.save:
        save("batching", result, "Batching and paging on one workload", rows)
    if not same:
        raise SystemExit("the modes gave different tokens")


if __name__ == "__main__":
    main()
