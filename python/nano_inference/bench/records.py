"""What is recorded of one streamed answer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .http import EventParser


class AnswerError(Exception):
    """The server said, inside a stream that began well, that something failed."""


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None

    def output(self) -> Any:
        return self.content or self.reasoning_content or self.reasoning or self.tool_calls


class _Choice(msgspec.Struct):
    text: Any = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    """What matters of an event; msgspec skips the rest without building it, which makes this
    as cheap as searching the bytes would be."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Record:
    """Times are of the clock's seconds; `start` is just before the request is sent."""

    start: float = 0.0
    end: float = 0.0
    """When the last bytes of the answer arrived, or it failed."""
    times: list[float] = field(default_factory=list)
    """When each event that carries output arrived."""
    totals: list[int] = field(default_factory=list)
    """Completion tokens up to each of these events, where all events say it."""
    sizes: list[int] = field(default_factory=list)
    """Characters of each of these events' text."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    late: float = 0.0
    """Seconds that the request was sent after its planned time: the load generator's fault."""
    error: str | None = None
    """Why it failed, in a few words that many failures may share."""
    message: str = ""
    """The same, in the server's own words."""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def output_tokens(self) -> int:
        """As the server counts them; where it does not, each event is one."""
        return len(self.times) if self.completion_tokens is None else self.completion_tokens

    @property
    def event_tokens_known(self) -> bool:
        """All events say how many tokens they bring, or each brings one."""
        return len(self.totals) == len(self.times) or self.output_tokens == len(self.times)

    def event_tokens(self) -> list[int]:
        """Tokens of each event. Where only their sum is known, in proportion to its text, and 1 at
        least."""
        if self.totals and len(self.totals) == len(self.times):
            ends = self.totals
        elif self.output_tokens == len(self.times):
            return [1] * len(self.times)
        else:
            sizes = list(itertools.accumulate(self.sizes))
            share = self.output_tokens / max(1, sizes[-1])
            ends = [round(share * size) for size in sizes]
        return [max(1, b - a) for a, b in zip([0, *ends], ends, strict=False)]


class Recorder:
    """The sink that fills a Record from a stream of events."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.done = False
        self._events = EventParser()

    def __call__(self, piece: bytes, now: float) -> None:
        self.record.end = now
        for data in self._events.feed(piece):
            if data == b"[DONE]":
                self.done = True
            elif data:
                self._take(data, now)

    def _take(self, data: bytes, now: float) -> None:
        try:
            event = _decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            text = data[:200].decode("utf-8", "replace")
            raise AnswerError(f"an event is no JSON of a completion: {text}") from None
        if event.error is not None:
            raise AnswerError(error_message(data))
        record, usage = self.record, event.usage
        if event.choices:
            choice = event.choices[0]
            output = choice.text or (choice.delta and choice.delta.output())
            has_output = bool(output)
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason
                has_output = has_output or not record.times  # tokens without text only
            total = None if usage is None else usage.completion_tokens
            if total is not None and len(record.totals) == len(record.times):  # all have said it
                has_output = has_output or total > (record.totals[-1] if record.totals else 0)
            if has_output:
                record.times.append(now)
                record.sizes.append(len(output) if isinstance(output, str) else 1)
                if total is not None:
                    record.totals.append(total)
        if usage is not None:
            self._take_usage(usage)

    def _take_usage(self, usage: _Usage) -> None:
        record = self.record
        record.prompt_tokens = usage.prompt_tokens
        record.completion_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens

    def check_end(self) -> None:
        """After the last byte: AnswerError if the answer is not whole."""
        record = self.record
        if not self.done and record.finish_reason is None:
            raise AnswerError("the stream ended without [DONE] and without a finish reason")
        if record.finish_reason in ("abort", "error"):
            raise AnswerError(f"finish_reason {record.finish_reason}")
        if not record.times:
            raise AnswerError("the stream had no output")


def error_message(body: bytes) -> str:
    """The message of an error in OpenAI's format, or what there is."""
    text = body[:500].decode("utf-8", "replace").strip()
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return text
    if isinstance(found, dict):
        inner = found.get("error", found)
        if isinstance(inner, dict) and isinstance(inner.get("message"), str):
            return inner["message"]
        if isinstance(inner, str):
            return inner
    return text
