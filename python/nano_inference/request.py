"""A request as Python sees it: the engine's tokens become text, stop strings end choices, and what
came in becomes RequestOutputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .tokenizer import IncrementalDetokenizer, StopChecker

if TYPE_CHECKING:
    from . import _core
    from .sampling_params import SamplingParams
    from .tokenizer import Tokenizer


class Choice:
    """One of a request's n choices. Its output does not depend on how the tokens arrive."""

    def __init__(self, index: int, request: RequestState) -> None:
        params, self._tokenizer = request.params, request.tokenizer
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._detokenizer: IncrementalDetokenizer | None = None
        if self._tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer, request.prompt_token_ids, params.skip_special_tokens
            )
        stops = params.stop_strings
        self._stops = StopChecker(stops, self._include_stop) if stops else None
        self._pieces: list[str] = []  # text not yet joined to output.text
        self._sent_text = self._sent_tokens = 0  # how far take_delta() got

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def push(self, out: _core.Output) -> bool:
        """Takes what a step made. True if a stop string was found: the engine must be told."""
        tokens, reason = out.token_ids, out.finish_reason
        # The token that ended it is no text, unless asked for.
        silent = reason == "stop" and not self._include_stop
        last = len(tokens) - 1
        for i, token in enumerate(tokens):
            self._add_token(token, out.logprobs[i] if out.logprobs else None)
            if self._detokenizer is None or (silent and i == last):
                continue
            if self._add_text(self._detokenizer.push([token])):
                return not reason
        if reason:
            self.finish(reason, out.stop_token if out.stop_token >= 0 else None)
        return False

    def finish(self, reason: str, stop_reason: int | None = None) -> None:
        """Ends it, for another reason than a stop string in the text so far."""
        if self._detokenizer is not None and self._add_text(self._detokenizer.finish()):
            return
        if self._stops is not None:
            self._pieces.append(self._stops.finish())
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason

    def _add_token(self, token: int, logprobs: _core.TokenLogprobs | None) -> None:
        self.output.token_ids.append(token)
        if logprobs is not None and self.output.logprobs is not None:
            self.output.logprobs.append(logprob_dict(logprobs, self._decode))
            self.output.cumulative_logprob = (
                self.output.cumulative_logprob or 0.0
            ) + logprobs.logprob

    def _add_text(self, text: str) -> bool:
        """True if a stop string is complete: that ends the choice."""
        stop = None
        if self._stops is not None:
            # Like stop tokens, stop strings end a choice only after min_tokens tokens.
            may_stop = len(self.output.token_ids) > self._min_tokens
            text, stop = self._stops.push(text, may_stop)
        if text:
            self._pieces.append(text)
        if stop is not None:
            self.output.finish_reason, self.output.stop_reason = "stop", stop
        return stop is not None

    def _decode(self, token: int) -> str | None:
        if self._detokenizer is None or self._tokenizer is None:
            return None
        return self._tokenizer.decode([token], skip_special_tokens=False)

    @property
    def backlog(self) -> int:
        """Characters that take_delta() would give."""
        return len(self.output.text) + sum(map(len, self._pieces)) - self._sent_text

    def _join(self) -> CompletionOutput:
        if self._pieces:
            self.output.text += "".join(self._pieces)
            self._pieces.clear()
        return self.output

    def take(self) -> CompletionOutput:
        """Everything so far, as a copy that later tokens leave alone."""
        o = self._join()
        logprobs = None if o.logprobs is None else o.logprobs.copy()
        return CompletionOutput(
            o.index,
            o.text,
            o.token_ids.copy(),
            o.cumulative_logprob,
            logprobs,
            o.finish_reason,
            o.stop_reason,
        )

    def take_delta(self) -> CompletionOutput:
        """Only what is new since the last take_delta()."""
        o = self._join()
        text, first = o.text[self._sent_text :], self._sent_tokens
        self._sent_text, self._sent_tokens = len(o.text), len(o.token_ids)
        return CompletionOutput(
            o.index,
            text,
            o.token_ids[first:],
            o.cumulative_logprob,
            None if o.logprobs is None else o.logprobs[first:],
            o.finish_reason,
            o.stop_reason,
        )


class RequestState:
    """A request from its submission to its end."""

    def __init__(
        self,
        core_id: int,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.core_id = core_id
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.tokenizer = tokenizer
        self.metrics = RequestMetrics()
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.choices = [Choice(i, self) for i in range(params.n)]
        self.error: str | None = None  # why the engine failed it
        self.changed = False  # something came in since the last take()
        self.finished = False
        self._num_running = params.n
        self._sent_prompt_logprobs = 0

    def push(self, out: _core.Output, end_choice: Callable[[int], None]) -> None:
        """Takes an output of the engine; calls end_choice(index) where a stop string is found."""
        self.changed = True
        self.num_cached_tokens = max(self.num_cached_tokens, out.num_cached)
        if self.prompt_logprobs is not None:
            decode = self.choices[0]._decode
            self.prompt_logprobs += [logprob_dict(t, decode) for t in out.prompt_logprobs]
        if out.finish_reason == "error":
            self.fail(out.error)
            return
        choice = self.choices[out.choice]
        if not choice.finished:
            if choice.push(out):
                end_choice(out.choice)
            self._num_running -= choice.finished
            self.finished = self._num_running == 0
        self._note_times(out)

    def fail(self, error: str) -> None:
        self.changed = self.finished = True
        self.error = error
        self.metrics.finished_time = self.metrics.last_token_time

    def _note_times(self, out: _core.Output) -> None:
        m = self.metrics
        m.arrival_time = out.arrival_time
        m.first_scheduled_time = out.first_scheduled_time or None
        if out.token_ids:
            m.first_token_time = m.first_token_time or out.step_time
            m.last_token_time = out.step_time
        if self.finished:
            m.finished_time = out.step_time

    def take(self, *, delta: bool = False) -> RequestOutput:
        """The request so far; with delta only what is new since the last such call."""
        self.changed = False
        scores = self.prompt_logprobs
        if scores is not None:
            first = self._sent_prompt_logprobs if delta else 0
            self._sent_prompt_logprobs = len(scores)
            scores = scores[first:]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[c.take_delta() if delta else c.take() for c in self.choices],
            finished=self.finished,
            prompt_logprobs=scores,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
        )


def logprob_dict(
    scored: _core.TokenLogprobs, decode: Callable[[int], str | None]
) -> dict[int, Logprob]:
    """The token itself first, then the most likely ones."""
    found = {scored.token_id: Logprob(scored.logprob, scored.rank, decode(scored.token_id))}
    for rank, (token, logprob) in enumerate(
        zip(scored.top_ids, scored.top_logprobs, strict=True), 1
    ):
        if token not in found:
            found[token] = Logprob(logprob, rank, decode(token))
    return found
