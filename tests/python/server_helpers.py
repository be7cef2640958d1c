"""A real server (uvicorn, with the middleware) on a thread, and a client of few lines."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from nano_inference import AsyncLLM
from nano_inference.server.app import create_app
from nano_inference.server.args import ServeArgs
from nano_inference.server.metrics import Metrics
from nano_inference.server.middleware import build_middleware
from nano_inference.server.state import READY, ServerState

# A template with all that requests can say to one.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m.name %}{{ m.name }}: "
    "{% endif %}{{ m['content'] }}{% endfor %}{% if reasoning_effort %}({{ reasoning_effort }})"
    "{% endif %}{% if verbosity %}[{{ verbosity }}]{% endif %}{% if add_generation_prompt %}"
    "<|assistant|>{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Of a refusal, whose form is checked."""
        assert self.status >= 400 and list(self.json) == ["error"], self
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Of a stream that ended well."""
        assert self.status == 200, self
        assert self.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(e.removeprefix("data: ")) for e in events if not e.startswith(":")]


@dataclass
class Server:
    state: ServerState
    port: int

    @property
    def llm(self) -> AsyncLLM:
        assert self.state.llm is not None
        return self.state.llm

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """body: bytes as they are, all else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if body is not None:
            headers = {"Content-Type": "application/json", **headers}
        try:
            connection.request(method, path, raw, headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Reply:
        return self.call("POST", path, body)

    def complete(self, **body: Any) -> Reply:
        return self.post("/v1/completions", body)

    def chat(self, content: Any = "hi", **body: Any) -> Reply:
        body.setdefault("messages", [{"role": "user", "content": content}])
        return self.post("/v1/chat/completions", body)

    def raw(self, path: str, body: Any, receive_buffer: int = 0, unsent: int = 0) -> socket.socket:
        """A connection that has sent a request, but for the last bytes, and read nothing."""
        data = json.dumps(body).encode()
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(60)
        client.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        client.sendall(
            f"{head}Content-Type: application/json\r\n\r\n".encode() + data[: len(data) - unsent]
        )
        return client

    def wait_for(self, what: Any) -> dict[str, Any]:
        """The engine's counters, once what(counters)."""
        deadline = time.monotonic() + 30
        while not what(stats := self.llm.stats):
            assert time.monotonic() < deadline, stats
            time.sleep(0.002)
        return stats

    def wait_idle(self) -> dict[str, Any]:
        """Every block is then free or cached, every request accounted for."""
        stats = self.wait_for(lambda s: s["running"] + s["waiting"] == 0)
        assert stats["blocks_free"] + stats["blocks_cached"] == stats["blocks_total"]
        ends = ("finished", "aborted", "rejected", "failed")
        assert stats["received"] == sum(stats[name] for name in ends)
        deadline = time.monotonic() + 30
        while self.state.in_flight or self.llm.engine.requests:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert not self.llm._streams and not self.llm._by_name
        return stats


@contextmanager
def serve(model: Path, **options: Any) -> Iterator[Server]:
    args = ServeArgs(
        **{
            "model": str(model),
            "served_model_name": ["tiny", "tiny-alias"],
            "check_invariants": True,
            "access_log": False,
            "num_blocks": 25_000,  # at 16 tokens: two contexts of 200 000
            **options,
        }
    )
    state = ServerState(args, Metrics())
    state.llm = AsyncLLM.from_engine_args(args.engine_args())
    state.metrics.attach(state.llm)
    state.phase = READY
    app = create_app(state, build_middleware(args, state.metrics))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # slow readers show soon
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.001)
        yield Server(state, listener.getsockname()[1])
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(30)
        state.llm.shutdown()
        listener.close()
