"""`bench throughput` and `bench latency`: the engine without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import stats
from .workload import CountTokens, Dataset, DatasetOptions, Prompt, make_dataset

if TYPE_CHECKING:
    from ..llm import LLM


def counter(llm: LLM) -> CountTokens:
    tokenizer = llm.get_tokenizer()

    async def count(text: str) -> int:
        return len(tokenizer.encode(text, True))

    return count


def dataset(llm: LLM, options: DatasetOptions) -> Dataset:
    return asyncio.run(make_dataset(options, counter(llm)))


def throughput(
    llm: LLM,
    prompts: Sequence[Prompt],
    warm_up: Sequence[Prompt],
    temperature: float,
    ignore_eos: bool,
) -> dict[str, Any]:
    """All prompts through one call of generate()."""
    from ..sampling_params import SamplingParams

    def params(some: Sequence[Prompt]) -> list[SamplingParams]:
        return [
            SamplingParams(max_tokens=p.output_len, temperature=temperature, ignore_eos=ignore_eos)
            for p in some
        ]

    def inputs(some: Sequence[Prompt]) -> list[Any]:
        return [_input(llm, p) for p in some]

    if warm_up:
        llm.generate(inputs(warm_up), params(warm_up), use_tqdm=False)
    texts, sampling = inputs(prompts), params(prompts)
    before = llm.stats["steps"]
    start = time.perf_counter()
    outputs = llm.generate(texts, sampling)
    seconds = time.perf_counter() - start
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    output = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return {
        "seconds": seconds,
        "requests": len(outputs),
        "steps": llm.stats["steps"] - before,
        "prompt_tokens": prompt,
        "cached_tokens": sum(o.num_cached_tokens for o in outputs),
        "output_tokens": output,
        "request_throughput": len(outputs) / seconds,
        "prompt_throughput": prompt / seconds,
        "output_throughput": output / seconds,
        "total_throughput": (prompt + output) / seconds,
    }


def _input(llm: LLM, prompt: Prompt) -> Any:
    """A conversation is rendered; its template has written the special tokens."""
    if prompt.messages is None:
        return prompt.text
    rendered = llm.engine.render_chat(list(prompt.messages))
    if isinstance(rendered, str):
        return {"prompt_token_ids": llm.get_tokenizer().encode(rendered, False)}
    return rendered


def latency(
    llm: LLM,
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    iterations: int,
    warm_up: int,
    seed: int,
    on_iteration: Any = lambda: None,
) -> dict[str, Any]:
    """The time of one batch from submission to its last token, again and again. Each iteration has
    other random tokens, so that no cache shortens a prompt."""
    from ..sampling_params import SamplingParams

    rng = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    vocab_size = llm.engine.loaded.model_config.vocab_size
    seconds = []
    for i in range(warm_up + iterations):
        ids = rng.integers(0, vocab_size, (batch_size, input_len)).tolist()
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
        on_iteration()
    return {
        "latency_ms": stats.spread([1e3 * s for s in seconds]),
        "ms_per_output_token": stats.spread([1e3 * s / output_len for s in seconds]),
        "output_throughput": batch_size * output_len / float(np.mean(seconds)),
        "iterations_ms": [round(1e3 * s, 3) for s in seconds],
    }
