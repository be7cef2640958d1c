"""Answers on their way out: one writer and one supervisor per HTTP request, streamed or not.

The writer waits for the engine and sends. The supervisor watches for the client's disconnect, for
the time limit, for readers who are too slow and for long silences. Whatever ends an answer early
aborts its engine requests, and their blocks are free after the step in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
from starlette.types import Message, Receive, Send

from .._core import QueueFullError
from .answer import Answer
from .errors import CLIENT_GONE, ApiError, queue_full, timed_out, unavailable

if TYPE_CHECKING:
    from ..async_llm import RequestStream
    from .state import ServerState

logger = logging.getLogger("nano_inference.server")

SEND_SECONDS = 30.0  # how long one send may wait for a reader
_PIECE = 1 << 16  # bytes of a whole answer in one send: the reader need only take so much in time
_TICK = 1.0  # the supervisor looks at least so often
_LAST_SECONDS = 1.0  # for a last word to a reader who may be stuck

_JSON = [(b"content-type", b"application/json")]
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class Sender:
    """Sends a response and knows how that goes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0  # once started
        self.finished = False
        self.last_sent = time.monotonic()
        self.waiting_since: float | None = None  # a send is under way

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._pass({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, more: bool) -> None:
        self.finished = not more
        await self._pass({"type": "http.response.body", "body": data, "more_body": more})

    async def _pass(self, message: Message) -> None:
        self.waiting_since = time.monotonic()
        await self._send(message)
        self.last_sent, self.waiting_since = time.monotonic(), None


class Exchange:
    """One answer being computed and sent."""

    def __init__(
        self, state: ServerState, answer: Answer, receive: Receive, send: Send, began: float
    ) -> None:
        self._state, self._answer, self._receive = state, answer, receive
        self._args = state.args
        self._sender = Sender(send)
        self._wake = asyncio.Event()
        self._streams: list[RequestStream] = []
        limit = state.args.request_timeout
        self._deadline = None if limit is None else began + limit

    async def run(self) -> int:
        """Returns the status that was sent; CLIENT_GONE if nobody was there to take it."""
        self._submit()
        write = self._write_events() if self._answer.streams else self._write_whole()
        writer = asyncio.create_task(write)
        gone = asyncio.create_task(disconnect(self._receive))
        try:
            error = await self._supervise(writer, gone)
        finally:
            for stream in self._streams:
                stream.close()
            writer.cancel()
            gone.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)
        if error is not None:
            await self._send_error(error)
        return self._sender.status if self._sender.finished else CLIENT_GONE

    def _submit(self) -> None:
        try:
            self._streams = self._answer.llm.submit_all(
                self._answer.requests,
                delta=self._answer.streams,
                final_only=not self._answer.streams,
                wake=self._wake,
            )
            self._answer.submitted = True
        except QueueFullError as error:
            raise queue_full(str(error)) from None
        except RuntimeError as error:  # the engine takes nothing any more
            raise unavailable(str(error)) from None

    # -- The supervisor -------------------------------------------------------------------------

    async def _supervise(
        self, writer: asyncio.Task[None], gone: asyncio.Task[None]
    ) -> ApiError | None:
        """Until the answer is sent, or must not go on. Returns what to tell the client then."""
        while True:
            await asyncio.wait(
                {writer, gone},
                timeout=self._seconds_to_look(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            now = time.monotonic()
            if writer.done():
                return self._outcome(writer)
            if gone.done():
                self._log_drop("the client has disconnected", logging.INFO)
                return None
            if self._deadline is not None and now >= self._deadline:
                return timed_out(self._args.request_timeout or 0.0)
            if (why := self._too_slow(now)) is not None:
                self._log_drop(why, logging.WARNING)
                return None
            if self._is_silent(now):
                self._wake.set()

    def _seconds_to_look(self) -> float:
        seconds = _TICK
        if self._args.keep_alive_interval:
            seconds = min(seconds, self._args.keep_alive_interval / 2)
        if self._deadline is not None:
            seconds = min(seconds, self._deadline - time.monotonic())
        return max(seconds, 0.001)

    def _outcome(self, writer: asyncio.Task[None]) -> ApiError | None:
        error = writer.exception()
        if error is None or isinstance(error, ApiError):
            return error
        if isinstance(error, OSError):  # the server says so where the connection is gone
            self._log_drop(f"the client has disconnected ({error})", logging.INFO)
            return None
        if not isinstance(error, RuntimeError):
            logger.error("request %s failed", self._answer.id, exc_info=error)
            return ApiError(500, "internal error", code="internal_error")
        logger.error("request %s failed: %s", self._answer.id, error)
        return ApiError(500, str(error), code="engine_error")

    def _too_slow(self, now: float) -> str | None:
        since = self._sender.waiting_since
        if since is None:
            return None
        if now - since > SEND_SECONDS:
            return f"the client has read nothing for {now - since:.0f} s"
        unsent = sum(stream.backlog for stream in self._streams) if self._answer.streams else 0
        if unsent > self._args.stream_buffer_bytes:
            return f"the client reads too slowly: {unsent} characters wait for it"
        return None

    def _is_silent(self, now: float) -> bool:
        interval = self._args.keep_alive_interval
        return bool(
            interval
            and self._answer.streams
            and self._sender.waiting_since is None
            and now - self._sender.last_sent >= interval
        )

    def _log_drop(self, why: str, level: int) -> None:
        logger.log(level, "request %s dropped: %s", self._answer.id, why)

    async def _send_error(self, error: ApiError) -> None:
        """As the response, if nothing was sent yet; in a stream as its last event."""
        body = msgspec.json.encode(error.body)
        if self._sender.waiting_since is not None:
            self._log_drop(error.message, logging.WARNING)  # the reader is stuck
            return
        with suppress(OSError, asyncio.TimeoutError):
            if self._sender.status == 0:
                headers = {**(error.headers or {}), "content-length": str(len(body))}
                more = [(k.encode(), v.encode()) for k, v in headers.items()]
                await self._sender.start(error.status, _JSON + more)
                await asyncio.wait_for(self._sender.body(body, False), _LAST_SECONDS)
            elif not self._sender.finished:
                event = b"data: " + body + b"\n\n"
                await asyncio.wait_for(self._sender.body(event, False), _LAST_SECONDS)
                self._sender.status = error.status  # what metrics should know

    # -- The writers ----------------------------------------------------------------------------

    async def _write_whole(self) -> None:
        while not all(stream.finished for stream in self._streams):
            await self._wake.wait()
            self._wake.clear()
        outputs = [output for stream in self._streams if (output := stream.poll()) is not None]
        self._check_aborted()
        body = self._answer.whole(outputs)
        length = (b"content-length", str(len(body)).encode())
        await self._sender.start(200, [*_JSON, length])
        for start in range(0, len(body), _PIECE):
            end = start + _PIECE
            await self._sender.body(body[start:end], end < len(body))

    async def _write_events(self) -> None:
        answer, sender, metrics = self._answer, self._sender, self._state.metrics
        running = list(enumerate(self._streams))
        last: dict[int, float] = {}  # when each request's last tokens came
        while running:
            await self._wake.wait()
            self._wake.clear()
            events: list[bytes] = []
            over = False
            for i, stream in running:
                if (output := stream.poll()) is None:
                    continue
                over = over or output.finished
                events += answer.events(i, output)
                if tokens := sum(len(choice.token_ids) for choice in output.outputs):
                    now = time.monotonic()
                    if i in last:
                        metrics.observe_tokens(tokens, now - last[i])
                    last[i] = now
            if over:
                running = [(i, stream) for i, stream in running if not stream.finished]
                self._check_aborted()
            if not running:
                events += answer.last_events()
            elif not events:
                if not self._is_silent(time.monotonic()):
                    continue
                events.append(b": keep-alive\n\n")
            if not sender.status:
                await sender.start(200, EVENT_HEADERS)
            await sender.body(b"".join(events), bool(running))

    def _check_aborted(self) -> None:
        """Nobody but the engine's end aborts what is still being written."""
        for request in self._answer.requests:
            if any(choice.output.finish_reason == "abort" for choice in request.state.choices):
                raise unavailable("the server is shutting down")


async def disconnect(receive: Receive) -> None:
    """Returns once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
