"""What experiments work with: engines, progress, and the machine's own rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

from .. import _core
from ..bundled import DEFAULT, bundled_model
from ..config import load_model
from ..engine_args import EngineArgs, default_graph_sizes, plan_cache, plan_engine
from ..loader import load_weights
from ..random_model import LLAMA_3_2_1B, model_config, random_engine
from ..tokenizer import Tokenizer
from .work import Work

T = TypeVar("T")

MEDIUM: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_layers": 8,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
CARD_TINY = TINY | {"head_dim": 64}  # cards have kernels for few head sizes
TRACE = 100_000  # steps
Step = dict[str, Any]
"""A record of Engine.trace(); cpp/engine/trace.h says what is in it."""


@dataclass(frozen=True)
class Request:
    """What Bench.run() runs: greedily, to exactly max_tokens tokens."""

    prompt: Sequence[int]
    max_tokens: int
    arrival_step: int = 0
    """It is submitted before this step, counted from 0."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of _core.SamplingParams, if greedy is not what is wanted."""


@dataclass
class Run:
    """What came of some requests."""

    tokens: list[list[int]]
    """Of each request."""
    steps: list[Step]
    seconds: float
    scored: list[list[tuple[int, float]]] = field(default_factory=list)
    """Tokens with their log-probabilities, of requests that ask for them (logprobs)."""


def _renumbered(record: Step, first: int) -> Step:
    """request_id becomes the request's place in the list."""
    for entry in record["entries"]:
        entry["request_id"] -= first
    for kind in ("admitted", "resumed", "preempted", "finished"):
        record[kind] = [(i - first, *rest) for i, *rest in record[kind]]
    return record


@dataclass
class Bench:
    """An engine that is stepped by hand, in the caller's thread: nothing happens between two steps
    that the experiment did not ask for, so all but the times is the same on every machine."""

    core: _core.Engine
    model: _core.ModelConfig
    tokenizer: Tokenizer | None = None
    _next_id: int = 0

    @property
    def work(self) -> Work:
        """What a step of it takes."""
        return Work.of(self.core, self.model)

    def run(self, requests: Sequence[Request]) -> Run:
        """Steps until all have ended."""
        seen = self.core.stats()["steps"]
        first, step = self._next_id, 0
        self._next_id += len(requests)
        tokens: list[list[int]] = [[] for _ in requests]
        scored: list[list[tuple[int, float]]] = [[] for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrival_step)
        began = time.perf_counter()
        while True:
            while waiting and requests[waiting[0]].arrival_step <= step:
                i = waiting.pop(0)
                r = requests[i]
                fields = {"temperature": 0.0, "max_tokens": r.max_tokens, "ignore_eos": True}
                params = _core.SamplingParams(**{**fields, **r.sampling})
                self.core.submit(first + i, r.prompt, params)
            worked = self.core.step()
            for output in self.core.wait_outputs(0.0):
                tokens[output.request_id - first] += output.token_ids
                scored[output.request_id - first] += [
                    (one.token_id, one.logprob) for one in output.logprobs
                ]
                if output.finish_reason not in ("", "length"):
                    raise RuntimeError(f"request {output.request_id}: {output.error}")
            if not worked and not waiting:
                break
            step += 1
        seconds = time.perf_counter() - began
        steps = self.core.trace(seen + 1)
        return Run(tokens, [_renumbered(record, first) for record in steps], seconds, scored)

    def encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None, "random weights come without a tokenizer"
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None, "random weights come without a tokenizer"
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, length: int, key: int = 0) -> list[int]:
        """Random tokens; another key, other tokens."""
        import numpy as np

        rng = np.random.default_rng(key)
        return [int(t) for t in rng.integers(0, self.model.vocab_size, length)]


@dataclass
class Lab:
    device: str = "cpu"
    small: bool = False
    """Smallest sizes that still show the effect: for tests."""
    say: Callable[[str], None] = lambda text: None
    """Shows the expectation, as soon as it is known."""
    show_progress: bool = False
    expectation: str = field(default="", init=False)

    def expect(self, text: str) -> None:
        """States, before running, what should come out."""
        if self.expectation:
            raise RuntimeError("an experiment states its expectation once")
        self.expectation = text
        self.say(text)

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    def size(self, full: T, small: T, card: T | None = None) -> T:
        """`full`, or `small` in a test, or `card` on a card, which needs more to be busy."""
        if self.small:
            return small
        return card if self.on_card and card is not None else full

    def progress(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items, with a bar on stderr."""
        from tqdm.auto import tqdm

        items = list(items)
        yield from tqdm(items, desc=what, leave=False, disable=not self.show_progress)

    @property
    def machine(self) -> dict[str, float]:
        """read_bytes_per_second, flops_per_second of the device; measured once, in a second."""
        if self.on_card:
            from .card import measured_card

            return measured_card()
        return _measured_machine()

    @cached_property
    def model(self) -> _core.ModelConfig:
        """A shape for engine(): 142 million weights, more than a CPU's cache holds; on a card, 1.2
        billion; tiny in tests."""
        tiny = CARD_TINY if self.on_card else TINY
        return model_config(**self.size(MEDIUM, tiny, LLAMA_3_2_1B))

    @contextmanager
    def bundled(self, **options: Any) -> Iterator[Bench]:
        """The bundled model, stepped by hand; the options are EngineArgs'."""
        path = bundled_model(DEFAULT)
        assert path is not None
        defaults = {"device": self.device, "trace_capacity": TRACE}
        if (
            self.on_card
        ):  # a step is over before the next one begins, so that the trace has its time
            defaults["async_scheduling"] = False
        args = EngineArgs(model=str(path), **{**defaults, **options})
        loaded = load_model(
            path, dtype=args.dtype, max_model_len=args.max_model_len, device=args.target.kind
        )
        config, _ = plan_engine(args, loaded)
        core = _core.Engine(config, loaded.model_config)
        load_weights(core, path, loaded, progress=False)
        core.finish_loading()
        yield from _closing(Bench(core, loaded.model_config, Tokenizer.from_dir(path)))

    @contextmanager
    def engine(self, model: _core.ModelConfig, **config: Any) -> Iterator[Bench]:
        """Random bf16 weights in a given shape (random_model.model_config makes one); `config` are
        fields of EngineConfig. Without num_blocks the cache holds what max_num_seqs sequences of
        max_model_len tokens need."""
        fields: dict[str, Any] = {
            "max_num_seqs": 32,
            "max_model_len": 1024,
            "block_size": 16,
            "paged": True,
        }
        fields["max_waiting"] = 0
        fields |= {"device": self.device, "trace_capacity": TRACE, "enable_prefix_caching": False}
        fields |= config
        if self.on_card:
            graphs = default_graph_sizes(fields["max_num_seqs"])
            fields = {"graph_sizes": graphs, "plan_cache": plan_cache(), **fields}
        if "num_blocks" not in fields:
            block = fields["block_size"] if fields["paged"] else fields["max_model_len"]
            fields["num_blocks"] = fields["max_num_seqs"] * -(-fields["max_model_len"] // block)
        yield from _closing(Bench(random_engine(model, **fields), model))


@cache
def _measured_machine() -> dict[str, float]:
    return _core.measure_machine()


def _closing(bench: Bench) -> Iterator[Bench]:
    try:
        yield bench
    finally:
        bench.core.shutdown()


def choose_device(name: str) -> str:
    """auto is the CPU, which everybody has. ValueError, saying why, for one that cannot be used
    here."""
    return "cpu" if name == "auto" else EngineArgs(device=name).device
