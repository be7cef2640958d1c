"""Stream = non-stream, byte for byte: however the engine's tokens arrive, and however they are
taken, the result is the same. The engine's outputs are made up here, so that every split occurs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_inference import SamplingParams
from nano_inference.request import RequestState
from nano_inference.tokenizer import Tokenizer

EOS = 257
TEXTS = ["héllo wörld", "日本語のテキスト", "🙂🙃", "aaaabaaab", "ab\ufffd\u0301"]
STOPS = ["ab", "aab", "b", "ö", "本語", "🙃", "\ufffd", "l", "llo w"]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


def output(tokens: list[int], reason: str = "", choice: int = 0, **fields: Any) -> Any:
    made: dict[str, Any] = {
        "request_id": 0,
        "choice": choice,
        "token_ids": tokens,
        "logprobs": [],
        "prompt_logprobs": [],
        "num_cached": 0,
        "finish_reason": reason,
        "stop_token": -1,
        "request_done": bool(reason),
        "error": "",
        "arrival_time": 1.0,
        "first_scheduled_time": 2.0,
        "step_time": 3.0,
        **fields,
    }
    return SimpleNamespace(**made)


def new_state(tokenizer: Tokenizer, params: SamplingParams) -> RequestState:
    return RequestState(0, "r", None, [256, 120], params, tokenizer)


def feed(
    tokenizer: Tokenizer, params: SamplingParams, tokens: list[int], cuts: list[int], reason: str
) -> tuple[RequestState, list[str], list[int]]:
    """Feeds the tokens cut at `cuts`. Returns the state, its deltas and the choices it ended."""
    state, deltas, ended = new_state(tokenizer, params), [], []
    bounds = [0, *sorted(set(cuts)), len(tokens)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if state.finished:
            break
        last = end == len(tokens)
        state.push(output(tokens[begin:end], reason if last else ""), ended.append)
        deltas.append(state.take(delta=True).outputs[0].text)
    return state, deltas, ended


some_tokens = st.one_of(
    st.lists(st.integers(0, 260), min_size=1, max_size=24),
    st.sampled_from(TEXTS).map(lambda text: list(text.encode())),
)


@settings(max_examples=400, deadline=None)
@given(
    tokens=some_tokens,
    cuts=st.lists(st.integers(1, 23), max_size=8),
    stops=st.lists(st.sampled_from(STOPS), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
    reason=st.sampled_from(["length", "stop", "abort"]),
)
def test_every_split_gives_the_same_bytes(
    tokenizer: Tokenizer,
    tokens: list[int],
    cuts: list[int],
    stops: list[str],
    include: bool,
    min_tokens: int,
    reason: str,
) -> None:
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None
    )
    cuts = [cut for cut in cuts if cut < len(tokens)]
    whole, _, _ = feed(tokenizer, params, tokens, [], reason)
    state, deltas, _ = feed(tokenizer, params, tokens, cuts, reason)
    expected, got = whole.take().outputs[0], state.take().outputs[0]
    assert got == expected
    assert "".join(deltas) == expected.text
    assert got.token_ids == tokens[: len(got.token_ids)]
    # An independent account of the text, where no stop string and no limit interferes.
    if not stops:
        visible = tokens[:-1] if reason == "stop" and not include else tokens
        raw = bytes(t for t in visible if t < 256)
        assert expected.text == raw.decode(errors="replace")
    elif not include and min_tokens == 0:
        assert not any(stop in expected.text for stop in stops)


def test_tokens_end_with_the_one_that_completed_the_stop_string(tokenizer: Tokenizer) -> None:
    state, _, ended = feed(tokenizer, SamplingParams(stop="lo"), list(b"hello world"), [], "")
    choice = state.take().outputs[0]
    assert (choice.text, bytes(choice.token_ids)) == ("hel", b"hello")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "lo")
    assert ended == [0] and state.finished


def test_the_engine_is_not_told_what_it_has_ended_itself(tokenizer: Tokenizer) -> None:
    state, _, ended = feed(tokenizer, SamplingParams(stop="lo"), list(b"hello"), [], "length")
    assert state.take().outputs[0].stop_reason == "lo"
    assert ended == []


def test_text_of_the_token_that_ended_it(tokenizer: Tokenizer) -> None:
    def end(token: int, stop_token: int, **params: Any) -> tuple[str, str | int | None]:
        state = new_state(tokenizer, SamplingParams(**params))
        state.push(output([*b"ab", token], "stop", stop_token=stop_token), lambda _: None)
        choice = state.take().outputs[0]
        assert choice.token_ids == [*b"ab", token] and choice.finish_reason == "stop"
        return choice.text, choice.stop_reason

    assert end(EOS, -1) == ("ab", None)
    assert end(99, 99) == ("ab", 99)
    assert end(99, 99, include_stop_str_in_output=True) == ("abc", 99)
    assert end(EOS, -1, include_stop_str_in_output=True) == ("ab", None)
    assert end(EOS, -1, include_stop_str_in_output=True, skip_special_tokens=False) == (
        "ab</s>",
        None,
    )


def test_stop_strings_count_after_min_tokens(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop="a", min_tokens=3)
    state, _, _ = feed(tokenizer, params, list(b"aaaaa"), [], "length")
    choice = state.take().outputs[0]
    assert (choice.text, len(choice.token_ids)) == ("aaa", 4)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab", min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 6),
    cuts=st.lists(st.integers(1, 11), max_size=4),
)
def test_a_stop_string_may_begin_before_min_tokens(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int, cuts: list[int]
) -> None:
    """It counts if it ends after them; one token is one character here."""
    params = SamplingParams(stop=stops, min_tokens=min_tokens, max_tokens=None)
    cuts = [cut for cut in cuts if cut < len(text)]
    state, deltas, _ = feed(tokenizer, params, list(text.encode()), cuts, "length")
    ends = [
        (end, max(found, key=len))
        for end in range(min_tokens + 1, len(text) + 1)
        if (found := [stop for stop in stops if text[:end].endswith(stop)])
    ]
    end, stop = ends[0] if ends else (len(text), None)
    choice = state.take().outputs[0]
    assert choice.text == text[: end - len(stop or "")] == "".join(deltas)
    assert (choice.stop_reason, len(choice.token_ids)) == (stop, end)


def test_choices_end_on_their_own(tokenizer: Tokenizer) -> None:
    state, ended = new_state(tokenizer, SamplingParams(n=3, stop="x")), []
    state.push(output(list(b"one"), choice=0), ended.append)
    state.push(output(list(b"two x"), choice=1), ended.append)
    state.push(output(list(b"late"), choice=1), ended.append)  # of the step in flight
    state.push(output(list(b"three"), "length", choice=2), ended.append)
    assert not state.finished
    state.push(output(list(b"!"), "length", choice=0), ended.append)
    assert state.finished and ended == [1]
    assert [c.text for c in state.take().outputs] == ["one!", "two ", "three"]


def test_an_error_ends_the_request(tokenizer: Tokenizer) -> None:
    state = new_state(tokenizer, SamplingParams(n=2))
    state.push(output([97]), lambda _: None)
    state.push(output([], "error", error="the device is lost"), lambda _: None)
    assert state.finished and state.error == "the device is lost"


def test_a_snapshot_stays_as_it_is(tokenizer: Tokenizer) -> None:
    state = new_state(tokenizer, SamplingParams())
    state.push(output(list(b"ab")), lambda _: None)
    first = state.take()
    state.push(output(list(b"c"), "length"), lambda _: None)
    assert (first.outputs[0].text, first.outputs[0].token_ids) == ("ab", [97, 98])
    assert not first.finished and state.take().outputs[0].text == "abc"


def test_times(tokenizer: Tokenizer) -> None:
    state = new_state(tokenizer, SamplingParams())
    state.push(output([97], step_time=3.0), lambda _: None)
    state.push(output([97], step_time=4.0), lambda _: None)
    state.push(output([97], "length", step_time=6.0), lambda _: None)
    m = state.take().metrics
    assert (m.arrival_time, m.first_scheduled_time, m.time_in_queue) == (1.0, 2.0, 1.0)
    assert (m.first_token_time, m.last_token_time, m.finished_time) == (3.0, 6.0, 6.0)
