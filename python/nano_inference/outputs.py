"""What a request returns; names and meanings are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token under the model (before temperature and penalties)."""

    logprob: float
    rank: int | None = None
    """1: the most likely token of the vocabulary."""
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request."""

    index: int
    text: str
    token_ids: list[int]
    """Ends with the token that stopped it (end-of-sequence, stop token, or the token that completed
    the stop string)."""
    cumulative_logprob: float | None = None
    """Sum over the chosen tokens; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token: token id -> Logprob, of the chosen token (first) and the most likely ones."""
    finish_reason: str | None = None
    """None while it runs; then "stop" (end-of-sequence, stop token, stop string), "length" or
    "abort"."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of time.monotonic()."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request and its choices, so far."""

    request_id: str
    prompt: str | None
    """None if the request came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry for each prompt token; the first is None, because nothing predicts it."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
