"""What every request passes before a route sees it, as plain ASGI: request ids and the access log,
CORS, API keys, the size limit, and an answer when a handler fails.

In scope["state"] handlers find request_id, and may leave prompt_tokens and generated_tokens for the
access log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from .errors import CLIENT_GONE, ApiError
from .logs import REQUEST_ID

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .args import ServeArgs
    from .metrics import Metrics

logger = logging.getLogger("nano_inference.server")
access_logger = logging.getLogger("nano_inference.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_LINGER_SECONDS = 2.0


def build_middleware(args: ServeArgs, metrics: Metrics) -> list[Middleware]:
    """Outermost first."""
    stack = [
        Middleware(
            RequestContext,
            metrics=metrics,
            root_path=args.root_path,
            access_log=args.access_log,
            log_bodies=args.log_prompts,
        )
    ]
    stack.append(Middleware(ReadToTheEnd, max_bytes=4 * args.max_request_bytes))
    if args.allowed_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=args.allowed_origins,
                allow_methods=args.allowed_methods,
                allow_headers=args.allowed_headers,
                allow_credentials=args.allow_credentials,
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    if keys := args.api_keys:
        stack.append(Middleware(ApiKeys, keys=keys))
    stack.append(Middleware(SizeLimit, max_bytes=args.max_request_bytes))
    stack.append(Middleware(AnswerFailures))
    return stack


class RequestContext:
    """Gives the request its id, its place below root_path, and its line in the access log."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        root_path: str = "",
        access_log: bool = True,
        log_bodies: bool = False,
    ) -> None:
        self._app, self._metrics, self._root_path = app, metrics, root_path
        self._access_log, self._log_bodies = access_log, log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        # A proxy may have taken the prefix off the path, or not: routes match either way.
        scope["root_path"] = self._root_path
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = CLIENT_GONE
        bodies: list[bytes] = []

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            return send(message)

        async def receive_and_keep() -> Message:
            message = await receive()
            bodies.append(message.get("body", b""))
            return message

        token = REQUEST_ID.set(request_id)
        try:
            await self._app(scope, receive_and_keep if self._log_bodies else receive, send_with_id)
        finally:
            self._metrics.http_response(scope["method"], status)
            if self._access_log:
                seconds = time.monotonic() - began
                _log_access(scope, state, status, seconds, bodies if self._log_bodies else None)
            REQUEST_ID.reset(token)


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return ""


def _log_access(
    scope: Scope, state: dict[str, Any], status: int, seconds: float, bodies: list[bytes] | None
) -> None:
    """Never the query, which may hold anything; the body only if it was asked for."""
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration": round(seconds, 6),
    }
    for name in ("prompt_tokens", "generated_tokens"):
        if name in state:
            fields[name] = state[name]
    if bodies is not None:
        fields["body"] = b"".join(bodies).decode(errors="replace")
    more = "".join(f" {k}={fields[k]!r}" for k in list(fields)[4:])
    access_logger.info(
        "%s %s %d %.3fs%s",
        scope["method"],
        _printable(scope["path"]),
        status,
        seconds,
        more,
        extra={"fields": fields},
    )


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


class ApiKeys:
    """Asks for one of the keys on every route but /health. All keys are compared, each in constant
    time, so that nothing can be learnt from how long a refusal takes."""

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _route_path(scope) == "/health" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        text = "give an API key, as 'Authorization: Bearer KEY'"
        if _header(scope, b"authorization"):
            text = "the API key is not valid; it is given as 'Authorization: Bearer KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        refusal = ApiError(401, text, code="invalid_api_key", headers=headers)
        await refusal.response()(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _route_path(scope: Scope) -> str:
    """The path below root_path, as routes match it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


class ReadToTheEnd:
    """An answer that is known before the body has arrived waits for the rest of it, which is thrown
    away: who closes a connection with bytes that nobody has read makes the client see a reset and
    not the answer. For a while, and so many bytes, only."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (_header(scope, b"content-length") or _header(scope, b"transfer-encoding")):
            await self._app(scope, receive, send)
            return
        # A client that expects a "100 Continue" sends nothing before somebody reads.
        sending, over = not _header(scope, b"expect"), False

        async def receive_seen() -> Message:
            nonlocal sending, over
            message = await receive()
            sending, over = True, not message.get("more_body")
            return message

        async def discard() -> None:
            left = self._max_bytes
            while left > 0 and not over:
                left -= len((await receive_seen()).get("body", b""))

        async def send_after(message: Message) -> None:
            if message["type"] == "http.response.start" and sending and not over:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(discard(), _LINGER_SECONDS)
            await send(message)

        await self._app(scope, receive_seen, send_after)


class SizeLimit:
    """413 for bodies of more than max_bytes, announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _header(scope, b"content-length")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await self._answer(scope, receive, send)
            return
        size, started = 0, False

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise _TooLarge
            return message

        def send_seen(message: Message) -> Awaitable[None]:
            nonlocal started
            started = True
            return send(message)

        try:
            await self._app(scope, receive_counted, send_seen)
        except _TooLarge:
            if started:
                raise
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the request is larger than {self._max_bytes} bytes (--max-request-bytes)"
        headers = {"Connection": "close"}
        refusal = ApiError(413, text, code="request_too_large", headers=headers)
        await refusal.response()(scope, receive, send)


class _TooLarge(Exception):
    pass


class AnswerFailures:
    """A handler that fails gets logged and the client a 500; here, inside of CORS and request
    context, and not in Starlette's outermost layer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        def send_seen(message: Message) -> Awaitable[None]:
            nonlocal started
            started = True
            return send(message)

        try:
            await self._app(scope, receive, send_seen)
        except _TooLarge:
            raise
        except Exception:
            if scope["type"] != "http" or started:
                raise
            logger.exception("%s %s failed", scope["method"], _printable(scope["path"]))
            text = "the server failed; its log knows more under this request's id"
            await ApiError(500, text, code="internal_error").response()(scope, receive, send)
