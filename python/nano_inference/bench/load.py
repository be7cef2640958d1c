"""The load generator: sends prompts to a server in open or closed loop, and records the answers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .http import Client, Disconnected, ProtocolError
from .records import AnswerError, Record, Recorder, error_message
from .workload import CountTokens, Prompt, arrival_times

_PAUSE_AFTER_FAILURE = 0.1  # seconds; a closed loop would spin on a server that refuses
_Send = Callable[..., Coroutine[Any, Any, Record]]

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class LoadOptions:
    model: str
    endpoint: str = "completions"
    request_rate: float = float("inf")
    burstiness: float = 1.0
    concurrency: int | None = None
    """Closed loop with so many streams; None: open loop at request_rate."""
    duration: float | None = None
    """Seconds during which requests start, over the prompts again and again; None: each prompt
    once."""
    timeout: float = 600.0
    ignore_eos: bool = False
    temperature: float | None = None
    seed: int = 0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Of the request; an extra field that is null removes one."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            body["messages"] = messages_of(prompt)
        else:
            body["prompt"] = prompt.text
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.ignore_eos:
            body["ignore_eos"] = True
        body |= self.extra_body
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class Run:
    records: list[Record]
    start: float
    seconds: float
    """From the first request's start to the last answer's end."""
    cpu_seconds: float
    """That the load generator's own process used meanwhile."""


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    return list(prompt.messages or [{"role": "user", "content": prompt.text}])


async def first_model(client: Client, timeout: float) -> str:
    """What /v1/models lists first."""
    found = await _call(client, "GET", "/v1/models", None, timeout)
    try:
        return str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise RuntimeError(f"{client.base_url}/v1/models lists no model; name it") from None


async def token_counter(
    client: Client, options: LoadOptions
) -> tuple[CountTokens | None, str | None]:
    """A counter that asks the server's /tokenize, as vLLM has it; or why there is none."""

    async def count(text: str) -> int:
        body: dict[str, Any] = {"model": options.model}
        if options.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        found = await _call(client, "POST", "/tokenize", body, options.timeout)
        counted = found.get("count") if isinstance(found, dict) else None
        if not isinstance(counted, int):
            raise RuntimeError("its answer has no count")
        return counted

    try:
        await count("a")
    except RuntimeError as error:
        return None, str(error)
    return count, None


async def _call(client: Client, method: str, path: str, body: Any, timeout: float) -> Any:
    """A request with a JSON answer. Every failure is a RuntimeError."""
    pieces: list[bytes] = []
    data = b"" if body is None else json.dumps(body).encode()
    try:
        parser = await client.send(
            client.encode(method, path, data), lambda piece, _: pieces.append(piece), timeout
        )
        if parser.status != 200:
            message = error_message(parser.error_body)
            raise RuntimeError(f"{client.base_url}{path}: HTTP {parser.status} {message}".rstrip())
        return json.loads(b"".join(pieces))
    except (OSError, Disconnected, ProtocolError, asyncio.TimeoutError, ValueError) as error:
        raise RuntimeError(f"{client.base_url}{path}: {_reason(error)[1]}") from None


def _reason(error: BaseException) -> tuple[str, str]:
    """(a few words that failures of one kind share, the whole)."""
    if isinstance(error, asyncio.TimeoutError):
        return "timeout", "the answer took longer than --timeout"
    if isinstance(error, Disconnected):
        return "disconnected", str(error)
    if isinstance(error, AnswerError):
        return "error in the stream", str(error)
    if isinstance(error, ProtocolError):
        return "malformed answer", str(error)
    if isinstance(error, ssl.SSLError):
        return "TLS failed", str(error)
    if isinstance(error, ConnectionRefusedError):
        return "connection refused", str(error)
    if isinstance(error, ConnectionError):
        return "disconnected", str(error)
    if isinstance(error, OSError):
        return "connection failed", str(error)
    return type(error).__name__, str(error)


class LoadGenerator:
    def __init__(
        self,
        client: Client,
        options: LoadOptions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._client, self._options, self._clock = client, options, clock

    async def one(self, request: bytes, planned: float | None = None) -> Record:
        """Sends one request; never raises but for cancellation."""
        record = Record(start=self._clock())
        record.end = record.start
        record.late = 0.0 if planned is None else record.start - planned
        recorder = Recorder(record)
        try:
            parser = await self._client.send(request, recorder, self._options.timeout)
            if parser.status == 200:
                recorder.check_end()
            else:
                record.error = f"HTTP {parser.status}"
                record.message = error_message(parser.error_body)
        except Exception as error:
            record.error, record.message = _reason(error)
        if record.error is not None:
            record.end = self._clock()
        return record

    def encode(self, prompt: Prompt) -> bytes:
        body = json.dumps(self._options.body(prompt)).encode()
        return self._client.encode("POST", PATHS[self._options.endpoint], body)

    async def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """RuntimeError if any fails: measuring would be of no use."""
        for record in await asyncio.gather(*(self.one(self.encode(p)) for p in prompts)):
            if record.error is not None:
                raise RuntimeError(f"a warm-up request failed: {record.error}: {record.message}")

    async def run(
        self, prompts: Sequence[Prompt], on_done: Callable[[Record], None] = lambda _: None
    ) -> Run:
        requests = [self.encode(p) for p in prompts]  # before the clock runs
        records: list[Record] = []

        async def one(request: bytes, planned: float | None = None) -> Record:
            record = await self.one(request, planned)
            records.append(record)
            on_done(record)
            return record

        with _quiet():
            start, cpu = self._clock(), time.process_time()
            if self._options.concurrency is not None:
                await self._closed_loop(requests, start, one)
            else:
                await self._open_loop(requests, start, one)
            cpu = time.process_time() - cpu
        end = max((r.end for r in records), default=start)
        first = min((r.start for r in records), default=start)
        return Run(records, first, max(end - first, 1e-9), cpu)

    def _forever(self, requests: Sequence[bytes], start: float) -> Iterator[bytes]:
        """The requests once, or again and again for the duration."""
        duration = self._options.duration
        if duration is None:
            yield from requests
            return
        while True:
            for request in requests:
                if self._clock() - start >= duration:
                    return
                yield request

    async def _closed_loop(self, requests: Sequence[bytes], start: float, one: _Send) -> None:
        source = self._forever(requests, start)

        async def stream() -> None:
            for request in source:  # shared: each takes the next one
                if not (await one(request)).ok:
                    await asyncio.sleep(_PAUSE_AFTER_FAILURE)

        count = self._options.concurrency or 1
        await asyncio.gather(*(stream() for _ in range(count)))

    async def _open_loop(self, requests: Sequence[bytes], start: float, one: _Send) -> None:
        options = self._options
        count = len(requests)
        if options.duration is not None:  # enough for nearly any luck
            expected = options.request_rate * options.duration
            count = int(expected + 10 * (expected / options.burstiness) ** 0.5) + 10
        tasks = []
        for i, at in enumerate(
            arrival_times(count, options.request_rate, options.burstiness, options.seed)
        ):
            if options.duration is not None and at >= options.duration:
                break
            if (wait := start + at - self._clock()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(requests[i % len(requests)], start + at))
            tasks.append(task)
        await asyncio.gather(*tasks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection, and as many open connections as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
