"""Clients of all kinds against a server with a tiny cache: random arrivals and bursts, disconnects
at random moments, slow readers, malformed bodies, several choices, stop strings, a full queue.

    python benchmarks/chaos.py --minutes 3 [--seed 0] [--model FOLDER] [--save]

The server is a process of its own: `nano-inference serve` with --check-invariants, so that the
engine checks its bookkeeping after every step, and with an auditor on a thread that reads the
trace's record of every step and the counters as they change. Every answer that is read to its end
must be the one that the same request got when the server had nothing else to do. At the end nothing
may be left: no request, no block, no connection, no memory. The exit code says whether all of that
held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import context, markdown_table, save

OPTIONS = {
    "num_blocks": 72,  # of 16 tokens: far fewer than max_num_seqs sequences want
    "max_num_seqs": 12,
    "max_num_batched_tokens": 128,
    "max_model_len": 320,
    "max_waiting": 16,
    "stream_buffer_bytes": 2000,
    "keep_alive_interval": 1,
    "trace_capacity": 2000,
}
ENDS = ("finished", "aborted", "rejected", "failed")
MEBI = 1 << 20
SETTLED_MEBI = 8  # by so much the server may grow after the warm-up


# -- The server's side ----------------------------------------------------------------------------


class Auditor:
    """Looks at each step's record, and at the counters as often as they change."""

    def __init__(self, llm: Any) -> None:
        self._llm, self._core = llm, llm.engine.core
        self._stop = threading.Event()
        self.steps = self.steps_counted = self.snapshots = 0
        self.preempted = self.samples = self.most_running = self.most_waiting = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last: dict[str, Any] = {}
        while not self._stop.wait(0.0005):
            stats = self._core.stats()
            if stats == last:
                continue
            self.snapshots += 1
            self.steps_counted += stats["steps"] > last.get("steps", 0)
            last = stats
            self._check_counters(stats)
            if stats["steps"] - self.steps >= 50:
                self._read_trace()

    def _check(self, holds: bool, what: str) -> None:
        if not holds and len(self.wrong) < 20:
            self.wrong.append(what)

    def _check_counters(self, s: dict[str, Any]) -> None:
        accounted = sum(s[name] for name in ENDS) + s["running"] + s["waiting"]
        self._check(s["received"] == accounted, f"requests do not balance: {s}")
        blocks = s["blocks_used"] + s["blocks_cached"] + s["blocks_free"]
        self._check(blocks == s["blocks_total"], f"blocks do not balance: {s}")
        self._check(s["running_seqs"] > 0 or s["blocks_used"] == 0, f"blocks without owner: {s}")
        self._check(s["failed_steps"] == 0 and s["healthy"], f"a step failed: {s}")

    def _read_trace(self) -> None:
        total = self._core.config.num_blocks
        for r in self._core.trace(self.steps + 1):
            self._check(r["step"] == self.steps + 1, f"step {self.steps + 1} was not seen")
            self.steps = r["step"]
            blocks = r["blocks_used"] + r["blocks_cached"] + r["blocks_free"]
            self._check(blocks == total, f"blocks do not balance in step {r}")
            live = {block for entry in r["entries"] for block in entry["blocks"]}
            self._check(r["running"] == 0 or r["blocks_used"] > 0, f"running without blocks: {r}")
            self._check(all(0 <= block < total for block in live), f"no such block: {r}")
            self.preempted += len(r["preempted"])
            self.samples += sum(entry["num_samples"] for entry in r["entries"])
            self.most_running = max(self.most_running, r["running"])
            self.most_waiting = max(self.most_waiting, r["waiting"])

    def report(self) -> dict[str, Any]:
        """After the last step."""
        self._stop.set()
        self._thread.join()
        stats = self._core.stats()
        self._check_counters(stats)
        self._read_trace()
        self._check(self.steps == stats["steps"], "not all steps were seen")
        self._check(self.preempted == stats["preemptions"], "preemptions: counter and trace differ")
        self._check(self.samples == stats["generated_tokens"], "tokens: counter and trace differ")
        names = "steps", "steps_counted", "snapshots", "most_running", "most_waiting"
        found = {name: getattr(self, name) for name in names}
        return {**found, "wrong": self.wrong, "stats": stats, "left": len(self._llm._streams)}


def serve(report: Path, options: list[str]) -> None:
    """`nano-inference serve` with an auditor, whose report goes to a file when it is asked for by
    SIGUSR1."""
    from nano_inference import cli
    from nano_inference.async_llm import AsyncLLM

    start = AsyncLLM.from_engine_args

    def start_audited(args: Any) -> AsyncLLM:
        llm = start(args)
        auditor = Auditor(llm)

        def write() -> None:
            asked.wait()
            part = report.with_suffix(".part")
            part.write_text(json.dumps(auditor.report()))
            part.rename(report)

        threading.Thread(target=write, daemon=True).start()
        return llm

    asked = threading.Event()
    sys.setswitchinterval(0.0002)  # the auditor gets its turn within a step
    signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    AsyncLLM.from_engine_args = staticmethod(start_audited)  # type: ignore[method-assign, assignment]
    sys.argv = ["nano-inference", "serve", *options]
    cli.main()


class Server:
    """That process, from outside."""

    def __init__(self, folder: Path, model: str | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._report, self._log = folder / "report.json", folder / "log"
        words = ["--check-invariants", "--no-access-log", "--port", str(self.port)]
        for name, value in {**OPTIONS, **({"model": model} if model else {})}.items():
            words += ["--" + name.replace("_", "-"), str(value)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(self._report), "--", *words], stderr=log
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def wait_ready(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log}")
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if (await fetch(self.port, "GET", "/health"))[0] == 200:
                    return
            await asyncio.sleep(0.05)

    def memory(self) -> float:
        """Resident, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s*(\d+)", status)
        return int(found[1]) / 1024 if found else 0.0

    def files(self) -> int:
        """Open ones, connections included."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def metrics(self) -> dict[str, float]:
        text = (await fetch(self.port, "GET", "/metrics"))[1].decode()
        lines = re.findall(r"^nano_inference_(\S+) (\S+)$", text, re.M)
        return {name: float(value) for name, value in lines}

    async def wait_idle(self) -> dict[str, float]:
        """Metrics once nothing runs and nobody is being answered."""
        end = time.monotonic() + 60
        while True:
            found = await self.metrics()
            busy = found["num_requests_running"] + found["num_requests_waiting"]
            busy += sum(v for k, v in found.items() if k.startswith("requests_in_flight"))
            if busy == 0 or time.monotonic() > end:
                return found
            await asyncio.sleep(0.05)

    async def audit(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGUSR1)
        while not self._report.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log}")
            await asyncio.sleep(0.02)
        found: dict[str, Any] = json.loads(self._report.read_text())
        return found

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


# -- HTTP, as little as is needed -----------------------------------------------------------------


def request_bytes(method: str, path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def fetch(
    port: int, method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> tuple[int, bytes, str]:
    """(status, body, head)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(method, path, body, kind))
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        data = await reader.read()
    finally:
        writer.close()
    if "transfer-encoding: chunked" in head.lower():
        data = unchunk(data)
    return int(head.split()[1]), data, head


def unchunk(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        parts.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(parts)


def whole_texts(data: bytes) -> list[str]:
    choices = sorted(json.loads(data)["choices"], key=lambda c: c["index"])
    return [c["text"] if "text" in c else c["message"]["content"] for c in choices]


def streamed_texts(data: bytes) -> list[str]:
    """ValueError unless the stream ended well."""
    events = [e for e in data.decode().split("\n\n") if not e.startswith(":")]
    if events[-2:] != ["data: [DONE]", ""]:
        raise ValueError(f"the stream ended with {events[-2:]}")
    texts: dict[int, str] = {}
    for event in events[:-2]:
        for c in json.loads(event.removeprefix("data: "))["choices"]:
            new = c["text"] if "text" in c else c["delta"].get("content") or ""
            texts[c["index"]] = texts.get(c["index"], "") + new
    return [texts[i] for i in sorted(texts)]


# -- The clients ----------------------------------------------------------------------------------

MALFORMED = [
    b"", b"{", b"null", b"[]", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"\x00",
    b"[" * 50_000, b'{"prompt": 1e999}', b'{"prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}",
    b'{"prompt": "x", "n": 0}', b'{"prompt": "x", "temprature": 1}', b'{"prompt": [999999]}',
    b'{"prompt": "x", "max_tokens": 100000}', b'{"prompt": "x", "model": "\\u0000"}',
]  # fmt: skip
WORDS = "once upon a time there was a boy who lived in the wood and said so"


def make_bodies(rng: random.Random, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests that can be answered, each with one right answer."""
    bodies = []
    for i in range(count):
        text = " ".join(rng.choices(WORDS.split(), k=rng.choice([1, 5, 20, 40])))
        body: dict[str, Any] = {"seed": i, "temperature": rng.choice([0, 0.7, 1.5])}
        body["max_tokens"] = rng.choice([1, 8, 40, 120, 200])
        body["n"] = rng.choice([1, 1, 1, 2, 4])
        body["ignore_eos"] = rng.random() < 0.5
        if rng.random() < 0.4:
            body["stop"] = rng.choice([["."], ["the", "zz"], ["\n", " and"], "e"])
        if rng.random() < 0.2:
            body["presence_penalty"] = 1.0
        if rng.random() < 0.5:
            bodies.append(("/v1/completions", {**body, "prompt": text}))
        else:
            messages = [{"role": "user", "content": text}]
            bodies.append(("/v1/chat/completions", {**body, "messages": messages}))
    return bodies


class Chaos:
    def __init__(self, port: int, seed: int) -> None:
        self.port, self._rng = port, random.Random(seed)
        self._bodies = make_bodies(self._rng, 40)
        self._right: list[list[str]] = []
        self.count: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._kinds = {
            self._whole: 4, self._stream: 4, self._disconnect: 5, self._slow: 1,
            self._half_a_body: 1, self._malformed: 2, self._look: 1,
        }  # fmt: skip

    async def learn(self) -> None:
        """The right answers: the server's when it has nothing else to do."""
        for path, body in self._bodies:
            status, data, _ = await fetch(self.port, "POST", path, json.dumps(body).encode())
            if status != 200:
                raise RuntimeError(f"{status}: {data.decode()}")
            self._right.append(whole_texts(data))

    async def run(self, seconds: float) -> None:
        """Arrivals in calm and in stormy moments, until time is up and the last client is gone."""
        end = time.monotonic() + seconds
        clients: set[asyncio.Task[None]] = set()
        kinds, weights = list(self._kinds), list(self._kinds.values())

        def arrive(kind: Any) -> None:
            task = asyncio.create_task(self._client(kind))
            clients.add(task)
            task.add_done_callback(clients.discard)

        # However fast the machine is: so many at once find the queue full.
        for _ in range(4 * (OPTIONS["max_waiting"] + OPTIONS["max_num_seqs"])):
            arrive(self._whole)
        while time.monotonic() < end:
            storm = self._rng.random() < 0.3
            rate, until = (150.0 if storm else 15.0), time.monotonic() + self._rng.uniform(0.2, 1.5)
            while time.monotonic() < min(end, until):
                if len(clients) < 200:
                    arrive(self._rng.choices(kinds, weights)[0])
                await asyncio.sleep(self._rng.expovariate(rate))
        await asyncio.wait_for(asyncio.gather(*clients), 120)

    async def _client(self, kind: Any) -> None:
        name = kind.__name__.strip("_")
        self.count[name] += 1
        try:
            await kind()
        except Exception as error:
            self._say(f"{name}: {type(error).__name__}: {error}")

    def _say(self, what: str) -> None:
        if len(self.wrong) < 20:
            self.wrong.append(what)

    def _pick(self, **more: Any) -> tuple[int, str, bytes]:
        i = self._rng.randrange(len(self._bodies))
        path, body = self._bodies[i]
        return i, path, json.dumps({**body, **more}).encode()

    async def _whole(self, stream: bool = False) -> None:
        i, path, body = self._pick(**({"stream": True} if stream else {}))
        status, data, head = await fetch(self.port, "POST", path, body)
        if status == 429:
            self.count["refused: queue full"] += 1
            if "retry-after:" not in head.lower():
                self._say("429 without Retry-After")
            return
        if status != 200:
            self._say(f"{status} for {body!r}: {data[:300]!r}")
            return
        self.count["answers compared"] += 1
        texts = streamed_texts(data) if stream else whole_texts(data)
        if texts != self._right[i]:
            self._say(f"another answer to {body!r}: {texts}, not {self._right[i]}")

    async def _stream(self) -> None:
        await self._whole(stream=True)

    async def _disconnect(self) -> None:
        """At any moment: in the queue, in the prompt, after some tokens; politely or not."""
        _, path, body = self._pick(stream=self._rng.random() < 0.6, max_tokens=200)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request_bytes("POST", path, body))
        await asyncio.sleep(self._rng.choice([0, 0.01, 0.1, 0.5]) * self._rng.random())
        if self._rng.random() < 0.5:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(100), 0.2)
        if self._rng.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def _half_a_body(self) -> None:
        _, path, body = self._pick()
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = request_bytes("POST", path, body)
        writer.write(data[: self._rng.randrange(1, len(data))])
        await asyncio.sleep(0.3 * self._rng.random())
        writer.close()

    async def _slow(self) -> None:
        """Reads a few bytes now and then; the server may drop it, but for nobody else."""
        _, path, body = self._pick(
            stream=True, n=4, max_tokens=200, ignore_eos=True, stop=None, logprobs=None
        )
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", self.port))
        with client, contextlib.suppress(ConnectionError):
            await loop.sock_sendall(client, request_bytes("POST", path, body))
            for _ in range(self._rng.randrange(1, 40)):
                if not await loop.sock_recv(client, 200):
                    break
                await asyncio.sleep(0.1)

    async def _malformed(self) -> None:
        path = self._rng.choice(["/v1/completions", "/v1/chat/completions", "/tokenize"])
        kind, body = "application/json", self._rng.choice(MALFORMED)
        choice = self._rng.random()
        if choice < 0.1:
            kind = "text/plain"
        elif choice < 0.2:
            path += "/nothing"
        status, data, _ = await fetch(self.port, "POST", path, body, kind)
        self.count["refused: malformed"] += status != 429
        if not 400 <= status < 500 or list(json.loads(data)) != ["error"]:
            # The tokenizer takes all texts; and a list of models is not asked for there.
            self._say(f"{status} for malformed {body[:60]!r}: {data[:200]!r}")

    async def _look(self) -> None:
        path = self._rng.choice(["/health", "/v1/models", "/v1/engine/trace?since_step=1000000"])
        status, data, _ = await fetch(self.port, "GET", path)
        if status != 200:
            self._say(f"{path}: {status} {data[:200]!r}")


# -- A run ----------------------------------------------------------------------------------------


async def sample_memory(server: Server, found: list[float]) -> None:
    while True:
        found.append(server.memory())
        await asyncio.sleep(0.5)


async def run_chaos(server: Server, seconds: float, seed: int) -> dict[str, Any]:
    """A quarter of the time is warm-up, after which memory must not grow."""
    await server.wait_ready()
    chaos = Chaos(server.port, seed)
    await chaos.learn()
    files = server.files()
    await chaos.run(seconds / 4)
    await server.wait_idle()
    warm, during = server.memory(), []
    sampler = asyncio.create_task(sample_memory(server, during))
    await chaos.run(seconds * 3 / 4)
    metrics = await server.wait_idle()
    sampler.cancel()
    end = server.memory()
    audit = await server.audit()
    return {
        "clients": dict(chaos.count),
        "audit": audit,
        "wrong": chaos.wrong + audit.pop("wrong") + look_at_the_end(server, metrics, audit, files),
        "memory_mib": {"after the warm-up": warm, **thirds(during), "at the end": end},
    }


def thirds(samples: list[float]) -> dict[str, float]:
    """Medians, so that a growth that goes on can be told from one that ends."""
    size = max(1, len(samples) // 3)
    parts = [samples[i * size : (i + 1) * size] for i in range(3)]
    names = "first", "second", "last"
    return {
        f"median of the {name} third": statistics.median(part)
        for name, part in zip(names, parts, strict=True)
        if part
    }


def look_at_the_end(
    server: Server, metrics: dict[str, float], audit: dict[str, Any], files: int
) -> list[str]:
    """What is left that should not be."""
    stats = audit["stats"]
    left = {
        "requests that run or wait": stats["running"] + stats["waiting"],
        "blocks in use": stats["blocks_used"],
        "streams": audit["left"],
        "answers under way": sum(
            v for k, v in metrics.items() if k.startswith("requests_in_flight")
        ),
        "internal errors": sum(
            v for k, v in metrics.items() if k.startswith("http_resp") and 'status="500"' in k
        ),
        "open files": max(0, server.files() - files),
        "errors in the log": len(re.findall(r"Traceback|ERROR|CRITICAL", server.log)),
    }
    return [f"left at the end: {n:g} {what}" for what, n in left.items() if n]


@contextlib.contextmanager
def chaos_server(model: str | None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), model)
        try:
            yield server
        finally:
            server.stop()


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    stats, audit = result["audit"]["stats"], result["audit"]
    figures = {
        "steps of the engine, each checked": audit["steps"],
        "steps after which the counters were seen": audit["steps_counted"],
        "states of the counters seen": audit["snapshots"],
        **{f"clients: {name}": n for name, n in sorted(result["clients"].items())},
        **{f"requests {name}": stats[name] for name in ("received", *ENDS, "running", "waiting")},
        "tokens generated": stats["generated_tokens"],
        "preemptions": stats["preemptions"],
        "evictions from the prefix cache": stats["evictions"],
        "most sequences running": audit["most_running"],
        "most sequences waiting": audit["most_waiting"],
        **{f"blocks {kind} at the end": stats[f"blocks_{kind}"]
           for kind in ("used", "cached", "free", "total")},
        **{f"memory of the server {when}, MiB": round(mebi, 1)
           for when, mebi in result["memory_mib"].items()},
        "things that were wrong": len(result["wrong"]),
    }  # fmt: skip
    return [{"": name, "figure": f"{value:,}"} for name, value in figures.items()]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder or name on the hub; default: nano-inference's own")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/chaos.*")
    args = parser.parse_args()

    with chaos_server(args.model) as server:
        result = asyncio.run(run_chaos(server, 60 * args.minutes, args.seed))
    memory = result["memory_mib"]
    if memory["at the end"] > memory["after the warm-up"] + SETTLED_MEBI:
        result["wrong"].append(f"memory grew: {memory}")
    about = context(os.cpu_count() or 1, "cpu")
    about["command"] = f"python benchmarks/chaos.py --minutes {args.minutes:g} --seed {args.seed}"
    about["model"] = args.model or "nano-5m"
    result = {"context": about, "options": OPTIONS, **result}
    print(json.dumps(result, indent=2) if args.json else markdown_table(rows(result)))
    for what in result["wrong"]:
        print(what, file=sys.stderr)
    if args.save:
        save("chaos", result, "Chaos: clients of all kinds, a tiny cache", rows(result))
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
