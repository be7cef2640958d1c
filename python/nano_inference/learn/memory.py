"""What stage 3 counts: where the slots of the KV cache go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .lab import Request, Step


def mixed_requests(count: int, vocab_size: int, longest: int, seed: int = 7) -> list[Request]:
    """Chat-like lengths: most short, a few long, prompt and output unrelated; all come at once."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(3.9, 0.8, (2, count))), 4, longest // 2 - 8).astype(int)
    return [
        Request(rng.integers(6, vocab_size, prompt).tolist(), int(output))
        for prompt, output in lengths.T
    ]


def computed_rows(steps: Sequence[Step]) -> int:
    """Tokens that went through the model."""
    return sum(step["num_tokens"] for step in steps)


def needed_rows(requests: Sequence[Request]) -> int:
    """Tokens that have to, if nothing is reused and nothing done twice: all but the last, whose
    successor nobody asks for."""
    return sum(len(r.prompt) + r.max_tokens - 1 for r in requests)


def lost_rows(steps: Sequence[Step]) -> int:
    """Tokens whose keys and values a preemption threw away."""
    held: dict[tuple[int, int], int] = {}
    lost = 0
    for step in steps:
        lost += sum(held.pop(tuple(key), 0) for key in step["preempted"])
        for entry in step["entries"]:
            held[entry["request_id"], entry["choice"]] = entry["context_len"]
    return lost


# -- Where the slots go ---------------------------------------------------------------------------


@dataclass
class Usage:
    """Slots of the cache after each step."""

    total: int
    live: list[int] = field(default_factory=list)  # hold a token that will be read again
    reserved: list[int] = field(default_factory=list)  # belong to a sequence, live or not
    running: list[int] = field(default_factory=list)  # sequences
    queued: list[bool] = field(default_factory=list)  # somebody waits for room

    @property
    def live_of_reserved(self) -> float:
        return sum(self.live) / max(sum(self.reserved), 1)

    @property
    def live_of_total(self) -> float:
        return sum(self.live) / (self.total * len(self.live))

    @property
    def fit(self) -> float:
        """Sequences in the cache while others wait for room."""
        full = [n for n, queued in zip(self.running, self.queued, strict=True) if queued]
        return sum(full) / len(full) if full else float(max(self.running))


def usage(steps: Sequence[Step], total: int, block_size: int) -> Usage:
    """Read off the step trace. Sequences that a step finished have left it already."""
    result = Usage(total)
    held: dict[tuple[int, int], int] = {}
    for step in steps:
        for key in step["preempted"]:
            held.pop(tuple(key), None)
        for entry in step["entries"]:
            held[entry["request_id"], entry["choice"]] = entry["context_len"]
        for request_id, choice, _ in step["finished"]:
            held.pop((request_id, choice), None)
        result.live.append(sum(held.values()))
        result.reserved.append(step["blocks_used"] * block_size)
        result.running.append(len(held))
        result.queued.append(step["waiting"] > 0)
    return result


def mean_held(requests: Sequence[Request], block_size: int = 1) -> float:
    """Slots that a sequence has reserved, averaged over the steps in which it decodes: whole blocks
    of block_size; with blocks of one token, the tokens themselves."""
    lengths = [len(r.prompt) + k for r in requests for k in range(1, r.max_tokens)]
    return sum(-(-n // block_size) * block_size for n in lengths) / len(lengths)


def live_share(requests: Sequence[Request], block_size: int) -> float:
    """Expected, of the slots that a sequence has reserved. Where sequences are much longer than a
    block, half of the last one is empty: n / (n + (block_size - 1) / 2)."""
    return mean_held(requests) / mean_held(requests, block_size)


# -- Prefixes -------------------------------------------------------------------------------------


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def expected_hits(
    prompts: Sequence[Sequence[int]], known: Sequence[Sequence[int]], size: int
) -> int:
    """Tokens of `prompts`, taken in turn, that whole blocks in the cache will hold: `known[i]` are
    the tokens whose keys and values are there once prompt i has been answered."""
    hits = 0
    for i, prompt in enumerate(prompts):
        longest = max((common_prefix(prompt, other) for other in known[:i]), default=0)
        hits += min(longest, len(prompt) - 1) // size * size
    return hits
