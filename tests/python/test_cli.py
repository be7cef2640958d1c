"""The command nano-inference: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nano_inference import LLM, SamplingParams, __version__, _core, bundled
from nano_inference.cli import main

NOTICE = bundled.NOTICE + "\n"


def invoke(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(args), input=stdin)


def popen(*args: str, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "nano_inference", *args]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)


def one_error_line(result: Result, *words: str) -> None:
    assert result.stdout == ""
    lines = result.stderr.removeprefix(NOTICE).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# -- generate -------------------------------------------------------------------------------------


@pytest.fixture
def model(model_dir: Path) -> list[str]:
    return ["--model", str(model_dir)]


def expected_text(model_dir: Path, prompt: str, **fields: Any) -> str:
    with LLM(str(model_dir), use_tqdm_on_load=False) as llm:
        return llm.generate(prompt, SamplingParams(**fields))[0].outputs[0].text


@pytest.mark.parametrize("how", [[], ["--stream"], ["--no-stream"]])
def test_generate(model_dir: Path, model: list[str], how: list[str]) -> None:
    options = ["--seed", "3", "--temperature", "2", "--max-tokens", "50"]
    result = invoke("generate", "abc é", *model, *options, *how)
    assert result.exit_code == 0 and result.stderr == ""
    expected = expected_text(model_dir, "abc é", seed=3, temperature=2, max_tokens=50)
    assert result.stdout == expected + "\n"


def test_sampling_options_reach_the_engine(
    model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.25,
        "frequency_penalty": 0.75,
        "min_tokens": 2,
        "max_tokens": 9,
        "seed": 11,
    }
    seen: list[SamplingParams] = []

    def generate(self: LLM, prompts: list[str], params: SamplingParams) -> list[Any]:
        seen.append(params)
        return []

    monkeypatch.setattr(LLM, "generate", generate)
    options = [w for k, v in fields.items() for w in ("--" + k.replace("_", "-"), str(v))]
    more = ["--ignore-eos", "--stop", "x", "--stop", "y", "-n", "3"]
    more += ["--bad-words", "v", "--bad-words", "w", "--logprobs", "40", "--json"]
    assert invoke("generate", "abc", *model, *options, *more).exit_code == 0
    fields |= {"ignore_eos": True, "stop": ["x", "y"], "n": 3}
    assert seen == [SamplingParams(**fields, bad_words=["v", "w"], logprobs=40)]


def test_logprobs_are_in_the_json(model: list[str]) -> None:
    options = ["--temperature", "0", "--max-tokens", "3", "--json", "--logprobs", "25"]
    result = invoke("generate", "abc", *model, *options)
    (choice,) = json.loads(result.stdout)["outputs"]
    assert len(choice["logprobs"]) == 3
    for token, entry in zip(choice["token_ids"], choice["logprobs"], strict=True):
        assert (entry[0]["token_id"], entry[0]["rank"], len(entry)) == (token, 1, 25)
        assert entry[0]["logprob"] == max(e["logprob"] for e in entry) < 0
        assert entry[0]["token"] == chr(token)


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("5000000", 5_000_000), ("5MB", 5_000_000), ("4.5 MiB", 4_718_592), ("0.01gb", 10_000_000)],
)
def test_size_of_the_cache(model: list[str], size: str, bytes_: int) -> None:
    result = invoke("info", *model, "--kv-cache-memory", size, "--json")
    # a block of 16 tokens has 8192 bytes
    assert json.loads(result.stdout)["model"]["kv_cache_bytes"] == bytes_ // 8192 * 8192


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--top-k", "-5", "top_k"),
        ("--min-p", "2", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--presence-penalty", "3", "presence_penalty"),
        ("--frequency-penalty", "3", "frequency_penalty"),
        ("--max-tokens", "0", "max_tokens"),
        ("--min-tokens", "-1", "min_tokens"),
        ("--stop", "", "stop"),
        ("-n", "0", "n must be"),
        ("--dtype", "int3", "dtype"),
        ("--kv-cache-dtype", "int3", "kv_cache_dtype"),
        ("--kv-cache-memory", "3QB", "--kv-cache-memory"),
        ("--kv-cache-memory", "0", "--kv-cache-memory"),
        ("--bad-words", "", "bad_words"),
        ("--logprobs", "3", "--logprobs needs --json"),
        ("--max-model-len", "0", "max_model_len"),
        ("--num-threads", "0", "num_threads"),
        ("--isa", "sse1", "isa"),
        ("--revision", "", "revision"),
        ("--max-tokens", "many", "--max-tokens"),
        ("--unknown", "1", "--unknown"),
    ],
)
def test_impossible_options(model: list[str], option: str, value: str, name: str) -> None:
    result = invoke("generate", "abc", *model, option, value)
    assert result.exit_code == 2
    one_error_line(result, name)


def test_json_and_several_prompts(model_dir: Path, model: list[str]) -> None:
    options = ["--temperature", "0", "--max-tokens", "5", "--json"]
    result = invoke("generate", "one", "two", *model, *options, "-n", "2")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [f["prompt"] for f in found] == ["one", "two"]
    assert [f["prompt_tokens"] for f in found] == [4, 4]
    for entry in found:
        assert [c["index"] for c in entry["outputs"]] == [0, 1]
        expected = expected_text(model_dir, entry["prompt"], temperature=0, max_tokens=5)
        for choice in entry["outputs"]:
            assert choice["text"] == expected
            assert len(choice["token_ids"]) == 5
            assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_prompts_from_stdin_and_file(model: list[str], tmp_path: Path) -> None:
    options = [*model, "--temperature", "0", "--max-tokens", "5"]
    prompts = "first prompt\n\nzweite Frage: é\n"
    piped = invoke("generate", *options, stdin=prompts)
    file = tmp_path / "prompts.txt"
    file.write_text(prompts, encoding="utf-8")
    from_file = invoke("generate", "--file", str(file), *options)
    dash = invoke("generate", "--file", "-", *options, stdin=prompts)
    assert piped.exit_code == 0
    assert piped.stdout == from_file.stdout == dash.stdout
    shown = [line for line in piped.stdout.split("\n") if line.startswith("> ")]
    assert shown == ["> first prompt", "> zweite Frage: é"]


@pytest.mark.parametrize(
    ("args", "stdin", "word"),
    [
        ([], "", "no prompt"),
        ([], "\n\n", "no prompt"),
        (["a", "--file", "-"], "b\n", "--file"),
        (["--file", "/nowhere"], None, "/nowhere"),
        (["a", "b", "--stream"], None, "--stream"),
        (["a", "--json", "--stream"], None, "--stream"),
        (["a", "-n", "2", "--stream"], None, "--stream"),
    ],
)
def test_wrong_usage(args: list[str], stdin: str | None, word: str) -> None:
    result = invoke("generate", *args, stdin=stdin)
    assert result.exit_code == 2
    one_error_line(result, word, "nano-inference generate --help")


def test_bad_models(tmp_path: Path, model_dir: Path) -> None:
    result = invoke("generate", "abc", "--model", "/nonexistent")
    assert result.exit_code == 2
    one_error_line(result, "/nonexistent")
    result = invoke("generate", "abc", "--model", str(tmp_path))
    assert result.exit_code == 2
    one_error_line(result, "config.json")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    result = invoke("chat", "--model", str(tmp_path))
    assert result.exit_code == 2
    one_error_line(result, "tokenizer.json")


def test_debug_shows_the_traceback() -> None:
    result = invoke("--debug", "generate", "abc", "--model", "/nonexistent")
    assert isinstance(result.exception, ValueError)
    with popen("generate", "abc", "--model", "/nonexistent", "--debug") as process:
        _, err = process.communicate(timeout=60)
    assert "Traceback" in err and "ValueError" in err


def test_debug_may_be_a_prompt(model: list[str]) -> None:
    result = invoke("generate", *model, "--max-tokens", "3", "--json", "--", "--debug")
    assert json.loads(result.stdout)["prompt"] == "--debug"
    result = invoke("generate", "--model", "/nonexistent", "--", "--debug")
    assert result.exit_code == 2
    one_error_line(result, "/nonexistent")


def test_failures_while_running_exit_with_1(
    model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, line in (
        (RuntimeError("the device\nis lost"), "error: the device is lost"),
        (MemoryError("too big"), "error: too big"),
        (KeyError("bug"), "error: KeyError: 'bug' (--debug shows where)"),
    ):

        def broken(*args: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(LLM, "stream", broken)
        result = invoke("generate", "abc", *model)
        assert (result.exit_code, result.stderr) == (1, line + "\n")


def test_without_a_model() -> None:
    command = ["generate", "Once upon a time", "--max-tokens", "8", "--temperature", "0"]
    result = invoke(*command)
    assert result.exit_code == 0 and result.stderr == NOTICE
    named = invoke(*command, "--model", bundled.DEFAULT)
    assert named.stdout == result.stdout and named.stderr == ""


# -- chat -----------------------------------------------------------------------------------------


def test_chat_over_a_pipe(model_dir: Path, model: list[str]) -> None:
    options = ["--temperature", "0", "--max-tokens", "12"]
    lines = ["hi", "and then", "/reset", "hi", "/system Be kind.", "hi", "/foo", "", "/exit", "no"]
    with popen("chat", *model, *options) as process:
        out, err = process.communicate("\n".join(lines) + "\n", timeout=120)
    assert process.returncode == 0
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(str(model_dir), use_tqdm_on_load=False) as llm:

        def answer(*messages: str) -> str:
            roles = ["system", "user", "assistant"]
            talk = [dict(zip(("role", "content"), m.split(":", 1), strict=True)) for m in messages]
            assert all(m["role"] in roles for m in talk)
            return llm.chat(talk, params)[0].outputs[0].text

        first = answer("user:hi")
        second = answer("user:hi", f"assistant:{first}", "user:and then")
        third = answer("system:Be kind.", "user:hi")
    assert out == f"{first}\n{second}\n{first}\n{third}\n"
    assert err == "unknown command /foo; /help lists the commands\n"


def test_chat_ends_with_its_input(model: list[str]) -> None:
    result = invoke("chat", *model, "--system", "Be brief.", "--max-tokens", "4", stdin="hi")
    assert result.exit_code == 0 and result.stdout.endswith("\n")
    assert invoke("chat", *model, stdin="").stdout == ""


def test_chat_help_and_too_long_a_message(model: list[str]) -> None:
    stdin = "/help\n" + "x" * 3000 + "\nhi\n"
    result = invoke("chat", *model, "--max-tokens", "4", "--ignore-eos", stdin=stdin)
    assert result.exit_code == 1  # nobody watches: the failed answer must not pass unseen
    assert "/reset" in result.stdout and "/exit" in result.stdout
    assert "2048" in result.stderr and result.stderr.startswith("error: ")
    assert len(result.stdout.splitlines()[-1]) > 0


def test_chat_needs_a_template(model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    result = invoke("chat", "--model", str(tmp_path), stdin="hi\n")
    assert result.exit_code == 2
    one_error_line(result, "chat template")


def test_ctrl_c_stops_the_answer_and_not_the_chat(endless_model_dir: Path) -> None:
    model = ["--model", str(endless_model_dir)]
    with popen("chat", *model, "--ignore-eos", "--temperature", "0") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("talk for ever\n")
        process.stdin.flush()
        process.stdout.read(20)  # the answer has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("/reset\n/system x\n/exit\n", timeout=120)
    assert err.strip() == "[stopped]" and out.endswith("\n")
    assert process.returncode == 0


def test_ctrl_c_ends_generate_with_130(endless_model_dir: Path) -> None:
    model = ["--model", str(endless_model_dir)]
    with popen("generate", "abc", *model, "--ignore-eos", "--max-tokens", "190000") as process:
        assert process.stdout
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err.strip()) == (130, "")


def test_a_closed_pipe_is_no_traceback(endless_model_dir: Path) -> None:
    model = ["--model", str(endless_model_dir)]
    with popen("generate", "abc", *model, "--ignore-eos", "--max-tokens", "190000") as process:
        assert process.stdout and process.stderr
        process.stdout.read(20)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=120)
    assert (process.returncode, err) == (1, "")


# -- info, version, help --------------------------------------------------------------------------


def test_info_as_json(model: list[str]) -> None:
    result = invoke("info", *model, "--json", "--num-threads", "1", "--isa", "portable")
    found = json.loads(result.stdout)
    machine, shape = found["machine"], found["model"]
    assert machine["devices"] == ["cpu"] and machine["version"] == __version__
    assert (machine["threads"], machine["isa"]) == (1, "portable")
    assert {"portable", "reference"} <= set(machine["isas"])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine["memory_available"] <= machine["memory_total"] <= total
    # Embedding and head of 261 x 64; 2 layers; 5 norms
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160
    assert shape["parameters"] == 2 * 261 * 64 + 2 * layer + 5 * 64
    assert shape["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert shape["weight_bytes"] >= 4 * shape["parameters"]
    assert shape["fits"] and shape["kv_cache_tokens"] <= shape["tokens_that_fit"]
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_model_len")
    assert [shape[name] for name in names] == [2, 4, 2, 16, 261, 2048]


def test_info_says_why_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "cuda_devices", lambda: [])
    monkeypatch.setattr(_core, "cuda_error", lambda: "no driver here")
    assert re.search(r"\ncuda +cannot be used: no driver here\n", invoke("info").stdout)
    machine = json.loads(invoke("info", "--json").stdout)["machine"]
    assert (machine["cards"], machine["cuda_error"]) == ([], "no driver here")
    result = invoke("info", "--device", "cuda")
    assert result.exit_code == 2
    one_error_line(result, "device='cuda' cannot be used: no driver here")


def test_info_shows_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_memory = _core.Engine.plan_memory

    def plan(config: _core.EngineConfig, model: _core.ModelConfig) -> dict[str, int]:
        if config.device == "cpu":
            return plan_memory(config, model)
        if config.device_index == 2:
            raise RuntimeError("out of memory on a full card")
        memory = {"memory_total": 141 * 10**9, "memory_available": 140 * 10**9}
        return memory if config.device_index == 1 else {key: 10**10 for key in memory}

    names = ["NVIDIA small", "NVIDIA H200", "NVIDIA full"]
    monkeypatch.setattr(_core, "cuda_devices", lambda: names)
    monkeypatch.setattr(_core, "cuda_error", lambda: "")
    monkeypatch.setattr(_core.Engine, "plan_memory", staticmethod(plan))
    shown = invoke("info").stdout
    assert re.search(r"\ndevices +cpu, cuda:0, cuda:1, cuda:2\n", shown)
    assert re.search(
        r"\ncuda:2 +NVIDIA full, cannot be opened: out of memory on a full card\n", shown
    )
    assert re.search(r"\ncuda:1 +NVIDIA H200, 140.00 GB available of 141.00 GB\n", shown)


def test_info_for_people(model: list[str]) -> None:
    result = invoke("info", *model)
    assert result.exit_code == 0
    for text in ("instruction sets", "512 bytes a token", "LlamaForCausalLM", "2 layers"):
        assert text in result.stdout
    assert "LlamaForCausalLM" not in invoke("info").stdout


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--num-threads", "-3", "num_threads must be"),
        ("--num-threads", "0", "num_threads must be"),
        ("--isa", "sse1", "isa"),
        ("--dtype", "bogus", "--dtype needs --model"),
        ("--kv-cache-dtype", "float32", "--kv-cache-dtype needs --model"),
        ("--max-model-len", "9", "--max-model-len needs --model"),
        ("--kv-cache-memory", "4GB", "--kv-cache-memory needs --model"),
        ("--revision", "v1", "--revision needs --model"),
    ],
)
def test_info_checks_its_options(option: str, value: str, words: str) -> None:
    result = invoke("info", option, value)
    assert result.exit_code == 2
    one_error_line(result, words)


def test_info_names_its_threads() -> None:
    machine = json.loads(invoke("info", "--json", "--num-threads", "3").stdout)["machine"]
    assert machine["threads"] == 3 and machine["device"].endswith(", 3 threads")


def test_info_of_a_model_that_does_not_fit(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 1 << 24}))
    result = invoke("info", "--model", str(tmp_path), "--json")
    found = json.loads(result.stdout)["model"]
    assert found["fits"] is False and "does not fit" in found["why_not"]
    assert found["tokens_that_fit"] == 0


def test_version() -> None:
    assert invoke("version").stdout == __version__ + "\n"
    assert json.loads(invoke("version", "--json").stdout) == {"version": __version__}
    assert invoke("--version").stdout == f"nano-inference {__version__}\n"


def test_help() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("generate", "chat", "info", "version", "--debug"):
        assert name in result.stdout
    for command in ("generate", "chat", "info", "version"):
        shown = invoke(command, "-h")
        assert shown.exit_code == 0
        options = [line for line in shown.stdout.splitlines() if line.lstrip().startswith("-")]
        assert all(len(line.split("  ")) > 1 for line in options)


def test_without_a_command_there_is_help() -> None:
    result = invoke()
    assert (result.exit_code, result.stdout) == (0, invoke("--help").stdout)
    assert len(result.stdout.splitlines()) > 10 and result.stderr == ""


def test_unknown_command() -> None:
    result = invoke("frobnicate")
    assert result.exit_code == 2
    one_error_line(result, "frobnicate")
