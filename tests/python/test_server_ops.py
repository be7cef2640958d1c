"""What stands around the routes: request ids, keys, CORS, size limit, failures, logs, health."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from nano_inference import AsyncLLM, SamplingParams
from nano_inference.server import middleware
from nano_inference.server.app import create_app
from nano_inference.server.args import ServeArgs
from nano_inference.server.logs import REQUEST_ID, JsonFormatter, TextFormatter
from nano_inference.server.metrics import Metrics
from nano_inference.server.middleware import build_middleware
from nano_inference.server.run import ServerProcess, bind_socket, example_request, server_url
from nano_inference.server.state import DRAINING, FAILED, LOADING, READY, ServerState


@dataclass
class Answered:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    unread: list[bytes] = field(default_factory=list)

    @property
    def error(self) -> dict[str, Any]:
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


async def call(
    app: Any,
    path: str = "/echo",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    chunks: Iterable[bytes] = (b"",),
) -> Answered:
    """One request, as an ASGI server would hand it on."""
    waiting = list(chunks)
    answered = Answered(unread=waiting)

    async def receive() -> dict[str, Any]:
        if not waiting:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            for key, value in message["headers"]:
                assert key == key.lower() and key.decode() not in answered.headers
                answered.headers[key.decode()] = value.decode()
        else:
            answered.body += message.get("body", b"")

    raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    scope |= {"query_string": b"secret=1", "scheme": "http", "server": ("x", 80), "root_path": ""}
    await app({**scope, "state": {}}, receive, send)
    return answered


def request(app: Any, *args: Any, **options: Any) -> Answered:
    return asyncio.run(call(app, *args, **options))


async def echo(request: Request) -> Response:
    body = await request.body()
    if body == b"fail":
        raise KeyError("a bug")
    request.scope["state"]["prompt_tokens"] = len(body)
    return PlainTextResponse(body, headers={"X-Seen": request.state.request_id})


async def half(request: Request) -> Response:
    async def parts() -> Any:
        yield b"one"
        raise KeyError("a bug in the middle")

    return StreamingResponse(parts())


def app_with(metrics: Metrics | None = None, **args: Any) -> Starlette:
    stack = build_middleware(ServeArgs(**args), metrics or Metrics())
    routes = [
        Route("/echo", echo, methods=["GET", "POST"]),
        Route("/half", half, methods=["POST"]),
        Route("/health", echo, methods=["GET"]),
    ]
    return Starlette(routes=routes, middleware=stack)


# -- Request ids ----------------------------------------------------------------------------------


def test_request_ids_are_taken_if_sane() -> None:
    app = app_with()
    answered = request(app, headers={"X-Request-Id": "abc-1.2:3"})
    assert answered.headers["x-request-id"] == answered.headers["x-seen"] == "abc-1.2:3"
    made = set()
    for wrong in ("", "a b", "é", "x" * 129, 'a"b', "a\tb"):
        answered = request(app, headers={"X-Request-Id": wrong})
        assert answered.headers["x-request-id"] == answered.headers["x-seen"] != wrong
        made.add(answered.headers["x-seen"])
    assert len(made) == 6 and all(len(name) == 32 for name in made)


def test_logs_carry_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(TextFormatter().format(record))

    handler, logger = Handler(), logging.getLogger("nano_inference")
    logger.addHandler(handler)
    try:
        with caplog.at_level("INFO"):
            request(app_with(), headers={"X-Request-Id": "r1"}, chunks=[b"fail"])
    finally:
        logger.removeHandler(handler)
    assert len(seen) == 2 and all(" [r1] " in line for line in seen)
    assert "KeyError: 'a bug'" in seen[0] and "POST /echo 500" in seen[1]
    assert REQUEST_ID.get() == ""


# -- API keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer first", 200),
        ("bearer first", 200),
        ("Bearer second", 200),
        ("Bearer third", 401),
        ("Bearer first,second", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Basic first", 401),
        ("first", 401),
        ("Bearer firsté", 401),
    ],
)
def test_api_keys(header: str | None, status: int, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("second\n")
    app = app_with(api_key=["first"], api_key_file=str(file))
    headers = {} if header is None else {"Authorization": header}
    answered = request(app, headers=headers)
    assert answered.status == status
    if status == 401:
        assert answered.headers["www-authenticate"] == "Bearer"
        assert answered.headers["x-request-id"]
        assert answered.error["code"] == "invalid_api_key"
        assert answered.error["type"] == "authentication_error"
        assert "first" not in answered.error["message"]


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_with(api_key=["a", "bb", "ccc"])
    compared: list[tuple[bytes, bytes]] = []
    real = middleware.hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return real(left, right)

    monkeypatch.setattr(middleware.hmac, "compare_digest", compare)
    for key in ("a", "ccc", "no"):
        compared.clear()
        request(app, headers={"Authorization": f"Bearer {key}"})
        assert len(compared) == 3
        assert {len(side) for pair in compared for side in pair} == {32}


def all_routes() -> list[tuple[str, str]]:
    app = create_app(ServerState(ServeArgs(), Metrics()))
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes) >= 10
    return [(route.path, m) for route in routes for m in sorted(route.methods or ())]


def test_one_key_guards_every_route_but_health() -> None:
    args = ServeArgs(api_key=["k"])
    state = ServerState(args, Metrics())
    app = create_app(state, build_middleware(args, state.metrics))
    routes = all_routes()
    assert ("/health", "GET") in routes and ("/metrics", "GET") in routes
    for path, method in [*routes, ("/no-such-route", "GET"), ("/health/", "GET")]:
        answered = request(app, path.replace("{model:path}", "m"), method)
        if path == "/health":
            assert answered.status == 503  # loading
        else:
            assert answered.status == 401, path
            assert answered.error["code"] == "invalid_api_key"
        allowed = request(app, path, method, headers={"Authorization": "Bearer k"})
        assert allowed.status != 401


def test_without_keys_nothing_is_guarded() -> None:
    args = ServeArgs()
    state = ServerState(args, Metrics())
    app = create_app(state, build_middleware(args, state.metrics))
    assert request(app, "/version", "GET").status == 200


# -- CORS -----------------------------------------------------------------------------------------

ORIGIN = {"Origin": "https://page.example"}
PREFLIGHT = {
    **ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_preflight_needs_no_key() -> None:
    app = app_with(api_key=["k"], allowed_origins=["https://page.example"])
    answered = request(app, method="OPTIONS", headers=PREFLIGHT)
    assert answered.status == 200
    assert answered.headers["access-control-allow-origin"] == "https://page.example"
    assert "POST" in answered.headers["access-control-allow-methods"]
    assert "authorization" in answered.headers["access-control-allow-headers"]
    other = {**PREFLIGHT, "Origin": "https://other.example"}
    answered = request(app, method="OPTIONS", headers=other)
    assert answered.status == 400
    assert "access-control-allow-origin" not in answered.headers


@pytest.mark.parametrize(
    ("headers", "chunks", "status"),
    [
        ({"Authorization": "Bearer k"}, [b"hi"], 200),
        ({}, [b"hi"], 401),
        ({"Authorization": "Bearer k"}, [b"x" * 101], 413),
        ({"Authorization": "Bearer k"}, [b"fail"], 500),
    ],
)
def test_every_answer_carries_cors_headers(
    headers: dict[str, str], chunks: list[bytes], status: int
) -> None:
    app = app_with(api_key=["k"], allowed_origins=["*"], max_request_bytes=100)
    answered = request(app, headers={**ORIGIN, **headers}, chunks=chunks)
    assert answered.status == status
    assert answered.headers["access-control-allow-origin"] == "*"
    assert "X-Request-Id" in answered.headers["access-control-expose-headers"]
    assert answered.headers["x-request-id"]


def test_cors_is_off_by_default() -> None:
    assert "access-control-allow-origin" not in request(app_with(), headers=ORIGIN).headers
    assert request(app_with(), method="OPTIONS", headers=PREFLIGHT).status == 405


# -- Size limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "chunks", "status"),
    [
        ("100", [b"x" * 100], 200),
        ("101", [b"x" * 101], 413),
        (None, [b"x" * 50, b"x" * 50], 200),
        (None, [b"x" * 50, b"x" * 50, b"x"], 413),
        ("10", [b"x" * 101], 413),
        ("9" * 40, [b"x"], 413),
    ],
)
def test_size_limit(length: str | None, chunks: list[bytes], status: int) -> None:
    headers = {} if length is None else {"Content-Length": length}
    answered = request(app_with(max_request_bytes=100), headers=headers, chunks=chunks)
    assert answered.status == status
    if status == 413:
        assert answered.headers["connection"] == "close"
        assert "100 bytes" in answered.error["message"]
        assert answered.error["code"] == "request_too_large"


def test_an_endless_body_is_read_for_a_while_only() -> None:
    read = 0

    def endless() -> Iterable[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b"x" * 100

    class Chunks(list[bytes]):
        """Never empty."""

        def __init__(self) -> None:
            self._source = iter(endless())

        def __bool__(self) -> bool:
            return True

        def pop(self, _: Any = -1) -> bytes:
            return next(self._source)

    async def go() -> Answered:
        chunks, answered = Chunks(), Answered()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": chunks.pop(), "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            answered.status = message.get("status", answered.status)

        chunked = [(b"transfer-encoding", b"chunked")]
        scope = {"type": "http", "method": "POST", "path": "/echo", "headers": chunked, "state": {}}
        await app_with(max_request_bytes=1000)({**scope, "root_path": ""}, receive, send)
        return answered

    assert asyncio.run(go()).status == 413
    assert 10 < read < 60


@pytest.mark.parametrize("expects", [False, True])
@pytest.mark.parametrize(("path", "keys", "status"), [("/none", [], 404), ("/echo", ["k"], 401)])
def test_an_early_answer_waits_for_the_body(
    path: str, keys: list[str], status: int, expects: bool
) -> None:
    """Or the client would see a reset; but not if the client waits for us."""
    headers = {"Content-Length": "5", **({"Expect": "100-continue"} if expects else {})}
    answered = request(app_with(api_key=keys), path=path, headers=headers, chunks=[b"x"] * 5)
    assert answered.status == status
    assert len(answered.unread) == (5 if expects else 0)


# -- Failures -------------------------------------------------------------------------------------


def test_a_failing_handler_is_a_500_and_a_log(caplog: pytest.LogCaptureFixture) -> None:
    answered = request(app_with(), chunks=[b"fail"])
    assert answered.status == 500
    assert answered.error["code"] == "internal_error" and "a bug" not in answered.error["message"]
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.exc_info is not None and "POST /echo failed" in record.getMessage()


def test_a_stream_that_fails_is_cut_off() -> None:
    answered = Answered()

    async def go() -> None:
        async def send(message: dict[str, Any]) -> None:
            answered.status = message.get("status", answered.status)
            answered.body += message.get("body", b"")

        async def receive() -> dict[str, Any]:
            return await asyncio.Event().wait()  # type: ignore[return-value]

        scope = {"type": "http", "method": "POST", "path": "/half", "headers": [], "state": {}}
        await app_with()({**scope, "root_path": ""}, receive, send)

    with pytest.raises(Exception) as caught:  # the HTTP server then closes the connection
        asyncio.run(go())
    assert "a bug in the middle" in repr(getattr(caught.value, "exceptions", [caught.value]))
    assert (answered.status, answered.body) == (200, b"one")


# -- Access log -----------------------------------------------------------------------------------


def access_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "nano_inference.access"]


def test_access_log(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with caplog.at_level("INFO"):
        request(app_with(metrics), headers={"X-Request-Id": "r7"}, chunks=[b"the prompt"])
        request(app_with(metrics), "/no\nsuch", "GET")
    first, second = access_lines(caplog)
    REQUEST_ID.set("r7")
    entry = json.loads(JsonFormatter().format(first))
    assert entry.pop("time").endswith("Z") and 0 <= entry.pop("duration") < 60
    assert entry.pop("message").startswith("POST /echo 200 0.")
    assert entry == {
        "level": "info",
        "logger": "nano_inference.access",
        "request_id": "r7",
        "method": "POST",
        "path": "/echo",
        "status": 200,
        "prompt_tokens": 10,
    }
    text = TextFormatter().format(first)
    assert "INFO    [r7] POST /echo 200" in text and "prompt_tokens=10" in text
    assert "\n" not in TextFormatter().format(second)
    assert "secret" not in caplog.text and "the prompt" not in caplog.text
    assert b'http_responses_total{method="GET",status="404"} 1.0' in metrics.render()[0]
    REQUEST_ID.set("")


def test_bodies_are_logged_if_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        request(app_with(log_prompts=True), chunks=[b"the ", b"prompt\n"])
    (line,) = access_lines(caplog)
    assert json.loads(JsonFormatter().format(line))["body"] == "the prompt\n"
    assert r"body='the prompt\n'" in TextFormatter().format(line)


def test_the_access_log_can_be_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        request(app_with(access_log=False))
    assert not access_lines(caplog)


def test_clients_that_go_away_are_499(caplog: pytest.LogCaptureFixture) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    metrics = Metrics()
    with caplog.at_level("INFO"):
        request(middleware.RequestContext(silent, metrics))
    assert " 499 " in access_lines(caplog)[0].getMessage()


# -- Root path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/llm", ""])
def test_root_path(prefix: str) -> None:
    """A proxy may have taken the prefix off, or not."""
    app = app_with(root_path="/llm", api_key=["k"])
    key = {"Authorization": "Bearer k"}
    assert request(app, f"{prefix}/echo", headers=key).status == 200
    assert request(app, f"{prefix}/echo").status == 401
    assert request(app, f"{prefix}/health", "GET").status == 200
    assert request(app, "/llm/llm/health", "GET").status == 401
    assert request(app, "/llmhealth", "GET").status == 401


# -- Health ---------------------------------------------------------------------------------------


def health_with(phase: str = READY, timeout: float = 5.0, **stats: Any) -> str | None:
    idle = {"healthy": True, "running": 0, "waiting": 0, "last_step_time": 0.0, "busy_since": 0.0}
    args = ServeArgs(health_timeout=timeout)
    stats = {**idle, **stats}
    llm = SimpleNamespace(stats=stats, is_healthy=stats["healthy"])
    state = ServerState(args, Metrics(), llm, phase)  # type: ignore[arg-type]
    return state.unhealthy_because()


def test_health_follows_phase_and_engine() -> None:
    now = time.monotonic()
    assert health_with() is None
    assert health_with(LOADING) == "the server is loading"
    assert health_with(DRAINING) == "the server is draining"
    assert health_with(FAILED) == "the server is failed"
    assert health_with(healthy=False) == "the engine has stopped"
    assert health_with(running=1, last_step_time=now - 1) is None
    assert health_with(waiting=1, last_step_time=now - 100, busy_since=now - 1) is None
    for pending in ("running", "waiting"):
        why = health_with(**{pending: 1}, last_step_time=now - 9, busy_since=now - 100)
        assert why is not None and "no step has finished for 9" in why
    assert health_with(last_step_time=now - 1000) is None  # idle for long is fine


def test_health_sees_a_stuck_step(model_dir: Path) -> None:
    """A step of 1000 prompt tokens through the slow reference kernels is stuck for as long as it
    takes; the engine is none the worse afterwards."""
    options = {"isa": "reference", "num_threads": 1, "max_num_batched_tokens": 2048}
    llm = AsyncLLM(str(model_dir), use_tqdm_on_load=False, **options)
    state = ServerState(ServeArgs(health_timeout=0.02), Metrics(), llm, READY)

    async def go() -> list[str | None]:
        seen = [state.unhealthy_because()]
        stream = llm.generate([5] * 1000, SamplingParams(max_tokens=1))
        while llm.stats["steps"] == 0:
            seen.append(state.unhealthy_because())
            await asyncio.sleep(0.005)
        async for _ in stream:
            pass
        seen.append(state.unhealthy_because())
        return seen

    first, *between, last = asyncio.run(go())
    llm.shutdown()
    assert first is None and last is None
    assert between[0] is None and between[-1] is not None
    assert "work is pending and no step has finished for 0." in between[-1]


# -- Socket and first words -----------------------------------------------------------------------


def test_sockets_and_urls(tmp_path: Path) -> None:
    with bind_socket(ServeArgs(port=0)) as sock:
        host, port = sock.getsockname()
        assert host == "127.0.0.1" and port > 0
        assert server_url(ServeArgs(root_path="/llm"), sock) == f"http://127.0.0.1:{port}/llm"
        with pytest.raises(OSError, match=f"127.0.0.1, port {port}: Address already in use"):
            bind_socket(ServeArgs(port=port))
    with bind_socket(ServeArgs(host="0.0.0.0", port=0)) as sock:
        assert server_url(ServeArgs(), sock).startswith("http://127.0.0.1:")


def test_a_host_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match=r"at nohost, port 8000: Name or service not known"):
        bind_socket(ServeArgs(host="nohost"))


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    args = ServeArgs(uds=str(path))
    first = bind_socket(args)
    with pytest.raises(OSError, match="Address already in use"):
        bind_socket(args)
    first.close()
    with bind_socket(args) as again:  # the file of the one before was in the way
        assert again.family == socket.AF_UNIX
    path.unlink()
    path.write_text("precious")
    with pytest.raises(OSError, match="it exists and is no socket"):
        bind_socket(args)
    assert path.read_text() == "precious"


def test_the_drain_is_no_requests_own(caplog: pytest.LogCaptureFixture) -> None:
    """A signal that interrupts a request is not logged under the request's id."""
    caplog.set_level(logging.INFO)
    ids: list[str] = []

    class Seen(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            ids.append(REQUEST_ID.get())
            return True

    async def go() -> None:
        process._loop = asyncio.get_running_loop()
        REQUEST_ID.set("interrupted")
        process._on_signal(signal.SIGTERM, None)
        await asyncio.sleep(0)

    with bind_socket(ServeArgs(port=0)) as sock:
        process = ServerProcess(ServeArgs(port=0), sock, 0.0)
        seen = Seen()
        caplog.handler.addFilter(seen)
        asyncio.run(go())
        caplog.handler.removeFilter(seen)
    assert "SIGTERM while loading" in caplog.text
    assert ids and "interrupted" not in ids


def test_the_example_request() -> None:
    url = "http://127.0.0.1:8000"
    text = example_request(ServeArgs(), url, "it's", chat=True)
    assert text.startswith(f"curl {url}/v1/chat/completions -H 'Content-Type")
    assert json.loads(shlex.split(text)[-1])["model"] == "it's" and '"messages"' in text
    args = ServeArgs(api_key=["k123"], ssl_certfile=__file__, uds="/run/a socket")
    text = example_request(args, "https://localhost", "m", chat=False)
    assert "https://localhost/v1/completions" in text and '"prompt"' in text
    assert shlex.split(text)[1:5] == [
        "https://localhost/v1/completions", "--unix-socket", "/run/a socket", "--cacert"
    ]  # fmt: skip
    assert f"--cacert {__file__}" in text
    assert '"Authorization: Bearer $API_KEY"' in text and "k123" not in text
