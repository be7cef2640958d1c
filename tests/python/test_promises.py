"""The promises that the engine itself keeps, as Python sees them. Faults and a stuck device are
injected in tests/cpp/engine_test.cpp, where the inverse tests of promise 1 are, too. What a card
promises beyond these is in test_cuda_engine.py."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from engine_helpers import (
    DEVICES,
    VOCAB,
    Results,
    all_blocks_back,
    is_balanced,
    make_engine,
    params,
    prompt,
    random_weights,
    run_all,
    take,
    tiny_model,
    wait_all,
)
from nano_inference import _core

ISAS = _core.cpu_isas()
# Every pair of types on the best instruction set; the others with the types that differ most.
NUMBERS = [
    *[(ISAS[0], d, k) for d in ("float32", "bfloat16", "float16") for k in ("float32", "bfloat16")],
    *[(isa, "bfloat16", "float16") for isa in ISAS[1:]],
    *[(isa, "float32", "float32") for isa in ISAS[1:]],
]

# -- 1: same request, same bytes -----------------------------------------------------------------

NEEDLE = 1000
NEEDLES: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2, "logprobs": 3},
    {"temperature": 1.0, "n": 3, "logprobs": 0},
    {"prompt_logprobs": 2, "logprobs": 1, "min_p": 0.01, "temperature": 1.2},
]
NEEDLE_PROMPT = 77


def submit_needle(engine: _core.Engine, index: int, seed: int = 5) -> None:
    engine.submit(
        NEEDLE + index, prompt(NEEDLE_PROMPT, 61), params(14, seed=seed, **NEEDLES[index])
    )


def neighbour(chance: random.Random, number: int) -> tuple[list[int], _core.SamplingParams]:
    key = NEEDLE_PROMPT if number % 3 == 0 else 5000 + number
    fields: dict[str, Any] = {"temperature": chance.choice([0.0, 1.0]), "seed": number}
    if number % 5 == 0:
        fields["n"] = 2
    return prompt(key, chance.randint(1, 60)), params(chance.randint(1, 40), **fields)


def run_in_company(
    engine: _core.Engine, neighbours: int, seed: int, *, abort: bool = False, last: bool = False
) -> Results:
    """The needles at random places among others, half of which come later."""
    chance = random.Random(seed)
    queue: list[int] = list(range(1, neighbours + 1))
    for index in range(len(NEEDLES)):
        queue.insert(len(queue) if last else chance.randint(0, len(queue)), NEEDLE + index)
    now = len(queue) // 2

    def submit(number: int) -> None:
        if number >= NEEDLE:
            submit_needle(engine, number - NEEDLE)
        else:
            engine.submit(number, *neighbour(chance, number))

    def before_step(step: int) -> None:
        count = now if step == 0 else 2
        for number in queue[:count]:
            submit(number)
        del queue[:count]
        if abort and step % 3 == 1:
            engine.abort(chance.randint(1, neighbours))

    results = run_all(engine, before_step)
    assert not queue
    return results


def alone(**config: Any) -> Results:
    results: Results = {}
    for index in range(len(NEEDLES)):
        engine = make_engine(**config)
        submit_needle(engine, index)
        results |= run_all(engine)
    return results


def differences(expected: Results, results: Results) -> list[tuple[int, int]]:
    return [key for key, got in expected.items() if results[key].promised() != got.promised()]


def events(engine: _core.Engine, kind: str) -> list[tuple[int, int]]:
    return [event for record in engine.trace() for event in record[kind]]


@pytest.mark.parametrize(("isa", "dtype", "kv"), NUMBERS)
def test_same_request_same_bytes(isa: str, dtype: str, kv: str) -> None:
    numbers = {"isa": isa, "dtype": dtype, "kv_cache_dtype": kv}
    expected = alone(**numbers)
    assert len(expected) == 6
    assert all(len(got.tokens) == 14 for got in expected.values())

    engine = make_engine(**numbers, num_threads=2, max_num_batched_tokens=300)
    assert differences(expected, run_in_company(engine, 30, 1, abort=True)) == []

    engine = make_engine(**numbers, max_num_seqs=9, max_num_batched_tokens=13, num_threads=3)
    results = run_in_company(engine, 6, 2)
    assert differences(expected, results) == []
    entries = [e for r in engine.trace() for e in r["entries"] if e["request_id"] >= NEEDLE]
    assert any(e["num_samples"] == 0 for e in entries), "no prompt of a needle was cut"

    engine = make_engine(**numbers, block_size=4)  # the prompt is in the cache already
    submit_needle(engine, 0)
    run_all(engine)
    results = run_in_company(engine, 5, 3)
    assert differences(expected, results) == []
    assert results[NEEDLE, 0].num_cached == 60
    assert results[NEEDLE + 3, 0].num_cached == 0  # prompt logprobs need every row

    engine = make_engine(**numbers, block_size=4, num_blocks=36, max_num_batched_tokens=70)
    assert differences(expected, run_in_company(engine, 8, 4, abort=True, last=True)) == []
    assert any(request >= NEEDLE for request, _ in events(engine, "preempted"))


def test_the_comparison_sees_another_seed_and_another_thread_count() -> None:
    expected = alone()
    other: Results = {}
    for index in range(len(NEEDLES)):
        engine = make_engine(num_threads=4)
        submit_needle(engine, index, seed=6)
        other |= run_all(engine)
    # Greedy needles have no draw; all others must differ, or the comparison compares nothing.
    assert differences(expected, other) == [k for k in expected if k[0] != NEEDLE]


def test_same_bytes_from_a_running_engine() -> None:
    """Arrivals from several threads at times that nobody chose."""
    expected = alone()
    engine = make_engine(num_threads=2, max_num_seqs=12, max_num_batched_tokens=48)
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
    engine.shutdown()
    assert differences(expected, results) == []


# -- 3: a cancelled request frees its blocks -----------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 6])  # waiting, in the prompt, forking, decoding
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_abort_frees_all_blocks_in_the_next_step(device: str, steps: int, n: int) -> None:
    engine = make_engine(device=device, max_num_seqs=4, max_num_batched_tokens=40)
    engine.submit(1, prompt(1, 90), params(100, n=n, temperature=1.0))
    engine.submit(2, prompt(2, 20), params(4))
    for _ in range(steps):
        engine.step()
    engine.abort(1)
    engine.step()
    results: Results = {}
    take(engine.wait_outputs(0.0), results)
    assert {results[1, choice].finish_reason for choice in range(n)} == {"abort"}
    survivor = 2 if engine.stats()["running"] else 0  # blocks of request 2
    assert engine.stats()["blocks_used"] == survivor
    for key, got in run_all(engine).items():
        results[key].tokens += got.tokens if key in results else []
    stats = engine.stats()
    assert all_blocks_back(stats)
    assert (stats["aborted"], stats["finished"]) == (1, 1)


def test_stop_counts_as_finished_and_ends_one_choice() -> None:
    engine = make_engine()
    engine.submit(1, prompt(1, 20), params(30, n=2, temperature=1.0))
    for _ in range(3):
        engine.step()
    engine.abort(1, 1, stop=True)
    results = run_all(engine)
    assert results[1, 1].finish_reason == "stop"
    assert (results[1, 0].finish_reason, len(results[1, 0].tokens)) == ("length", 30)
    assert engine.stats()["finished"] == 1
    assert engine.stats()["aborted"] == 0


# -- 4: no request can take the engine down ------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_bad_requests_are_refused_and_the_next_is_served(device: str) -> None:
    engine = make_engine(device=device, num_blocks=4, max_waiting=2)
    for bad, words in [
        ([], "prompt is empty"),
        (prompt(1, 256), "max_model_len"),
        (prompt(1, 65), "cache holds only 64"),
        ([1, VOCAB], r"prompt\[1\] is 131"),
        ([1, -1], r"prompt\[1\] is -1"),
        ([1, 2**40], "token id 1099511627776 at index 1 is out of range"),
        ([1, 2**70], "sequence of integers"),
        ([1.5], "sequence of integers"),
        ("text", "sequence of integers"),
        (np.zeros((2, 2), np.int32), "one-dimensional"),
        (np.array([1.0]), "array of integers"),
    ]:
        with pytest.raises(ValueError, match=words):
            engine.submit(1, bad, params())
    first = prompt(1, 20)
    engine.submit(1, np.array(first, np.int64), params())
    engine.submit(2, tuple(first), params())
    with pytest.raises(ValueError, match="request id 2 is already in use"):
        engine.submit(2, [1], params())
    with pytest.raises(_core.QueueFullError, match="max_waiting is 2"):
        engine.submit(3, [1], params())
    assert is_balanced(engine.stats())
    results = run_all(engine)
    assert results[1, 0].tokens == results[2, 0].tokens
    twice = np.repeat(np.array(first, np.int32), 2)
    for same in (first, [np.int64(t) for t in first], twice[::2], twice.astype(np.uint64)[::2]):
        engine.submit(3, same, params())
        assert run_all(engine)[3, 0].tokens == results[1, 0].tokens


def test_logits_full_of_nan_harm_nobody() -> None:
    """A token whose embedding is NaN: whoever feeds it gets tokens of no meaning, and no more."""
    model = tiny_model()
    engine = _core.Engine(_core.EngineConfig(num_blocks=64, check_invariants=True), model)
    for slot, values in random_weights(model).items():
        if slot == "embed.weight":
            values = values.copy()
            values[130] = np.nan
        engine.load_weight(slot, values, "float32")
    engine.finish_loading()
    healthy = [t % 130 for t in prompt(1, 20)]
    wants = params(6, temperature=1.0, top_p=0.5, logprobs=2, allowed_token_ids=list(range(130)))
    engine.submit(1, healthy, wants)
    expected = run_all(engine)[1, 0]
    engine.submit(2, healthy, wants)
    engine.submit(3, [130, *healthy], wants)
    results = run_all(engine)
    assert results[2, 0].promised() == expected.promised()
    assert len(results[3, 0].tokens) == 6
    assert all(0 <= token < 130 for token in results[3, 0].tokens)
    assert engine.stats()["healthy"]


# -- 5: bounded decode stall ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_running_request_gets_a_token_in_every_step(device: str, policy: str) -> None:
    engine = make_engine(device=device, max_num_seqs=6, max_num_batched_tokens=12, policy=policy)
    engine.submit(1, prompt(1, 10), params(80), priority=9)
    arrivals = iter(range(2, 30))

    def arrive(step: int) -> None:
        if step % 3 == 2 and (number := next(arrivals, None)):
            engine.submit(number, prompt(number, 180), params(3), priority=0)

    run_all(engine, arrive)
    last: dict[int, int] = {}
    gaps: dict[int, int] = {}
    for record in engine.trace():
        assert record["num_tokens"] <= 12
        for entry in record["entries"]:
            if entry["num_samples"]:
                request = entry["request_id"]
                gap = record["step"] - last.get(request, record["step"])
                gaps[request] = max(gap, gaps.get(request, 0))
                last[request] = record["step"]
    assert set(gaps.values()) == {1}
    assert len(gaps) > 20


# -- 7: what health is made of -------------------------------------------------------------------


def test_stats_tell_idle_from_stuck() -> None:
    engine = make_engine()
    assert engine.stats()["last_step_time"] == engine.stats()["busy_since"] == 0.0
    before = time.monotonic()
    engine.submit(1, prompt(1, 10), params(3))
    stats = engine.stats()  # work is pending and nobody steps
    assert stats["waiting"] == 1
    assert before <= stats["busy_since"] <= time.monotonic()
    run_all(engine)
    stats = engine.stats()
    assert stats["busy_since"] <= stats["last_step_time"] <= time.monotonic()
    assert stats["running"] + stats["waiting"] == 0
    later = time.monotonic()
    engine.submit(2, prompt(1, 10), params(3))
    engine.step()
    engine.submit(3, prompt(1, 10), params(3))  # the engine was busy: the time stays
    stats = engine.stats()
    assert later <= stats["busy_since"] <= stats["last_step_time"]


# -- 11: counters balance ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True])
def test_counters_balance_at_all_times(device: str, overlap: bool) -> None:
    engine = make_engine(
        device=device,
        overlap=overlap,
        block_size=4 if device == "cpu" else 16,
        num_blocks=40 if device == "cpu" else 10,
        max_model_len=80,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_waiting=10,
        policy="priority",
    )
    engine.start()
    clients, each = 3, 60
    accepted: list[int] = []
    refused: list[int] = []

    def client(index: int) -> None:
        chance = random.Random(index)
        for number in range(index * each, (index + 1) * each):
            wants = params(chance.randint(1, 30), n=chance.randint(1, 3), temperature=1.0)
            try:
                tokens = prompt(chance.randint(0, 4), chance.randint(1, 60))
                engine.submit(number, tokens, wants, priority=chance.randint(0, 2))
                accepted.append(number)
            except (ValueError, _core.QueueFullError):
                refused.append(number)
            if chance.random() < 0.3:
                engine.abort(chance.randint(index * each, number), chance.randint(-1, 2))
            time.sleep(chance.random() / 200)

    stop = threading.Event()
    wrong: list[dict[str, Any]] = []
    looks: list[int] = []

    def watch() -> None:
        while not stop.is_set():
            stats = engine.stats()
            blocks = stats["blocks_free"] + stats["blocks_cached"] + stats["blocks_used"]
            if not is_balanced(stats) or blocks != stats["blocks_total"]:
                wrong.append(stats)
            looks.append(1)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in [watcher, *threads]:
        thread.start()
    results: Results = {}
    done = 0
    while any(thread.is_alive() for thread in threads) or done < len(accepted):
        done += take(engine.wait_outputs(0.05), results)
    stop.set()
    watcher.join()
    stats = engine.stats()
    engine.shutdown()
    assert wrong == []
    assert len(looks) > 50
    assert stats["healthy"]
    assert done == len(accepted) == stats["finished"] + stats["aborted"]
    assert stats["rejected"] == len(refused)
    assert stats["preemptions"] > 0
    assert all(got.ends == 1 and not got.error for got in results.values())
    assert all_blocks_back(stats)


# -- 12: the trace -------------------------------------------------------------------------------


def test_trace_of_a_known_workload() -> None:
    engine = make_engine(block_size=4, num_blocks=20, max_num_seqs=3, max_num_batched_tokens=8)
    engine.submit(1, prompt(1, 6), params(4))
    engine.submit(2, prompt(2, 9), params(2))
    before = time.monotonic()
    run_all(engine)
    fields = ("request_id", "choice", "num_query", "context_len", "num_samples", "is_decode")
    steps = [
        (
            [tuple(entry[f] for f in fields) for entry in record["entries"]],
            record["admitted"],
            record["finished"],
        )
        for record in engine.trace()
    ]
    # Eight rows a step, decodes first, prompts in order of arrival.
    assert steps == [
        ([(1, 0, 6, 6, 1, False), (2, 0, 2, 2, 0, False)], [(1, 0), (2, 0)], []),
        ([(1, 0, 1, 7, 1, True), (2, 0, 7, 9, 1, False)], [], []),
        ([(1, 0, 1, 8, 1, True), (2, 0, 1, 10, 1, True)], [], [(2, 0, "length")]),
        ([(1, 0, 1, 9, 1, True)], [], [(1, 0, "length")]),
    ]
    # A newcomer's whole table, then from the first block that is written to.
    records = engine.trace()
    tables = [(e["first_block"], len(e["blocks"])) for r in records for e in r["entries"]]
    assert tables == [(0, 2), (0, 3), (1, 1), (0, 3), (1, 1), (2, 1), (2, 1)]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["running"] for r in records] == [2, 2, 1, 0]
    times = [t for r in records for t in (r["start_time"], r["end_time"])]
    assert times == sorted(times)
    assert before <= times[0] and times[-1] <= time.monotonic()
    assert all(r["blocks_free"] + r["blocks_cached"] + r["blocks_used"] == 20 for r in records)
    assert [r["step"] for r in engine.trace(since_step=3)] == [3, 4]


def test_trace_is_a_bounded_ring() -> None:
    engine = make_engine(trace_capacity=3)
    engine.submit(1, prompt(1, 6), params(10))
    run_all(engine)
    assert [record["step"] for record in engine.trace()] == [8, 9, 10]


# -- Threads and the GIL -------------------------------------------------------------------------


def test_waiting_for_outputs_releases_the_gil() -> None:
    """If it were held, nobody could submit what the waiter waits for."""
    engine = make_engine()
    engine.start()
    outputs: list[_core.Output] = []
    waiter = threading.Thread(target=lambda: outputs.extend(engine.wait_outputs(-1.0)))
    waiter.start()
    progress = sum(range(100_000))
    assert progress > 0
    assert waiter.is_alive()
    engine.submit(1, prompt(1, 5), params(1))
    waiter.join(timeout=60)
    assert not waiter.is_alive()
    assert outputs[0].request_id == 1


def test_shutdown_wakes_waiters_and_may_be_repeated() -> None:
    engine = make_engine()
    engine.start()
    engine.submit(1, prompt(1, 5), params(200))
    results: Results = {}
    seen = threading.Event()

    def wait() -> None:
        while outputs := engine.wait_outputs(-1.0):
            take(outputs, results)
            seen.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert seen.wait(60)
    closers = [threading.Thread(target=engine.shutdown) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in [*closers, waiter]:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert results[1, 0].finish_reason in ("abort", "length")
    with pytest.raises(RuntimeError, match="shut down"):
        engine.submit(2, [1], params())
    assert is_balanced(engine.stats())


def test_an_engine_that_is_dropped_while_running_ends() -> None:
    engine = make_engine()
    engine.start()
    engine.submit(1, prompt(1, 5), params(200))
    del engine


def test_submit_from_many_threads() -> None:
    engine = make_engine(max_num_seqs=8)
    engine.start()

    def submit(first: int) -> None:
        for number in range(first, first + 10):
            engine.submit(number, prompt(number % 4, 12), params(5))

    threads = [threading.Thread(target=submit, args=(100 * i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    results = wait_all(engine, 80)
    for thread in threads:
        thread.join()
    engine.shutdown()
    by_prompt = {number % 4: got.tokens for (number, _), got in results.items()}
    assert len(results) == 80
    for (number, _), got in results.items():
        assert got.ends == 1
        assert got.tokens == by_prompt[number % 4]


# -- Loading through the bindings ----------------------------------------------------------------


def test_weights_of_the_wrong_kind_are_refused() -> None:
    engine = _core.Engine(_core.EngineConfig(num_blocks=4, max_model_len=32), tiny_model())
    slot, shape = "layers.0.o.weight", (40, 48)
    ones = np.ones(shape, np.float32)
    for data, dtype, words in [
        (ones, "int8", "dtype 'int8' is unknown"),
        (ones.astype(np.float64), "float32", "have 4 bytes, got 8"),
        (ones.astype(np.int32), "float32", "int32 does not hold elements of float32"),
        (ones.astype(np.float16), "bfloat16", "float16 does not hold elements of bfloat16"),
        (ones.astype(np.uint16), "float16", "uint16 does not hold elements of float16"),
        (ones.astype(">f4"), "float32", ">f4 does not hold"),
        (ones.T, "float32", "rows of a weight must be contiguous"),
        (np.ones((48, 40), np.float32), "float32", r"has shape \[40, 48\], got \[48, 40\]"),
        (ones[None], "float32", "1 or 2 dimensions, got 3"),
    ]:
        with pytest.raises(ValueError, match=words):
            engine.load_weight(slot, data, dtype)
    with pytest.raises(ValueError, match="unknown weight slot 'layers.0.x'"):
        engine.load_weight("layers.0.x", ones, "float32")
    engine.load_weight(slot, np.ones((40, 100), np.float32)[:, :48], "float32")
    with pytest.raises(ValueError, match="30 weight slots were not loaded: embed.weight, "):
        engine.finish_loading()
    with pytest.raises(ValueError, match="finish_loading"):
        engine.start()


def test_prompt_logprobs_need_bounded_memory() -> None:
    def activations(seqs: int, vocab: int) -> int:
        config = _core.EngineConfig(
            num_blocks=1, max_model_len=4096, max_num_seqs=seqs, max_num_batched_tokens=4096
        )
        plan = _core.Engine.plan_memory(config, tiny_model(vocab_size=vocab))
        return int(plan["activations"])

    for seqs, rows in [(1, 64), (64, 64), (4096, 64)]:
        assert activations(seqs, 40_000) - activations(seqs, 24_000) == rows * 16_000 * 4
