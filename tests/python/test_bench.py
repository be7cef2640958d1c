"""The load generator: what it counts, sends and computes. No test depends on how fast it runs:
times are handed in."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nano_inference.bench import plot, report, stats, workload
from nano_inference.bench.cli import bench
from nano_inference.bench.http import (
    Client,
    Disconnected,
    EventParser,
    ProtocolError,
    ResponseParser,
)
from nano_inference.bench.load import LoadGenerator, LoadOptions, Run, first_model, token_counter
from nano_inference.bench.records import AnswerError, Record, Recorder
from nano_inference.bench.workload import DatasetOptions, Prompt

# -- HTTP and events, at every split --------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x;name=value\r\n%s\r\n" % (len(data), data)


def event(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    return found


LAST = b"data: " + json.dumps({"choices": [], "usage": usage(7, 3, 4)}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: Chunked\r\n\r\n"
TEXTS = ["a\u00e9", ' "finish_reason": "x" \n\n', "data: [DONE]"]
EVENTS = [event(TEXTS[0]), b": keep-alive\n\n", *map(event, TEXTS[1:]), event("", "length"), LAST]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_events_at_every_split(newline: bytes) -> None:
    stream = b"".join([*EVENTS, b"event: x\ndata:two\ndata: lines\nid: 3\n\n", DONE])
    expected = [e[6:-2] for e in EVENTS if e.startswith(b"data")] + [b"two\nlines", b"[DONE]"]
    stream = stream.replace(b"\n", newline)
    for cut in range(len(stream) + 1):
        parser = EventParser()
        found = parser.feed(stream[:cut]) + parser.feed(stream[cut:])
        # A lone \r at the very end may be half of a \r\n: the next byte will tell.
        found += parser.feed(b"x") if newline == b"\r" else []
        assert found == expected
    parser = EventParser()
    assert [e for i in range(len(stream)) for e in parser.feed(stream[i : i + 1])] == (
        expected[:-1] if newline == b"\r" else expected
    )


def answer(body: list[bytes], how: str) -> bytes:
    joined = b"".join(body)
    if how == "chunked":
        return b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"".join(map(chunk, body)) + b"0\r\n\r\n"
    if how == "trailer":
        return HEAD + chunk(joined) + b"0\r\nx-checksum: 1\r\n\r\n"
    if how == "length":
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(joined) + joined
    return b"HTTP/1.0 200 OK\r\n\r\n" + joined


@pytest.mark.parametrize("how", ["chunked", "trailer", "length", "eof"])
def test_response_at_every_split(how: str) -> None:
    stream = answer([*EVENTS, DONE], how)
    for cut in range(1, len(stream)):
        record = Record()
        recorder = Recorder(record)
        parser = ResponseParser(recorder)
        parser.feed(stream[:cut], 1.0)
        assert not parser.complete
        parser.feed(stream[cut:], 2.0)
        if how == "eof":
            assert not parser.complete
            parser.eof()
        assert parser.complete and parser.keep_alive == (how != "eof")
        recorder.check_end()
        assert record.prompt_tokens == 7 and record.completion_tokens == 3
        assert record.cached_tokens == 4 and record.finish_reason == "length"
        assert len(record.times) == 3 and set(record.times) <= {1.0, 2.0}
        assert record.end == 2.0 or how != "length"


def test_bytes_one_by_one() -> None:
    record = Record()
    parser = ResponseParser(Recorder(record))
    for i, byte in enumerate(answer([*EVENTS, DONE], "chunked")):
        parser.feed(bytes([byte]), float(i))
    assert parser.complete and len(record.times) == 3 and record.times == sorted(record.times)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
        HEAD + b"xyz\r\n",
        HEAD + b"2\r\nabc\r\n",
        b"HTTP/1.1 " + b"x" * 70_000,
    ],
)
def test_what_is_no_http(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser(lambda *_: None).feed(data, 0.0)


def test_closing() -> None:
    parser = ResponseParser(lambda *_: None)
    parser.feed(b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 2\r\n\r\na", 0.0)
    with pytest.raises(Disconnected):
        parser.eof()
    parser.feed(b"b", 0.0)
    assert parser.complete and not parser.keep_alive
    extra = ResponseParser(lambda *_: None)
    extra.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc", 0.0)
    assert extra.complete and not extra.keep_alive, "bytes that belong to no answer"


# -- What a stream tells --------------------------------------------------------------------------


def record_of(*events: tuple[float, bytes], start: float = 0.0) -> Record:
    record = Record(start=start)
    recorder = Recorder(record)
    for now, data in events:
        recorder(data, now)
    recorder.check_end()
    return record


def chat(**delta: Any) -> bytes:
    body = {"choices": [{"delta": delta, "finish_reason": None}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def test_only_events_with_output_have_times() -> None:
    finish = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    record = record_of(
        (1.0, chat(role="assistant", content="")),
        (2.0, chat(reasoning_content="hm")),
        (3.0, chat(content="a")),
        (4.0, chat(tool_calls=[{"index": 0}])),
        (5.0, b"data: " + json.dumps(finish).encode() + b"\n\n"),
        (6.0, LAST + DONE),
    )
    assert record.times == [2.0, 3.0, 4.0] and record.end == 6.0
    assert record.finish_reason == "stop" and record.output_tokens == 3


def test_an_answer_without_text_has_its_time() -> None:
    record = record_of((1.0, event("", "stop")), (2.0, DONE))
    assert record.times == [1.0] and record.output_tokens == 1


def test_usage_in_every_event_counts_its_tokens() -> None:
    record = record_of(
        (1.0, event("", usage=usage(5, 0))),
        (2.0, event("ab", usage=usage(5, 2))),
        (3.0, event("", usage=usage(5, 3))),  # half a character
        (5.0, event("cde", "length", usage=usage(5, 7))),
        (5.0, DONE),
    )
    assert record.event_tokens_known and record.event_tokens() == [2, 1, 4]
    assert stats.token_gaps(record) == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert stats.event_gaps(record) == [1.0, 2.0]
    assert stats.tpot(record) == 3.0 / 5


def test_usage_in_the_last_event_only() -> None:
    record = record_of(
        (1.0, event("a")),
        (2.0, event("b")),
        (3.0, event("", "stop", usage=usage(5, 2))),
        (3.0, DONE),
    )
    assert record.times == [1.0, 2.0] and record.event_tokens() == [1, 1]


def test_tokens_known_in_total_only() -> None:
    """Their text tells how many an event brings."""
    texts = [(1.0, "ab"), (2.0, "c"), (4.0, "defg"), (5.0, "h")]
    last = b"data: " + json.dumps({"choices": [], "usage": usage(1, 8)}).encode() + b"\n\n"
    record = record_of(
        *((now, event(text)) for now, text in texts), (5.0, event("", "length") + last + DONE)
    )
    assert not record.event_tokens_known and record.event_tokens() == [2, 1, 4, 1]
    assert stats.token_gaps(record) == [1.0, 0.5, 0.5, 0.5, 0.5, 1.0]
    assert stats.tpot(record) == 4.0 / 6
    assert stats.summarize([record], 1.0)["tokens_of_each_event_known"] is False


def test_a_total_that_does_not_fit_the_text() -> None:
    """An event brings one token at least; the sums still count what the server says."""
    record = Record(times=[1.0, 2.0, 3.0], sizes=[98, 1, 1], completion_tokens=4)
    assert record.event_tokens() == [4, 1, 1] and record.output_tokens == 4
    assert stats.token_gaps(record) == [1.0, 1.0]


@pytest.mark.parametrize(
    "data, words",
    [
        (b'data: {"error": {"message": "no memory", "code": 500}}\n\n', "no memory"),
        (b"data: {nonsense\n\n", "nonsense"),
        (b"data: [1]\n\n", "[1]"),
        (event("a"), "without [DONE]"),
        (event("a", "abort") + DONE, "abort"),
        (DONE, "no output"),
    ],
)
def test_answers_that_fail(data: bytes, words: str) -> None:
    with pytest.raises(AnswerError) as caught:
        record_of((0.0, data))
    assert words in str(caught.value)


# -- Figures --------------------------------------------------------------------------------------


def made(start: float, times: list[float], tokens: int | None = None, **more: Any) -> Record:
    return Record(
        start=start,
        end=times[-1] if times else start,
        times=times,
        sizes=[1] * len(times),
        completion_tokens=len(times) if tokens is None else tokens,
        prompt_tokens=10,
        **more,
    )


def test_percentiles_are_numpys() -> None:
    rng = np.random.default_rng(5)
    records, waits, gaps, spans, tpots = [], [], [], [], []
    for start in rng.uniform(0, 10, 40):
        steps = rng.exponential(0.1, rng.integers(2, 30))
        records.append(made(start, (start + np.cumsum(steps)).tolist()))
        waits.append(steps[0])
        gaps += steps[1:].tolist()
        spans.append(steps.sum())
        tpots.append(steps[1:].mean())
    found = stats.summarize(records, 20.0)
    for name, values in [
        ("ttft_ms", waits),
        ("itl_ms", gaps),
        ("event_gap_ms", gaps),
        ("e2e_ms", spans),
        ("tpot_ms", tpots),
    ]:
        expected = 1e3 * np.array(values)
        assert math.isclose(found[name]["mean"], expected.mean(), rel_tol=1e-9)
        for q, key in [(50, "median"), (90, "p90"), (95, "p95"), (99, "p99")]:
            value = float(np.percentile(expected, q))
            assert math.isclose(found[name][key], value, rel_tol=1e-9), (name, key)
    tokens = len(gaps) + 40
    assert found["output_tokens"] == tokens and found["prompt_tokens"] == 400
    assert found["output_throughput"] == tokens / 20.0
    assert found["total_throughput"] == (tokens + 400) / 20.0
    assert found["request_throughput"] == 2.0


def test_failed_requests_count_nowhere_else() -> None:
    good = made(0.0, [1.0, 2.0])
    bad = [
        made(0.0, [9.0], error="HTTP 429", message="full"),
        made(0.0, [], error="timeout", message="long"),
        made(0.0, [], error="HTTP 429", message="still full"),
    ]
    found = stats.summarize([*bad, good], 2.0)
    assert (found["requests"], found["completed"], found["failed"]) == (4, 1, 3)
    assert found["failures"] == [
        {"reason": "HTTP 429", "count": 2, "example": "full"},
        {"reason": "timeout", "count": 1, "example": "long"},
    ]
    assert found["output_tokens"] == 2 and found["ttft_ms"]["max"] == 1000.0
    json.dumps(stats.summarize(bad, 1.0), allow_nan=False)  # no request is left: no NaN either


def test_goodput() -> None:
    objectives = stats.parse_goodput(["ttft:500", "tpot:100"])
    records = [
        made(0.0, [0.5, 0.6]),  # both just met
        made(0.0, [0.51, 0.6]),
        made(0.0, [0.1, 0.3]),
        made(0.0, [0.2]),  # one token: no time between tokens to miss
        made(0.0, [0.1], error="timeout"),
    ]
    found = stats.summarize(records, 4.0, objectives)["goodput"]
    assert found["requests"] == 2 and found["share"] == 0.4
    assert found["requests_per_second"] == 0.5
    late = stats.parse_goodput(["e2e:250"])
    assert stats.summarize(records, 1.0, late)["goodput"]["requests"] == 1
    for wrong in ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:nan", "itl:5"]:
        with pytest.raises(ValueError, match="--goodput"):
            stats.parse_goodput([wrong])


def test_requests_in_flight() -> None:
    records = [made(0.0, [4.0]), made(1.0, [2.0]), made(2.0, [3.0])]
    assert stats.in_flight(records)[-1] == (4.0, 0)
    assert stats.summarize(records, 4.0)["max_in_flight"] == 2


def test_without_usage_events_are_counted() -> None:
    record = Record(times=[1.0, 2.0], end=2.0)
    found = stats.summarize([record], 2.0)
    assert found["output_tokens"] == 2 and found["output_tokens_counted_by"] == "events"


# -- Arrivals and prompts -------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals(burstiness: float) -> None:
    count, rate = 20_000, 8.0
    times = workload.arrival_times(count, rate, burstiness, seed=3)
    assert times == workload.arrival_times(count, rate, burstiness, seed=3)
    assert times != workload.arrival_times(count, rate, burstiness, seed=4)
    gaps = np.diff([0.0, *times])
    assert (gaps >= 0).all()
    # A gamma distribution: mean 1/rate, coefficient of variation 1/sqrt(shape).
    cv = 1 / math.sqrt(burstiness)
    assert abs(gaps.mean() * rate - 1) < 5 * cv / math.sqrt(count)
    assert abs(gaps.std() * rate / cv - 1) < 0.1
    if burstiness == 1.0:  # exponential
        assert abs((gaps > 1 / rate).mean() - math.exp(-1)) < 0.02


def test_all_at_once() -> None:
    assert workload.arrival_times(3, float("inf"), 1.0, 0) == [0.0] * 3


def words_of_two(text: str) -> int:
    """A tokenizer: two tokens around all, a word is a token for each two characters."""
    return 2 + sum(-(-len(word) // 2) for word in text.split())


def counted(count: Callable[[str], int]) -> Callable[[str], Awaitable[int]]:
    async def ask(text: str) -> int:
        return count(text)

    return ask


@pytest.mark.parametrize("count", [words_of_two, len, lambda t: 1 + len(t.split())])
@pytest.mark.parametrize("prefix_len", [0, 40])
def test_random_prompts_have_their_length(count: Callable[[str], int], prefix_len: int) -> None:
    options = DatasetOptions(
        20, input_len=50, output_len=30, range_ratio=0.5, prefix_len=prefix_len, seed=1
    )
    found = asyncio.run(workload.make_dataset(options, counted(count)))
    assert [count(p.text) for p in found.prompts] == [p.input_len for p in found.prompts]
    lengths = [p.input_len - prefix_len for p in found.prompts if p.input_len is not None]
    assert len(lengths) == 20 and all(25 <= n <= 75 for n in lengths) and len(set(lengths)) > 5
    assert all(15 <= p.output_len <= 45 for p in found.prompts)
    assert len({p.text for p in found.prompts}) == 20
    common = min(len(_common(found.prompts[0].text, p.text)) for p in found.prompts[1:])
    assert common >= (prefix_len and 38) and "20 of 20 exact" in found.about
    assert asyncio.run(workload.make_dataset(options, counted(count))) == found
    other = DatasetOptions(20, input_len=50, range_ratio=0.5, prefix_len=prefix_len, seed=2)
    assert asyncio.run(workload.make_dataset(other, counted(count))).prompts != found.prompts


def _common(a: str, b: str) -> str:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return a[:i]
    return min(a, b, key=len)


def test_without_tokenizer_words_count() -> None:
    options = DatasetOptions(5, input_len=12, prefix_len=7)
    found = asyncio.run(workload.make_dataset(options, None))
    assert {len(p.text.split()) for p in found.prompts} == {19}
    assert len({tuple(p.text.split()[:7]) for p in found.prompts}) == 1
    assert "a word counted as a token" in found.about


def test_impossible_lengths_come_near() -> None:
    """A template of 30 tokens leaves no room for a prompt of 10."""
    text, count = asyncio.run(workload.cut_to_length("abcdef", 10, counted(lambda t: 30 + len(t))))
    assert (text, count) == ("a", 31)


ENTRIES: list[Any] = [
    "plain text",
    {"prompt": "with a length", "output_len": 5},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]},
    {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "one two"}]},
]


@pytest.mark.parametrize("lines", [True, False])
def test_prompts_from_a_file(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "prompts.json"
    path.write_text("\n\n".join(map(json.dumps, ENTRIES)) if lines else json.dumps(ENTRIES))
    found = asyncio.run(workload.make_dataset(DatasetOptions(6, path), None)).prompts
    assert [p.text for p in found] == [
        "plain text", "with a length", "hi", "ask", "plain text", "with a length"
    ]  # fmt: skip
    assert [p.output_len for p in found] == [128, 5, 128, 2, 128, 5]
    assert found[2].messages == tuple(ENTRIES[2]["messages"])
    fixed = asyncio.run(workload.make_dataset(DatasetOptions(4, path, output_len=9), None))
    assert {p.output_len for p in fixed.prompts} == {9}
    by_tokenizer = workload.make_dataset(DatasetOptions(4, path), counted(len))
    assert asyncio.run(by_tokenizer).prompts[3].output_len == len("one two")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"prompt": 3}', "line 1"),
        ('"a"\n{"text": "a"}', "line 2"),
        ('"a"\n{', "line 2"),
        ("[", "no JSON"),
        ('[{"conversations": []}]', "entry 0"),
        ('{"prompt": "a", "output_len": "long"}', "output_len"),
        ("", "no prompt"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        asyncio.run(workload.make_dataset(DatasetOptions(4, path), None))


# -- Plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3000])
def test_plot_is_well_formed(count: int) -> None:
    records = [made(i * 0.01, [i * 0.01 + 0.1, i * 0.01 + 0.2], 5) for i in range(count)]
    records.append(made(0.5, [], error="timeout"))
    svg = plot.run_plot(records, 0.0, "a <title> & \x00 more")
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <title> &   more" in texts and "Time to first token" in texts
    width, height = 460.0, 280.0
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    assert len(svg) < 400_000


def test_token_rate_counts_every_token() -> None:
    records = [made(0.0, [1.0, 2.0, 6.0], 9), made(0.0, [3.0], 1)]
    points = plot.token_rate(records, 0.0, bins=6)
    assert math.isclose(sum(rate for _, rate in points), 10.0)  # bins of a second


# -- Against a server -----------------------------------------------------------------------------

Writer = asyncio.StreamWriter
Handler = Callable[[str, dict[str, Any], Writer], Awaitable[bool]]


class StandIn:
    """A small server. `handle` writes an answer and returns whether the connection may stay."""

    def __init__(self, handle: Handler) -> None:
        self.handle = handle
        self.connections = 0
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.connections += 1
        try:
            stay = True
            while stay:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.headers.append(head)
                length = [line for line in head.split("\r\n") if line.startswith("Content-Length")]
                size = int(length[0].split(":")[1]) if length else 0
                body = json.loads(await reader.readexactly(size) or b"{}")
                path = head.split(" ")[1]
                self.bodies.append((path, body))
                stay = await self.handle(path, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def reply(writer: Writer, value: Any, status: str = "200 OK") -> None:
    data = json.dumps(value).encode()
    writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)


def stream(writer: Writer, tokens: int, prompt_tokens: int) -> None:
    body = [event("x ") for _ in range(tokens)] + [event("", "length")]
    last = {"choices": [], "usage": usage(prompt_tokens, tokens)}
    body += [b"data: " + json.dumps(last).encode() + b"\n\n", DONE]
    writer.write(HEAD + b"".join(map(chunk, body)) + b"0\r\n\r\n")


async def ordinary(path: str, body: dict[str, Any], writer: Writer) -> bool:
    """Tokens are characters."""
    if path == "/v1/models":
        reply(writer, {"data": [{"id": "stand-in"}]})
    elif path == "/tokenize":
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        reply(writer, {"count": len(text), "tokens": [0] * len(text)})
    elif path == "/v1/completions":
        stream(writer, body["max_tokens"], len(body["prompt"]))
    elif path == "/v1/chat/completions":
        stream(writer, body["max_tokens"], len(body["messages"][0]["content"]))
    else:
        reply(writer, {"error": {"message": "nothing here"}}, "404 Not Found")
    return True


async def with_server(
    handle: Handler, use: Callable[[Client, StandIn], Awaitable[Any]], **options: Any
) -> Any:
    stand_in = StandIn(handle)
    server = await asyncio.start_server(stand_in.serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", **options)
    try:
        return await use(client, stand_in)
    finally:
        client.close()
        server.close()


def load(handle: Handler, prompts: list[Prompt], **options: Any) -> tuple[Run, StandIn]:
    async def use(client: Client, stand_in: StandIn) -> tuple[Run, StandIn]:
        generator = LoadGenerator(client, LoadOptions("stand-in", **options))
        return await generator.run(prompts), stand_in

    return asyncio.run(with_server(handle, use))


PROMPTS = [Prompt(f"prompt {i}", 3 + i % 4) for i in range(30)]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("how", [{"concurrency": 4}, {}, {"request_rate": 2000.0}])
def test_every_prompt_is_sent_once(endpoint: str, how: dict[str, Any]) -> None:
    run, server = load(
        ordinary,
        PROMPTS,
        endpoint=endpoint,
        ignore_eos=True,
        temperature=0.0,
        extra_body={"top_k": 5, "stream_options": None},
        **how,
    )
    assert all(r.ok for r in run.records), [r.message for r in run.records]
    sent = [body for _, body in server.bodies]
    key = "prompt" if endpoint == "completions" else "messages"
    assert sorted(str(b[key]) for b in sent) == sorted(
        str(p.text if key == "prompt" else [{"role": "user", "content": p.text}]) for p in PROMPTS
    )
    for body in sent:
        assert body["stream"] is True and body["ignore_eos"] is True and body["temperature"] == 0
        assert body["top_k"] == 5 and "stream_options" not in body and body["model"] == "stand-in"
    assert sum(r.output_tokens for r in run.records) == sum(p.output_len for p in PROMPTS)
    if "concurrency" in how:
        assert server.connections == 4, "connections are kept"
        assert stats.summarize(run.records, run.seconds)["max_in_flight"] <= 4
    assert all(r.start <= r.times[0] <= r.times[-1] <= r.end for r in run.records)


def test_concurrency_is_reached() -> None:
    waiting: list[Writer] = []

    async def all_together(path: str, body: dict[str, Any], writer: Writer) -> bool:
        waiting.append(writer)
        if len(waiting) == 6:  # answered only when six are there
            for each in waiting:
                stream(each, 1, 1)
            waiting.clear()
        return True

    run, _ = load(all_together, PROMPTS, concurrency=6)
    assert len(run.records) == 30 and all(r.ok for r in run.records)


def test_failures_by_reason() -> None:
    async def fail(path: str, body: dict[str, Any], writer: Writer) -> bool:
        kind = body["prompt"]
        if kind == "busy":
            reply(writer, {"error": {"message": "queue full"}}, "429 Too Many Requests")
        elif kind == "cut":
            writer.write(HEAD + chunk(event("a")))
            return False
        elif kind == "error":
            writer.write(HEAD + chunk(event("a") + b'data: {"error": {"message": "oh"}}\n\n'))
            return False
        elif kind == "noise":
            writer.write(b"noise\r\n\r\n")
            return False
        else:
            stream(writer, body["max_tokens"], 1)
        return True

    kinds = ["busy", "cut", "busy", "error", "noise", "good"]
    run, _ = load(fail, [Prompt(k, 2) for k in kinds])
    found = {f["reason"]: f for f in stats.summarize(run.records, 1.0)["failures"]}
    assert {reason: f["count"] for reason, f in found.items()} == {
        "HTTP 429": 2,
        "disconnected": 1,
        "error in the stream": 1,
        "malformed answer": 1,
    }
    assert found["HTTP 429"]["example"] == "queue full"
    assert found["error in the stream"]["example"] == "oh"


def test_timeout() -> None:
    async def never(path: str, body: dict[str, Any], writer: Writer) -> bool:
        await asyncio.sleep(60)
        return True

    run, _ = load(never, PROMPTS[:2], timeout=0.1)
    assert [r.error for r in run.records] == ["timeout"] * 2


def test_nobody_listens() -> None:
    async def use(client: Client, _: StandIn) -> Run:
        return await LoadGenerator(client, LoadOptions("m")).run(PROMPTS[:2])

    async def closed() -> Run:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return await use(Client(f"127.0.0.1:{port}"), StandIn(ordinary))

    run = asyncio.run(closed())
    assert [r.error for r in run.records] == ["connection refused"] * 2


# For 127.0.0.1, made for this test and used nowhere else.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBhjCCASygAwIBAgIUdIBw1jAURvN6ttiEOb4EKBjoNsYwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjQwMDAwMjNaGA8yMTI2MTAzMTAwMDAy
M1owDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABFnK
WPgaoHU9zwoCGR2YqXEgPf+ykQqq6GtGj1bi2kvgTE4BtauQmf7ZV9ohaRKrACu9
1ujH7z+iBMB4W+goJVejZDBiMB0GA1UdDgQWBBTeFNFxNc/1F+d2a9+H3zuwOULu
UzAfBgNVHSMEGDAWgBTeFNFxNc/1F+d2a9+H3zuwOULuUzAPBgNVHRMBAf8EBTAD
AQH/MA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIgdmS/j+7Bc+y4
AKxif0LpfbLr0P46eHfy5dvPYgLG+sUCIQCKge0tTW8kJh6HzJ0xV2QHOBnEEBtu
JfZZ01m8re8PuA==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXYr54P4ppwb0tD7J
xr6yqOe86SbJVmpG+PVjKEyqCOehRANCAARZylj4GqB1Pc8KAhkdmKlxID3/spEK
quhrRo9W4tpL4ExOAbWrkJn+2VfaIWkSqwArvdbox+8/ogTAeFvoKCVX
-----END PRIVATE KEY-----
"""


def test_tls(tmp_path: Path) -> None:
    path = tmp_path / "both.pem"
    path.write_text(CERTIFICATE + KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)

    async def use(verify: bool) -> list[Record]:
        stand_in = StandIn(ordinary)
        server = await asyncio.start_server(stand_in.serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        client = Client(f"https://127.0.0.1:{port}", verify=verify)
        run = await LoadGenerator(client, LoadOptions("m", concurrency=2)).run(PROMPTS[:4])
        client.close()
        server.close()
        return run.records

    assert [r.error for r in asyncio.run(use(True))] == ["TLS failed"] * 4
    records = asyncio.run(use(False))
    assert all(r.ok for r in records) and sum(r.output_tokens for r in records) == 3 + 4 + 5 + 6


def test_idle_connections_that_the_server_closes_are_replaced() -> None:
    async def close_after_each(path: str, body: dict[str, Any], writer: Writer) -> bool:
        await ordinary(path, body, writer)
        return False  # though it said nothing of "connection: close"

    run, server = load(close_after_each, PROMPTS, concurrency=2)
    assert all(r.ok for r in run.records), [r.message for r in run.records]
    assert server.connections == 30 and len(server.bodies) == 30


def test_duration_repeats_the_prompts() -> None:
    """On a clock that each look advances by a second."""
    ticks = iter(range(10**9))

    async def use(client: Client, stand_in: StandIn) -> tuple[Run, StandIn]:
        options = LoadOptions("m", concurrency=1, duration=100.0)
        generator = LoadGenerator(client, options, clock=lambda: float(next(ticks)))
        return await generator.run(PROMPTS[:3]), stand_in

    run, server = asyncio.run(with_server(ordinary, use))
    texts = [body["prompt"] for _, body in server.bodies]
    assert texts == [PROMPTS[i % 3].text for i in range(len(texts))]
    # For each request one look decides that it is sent, and one is its start.
    assert len(texts) == 50 and len(run.records) == 50


def test_questions_before_the_run() -> None:
    async def use(client: Client, stand_in: StandIn) -> tuple[str, int, list[str]]:
        model = await first_model(client, 5.0)
        count, why_not = await token_counter(client, LoadOptions(model, endpoint="chat"))
        assert count is not None and why_not is None
        return model, await count("four"), stand_in.headers

    model, count, headers = asyncio.run(with_server(ordinary, use, api_key="secret"))
    assert (model, count) == ("stand-in", 4)
    assert all("Authorization: Bearer secret\r\n" in head for head in headers)


def test_a_server_without_tokenize() -> None:
    async def bare(path: str, body: dict[str, Any], writer: Writer) -> bool:
        return await ordinary("/nothing" if path == "/tokenize" else path, body, writer)

    async def use(client: Client, _: StandIn) -> Any:
        return await token_counter(client, LoadOptions("m"))

    count, why_not = asyncio.run(with_server(bare, use))
    assert count is None and "404" in why_not and "nothing here" in why_not


@pytest.mark.parametrize(
    "given, path, base",
    [
        ("http://h:1", "/x", "http://h:1"),
        ("h:1/v1/", "/x", "http://h:1"),
        ("https://h/proxy/v1", "/proxy/x", "https://h/proxy"),
        ("http://[::1]:8000", "/x", "http://[::1]:8000"),
    ],
)
def test_base_urls(given: str, path: str, base: str) -> None:
    client = Client(given)
    assert client.base_url == base
    assert client.encode("GET", "/x").startswith(f"GET {path} HTTP/1.1\r\nHost: ".encode())


@pytest.mark.parametrize("given", ["ftp://h", "http://", "http://h:0", "http://h:99999"])
def test_base_urls_that_are_wrong(given: str) -> None:
    with pytest.raises(ValueError, match="--base-url"):
        Client(given)


def test_keys_cannot_forge_headers() -> None:
    with pytest.raises(ValueError, match="--api-key"):
        Client("http://h", "a\r\nX: y")


# -- The commands ---------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    """Of the ordinary stand-in, in a thread; a prompt that is "bad" fails."""
    import threading

    async def handle(path: str, body: dict[str, Any], writer: Writer) -> bool:
        if body.get("prompt") == "bad":
            reply(writer, {"error": {"message": "a bad prompt"}}, "400 Bad Request")
            return True
        return await ordinary(path, body, writer)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(StandIn(handle).serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.sockets[0].getsockname()[1]

    async def stop() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def invoke(*args: str) -> Result:
    return CliRunner().invoke(bench, list(args))


def test_serve_command(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--api-key", "secret-1", "--api-key=secret-2", "rest"])
    saved, drawn = tmp_path / "run.json", tmp_path / "run.svg"
    result = invoke(
        *["serve", "--base-url", f"http://127.0.0.1:{port}", "--concurrency", "3"],
        *["--num-prompts", "12", "--input-len", "20", "--output-len", "6", "--api-key", "secret-1"],
        *["--goodput", "ttft:60000 tpot:60000", "--save", str(saved), "--plot", str(drawn)],
    )
    assert result.exit_code == 0, result.output
    for words in [
        "12 done, 0 failed",
        "20 -> 6 tokens",
        "13 of 13 exact",
        "TTFT",
        "goodput",
        "p99",
    ]:
        assert words in result.stdout
    found = json.loads(saved.read_text())
    assert "secret" not in saved.read_text() and found["command"][-1] == "rest"
    assert found["summary"]["output_tokens"] == 72 and found["summary"]["prompt_tokens"] == 240
    assert found["summary"]["goodput"]["requests"] == 12
    assert found["config"]["model"] == "stand-in" and found["machine"]["cores"] >= 1
    assert [len(r["event_ms"]) for r in found["requests"]] == [6] * 12
    ET.fromstring(drawn.read_text())


def test_serve_command_with_failures(port: int, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"good"\n"bad"\n"good"\n')
    args = ["serve", "--base-url", f"http://127.0.0.1:{port}", "--dataset", str(path)]
    args += ["--num-prompts", "3", "--warmup", "0"]
    result = invoke(*args)
    assert result.exit_code == 1
    assert "2 done, 1 failed" in result.stdout and "1 x HTTP 400: a bad prompt" in result.stdout
    assert invoke(*args, "--allow-failures").exit_code == 0
    path.write_text('"bad"')
    result = invoke(*args[:-2])
    assert result.exit_code == 1 and result.stdout == "" and "warm-up" in result.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (["--concurrency", "2", "--request-rate", "3"], "open loop"),
        (["--duration", "3"], "--duration"),
        (["--plot", "x.png"], ".svg"),
        (["--save", "no/such/folder.json"], "no folder"),
        (["--goodput", "itl:3"], "--goodput"),
        (["--extra-body", "{"], "no JSON"),
        (["--extra-body", '{"n": 2}'], "n must be 1"),
        (["--range-ratio", "1.5"], "--range-ratio"),
        (["--base-url", "nowhere://"], "--base-url"),
    ],
)
def test_serve_refuses(args: list[str], words: str) -> None:
    result = invoke("serve", "--model", "m", *args)
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_throughput_command(model_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    result = invoke(
        *["throughput", "--model", str(model_dir), "--num-prompts", "6", "--input-len", "15"],
        *["--output-len", "4", "--prefix-len", "5", "--num-threads", "1", "--save", str(saved)],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(saved.read_text())["summary"]
    # The tokenizer adds <s>: that is one of the 20 tokens.
    assert found["prompt_tokens"] == 6 * 20 and found["output_tokens"] == 6 * 4
    assert math.isclose(found["output_throughput"] * found["seconds"], 24)
    assert "7 of 7 exact" in result.stdout and "output tokens/s" in result.stdout


def test_latency_command(model_dir: Path) -> None:
    result = invoke(
        *["latency", "--model", str(model_dir), "--batch-size", "3", "--input-len", "9"],
        *[
            "--output-len",
            "5",
            "--iterations",
            "4",
            "--warmup",
            "1",
            "--num-threads",
            "1",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["summary"]
    times = found["iterations_ms"]
    assert len(times) == 4 and all(t > 0 for t in times)
    # The times are written to a microsecond, what is made of them is not.
    assert math.isclose(found["latency_ms"]["p90"], np.percentile(times, 90), abs_tol=0.0006)
    per_token = found["ms_per_output_token"]["mean"]
    assert math.isclose(per_token * 5, found["latency_ms"]["mean"], rel_tol=1e-9)
    assert math.isclose(found["output_throughput"], 3e3 / per_token, rel_tol=1e-9)


def test_table_shows_what_is_missing() -> None:
    assert report.table([("none", {})]).splitlines()[1].split() == ["none"] + ["-"] * 5
