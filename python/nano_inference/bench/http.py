"""A small HTTP/1.1 client for load generation: keep-alive, chunked bodies, events, TLS.

It is a protocol on the event loop's callbacks, not a stream that tasks read: a piece of a body
costs no task switch, and its time is taken where it arrives."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

Sink = Callable[[bytes, float], None]
"""Takes a piece of a body and the time at which it arrived."""

# What all connections read into, one after the other: no allocation for each piece.
_BUFFER = memoryview(bytearray(64 << 10))
_MAX_HEAD = 64 << 10  # bytes of a status line and headers, or of a chunk's size line
_MAX_EVENT = 16 << 20
_MAX_ERROR_BODY = 64 << 10


class ProtocolError(Exception):
    """What came is not HTTP as we know it."""


class Disconnected(Exception):
    """The connection ended before the answer did."""


class ResponseParser:
    """One response: bytes in, in whatever pieces they come. The body goes to `sink` if the status
    is 200, and is kept in `error_body` otherwise."""

    def __init__(self, sink: Sink) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.error_body = b""
        self.started = self.complete = False
        self.keep_alive = True
        self._sink = sink
        self._rest = b""  # unread bytes of a line, or of the head, that has not ended
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._state = self._read_head

    def feed(self, data: bytes, now: float) -> None:
        self.started = True
        if self._rest:
            data, self._rest = self._rest + data, b""
        while data and not self.complete:
            data = self._state(data, now)
        if data:  # more than was asked for: whose it is, nobody knows
            self.keep_alive = False

    def eof(self) -> None:
        """The connection has ended."""
        if self._state == self._read_until_eof:
            self.complete = True
        if not self.complete:
            raise Disconnected("the server closed the connection before the end of the answer")

    # Each state takes what it can and returns what is left for the next one.

    def _line(self, data: bytes, end: bytes) -> tuple[bytes | None, bytes]:
        at = data.find(end)
        if at >= 0:
            return data[:at], data[at + len(end) :]
        if len(data) > _MAX_HEAD:
            raise ProtocolError("a header that does not end")
        self._rest = data
        return None, b""

    def _read_head(self, data: bytes, now: float) -> bytes:
        head, data = self._line(data, b"\r\n\r\n")
        if head is None:
            return data
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise ProtocolError(f"no HTTP/1.x status line: {first[:80]!r}")
        self.status = int(words[1])
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if self.status >= 200:  # before it, as "100 Continue", nothing has begun
            self._start_body(words[0])
        return data

    def _start_body(self, version: str) -> None:
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and version != "HTTP/1.0"
        length = self.headers.get("content-length", "")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._state = self._read_chunk_size
        elif self.status in (204, 304):
            self.complete = True
        elif length:
            if not length.isdecimal():
                raise ProtocolError(f"content-length {length[:80]!r}")
            self._left, self._state = int(length), self._read_known_length
            self.complete = self._left == 0
        else:
            self.keep_alive, self._state = False, self._read_until_eof

    def _body(self, piece: bytes, now: float) -> None:
        if self.status == 200:
            self._sink(piece, now)
        elif len(self.error_body) < _MAX_ERROR_BODY:
            self.error_body += piece

    def _read_known_length(self, data: bytes, now: float) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        self._body(piece, now)
        self.complete = self._left == 0
        return data[len(piece) :]

    def _read_until_eof(self, data: bytes, now: float) -> bytes:
        self._body(data, now)
        return b""

    def _read_chunk_size(self, data: bytes, now: float) -> bytes:
        line, data = self._line(data, b"\r\n")
        if line is not None:
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise ProtocolError(f"chunk size {line[:80]!r}") from None
            self._state = self._read_chunk if self._left else self._read_trailer
        return data

    def _read_chunk(self, data: bytes, now: float) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        self._body(piece, now)
        if self._left == 0:
            self._state = self._read_chunk_end
        return data[len(piece) :]

    def _read_chunk_end(self, data: bytes, now: float) -> bytes:
        line, data = self._line(data, b"\r\n")
        if line:
            raise ProtocolError("a chunk is longer than it said")
        if line is not None:
            self._state = self._read_chunk_size
        return data

    def _read_trailer(self, data: bytes, now: float) -> bytes:
        line, data = self._line(data, b"\r\n")
        self.complete = line == b""
        return data


class EventParser:
    """Server-sent events: bytes in, the events' data out. Comments (keep-alives) are dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        data = self._rest + data
        held = b""
        if b"\r" in data:
            if data.endswith(b"\r"):  # its \n may follow
                data, held = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = data.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > _MAX_EVENT:
            raise ProtocolError("an event that does not end")
        events = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:  # nearly all of them
                events.append(block[6:])
                continue
            lines = [line[5:] for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                events.append(b"\n".join(line.removeprefix(b" ") for line in lines))
        return events


class Connection(asyncio.BufferedProtocol):
    """One connection, one exchange at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.used = False
        self.closed = False
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, parser: ResponseParser) -> None:
        if self.closed or self._transport is None:
            raise Disconnected("the connection is closed")
        self._parser = parser
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._parser = self._done = None
            self.used = True

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # -- Called by the event loop ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER

    def buffer_updated(self, size: int) -> None:
        now = self._clock()
        data = bytes(_BUFFER[:size])
        if self._parser is None:  # nothing was asked
            self.close()
            return
        try:
            self._parser.feed(data, now)
        except Exception as error:
            self._finish(error)
        else:
            if self._parser.complete:
                self._finish(None)

    def eof_received(self) -> None:
        self._lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(error)

    def _lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._parser is not None:
            try:
                self._parser.eof()
            except Disconnected as early:
                self._finish(Disconnected(str(error)) if error else early)
            else:
                self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


class Client:
    """Requests to one server, over connections that are kept."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        verify: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if "://" not in base_url:
            base_url = "http://" + base_url
        url = urlsplit(base_url)
        try:
            port = url.port
        except ValueError:
            port = 0
        if url.scheme not in ("http", "https") or not url.hostname or port == 0:
            raise ValueError(f"--base-url must be like http://127.0.0.1:8000, got {base_url!r}")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._path = url.path.rstrip("/").removesuffix("/v1")
        self._host, self._port = url.hostname, port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        if self._tls is not None and not verify:
            self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._head = (
            f"Host: {url.netloc.rpartition('@')[2]}\r\nUser-Agent: nano-inference-bench\r\n"
        )
        if api_key:
            if not api_key.isascii() or not api_key.isprintable():
                raise ValueError("--api-key holds characters that no HTTP header may have")
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._clock = clock
        self._idle: list[Connection] = []

    def encode(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request as it goes over the wire; a body is JSON."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    async def send(self, request: bytes, sink: Sink, timeout: float) -> ResponseParser:
        """Sends what encode() made; returns when the whole answer has arrived. OSError,
        Disconnected, ProtocolError, asyncio.TimeoutError, and what the sink raises."""
        return await asyncio.wait_for(self._send(request, sink), timeout)

    async def _send(self, request: bytes, sink: Sink) -> ResponseParser:
        while True:
            connection = await self._connect()
            reused, parser = connection.used, ResponseParser(sink)
            try:
                await connection.exchange(request, parser)
            except BaseException as error:
                connection.close()
                # A server may close an idle connection just when we use it. Another one, then.
                if isinstance(error, Disconnected) and reused and not parser.started:
                    continue
                raise
            if parser.keep_alive and not connection.closed:
                self._idle.append(connection)
            else:
                connection.close()
            return parser

    async def _connect(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._clock), self._host, self._port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
