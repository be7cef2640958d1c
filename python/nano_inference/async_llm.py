"""AsyncLLM: the engine under an asyncio event loop, for servers."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from . import _core
from .engine import EngineAccess, LoadedEngine, Messages, PreparedRequest, Prompt, model_or_default
from .engine_args import EngineArgs
from .outputs import RequestOutput
from .request import RequestState
from .sampling_params import SamplingParams

logger = logging.getLogger("nano_inference")

DEFAULT_MAX_WAITING = 1024


class _Reader(NamedTuple):
    wake: asyncio.Event
    final_only: bool


class AsyncLLM(EngineAccess):
    """A model that serves many requests at once from one event loop.

    AsyncLLM(model, ...): the options are LLM's; the waiting queue is bounded (max_waiting, 1024
    unless said otherwise). The constructor loads the model and blocks until it is ready.

    A pump thread waits for the engine and wakes the event loop once a step; tokens become text on
    the event loop's thread, where all requests live.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._start(EngineArgs(model=model_or_default(model), **options))

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> AsyncLLM:
        self = cls.__new__(cls)
        self._start(args)
        return self

    def _start(self, args: EngineArgs) -> None:
        if args.max_waiting is None:
            args = replace(args, max_waiting=DEFAULT_MAX_WAITING)
        self._engine = LoadedEngine(args)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[int, _Reader] = {}  # by the engine's number of the request
        self._by_name: dict[str, RequestState] = {}
        self._pump = threading.Thread(target=self._run_pump, name="nano-inference", daemon=True)
        self._pump.start()
        atexit.register(self.shutdown)  # the pump must not outlive the interpreter

    # -- Requests -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        delta: bool = False,
        add_special_tokens: bool = True,
    ) -> RequestStream:
        """Submits a request at once; returns an async iterator over its RequestOutputs, each with
        everything so far or, with delta, only what is new. A slow reader gets several steps in one.
        ValueError and QueueFullError are raised here; RuntimeError by the iterator, if the engine
        fails. Cancelling the reader, closing or dropping the iterator aborts the request."""
        prepared = self._engine.prepare(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            add_special_tokens=add_special_tokens,
        )
        return self.submit(prepared, delta=delta)

    def submit(
        self,
        prepared: PreparedRequest,
        *,
        delta: bool = False,
        final_only: bool = False,
        wake: asyncio.Event | None = None,
    ) -> RequestStream:
        """Submits what engine.prepare() made. For readers of several requests: `wake`, which they
        may share, is set when there is something to poll(), with final_only once all is there."""
        (stream,) = self.submit_all([prepared], delta=delta, final_only=final_only, wake=wake)
        return stream

    def submit_all(
        self,
        requests: Sequence[PreparedRequest],
        *,
        delta: bool = False,
        final_only: bool = False,
        wake: asyncio.Event | None = None,
    ) -> list[RequestStream]:
        """All or none, with submit()'s options for each; the engine's next step knows all."""
        self._bind_loop()
        names: set[str] = set()
        for prepared in requests:
            name = prepared.state.request_id
            if name in self._by_name or name in names:
                raise ValueError(f"request_id {name!r} is already in use")
            names.add(name)
        self._engine.submit_all(requests)
        streams = []
        for state in (prepared.state for prepared in requests):
            event = asyncio.Event() if wake is None else wake
            self._streams[state.core_id] = _Reader(event, final_only)
            self._by_name[state.request_id] = state
            streams.append(RequestStream(self, state, event, delta))
        return streams

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        delta: bool = False,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> RequestStream:
        """The same for a conversation; the options are those of LLM.chat."""
        prompt = self._engine.render_chat(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(
            prompt,
            sampling_params,
            request_id,
            priority=priority,
            delta=delta,
            add_special_tokens=False,
        )

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Ends requests by name; their iterators give a last output with finish_reason "abort".
        Names of requests that are over are ignored."""
        for name in [request_id] if isinstance(request_id, str) else request_id:
            if (state := self._by_name.get(name)) is not None:
                self._engine.core.abort(state.core_id)

    # -- The rest -------------------------------------------------------------------------------

    @property
    def is_healthy(self) -> bool:
        """The engine runs and takes requests."""
        return self._pump.is_alive() and bool(self._engine.core.stats()["healthy"])

    def shutdown(self) -> None:
        """Stops the engine after the step in flight; requests end with finish_reason "abort"."""
        self._engine.close()
        self._pump.join()
        atexit.unregister(self.shutdown)

    # -- Pump thread and event loop -------------------------------------------------------------

    def _bind_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._streams and self._loop is not None and not self._loop.is_closed():
                raise RuntimeError(
                    "AsyncLLM serves one event loop, and another one has requests here"
                )
            for state in list(self._engine.requests.values()):  # left over by a closed loop
                self._release(state)
            self._loop = loop

    def _run_pump(self) -> None:
        while True:
            outputs = self._engine.core.wait_outputs()
            if self._loop is not None:
                # A closed loop refuses: its requests have no readers.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._dispatch, outputs)
            if not outputs:  # the engine has stopped
                return

    def _dispatch(self, outputs: list[_core.Output]) -> None:
        """On the event loop, once a step."""
        try:
            changed = self._engine.apply(outputs)
        except Exception as error:  # a bug; what the others of the step said is lost with it
            logger.exception("what the engine made cannot be taken")
            self._fail_all(f"{type(error).__name__} while taking its outputs")
            return
        for state in changed:
            reader = self._streams.get(state.core_id)
            if reader is not None and (state.finished or not reader.final_only):
                reader.wake.set()
            if state.finished:
                self._forget(state)
        if not outputs:
            self._fail_all("it has stopped")

    def _fail_all(self, why: str) -> None:
        """Nothing more will come; whoever still waits must not wait for ever."""
        for state in list(self._by_name.values()):
            if not state.finished:
                state.fail(why)
            self._streams[state.core_id].wake.set()
            self._release(state)

    def _forget(self, state: RequestState) -> None:
        self._streams.pop(state.core_id, None)
        self._by_name.pop(state.request_id, None)

    def _release(self, state: RequestState) -> None:
        """Aborts the request if it still runs."""
        self._engine.abort(state)
        self._forget(state)


class RequestStream:
    """Async iterator over the outputs of one request."""

    def __init__(
        self, llm: AsyncLLM, state: RequestState, event: asyncio.Event, delta: bool
    ) -> None:
        self._llm, self._state, self._event, self._delta = llm, state, event, delta
        self._over = False

    @property
    def request_id(self) -> str:
        return self._state.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._over:
            raise StopAsyncIteration
        try:
            while not self._state.changed:
                self._event.clear()
                await self._event.wait()
        except BaseException:  # the reader was cancelled
            self._close()
            raise
        return self._take()

    def poll(self) -> RequestOutput | None:
        """What is new, without waiting; None if nothing is. RuntimeError if the engine failed."""
        return self._take() if self._state.changed and not self._over else None

    @property
    def finished(self) -> bool:
        """The request is over; its last output may still be there to take."""
        return self._over or self._state.finished

    @property
    def backlog(self) -> int:
        """Characters of text that wait to be taken, with delta."""
        return sum(choice.backlog for choice in self._state.choices)

    def _take(self) -> RequestOutput:
        self._over = self._state.finished
        if self._state.error is not None:
            raise RuntimeError(f"the engine failed: {self._state.error}")
        return self._state.take(delta=self._delta)

    async def aclose(self) -> None:
        """Aborts the request if it still runs."""
        self._close()

    def close(self) -> None:
        """The same, at once."""
        self._close()

    def _close(self) -> None:
        self._over = True
        self._llm._release(self._state)

    def __del__(self) -> None:
        if not self._over and not self._state.finished:
            self._close()
