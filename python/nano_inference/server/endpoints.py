"""The two completion endpoints as ASGI applications: read, submit, answer, count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from .answer import Answer
from .errors import CLIENT_GONE, ApiError, refused, timed_out
from .streaming import Exchange

if TYPE_CHECKING:
    from .state import ServerState

Reader = Callable[["ServerState", bytes], Awaitable[Answer]]


async def json_body(request: Request) -> bytes:
    """415 unless it is called JSON: other types a web page may send to any server, those on its
    reader's own machine included, without asking (no CORS preflight)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f"not {kind[:100]!r}" if kind else "and there is none"
        raise ApiError(415, f"the Content-Type must be application/json, {said}")
    for name in request.query_params:
        raise refused(f"the query {name!r} has no effect: give {name} in the body", name)
    return await request.body()


class CompletionEndpoint:
    """What a body asks for, `read` knows."""

    def __init__(self, name: str, read: Reader) -> None:
        self._name, self._read = name, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        state: ServerState = scope["app"].state.server
        try:
            limit = state.args.request_timeout
            body = await asyncio.wait_for(json_body(Request(scope, receive)), limit)
        except asyncio.TimeoutError:
            raise timed_out(limit or 0.0, {"Connection": "close"}) from None
        except ClientDisconnect:
            return
        state.in_flight += 1
        state.metrics.request_started(self._name)
        status, answer = 500, None
        try:
            try:
                answer = await self._read(state, body)
                status = await Exchange(state, answer, receive, send, began).run()
            except ApiError as error:
                status = error.status
                await error.response()(scope, receive, send)
        except OSError:  # nobody is there to take the refusal
            status = CLIENT_GONE
        finally:
            state.in_flight -= 1
            self._count(state, scope, answer, status)

    def _count(self, state: ServerState, scope: Scope, answer: Answer | None, status: int) -> None:
        if answer is None or not answer.submitted:
            state.metrics.request_finished(self._name, status)
            return
        logged = scope.setdefault("state", {})
        logged["prompt_tokens"] = answer.prompt_tokens
        logged["generated_tokens"] = answer.completion_tokens
        state.metrics.request_finished(
            self._name,
            status,
            answer.finish_reasons,
            answer.requests[0].state.metrics,
            answer.prompt_tokens,
            answer.completion_tokens,
            answer.cached_tokens,
        )
