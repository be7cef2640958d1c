"""The bundled models: their files, their skills through the engine, and how they were made."""

from __future__ import annotations

import json
import logging
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_inference import LLM, SamplingParams, bundled
from nano_inference.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from training import data, evaluate, skills, stories  # noqa: E402
from training import tokenizer as training_tokenizer  # noqa: E402

MAIN, DRAFT = (bundled.bundled_model(name) for name in bundled.MODELS)
assert MAIN is not None and DRAFT is not None
SCORES = json.loads((ROOT / "training/logs/scores.json").read_text())


@pytest.fixture(scope="module")
def engine() -> evaluate.Engine:
    return evaluate.Engine(bundled.DEFAULT, use_tqdm_on_load=False)


@cache
def raw_tokenizer() -> Any:
    return training_tokenizer.Tokenizer.from_file(str(MAIN / "tokenizer.json"))


# -- Files ----------------------------------------------------------------------------------------


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def test_files_and_sizes() -> None:
    assert size(MAIN) + size(DRAFT) <= 12_000_000 and size(DRAFT) <= 1_000_000
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    for folder in (MAIN, DRAFT):
        assert files | {"tokenizer_config.json"} <= {f.name for f in folder.iterdir()}
    same = ("tokenizer.json", "tokenizer_config.json")
    assert all((MAIN / n).read_bytes() == (DRAFT / n).read_bytes() for n in same)


def test_shape() -> None:
    config = json.loads((MAIN / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] == 64 and config["hidden_size"] % 128 == 0
    assert config["max_position_embeddings"] >= 1024
    assert 2e6 <= (MAIN / "model.safetensors").stat().st_size / 2 <= 6e6  # bf16 parameters


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.from_dir(MAIN)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_both() -> None:
    """And gives the logits that the engine gives, within what bf16 may differ by."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (MAIN, DRAFT):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Once upon a time, there was a girl named Mia.").input_ids
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            wanted = exact(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        with LLM(str(folder), dtype="float32", use_tqdm_on_load=False) as llm:
            params = SamplingParams(max_tokens=1, prompt_logprobs=0)
            (output,) = llm.generate([ids], params, use_tqdm=False)
            ours = [
                entry[t].logprob
                for t, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            ]
            (answer,) = llm.chat(messages, params, use_tqdm=False)
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        wanted_chat = tokenizer(chat, add_special_tokens=False).input_ids
        assert answer.prompt_token_ids == wanted_chat
        theirs = [float(wanted[i, t]) for i, t in enumerate(ids[1:])]
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


# -- Use ------------------------------------------------------------------------------------------


def test_the_python_api_uses_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), LLM(use_tqdm_on_load=False) as llm:
        output = llm.chat([{"role": "user", "content": "What is 345 + 278?"}], use_tqdm=False)
    assert [r.getMessage() for r in caplog.records] == [bundled.NOTICE]
    assert output[0].outputs[0].text == "623"


def test_the_readme_tells_its_story(engine: evaluate.Engine) -> None:
    """The story in README.md is how the one of the first command begins."""
    lines = [x[2:] for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("> ,")]
    params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=100, seed=1)
    (output,) = engine.llm.generate("Once upon a time", params, use_tqdm=False)
    assert len(lines) == 1 and output.outputs[0].text.startswith(lines[0] + "\n\n")


def test_the_readme_tells_what_it_answers(engine: evaluate.Engine) -> None:
    """The conversation in README.md is a real one."""
    text = (ROOT / "README.md").read_text().split("nano-inference chat --temperature 0\n")[1]
    lines = text.split("```")[0].strip().splitlines()
    asked = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
    told = [line for line in lines if not line.startswith("> ")]
    assert len(asked) == len(told) >= 4
    messages: list[dict[str, str]] = []
    for question, answer in zip(asked, told, strict=True):
        messages.append({"role": "user", "content": question})
        params = SamplingParams(temperature=0, max_tokens=200)
        (output,) = engine.llm.chat(messages, params, use_tqdm=False)
        assert output.outputs[0].text == answer
        messages.append({"role": "assistant", "content": answer})


# -- Skills, on questions that training never saw -------------------------------------------------


@pytest.fixture(scope="module")
def few_scores(engine: evaluate.Engine) -> dict[str, Any]:
    return evaluate.score_skills(engine, raw_tokenizer(), 60)


@pytest.mark.parametrize("skill", [*skills.SKILLS, "retrieval at 100", "retrieval at 900"])
def test_skill(few_scores: dict[str, Any], skill: str) -> None:
    assert few_scores[skill]["percent"] >= 95, few_scores[skill]["wrong"]


def test_kept_scores() -> None:
    """The scores on 500 questions a skill: enough, and the same through both implementations."""
    ours, theirs = SCORES["engine"]["skills"], SCORES["transformers"]["skills"]
    assert ours.keys() == theirs.keys() and {*skills.SKILLS, "retrieval at 900"} <= ours.keys()
    for skill, score in ours.items():
        assert score["of"] >= 500 and score["percent"] >= 95
        assert abs(score["percent"] - theirs[skill]["percent"]) <= 0.5, skill
    told, as_told = SCORES["engine"]["stories"], SCORES["transformers"]["stories"]
    assert told["perplexity"] == pytest.approx(as_told["perplexity"], rel=0.005)
    assert abs(told["greedy"]["percent"] - as_told["greedy"]["percent"]) <= 0.5
    assert SCORES["draft_agreement"] >= 60


def test_the_model_card_states_the_scores() -> None:
    card = (MAIN / "README.md").read_text()
    table = evaluate.table({name: SCORES[name] for name in ("engine", "transformers")})
    assert table in card and f"{SCORES['draft_agreement']}%" in card


def test_stories(engine: evaluate.Engine) -> None:
    """Perplexity on held-out stories as it was measured; most of its own are consistent."""
    told = evaluate.score_stories(engine, raw_tokenizer(), 40)
    assert told["perplexity"] == pytest.approx(
        SCORES["transformers"]["stories"]["perplexity"], rel=0.05
    )
    for how in ("greedy", "sampled"):
        assert told[how]["percent"] >= 80, told[how]["faults"]


def test_the_draft_agrees() -> None:
    pair = evaluate.Transformers(str(MAIN)), evaluate.Transformers(str(DRAFT))
    assert evaluate.agreement(*pair, raw_tokenizer(), 8) >= 60


def test_a_spoiled_model_scores_badly(tmp_path: Path) -> None:
    """The scores can fail: two exchanged layers cost the skills."""
    from safetensors.torch import load_file, save_file

    for file in MAIN.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(MAIN / "model.safetensors")
    for name in [n for n in tensors if ".layers.0." in n]:
        other = name.replace(".0.", ".7.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spoiled = evaluate.Engine(str(tmp_path), use_tqdm_on_load=False)
    scores = evaluate.score_skills(spoiled, raw_tokenizer(), 20, only=["addition", "reversing"])
    assert all(score["percent"] < 50 for score in scores.values())


# -- How it was made ------------------------------------------------------------------------------


def test_the_tokenizer_is_made_again_bit_by_bit(tmp_path: Path) -> None:
    """The generator of the training text is the one that the models were made with."""
    training_tokenizer.save(training_tokenizer.train(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (MAIN / name).read_bytes()


def test_rows_keep_training_and_test_apart() -> None:
    """Rows are the same every time, whole, and hold no question of the test set."""
    rows = [data.Writer(raw_tokenizer(), "train 0").row(n) for n in (128, 512, data.CONTEXT)]
    again = [data.Writer(raw_tokenizer(), "train 0").row(n) for n in (128, 512, data.CONTEXT)]
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))
    train, test = data.Writer(raw_tokenizer(), "x"), data.Writer(raw_tokenizer(), "x", test=True)
    for _ in range(100):
        for skill in skills.SKILLS:
            assert not skills.held_out(skills.sample(skill, train.rng).key)
            assert skills.held_out(skills.sample(skill, test.rng, test=True).key)
        assert not skills.held_out(train.story().text) and skills.held_out(test.story().text)
    row = train.conversation(128, [data.Turn("ask", "tell")])
    learned = [int(t) & (data.LEARN - 1) for t in row if t & data.LEARN]
    assert train.tokenizer.decode(learned[:5], skip_special_tokens=False).startswith("tell<|end|>")


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_answers_are_right(skill: str) -> None:
    """Against other ways to the same answer."""
    import random
    import re

    rng = random.Random(skill)
    for _ in range(200):
        example = skills.sample(skill, rng)
        prompt, answer = example.prompt, example.answer
        numbers = [int(n) for n in re.findall(r"\d+", prompt)]
        if skill == "addition":
            assert sum(numbers) == int(answer) and max(numbers) < 1000
        elif skill == "subtraction":
            assert abs(numbers[0] - numbers[1]) == abs(int(answer))
        elif skill == "copying":
            assert answer in prompt and len(answer) <= 24
        elif skill == "reversing":
            assert "".join(reversed(answer)) in prompt and len(answer) <= 12
        elif skill == "sorting":
            items = answer.split(", ")
            assert len(items) <= 8 and all(item in prompt for item in items)
            keys = [int(i) for i in items] if items[0].isdigit() else items
            assert keys in (sorted(keys), sorted(keys, reverse=True))
        elif skill == "json":
            for key, value in json.loads(answer).items():
                assert key in prompt and str(value) in prompt
        elif skill == "counting" and prompt.startswith("Count from"):
            first, last = numbers
            assert [int(n) for n in answer.split(", ")] == list(range(first, last + 1))
        elif skill == "counting":
            assert 1 <= int(answer) <= 20
        else:
            assert " " not in answer


def test_a_small_training_runs(tmp_path: Path) -> None:
    """The whole command on a CPU, at a scale at which nothing is learned but the loss falls."""
    import subprocess

    command = [sys.executable, "-m", "training.make", str(tmp_path), "--scale", "0.001"]
    options = ["--workers", "2", "--count", "0", "--device", "cpu"]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    entries = [json.loads(x) for x in (tmp_path / "first.jsonl").read_text().splitlines()[1:]]
    assert entries[-1]["loss"] < math.log(training_tokenizer.VOCAB_SIZE)
    for name in ("main", "draft"):
        with LLM(str(tmp_path / name), use_tqdm_on_load=False) as llm:
            (output,) = llm.generate("Once", SamplingParams(max_tokens=4), use_tqdm=False)
            assert output.outputs[0].token_ids
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")


def test_a_cut_story_is_no_story() -> None:
    story = data.Writer(raw_tokenizer(), "cut").story()
    assert stories.check_story(story.text) == []
    assert stories.check_story(story.text[: len(story.text) // 2]) != []
