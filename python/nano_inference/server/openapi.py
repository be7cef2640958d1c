"""The OpenAPI document, from the same structs that read requests and write responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .. import __version__
from .. import chat as templates
from .errors import ErrorBody
from .protocol import (
    FIXED,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
)
from .trace import TraceList

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from .state import ServerState

_REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_TYPES = (*_REQUESTS, ChatCompletion, Completion, ModelCard, ModelList, Text, Tokens, TraceList)

_ERRORS = {
    400: "The request is refused; the error names the field",
    401: "An API key is missing or not valid",
    404: "There is no such model or route",
    405: "The route does not take this method",
    413: "The body is too large",
    415: "The body is not called application/json",
    429: "The queue is full; see Retry-After",
    500: "The engine or the server failed",
    503: "Loading, draining or unhealthy; see Retry-After",
    504: "The request took too long",
}
_QUICK = (401, 405, 413, 500)
_READS = (400, 404, 503, *_QUICK)
_TAKES = (415, *_READS)
_GENERATES = (429, 504, *_TAKES)
_EVENTS: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 has no words for events
# The engine's numbers are 32 bits wide: from where they round to 0 and to infinity.
_FLOAT_ZERO, _FLOAT_END = 2.0**-150, (2 - 2.0**-24) * 2.0**127


def openapi_document(state: ServerState, root_path: str = "") -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(
        [*_TYPES, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    for kind in _REQUESTS:
        _add_what_is_known(schemas, kind, state)
        if rules := _RULES.get(kind):
            schemas[kind.__name__]["allOf"] = rules
    if state.llm is not None:
        _add_template(schemas, state.llm)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "nano-inference",
            "version": __version__,
            "description": "An OpenAI-compatible server. Fields that are not listed are refused.",
        },
        "paths": _paths(state),
        "components": {"schemas": schemas},
    }
    if root_path:
        document["servers"] = [{"url": root_path}]
    if state.args.asks_for_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        document["paths"]["/health"]["get"]["security"] = []
    return document


def _add_what_is_known(schemas: dict[str, Any], kind: type, state: ServerState) -> None:
    """Names of models, limits of the vocabulary, and fields with one possible value."""
    properties = schemas[kind.__name__]["properties"]
    properties["model"] = {"enum": [*state.model_names, None], "default": None}
    for name, (possible, why) in FIXED[kind].items():
        if name not in properties:
            properties[name] = {"enum": list(possible), "description": f"Fixed: {why}."}
    if state.llm is None:
        return
    config = state.llm.engine.core.config
    longest = config.max_model_len
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        _limit(properties.get(name), longest - 1)
    for name in ("n", "best_of"):
        _limit(properties.get(name), config.max_num_seqs)
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        _limit(properties.get(name), min(config.max_logprobs, _top_logprobs(name)))
        if state.args.max_logprobs != -1:  # then -1 does not ask for the vocabulary
            _limit(properties.get(name), 0, "minimum")
    for name in ("temperature", "repetition_penalty"):
        _limit(properties.get(name), _FLOAT_END, "exclusiveMaximum")
    for name in ("top_p", "repetition_penalty"):
        _limit(properties.get(name), _FLOAT_ZERO, "exclusiveMinimum")
    if "truncate_prompt_tokens" in properties:
        properties["truncate_prompt_tokens"]["not"] = {"const": 0}
    if kind is CompletionRequest:
        _unmix(properties["prompt"], config.max_waiting)
    if "priority" in properties and config.policy != "priority":
        properties["priority"] = {"enum": [None, 0], "default": None}
    largest = state.llm.engine.loaded.model_config.vocab_size - 1
    for name in ("stop_token_ids", "allowed_token_ids", "tokens", "prompt"):
        _limit(properties.get(name), largest)
    if "logit_bias" in properties:
        digits = {"propertyNames": {"pattern": f"^({_up_to(largest)})$"}}
        for option in properties["logit_bias"]["anyOf"]:
            if option.get("type") == "object":
                option.update(digits)


def _up_to(largest: int) -> str:
    """Fewer digits than `largest` has: the keys that surely are token ids."""
    return rf"0|[1-9][0-9]{{0,{max(0, len(str(largest)) - 2)}}}"


def _top_logprobs(name: str) -> int:
    return 20 if name == "top_logprobs" else 2**31 - 1  # OpenAI's limit


def _limit(schema: Any, limit: float, bound: str = "maximum") -> None:
    """Every number in it is at most `limit`, or whatever `bound` says."""
    if isinstance(schema, list):
        for part in schema:
            _limit(part, limit, bound)
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            schema[bound] = limit
        for part in schema.values():
            _limit(part, limit, bound)


def _unmix(prompt: dict[str, Any], max_waiting: int) -> None:
    """A list is a prompt of token ids, or one of prompts, which all wait in the queue."""
    text, mixed, null = prompt["anyOf"]
    _, token, ids = mixed["items"]["anyOf"]
    ids["minItems"] = 1
    several = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1}
    if max_waiting:
        several["maxItems"] = max_waiting
    prompt["anyOf"] = [text, {"type": "array", "items": token, "minItems": 1}, several, null]


def _add_template(schemas: dict[str, Any], llm: AsyncLLM) -> None:
    """What the model's tokenizer and chat template can make use of; other things would have no
    effect."""
    tokenizer = llm.engine.tokenizer
    if tokenizer is None or not tokenizer.can_fill_in:
        schemas["CompletionRequest"]["properties"]["suffix"] = {"enum": ["", None], "default": None}
    if tokenizer is None:
        return
    try:
        template = tokenizer.choose_template(None)
        known = templates.variables(template) - {"messages", "add_generation_prompt", "tools"}
        named = templates.mentions(template, "name")
    except ValueError:  # then every chat is refused
        return
    nothing = {"enum": [None], "default": None}
    for kind in (ChatRequest, TokenizeRequest):
        for option in schemas[kind.__name__]["properties"]["chat_template_kwargs"]["anyOf"]:
            if option.get("type") == "object":
                option |= {"properties": {k: {} for k in sorted(known)}}
                option["additionalProperties"] = False
    efforts = schemas["ChatRequest"]["properties"]
    if "reasoning_effort" not in known:
        off = {"enum": ["none", None], "default": None}
        efforts["reasoning_effort"] = off if "enable_thinking" in known else nothing
    if "verbosity" not in known:
        efforts["verbosity"] = {"enum": ["medium", None], "default": None}
    if not named:
        schemas["ChatMessage"]["properties"]["name"] = nothing


# -- Fields that depend on others -----------------------------------------------------------------


_OFF = {"enum": [False, None]}
_NULL = {"type": "null"}
_NO_TEXT = {"enum": ["", None]}


def _either(*cases: dict[str, Any]) -> dict[str, Any]:
    """Each case is a schema for some of the fields; what must be there, is not null."""
    return {
        "anyOf": [
            {
                "properties": case,
                "required": [k for k, v in case.items() if v not in (_OFF, _NULL, _SOME, _NO_TEXT)],
            }
            for case in cases
        ]
    }


_ON = {"const": True}
_SOME = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}
_STREAM = _either(
    {"stream": _ON, "prompt_logprobs": _NULL}, {"stream": _OFF, "stream_options": _NULL}
)
_CONTINUES = {"continue_final_message": _ON, "add_generation_prompt": _OFF}
_RULES: dict[type, list[dict[str, Any]]] = {
    CompletionRequest: [
        _STREAM,
        _either({"max_tokens": _SOME}, {"echo": _ON}),
        _either({"suffix": _NO_TEXT}, {"echo": _OFF}),
    ],
    ChatRequest: [
        _STREAM,
        _either({"top_logprobs": _NULL}, {"logprobs": _ON}),
        _either({"continue_final_message": _OFF, "echo": _OFF}, _CONTINUES),
    ],
    TokenizeRequest: [
        _either(
            {
                "prompt": {"type": "string"},
                "messages": _NULL,
                "add_generation_prompt": _NULL,
                "continue_final_message": _NULL,
                "chat_template_kwargs": _NULL,
            },
            {"messages": {"type": "array"}, "prompt": _NULL},
        ),
        _either({"continue_final_message": _OFF}, _CONTINUES),
    ],
}


# -- Paths ----------------------------------------------------------------------------------------


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _operation(
    name: str,
    summary: str,
    content: dict[str, Any],
    errors: tuple[int, ...],
    *,
    body: type | None = None,
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "Success", "content": content}}
    for status in sorted(errors):
        responses[str(status)] = {
            "description": _ERRORS[status],
            "content": _json(_ref(ErrorBody)),
        }
        if status in (429, 503):
            retry = {"schema": {"type": "integer"}, "description": "Seconds to wait"}
            responses[str(status)]["headers"] = {"Retry-After": retry}
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": responses,
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(_ref(body))}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _paths(state: ServerState) -> dict[str, Any]:
    since = {
        "name": "since_step",
        "in": "query",
        "schema": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    }
    name = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": state.model_names},
    }
    words = {"type": "object", "additionalProperties": {"type": "string"}}
    text = {"schema": {"type": "string"}}

    def get(*args: Any, **more: Any) -> dict[str, Any]:
        return {"get": _operation(*args, **more)}

    def post(*args: Any, **more: Any) -> dict[str, Any]:
        return {"post": _operation(*args, **more)}

    def answers(kind: type) -> dict[str, Any]:
        return {**_json(_ref(kind)), **_EVENTS}

    return {
        "/v1/models": get("models", "The models that are served", _json(_ref(ModelList)), _QUICK),
        "/v1/models/{model}": get(
            "model", "One of them", _json(_ref(ModelCard)), (404, *_QUICK), parameters=[name]
        ),
        "/v1/completions": post(
            "completions", "Continue texts", answers(Completion), _GENERATES, body=CompletionRequest
        ),
        "/v1/chat/completions": post(
            "chat", "Answer a conversation", answers(ChatCompletion), _GENERATES, body=ChatRequest
        ),
        "/tokenize": post(
            "tokenize", "A text's or a chat's tokens", _json(_ref(Tokens)), _TAKES,
            body=TokenizeRequest,
        ),
        "/detokenize": post(
            "detokenize", "The text of tokens", _json(_ref(Text)), _TAKES, body=DetokenizeRequest
        ),
        "/v1/engine/trace": get(
            "trace", "What the last steps did", _json(_ref(TraceList)), _READS, parameters=[since]
        ),
        "/v1/engine/trace/stream": get(
            "trace_stream", "What every step does, live", _EVENTS, _READS, parameters=[since]
        ),
        "/health": get("health", "Whether requests should come", _json(words), (405, 500, 503)),
        "/metrics": get("metrics", "Prometheus metrics", {"text/plain": text}, _QUICK),
        "/version": get("version", "The server's version", _json(words), _QUICK),
        "/openapi.json": get("openapi", "This document", _json({"type": "object"}), _QUICK),
    }  # fmt: skip
