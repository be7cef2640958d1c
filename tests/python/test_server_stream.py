"""Streams and what goes wrong with them: stream = whole answer, reasoning, disconnects, slow
readers, time limits, full queues, failing engines, the live trace."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from nano_inference.random_model import write_random_model
from nano_inference.request import RequestState
from nano_inference.server import streaming
from nano_inference.server.reasoning import ReasoningSplitter, count_reasoning_tokens
from nano_inference.tokenizer import Tokenizer as OurTokenizer
from server_helpers import TEMPLATE, Reply, Server, serve

ENDLESS = {"prompt": "x", "max_tokens": 150_000, "ignore_eos": True, "temperature": 1}
THINK, UNTHINK = 261, 262


@pytest.fixture(scope="module")
def server(endless_model_dir: Path) -> Iterator[Server]:
    with serve(endless_model_dir) as server:
        yield server
        server.wait_idle()


def write_scripted_model(folder: Path) -> Path:
    """A model whose next token follows from the last one alone, with <think> and </think> as
    tokens: after <|assistant|> it says <think>\\n, thinks "hé", and answers "yes"."""
    model = write_random_model(folder, vocab_size=263)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.save(str(model / "tokenizer.json"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tensors = dict(load_file(model / "model.safetensors"))
    embeddings = tensors["model.embed_tokens.weight"]
    head = np.zeros_like(tensors["lm_head.weight"])
    assistant, newline, eos = 259, ord("\n"), 257
    script = [assistant, THINK, newline, ord("h"), 0xC3, 0xA9, UNTHINK, *b"yes", eos]
    for token, following in zip(script, script[1:], strict=False):
        head[following] += embeddings[token]
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensors[name])  # no layer adds anything
    tensors["lm_head.weight"] = head
    save_file(tensors, model / "model.safetensors")
    return model


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(write_scripted_model(tmp_path_factory.mktemp("think") / "model")) as server:
        yield server
        server.wait_idle()


# -- Stream = whole -------------------------------------------------------------------------------


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices that a stream's events make; their order and form is checked."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for c in event["choices"]:
            if c["index"] not in choices:
                choices[c["index"]] = {
                    "text": "", "reasoning": "", "scores": None, "finish_reason": None
                }  # fmt: skip
                if "delta" in c:
                    assert c["delta"] == {"role": "assistant", "content": ""}
            mine = choices[c["index"]]
            assert mine["finish_reason"] is None  # nothing comes after it
            delta = c.get("delta", {})
            mine["text"] += c.get("text") or delta.get("content") or ""
            mine["reasoning"] += delta.get("reasoning_content") or ""
            mine["finish_reason"] = c["finish_reason"]
            if c["finish_reason"] is not None:
                assert (c.get("text") or "") == "" and delta == {}
                mine["stop_reason"] = c["stop_reason"]
            if c["logprobs"] is not None:
                if mine["scores"] is None:
                    mine["scores"] = {name: [] for name in c["logprobs"]}
                for name, values in c["logprobs"].items():
                    mine["scores"][name] += values or []
    assert all(c["finish_reason"] for c in choices.values())
    return choices


def whole(reply: Reply) -> dict[int, dict[str, Any]]:
    choices = {}
    for c in reply.json["choices"]:
        message = c.get("message", {})
        scores = c["logprobs"]
        choices[c["index"]] = {
            "text": c["text"] if "text" in c else message["content"],
            "reasoning": message.get("reasoning_content") or "",
            "scores": scores and {name: values or [] for name, values in scores.items()},
            "finish_reason": c["finish_reason"],
            "stop_reason": c["stop_reason"],
        }
    return choices


def check_same(server: Server, path: str, body: dict[str, Any]) -> None:
    plain = server.post(path, body)
    assert plain.status == 200, plain
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = server.post(path, {**body, **options}).events
    assert joined(events[:-1]) == whole(plain)
    said = {**plain.json["usage"], "prompt_tokens_details": None}
    assert {**events[-1]["usage"], "prompt_tokens_details": None} == said
    assert events[-1]["choices"] == []
    assert all(event["usage"] is None for event in events[:-1])
    assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1


def test_streams_say_what_whole_answers_say(server: Server) -> None:
    wild = random.Random(1)
    for i in range(40):
        body: dict[str, Any] = {
            "temperature": 5.0,
            "seed": i,
            "max_tokens": wild.randint(1, 60),
            "n": wild.randint(1, 3),
        }
        if wild.random() < 0.6:  # bytes that make characters, parts of such, and special tokens
            tokens = [*wild.sample(range(97, 110), 3), 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 258]
            body["allowed_token_ids"] = tokens
            body["skip_special_tokens"] = wild.random() < 0.5
        if wild.random() < 0.5:
            body["stop"] = ["é€", "aa", "ab", "€a"]
            body["include_stop_str_in_output"] = wild.random() < 0.5
        scored = wild.random() < 0.4
        if i % 2:
            if scored:
                body["logprobs"] = 2
            body |= {"prompt": ["one é", "two"][: wild.randint(1, 2)], "echo": wild.random() < 0.5}
            check_same(server, "/v1/completions", body)
        else:
            if scored:
                body |= {"logprobs": True, "top_logprobs": 2}
            body["messages"] = [{"role": "user", "content": "x"}]
            check_same(server, "/v1/chat/completions", body)


def test_many_streams_at_once_are_as_alone(server: Server) -> None:
    bodies = [
        {"prompt": f"prompt {i}", "temperature": 3, "seed": i, "max_tokens": 80, "ignore_eos": True}
        for i in range(24)
    ]

    def streamed(body: dict[str, Any]) -> str:
        events = server.complete(**body, stream=True).events
        return "".join(c["text"] for e in events for c in e["choices"])

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(streamed, bodies))
    assert together == [whole(server.complete(**body))[0]["text"] for body in bodies]
    server.wait_idle()


def test_obfuscation_evens_sizes(server: Server) -> None:
    options = {"include_obfuscation": True}
    reply = server.complete(prompt="x", stream=True, stream_options=options, ignore_eos=True)
    assert all(event["obfuscation"] for event in reply.events)


# -- Reasoning ------------------------------------------------------------------------------------

TEXTS = [
    ("<think>\nwhy\n</think>\n\nso", False, ("why", "so")),
    ("<think>why</think>so", False, ("why", "so")),
    ("  \n<think>why", False, ("why", "")),
    ("why\n\nnot\n</think>\nso\n", True, ("why\n\nnot", "so\n")),
    ("no <think>tag</think>", False, ("", "no <think>tag</think>")),
    ("<thin", False, ("", "<thin")),
    ("\n <", False, ("", "\n <")),
    ("", False, ("", "")),
    ("", True, ("", "")),
    ("a </thi b</think>c</think>d", True, ("a </thi b", "c</think>d")),
    ("a</think", True, ("a</think", "")),
    ("</think>\n\n\n", True, ("", "")),
    ("<think><think>a</think>b", False, ("<think>a", "b")),
]


@given(st.data())
def test_reasoning_does_not_depend_on_the_cuts(data: st.DataObject) -> None:
    text, opened, expected = data.draw(st.sampled_from(TEXTS))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    splitter = ReasoningSplitter(opened)
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [*map(splitter.push, parts), splitter.finish()]
    assert tuple("".join(f[i] for f in found) for i in (0, 1)) == expected


def test_reasoning_tokens(model_dir: Path) -> None:
    tokenizer = OurTokenizer.from_dir(model_dir)
    for text, opened, count in [
        ("<think>ab</think>c", False, 17),
        ("ab</think>c", True, 10),
        ("abc", True, 3),
        ("abc", False, 0),
        ("<think>abc", False, 10),
    ]:
        assert count_reasoning_tokens(tokenizer, list(text.encode()), opened) == count


def test_reasoning_is_split_from_the_answer(thinker: Server) -> None:
    reply = thinker.chat(temperature=0, logprobs=True)
    choice = reply.json["choices"][0]
    assert choice["message"] == {
        "role": "assistant", "content": "yes", "reasoning_content": "hé", "refusal": None
    }  # fmt: skip
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    # <think> \n h Ã © </think> | y e s </s>
    assert reply.json["usage"]["completion_tokens"] == 10
    assert reply.json["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}
    assert len(choice["logprobs"]["content"]) == 10
    for body in ({}, {"logprobs": True}, {"n": 2}, {"max_tokens": 4}, {"stop": "ye"}):
        messages = [{"role": "user", "content": "hi"}]
        check_same(
            thinker, "/v1/chat/completions", {"messages": messages, "temperature": 0, **body}
        )


def test_reasoning_that_the_template_has_opened(thinker: Server) -> None:
    for body in (
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [{"role": "assistant", "content": "<think>"}], "continue_final_message": True},
    ):
        reply = thinker.chat(temperature=0, **body)
        message = reply.json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hé", "yes")
        # The template's own tags and newline are no output.
        tokens = 4 + ("messages" in body)
        assert reply.json["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}


def test_answers_may_come_back_as_messages(thinker: Server) -> None:
    message = thinker.chat(temperature=0).json["choices"][0]["message"]
    messages = [{"role": "user", "content": "hi"}, message, {"role": "user", "content": "so?"}]
    assert thinker.chat(messages=messages, max_tokens=1).status == 200


def test_reasoning_can_be_left_in(tmp_path: Path) -> None:
    with serve(write_scripted_model(tmp_path / "model"), reasoning_parser="none") as server:
        message = server.chat(temperature=0).json["choices"][0]["message"]
        assert message["content"] == "<think>\nhé</think>yes" and "reasoning_content" not in message


# -- Disconnects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_disconnect_frees_the_blocks_at_once(server: Server, stream: bool, n: int) -> None:
    client = server.raw(
        "/v1/completions", {**ENDLESS, "n": n, "stream": stream, "max_tokens": 50_000}
    )
    server.wait_for(lambda s: s["running_seqs"] == n and s["generated_tokens"] > 0)
    if stream:
        assert client.recv(1000)
    aborted = server.llm.stats["aborted"]
    client.close()
    stats = server.wait_idle()
    assert stats["aborted"] == aborted + 1
    metrics = server.get("/metrics").body.decode()
    assert 'requests_total{endpoint="completions",status="499"}' in metrics


def test_a_disconnect_in_the_queue(endless_model_dir: Path) -> None:
    with serve(endless_model_dir, max_num_seqs=1) as server:
        running = server.raw("/v1/completions", {**ENDLESS, "stream": True})
        server.wait_for(lambda s: s["running"] == 1)
        waiting = server.raw("/v1/completions", ENDLESS)
        server.wait_for(lambda s: s["waiting"] == 1)
        waiting.close()
        server.wait_for(lambda s: s["waiting"] == 0)
        assert server.llm.stats["running"] == 1
        running.close()
        server.wait_idle()


def test_one_of_several_prompts_ends_and_the_client_goes(server: Server) -> None:
    body = {**ENDLESS, "prompt": ["a", "b", "c"], "max_tokens": 60_000, "stream": True}
    client = server.raw("/v1/completions", body)
    server.wait_for(lambda s: s["running"] == 3)
    client.close()
    server.wait_idle()


def test_a_client_that_never_reads_is_dropped(
    endless_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="nano_inference.server")
    with serve(endless_model_dir, stream_buffer_bytes=2000) as server:
        slow = server.raw("/v1/completions", {**ENDLESS, "stream": True}, receive_buffer=4096)
        server.wait_for(lambda s: s["running"] == 1)
        other = server.complete(prompt="y", max_tokens=50, stream=True)
        assert other.events  # nobody else waits for it
        server.wait_idle()
        slow.close()
    assert "reads too slowly" in caplog.text
    # The same by time, where little is to be said.
    caplog.clear()
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.2)
    with serve(endless_model_dir) as server:
        slow = server.raw("/v1/completions", {**ENDLESS, "stream": True}, receive_buffer=4096)
        server.wait_for(lambda s: s["running"] == 1)
        server.wait_idle()
        slow.close()
        assert "has read nothing" in caplog.text
        caplog.clear()
        body = {"prompt": "x", "n": 40, "max_tokens": 300, "ignore_eos": True, "logprobs": 5}
        whole = server.raw("/v1/completions", body, receive_buffer=4096)
        server.wait_for(lambda s: s["running"] == 1)
        server.wait_idle()
        whole.close()
    assert "has read nothing" in caplog.text


def test_a_slow_reader_of_a_long_answer_gets_all_of_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is that it reads on, not how long all of it takes."""
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.8)
    body = {"prompt": "x", "n": 40, "max_tokens": 300, "ignore_eos": True, "logprobs": 5}
    found = b""
    with server.raw("/v1/completions", body, receive_buffer=4096) as client:
        began = time.monotonic()
        while not found.endswith(b"}}}"):
            assert (part := client.recv(1 << 14)), found[-100:]
            found += part
            time.sleep(0.01)
        assert time.monotonic() - began > 2 * streaming.SEND_SECONDS + 1  # it was slow
    answer = json.loads(found.partition(b"\r\n\r\n")[2])
    assert answer["usage"]["completion_tokens"] == 40 * 300
    server.wait_idle()


def test_clients_of_all_kinds_leave_nothing_behind(server: Server) -> None:
    wild = random.Random(7)
    for i in range(40):
        body = {**ENDLESS, "stream": bool(i % 2), "max_tokens": wild.choice([1, 5, 2000])}
        client = server.raw("/v1/completions", body)
        time.sleep(wild.random() * 0.02)
        if wild.random() < 0.3:
            client.settimeout(30)
            client.recv(200)
        client.close()
    server.wait_idle()
    assert server.complete(prompt="x", max_tokens=2).status == 200


# -- Limits and failures --------------------------------------------------------------------------


def read_all(client: socket.socket) -> str:
    found = b""
    while part := client.recv(65536):
        found += part
    return found.decode()


def test_request_timeout(endless_model_dir: Path) -> None:
    with serve(endless_model_dir, request_timeout=0.3) as server:
        reply = server.complete(**ENDLESS)
        assert reply.status == 504 and reply.error["code"] == "timeout"
        stream = server.complete(**ENDLESS, stream=True)
        assert stream.status == 200
        *_, last, rest = stream.body.decode().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert rest == "" and "[DONE]" not in stream.body.decode()
        with server.raw("/v1/completions", {"prompt": "x"}, unsent=1) as slow:  # of the body
            answer = read_all(slow).lower()  # the rest of the body is not waited for
            assert answer.startswith("http/1.1 504") and "connection: close" in answer
        server.wait_idle()
        assert server.complete(prompt="x", max_tokens=2).status == 200


def test_a_full_queue_says_when_to_come_again(endless_model_dir: Path) -> None:
    with serve(endless_model_dir, max_num_seqs=1, max_waiting=2) as server:
        clients = [server.raw("/v1/completions", {**ENDLESS, "stream": True})]
        server.wait_for(lambda s: s["running"] == 1)
        clients += [server.raw("/v1/completions", ENDLESS) for _ in range(2)]
        server.wait_for(lambda s: s["waiting"] == 2)
        for stream in (False, True):
            reply = server.complete(prompt="x", stream=stream)
            assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.error["code"] == "queue_full"
        # Of several prompts, either all or none.
        clients.pop().close()
        server.wait_for(lambda s: s["waiting"] == 1)
        assert server.complete(prompt=["a", "b"]).status == 429
        server.wait_for(lambda s: s["waiting"] == 1)
        assert server.complete(prompt=["a", "b", "c"]).error["param"] == "prompt"  # never
        assert server.complete(prompt=["a", "b"], n=2).error["param"] == "prompt"
        for client in clients:
            client.close()
        server.wait_idle()


def test_an_engine_failure_is_a_500_and_the_next_request_works(server: Server) -> None:
    def fail_soon() -> None:
        server.wait_for(lambda s: s["running"] == 1)
        time.sleep(0.05)
        (state,) = list(server.llm.engine.requests.values())
        loop = server.llm._loop
        assert loop is not None

        def fail() -> None:  # as when the engine is gone
            state.fail("the device is lost")
            server.llm._streams[state.core_id].wake.set()
            server.llm._release(state)

        loop.call_soon_threadsafe(fail)

    with ThreadPoolExecutor(1) as pool:
        whole_reply = pool.submit(server.complete, **ENDLESS)
        fail_soon()
        reply = whole_reply.result()
        assert reply.status == 500 and "the device is lost" in reply.error["message"]
        server.wait_idle()
        streamed = pool.submit(server.complete, **ENDLESS, stream=True)
        fail_soon()
        last = streamed.result().body.decode().split("\n\n")[-2]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_error" and "the device is lost" in error["message"]
        server.wait_idle()
    assert server.complete(prompt="x", max_tokens=2).status == 200


def test_a_bug_in_one_answer_leaves_nobody_waiting(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push = RequestState.push

    def push_or_fail(state: RequestState, *args: Any) -> None:
        if len(state.prompt_token_ids) == 3 and running.is_set():
            raise KeyError("a bug")
        push(state, *args)

    running = threading.Event()
    monkeypatch.setattr(RequestState, "push", push_or_fail)
    with ThreadPoolExecutor(2) as pool:
        prompts = ([1, 2, 3], [1, 2, 3, 4])
        replies = [pool.submit(server.complete, **{**ENDLESS, "prompt": p}) for p in prompts]
        server.wait_for(lambda s: s["running"] == 2)
        running.set()
        for reply in replies:
            assert reply.result().status == 500
            assert "KeyError while taking" in reply.result().error["message"]
    server.wait_idle()
    assert "KeyError: 'a bug'" in caplog.text
    assert server.complete(prompt="x", max_tokens=2).status == 200


@pytest.mark.parametrize("phase", ["loading", "draining", "failed"])
def test_not_ready(server: Server, phase: str) -> None:
    server.state.phase = phase
    try:
        for reply in (
            server.complete(prompt="x"),
            server.chat(),
            server.post("/tokenize", {"prompt": "x"}),
            server.get("/health"),
            server.get("/v1/engine/trace"),
        ):
            assert reply.status == 503 and int(reply.headers["retry-after"]) >= 1
            assert phase in reply.error["message"]
        assert server.get("/v1/models").status == 200
    finally:
        server.state.phase = "ready"


def test_health_knows_a_stuck_engine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {**server.llm.stats, "running": 1, "busy_since": 0.0, "last_step_time": 0.0}
    monkeypatch.setattr(type(server.llm), "stats", property(lambda self: stats))
    reply = server.get("/health")
    assert reply.status == 503 and "no step has finished for" in reply.error["message"]


def test_the_engines_end_is_no_answer(endless_model_dir: Path) -> None:
    with serve(endless_model_dir) as server:
        streamed = server.raw("/v1/completions", {**ENDLESS, "stream": True})
        plain = server.raw("/v1/completions", ENDLESS)
        server.wait_for(lambda s: s["running"] == 2 and s["generated_tokens"] > 4)
        server.llm.shutdown()
        assert plain.recv(20).startswith(b"HTTP/1.1 503")
        later = server.complete(prompt="x")
        assert later.status == 503 and later.headers["retry-after"] and later.error["code"]
        assert "the engine has stopped" in server.get("/health").error["message"]
        assert b"engine_healthy 0.0" in server.get("/metrics").body
        streamed.settimeout(30)
        found = ""
        while '"error"' not in found:
            found += streamed.recv(65536).decode()
        assert "shutting down" in found and "[DONE]" not in found
        plain.close()
        streamed.close()


def test_silence_is_filled_with_comments(endless_model_dir: Path) -> None:
    with serve(endless_model_dir, max_num_seqs=1, keep_alive_interval=0.1) as server:
        running = server.raw("/v1/completions", ENDLESS)
        server.wait_for(lambda s: s["running"] == 1)
        waiting = server.raw("/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True})
        found = ""
        while found.count(": keep-alive\n\n") < 3:
            found += waiting.recv(65536).decode()
        running.close()
        while "[DONE]" not in found:
            found += waiting.recv(65536).decode()
        waiting.close()
        server.wait_idle()


# -- Counting -------------------------------------------------------------------------------------


def test_metrics_count_requests_and_tokens(model_dir: Path) -> None:
    with serve(model_dir) as server:
        server.complete(prompt=["a", "b"], n=2, max_tokens=5, ignore_eos=True)
        server.chat(max_tokens=5, stream=True, ignore_eos=True)
        server.complete(prompt="x", n=0)
        server.wait_idle()
        found = server.get("/metrics").body.decode().splitlines()
        for line in (
            'requests_total{endpoint="completions",status="200"} 1.0',
            'requests_total{endpoint="completions",status="400"} 1.0',
            'requests_total{endpoint="chat_completions",status="200"} 1.0',
            'finished_choices_total{endpoint="completions",finish_reason="length"} 4.0',
            'requests_in_flight{endpoint="completions"} 0.0',
            "request_generation_tokens_sum 25.0",
            "generation_tokens_total 25.0",
        ):
            assert "nano_inference_" + line in found, line


# -- The live trace -------------------------------------------------------------------------------


def trace_stream(server: Server, query: str = "") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), 30)
    client.sendall(f"GET /v1/engine/trace/stream{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client


def trace_events(client: socket.socket, found: str, until: str) -> list[Any]:
    while until not in found:
        found += client.recv(65536).decode()
    lines = [line for line in found.splitlines() if line.startswith("data: ") and line[-1] == "}"]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_live_trace(model_dir: Path) -> None:
    with serve(model_dir, trace_capacity=8) as server:
        client = trace_stream(server)
        head = ""
        while "live trace" not in head:
            head += client.recv(65536).decode()
        server.complete(prompt="x", max_tokens=1, ignore_eos=True)
        (record,) = trace_events(client, "", '"finished":[[')
        assert record["step"] == 1 and record["entries"][0]["num_query"] == 2
        # The ring holds 8 steps: who comes too late hears how many he has missed.
        server.complete(prompt="x", max_tokens=40, ignore_eos=True)
        late = trace_stream(server, "?since_step=2")
        events = trace_events(late, "", '"step":41')
        assert events[0] == {"dropped": 41 - 8 - 2 + 1}
        assert [e["step"] for e in events[1:]] == list(range(34, 42))
        server.state.phase = "draining"  # ends it
        assert read_all_chunks(late).endswith("0\r\n\r\n")
        client.close()
        late.close()


def read_all_chunks(client: socket.socket) -> str:
    found = ""
    while not found.endswith("0\r\n\r\n"):
        part = client.recv(65536).decode()
        if not part:
            break
        found += part
    return found


def test_no_trace_to_see(model_dir: Path) -> None:
    with serve(model_dir, trace_capacity=0) as server:
        assert server.get("/v1/engine/trace").error["code"] == "trace_off"
        assert server.get("/v1/engine/trace/stream").status == 404
