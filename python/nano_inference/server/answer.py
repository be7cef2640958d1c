"""What both completion endpoints share: from a request's body to prepared engine requests, and what
every answer has, streamed or whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .. import __version__
from ..engine import PreparedRequest
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from ..tokenizer import LONG_TEXT
from .errors import ApiError, from_value_error, refused, unavailable
from .protocol import CompletionTokensDetails, GenerationRequest, PromptTokensDetails, Usage

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from .state import ServerState

# Fields of the request that go to SamplingParams as they are.
SAMPLING_FIELDS = tuple(
    field.name
    for field in dataclass_fields(SamplingParams)
    if field.name in GenerationRequest.__struct_fields__
)

T = TypeVar("T")
encode = msgspec.json.Encoder().encode


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Large work runs on a thread, so that streams go on meanwhile."""
    return work() if size < LONG_TEXT else await asyncio.to_thread(work)


def served_model(state: ServerState, name: str | None) -> str:
    """What responses say. 404 if the request asks for another model."""
    if name is not None and name not in state.model_names:
        known = ", ".join(state.model_names)
        raise ApiError(
            404,
            f"the model {name[:200]!r} is not served here, only {known} is",
            param="model",
            code="model_not_found",
        )
    return state.model_names[0]


def loaded_llm(state: ServerState) -> AsyncLLM:
    """503 unless it can take requests."""
    if state.llm is None or state.phase != "ready":
        raise unavailable(state.unhealthy_because() or "the server is not ready")
    return state.llm


def fingerprint(llm: AsyncLLM) -> str:
    """Same fingerprint and seed, same bytes: all that the numbers depend on."""
    core = llm.engine.core
    parts = (__version__, core.device_name, core.config.dtype, core.config.kv_cache_dtype)
    return "ni_" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:10]


def check_stream_options(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options needs stream to be true", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise refused("prompt_logprobs is not available with stream", "prompt_logprobs")


def sampling_params(
    llm: AsyncLLM, request: GenerationRequest, names: Mapping[str, str], **more: Any
) -> SamplingParams:
    """The model's recommendations, then what the request says, then `more`."""
    given = {
        name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None
    }
    try:
        return llm.get_default_sampling_params().clone(**{**given, **more})
    except ValueError as error:
        raise from_value_error(error, names) from None


async def prepare(
    llm: AsyncLLM,
    request: GenerationRequest,
    prompt: str | list[int],
    params: SamplingParams,
    request_id: str,
    names: Mapping[str, str],
    *,
    add_special_tokens: bool,
    asked_tokens: int | None,
) -> PreparedRequest:
    """Tokenized and checked. asked_tokens: the limit of the output that the request names."""
    whole: dict[str, Any] = {}
    if isinstance(prompt, str):
        whole["prompt"] = prompt
        if len(prompt) >= LONG_TEXT:
            tokenizer = llm.get_tokenizer()
            whole["prompt_token_ids"] = await asyncio.to_thread(
                tokenizer.encode, prompt, add_special_tokens
            )
    else:
        whole["prompt_token_ids"] = prompt
    if request.cache_salt is not None:
        whole["cache_salt"] = request.cache_salt
    try:
        prepared = llm.engine.prepare(
            whole,
            params,
            request_id=request_id,
            priority=request.priority or 0,
            add_special_tokens=add_special_tokens,
        )
    except ValueError as error:
        raise from_value_error(error, names) from None
    longest = llm.engine.core.config.max_model_len
    length = len(prepared.state.prompt_token_ids)
    for name, tokens in ((names["max_tokens"], asked_tokens), ("min_tokens", params.min_tokens)):
        if tokens is not None and length + tokens > longest:
            raise refused(
                f"{name} is {tokens}, but after the prompt's {length} tokens only "
                f"{longest - length} of the model's {longest} are left",
                name,
                "context_length_exceeded",
            )
    return prepared


class Answer:
    """An HTTP request's answer: events of a stream, or one object. Subclasses know the format."""

    id_prefix = ""
    chunk_object = ""

    def __init__(self, state: ServerState, llm: AsyncLLM, request: GenerationRequest) -> None:
        self.llm = llm
        self.tokenizer = llm.engine.tokenizer
        self.request = request
        self.streams = bool(request.stream)
        self.n = request.n or 1
        self.id = self.id_prefix + os.urandom(16).hex()
        self.created = int(time.time())
        self.model = served_model(state, request.model)
        self.fingerprint = fingerprint(llm)
        self.requests: list[PreparedRequest] = []
        self.submitted = False
        self.reasoning_tokens: int | None = None
        self._head, self._tail = self._frame()

    # -- Streams --------------------------------------------------------------------------------

    def events(self, index: int, output: RequestOutput) -> list[bytes]:
        """What is new of request number `index`, as server-sent events."""
        found: list[bytes] = []
        for choice in output.outputs:
            self.add_choice(index * self.n + choice.index, choice, output, found)
        return found

    def add_choice(
        self, index: int, choice: CompletionOutput, output: RequestOutput, found: list[bytes]
    ) -> None:
        raise NotImplementedError

    def event(self, choice: bytes) -> bytes:
        """One event, about one choice (its JSON)."""
        if self.request.options().include_obfuscation:
            pad = os.urandom(32).hex()[: 64 - len(choice) % 32]
            tail = b'],"obfuscation":"%s"%s' % (pad.encode(), self._tail[1:])
            return b"".join((self._head, choice, tail))
        return b"".join((self._head, choice, self._tail))

    def last_events(self) -> list[bytes]:
        """After all choices have ended."""
        if not self.request.options().include_usage:
            return [b"data: [DONE]\n\n"]
        usage = self._head + b'],"usage":' + encode(self.usage()) + b"}\n\n"
        return [usage, b"data: [DONE]\n\n"]

    def _frame(self) -> tuple[bytes, bytes]:
        """Everything before and after a choice in an event."""
        head = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        if self.request.service_tier is not None:
            head["service_tier"] = "default"
        tail = b'],"usage":null}\n\n' if self.request.options().include_usage else b"]}\n\n"
        return b"data: " + encode(head)[:-1] + b',"choices":[', tail

    # -- Whole ----------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput]) -> bytes:
        """The JSON of all of it."""
        return encode(self.completion(outputs))

    def completion(self, outputs: list[RequestOutput]) -> msgspec.Struct:
        raise NotImplementedError

    @property
    def service_tier(self) -> Any:
        return msgspec.UNSET if self.request.service_tier is None else "default"

    # -- Counts; whole once all choices have ended ----------------------------------------------

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.state.prompt_token_ids) for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        return sum(request.state.num_cached_tokens for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        """None that comes after a stop string counts."""
        return sum(
            len(choice.output.token_ids)
            for request in self.requests
            for choice in request.state.choices
        )

    @property
    def finish_reasons(self) -> list[str]:
        return [
            choice.output.finish_reason or "abort"
            for request in self.requests
            for choice in request.state.choices
        ]

    def usage(self) -> Usage:
        reasoning = self.reasoning_tokens
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.prompt_tokens + self.completion_tokens,
            PromptTokensDetails(self.cached_tokens),
            msgspec.UNSET if reasoning is None else CompletionTokensDetails(reasoning),
        )
