"""`nano-inference serve` as a process: start, refusals, loading, TLS, logs, drain, signals."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

JSON = {"Content-Type": "application/json"}
ENDLESS = {"max_tokens": 190_000, "ignore_eos": True, "stream": True, "prompt": "abc"}


class Server:
    """A server process; its log is read as it comes."""

    def __init__(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "nano_inference"),
    ) -> None:
        command = [sys.executable, *program, "serve", "--port", "0", *args]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits for a line of the log."""
        end = time.monotonic() + 60
        with self._changed:
            while (found := re.search(pattern, self.log)) is None:
                assert self._changed.wait(end - time.monotonic()), f"no {pattern!r} in {self.log}"
        return found

    @property
    def port(self) -> int:
        return int(self.wait_for(r"listening at https?://[^ ]*?:(\d+)").group(1))

    def connect(self, **options: Any) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(
        self,
        path: str,
        body: Any = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect()
        data = None if body is None else json.dumps(body)
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, data, {**JSON, **(headers or {})})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, answer

    def start_stream(self, **changes: Any) -> http.client.HTTPResponse:
        """A completion that has sent its first tokens."""
        response_of = self.connect()
        body = json.dumps({**ENDLESS, **changes})
        response_of.request("POST", "/v1/completions", body, JSON)
        response = response_of.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return response

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def exit_code(self) -> int:
        code = self.process.wait(timeout=60)
        self._reader.join(10)
        return code


@contextmanager
def serving(*args: str, **options: Any) -> Iterator[Server]:
    server = Server(*args, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.exit_code()


@pytest.fixture(scope="module")
def model(endless_model_dir: Path) -> list[str]:
    return ["--model", str(endless_model_dir), "--served-model-name", "m", "--num-blocks", "13000"]


def refused_start(*args: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nano_inference", "serve", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.returncode, done.stderr


# -- Refusals at the start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["--port", "99999"], {}, ["port must be", "--port"]),
        (["--prot", "1"], {}, ["--prot"]),
        ([], {"NANO_INFERENCE_PORT": "x"}, ["port must be an integer", "NANO_INFERENCE_PORT"]),
        ([], {"NANO_INFERENCE_BLOCK_SIZE": "0"}, ["block_size", "NANO_INFERENCE_BLOCK_SIZE"]),
    ],
)
def test_bad_options(args: list[str], env: dict[str, str], words: list[str]) -> None:
    code, log = refused_start(*args, env=env)
    assert code == 2
    (line,) = log.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_bad_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("prot = 1\n")
    code, log = refused_start("--config", str(file))
    assert code == 2 and len(log.splitlines()) == 1
    assert f"the file {file} does not know 'prot'; did you mean 'port'?" in log


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, log = refused_start("--port", str(port), "--model", "/nonexistent")
    # The model is not looked at before the port is there.
    assert code == 1
    assert log == f"error: cannot listen at 127.0.0.1, port {port}: Address already in use\n"


def test_missing_model() -> None:
    code, log = refused_start("--port", "0", "--model", "/nonexistent")
    assert code == 1
    (line,) = [line for line in log.splitlines() if " ERROR " in line]
    assert "the model cannot be loaded" in line and "/nonexistent" in line


def test_keys_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("no certificate\n")
    code, log = refused_start("--port", "0", "--ssl-certfile", str(file))
    assert code == 2
    assert log.splitlines()[-1].startswith("error: ssl_certfile, ssl_keyfile and ssl_ca_certs must")


# -- Start ----------------------------------------------------------------------------------------


def test_start_and_stop(model: list[str]) -> None:
    with serving(*model) as server:
        port = server.port
        found = server.wait_for(r"try:\n(curl .*)\n").group(1)
        for phase in ("imports", "config and tokenizer", "weights", "cache and warm-up"):
            assert re.search(rf"INFO    {phase}: \d+\.\d\d s\n", server.log)
        assert "model m, 208000 tokens of KV cache" in server.log
        if shutil.which("curl"):  # ready to paste
            done = subprocess.run(["sh", "-c", found], capture_output=True, timeout=60)
            assert json.loads(done.stdout)["object"] == "chat.completion"
        else:
            assert f"http://127.0.0.1:{port}/v1/chat/completions" in found
        assert server.call("/health")[0] == 200
        status, _, body = server.call("/metrics")
        assert status == 200 and b"nano_inference_kv_cache_num_blocks 13000" in body
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert server.call("/health", headers=upgrade)[0] == 200
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "stopped" in server.lines[-1] and "Traceback" not in server.log
        assert "WebSocket" not in server.log  # uvicorn would advise to install it


def test_health_while_loading(endless_model_dir: Path, tmp_path: Path) -> None:
    """The config is a pipe that nobody writes to: loading does not end."""
    for file in endless_model_dir.iterdir():
        if file.name != "config.json":
            shutil.copy(file, tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with serving("--model", str(tmp_path), "--log-level", "debug") as server:
        server.wait_for("imports")
        port = _listening_port(server.process.pid)
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 503
            assert "loading" in json.loads(response.read())["error"]["message"]
        connection.request("POST", "/v1/completions", json.dumps(ENDLESS), JSON)
        response = connection.getresponse()
        assert response.status == 503 and response.getheader("Retry-After")
        response.read()
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "SIGTERM while loading: stopping" in server.log


def _listening_port(pid: int) -> int:
    """Of a process that has not said it yet."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # loading goes on: a file it read may be closed by now
            if (found := re.match(r"socket:\[(\d+)\]", os.readlink(fd))) is not None:
                sockets.add(found.group(1))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[9] in sockets:
            return int(words[1].rpartition(":")[2], 16)
    raise AssertionError("it does not listen")


def test_unix_socket(model: list[str], tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with serving(*model, "--uds", str(path)) as server:
        server.wait_for(f"listening at {path}")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
        server.signal(signal.SIGINT)
        assert server.exit_code() == 0
    assert not path.exists()


# -- Security -------------------------------------------------------------------------------------


def test_keys_root_path_and_cors(model: list[str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n")
    options = ["--api-key-file", str(file), "--root-path", "/llm", "--max-request-bytes", "10000"]
    env = {
        "NANO_INFERENCE_API_KEY": "from-env,other",
        "NANO_INFERENCE_ALLOWED_ORIGINS": "https://page.example",
    }
    with serving(*model, *options, env=env) as server:
        assert server.wait_for(r"curl http://127.0.0.1:\d+/llm/v1/")
        assert "from-env" not in server.log and "from-file" not in server.log
        origin = {"Origin": "https://page.example"}
        for prefix in ("", "/llm"):
            assert server.call(f"{prefix}/health")[0] == 200
            assert server.call(f"{prefix}/v1/models", headers=origin)[0] == 401
            for key in ("from-env", "other", "from-file"):
                headers = {"Authorization": f"Bearer {key}"}
                assert server.call(f"{prefix}/v1/models", headers=headers)[0] == 200
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        status, answered, _ = server.call("/v1/completions", None, "OPTIONS", preflight)
        assert status == 200
        assert answered["access-control-allow-origin"] == "https://page.example"
        body = {"prompt": "x" * 30_000}
        status, answered, text = server.call("/v1/completions", body, headers={**headers, **origin})
        assert status == 413 and json.loads(text)["error"]["code"] == "request_too_large"
        assert answered["access-control-allow-origin"] == "https://page.example"


def test_tls(model: list[str], tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    with serving(*model, "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)) as server:
        assert server.wait_for(r"curl https://127.0.0.1:\d+/")
        trust = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=trust)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection("127.0.0.1", server.port, timeout=60).request("GET", "/")


# -- Logs -----------------------------------------------------------------------------------------


def test_json_logs_without_prompts(model: list[str]) -> None:
    secret = "my secret words"
    with serving(*model, "--log-format", "json", "--log-level", "debug") as server:
        body = {"prompt": secret, "max_tokens": 3, "ignore_eos": True}
        chat = {"messages": [{"role": "user", "content": secret}], "max_tokens": 3, "bogus": secret}
        ids = {"X-Request-Id": "id-1"}
        status, headers, _ = server.call("/v1/completions", body, headers=ids)
        assert (status, headers["x-request-id"]) == (200, "id-1")
        assert server.call("/v1/chat/completions", chat)[0] == 400
        assert server.call("/v1/completions?q=secret", method="POST")[0] == 400
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "secret" not in server.log
        entries = [json.loads(line) for line in server.lines]
    lines = [e for e in entries if e["logger"] == "nano_inference.access"]
    assert [e["status"] for e in lines] == [200, 400, 400]
    first = lines[0]
    assert first["request_id"] == "id-1" and first["path"] == "/v1/completions"
    assert first["prompt_tokens"] == 16 and first["generated_tokens"] == 3
    assert first["duration"] > 0
    assert all({"time", "level", "message"} <= set(e) for e in entries)


def test_prompts_are_logged_if_asked_for(model: list[str]) -> None:
    with serving(*model, "--log-prompts") as server:
        assert server.call("/v1/completions", {"prompt": "spoken of", "max_tokens": 1})[0] == 200
        server.wait_for("POST /v1/completions 200 .*spoken of")


# -- Drain ----------------------------------------------------------------------------------------


def last_event(response: http.client.HTTPResponse) -> tuple[dict[str, Any], bytes]:
    """(the last chunk, what ends the stream)"""
    events = [e for e in response.read().split(b"\n\n") if e.startswith(b"data: ")]
    return json.loads(events[-2].removeprefix(b"data: ")), events[-1]


def test_sigterm_drains(model: list[str]) -> None:
    with serving(*model, "--drain-timeout", "60") as server:
        response = server.start_stream(max_tokens=6000)
        server.signal(signal.SIGTERM)
        server.wait_for("draining, 1 request")
        # New connections are answered, not refused, as long as the drain lasts.
        status, _, body = server.call("/health")
        assert status == 503 and "draining" in json.loads(body)["error"]["message"]
        status, headers, _ = server.call("/v1/completions", {"prompt": "x"})
        assert status == 503 and int(headers["retry-after"]) >= 1
        chunk, end = last_event(response)
        assert chunk["choices"][0]["finish_reason"] == "length" and end == b"data: [DONE]"
        assert server.exit_code() == 0


def test_the_drain_is_limited(model: list[str]) -> None:
    with serving(*model, "--drain-timeout", "0.3") as server:
        response = server.start_stream()
        began = time.monotonic()
        server.signal(signal.SIGINT)
        rest = response.read()
        assert server.exit_code() == 0 and time.monotonic() - began < 20
        assert "aborting 1 request" in server.log
        assert b'"code":"unavailable"' in rest.splitlines()[-2]  # told, not just cut off
        assert "Traceback" not in server.log


def test_a_second_signal_ends_at_once(model: list[str]) -> None:
    with serving(*model, "--drain-timeout", "1000") as server:
        response = server.start_stream()
        server.signal(signal.SIGTERM)
        server.wait_for("draining")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 128 + signal.SIGTERM
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()


def test_a_stuck_engine_does_not_hold_up_the_exit(model: list[str], tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(
        "import threading\n"
        "from nano_inference.async_llm import AsyncLLM\n"
        "from nano_inference.cli import main\n"
        "from nano_inference.server import run\n"
        "AsyncLLM.shutdown = lambda self: threading.Event().wait()\n"
        "run._ABORT_SECONDS = 0.2\n"
        "main()\n"
    )
    with serving(*model, program=[str(script)]) as server:
        server.wait_for("listening at")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 1
        assert "a step of the engine does not end" in server.lines[-1]


def test_idle_connections_do_not_hold_up_the_exit(model: list[str]) -> None:
    with serving(*model, "--drain-timeout", "1000") as server:
        idle = server.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        half_sent = socket.create_connection(("127.0.0.1", server.port))
        half_sent.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        trace = server.connect()
        trace.request("GET", "/v1/engine/trace/stream")
        assert trace.getresponse().status == 200
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0 and time.monotonic() - began < 20
        half_sent.close()
