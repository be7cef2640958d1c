"""The official client of the OpenAI API, sync and async, against a running server: a case for each
parameter that its signatures offer, streams and the client's helpers for them, its exceptions, and
what a client leaves behind that goes away. Responses are validated against the client's own types.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from nano_inference.random_model import write_random_model
from server_helpers import TEMPLATE, Server, serve

EOS = 257
USER = [{"role": "user", "content": "an example"}]
ENDLESS = {"max_tokens": 100_000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai") / "tiny"
    model = write_random_model(folder, max_position_embeddings=200_000)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with serve(model) as server:
        yield server
        server.wait_idle()


def options(server: Server, **more: Any) -> dict[str, Any]:
    """Of a client."""
    return {
        "base_url": f"http://127.0.0.1:{server.port}/v1",
        "api_key": "none is needed",
        "max_retries": 0,
        "timeout": 60,
        **more,
    }


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(**options(server)) as client:
        yield client


class Loop:
    """An event loop on a thread with an asynchronous client."""

    def __init__(self, **client_options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.client = AsyncOpenAI(**client_options)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        self.run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def loop(server: Server) -> Iterator[Loop]:
    loop = Loop(**options(server))
    yield loop
    loop.close()


Create = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def create(request: pytest.FixtureRequest, client: OpenAI, loop: Loop) -> Create:
    """create(endpoint, **parameters): the answer, or the list of a stream's chunks."""

    def create_sync(endpoint: str, **parameters: Any) -> Any:
        reply = resource(client, endpoint).create(**parameters)
        return valid(list(reply) if parameters.get("stream") else reply)

    def create_async(endpoint: str, **parameters: Any) -> Any:
        async def work() -> Any:
            reply = await resource(loop.client, endpoint).create(**parameters)
            return [chunk async for chunk in reply] if parameters.get("stream") else reply

        return valid(loop.run(work()))

    return create_sync if request.param == "sync" else create_async


def valid(reply: Any) -> Any:
    """The client takes what it gets; here it must fit the client's types."""
    if not isinstance(reply, list):
        type(reply).model_validate(reply.to_dict())
        return reply
    for chunk in reply:
        fields = chunk.to_dict()
        if fields["object"] == "text_completion":  # whose types leave out that it may be null
            for choice in fields["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        type(chunk).model_validate(fields)
    return reply


def resource(client: Any, endpoint: str) -> Any:
    return client.chat.completions if endpoint == "chat" else client.completions


# -- A case for each parameter --------------------------------------------------------------------


@dataclass
class Case:
    """effect(answer without the value, answer with it); each refused value is a 400 that names the
    parameter."""

    value: Any = None
    effect: Callable[[Any, Any], Any] | None = None
    refused: list[Any] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)


def texts(reply: Any) -> list[str]:
    return [c.text if hasattr(c, "text") else c.message.content for c in reply.choices]


def streamed_text(chunks: Any) -> str:
    """Of a stream with one choice."""
    choices = [c for chunk in chunks for c in chunk.choices]
    return "".join(c.text if hasattr(c, "text") else c.delta.content or "" for c in choices)


def same(a: Any, b: Any) -> bool:
    return texts(a) == texts(b)


def differs(a: Any, b: Any) -> bool:
    return texts(a) != texts(b)


def tokens(reply: Any) -> int:
    return int(reply.usage.completion_tokens)


def turns_into(before: str, after: str) -> Callable[[Any, Any], bool]:
    return lambda a, b: (texts(a), texts(b)) == ([before], [after])


def scores_letters(a: Any, b: Any) -> bool:
    """Completions' logprobs: the chosen letter is the likeliest at temperature 0."""
    found = b.choices[0].logprobs
    return (
        a.choices[0].logprobs is None
        and "".join(found.tokens) == texts(b)[0]
        and found.token_logprobs == [max(top.values()) for top in found.top_logprobs]
        and found.text_offset == list(range(len(found.tokens)))
    )


def scores_bytes(a: Any, b: Any) -> bool:
    found = b.choices[0].logprobs.content
    return (
        a.choices[0].logprobs is None
        and bytes(byte for t in found for byte in t.bytes).decode() == texts(b)[0]
        and all(t.logprob <= 0 and t.top_logprobs == [] for t in found)
    )


def alternatives(a: Any, b: Any) -> bool:
    pairs = zip(a.choices[0].logprobs.content, b.choices[0].logprobs.content, strict=True)
    return all(
        [t.logprob for t in y.top_logprobs] == sorted(t.logprob for t in y.top_logprobs)[::-1]
        and len(y.top_logprobs) == 3
        and (y.top_logprobs[0].token, y.top_logprobs[0].logprob) == (x.token, x.logprob)
        for x, y in pairs
    )


SAMPLED = {"temperature": 1.0, "seed": 1}
ONLY_A = {"logit_bias": {"97": 100}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}

# Of the client itself: extra_query, extra_headers and timeout have tests of their own below.
CLIENTS_OWN = {"extra_headers", "extra_query", "timeout"}

COMMON: dict[str, Case] = {
    "model": Case("tiny-alias", lambda a, b: same(a, b) and a.model == b.model == "tiny", [5]),
    "frequency_penalty": Case(2, differs, [2.1, -2.1, "x"], {"max_tokens": 60}),
    "presence_penalty": Case(2, differs, [2.1, -2.1, "x"], {"max_tokens": 60}),
    "logit_bias": Case(
        {"120": 100}, lambda a, b: differs(a, b) and texts(b) == ["x" * 12],
        [{"a": 1}, {"1": 101}, {"261": 1}, [1]],
    ),
    "max_tokens": Case(3, lambda a, b: (tokens(a), tokens(b)) == (12, 3), [-1, 1.5, 200_000]),
    "n": Case(3, lambda a, b: len(texts(a)) == 1 and len(set(texts(b))) == 3, [0, 257], SAMPLED),
    "seed": Case(2, differs, [1.5, "x"], SAMPLED),
    "stop": Case(["b", "aaa"], turns_into("a" * 12, ""), ["", [""], [5]], ONLY_A),
    "stream": Case(True, lambda a, b: texts(a) == [streamed_text(b)], ["yes", 1]),
    "stream_options": Case(
        {"include_usage": True},
        lambda a, b: all(chunk.usage is None for chunk in a)
        and b[-1].choices == [] and tokens(b[-1]) == 12
        and streamed_text(a) == streamed_text(b),
        [{"include_usage": 1}, {"other": True}], {"stream": True},
    ),
    "temperature": Case(1.5, differs, [-0.1, "x"], {"seed": 1}),
    "top_p": Case(1e-4, differs, [0, 1.1, "x"], SAMPLED),
    "user": Case("me", same, [5]),
    "extra_body": Case(
        {"top_k": 1}, differs, [{"top_k": -2}, {"no_such_field": 1}, {"guided_json": {}}], SAMPLED
    ),
}  # fmt: skip

COMPLETIONS: dict[str, Case] = {
    **COMMON,
    "prompt": Case(
        [[256, 97], "b"], lambda a, b: len(texts(b)) == 2 and b.usage.prompt_tokens == 4,
        [5, [], [["a"]], [261]],
    ),
    "best_of": Case(3, lambda a, b: tokens(b) == 3 * tokens(a), [0, 257], SAMPLED),
    "echo": Case(True, lambda a, b: texts(b) == ["an example" + texts(a)[0]], [1]),
    "logprobs": Case(3, scores_letters, [-2, 21, True]),
    "suffix": Case("", same, ["end"]),
}  # fmt: skip

CHAT: dict[str, Case] = {
    **COMMON,
    "messages": Case(
        [{"role": "system", "content": "Be brief"},
         {"role": "user", "content": [{"type": "text", "text": "an example"}]}],
        differs,
        [[], [{"role": "user"}], [{"role": "tool", "content": "x", "tool_call_id": "1"}],
         [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
         [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}],
         [{"role": "user", "content": [
             {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]],
    ),
    "audio": Case(refused=[{"voice": "alloy", "format": "wav"}]),
    "function_call": Case("none", same, ["auto", {"name": "f"}]),
    "functions": Case([], same, [[{"name": "f"}]]),
    "logprobs": Case(True, scores_bytes, ["x", 2]),
    "max_completion_tokens": Case(3, lambda a, b: (tokens(a), tokens(b)) == (12, 3), [0, 200_000]),
    "metadata": Case({"a": "b"}, same, [{"a": 1}]),
    "modalities": Case(["text"], same, [["text", "audio"]]),
    "moderation": Case(refused=[{"model": "omni-moderation-latest"}]),
    "parallel_tool_calls": Case(True, same, ["x"]),  # there are no tools to call
    "prediction": Case(refused=[{"type": "content", "content": "x"}]),
    "prompt_cache_key": Case("me", same, [5]),
    "prompt_cache_options": Case(refused=[{"ttl": "5m"}]),
    "prompt_cache_retention": Case("in_memory", same, ["24h"]),
    "reasoning_effort": Case(
        "low", lambda a, b: b.usage.prompt_tokens - a.usage.prompt_tokens == len("(low)"), ["x"]
    ),
    "response_format": Case({"type": "text"}, same, [{"type": "json_object"}, SCHEMA]),
    "safety_identifier": Case("me", same, [5]),
    "service_tier": Case(
        "auto", lambda a, b: (a.service_tier, b.service_tier) == (None, "default"),
        ["flex", "priority"],
    ),
    "store": Case(False, same, [True]),
    "tool_choice": Case("none", same, ["auto", "required"]),
    "tools": Case([], same, [[TOOL]]),
    "top_logprobs": Case(3, alternatives, [21, -1], {"logprobs": True}),
    "verbosity": Case(
        "low", lambda a, b: b.usage.prompt_tokens - a.usage.prompt_tokens == len("[low]"), ["x"]
    ),
    "web_search_options": Case(refused=[{}]),
}  # fmt: skip

CASES = {"completions": COMPLETIONS, "chat": CHAT}
ROWS = [(endpoint, name) for endpoint, cases in CASES.items() for name in cases]


def minimal(endpoint: str) -> dict[str, Any]:
    prompt = {"messages": USER} if endpoint == "chat" else {"prompt": "an example"}
    return {**prompt, "model": "tiny", "temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize("endpoint", CASES)
@pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI])
def test_each_parameter_of_the_client_has_a_case(kind: Any, endpoint: str) -> None:
    """A release of the client that knows more fails here."""
    with_key = kind(api_key="x", base_url="http://127.0.0.1:1")
    signature = inspect.signature(resource(with_key, endpoint).create)
    assert set(signature.parameters) == {*CASES[endpoint], *CLIENTS_OWN}
    assert all(case.effect or case.refused for case in CASES[endpoint].values())


def parameters_of(endpoint: str, name: str) -> dict[str, Any]:
    parameters = {**minimal(endpoint), **CASES[endpoint][name].base}
    if name in ("temperature", "max_completion_tokens"):  # with its default, or in its place
        parameters.pop({"max_completion_tokens": "max_tokens"}.get(name, name))
    return parameters


@pytest.mark.parametrize(
    ("endpoint", "name"), [row for row in ROWS if CASES[row[0]][row[1]].effect is not None]
)
def test_effect(create: Create, endpoint: str, name: str) -> None:
    case, parameters = CASES[endpoint][name], parameters_of(endpoint, name)
    plain = {**parameters}
    if name == "temperature":
        plain[name] = 0
    elif name == "max_completion_tokens":
        plain[name] = 12
    assert case.effect is not None
    assert case.effect(
        create(endpoint, **plain), create(endpoint, **{**parameters, name: case.value})
    )


@pytest.mark.parametrize(
    ("endpoint", "name"), [row for row in ROWS if CASES[row[0]][row[1]].refused]
)
def test_refusals_name_the_parameter(
    server: Server, create: Create, endpoint: str, name: str
) -> None:
    received = server.llm.stats["received"]
    for value in CASES[endpoint][name].refused:
        with pytest.raises(openai.BadRequestError) as caught:
            create(endpoint, **{**parameters_of(endpoint, name), name: value})
        error = caught.value
        assert error.status_code == 400 and error.type == "invalid_request_error"
        blamed = next(iter(value)) if name == "extra_body" else name
        assert error.param is not None and blamed in error.param, (value, error)
        assert blamed in error.message
    assert server.llm.stats["received"] == received


def test_extra_headers(client: OpenAI) -> None:
    for endpoint in CASES:
        api = resource(client, endpoint)
        raw = api.with_raw_response.create(
            **minimal(endpoint), extra_headers={"X-Request-Id": "mine-7"}
        )
        assert raw.headers["x-request-id"] == "mine-7"
        assert raw.parse()._request_id == "mine-7"  # as the client shows it
        assert api.create(**minimal(endpoint))._request_id not in (None, "mine-7")


def test_extra_query_is_refused_by_name(client: OpenAI) -> None:
    for endpoint in CASES:
        with pytest.raises(openai.BadRequestError) as caught:
            resource(client, endpoint).create(**minimal(endpoint), extra_query={"temperature": 1})
        assert caught.value.param == "temperature" and "query" in caught.value.message


# -- Streams and helpers --------------------------------------------------------------------------

# The client's helpers raise where an answer ended for its length: here it ends by itself.
ENDS = {"max_tokens": 20, "logit_bias": {EOS: 100}, "extra_body": {"min_tokens": 12}}


def test_the_chat_stream_helper(client: OpenAI) -> None:
    parameters = {**minimal("chat"), **ENDS, "logprobs": True, "top_logprobs": 2}
    plain = client.chat.completions.create(**parameters)
    kinds: dict[str, int] = {}
    text, scores = "", []
    with client.chat.completions.stream(
        **parameters, stream_options={"include_usage": True}
    ) as stream:
        for event in stream:
            kinds[event.type] = kinds.get(event.type, 0) + 1
            if event.type == "content.delta":
                text += event.delta
                assert event.snapshot == text
            elif event.type == "logprobs.content.delta":
                scores += event.content
            elif event.type == "content.done":
                assert event.content == text
        final = stream.get_final_completion()
    assert kinds["content.done"] == kinds["logprobs.content.done"] == 1
    assert kinds["chunk"] > kinds["content.delta"] > 1
    choice, expected = final.choices[0], plain.choices[0]
    assert text == choice.message.content == expected.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason == "stop"
    assert expected.logprobs is not None and expected.logprobs.content is not None
    found = [score.to_dict() for score in scores]
    assert found == [score.to_dict() for score in expected.logprobs.content]
    assert final.usage is not None and plain.usage is not None
    assert final.usage.total_tokens == plain.usage.total_tokens


def test_the_async_chat_stream_helper_with_choices(loop: Loop, client: OpenAI) -> None:
    parameters: dict[str, Any] = {**minimal("chat"), **SAMPLED, **ENDS, "n": 3}

    async def work() -> Any:
        async with loop.client.chat.completions.stream(**parameters) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    plain, final = client.chat.completions.create(**parameters), loop.run(work())
    seen, expected = (
        {c.index: (c.message.content, c.finish_reason) for c in reply.choices}
        for reply in (final, plain)
    )
    assert seen == expected
    assert len(seen) == 3


@pytest.mark.parametrize("endpoint", CASES)
def test_streams_of_several_choices_with_logprobs(create: Create, endpoint: str) -> None:
    scored = {"logprobs": True} if endpoint == "chat" else {"logprobs": 1}
    parameters = {**minimal(endpoint), **SAMPLED, **scored, "n": 2}
    plain = create(endpoint, **parameters)
    chunks = create(endpoint, **parameters, stream=True, stream_options={"include_usage": True})
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in plain.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
        scores = [c.logprobs for c in mine if c.logprobs is not None]
        if endpoint == "chat":
            assert mine[0].delta.role == "assistant"
            found = [t.logprob for part in scores for t in part.content]
            assert found == [t.logprob for t in choice.logprobs.content]
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        else:
            found = [value for part in scores for value in part.token_logprobs]
            assert found == choice.logprobs.token_logprobs
            assert "".join(c.text for c in mine) == choice.text
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        plain.usage.prompt_tokens, plain.usage.completion_tokens, plain.usage.total_tokens
    )  # fmt: skip


def test_many_async_streams_are_as_alone(client: OpenAI, loop: Loop) -> None:
    def parameters(i: int) -> dict[str, Any]:
        return {"model": "tiny", "prompt": f"{i}", "temperature": 2, "seed": i, "max_tokens": 40}

    async def one(i: int) -> str:
        stream = await loop.client.completions.create(**parameters(i), stream=True)
        return "".join([c.text async for chunk in stream for c in chunk.choices])

    async def work() -> list[str]:
        return await asyncio.gather(*map(one, range(20)))

    alone = [client.completions.create(**parameters(i)).choices[0].text for i in range(20)]
    assert loop.run(work()) == alone


def test_parse_needs_no_schema_and_refuses_one(client: OpenAI) -> None:
    from pydantic import BaseModel

    class Shape(BaseModel):
        corners: int

    plain = client.chat.completions.parse(**{**minimal("chat"), **ENDS})
    assert plain.choices[0].message.parsed is None and plain.choices[0].message.content
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**minimal("chat"))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.parse(**minimal("chat"), response_format=Shape)
    assert caught.value.param == "response_format"


def test_an_answer_may_come_back_as_a_message(client: OpenAI) -> None:
    first = client.chat.completions.create(**minimal("chat"))
    messages: list[Any] = [*USER, first.choices[0].message, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(**{**minimal("chat"), "messages": messages})
    assert second.usage is not None and first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_usage_tells_what_was_cached(client: OpenAI) -> None:
    for cached in (0, 192):  # the prompt has 202 tokens: 12 whole blocks of 16
        reply = client.completions.create(
            model="tiny", prompt="cached by" + "." * 192, max_tokens=1,
            extra_body={"cache_salt": "of this test"},
        )  # fmt: skip
        assert reply.usage is not None and reply.usage.prompt_tokens == 202
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == cached


def test_models(client: OpenAI, loop: Loop) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny-alias").id == "tiny-alias"

    async def work() -> list[str]:
        return [model.id async for model in loop.client.models.list()]

    assert loop.run(work()) == ["tiny", "tiny-alias"]


def test_the_bundled_model() -> None:
    """As the README shows it: a chat with the model that needs no download."""
    with serve(Path("nano-5m"), num_blocks=200) as server, OpenAI(**options(server)) as client:
        ask = client.chat.completions.create
        messages: Any = [{"role": "user", "content": "Tell me a story about a dragon."}]
        reply = ask(model="tiny", messages=messages, temperature=0, max_tokens=30)
        chunks = ask(model="tiny", messages=messages, temperature=0, max_tokens=30, stream=True)
        assert streamed_text(chunks) == texts(reply)[0]
        assert len(texts(reply)[0].split()) > 10  # words of English, not bytes
        server.wait_idle()


# -- Exceptions -----------------------------------------------------------------------------------


def test_wrong_keys(model_dir: Path) -> None:
    with serve(model_dir, api_key=["first", "second"]) as server:
        for key in ("first", "second"):
            with OpenAI(**options(server, api_key=key)) as client:
                assert client.models.list().data
        with OpenAI(**options(server, api_key="third")) as client:
            for call in (
                client.models.list,
                lambda: client.completions.create(model="tiny", prompt="x"),
            ):
                with pytest.raises(openai.AuthenticationError) as caught:
                    call()
                assert caught.value.status_code == 401 and caught.value.code == "invalid_api_key"
        assert server.llm.stats["received"] == 0


def test_what_is_not_there(client: OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="other", prompt="x"),
        lambda: client.models.retrieve("other"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
    for call in (
        lambda: client.embeddings.create(model="tiny", input="x", encoding_format="float"),
        lambda: client.responses.create(model="tiny", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no POST /v1/"):
            call()


def test_too_long_a_prompt(create: Create) -> None:
    for endpoint, name in (("completions", "prompt"), ("chat", "messages")):
        text: Any = "x" * 200_001
        if endpoint == "chat":
            text = [{"role": "user", "content": text}]
        with pytest.raises(openai.BadRequestError) as caught:
            create(endpoint, model="tiny", **{name: text})
        assert caught.value.code == "context_length_exceeded" and caught.value.param == name


def test_a_full_queue_and_coming_again(endless_model_dir: Path) -> None:
    """429 is RateLimitError; a client with retries comes again after Retry-After seconds."""
    with (
        serve(endless_model_dir, max_num_seqs=1, max_waiting=1) as server,
        OpenAI(**options(server)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        ask: dict[str, Any] = {"model": "tiny", "prompt": "x"}
        running = client.completions.create(**ask, **ENDLESS, stream=True)
        next(running)
        waiting = pool.submit(client.completions.create, **ask, max_tokens=1)
        server.wait_for(lambda s: s["waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**ask)
        assert caught.value.status_code == 429 and caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1

        patient = client.with_options(max_retries=3)
        again = threading.Thread(target=lambda: (refused(server, 2), running.close()))
        again.start()
        assert patient.completions.create(**ask, max_tokens=2).usage.completion_tokens == 2
        again.join()
        assert waiting.result().usage.completion_tokens == 1
        server.wait_idle()


def refused(server: Server, times: int) -> None:
    """Waits until so many requests have got a 429."""
    deadline = time.monotonic() + 30
    line = f'requests_total{{endpoint="completions",status="429"}} {times}.0'
    while line not in server.get("/metrics").body.decode():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("phase", ["loading", "draining"])
def test_a_server_that_is_not_ready(server: Server, create: Create, phase: str) -> None:
    server.state.phase = phase
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            create("completions", model="tiny", prompt="x")
        assert caught.value.status_code == 503 and phase in caught.value.message
    finally:
        server.state.phase = "ready"


def test_limits_of_the_server(endless_model_dir: Path) -> None:
    limits = {"request_timeout": 0.3, "max_request_bytes": 1000}
    with serve(endless_model_dir, **limits) as server, OpenAI(**options(server)) as client:
        ask: dict[str, Any] = {"model": "tiny", "prompt": "x", **ENDLESS}
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**ask)
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        seen = 0
        with pytest.raises(openai.APIError) as in_stream:
            for _ in client.completions.create(**ask, stream=True):
                seen += 1
        # The status was 200 by then: the stream's last event says what is wrong.
        assert seen > 0 and in_stream.value.code == "timeout"
        with pytest.raises(openai.APIStatusError) as large:
            client.completions.create(model="tiny", prompt="x" * 2000)
        assert large.value.status_code == 413
        server.wait_idle()


# -- Clients that go away -------------------------------------------------------------------------


def ask_endless(endpoint: str) -> dict[str, Any]:
    return {**minimal(endpoint), **ENDLESS}


@pytest.mark.parametrize("endpoint", CASES)
def test_a_timeout_of_the_client_frees_the_blocks(
    server: Server, create: Create, endpoint: str
) -> None:
    aborted = server.wait_idle()["aborted"]
    with pytest.raises(openai.APITimeoutError):
        create(endpoint, **ask_endless(endpoint), timeout=0.3)
    assert server.wait_idle()["aborted"] == aborted + 1


@pytest.mark.parametrize("endpoint", CASES)
def test_a_closed_stream_frees_the_blocks(server: Server, client: OpenAI, endpoint: str) -> None:
    aborted = server.wait_idle()["aborted"]
    with resource(client, endpoint).create(**ask_endless(endpoint), stream=True) as stream:
        next(stream)
        assert server.llm.stats["running"] == 1 and server.llm.stats["blocks_used"] > 0
    assert server.wait_idle()["aborted"] == aborted + 1


def test_leaving_the_stream_helper_frees_the_blocks(server: Server, client: OpenAI) -> None:
    aborted = server.wait_idle()["aborted"]
    with client.chat.completions.stream(**ask_endless("chat")) as stream:
        assert next(event for event in stream if event.type == "content.delta")
        server.wait_for(lambda s: s["running"] == 1)
    assert server.wait_idle()["aborted"] == aborted + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", CASES)
def test_a_cancelled_task_frees_the_blocks(
    server: Server, loop: Loop, endpoint: str, stream: bool
) -> None:
    aborted = server.wait_idle()["aborted"]

    async def read() -> None:
        reply = await resource(loop.client, endpoint).create(
            **{**ask_endless(endpoint), "n": 2}, stream=stream
        )
        async for _ in reply:
            pass

    async def work() -> None:
        task = asyncio.create_task(read())
        await asyncio.to_thread(
            server.wait_for, lambda s: s["running_seqs"] == 2 and s["generated_tokens"] > 0
        )
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run(work())
    assert server.wait_idle()["aborted"] == aborted + 1
