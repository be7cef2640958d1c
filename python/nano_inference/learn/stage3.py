"""Stage 3, memory: where the slots of the KV cache go, and what they are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _core
from ..plot import Panel, Points
from .experiment import Cell, Experiment, Report
from .lab import Bench, Lab, Request, Run
from .memory import (
    Usage,
    computed_rows,
    expected_hits,
    live_share,
    lost_rows,
    mean_held,
    mixed_requests,
    needed_rows,
    usage,
)
from .tables import Story

BLOCK_SIZE = 16
MAX_LEN = 512

# -- 3.1 Contiguous or paged ----------------------------------------------------------------------


def contiguous_or_paged(lab: Lab) -> Report:
    slots = 8 * MAX_LEN
    requests = mixed_requests(lab.size(128, 32), 2048, MAX_LEN)
    held = mean_held(requests)
    modes = {"contiguous": MAX_LEN, f"paged, {BLOCK_SIZE}": BLOCK_SIZE}
    expected = {name: live_share(requests, size) for name, size in modes.items()}
    paged_fit = slots / mean_held(requests, BLOCK_SIZE)
    lab.expect(
        f"a cache of {slots} slots holds {slots // MAX_LEN} reservations of {MAX_LEN}, the longest "
        f"that a sequence may become. While it runs, a sequence holds {held:.0f} tokens on "
        f"average, so {expected['contiguous']:.0%} of what is reserved will be alive. In blocks of "
        f"{BLOCK_SIZE} only the last block has room to spare, about {(BLOCK_SIZE - 1) / 2:g} "
        f"slots: {expected[f'paged, {BLOCK_SIZE}']:.0%} alive, and room for about {paged_fit:.0f} "
        "sequences."
    )
    rows: list[list[Cell]] = []
    panels: list[Panel] = []
    used: dict[str, Usage] = {}
    runs: dict[str, Run] = {}
    for name, size in lab.progress(modes.items(), "ways to keep the cache"):
        with lab.bundled(
            paged=size == BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=slots // size,
            max_model_len=MAX_LEN,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        ) as bench:
            run = runs[name] = bench.run(requests)
            u = used[name] = usage(run.steps, slots, size)
            preemptions = bench.core.stats()["preemptions"]
        shares = (expected[name], u.live_of_reserved, u.live_of_total)
        rows.append([name, u.fit, *shares, len(run.steps), preemptions])
        lines = [("reserved", _over_steps(u.reserved)), ("alive", _over_steps(u.live))]
        panels.append(Panel(f"{name}: slots of {slots}", "step", "slots", lines=lines))
    fits = [(name, _over_steps(u.running)) for name, u in used.items()]
    panels.append(Panel("Sequences in the cache", "step", "sequences", lines=fits, wide=True))
    a, b = used.values()
    same = sum(x == y for x, y in zip(*(run.tokens for run in runs.values()), strict=True))
    return Report(
        ["cache", "sequences that fit", "alive of reserved, expected", "alive of reserved"]
        + ["alive of all", "steps", "preempted"],
        rows,
        f"{a.live_of_reserved:.0%} of the reserved slots were alive, paged "
        f"{b.live_of_reserved:.0%}; {b.fit / a.fit:.1f} times as many sequences fitted into the "
        f"same memory, and {rows[0][5]} steps became {rows[1][5]}.",
        {
            "expected_live_contiguous": expected["contiguous"],
            "live_contiguous": a.live_of_reserved,
            "expected_live_paged": expected[f"paged, {BLOCK_SIZE}"],
            "live_paged": b.live_of_reserved,
            "fit_contiguous": a.fit,
            "most_contiguous": max(a.running),
            "fit_paged": b.fit,
            "steps_contiguous": len(a.live),
            "steps_paged": len(b.live),
            "same_answers": same,
            "requests": len(requests),
        },
        panels,
    )


def _over_steps(values: Sequence[float]) -> Points:
    return [(float(i), float(v)) for i, v in enumerate(values)]


# -- 3.2 The block table --------------------------------------------------------------------------

SYSTEM = tuple(range(100, 108))  # tokens that two prompts begin with


def block_table(lab: Lab) -> Report:
    lab.expect(
        "9 blocks of 4 slots. A's 10 tokens take 3 blocks. B begins with the same 8 tokens and "
        "shares 2 of them, so its 11 tokens take one new block. C and D are two answers to one "
        "prompt: they share its blocks until both want to write into the last one, which is then "
        "copied. When no block is left, the youngest gives its blocks back and comes again later; "
        "full blocks that nobody holds are kept as long as nobody needs them."
    )
    arrivals = [
        (0, "A", [*SYSTEM, 1, 2], 7),
        (2, "B", [*SYSTEM, 3, 4, 5], 9),
        (4, "CD", [7, 8, 9, 10, 11], 6),
        (5, "E", [50, 51, 52, 53, 54, 55, 56, 57], 3),
    ]
    story = Story(arrivals, num_blocks=9, block_size=4)
    rows: list[list[Cell]] = [
        [f.step, f.blocks_text(4), f.tables_text(), "; ".join(f.events)] for f in story.frames
    ]
    events = [event for frame in story.frames for event in frame.events]
    counts: dict[str, float] = {
        "steps": len(story.frames),
        "tokens_found_by_b": 8
        if any("8 tokens are found" in e for e in story.frames[2].events)
        else 0,
        "new_blocks_of_b": len(set(story.frames[2].tables["B"]) - set(story.frames[1].tables["A"])),
        "copies": sum("copied" in e for e in events),
        "preempted": sum("preempted" in e for e in events),
        "ended": sum(e.endswith("ends") for e in events),
        "cached_as_drawn": sum(c.cached for f in story.frames for c in f.cells),
        "cached_as_counted": sum(f.cached for f in story.frames),
    }
    return Report(
        ["step", "blocks (* shared, lower case: cached)", "block tables", "what happened"],
        rows,
        f"B took {counts['new_blocks_of_b']:.0f} new block for 11 tokens, {counts['copies']:.0f} "
        f"block was copied for the two answers, {counts['preempted']:.0f} sequence was preempted "
        f"and came back, and all {counts['ended']:.0f} ended.",
        counts,
        [story.panel()],
    )


# -- 3.3 How large a block ------------------------------------------------------------------------


def block_size(lab: Lab) -> Report:
    slots = 8 * MAX_LEN
    sizes = lab.size([1, 4, 16, 64, 256], [1, 16, 256])
    requests = mixed_requests(lab.size(128, 24), 2048, MAX_LEN)
    held = mean_held(requests)
    expected = {size: live_share(requests, size) for size in sizes}
    lab.expect(
        "half a block is lost at the end of each sequence, so the loss grows with the block: "
        + ", ".join(f"{size}: {1 - share:.0%}" for size, share in expected.items())
        + f" of what is reserved. What shrinks is the table: {held:.0f} tokens are {held:.0f} "
        f"entries at 1 and {-(-held // 16):.0f} at 16. The kernels take K and V in runs of 16 "
        "tokens; smaller blocks must be gathered first."
    )
    rows: list[list[Cell]] = []
    got: dict[int, float] = {}
    times: dict[int, float] = {}
    table: dict[int, float] = {}
    for size in lab.progress(sizes, "block sizes"):
        with lab.bundled(
            block_size=size,
            num_blocks=slots // size,
            max_model_len=MAX_LEN,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        ) as bench:
            run = bench.run(requests)
        u = usage(run.steps, slots, size)
        got[size] = u.live_of_reserved
        table[size] = sum(u.reserved) / size / sum(u.running)
        times[size] = _attention_seconds(size, lab.size(20, 1))
        lost = (1 - expected[size], 1 - u.live_of_reserved)
        rows.append([size, *lost, table[size], u.fit, times[size] * 1e6])
    points = [(float(s), 100 * (1 - share)) for s, share in got.items()]
    expectation = [(float(s), 100 * (1 - share)) for s, share in expected.items()]
    return Report(
        ["block size", "lost, expected", "lost", "entries of a table", "sequences that fit"]
        + ["attention, 8 × 512 tokens, µs"],
        rows,
        f"blocks of 16 lost {1 - got[16]:.1%} of the reserved slots (expected "
        f"{1 - expected[16]:.1%}), with {table[16]:.1f} entries a table; blocks of 1 lost nothing "
        f"and made attention {times[1] / times[16]:.1f} times as slow.",
        {
            **{f"lost_{s}": 1 - got[s] for s in sizes},
            **{f"expected_lost_{s}": 1 - expected[s] for s in sizes},
            **{f"entries_{s}": table[s] for s in sizes},
        },
        [
            Panel("Slots lost at the end of sequences", "block size", "% of reserved",
                  lines=[("expected", expectation)], dots=[("counted", points)], x_log=True),
            Panel("Attention of a decode step, 8 sequences of 512", "block size", "µs",
                  lines=[("", [(float(s), t * 1e6) for s, t in times.items()])], x_log=True),
        ],
    )  # fmt: skip


def _attention_seconds(size: int, repeats: int) -> float:
    """Of the operator: one query of each of 8 sequences of 512 tokens, blocks in random order."""
    seqs, heads, dim = 8, 2, 64
    ops = _core.Ops()
    rng = np.random.default_rng(1)
    blocks = MAX_LEN // size
    cache = ops.cache(seqs * blocks, size, heads, dim, "bfloat16")
    tables = rng.permutation(seqs * blocks).astype(np.int32).reshape(seqs, blocks)
    slots = (tables[:, :, None].astype(np.int64) * size + np.arange(size)).reshape(-1)
    qkv = rng.standard_normal((seqs * MAX_LEN, 4 * heads * dim), dtype=np.float32)
    positions = np.tile(np.arange(MAX_LEN, dtype=np.int32), seqs)
    ops.rope_kv_write(qkv, positions, slots, cache)
    q = np.ascontiguousarray(qkv[:seqs, : 2 * heads * dim])
    out = np.empty_like(q)
    rows = np.arange(seqs + 1, dtype=np.int32)
    context = np.full(seqs, MAX_LEN, np.int32)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        ops.attention(q, rows, context, tables, cache, out, dim**-0.5)
        times.append(time.perf_counter() - began)
    return min(times)


# -- 3.4 One text, many questions -----------------------------------------------------------------

COLORS = ["red", "blue", "green", "white", "black", "brown", "yellow", "pink"]
PLACES = ["attic", "barn", "garden", "kitchen", "cellar", "tower", "library", "hall"]


def facts(count: int) -> str:
    """A text that questions can be asked about."""
    things = ["key", "box", "cup", "hat"]
    lines = []
    for i in range(count):
        color, thing = COLORS[i % 8], things[i // 8 % 4]
        lines.append(f"The {color} {thing} is in the {PLACES[(3 * i + i // 8) % 8]}.")
    return " ".join(lines)


def question(bench: Bench, text: str, ask: str) -> list[int]:
    return chat_prompt(bench, [{"role": "user", "content": f"{text} {ask}"}])


def chat_prompt(bench: Bench, messages: list[dict[str, str]]) -> list[int]:
    assert bench.tokenizer is not None
    ids = bench.tokenizer.apply_chat_template(messages, tokenize=True)
    assert not isinstance(ids, str)
    return ids


def answer(bench: Bench, tokens: Sequence[int]) -> str:
    """The text up to the end-of-sequence token (runs go on to a fixed length)."""
    assert bench.tokenizer is not None
    ids = list(tokens)
    end = bench.tokenizer.eos_token_id
    return bench.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, True).strip()


def shared_prompt(lab: Lab) -> Report:
    users, output, budget = lab.size(16, 6), 4, lab.size(2048, 512)
    options: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_blocks": 1024,
        "max_model_len": 2048,
        "max_num_batched_tokens": budget,
        "max_num_seqs": 32,
    }
    modes = {
        "no prefix cache": (False, 0),
        "all arrive together": (True, 0),
        "one after another": (True, 1),
    }
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {}
    outputs: list[list[list[int]]] = []
    expected: dict[str, int] = {}
    requests: list[Request] = []
    for name, (cached, gap) in lab.progress(modes.items(), "ways to arrive"):
        with lab.bundled(enable_prefix_caching=cached, **options) as bench:
            if not requests:
                text = facts(lab.size(32, 16))
                asks = [
                    f"Where is the {COLORS[i % 8]} {'key' if i < 8 else 'box'}?"
                    for i in range(users)
                ]
                requests = [Request(question(bench, text, ask), output) for ask in asks]
                prompts = [list(r.prompt) for r in requests]
                hits = expected_hits(prompts, prompts, BLOCK_SIZE)
                # Blocks can be found once the step that wrote them is over.
                early = min(users, -(-budget // len(prompts[0])))
                late = expected_hits(prompts[early - 1 :], prompts[early - 1 :], BLOCK_SIZE)
                expected = dict(zip(modes, (0, late, hits), strict=True))
                counts["prompt_tokens"] = sum(len(p) for p in prompts)
                lab.expect(
                    f"{users} questions about one text, {len(prompts[0])} tokens each, all but the "
                    f"end alike. Without a prefix cache all {counts['prompt_tokens']:.0f} prompt "
                    "tokens are computed. With it, each question after the first finds the whole "
                    f"blocks of {BLOCK_SIZE} tokens that it shares: {hits} tokens. But a block can "
                    "be found only after the step that wrote it: of questions that arrive "
                    f"together, the {early} of the first step find nothing, which leaves {late}."
                )
            batch = [Request(r.prompt, r.max_tokens, gap * i) for i, r in enumerate(requests)]
            run = bench.run(batch)
            stats = bench.core.stats()
            outputs.append(run.tokens)
            rows.append(
                [
                    name,
                    stats["prompt_tokens"],
                    expected[name],
                    stats["cached_tokens"],
                    len(run.steps),
                ]
                + [run.seconds, answer(bench, run.tokens[0])]
            )
        key = name.replace(" ", "_")
        counts |= {
            f"computed_{key}": stats["prompt_tokens"],
            f"found_{key}": stats["cached_tokens"],
            f"expected_{key}": expected[name],
        }
    counts["same_answers"] = sum(a == b == c for a, b, c in zip(*outputs, strict=True))
    counts["requests"] = users
    saved = counts["found_one_after_another"] / counts["prompt_tokens"]
    return Report(
        ["", "prompt tokens computed", "found, expected", "found", "steps", "seconds"]
        + ["first answer"],
        rows,
        f"{counts['found_one_after_another']:.0f} of {counts['prompt_tokens']:.0f} prompt tokens "
        f"({saved:.0%}) were found (expected {expected['one after another']}), "
        f"{counts['found_all_arrive_together']:.0f} when all came together (expected "
        f"{expected['all arrive together']}), and {counts['same_answers']:.0f} of {users} answers "
        "are the same in all three.",
        counts,
        [
            Panel("Prompt tokens", "", "tokens",
                  bars=[("computed", [(i, float(r[1])) for i, r in enumerate(rows)]),
                        ("found in the cache", [(i, float(r[3])) for i, r in enumerate(rows)])],
                  x_names=list(modes), wide=True)
        ],
    )  # fmt: skip


# -- 3.5 A chat -----------------------------------------------------------------------------------


def chat(lab: Lab) -> Report:
    turns, output = lab.size(8, 3), 16
    text = facts(lab.size(24, 12))
    asks = [f"Where is the {color} key?" for color in COLORS[:turns]]
    lab.expect(
        f"every turn of a chat sends the whole conversation again, so {turns} turns compute its "
        "beginning again and again: the prompts grow by a line a turn, and their sum grows with "
        "the square of the turns. With the prefix cache a turn finds all whole blocks up to the "
        "end of what it had seen the turn before, the answer included if the template repeats it "
        f"token by token; what is left is the new line and at most {BLOCK_SIZE - 1} tokens of a "
        "block that was not full."
    )
    per_turn: dict[bool, list[int]] = {}
    prompts: list[list[int]] = []
    known: list[list[int]] = []
    answers: list[list[str]] = []
    for cached in lab.progress((False, True), "with and without a prefix cache"):
        with lab.bundled(enable_prefix_caching=cached, max_num_seqs=1, num_blocks=256) as bench:
            messages: list[dict[str, str]] = []
            per_turn[cached], prompts, known, replies = [], [], [], list[str]()
            for i, ask in enumerate(asks):
                messages.append({"role": "user", "content": f"{text} {ask}" if i == 0 else ask})
                prompt = chat_prompt(bench, messages)
                before = bench.core.stats()["prompt_tokens"]
                tokens = bench.run([Request(prompt, output)]).tokens[0]
                per_turn[cached].append(bench.core.stats()["prompt_tokens"] - before)
                prompts.append(prompt)
                known.append(prompt + tokens[:-1])
                replies.append(answer(bench, tokens))
                messages.append({"role": "assistant", "content": replies[-1]})
            answers.append(replies)
    expected = [
        len(p) - expected_hits(prompts[: i + 1], known, BLOCK_SIZE)
        + expected_hits(prompts[:i], known, BLOCK_SIZE)
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            i + 1,
            ask,
            answers[1][i],
            len(prompts[i]),
            per_turn[False][i],
            expected[i],
            per_turn[True][i],
        ]
        for i, ask in enumerate(asks)
    ]
    without, found = sum(per_turn[False]), sum(per_turn[True])
    lines: list[tuple[str, Points]] = [
        (name, [(float(i + 1), float(n)) for i, n in enumerate(per_turn[cached])])
        for name, cached in (("no prefix cache", False), ("prefix cache", True))
    ]
    return Report(
        ["turn", "question", "answer", "prompt tokens", "computed without"]
        + ["computed, expected", "computed"],
        rows,
        f"{without} prompt tokens were computed without the cache and {found} with it (expected "
        f"{sum(expected)}); after the first turn {(found - per_turn[True][0]) / (turns - 1):.0f} "
        "a turn.",
        {
            "prompt_tokens": sum(len(p) for p in prompts),
            "computed_without": without,
            "computed": found,
            "expected": sum(expected),
            "turns_as_expected": sum(a == b for a, b in zip(expected, per_turn[True], strict=True)),
            "turns": turns,
            "same_answers": sum(a == b for a, b in zip(*answers, strict=True)),
        },
        [Panel("Prompt tokens computed", "turn", "tokens", lines=lines, wide=True)],
    )


# -- 3.6 When memory is short ---------------------------------------------------------------------


def short_memory(lab: Lab) -> Report:
    requests = mixed_requests(lab.size(48, 12), 2048, MAX_LEN, seed=11)
    needed = needed_rows(requests)
    peak = sum(-(-(len(r.prompt) + r.max_tokens) // BLOCK_SIZE) for r in requests)
    sizes = lab.size([peak, peak // 2, peak // 4, 48, 36], [peak, 36])
    lab.expect(
        f"{len(requests)} requests need {needed} rows of computing if nothing is done twice. In "
        f"{peak} blocks all of them fit at their longest, so none is preempted. In fewer, the "
        "newest sequence loses its blocks when an older one needs one, and computes them again: "
        "as many rows as it had in the cache, less what it finds again in the prefix cache. The "
        "answers stay the same, bit by bit."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"needed": needed, "requests": len(requests)}
    reference: list[list[int]] = []
    same = 0
    again: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for blocks in lab.progress(sizes, "cache sizes"):
        row: list[Cell] = [blocks * BLOCK_SIZE]
        for cached in (False, True):
            with lab.bundled(
                block_size=BLOCK_SIZE,
                num_blocks=blocks,
                max_model_len=MAX_LEN,
                max_num_seqs=64,
                max_num_batched_tokens=2048,
                enable_prefix_caching=cached,
            ) as bench:
                run = bench.run(requests)
                preempted = bench.core.stats()["preemptions"]
            reference = reference or run.tokens
            same += run.tokens == reference
            recomputed = computed_rows(run.steps) - needed
            again[cached].append((blocks * BLOCK_SIZE, recomputed))
            if not cached:
                u = usage(run.steps, blocks * BLOCK_SIZE, BLOCK_SIZE)
                row += [max(u.running), len(run.steps), preempted, lost_rows(run.steps)]
                counts[f"lost_{blocks}"] = lost_rows(run.steps)
            row.append(recomputed)
            which = "cached" if cached else "plain"
            counts |= {f"preempted_{which}_{blocks}": preempted}
            counts |= {f"recomputed_{which}_{blocks}": recomputed}
        rows.append(row)
    counts |= {"plenty": sizes[0], "least": sizes[-1], "same_answers": same, "runs": 2 * len(sizes)}
    least = again[False][-1][1]
    return Report(
        ["slots", "most sequences", "steps", "preempted", "rows lost", "computed again"]
        + ["computed again, prefix cache"],
        rows,
        f"with plenty of memory {again[False][0][1]:.0f} rows were computed twice, with the least "
        f"{least:.0f}, {least / needed:.0%} on top of what is needed; where freed blocks can be "
        f"found again, {again[True][-1][1]:.0f}. The answers of all {2 * len(sizes)} runs are the "
        + ("same." if same == 2 * len(sizes) else f"same in {same} only."),
        counts,
        [
            Panel("Rows computed again", "slots of the cache", "rows",
                  lines=[("no prefix cache", again[False]), ("prefix cache", again[True])],
                  wide=True)
        ],
    )  # fmt: skip


EXPERIMENTS = [
    Experiment(
        "3.1",
        "Contiguous or paged",
        "How much of the cache holds tokens, if each sequence reserves its longest length?",
        contiguous_or_paged,
    ),
    Experiment(
        "3.2",
        "The block table, step by step",
        "Who holds which block, and when is one shared, copied, taken away?",
        block_table,
        ("cpu",),
    ),
    Experiment(
        "3.3",
        "How large a block",
        "What do small blocks save, and what do they cost?",
        block_size,
        ("cpu",),
    ),
    Experiment(
        "3.4",
        "One text, many questions",
        "What need not be computed, when many prompts begin alike?",
        shared_prompt,
    ),
    Experiment("3.5", "A chat", "What does the next turn of a chat have to compute?", chat),
    Experiment(
        "3.6",
        "When memory is short",
        "What does it cost to give more work to the cache than it holds?",
        short_memory,
    ),
]
