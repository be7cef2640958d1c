"""What is asked, and when: prompts of known length, and arrival times."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_INPUT_LEN = 128
DEFAULT_OUTPUT_LEN = 128
_PROBES = 24  # most attempts to hit a prompt's length

CountTokens = Callable[[str], Awaitable[int]]
"""Tokens of a prompt with this text, with all that the server puts around it."""

# Common words; most tokenizers have each, with a space before it, as one token.
_TEXT = (
    "able about above across add after again air all also always and animal answer any ask "
    "away back bad base bed before begin best better between big bird black blue boat body "
    "book both box boy bring brown build but buy call came car carry cat center change "
    "children city class clear close cold color come common cook could country course cover "
    "cross cry cut dark day deep did different direct do dog done door down draw dry during "
    "each early earth east eat end enough even ever every eye face fact fall family far farm "
    "fast father feel feet few field figure fill final find fine fire first fish five "
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Prompt:
    text: str
    output_len: int
    input_len: int | None = None
    """In tokens, where it was chosen and not found in a file."""
    messages: tuple[dict[str, Any], ...] | None = None
    """The conversation, if a file has one; `text` is its last message then."""


@dataclass(frozen=True)
class Dataset:
    prompts: list[Prompt]
    about: str
    """What they are and how their lengths were made, for the report."""


@dataclass(frozen=True)
class DatasetOptions:
    num_prompts: int
    dataset: Path | None = None
    input_len: int = DEFAULT_INPUT_LEN
    output_len: int | None = None
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"--range-ratio must be from 0 to below 1, got {self.range_ratio}")
        if self.dataset is not None and (self.range_ratio or self.prefix_len):
            raise ValueError("--range-ratio and --prefix-len belong to random prompts, not a file")


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start. The gaps are gamma distributed with mean 1/rate and shape
    `burstiness`: 1 is a Poisson process, less comes in bursts, more is more even."""
    if rate == float("inf"):
        return [0.0] * count
    rng = np.random.default_rng([seed, 1])
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), count)
    return np.cumsum(gaps).tolist()


# -- Random prompts -------------------------------------------------------------------------------


async def random_prompts(options: DatasetOptions, count_tokens: CountTokens | None) -> Dataset:
    """Prompts of random words. Without a way to count tokens, a word counts as one."""
    rng = np.random.default_rng([options.seed, 0])
    inputs = _lengths(rng, options.input_len, options.range_ratio, options.num_prompts)
    outputs = _lengths(
        rng, options.output_len or DEFAULT_OUTPUT_LEN, options.range_ratio, options.num_prompts
    )
    prefix = ""
    if options.prefix_len:
        prefix, _ = await _text_of(rng, "", options.prefix_len, count_tokens)
        prefix += " "
    prompts, exact = [], 0
    for input_len, output_len in zip(inputs, outputs, strict=True):
        total = options.prefix_len + input_len
        # Without a count, the prefix has its words already.
        want = total if count_tokens is not None else input_len
        text, found = await _text_of(rng, prefix, want, count_tokens)
        exact += found == want
        prompts.append(Prompt(prefix + text, output_len, total))
    about = "random, "
    about += f"{options.prefix_len} shared + " if options.prefix_len else ""
    about += f"{options.input_len} -> {options.output_len or DEFAULT_OUTPUT_LEN} tokens"
    about += f" ± {options.range_ratio:.0%}" if options.range_ratio else ""
    if count_tokens is None:
        return Dataset(prompts, about + "; a word counted as a token")
    return Dataset(prompts, about + f"; lengths by the tokenizer, {exact} of {len(prompts)} exact")


def _lengths(rng: np.random.Generator, mean: int, ratio: float, count: int) -> list[int]:
    """Uniform in mean * (1 ± ratio), at least 1."""
    low, high = max(1, round(mean * (1 - ratio))), max(1, round(mean * (1 + ratio)))
    return rng.integers(low, high, count, endpoint=True).tolist()


async def _text_of(
    rng: np.random.Generator, prefix: str, want: int, count_tokens: CountTokens | None
) -> tuple[str, int]:
    """Random words that make, after `prefix`, `want` tokens; and how many they make."""
    # A word is a token at least (the 8: characters to cut where a word is less than that).
    text = " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), want + 8))
    if count_tokens is None:
        return " ".join(text.split(" ", want)[:want]), want
    return await cut_to_length(text, want, lambda cut: count_tokens(prefix + cut))


async def cut_to_length(text: str, want: int, count_tokens: CountTokens) -> tuple[str, int]:
    """The beginning of `text` that has `want` tokens, or as near as it gets, and its count.

    False position between ends that are known to give too few and too many: as the count grows
    nearly evenly, a few probes do."""
    low, low_count = 0, 0
    high, high_count = len(text), await count_tokens(text)
    best = (high, high_count)
    for _ in range(_PROBES):
        if best[1] == want or high - low <= 1:
            break
        share = (want - low_count) / max(1, high_count - low_count)
        end = min(max(low + round(share * (high - low)), low + 1), high - 1)
        count = await count_tokens(text[:end])
        if abs(count - want) <= abs(best[1] - want):
            best = (end, count)
        if count < want:
            low, low_count = end, count
        else:
            high, high_count = end, count
    return text[: best[0]], best[1]


# -- Prompts from a file --------------------------------------------------------------------------


async def file_prompts(options: DatasetOptions, count_tokens: CountTokens | None) -> Dataset:
    """The file's prompts in order, from the beginning again if they are too few."""
    assert options.dataset is not None
    entries = _read_entries(options.dataset)
    prompts = []
    for i in range(min(len(entries), options.num_prompts)):
        prompts.append(await _prompt_of(entries[i], options, count_tokens))
    if not prompts:
        raise ValueError(f"{options.dataset} holds no prompt")
    about = f"of {options.dataset.name}, which has {len(entries)}"
    return Dataset([prompts[i % len(prompts)] for i in range(options.num_prompts)], about)


@dataclass(frozen=True)
class _Entry:
    where: str
    value: Any


def _read_entries(path: Path) -> list[_Entry]:
    """JSON (a list) or JSONL (one a line)."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if text.startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        return [_Entry(f"{path}, entry {i}", v) for i, v in enumerate(values)]
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entries.append(_Entry(f"{path}, line {number}", json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
    return entries


async def _prompt_of(
    entry: _Entry, options: DatasetOptions, count_tokens: CountTokens | None
) -> Prompt:
    """From a string, {"prompt": ...}, {"messages": [...]} or ShareGPT's {"conversations": [...]}.
    The length of the answer: --output-len, the entry's own, or that of ShareGPT's answer."""
    value = {"prompt": entry.value} if isinstance(entry.value, str) else entry.value
    if not isinstance(value, dict):
        raise ValueError(f"{entry.where}: a prompt is a string or an object, not {value!r:.60}")
    output_len = options.output_len or value.get("output_len") or value.get("max_tokens")
    messages: tuple[dict[str, Any], ...] | None = None
    try:
        if "conversations" in value:
            turns = value["conversations"]
            text = turns[0]["value"]
            if output_len is None and len(turns) > 1:
                answer = turns[1]["value"]
                output_len = len(answer.split())
                if count_tokens is not None:
                    output_len = await count_tokens(answer)
        elif "messages" in value:
            messages = tuple(value["messages"])
            text = messages[-1]["content"]
        else:
            text = value["prompt"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(
            f"{entry.where}: no 'prompt', 'messages' or 'conversations' as expected"
        ) from None
    output_len = DEFAULT_OUTPUT_LEN if output_len is None else output_len
    if not isinstance(text, str) or not text:
        raise ValueError(f"{entry.where}: the prompt must be a text, got {text!r:.60}")
    if not isinstance(output_len, int) or isinstance(output_len, bool):
        raise ValueError(f"{entry.where}: output_len must be an integer, got {output_len!r:.60}")
    return Prompt(text, max(1, output_len), None, messages)


async def make_dataset(options: DatasetOptions, count_tokens: CountTokens | None) -> Dataset:
    make = random_prompts if options.dataset is None else file_prompts
    return await make(options, count_tokens)
