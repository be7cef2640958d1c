"""The HTTP API: each field of a request has an effect or is refused by name, errors have OpenAI's
form, and the counts are right."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nano_inference import __version__
from nano_inference.random_model import write_random_model
from nano_inference.server.protocol import (
    CHAT_FIXED,
    COMPLETION_FIXED,
    ChatRequest,
    CompletionRequest,
)
from server_helpers import TEMPLATE, Reply, Server, serve

DOCS = Path(__file__).parents[2] / "docs"
EOS = 257
USER = [{"role": "user", "content": "an example"}]


FILL_IN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_random_model(tmp_path_factory.mktemp("served") / "tiny", vocab_size=264)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(list(FILL_IN))  # 261, 262, 263
    tokenizer.save(str(model / "tokenizer.json"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with serve(model, scheduling_policy="priority") as server:
        yield server
        server.wait_idle()


# -- A row for each field -------------------------------------------------------------------------


@dataclass
class Row:
    """effect(reply without the field, reply with it); each refused value is a 400 naming it."""

    value: Any
    effect: Callable[[Any, Any], Any]
    refused: list[Any] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)


def texts(reply: Reply) -> list[str]:
    assert reply.status == 200, reply
    choices = reply.json["choices"]
    return [c["text"] if "text" in c else c["message"]["content"] for c in choices]


def differs(a: Reply, b: Reply) -> bool:
    return texts(a) != texts(b)


def same(a: Reply, b: Reply) -> bool:
    return texts(a) == texts(b)


def usage(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply
    return reply.json["usage"]


def turns_into(before: str | None, after: str) -> Callable[[Reply, Reply], bool]:
    def check(a: Reply, b: Reply) -> bool:
        return (before is None or texts(a) == [before]) and texts(b) == [after]

    return check


NO_INT = ["1", 1.5, True, 10**30]
NO_NUMBER = ["1", True, [1], 10**400]
NO_BOOL = ["true", 1, 0]
NO_STRINGS = [5, [5], [""], {"a": 1}, ["q"] * 257, ["q" * 1001]]
NO_IDS = [5, "x", ["a"], [-1], [1.5], [True], [264], [2**31]]

SAMPLED = {"temperature": 1.0, "seed": 1}
ONLY_A = {"allowed_token_ids": [97]}
A_AND_B = {"allowed_token_ids": [97, 98], "logit_bias": {"97": 50}}
TO_EOS = {"logit_bias": {str(EOS): 100}}

COMMON: dict[str, Row] = {
    "model": Row("tiny-alias", lambda a, b: same(a, b) and b.json["model"] == "tiny", [5, True]),
    "stream": Row(
        True,
        lambda a, b: texts(a) == ["".join(
            c.get("text") or c.get("delta", {}).get("content") or ""
            for e in b.events for c in e["choices"])],
        NO_BOOL,
    ),
    "stream_options": Row(
        {"include_usage": True, "include_obfuscation": True},
        lambda a, b: all("usage" not in e and "obfuscation" not in e for e in a.events)
        and b.events[-1]["usage"]["completion_tokens"] == 12 and b.events[-1]["choices"] == []
        and all(e["usage"] is None and e["obfuscation"] for e in b.events[:-1]),
        [5, {"include_usage": 1}, {"x": 1}, []],
        {"stream": True},
    ),
    "n": Row(
        3, lambda a, b: len(texts(a)) == 1 and len(set(texts(b))) == 3,
        [0, -1, 10**6, *NO_INT], SAMPLED,
    ),
    "frequency_penalty": Row(2, differs, [2.1, -2.1, *NO_NUMBER], {"max_tokens": 60}),
    "presence_penalty": Row(2.0, differs, [2.1, -2.1, *NO_NUMBER], {"max_tokens": 60}),
    "repetition_penalty": Row(5.0, differs, [0, -1, *NO_NUMBER]),
    "temperature": Row(1.5, differs, [-0.1, *NO_NUMBER], {"seed": 1}),
    "top_p": Row(1e-4, lambda a, b: differs(a, b), [0, 1.1, -1, *NO_NUMBER], SAMPLED),
    "top_k": Row(1, differs, [-2, *NO_INT], SAMPLED),
    "min_p": Row(1.0, differs, [-0.1, 1.1, *NO_NUMBER], SAMPLED),
    "seed": Row(2, differs, NO_INT, SAMPLED),
    "logit_bias": Row(
        {"120": 100}, turns_into(None, "x" * 12),
        [5, [1], {"a": 1}, {"-1": 1}, {"264": 1}, {"1": 101}, {"1": "x"}, {"9" * 30: 1}],
    ),
    "allowed_token_ids": Row([120], turns_into(None, "x" * 12), [[], *NO_IDS]),
    "bad_words": Row(["aa"], turns_into("a" * 12, "ab" * 6), ["aa", *NO_STRINGS], A_AND_B),
    "stop": Row(["aaa"], turns_into("a" * 12, ""), ["", *NO_STRINGS], ONLY_A),
    "stop_token_ids": Row(
        [97],
        lambda a, b: usage(b)["completion_tokens"] == 1
        and b.json["choices"][0]["stop_reason"] == 97
        and b.json["choices"][0]["finish_reason"] == "stop",
        NO_IDS, ONLY_A,
    ),
    "ignore_eos": Row(
        True,
        lambda a, b: usage(a)["completion_tokens"] == 1 and usage(b)["completion_tokens"] == 12,
        NO_BOOL, TO_EOS,
    ),
    "min_tokens": Row(
        5,
        lambda a, b: usage(a)["completion_tokens"] == 1 and usage(b)["completion_tokens"] == 6,
        [-1, 13, *NO_INT], TO_EOS,
    ),
    "skip_special_tokens": Row(
        False, turns_into("", "<|user|>" * 2), NO_BOOL,
        {"allowed_token_ids": [258], "max_tokens": 2},
    ),
    "include_stop_str_in_output": Row(
        True, turns_into("", "aaa"), NO_BOOL, {**ONLY_A, "stop": "aaa"}
    ),
    "truncate_prompt_tokens": Row(
        4, lambda a, b: usage(a)["prompt_tokens"] > 10 and usage(b)["prompt_tokens"] == 4,
        [0, -2, *NO_INT],
    ),
    "priority": Row(3, same, [2**31, *NO_INT]),  # its effect on the order has a test of its own
    "user": Row("me", same, [5, True]),
    "safety_identifier": Row("me", same, [5]),
    "prompt_cache_key": Row("me", same, [5]),
    "metadata": Row({"a": "b"}, same, [5, {"a": 1}]),
    "service_tier": Row(
        "auto", lambda a, b: "service_tier" not in a.json and b.json["service_tier"] == "default",
        ["flex", "priority", 5],
    ),
}  # fmt: skip


def legacy(reply: Reply) -> Any:
    assert reply.status == 200, reply
    return reply.json["choices"][0]["logprobs"]


def reads_logprobs(a: Reply, b: Reply) -> bool:
    found = legacy(b)
    # Three letters at temperature 0 at most: the chosen one is among them.
    return (
        legacy(a) is None
        and "".join(found["tokens"]) == texts(b)[0]
        and found["text_offset"] == list(range(12))
        and [len(top) for top in found["top_logprobs"]] == [3] * 12
        and found["token_logprobs"] == [max(top.values()) for top in found["top_logprobs"]]
    )


def scores_the_prompt(scores: list[Any]) -> bool:
    tokens = zip(b"an example", scores[1:], strict=True)
    return scores[0] is None and all(str(token) in entry for token, entry in tokens)


COMPLETION: dict[str, Row] = {
    **COMMON,
    "prompt": Row([97, 98], lambda a, b: usage(b)["prompt_tokens"] == 2 and differs(a, b),
                  [5, True, [], [True], [["a"]], ["a", 1], [264], [-1], [[1], 2], {"a": 1}]),
    "max_tokens": Row(3, lambda a, b: usage(a)["completion_tokens"] == 12
                      and usage(b)["completion_tokens"] == 3, [0, -1, 2048, *NO_INT]),
    "logprobs": Row(3, reads_logprobs, [-2, 21, *NO_INT]),
    "best_of": Row(3, lambda a, b: usage(b)["completion_tokens"] == 36, [0, 257, *NO_INT]),
    "suffix": Row("end", lambda a, b: usage(b)["prompt_tokens"] - usage(a)["prompt_tokens"] == 6,
                  [5, ["a"]]),
    "echo": Row(True, lambda a, b: texts(b) == ["an example" + texts(a)[0]], NO_BOOL),
    "prompt_logprobs": Row(
        1,
        lambda a, b: "prompt_logprobs" not in a.json["choices"][0]
        and scores_the_prompt(b.json["choices"][0]["prompt_logprobs"]),
        [-2, 21, *NO_INT],
    ),
    "add_special_tokens": Row(
        False, lambda a, b: usage(a)["prompt_tokens"] - usage(b)["prompt_tokens"] == 1, NO_BOOL
    ),
    "cache_salt": Row("pepper", same, ["", 5]),
}  # fmt: skip

FINAL = {
    "messages": [*USER, {"role": "assistant", "content": "Well, "}],
    "continue_final_message": True,
}


def reads_chat_logprobs(a: Reply, b: Reply) -> bool:
    content = b.json["choices"][0]["logprobs"]["content"]
    return (
        a.json["choices"][0]["logprobs"] is None
        and bytes(byte for token in content for byte in token["bytes"]).decode() == texts(b)[0]
        and all(token["top_logprobs"] == [] for token in content)
    )


CHAT: dict[str, Row] = {
    **COMMON,
    "messages": Row(
        [{"role": "system", "content": "Be brief"}, *USER], differs,
        [5, [], [5], [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}],
         [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
         [{"role": "user", "content": "x", "y": 1}],
         [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
         [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
         [{"role": "user", "content": [{"type": "text"}]}],
         [{"role": "assistant", "content": "x", "tool_calls": [{}]}]],
    ),
    "max_tokens": Row(3, lambda a, b: usage(b)["completion_tokens"] == 3, [0, -1, 2048, *NO_INT]),
    "max_completion_tokens": Row(
        12, lambda a, b: usage(b)["completion_tokens"] == 12, [0, -1, 2048, *NO_INT]
    ),
    "logprobs": Row(True, reads_chat_logprobs, [1, 0, "x"]),
    "top_logprobs": Row(
        2,
        lambda a, b: [len(t["top_logprobs"]) for t in b.json["choices"][0]["logprobs"]["content"]]
        == [2] * 12,
        [-1, 21, *NO_INT], {"logprobs": True},
    ),
    "echo": Row(True, lambda a, b: texts(b) == ["Well, " + texts(a)[0]], NO_BOOL, FINAL),
    "add_generation_prompt": Row(
        False, lambda a, b: usage(a)["prompt_tokens"] - usage(b)["prompt_tokens"] == 1, NO_BOOL
    ),
    "continue_final_message": Row(
        True, lambda a, b: usage(a)["prompt_tokens"] - usage(b)["prompt_tokens"] == 1, NO_BOOL,
        {"messages": FINAL["messages"]},
    ),
    "chat_template_kwargs": Row(
        {"enable_thinking": True},
        lambda a, b: usage(b)["prompt_tokens"] - usage(a)["prompt_tokens"] == len("<think>\n"),
        [5, {"unknown": 1}, {"messages": []}, {"add_generation_prompt": False}],
    ),
    "reasoning_effort": Row(
        "low", lambda a, b: usage(b)["prompt_tokens"] - usage(a)["prompt_tokens"] == len("(low)"),
        ["little", 5],
    ),
    "verbosity": Row(
        "low", lambda a, b: usage(b)["prompt_tokens"] - usage(a)["prompt_tokens"] == len("[low]"),
        ["much", 5],
    ),
    "prompt_logprobs": Row(
        0, lambda a, b: "prompt_logprobs" not in a.json
        and len(b.json["prompt_logprobs"]) == usage(b)["prompt_tokens"], [-2, 21, *NO_INT],
    ),
    "add_special_tokens": Row(
        True, lambda a, b: usage(b)["prompt_tokens"] - usage(a)["prompt_tokens"] == 1, NO_BOOL
    ),
    "cache_salt": Row("pepper", same, ["", 5]),
}  # fmt: skip

TABLES = {"completions": COMPLETION, "chat/completions": CHAT}
FIXED = {"completions": COMPLETION_FIXED, "chat/completions": CHAT_FIXED}
CASES = [(endpoint, name) for endpoint, table in TABLES.items() for name in table]


def minimal(endpoint: str) -> dict[str, Any]:
    if endpoint == "completions":
        return {"prompt": "an example", "temperature": 0, "max_tokens": 12}
    return {"messages": USER, "temperature": 0, "max_tokens": 12}


def ask(server: Server, endpoint: str, body: dict[str, Any]) -> Reply:
    return server.post(f"/v1/{endpoint}", body)


@pytest.mark.parametrize("endpoint", TABLES)
def test_the_tables_have_every_field(endpoint: str) -> None:
    kind = CompletionRequest if endpoint == "completions" else ChatRequest
    assert set(TABLES[endpoint]) == set(kind.__struct_fields__)


# From OpenAI's reference of the two endpoints.
OPENAI_CHAT = """messages model audio frequency_penalty function_call functions logit_bias logprobs
    max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction
    presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort
    response_format safety_identifier seed service_tier stop store stream stream_options temperature
    tool_choice tools top_logprobs top_p user verbosity web_search_options"""
OPENAI_COMPLETION = """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n
    presence_penalty seed stop stream stream_options suffix temperature top_p user"""


def test_every_documented_field_is_known() -> None:
    assert set(OPENAI_CHAT.split()) <= {*CHAT, *CHAT_FIXED}
    assert set(OPENAI_COMPLETION.split()) <= {*COMPLETION, *COMPLETION_FIXED}


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_field_has_an_effect(server: Server, endpoint: str, name: str) -> None:
    row = TABLES[endpoint][name]
    body = {**minimal(endpoint), **row.base}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    elif name == "temperature":
        body[name] = 0
    assert row.effect(ask(server, endpoint, body), ask(server, endpoint, {**body, name: row.value}))


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_impossible_values_are_refused_by_name(server: Server, endpoint: str, name: str) -> None:
    row = TABLES[endpoint][name]
    before = server.llm.stats["received"]
    for value in row.refused:
        body = {**minimal(endpoint), **row.base, name: value}
        if name == "max_completion_tokens":
            del body["max_tokens"]
        reply = ask(server, endpoint, body)
        assert reply.status == 400, (value, reply)
        if value not in (10**30, 10**400):  # then the JSON itself may be refused
            assert name in (reply.error["param"] or ""), (value, reply)
            assert name in reply.error["message"], (value, reply)
    assert server.llm.stats["received"] == before


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_null_is_as_if_not_given(server: Server, endpoint: str, name: str) -> None:
    body = minimal(endpoint)
    body.pop(name, None)
    without, null = ask(server, endpoint, body), ask(server, endpoint, {**body, name: None})
    if name == "messages":
        assert (without.status, null.status) == (400, 400)
    elif name != "temperature":  # a random seed each
        assert same(without, null)
    assert null.status in (200, 400)


@pytest.mark.parametrize(
    ("endpoint", "name"), [(e, name) for e, table in FIXED.items() for name in table]
)
def test_fixed_fields(server: Server, endpoint: str, name: str) -> None:
    body, (possible, _) = minimal(endpoint), FIXED[endpoint][name]
    plain = ask(server, endpoint, body)
    for value in possible:
        assert same(plain, ask(server, endpoint, {**body, name: value}))
    for value in ("other", 7, [1], {"type": "json_object"}):
        reply = ask(server, endpoint, {**body, name: value})
        assert reply.status == 400 and reply.error["param"] == name
        assert reply.error["message"].startswith(f"{name} is not supported, only ")


@pytest.mark.parametrize("endpoint", TABLES)
def test_fixed_fields_are_documented(endpoint: str) -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    for name, (possible, why) in FIXED[endpoint].items():
        (row,) = re.findall(rf"^\| `{name}`.*$", text, flags=re.M)
        assert row.endswith(f"| {why} |")
        assert all(f"`{json.dumps(value)}`" in row for value in possible if value not in (None, 1))
    for name in ("user", "safety_identifier", "prompt_cache_key", "metadata", "service_tier"):
        assert f"`{name}`" in text


@pytest.mark.parametrize("endpoint", TABLES)
@pytest.mark.parametrize("name", ["temprature", "x", "a\u0000b", "é"])
def test_unknown_fields_are_refused_by_name(server: Server, endpoint: str, name: str) -> None:
    reply = ask(server, endpoint, {**minimal(endpoint), name: 1})
    assert reply.status == 400 and reply.error["param"] == name
    if name == "temprature":
        assert "did you mean 'temperature'" in reply.error["message"]


def test_fields_that_need_others(server: Server) -> None:
    def param(reply: Reply) -> Any:
        assert reply.status == 400, reply
        return reply.error["param"]

    assert param(server.complete(prompt="x", stream_options={})) == "stream_options"
    assert param(server.complete(prompt="x", stream=True, prompt_logprobs=1)) == "prompt_logprobs"
    assert param(server.complete(prompt="x", max_tokens=0)) == "max_tokens"
    assert param(server.complete(prompt="x", n=3, best_of=2)) == "best_of"
    assert param(server.complete(prompt="x", best_of=2, stream=True)) == "best_of"
    assert param(server.chat(top_logprobs=2)) == "top_logprobs"
    assert param(server.chat(echo=True)) == "echo"
    assert param(server.chat(max_tokens=2, max_completion_tokens=3)) == "max_tokens"
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert param(server.chat(**both)) == "add_generation_prompt"


# -- Bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/js",
    ],
)
def test_only_json_is_taken(server: Server, path: str, kind: str) -> None:
    """All that a page elsewhere can send without a preflight is refused."""
    body = b'{"prompt": "x"}'
    reply = server.call("POST", path, body, **{"Content-Type": kind})
    assert reply.status == 415 and "application/json" in reply.error["message"]
    for name in ("application/json; charset=utf-8", "Application/JSON"):
        assert server.call("POST", path, body, **{"Content-Type": name}).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b"null", b'"x"', b"{} x", b'{"prompt": NaN}', b'{"prompt": 1e999}',
        b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"prompt": 1' + b"0" * 5000 + b"}", b"\xef\xbb\xbf{}", b"\x00",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
)
def test_malformed_bodies(server: Server, path: str, body: bytes) -> None:
    reply = server.post(path, body)
    assert reply.status == 400 and reply.error["type"] == "invalid_request_error"


def test_null_bytes_and_the_like_are_text(server: Server) -> None:
    for text in ("a\u0000b", "\u2028\ufffe\U0010ffff", "é" * 100, "\r\n\t"):
        prompt = {"prompt": text, "max_tokens": 1, "echo": True, "allowed_token_ids": [97]}
        assert texts(server.complete(**prompt)) == [text + "a"]
        assert server.chat(text, max_tokens=1).status == 200
        tokens = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json[
            "tokens"
        ]
        assert bytes(tokens) == text.encode()
        assert server.post("/detokenize", {"tokens": tokens}).json == {"prompt": text}


# -- Completions ----------------------------------------------------------------------------------


def test_several_prompts_each_with_choices(server: Server) -> None:
    prompts = ["first", "second one", "third"]
    body = {"n": 2, "temperature": 1, "seed": 3, "max_tokens": 9}
    reply = server.complete(prompt=prompts, **body)
    assert [c["index"] for c in reply.json["choices"]] == list(range(6))
    alone = [text for p in prompts for text in texts(server.complete(prompt=p, **body))]
    assert texts(reply) == alone
    ids = [[256, *p.encode()] for p in prompts]
    assert texts(server.complete(prompt=ids, **body)) == alone
    assert usage(reply)["prompt_tokens"] == sum(map(len, ids))  # once, not n times
    assert usage(reply)["completion_tokens"] == 6 * 9
    assert usage(reply)["total_tokens"] == sum(map(len, ids)) + 6 * 9


def test_one_impossible_prompt_of_several(server: Server) -> None:
    before = server.llm.stats["received"]
    reply = server.complete(prompt=["fine", "x" * 3000])
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
    assert reply.error["param"] == "prompt[1]" and "prompt 1:" in reply.error["message"]
    assert server.llm.stats["received"] == before


def test_best_of_returns_the_likeliest(server: Server) -> None:
    body = {"prompt": ["an example", "others"], "seed": 7, "max_tokens": 5, "temperature": 1.5}
    of_all = server.complete(**body, n=6, logprobs=0).json
    best = server.complete(**body, n=2, best_of=6, echo=True).json
    assert best["usage"]["completion_tokens"] == of_all["usage"]["completion_tokens"]
    assert [c["index"] for c in best["choices"]] == [0, 1, 2, 3]
    for i, prompt in enumerate(body["prompt"]):
        ranked = sorted(
            of_all["choices"][6 * i : 6 * i + 6],
            key=lambda c: -sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]),
        )
        found = best["choices"][2 * i : 2 * i + 2]
        assert [c["text"] for c in found] == [prompt + c["text"] for c in ranked[:2]]
        assert all(c["logprobs"] is None for c in found)


def test_no_prompt_begins_a_document(server: Server) -> None:
    body = {"temperature": 0, "max_tokens": 4}
    assert texts(server.complete(**body)) == texts(server.complete(prompt=[256], **body))


def test_sixteen_tokens_unless_said_otherwise(server: Server) -> None:
    assert usage(server.complete(prompt="x", ignore_eos=True))["completion_tokens"] == 16
    full = usage(server.chat(ignore_eos=True))
    assert full["total_tokens"] == 2048


def test_echo_with_logprobs_scores_the_prompt(server: Server) -> None:
    ask = {"prompt": "scored", "echo": True, "logprobs": 2, "temperature": 0}
    whole = legacy(server.complete(max_tokens=3, **ask))
    assert whole["tokens"][:7] == ["<s>", *"scored"] and len(whole["tokens"]) == 10
    # The special token is not in the text.
    assert whole["text_offset"] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert whole["token_logprobs"][0] is None and whole["top_logprobs"][0] is None
    assert all(v <= 0 for v in whole["token_logprobs"][1:])
    # The prompt alone, and what follows scored as a prompt: the same numbers.
    prompt = server.complete(max_tokens=0, **ask)
    assert texts(prompt) == ["scored"] and usage(prompt)["completion_tokens"] == 0
    assert legacy(prompt) == {k: v[:7] for k, v in whole.items()}
    text = "scored" + "".join(whole["tokens"][7:])
    again = legacy(server.complete(**{**ask, "prompt": text, "max_tokens": 0}))
    assert again["token_logprobs"] == whole["token_logprobs"]


def test_logprobs_of_parts_of_characters(server: Server) -> None:
    body = {"prompt": "é", "echo": True, "logprobs": 0, "max_tokens": 0}
    found = legacy(server.complete(**body))
    assert found["tokens"] == ["<s>", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["text_offset"] == [0, 0, 0]


def test_prompt_logprobs_beside_echoed_ones(server: Server) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "prompt_logprobs": 4, "max_tokens": 1}
    choice = server.complete(**body).json["choices"][0]
    assert {len(e) for e in choice["prompt_logprobs"][1:]} <= {4, 5}
    assert {len(e) for e in choice["logprobs"]["top_logprobs"][1:]} <= {1, 2}


# -- Usage, caching, scheduling -------------------------------------------------------------------


def test_nothing_after_a_stop_string_counts(server: Server) -> None:
    reply = server.complete(prompt="x", stop="aaa", max_tokens=50, **ONLY_A)
    assert texts(reply) == [""] and usage(reply)["completion_tokens"] == 3
    choice = reply.json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "aaa")


def test_cached_tokens_and_salts(server: Server) -> None:
    def cached(**body: Any) -> int:
        reply = server.complete(prompt="cached prefix " * 20, max_tokens=1, **body)
        return int(usage(reply)["prompt_tokens_details"]["cached_tokens"])

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") >= 256
    assert cached(cache_salt="two") == 0


def test_the_middle_is_filled_in(server: Server, model_dir: Path) -> None:
    """As if the prompt had been written with the model's own tokens for it."""
    pre, suf, mid = FILL_IN
    for prompt in ("be", [98, 101], None):
        reply = server.complete(prompt=prompt, suffix="end", temperature=0, max_tokens=8)
        begin = "" if isinstance(prompt, list) else "<s>"
        text = f"{begin}{pre}{'' if prompt is None else 'be'}{suf}end{mid}"
        same = {"prompt": text, "add_special_tokens": False, "temperature": 0, "max_tokens": 8}
        assert texts(reply) == texts(server.complete(**same))
    assert server.complete(prompt="x", suffix="e", echo=True).error["param"] == "suffix"
    with serve(model_dir) as plain:
        reply = plain.complete(prompt="x", suffix="end")
        assert reply.status == 400 and reply.error["param"] == "suffix"
        assert plain.complete(prompt="x", suffix="", max_tokens=1).status == 200


def test_priority_needs_its_policy(server: Server, model_dir: Path) -> None:
    assert server.complete(prompt="x", priority=-5).status == 200
    with serve(model_dir) as plain:
        reply = plain.complete(prompt="x", priority=1)
        assert reply.status == 400 and reply.error["param"] == "priority"
        assert plain.complete(prompt="x", priority=0).status == 200


def test_the_models_own_defaults(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "greedy")
    settings = {"eos_token_id": 257, "temperature": 0.0, "max_new_tokens": 7}
    (model / "generation_config.json").write_text(json.dumps(settings))
    with serve(model) as server:
        body = {"max_tokens": 9, "ignore_eos": True, "prompt": "x"}
        assert len({texts(server.complete(**body))[0] for _ in range(3)}) == 1  # greedy
        assert usage(server.chat(ignore_eos=True))["completion_tokens"] == 7
        assert texts(server.complete(**body)) != texts(server.complete(**body, temperature=3))


# -- Chat -----------------------------------------------------------------------------------------


def prompt_of(server: Server, **body: Any) -> str:
    tokens = server.post("/tokenize", body).json["tokens"]
    return str(server.post("/detokenize", {"tokens": tokens}).json["prompt"])


def test_roles_names_and_parts(server: Server) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
    ]
    shown = prompt_of(server, messages=messages)
    # The template has no role of developers: they are what was called system.
    assert shown == "<s><|system|>Be kind<|user|>Ada: one\ntwo<|assistant|>three<|assistant|>"
    more = {"continue_final_message": True}
    assert prompt_of(server, messages=messages, **more) == shown.removesuffix("<|assistant|>")


def test_what_the_template_does_not_read_is_refused(model_dir: Path) -> None:
    with serve(model_dir) as plain:
        named = [{"role": "user", "content": "x", "name": "Ada"}]
        reply = plain.chat(messages=named)
        assert reply.status == 400 and reply.error["param"] == "messages[0].name"
        for field in ("reasoning_effort", "verbosity"):
            reply = plain.chat(**{field: "low"})
            assert reply.status == 400 and reply.error["param"] == field
        assert plain.chat(verbosity="medium", max_tokens=1).status == 200
        assert "reasoning_content" not in plain.chat(max_tokens=1).json["choices"][0]["message"]


# -- Other routes ---------------------------------------------------------------------------------


def test_models(server: Server) -> None:
    names = ["tiny", "tiny-alias"]
    listed = server.get("/v1/models").json
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == names
    for name in names:
        card = server.get(f"/v1/models/{name}").json
        assert card["id"] == name and card["object"] == "model" and card["max_model_len"] == 2048
    for reply in (server.get("/v1/models/other/name"), server.complete(model="other", prompt="x")):
        assert reply.status == 404 and reply.error["code"] == "model_not_found"


def test_routes_and_methods(server: Server) -> None:
    assert server.get("/nothing").error["message"].startswith("there is no GET /nothing")
    assert server.get("/nothing").status == 404
    assert server.get("//nothing/x").error["message"].startswith("there is no GET //nothing/x")
    wrong = server.get("/v1/completions")
    assert wrong.status == 405 and wrong.error["param"] is None and wrong.headers["allow"] == "POST"
    assert server.post("/health", {}).status == 405
    assert server.get("/version").json == {"version": __version__}
    assert server.get("/health").json == {"status": "ok"}
    assert b"nano_inference_" in server.get("/metrics").body


def test_too_large_a_body(model_dir: Path) -> None:
    with serve(model_dir, max_request_bytes=1000) as small:
        reply = small.complete(prompt="x" * 2000)
        assert reply.status == 413 and "1000" in reply.error["message"]
        assert small.complete(prompt="x", max_tokens=1).status == 200


def test_tokenize(server: Server) -> None:
    reply = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json
    assert reply["tokens"] == [256, 104, 195, 169] and reply["count"] == 4
    assert reply["token_strs"] == ["<s>", "h", "\ufffd", "\ufffd"]
    for path, body, param in [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "y": 1}, "y"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [264]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ]:
        refusal = server.post(path, body)
        assert refusal.status == 400 and refusal.error["param"] == param, refusal


def test_large_prompts_are_tokenized_aside_and_the_same(server: Server) -> None:
    reply = server.complete(prompt="x" * 40_000, truncate_prompt_tokens=100, max_tokens=4)
    assert usage(reply)["prompt_tokens"] == 100
    assert server.post("/tokenize", {"prompt": "x" * 40_000}).json["count"] == 40_001


def test_long_texts_are_tokenized_while_others_go_on(server: Server) -> None:
    """Threads alone are no help if one of them keeps Python's lock."""
    tokenizer = server.llm.get_tokenizer()
    begin = threading.Event()

    def encode() -> None:
        begin.wait()
        tokenizer.encode("an example " * 100_000)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(encode)
        begin.set()
        steps = 0
        while not done.done():
            time.sleep(0.001)
            steps += 1
        done.result()
    assert steps > 10


def test_trace(server: Server) -> None:
    first = server.llm.stats["steps"]
    server.complete(prompt="x", max_tokens=3, ignore_eos=True)
    records = server.get(f"/v1/engine/trace?since_step={first + 1}").json["data"]
    assert [r["step"] for r in records] == [first + 1, first + 2, first + 3]
    assert [len(r["entries"]) for r in records] == [1, 1, 1]
    for query in ("since_step=x", "since_step=-1", "since_step=" + "9" * 30, "other=1"):
        reply = server.get("/v1/engine/trace?" + query)
        assert reply.status == 400 and reply.error["param"] == query.split("=")[0]


def test_the_openapi_document_names_every_field_and_error(server: Server) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    for endpoint, kind in (
        ("completions", "CompletionRequest"),
        ("chat/completions", "ChatRequest"),
    ):
        schema = schemas[kind]
        assert set(schema["properties"]) == {*TABLES[endpoint], *FIXED[endpoint]}
        assert schema["additionalProperties"] is False
        responses = document["paths"][f"/v1/{endpoint}"]["post"]["responses"]
        assert set(responses) >= {"200", "400", "401", "404", "413", "429", "500", "503", "504"}

    limits = json.dumps(schemas["ChatRequest"]["properties"]["n"])
    assert f'"maximum": {server.llm.engine.core.config.max_num_seqs}' in limits
    assert '"maximum": 263' in json.dumps(schemas["CompletionRequest"]["properties"]["prompt"])

    def refs(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            node = list(node.values())
        if isinstance(node, list):
            for part in node:
                yield from refs(part)

    for ref in set(refs(document)):
        assert ref.removeprefix("#/components/schemas/") in schemas


def test_the_document_knows_every_route(server: Server) -> None:
    paths = server.get("/openapi.json").json["paths"]
    for path, operations in paths.items():
        for method in operations:
            reply = server.call(method.upper(), path.replace("{model}", "tiny") + "?x=1", b"{")
            if path.endswith("/stream"):
                assert reply.status == 400
            assert reply.status not in (404, 405), path
