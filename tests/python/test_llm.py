"""LLM, end to end on a tiny random model; the numbers come from transformers on torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nano_inference import LLM, SamplingParams, _core, loader
from nano_inference.outputs import RequestOutput
from nano_inference.random_model import write_random_model
from nano_inference.request import RequestState

VLLM_SCRIPT = """
from vllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=20)

def main():
    llm = LLM(model=MODEL, max_model_len=512, tensor_parallel_size=1, trust_remote_code=False,
              gpu_memory_utilization=0.3, enforce_eager=False)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    outputs += llm.chat(conversation, sampling_params=sampling_params, use_tqdm=False)
    return outputs

if __name__ == "__main__":
    results = main()
"""


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(str(model_dir), use_tqdm_on_load=False, check_invariants=True) as llm:
        yield llm


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True, **fields})


def wild(**fields: Any) -> SamplingParams:
    """Hot enough for broken UTF-8 and special tokens."""
    return SamplingParams(
        **{"temperature": 5.0, "max_tokens": 60, "ignore_eos": True, "seed": 1, **fields}
    )


def wait_until_idle(llm: LLM) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (stats := llm.stats)["running"] + stats["waiting"] > 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert stats["blocks_free"] + stats["blocks_cached"] == stats["blocks_total"]
    return stats


# -- A script for vLLM ----------------------------------------------------------------------------


def test_a_vllm_script_moves_by_its_import(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = VLLM_SCRIPT.replace("from vllm import", "from nano_inference import")
    scope = {"__name__": "__main__", "MODEL": str(model_dir)}
    exec(compile(script, "script", "exec"), scope)
    results: list[RequestOutput] = scope["results"]  # type: ignore[assignment]
    assert len(results) == 5 and capsys.readouterr().out.count("Generated text") == 4
    for result in results:
        assert result.finished and result.outputs[0].finish_reason in ("length", "stop")
        assert 0 < len(result.outputs[0].token_ids) <= 20
    assert results[4].prompt == "<s><|system|>Be brief.<|user|>Hi<|assistant|>"


# -- Prompts and batches --------------------------------------------------------------------------


def test_forms_of_prompts(llm: LLM) -> None:
    ids = [256, *b"abc"]
    forms: list[Any] = ["abc", ids, {"prompt": "abc"}, {"prompt_token_ids": ids}]
    forms += [{"prompt_token_ids": np.array(ids), "cache_salt": "s"}, tuple(ids)]
    outputs = llm.generate(forms, greedy())
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt_token_ids for o in outputs] == [ids] * len(forms)
    assert [o.prompt for o in outputs] == ["abc", None, "abc", None, None, None]
    for form in forms:
        (alone,) = llm.generate(form, greedy())
        assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_both_text_and_ids(llm: LLM) -> None:
    prompt: dict[str, Any] = {"prompt": "what was meant", "prompt_token_ids": [1, 2]}
    (out,) = llm.generate(prompt, greedy())
    assert (out.prompt, out.prompt_token_ids) == ("what was meant", [1, 2])


def test_batch_keeps_order_and_equals_single(llm: LLM) -> None:
    prompts = [f"prompt {i} " * (1 + i % 7) for i in range(40)]
    params = [wild(seed=i, max_tokens=1 + i) for i in range(40)]
    batch = llm.generate(prompts, params)
    assert [o.prompt for o in batch] == prompts
    assert len({o.request_id for o in batch}) == 40
    for i in (0, 7, 39):
        (alone,) = llm.generate(prompts[i], params[i])
        assert alone.outputs == batch[i].outputs


def test_the_first_step_knows_all_prompts(llm: LLM) -> None:
    for _ in range(5):
        wait_until_idle(llm)
        before = llm.stats["steps"]
        llm.generate([f"prompt {i}" for i in range(8)], greedy(max_tokens=1), use_tqdm=False)
        steps = llm.engine.core.trace(before + 1)
        assert [len(step["entries"]) for step in steps] == [8]


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 3000, "2048"),
        ([], "empty"),
        ([1, 261], r"prompt\[1\] is 261"),
        ([-1], r"prompt\[0\] is -1"),
        ([10**12], "10+ at index 0"),
        ({"text": "a"}, "'text'"),
        ({"prompt": 5}, "prompt must be a string"),
        ({}, "prompt_token_ids"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids"),
        (None, "prompt"),
        ([1.5], "token ids"),
        ("\ud800", "prompt must be valid Unicode"),
        (b"bytes", "token ids"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: Any, message: str) -> None:
    before = llm.stats
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt] if prompt == [] else prompt, greedy())
    with pytest.raises(ValueError, match=f"^prompt 1: .*({message})"):
        llm.generate(["fine", prompt, "fine"], greedy())
    after = llm.stats
    assert after["steps"] == before["steps"] and after["received"] == before["received"]


def test_lists_must_match(llm: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params: 3 given for 2 prompts"):
        llm.generate(["a", "b"], [greedy()] * 3)
    with pytest.raises(ValueError, match="priority: 1 given for 2 prompts"):
        llm.generate(["a", "b"], greedy(), priority=[0])
    with pytest.raises(ValueError, match="sampling_params must be a SamplingParams"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]


def test_priority_needs_its_policy(llm: LLM) -> None:
    with pytest.raises(ValueError, match="priority .* scheduling_policy='priority'"):
        llm.generate("a", greedy(), priority=1)


def test_cache_salt_separates(llm: LLM) -> None:
    text = "a prompt of more than two blocks of tokens, only used here"

    def cached(salt: str) -> int:
        (out,) = llm.generate({"prompt": text, "cache_salt": salt}, greedy())
        return out.num_cached_tokens

    assert cached("one") == 0
    assert cached("one") == 48
    assert cached("two") == 0


# -- Against torch --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_logprobs(model_dir: Path) -> Any:
    """Log-probabilities [len, vocab] of a sequence, by transformers in float32."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def logprobs(ids: list[int]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        return np.asarray(torch.log_softmax(logits, -1).numpy())

    return logprobs


def check_entry(entry: dict[int, Any], token: int, row: Any, count: int) -> None:
    """One token's logprobs: the token first, then the `count` likeliest, each with its rank."""
    order = np.argsort(-row, kind="stable")
    assert next(iter(entry)) == token
    # The reference is another float32 computation: ranks may swap where it sees a tie.
    for found, scored in entry.items():
        assert abs(scored.logprob - row[found]) < 1e-3
        assert abs(row[order[scored.rank - 1]] - row[found]) < 1e-3
        assert scored.decoded_token == bytes([found]).decode(errors="replace") or found > 255
    assert {1, *range(1, count + 1)} >= {s.rank for t, s in entry.items() if t != token}
    assert len(entry) in (max(count, 1), count + 1)


def test_logprobs_and_greedy_tokens_equal_torchs(llm: LLM, torch_logprobs: Any) -> None:
    (out,) = llm.generate("Once upon a time", greedy(max_tokens=30, logprobs=4, prompt_logprobs=2))
    choice, prompt = out.outputs[0], out.prompt_token_ids
    rows = torch_logprobs(prompt + choice.token_ids)
    assert choice.logprobs is not None and len(choice.logprobs) == 30
    total = 0.0
    for i, token in enumerate(choice.token_ids):
        row = rows[len(prompt) + i - 1]
        assert row.max() - row[token] < 1e-3
        check_entry(choice.logprobs[i], token, row, 4)
        total += row[token]
    assert choice.cumulative_logprob == pytest.approx(total, abs=1e-2)
    assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == len(prompt)
    assert out.prompt_logprobs[0] is None
    for i in range(1, len(prompt)):
        entry = out.prompt_logprobs[i]
        assert entry is not None
        check_entry(entry, prompt[i], rows[i - 1], 2)


def test_logprobs_of_sampled_tokens_are_the_models(llm: LLM, torch_logprobs: Any) -> None:
    """Neither temperature nor penalties change what is reported."""
    params = wild(logprobs=0, max_tokens=20, repetition_penalty=1.5, n=2)
    (out,) = llm.generate("abc", params)
    for choice in out.outputs:
        rows = torch_logprobs(out.prompt_token_ids + choice.token_ids)
        assert choice.logprobs is not None
        for i, token in enumerate(choice.token_ids):
            check_entry(choice.logprobs[i], token, rows[len(out.prompt_token_ids) + i - 1], 0)


def test_prompt_logprobs_survive_the_prefix_cache(llm: LLM) -> None:
    prompt = "the same long prompt, twice, and longer than a few blocks"
    first, second = (llm.generate(prompt, greedy(prompt_logprobs=0))[0] for _ in range(2))
    assert first.prompt_logprobs == second.prompt_logprobs
    assert len(second.prompt_logprobs or []) == len(second.prompt_token_ids)


# -- Choices, stops, streams ----------------------------------------------------------------------


def test_n_choices(llm: LLM) -> None:
    (out,) = llm.generate("abc", wild(n=4))
    assert [c.index for c in out.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 4
    (again,) = llm.generate("abc", wild(n=2))
    assert again.outputs == out.outputs[:2]


def test_stop_string_ends_one_choice_and_not_the_others(llm: LLM) -> None:
    (free,) = llm.generate("abc", wild(n=3, temperature=2.0))
    stop = free.outputs[1].text[10:12]
    (out,) = llm.generate("abc", wild(n=3, temperature=2.0, stop=[stop]))
    for before, after in zip(free.outputs, out.outputs, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at])
        assert after.stop_reason == (None if at < 0 else stop)
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
    assert out.outputs[1].finish_reason == "stop"
    stats = wait_until_idle(llm)
    assert stats["aborted"] == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stop": ["a", "\ufffd\ufffd"]}])
def test_stream_equals_generate(llm: LLM, seed: int, fields: dict[str, Any]) -> None:
    params = wild(seed=seed, logprobs=1, prompt_logprobs=0, **fields)
    params.skip_special_tokens = seed % 2 == 0
    (whole,) = llm.generate("prefix é", params)
    text, tokens, logprobs = ([[] for _ in whole.outputs] for _ in range(3))  # type: ignore[var-annotated]
    scores: list[Any] = []
    for part in llm.stream("prefix é", params):
        scores += part.prompt_logprobs or []
        for choice in part.outputs:
            text[choice.index].append(choice.text)
            tokens[choice.index] += choice.token_ids
            logprobs[choice.index] += choice.logprobs or []
    for choice in whole.outputs:
        assert "".join(text[choice.index]) == choice.text
        assert tokens[choice.index] == choice.token_ids
        assert logprobs[choice.index] == choice.logprobs
    assert scores == whole.prompt_logprobs
    assert part.finished
    last = [*llm.stream("prefix é", params, delta=False)][-1]
    assert last.outputs == whole.outputs


def test_stream_checks_before_it_is_read(llm: LLM) -> None:
    with pytest.raises(ValueError, match="empty"):
        llm.stream([], greedy())


def test_closing_a_stream_frees_its_blocks(endless_model_dir: Path) -> None:
    with LLM(str(endless_model_dir), num_blocks=12_500, use_tqdm_on_load=False) as llm:
        stream = llm.stream("abc", greedy(max_tokens=None))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert wait_until_idle(llm)["aborted"] == 1


def test_a_stop_string_frees_the_blocks(endless_model_dir: Path) -> None:
    with LLM(str(endless_model_dir), num_blocks=12_500, use_tqdm_on_load=False) as llm:
        params = greedy(max_tokens=None, stop="aaa", allowed_token_ids=[97])
        assert llm.generate("abc", params)[0].outputs[0].stop_reason == "aaa"
        stats = wait_until_idle(llm)
        assert (stats["finished"], stats["aborted"]) == (1, 0)
        assert stats["generated_tokens"] < 100_000


def test_streams_side_by_side_and_a_batch_between(llm: LLM) -> None:
    params = [wild(seed=i, max_tokens=40) for i in range(3)]
    expected = [llm.generate("abc", p)[0].outputs[0].text for p in params]
    streams = [llm.stream("abc", p) for p in params]
    got = [next(s).outputs[0].text for s in streams]
    assert llm.generate("abc", params[0])[0].outputs[0].text == expected[0]
    for i, stream in enumerate(streams):
        got[i] += "".join(part.outputs[0].text for part in stream)
    assert got == expected


def test_threads_share_an_llm(llm: LLM) -> None:
    expected = [llm.generate("abc", wild(seed=i))[0].outputs[0].text for i in range(4)]
    got: dict[int, str] = {}

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = llm.generate("abc", wild(seed=i))[0].outputs[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [got[i] for i in range(4)] == expected


# -- Chat -----------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "he"}]


def test_chat(llm: LLM) -> None:
    one = llm.chat(TALK[:1], greedy())
    assert [o.prompt for o in one] == ["<s><|user|>hi<|assistant|>"]
    assert one[0].prompt_token_ids == [256, 258, *b"hi", 259]
    two = llm.chat([TALK[:1], [{"role": "user", "content": "ho"}]], greedy())
    assert [o.prompt for o in two] == ["<s><|user|>hi<|assistant|>", "<s><|user|>ho<|assistant|>"]
    assert two[0].outputs == one[0].outputs
    streamed = "".join(o.outputs[0].text for o in llm.stream_chat(TALK[:1], greedy()))
    assert streamed == one[0].outputs[0].text


def test_chat_options(llm: LLM) -> None:
    def prompt(**options: Any) -> str | None:
        return llm.chat(TALK, greedy(), **options)[0].prompt

    assert prompt(add_generation_prompt=False) == "<s><|user|>hi<|assistant|>he</s>"
    continued = prompt(add_generation_prompt=False, continue_final_message=True)
    assert continued == "<s><|user|>hi<|assistant|>he"
    template = "{{ messages | length }}{{ word }}"
    assert prompt(chat_template=template, chat_template_kwargs={"word": "x"}) == "2x"
    with pytest.raises(ValueError, match="exclude"):
        prompt(continue_final_message=True)
    with pytest.raises(ValueError, match="messages"):
        llm.chat("hi")  # type: ignore[arg-type]


def test_every_chat_takes_the_same_options(llm: LLM) -> None:
    options: dict[str, Any] = {
        "chat_template": "{{ messages | length }}{{ word }}",
        "chat_template_kwargs": {"word": "x"},
    }
    assert [*llm.stream_chat(TALK, greedy(), **options)][0].prompt == "2x"
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    (first, *_) = llm.stream_chat(TALK, greedy(), **continued)
    assert first.prompt == "<s><|user|>hi<|assistant|>he"
    for chat in (llm.chat, llm.stream_chat):
        with pytest.raises(TypeError, match="chat_templat'"):
            chat(TALK, greedy(), chat_templat="x")  # type: ignore[operator]
        for key in ("messages", "add_generation_prompt", "tools", "chat_template", "tokenize"):
            with pytest.raises(ValueError, match=f"chat_template_kwargs must not hold '{key}'"):
                chat(TALK, greedy(), chat_template_kwargs={key: True})  # type: ignore[operator]
        with pytest.raises(ValueError, match="chat_template_kwargs must be a dict"):
            chat(TALK, greedy(), chat_template_kwargs="x")  # type: ignore[operator]
        with pytest.raises(ValueError, match="chat_template must be a string"):
            chat(TALK, greedy(), chat_template=5)  # type: ignore[operator]


def test_chat_of_content_parts(llm: LLM) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    (out,) = llm.chat([{"role": "user", "content": parts}], greedy())
    assert out.prompt == "<s><|user|>h\ni<|assistant|>"
    with pytest.raises(ValueError, match="image_url"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], greedy())


# -- Progress and positions -----------------------------------------------------------------------


class Bar:
    def __init__(self, total: int, **_: Any) -> None:
        self.total, self.steps, self.closed = total, [], False  # type: ignore[var-annotated]

    def update(self, n: int) -> None:
        self.steps.append(n)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("how", ["generate", "chat"])
def test_use_tqdm_may_make_the_bar(llm: LLM, how: str) -> None:
    bars: list[Bar] = []

    def make(**options: Any) -> Bar:
        bars.append(Bar(**options))
        return bars[-1]

    params = [greedy(max_tokens=1 + i % 5) for i in range(9)]
    many: list[Any] = ["abc"] * 9 if how == "generate" else [TALK[:1]] * 9
    call: Any = getattr(llm, how)
    call(many, params, use_tqdm=make)
    assert bars[0].total == sum(bars[0].steps) == 9 and bars[0].closed
    call(many, params, make, None)  # vLLM's order
    assert sum(bars[1].steps) == 9 and not llm._bars
    for wrong in (1, "yes", None):
        with pytest.raises(ValueError, match="use_tqdm must be True, False or a callable"):
            call(many, params, use_tqdm=wrong)
    with pytest.raises(ValueError, match="lora_request must be None: LoRA.* not available"):
        call(many, params, False, "adapter")


def test_progress_costs_the_same_for_every_prompt(llm: LLM) -> None:
    """One look at each prompt's end, not one at all of them after each step."""
    looks = 0

    class Counting(RequestState):
        @property
        def finished(self) -> bool:
            nonlocal looks
            looks += 1
            return self._finished

        @finished.setter
        def finished(self, value: bool) -> None:
            self._finished = value

    params = [greedy(max_tokens=500), *[greedy(max_tokens=1)] * 99]  # long after the others' ends
    requests = llm._prepare(["abc"] * 100, params, None, True)
    for request in requests:
        request.state.__dict__["_finished"] = request.state.__dict__.pop("finished")
        request.state.__class__ = Counting
    steps = llm.stats["steps"]
    llm._run(requests, Bar)
    steps = llm.stats["steps"] - steps
    # Some looks at each output and at each step; one at all prompts after each step would be more.
    assert looks < 4 * (500 + 99 + steps)


# -- Life and death -------------------------------------------------------------------------------


def test_default_params_are_the_models(tmp_path: Path) -> None:
    path = write_random_model(tmp_path)
    recommended = '{"temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": [257, 97]}'
    (path / "generation_config.json").write_text(recommended)
    with LLM(str(path), use_tqdm_on_load=False) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(
            temperature=0.6, top_k=20, top_p=0.9
        )
        (out,) = llm.generate("abc", SamplingParams(logit_bias={97: 100.0}, temperature=0))
        assert out.outputs[0].token_ids == [97]
        assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", None)


def test_eos_of_the_tokenizer_stops(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, eos_token_id=None)
    (path / "generation_config.json").unlink()
    params = SamplingParams(logit_bias={257: 100.0}, temperature=0)
    with LLM(str(path), use_tqdm_on_load=False) as llm:
        (out,) = llm.generate("abc", params)
        assert (out.outputs[0].token_ids, out.outputs[0].finish_reason) == ([257], "stop")
    with LLM(str(path), skip_tokenizer_init=True, use_tqdm_on_load=False) as llm:
        (out,) = llm.generate([97], params)
        assert out.outputs[0].finish_reason == "length"


def test_a_fork_is_refused_and_not_left_to_hang(model_dir: Path) -> None:
    script = f"""
import os, sys
from nano_inference import LLM, SamplingParams
llm = LLM({str(model_dir)!r}, use_tqdm_on_load=False)
request = llm.engine.prepare("abc", SamplingParams())
pid = os.fork()
if pid == 0:
    for call in (lambda: llm.generate("abc"), lambda: llm.engine.submit(request)):
        try:
            call()
        except RuntimeError as error:
            print(error, flush=True)
    llm.close()
    os._exit(0)
os.waitpid(pid, 0)
print(len(llm.generate("abc", SamplingParams(ignore_eos=True))[0].outputs[0].token_ids))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100
    )
    *refusals, count = done.stdout.splitlines()
    assert len(refusals) == 2 and count == "16"
    assert all("is a fork of it" in line and "spawn" in line for line in refusals)


def test_ctrl_c_aborts_and_the_llm_lives_on(llm: LLM) -> None:
    before = llm.stats

    def interrupt() -> None:
        while llm.stats["steps"] < before["steps"] + 5:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        while True:  # until the signal is there
            llm.generate(["a", "b"], greedy(max_tokens=None))
    thread.join()
    stats = wait_until_idle(llm)
    assert stats["received"] == stats["finished"] + stats["aborted"] + stats["rejected"]
    assert not llm.engine.requests
    assert len(llm.generate("abc", greedy())[0].outputs[0].token_ids) == 16


def test_close_ends_what_runs(endless_model_dir: Path) -> None:
    llm = LLM(str(endless_model_dir), num_blocks=12_500, use_tqdm_on_load=False)
    stream = llm.stream("abc", greedy(max_tokens=None))
    parts = [next(stream)]
    llm.close()
    parts += stream
    assert parts[-1].outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("abc")
    llm.close()


def test_metrics(llm: LLM) -> None:
    began = time.monotonic()
    (out,) = llm.generate("abc", greedy())
    m = out.metrics
    assert m.first_scheduled_time is not None and m.first_token_time is not None
    assert m.last_token_time is not None and m.finished_time is not None
    assert began <= m.arrival_time <= m.first_scheduled_time <= m.first_token_time
    assert m.first_token_time < m.last_token_time <= m.finished_time <= time.monotonic()


def test_skip_tokenizer_init(model_dir: Path, llm: LLM) -> None:
    with LLM(str(model_dir), skip_tokenizer_init=True, use_tqdm_on_load=False) as bare:
        (out,) = bare.generate([256, 97], greedy(logprobs=1))
        (full,) = llm.generate([256, 97], greedy())
        assert out.outputs[0].token_ids == full.outputs[0].token_ids
        assert (out.prompt, out.outputs[0].text) == (None, "")
        for call in (
            lambda: bare.generate("abc"),
            lambda: bare.chat(TALK),
            lambda: bare.get_tokenizer(),
            lambda: bare.generate([1], greedy(stop="x")),
            lambda: bare.generate([1], greedy(bad_words=["x"])),
        ):
            with pytest.raises(ValueError, match="skip_tokenizer_init"):
                call()


# -- Memory ---------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_before_loading(tmp_path: Path) -> None:
    path = write_random_model(tmp_path)
    (path / "model.safetensors").unlink()  # nobody gets so far as to look for it
    config = (path / "config.json").read_text()
    config = config.replace('"hidden_size": 64', '"hidden_size": 262144')
    config = config.replace('"intermediate_size": 160', '"intermediate_size": 1000000')
    (path / "config.json").write_text(config)
    with pytest.raises(MemoryError) as refused:
        LLM(str(path))
    # float32: 2 layers of q, k, v, o, gate, up, down; embeddings and head; norms
    hidden, inner, heads = 262144, 1_000_000, 64
    layer = hidden * (heads + 32 + 32) + heads * hidden + 3 * hidden * inner + 2 * hidden
    weights = 4 * (2 * layer + 2 * 261 * hidden + hidden) / 1e9
    message = str(refused.value)
    assert "\n" not in message and f"weights {weights:.0f}." in message.replace(",", "")
    assert "activations" in message and "KV cache" in message and "available" in message


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("phase", ["weights", "finish_loading"])
def test_a_failed_start_keeps_no_memory(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, phase: str, threads: int
) -> None:
    """Though the exception, and with it the traceback and its variables, is still there."""
    engines = []
    load = loader.load_weights

    def watch(core: _core.Engine, *args: Any, **options: Any) -> int:
        engines.append(weakref.ref(core))
        return load(core, *args, **{**options, "threads": threads}) if phase == "weights" else 0

    def broken(*_: Any) -> Any:
        raise ValueError("a broken weight")

    monkeypatch.setattr(loader, "load_weights", watch)
    monkeypatch.setattr(loader, "slot_view", broken)
    with pytest.raises(ValueError, match="broken weight|were not loaded") as failed:
        LLM(str(model_dir))
    assert [engine() for engine in engines] == [None]
    del failed


def test_a_cache_too_small_says_what_fits(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len=2048.*num_blocks=5.*max_model_len=80"):
        LLM(str(model_dir), num_blocks=5)
    with LLM(str(model_dir), num_blocks=5, max_model_len=80, use_tqdm_on_load=False) as llm:
        (out,) = llm.generate("a", greedy(max_tokens=None))
        assert len(out.outputs[0].token_ids) + len(out.prompt_token_ids) == 80
    with pytest.raises(MemoryError, match="does not fit.*KV cache of at least 819"):
        LLM(str(model_dir), num_blocks=10**8)


def test_a_small_cache_still_finishes_everything(model_dir: Path) -> None:
    with LLM(
        str(model_dir),
        num_blocks=10,
        max_model_len=160,
        use_tqdm_on_load=False,
        check_invariants=True,
    ) as llm:
        params = [wild(seed=i, max_tokens=100) for i in range(12)]
        crowded = llm.generate(["abc"] * 12, params)
        assert llm.stats["preemptions"] > 0
        for i in (0, 5, 11):
            assert llm.generate("abc", params[i])[0].outputs == crowded[i].outputs
        wait_until_idle(llm)
