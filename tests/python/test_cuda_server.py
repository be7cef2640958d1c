"""`nano-inference serve` on a card: the way from a socket to the card and back."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from nano_inference import LLM, SamplingParams, _core, bundled

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from test_serve_process import Server, serving  # noqa: E402

pytestmark = pytest.mark.skipif(not _core.cuda_devices(), reason=_core.cuda_error() or "no card")

DEVICE = "cuda"
PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Tell me a story about a dog."}]


@pytest.fixture(scope="module")
def llm_texts() -> tuple[str, str]:
    """What LLM says: to the prompt and to the messages."""
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(bundled.DEFAULT, device=DEVICE, use_tqdm_on_load=False) as llm:
        outputs = llm.generate(PROMPT, params) + llm.chat(MESSAGES, params, use_tqdm=False)
    first, second = (out.outputs[0].text for out in outputs)
    return first, second


@pytest.fixture(scope="module")
def server(llm_texts: tuple[str, str]) -> Iterator[Server]:
    """After LLM has left the card."""
    with serving("--model", bundled.DEFAULT, "--device", DEVICE) as server:
        server.wait_for("listening at")
        yield server
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0, server.log
        assert " ERROR " not in server.log and "Traceback" not in server.log


def ask(server: Server, path: str, **body: Any) -> bytes:
    body = {"model": bundled.DEFAULT, "temperature": 0, "max_tokens": 24, **body}
    status, _, answer = server.call(path, body)
    assert status == 200, answer
    return answer


def test_completion(server: Server, llm_texts: tuple[str, str]) -> None:
    answer = json.loads(ask(server, "/v1/completions", prompt=PROMPT))
    assert answer["choices"][0]["text"] == llm_texts[0]


def test_streamed_chat(server: Server, llm_texts: tuple[str, str]) -> None:
    raw = ask(server, "/v1/chat/completions", messages=MESSAGES, stream=True)
    *events, done, rest = raw.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
    assert len(deltas) > 2
    assert "".join(delta.get("content") or "" for delta in deltas) == llm_texts[1]


def test_health_and_metrics(server: Server) -> None:
    assert server.call("/health")[0] == 200
    ask(server, "/v1/completions", prompt=PROMPT)
    status, _, text = server.call("/metrics")
    assert status == 200
    found = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
    values = {name.split("{")[0]: float(value) for name, value in found.items()}
    assert values["nano_inference_generation_tokens_total"] >= 24
    assert values["nano_inference_num_requests_running"] == 0
