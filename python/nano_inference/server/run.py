"""The server's process: socket, start-up, signals, drain, exit.

The socket is bound and answered before the model is loaded, so that /health can say "loading". The
model is loaded by a thread; all requests then live on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shlex
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any

from .. import bundled
from .args import ServeArgs, unknown_variables
from .logs import setup_logging
from .state import DRAINING, FAILED, READY, ServerState

if TYPE_CHECKING:
    import uvicorn

    from ..async_llm import AsyncLLM

logger = logging.getLogger("nano_inference.server")

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # more than the 60 after which common proxies drop idle connections
_OBSERVE_SECONDS = 0.05  # often, so that each time is short
_ABORT_SECONDS = 5.0  # for the last bytes of what was aborted, and for the step in flight


def run_server(args: ServeArgs) -> int:
    """Serves until a signal; returns the exit code. OSError if the address cannot be had."""
    began = time.monotonic()
    setup_logging(args.log_level, args.log_format)
    for warning in unknown_variables(os.environ):
        logger.warning("%s", warning)
    sock = bind_socket(args)
    try:
        process = ServerProcess(args, sock, began)
        return process.run()
    finally:
        sock.close()
        if args.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(args.uds)


# -- Socket ---------------------------------------------------------------------------------------


def bind_socket(args: ServeArgs) -> socket.socket:
    """It listens at once: who connects while the model is loaded is answered."""
    if args.uds is not None:
        return _bind_unix(args.uds)
    where = f"{args.host}, port {args.port}"
    try:
        found = socket.getaddrinfo(
            args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise OSError(f"cannot listen at {where}: {error.strerror}") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen at {where}: {why}") from None
    return sock


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(f"cannot listen at {path}: it exists and is no socket")
            with contextlib.suppress(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as test:
                test.connect(path)
                raise OSError(f"cannot listen at {path}: Address already in use")
            os.unlink(path)  # left over by a process that is gone
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        why = str(error) if error.errno is None else f"cannot listen at {path}: {error.strerror}"
        raise OSError(why) from None
    return sock


def server_url(args: ServeArgs, sock: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    scheme = "http" if args.ssl_certfile is None else "https"
    if args.uds is not None:
        return f"{scheme}://localhost{args.root_path}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{host}:{port}{args.root_path}"


# -- Process --------------------------------------------------------------------------------------


class ServerProcess:
    """One server from start to exit."""

    def __init__(self, args: ServeArgs, sock: socket.socket, began: float) -> None:
        import uvicorn

        from .app import create_app
        from .metrics import Metrics
        from .middleware import build_middleware

        self._args, self._sock, self._began = args, sock, began
        self.state = ServerState(args, Metrics())
        app = create_app(self.state, build_middleware(args, self.state.metrics))
        self._server = _make_server(uvicorn, args, app)
        self._loader = threading.Thread(target=self._load, name="loader", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._exit_code = 0
        logger.info("imports: %.2f s", time.monotonic() - began)

    def run(self) -> int:
        factory = self._server.config.get_loop_factory()
        loop = factory() if factory is not None else asyncio.new_event_loop()
        try:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(self._serve())
            loop.run_until_complete(_cancel_tasks())
        finally:
            self._close_engine()
            loop.close()
        logger.info("stopped")
        if self._loader.is_alive():  # it cannot be interrupted, and nobody needs its model
            _exit_now(self._exit_code)
        return self._exit_code

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Not loop.add_signal_handler: the second signal must end a process whose loop hangs.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        self._loader.start()
        observer = self._loop.create_task(self._observe_steps())
        await self._server.serve(sockets=[self._sock])
        observer.cancel()

    async def _observe_steps(self) -> None:
        while True:
            await asyncio.sleep(_OBSERVE_SECONDS)
            self.state.metrics.observe_steps()

    # -- Loading --------------------------------------------------------------------------------

    def _load(self) -> None:
        """On the loader thread."""
        try:
            from ..async_llm import AsyncLLM

            if self._args.model is None:
                logger.warning(bundled.NOTICE)
            llm = AsyncLLM.from_engine_args(self._args.engine_args())
        except BaseException as error:
            logger.debug("loading failed", exc_info=True)
            text = " ".join(str(error).split()) or type(error).__name__
            self._call(self._on_load_failed, text)
        else:
            self._call(self._on_loaded, llm)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends anyway
            self._loop.call_soon_threadsafe(function, *args)

    def _on_load_failed(self, why: str) -> None:
        logger.error("the model cannot be loaded: %s", why)
        self.state.phase, self.state.failure = FAILED, why
        self._exit_code = 1
        self._server.should_exit = True

    def _on_loaded(self, llm: AsyncLLM) -> None:
        self.state.llm = llm
        if self.state.phase == DRAINING:  # _close_engine() sees to it
            return
        self.state.metrics.attach(llm, self.state.model_names[0])
        gc.collect()
        gc.freeze()  # what is there now stays: collections need not look at it again
        self.state.phase = READY
        self._log_ready(llm)

    def _log_ready(self, llm: AsyncLLM) -> None:
        args, url = self._args, server_url(self._args, self._sock)
        logger.info(
            "serving after %.2f s: model %s, %d tokens of KV cache, listening at %s",
            time.monotonic() - self._began,
            ", ".join(self.state.model_names),
            llm.engine.plan.num_tokens,
            url if args.uds is None else args.uds,
        )
        if not args.asks_for_key and args.uds is None and not _is_loopback(self._sock):
            logger.warning("no --api-key: whoever can reach %s may use it", args.host)
        tokenizer = llm.engine.tokenizer
        chat = tokenizer is not None and tokenizer.has_chat_template
        logger.info("try:\n%s", example_request(args, url, self.state.model_names[0], chat))

    # -- Signals and drain ----------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.state.phase in (DRAINING, FAILED):
            _exit_now(128 + signum)
        ready = self.state.phase == READY
        self.state.phase = DRAINING
        # In a context of its own: the log's lines are not those of a request that was interrupted.
        self._loop.call_soon_threadsafe(
            self._begin_drain, signal.Signals(signum).name, ready, context=Context()
        )

    def _begin_drain(self, why: str, ready: bool) -> None:
        if not ready:
            logger.info("%s while loading: stopping", why)
            self._server.should_exit = True
            return
        logger.info(
            "%s: draining, %d requests get %g s to finish (a second signal ends at once)",
            why,
            self.state.in_flight,
            self._args.drain_timeout,
        )
        task = self._loop.create_task(self._drain())
        self._tasks.add(task)  # the loop itself keeps no reference

    async def _drain(self) -> None:
        """New connections are answered meanwhile: health says draining, completions get 503."""
        try:
            if not await self._in_flight_end(self._args.drain_timeout) and self.state.llm:
                names = [r.request_id for r in self.state.llm.engine.requests.values()]
                logger.warning("aborting %d requests", len(names))
                await self.state.llm.abort(names)
                await self._in_flight_end(_ABORT_SECONDS)
        finally:
            self._server.should_exit = True

    async def _in_flight_end(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while self.state.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.state.in_flight

    def _close_engine(self) -> None:
        """Waits for the step in flight, but not for one that is stuck."""
        if self.state.llm is None:
            return
        closer = threading.Thread(target=self.state.llm.shutdown, name="closer", daemon=True)
        closer.start()
        closer.join(_ABORT_SECONDS)
        if closer.is_alive():
            logger.error("a step of the engine does not end: exiting without it")
            _exit_now(1)


async def _cancel_tasks() -> None:
    """What still runs when the server has shut down: handlers of clients that do not read."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1.0)


def _make_server(uvicorn: Any, args: ServeArgs, app: Any) -> uvicorn.Server:
    import ssl

    class Server(uvicorn.Server):  # type: ignore[misc]
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # ServerProcess handles them

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if args.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )
    try:
        config.load()
    except ssl.SSLError as error:
        files = "ssl_certfile, ssl_keyfile and ssl_ca_certs"
        raise ValueError(f"{files} must be PEM files that fit each other: {error}") from None
    return Server(config)


def _is_loopback(sock: socket.socket) -> bool:
    import ipaddress

    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def example_request(args: ServeArgs, url: str, model: str, chat: bool) -> str:
    """A curl command, ready to paste."""
    body: dict[str, Any] = {"model": model, "max_tokens": 64}
    if chat:
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    else:
        body["prompt"] = "Once upon a time"
    options = "-H 'Content-Type: application/json'"
    if args.asks_for_key:
        options = f'-H "Authorization: Bearer $API_KEY" {options}'
    if args.ssl_certfile is not None:
        options = f"--cacert {shlex.quote(args.ssl_certfile)} {options}"
    if args.uds is not None:
        options = f"--unix-socket {shlex.quote(args.uds)} {options}"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return f"curl {shlex.quote(url + path)} {options} -d {shlex.quote(json.dumps(body))}"


def _exit_now(code: int) -> None:
    """Without waiting for any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
