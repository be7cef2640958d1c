"""Schemathesis against the server's own OpenAPI document: what the document allows is taken, what
it forbids is refused, responses are as it says, and nothing is a 5xx. Beside it, by hand, what a
generator seldom finds: null bytes, huge numbers and texts, deep nesting, lone surrogates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nano_inference.random_model import write_random_model
from server_helpers import TEMPLATE, Server, serve

MAX_MODEL_LEN = 256
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# How many bodies, valid and not, each operation gets. The rest of the routes takes no body.
EXAMPLES = {
    "/v1/completions": 120,
    "/v1/chat/completions": 120,
    "/tokenize": 60,
    "/detokenize": 40,
    "/v1/models/{model}": 10,
    "/v1/engine/trace": 20,
    "/v1/models": 2,
    "/health": 2,
    "/metrics": 2,
    "/version": 2,
    "/openapi.json": 2,
}
ENDLESS_ROUTE = "/v1/engine/trace/stream"
POSTS = [path for path, count in EXAMPLES.items() if count >= 40]
NEGATIVE = [*POSTS, "/v1/engine/trace"]  # elsewhere nothing can be wrong


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_random_model(tmp_path_factory.mktemp("schema") / "tiny")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    # Small, so that valid requests are short work.
    with serve(model, max_model_len=MAX_MODEL_LEN, max_num_seqs=4, num_blocks=100) as server:
        yield server
        server.wait_idle()


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    # Streams are read to their end, not to their hundredth event.
    config = schemathesis.Config.from_dict({"max-stream-events": 100_000})
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    return schemathesis.openapi.from_url(url, config=config)


def test_each_route_is_fuzzed(schema: Any) -> None:
    assert set(schema.raw_schema["paths"]) == {*EXAMPLES, ENDLESS_ROUTE}


def generate(schema: Any, path: str, mode: GenerationMode, count: int) -> list[Any]:
    """Cases, the same in each run."""
    operation = schema[path]["POST" if path in POSTS else "GET"]
    cases: list[Any] = []

    @hypothesis.seed(4)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        cases.append(case)

    collect()
    return cases


def with_integers(value: Any) -> Any:
    """To JSON Schema 1.0 is the integer 1; clients write the latter, and so does this test."""
    if isinstance(value, dict):
        return {k: with_integers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_integers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def may_be_refused(body: Any, error: dict[str, Any]) -> bool:
    """What hangs on values of several fields, or on tokens, is beyond the document."""
    param, message = error["param"] or "", error["message"]
    if error["code"] == "context_length_exceeded":
        size = len(json.dumps(body)) + (body.get("max_tokens") or 0)
        size += (body.get("max_completion_tokens") or 0) + (body.get("min_tokens") or 0)
        return size * (body.get("n") or 1) * (body.get("best_of") or 1) > MAX_MODEL_LEN
    limits = body.get("max_tokens"), body.get("max_completion_tokens")
    if param == "max_tokens":
        return None not in limits and limits[0] != limits[1]
    if param == "min_tokens":
        limit = next((limit for limit in limits if limit is not None), 16)
        return body["min_tokens"] > limit
    if param == "best_of":
        n = body.get("n") or 1
        return body["best_of"] < n or (body["best_of"] > n and body.get("stream") is True)
    if param == "allowed_token_ids":
        return "leaves no token" in message
    if param == "echo":
        return body["messages"][-1]["role"] != "assistant"
    if param == "messages":
        # The message to be continued has no text.
        return bool(body.get("continue_final_message")) and "continue" in message
    if param.startswith("prompt"):
        return "empty" in message
    return False


@pytest.mark.parametrize("path", EXAMPLES)
def test_what_the_document_allows_is_taken(server: Server, schema: Any, path: str) -> None:
    cases = generate(schema, path, GenerationMode.POSITIVE, EXAMPLES[path])
    taken = 0
    for case in cases:
        case.body = with_integers(case.body)
        response = case.call_and_validate(checks=CHECKS)
        taken += response.status_code == 200
        if response.status_code != 200:
            assert response.status_code == 400, (case.body, response.text)
            assert may_be_refused(case.body, response.json()["error"]), (case.body, response.text)
        elif response.headers["content-type"][0].startswith("text/event-stream"):
            check_stream(response.text)
    assert len(cases) >= min(EXAMPLES[path], 2) - 1 and taken > len(cases) / 3
    server.wait_idle()


def check_stream(text: str) -> None:
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert chunk["object"] in ("text_completion", "chat.completion.chunk")


@pytest.mark.parametrize("path", NEGATIVE)
def test_what_the_document_forbids_is_refused(server: Server, schema: Any, path: str) -> None:
    received = server.wait_idle()["received"]
    cases = generate(schema, path, GenerationMode.NEGATIVE, EXAMPLES[path])
    for case in cases:
        response = case.call_and_validate(checks=[*CHECKS, negative_data_rejection])
        assert 400 <= response.status_code < 500, (case.body, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(cases) > 10
    assert server.wait_idle()["received"] == received


def test_the_live_trace(schema: Any, server: Server) -> None:
    """Its route ends only with the server: what it forbids is refused, what it allows begins."""
    for query in ({"since_step": "x"}, {"since_step": -1}, {"since_step": 2**63}, {"other": 1}):
        case = schema[ENDLESS_ROUTE]["GET"].Case(query=query)
        assert case.call_and_validate(checks=CHECKS).status_code == 400
    with server.raw(ENDLESS_ROUTE, {}) as client:  # a POST
        assert client.recv(100).startswith(b"HTTP/1.1 405")


# -- By hand --------------------------------------------------------------------------------------

DEEP = 100_000
NUMBERS = ["1e400", "-1e400", "9" * 5000, "-" + "9" * 400, "1e-400", "0.1" + "0" * 5000, "1" * 20]
NUMBERS += ["NaN", "Infinity", "-0", "-0.0", "2147483648", "9223372036854775808"]
STRINGS = ["\\u0000", "\\ud800", "\\udfff\\ud800", "\\uffff", "a\\u0000b", "\\ud83d\\ude00", "\\x"]
FIELDS = {
    "/v1/completions": '"prompt": "x", "max_tokens": 2',
    "/v1/chat/completions": '"messages": [{"role": "user", "content": "x"}], "max_tokens": 2',
    "/tokenize": '"prompt": "x"',
    "/detokenize": '"tokens": [1]',
}


def is_answered(server: Server, path: str, body: bytes) -> int:
    reply = server.post(path, body)
    assert reply.status in (200, 400) or reply.error["code"] == "model_not_found", reply
    if reply.status != 200:
        assert reply.error["message"] and len(reply.body) < 10_000  # and no echo of it all
    return reply.status


def with_value(schema: Any, path: str, value: str) -> Iterator[tuple[str, bytes]]:
    """The smallest body with this value for each field in turn; of two, the last counts."""
    names = {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest",
             "/tokenize": "TokenizeRequest", "/detokenize": "DetokenizeRequest"}  # fmt: skip
    for name in schema.raw_schema["components"]["schemas"][names[path]]["properties"]:
        yield name, f'{{{FIELDS[path]}, "{name}": {value}}}'.encode()


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
def test_numbers_of_all_sizes(server: Server, schema: Any, path: str, number: str) -> None:
    for name, body in with_value(schema, path, number):
        if number in ("NaN", "Infinity", "1e400", "-1e400"):
            assert is_answered(server, path, body) == 400, name
        else:
            is_answered(server, path, body)


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("string", STRINGS)
def test_strings_of_all_kinds(server: Server, schema: Any, path: str, string: str) -> None:
    for value in (f'"{string}"', f'["{string}"]', f'{{"{string}": 1}}', f'{{"a": "{string}"}}'):
        for name, body in with_value(schema, path, value):
            status = is_answered(server, path, body)
            if string in ("\\ud800", "\\udfff\\ud800", "\\x"):  # no Unicode text, no JSON
                assert status == 400, name
    body = f'{{{FIELDS[path]}, "{string}": 1}}'.encode()
    assert is_answered(server, path, body) == 400


@pytest.mark.parametrize("path", FIELDS)
def test_nesting_and_size(server: Server, schema: Any, path: str) -> None:
    assert is_answered(server, path, b"[" * DEEP) == 400
    for begin, end in (("[", "]"), ('{"a":', "}")):
        for depth in (30, 200, 5000, DEEP):
            inner = begin * depth + "1" + end * depth
            for name in ("prompt", "messages", "tokens", "logit_bias", "metadata", "nothing"):
                body = f'{{{FIELDS[path]}, "{name}": {inner}}}'.encode()
                assert is_answered(server, path, body) == 400
            body = f'{{{FIELDS[path]}, "chat_template_kwargs": {{"enable_thinking": {inner}}}}}'
            is_answered(server, path, body.encode())
    large = "x" * 2_000_000
    for name in ("prompt", "model", "stop", "user", "cache_salt", "seed", "role", large):
        is_answered(server, path, f'{{{FIELDS[path]}, "{name}": "{large}"}}'.encode())
    is_answered(server, path, f'{{{FIELDS[path]}, "stop": {json.dumps(["ab"] * 300)}}}'.encode())
    ids = f'{{"tokens": {[97] * 500_000}}}'.encode()
    assert is_answered(server, path, ids) == (200 if path == "/detokenize" else 400)


@pytest.mark.parametrize(
    "target",
    ["/%00", "/v1/models/%00", "/v1/models/%ff", "/v1/models/" + "x" * 5000, "/..%2f", "/\\"],
)
def test_paths_of_all_kinds(server: Server, target: str) -> None:
    reply = server.get(target)
    assert reply.status == 404 and reply.error["message"]
