"""What /metrics shows. Names and meanings follow vLLM's, with the prefix nano_inference_.

Engine counters, gauges and steps are read when somebody asks; handlers report only what the engine
cannot know: endpoints, statuses, and the times that a client sees.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from ..outputs import RequestMetrics

PREFIX = "nano_inference_"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_SECONDS = (*_SHORT, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_QUEUE = (0.001, 0.005, 0.01, 0.05, *_LONG[1:])
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_BATCH = tuple(float(2**e) for e in range(11))
_STEP = (0.0001, 0.00025, 0.0005, *_SHORT, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# name -> (buckets, help)
_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "request_queue_time_seconds": (_QUEUE, "From arrival until the first step of a request."),
    "time_to_first_token_seconds": (_SECONDS, "From arrival until the first token."),
    "request_time_per_output_token_seconds": (
        _SECONDS,
        "Mean time between the tokens of a request, the first one left out.",
    ),
    "inter_token_latency_seconds": (
        _SECONDS,
        "Time between tokens as they are sent; k tokens sent together count k times.",
    ),
    "e2e_request_latency_seconds": (_LONG, "From arrival until the last token."),
    "request_prompt_tokens": (_TOKENS, "Prompt tokens of a request."),
    "request_generation_tokens": (_TOKENS, "Tokens generated for a request, all choices."),
    "request_cached_tokens": (_TOKENS, "Prompt tokens of a request found in the prefix cache."),
    "step_duration_seconds": (_STEP, "Time of one step of the engine."),
    "step_batch_size": (_BATCH, "Sequences in one step of the engine."),
    "step_tokens": (_TOKENS, "Tokens computed in one step of the engine."),
}

# name -> (type, labels, help)
_LABELLED: dict[str, tuple[type[CounterMetricFamily | GaugeMetricFamily], list[str], str]] = {
    "requests": (
        CounterMetricFamily,
        ["endpoint", "status"],
        "Requests answered, by endpoint and HTTP status (499: the client went away).",
    ),
    "requests_in_flight": (
        GaugeMetricFamily,
        ["endpoint"],
        "Requests that have not sent their last byte.",
    ),
    "finished_choices": (
        CounterMetricFamily,
        ["endpoint", "finish_reason"],
        "Choices that ended, by endpoint and finish reason.",
    ),
    "http_responses": (
        CounterMetricFamily,
        ["method", "status"],
        "Responses of all routes, refusals included.",
    ),
}

# name -> (key of Engine.stats(), help)
_COUNTERS: dict[str, tuple[str, str]] = {
    "prompt_tokens_cached": ("cached_tokens", "Prompt tokens found in the prefix cache."),
    "prompt_tokens_computed": ("prompt_tokens", "Prompt tokens that were computed."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "prefix_cache_queries": ("prefix_queries", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Tokens found in the prefix cache."),
    "prefix_cache_evictions": ("evictions", "Cached blocks given to other contents."),
    "num_preemptions": ("preemptions", "Sequences put back into the queue for want of blocks."),
    "engine_steps": ("steps", "Steps of the engine."),
    "engine_failed_steps": ("failed_steps", "Steps that failed, and their requests with them."),
}
_GAUGES: dict[str, tuple[str, str]] = {
    "num_requests_running": ("running", "Requests in the running batch."),
    "num_requests_waiting": ("waiting", "Requests in the queue."),
    "num_sequences_running": ("running_seqs", "Sequences (choices) in the running batch."),
    "num_sequences_waiting": ("waiting_seqs", "Sequences (choices) in the queue."),
    "kv_cache_num_blocks": ("blocks_total", "Blocks of the KV cache: used + cached + free."),
    "kv_cache_block_size": ("block_size", "Tokens in a block."),
}
_STATES = ("received", "finished", "aborted", "rejected", "failed")


class Histogram:
    """A histogram for hot paths: one thread observes, a value may count several times."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def family(self, name: str, doc: str) -> HistogramMetricFamily:
        buckets, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        return HistogramMetricFamily(name, doc, buckets=buckets, sum_value=self.total)


class Metrics(Collector):
    """The metrics of one server process. For handlers, all on the event loop's thread:

    - request_started(endpoint) when a request of a completion endpoint begins, and then exactly one
      request_finished(...), whatever becomes of it (HTTP status 499: the client went away);
    - observe_tokens(n, seconds) for each event of n tokens that is sent, with the time since the
      event before (not for the first one: that is the time to the first token);
    - render() for the body and the content type of GET /metrics.

    attach(llm) once the engine is there; observe_steps() now and then, so that the bounded trace
    loses no step unseen (lost ones are counted).
    """

    def __init__(self) -> None:
        self._llm: AsyncLLM | None = None
        self._model = ""
        self._last_step = 0
        self._steps_lost = 0
        self._histograms = {name: Histogram(spec[0]) for name, spec in _HISTOGRAMS.items()}
        self._itl = self._histograms["inter_token_latency_seconds"]
        self._labelled: dict[str, Counter[tuple[str, ...]]] = {
            name: Counter() for name in _LABELLED
        }
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # -- For handlers and middleware ------------------------------------------------------------

    def request_started(self, endpoint: str) -> None:
        self._labelled["requests_in_flight"][endpoint,] += 1

    def request_finished(
        self,
        endpoint: str,
        status: int,
        finish_reasons: Iterable[str] = (),
        metrics: RequestMetrics | None = None,
        prompt_tokens: int = 0,
        generated_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> None:
        """metrics: None if the engine never saw the request."""
        self._labelled["requests_in_flight"][endpoint,] -= 1
        self._labelled["requests"][endpoint, str(status)] += 1
        reasons = list(finish_reasons)
        for reason in reasons:
            self._labelled["finished_choices"][endpoint, reason] += 1
        if metrics is not None:
            self._observe_times(metrics, generated_tokens / max(1, len(reasons)))
            self._histograms["request_prompt_tokens"].observe(prompt_tokens)
            self._histograms["request_generation_tokens"].observe(generated_tokens)
            self._histograms["request_cached_tokens"].observe(cached_tokens)

    def _observe_times(self, m: RequestMetrics, tokens: float) -> None:
        """tokens: of a choice, on average."""
        of = self._histograms
        if m.time_in_queue is not None:
            of["request_queue_time_seconds"].observe(m.time_in_queue)
        if m.first_token_time is not None:
            of["time_to_first_token_seconds"].observe(m.first_token_time - m.arrival_time)
            if m.last_token_time is not None and tokens > 1:
                mean = (m.last_token_time - m.first_token_time) / (tokens - 1)
                of["request_time_per_output_token_seconds"].observe(mean)
        if m.finished_time is not None:
            of["e2e_request_latency_seconds"].observe(m.finished_time - m.arrival_time)

    def observe_tokens(self, n: int, seconds_since_last: float) -> None:
        if n > 0:
            self._itl.observe(seconds_since_last / n, n)

    def http_response(self, method: str, status: int) -> None:
        known = method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        self._labelled["http_responses"][method if known else "other", str(status)] += 1

    def render(self) -> tuple[bytes, str]:
        """(body, content type) of GET /metrics."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # -- The engine -----------------------------------------------------------------------------

    def attach(self, llm: AsyncLLM, model: str = "") -> None:
        self._llm, self._model = llm, model

    def observe_steps(self) -> None:
        """Takes the steps since the last call from the trace."""
        if self._llm is None:
            return
        core = self._llm.engine.core
        if core.config.trace_capacity == 0 or core.stats()["steps"] == self._last_step:
            return
        for record in core.trace(self._last_step + 1):
            self._steps_lost += record["step"] - self._last_step - 1
            self._last_step = record["step"]
            of = self._histograms
            of["step_duration_seconds"].observe(record["end_time"] - record["start_time"])
            of["step_batch_size"].observe(len(record["entries"]))
            of["step_tokens"].observe(record["num_tokens"])

    def describe(self) -> Iterator[Metric]:
        return iter(())  # names are known to be free; nothing needs to be collected for that

    def collect(self) -> Iterator[Metric]:
        self.observe_steps()
        for name, (_, doc) in _HISTOGRAMS.items():
            yield self._histograms[name].family(PREFIX + name, doc)
        for name, (kind, labels, doc) in _LABELLED.items():
            labelled = kind(PREFIX + name, doc, labels=labels)
            for values, count in self._labelled[name].items():
                labelled.add_metric(values, count)
            yield labelled
        yield CounterMetricFamily(
            PREFIX + "steps_unobserved",
            "Steps that had left the trace before the step histograms saw them.",
            self._steps_lost,
        )
        yield self._build_info()
        if self._llm is not None:
            yield from _engine_families({**self._llm.stats, "healthy": self._llm.is_healthy})

    def _build_info(self) -> InfoMetricFamily:
        from .. import __version__

        labels = {"version": __version__, "python": platform.python_version()}
        if self._llm is not None:
            labels |= {"model": self._model, "device": self._llm.engine.core.device_name}
        return InfoMetricFamily(PREFIX + "build", "What runs here.", labels)


def _engine_families(stats: dict[str, Any]) -> Iterator[Metric]:
    """All of one snapshot, so that they balance."""
    for name, (key, doc) in _COUNTERS.items():
        yield CounterMetricFamily(PREFIX + name, doc, stats[key])
    prompt_tokens = stats["prompt_tokens"] + stats["cached_tokens"]
    yield CounterMetricFamily(
        PREFIX + "prompt_tokens", "Prompt tokens processed: computed or cached.", prompt_tokens
    )
    for name, (key, doc) in _GAUGES.items():
        yield GaugeMetricFamily(PREFIX + name, doc, stats[key])
    requests = CounterMetricFamily(
        PREFIX + "engine_requests",
        "Requests of the engine: received = finished + aborted + rejected + failed, and those that "
        "run and wait.",
        labels=("state",),
    )
    for state in _STATES:
        requests.add_metric((state,), stats[state])
    yield requests
    blocks = GaugeMetricFamily(
        PREFIX + "kv_cache_blocks",
        "Blocks of the KV cache; used ones belong to running requests.",
        labels=("state",),
    )
    for state in ("used", "cached", "free"):
        blocks.add_metric((state,), stats[f"blocks_{state}"])
    yield blocks
    yield GaugeMetricFamily(
        PREFIX + "kv_cache_usage_perc",
        "Share of the KV cache's blocks that running requests hold; 1 is all.",
        _ratio(stats["blocks_used"], stats["blocks_total"]),
    )
    yield GaugeMetricFamily(
        PREFIX + "prefix_cache_hit_rate",
        "Share of the tokens looked up in the prefix cache that were found, since the start.",
        _ratio(stats["prefix_hits"], stats["prefix_queries"]),
    )
    yield GaugeMetricFamily(
        PREFIX + "engine_healthy", "0: the engine has stopped.", float(stats["healthy"])
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
