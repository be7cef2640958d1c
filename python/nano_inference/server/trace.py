"""The step trace over HTTP: what every step did, as records or live."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..async_llm import AsyncLLM
from .answer import encode, loaded_llm
from .errors import ApiError, json_response, refused
from .state import READY, ServerState
from .streaming import EVENT_HEADERS, disconnect

POLL_SECONDS = 0.05
_BATCH = 64  # records in one send


class TraceList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[dict[str, Any]]


def _traced(state: ServerState) -> AsyncLLM:
    llm = loaded_llm(state)
    if llm.engine.core.config.trace_capacity == 0:
        raise ApiError(404, "the trace is off (trace_capacity is 0)", code="trace_off")
    return llm


def _since_step(request: Request, default: int) -> int:
    for name in request.query_params:
        if name != "since_step":
            raise refused(f"the query {name!r} is not known, only since_step is", name)
    text = request.query_params.get("since_step", str(default))
    if not (text.isascii() and text.isdecimal()) or int(text[:20]) >= 2**63:
        raise refused("since_step must be an integer of at least 0", "since_step")
    return int(text)


async def trace(request: Request) -> Response:
    """The records of the steps from since_step on, as far as the trace still has them."""
    llm = _traced(request.app.state.server)
    since = _since_step(request, 0)
    records = await asyncio.to_thread(llm.engine.core.trace, since)
    return json_response(TraceList(records))


async def trace_stream(request: Request) -> Response:
    """Records as events while steps happen. The trace itself is the buffer: what has left it before
    a slow reader came is counted in an event {"dropped": n}."""
    state: ServerState = request.app.state.server
    llm = _traced(state)
    return _LiveTrace(state, llm, _since_step(request, llm.stats["steps"] + 1))


class _LiveTrace(Response):
    def __init__(self, state: ServerState, llm: AsyncLLM, since: int) -> None:
        self.background = None
        self._state, self._llm, self._next = state, llm, max(1, since)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnect(receive))
        try:
            while True:
                ready = self._state.phase == READY
                ended = await asyncio.wait(
                    {writer, gone}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                if ended[0] or not ready:  # a reader who is stuck must not hold up a drain
                    break
        finally:
            writer.cancel()
            gone.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        events = [b": live trace\n\n"]
        silence = 0.0
        while self._state.phase == READY:
            events += self._new_events()
            if events:
                body = b"".join(events[:_BATCH])
                del events[:_BATCH]
                await send({"type": "http.response.body", "body": body, "more_body": True})
                silence = 0.0
                continue
            await asyncio.sleep(POLL_SECONDS)
            silence += POLL_SECONDS
            interval = self._state.args.keep_alive_interval
            if interval and silence >= interval:
                events.append(b": keep-alive\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _new_events(self) -> list[bytes]:
        if self._llm.stats["steps"] < self._next:
            return []
        events = []
        for record in self._llm.engine.core.trace(self._next):
            if record["step"] > self._next:
                events.append(b'data: {"dropped":%d}\n\n' % (record["step"] - self._next))
            self._next = record["step"] + 1
            events.append(b"data: " + encode(record) + b"\n\n")
        return events
