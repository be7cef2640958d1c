"""Stage 2, batching: one pass over the weights serves many; who gets a seat in the batch, and when;
how a long prompt shares the steps with running answers."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plot import Panel, Points, Span, stairs
from .experiment import Cell, Experiment, Report, cell
from .lab import Lab, Request, Run, Step
from .work import Work

# -- 2.1 Batch size -------------------------------------------------------------------------------


def batch_size(lab: Lab) -> Report:
    sizes = lab.size([1, 2, 4, 8, 16, 32, 64], [1, 4], [1, 4, 16, 64, 128, 256, 512])
    prompt, new = 16, lab.size(20, 4)
    read, compute = (lab.machine[k] for k in ("read_bytes_per_second", "flops_per_second"))
    context = prompt + new // 2
    room = max(2048, max(sizes) * prompt)
    with lab.engine(
        lab.model, max_num_seqs=max(sizes), max_model_len=128, max_num_batched_tokens=room
    ) as bench:
        work = bench.work
        token = work.decode_operations(context)
        crossing = work.weight_bytes * compute / (read * token)

        def bound(batch: int) -> float:
            return max(work.decode_bytes([context] * batch) / read, batch * token / compute)

        lab.expect(
            f"a step reads all weights, {work.weight_bytes / 1e6:.0f} MB, whether it makes 1 token "
            f"or {sizes[-1]}. Until about {crossing:.0f} sequences the arithmetic hides behind "
            f"that reading: a step takes {1e3 * bound(1):.2g} ms at best and every further "
            "sequence is free. Beyond, a step grows with the batch and throughput levels off at "
            f"{compute / token:.0f} tokens a second."
        )
        rows: list[list[Cell]] = []
        seconds, counts = {}, {"weight_bytes": float(work.weight_bytes)}
        for batch in lab.progress(sizes, "batch sizes"):
            run = bench.run([Request(bench.prompt(prompt, i), new) for i in range(batch)])
            full = [s for s in run.steps if s["num_decodes"] == s["num_tokens"] == batch]
            seconds[batch] = min(map(_seconds, full))
            size, operations = work.step_bytes(full[0]), work.step_operations(full[0])
            rows.append([batch, size / 1e6, size / batch / 1e6, operations / 1e9])
            rows[-1] += [1e3 * bound(batch), 1e3 * seconds[batch], batch / seconds[batch]]
            counts |= {f"bytes: {batch}": size, f"operations: {batch}": operations}
            counts |= {f"steps: {batch}": len(run.steps)}
    gain = sizes[-1] * seconds[sizes[0]] / seconds[sizes[-1]]
    slower = seconds[sizes[-1]] / seconds[sizes[0]]
    bounds = [(float(b), bound(b)) for b in sizes]
    return Report(
        ["batch", "MB a step", "MB a token", "GFLOP a step", "bound ms", "best ms", "tokens/s"],
        rows,
        f"{sizes[-1]} sequences at once gave {gain:.1f} times the tokens a second of one alone, "
        f"and each of them waited {slower:.1f} times as long for its next token.",
        counts,
        [
            Panel(
                "Throughput",
                "sequences in the batch",
                "tokens a second",
                lines=[
                    ("bound", [(b, b / t) for b, t in bounds]),
                    ("measured", [(float(b), b / seconds[b]) for b in sizes]),
                ],
                x_log=True,
                y_log=True,
            ),
            Panel(
                "Latency: time between two tokens of a sequence",
                "sequences in the batch",
                "ms",
                lines=[
                    ("bound", [(b, 1e3 * t) for b, t in bounds]),
                    ("measured", [(float(b), 1e3 * seconds[b]) for b in sizes]),
                ],
                x_log=True,
            ),
        ],
    )


def _seconds(step: Step) -> float:
    return float(step["end_time"] - step["start_time"])


# -- 2.2 Static against continuous batching -------------------------------------------------------


def continuous_batching(lab: Lab) -> Report:
    seats, count = lab.size((8, 40), (3, 9))
    lengths = answer_lengths(count)
    total, longest = sum(lengths), max(lengths)
    modes: dict[str, dict[str, Any]] = {
        "static": {"static_batching": True},
        "continuous": {"static_batching": False},
    }
    expected = {
        "static": sum(max(lengths[i : i + seats]) for i in range(0, count, seats)),
        "continuous": steps_with_free_seats(lengths, seats),
    }
    lab.expect(
        f"{count} answers of {min(lengths)} to {longest} tokens, {total} together, in {seats} "
        f"seats. With no seat ever idle that is {-(-total // seats)} steps. A static batch lasts "
        f"as long as its longest answer, {expected['static']} steps altogether, so "
        f"{1 - total / seats / expected['static']:.0%} of its seats stand idle; if each seat is "
        f"filled again at once, {expected['continuous']} steps and "
        f"{1 - total / seats / expected['continuous']:.0%}."
    )
    runs: dict[str, Run] = {}
    for mode, how in lab.progress(list(modes.items()), "modes"):
        with lab.engine(lab.model, max_num_seqs=seats, **how) as bench:
            requests = [Request(bench.prompt(12, i), n) for i, n in enumerate(lengths)]
            runs[mode] = bench.run(requests)
    tokens = sum(map(len, runs["static"].tokens))
    same = runs["static"].tokens == runs["continuous"].tokens
    idle = {m: sum(seats - len(s["entries"]) for s in r.steps) for m, r in runs.items()}
    steps = {m: len(r.steps) for m, r in runs.items()}
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"tokens": tokens, "seats": seats, "same_tokens": same}
    for mode, run in runs.items():
        ends = [i for i, s in enumerate(run.steps, 1) for _ in s["finished"]]
        rows.append([mode, steps[mode], idle[mode], f"{idle[mode] / seats / steps[mode]:.0%}"])
        rows[-1] += [statistics.mean(ends), 1e3 * run.seconds, tokens / run.seconds]
        counts |= {f"steps: {mode}": steps[mode], f"expected: {mode}": expected[mode]}
        counts |= {f"idle: {mode}": idle[mode], f"mean end: {mode}": statistics.mean(ends)}
    as_expected = all(steps[m] == expected[m] for m in modes)
    return Report(
        ["batching", "steps", "idle seats", "share", "mean steps to an answer", "ms", "tokens/s"],
        rows,
        f"{'exactly' if as_expected else 'not quite'} the steps that were expected: "
        f"{steps['static']} and {steps['continuous']}. Continuous batching did the same work in "
        f"{steps['continuous'] / steps['static']:.0%} of the steps and "
        f"{runs['continuous'].seconds / runs['static'].seconds:.0%} of the time, and made "
        f"{'the same' if same else 'NOT the same'} tokens.",
        counts,
        [_timeline(mode, run, seats, max(steps.values())) for mode, run in runs.items()],
    )


def answer_lengths(count: int) -> list[int]:
    """As in a chat: most are short, a few are long."""
    rng = np.random.default_rng(7)
    return [int(n) for n in np.clip(np.exp(rng.normal(3.6, 0.9, count)), 4, 256)]


def steps_with_free_seats(lengths: Sequence[int], seats: int) -> int:
    """The next answer, in order, takes the seat that comes free first; a step gives every seat one
    token."""
    free_at = [0] * seats
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


def seat_spans(steps: Sequence[Step], seats: int) -> list[tuple[int, int, int, int]]:
    """(request, seat, first step, end) out of a trace. The engine knows no seats, only how many are
    taken: a newcomer gets the first one free."""
    free, held, spans = list(range(seats)), dict[int, tuple[int, int]](), []
    for i, step in enumerate(steps):
        for entry in step["entries"]:
            request = entry["request_id"]
            if request not in held:
                held[request] = heapq.heappop(free), i
        for request, *_ in step["finished"]:
            seat, first = held.pop(request)
            heapq.heappush(free, seat)
            spans.append((request, seat, first, i + 1))
    return spans


def _timeline(mode: str, run: Run, seats: int, steps: int) -> Panel:
    """White is idle. `steps`: how long the axis is."""
    spans = [
        Span(seat, first, end, f"request {request % 4}", str(request) if end - first > 9 else "")
        for request, seat, first, end in seat_spans(run.steps, seats)
    ]
    edge: list[tuple[str, Points]] = [("", [(float(steps), 0.0)])]  # a point: not seen
    names = [str(i + 1) for i in range(seats)]
    title = f"{mode}: {len(run.steps)} steps; white is idle"
    return Panel(
        title, "step", "seat", lines=edge, spans=spans, y_names=names, wide=True, legend=False
    )


# -- 2.3 Chunked prefill --------------------------------------------------------------------------


def chunked_prefill(lab: Lab) -> Report:
    long, running, before, after = lab.size((1024, 4, 8, 40), (96, 2, 3, 16), (8192, 4, 8, 40))
    budgets = lab.size([256, 64], [16], [2048, 512])
    room = 2 * max(long, 1024)
    modes: dict[str, dict[str, Any]] = {
        "whole prompt": {"enable_chunked_prefill": False, "max_num_batched_tokens": room}
    }
    # (steps, rows of the largest). Each running answer takes a row of a step; the prompt, the rest.
    expected = {"whole prompt": (1, long + running)}
    for budget in budgets:
        mode = f"chunks, {budget} rows a step"
        modes[mode] = {"max_num_batched_tokens": budget}
        expected[mode] = -(-long // (budget - running)), budget
    last = list(modes)[-1]
    work, compute = Work(lab.model), lab.machine["flops_per_second"]
    whole = work.prefill_operations(long) / compute
    piece = work.operations(budgets[-1], budgets[-1] * long, running) / compute
    lab.expect(
        f"{running} answers are running when a prompt of {long} tokens comes. Computed whole, it "
        f"is one step of {long + running} rows, {1e3 * whole:.3g} ms at best, in which nobody else "
        "gets a token. Cut up, no step has more rows than the budget allows, and the running "
        f"answers get a token in each: with {budgets[-1]} rows the prompt takes "
        f"{expected[last][0]} steps, {1e3 * piece:.2g} ms at best for the dearest. Its own first "
        f"token has {expected[last][0] * running} rows of the others to wait for, "
        f"{expected[last][0] * running / long:.0%} more work."
    )
    seen: dict[str, Stall] = {}
    for mode, how in lab.progress(list(modes.items()), "modes"):
        with lab.engine(lab.model, max_num_seqs=8, max_model_len=room, **how) as bench:
            requests = [Request(bench.prompt(16, i), before + after) for i in range(running)]
            requests.append(Request(bench.prompt(long, 99), 4, before))
            seen[mode] = Stall.of(bench.run(requests).steps, running, before)
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {}
    for mode, s in seen.items():
        operations = work.step_operations(s.largest)
        rows.append([mode, s.prompt_steps, s.largest["num_tokens"], operations / 1e9])
        rows[-1] += [1e3 * s.longest_gap, 1e3 * s.first_token]
        counts |= {f"prompt steps: {mode}": s.prompt_steps, f"missed: {mode}": s.missed}
        counts |= {f"largest step: {mode}": s.largest["num_tokens"]}
        counts |= {f"operations: {mode}": operations}
        steps, largest = expected[mode]
        counts |= {f"expected steps: {mode}": steps, f"expected largest step: {mode}": largest}
    first, second = seen["whole prompt"], seen[last]
    return Report(
        ["prefill", "steps of the prompt", "rows of the largest", "its GFLOP"]
        + ["longest gap, ms", "first token of the prompt, ms"],
        rows,
        f"the running answers stood still for {cell(1e3 * first.longest_gap)} ms with the prompt "
        f"in one piece, and for {cell(1e3 * second.longest_gap)} ms at most with {budgets[-1]} "
        f"rows a step; the prompt's own first token came after {cell(1e3 * first.first_token)} "
        f"and {cell(1e3 * second.first_token)} ms.",
        counts,
        [
            Panel(
                "A running answer, from the arrival of the long prompt on",
                "ms",
                "tokens so far",
                lines=[(mode, s.tokens) for mode, s in seen.items()],
                wide=True,
            ),
            Panel(
                "Rows of each step",
                "steps since the arrival",
                "rows",
                lines=[(mode, s.rows) for mode, s in seen.items()],
                wide=True,
            ),
        ],
    )


@dataclass(frozen=True)
class Stall:
    """What the arrival of a long prompt did to request 0, which was running."""

    prompt_steps: int
    """Steps with rows of the prompt."""
    missed: int
    """Of these, steps that gave request 0 no token."""
    largest: Step
    """The step with the most rows."""
    longest_gap: float
    """Seconds between two tokens of request 0."""
    first_token: float
    """Seconds from the arrival to the prompt's own first token."""
    tokens: Points
    """(ms since the arrival, tokens of request 0)"""
    rows: Points
    """(steps since the arrival, rows of the step)"""

    @classmethod
    def of(cls, steps: Sequence[Step], prompt: int, arrival_step: int) -> Stall:
        """`prompt`: the request that is the long prompt."""
        arrival = steps[arrival_step]["start_time"]
        of_prompt = [s for s in steps if _has(s, prompt, decode=False)]
        ends = [s["end_time"] for s in steps if _has(s, 0)]
        late = [(1e3 * (t - arrival), float(i)) for i, t in enumerate(ends, 1) if t >= arrival]
        return cls(
            len(of_prompt),
            sum(not _has(s, 0) for s in of_prompt),
            max(steps, key=lambda s: int(s["num_tokens"])),
            max(b - a for a, b in zip(ends, ends[1:], strict=False)),
            of_prompt[-1]["end_time"] - arrival,
            list(stairs([(0.0, float(arrival_step)), *late]))[1:],
            [(float(i), float(s["num_tokens"])) for i, s in enumerate(steps[arrival_step:])],
        )


def _has(step: Step, request: int, decode: bool = True) -> bool:
    """Whether the step has rows of the request (decode=False: of its prompt)."""
    return any(
        e["request_id"] == request and (decode or not e["is_decode"]) for e in step["entries"]
    )


EXPERIMENTS = [
    Experiment(
        "2.1",
        "Batch size",
        "What does it cost to serve one more at the same time?",
        batch_size,
    ),
    Experiment(
        "2.2",
        "Static against continuous batching",
        "What happens to the seat of a request that has ended?",
        continuous_batching,
    ),
    Experiment(
        "2.3",
        "Chunked prefill",
        "Why does a long prompt make everybody else's answer stop?",
        chunked_prefill,
    ),
]
