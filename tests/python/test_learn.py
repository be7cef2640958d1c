"""The learning path: the command, what the experiments of stages 1 and 2 count, and whether the
pages tell the truth about files and commands. No test looks at a time."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nano_inference import _core
from nano_inference.cli import main
from nano_inference.learn import catalog, pages, stage1, stage2
from nano_inference.learn import run as runner
from nano_inference.learn.experiment import Experiment, Report, table
from nano_inference.learn.lab import TINY, Lab, Request
from nano_inference.learn.work import Work, causal_pairs
from nano_inference.random_model import model_config

ROOT = Path(__file__).resolve().parents[2]
LEARN = ROOT / "docs" / "learn"


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["learn", *args])


@cache
def counts(key: str) -> dict[str, float]:
    """Of the small form of an experiment."""
    (experiment,) = catalog.find([key])
    return runner.run(experiment, small=True).report.counts


# -- The command ----------------------------------------------------------------------------------


def test_list() -> None:
    result = invoke()
    assert result.exit_code == 0 and result.stderr == ""
    listed = json.loads(invoke("--json").stdout)
    assert [s["stage"] for s in listed] == [s.number for s in catalog.STAGES]
    for stage in listed:
        assert stage["title"] in result.stdout
        keys = [e["key"] for e in stage["experiments"]]
        assert keys == [f"{stage['stage']}.{i + 1}" for i in range(len(keys))]
        assert all(e["question"] in result.stdout for e in stage["experiments"])


def fake(key: str, devices: tuple[str, ...] = ("cpu",)) -> Experiment:
    def run(lab: Lab) -> Report:
        lab.expect("two")
        panel = pages_panel()
        return Report(["what", "n"], [["é", 2], ["b", 10]], "two came", {"n": 2}, [panel])

    return Experiment(key, f"Title {key}", "Why?", run, devices)


def pages_panel() -> Any:
    from nano_inference.plot import Panel

    return Panel("p", "x", "y", [("", [(0, 0), (1, 1)])])


@pytest.fixture
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    experiments = [fake("1.1"), fake("1.2", ("cuda",)), fake("1.3")]
    monkeypatch.setattr(stage1, "EXPERIMENTS", experiments)


@pytest.mark.usefixtures("one_stage")
def test_run_shows_expectation_table_outcome_and_plot(tmp_path: Path) -> None:
    result = invoke("1.3", "1.1", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0 and result.stderr == ""
    parts = ["1.3  Title 1.3", "Why?", "Expected: two", "| é    |   2 |", "Outcome:  two came"]
    places = [result.stdout.index(part) for part in parts]
    assert places == sorted(places) and result.stdout.index("Title 1.1") > places[-1]
    kept = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert kept == ["1.1.json", "1.1.svg", "1.3.json", "1.3.svg"]


@pytest.mark.usefixtures("one_stage")
def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    result = invoke("1.1", "--json", "--out", str(tmp_path))
    (found,) = json.loads(result.stdout)
    assert result.stderr == "" and found["experiment"] == "1.1" and found["device"] == "cpu"
    assert found["expectation"] == "two" and found["outcome"] == "two came"
    assert found["columns"] == ["what", "n"] and found["rows"] == [["é", 2], ["b", 10]]
    assert found["counts"] == {"n": 2} and Path(found["plot"]).is_file() and found["seconds"] >= 0
    assert found["machine"] and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert json.loads((tmp_path / "1.1.json").read_text(encoding="utf-8")) == found


@pytest.mark.usefixtures("one_stage")
def test_an_experiment_without_meaning_on_a_device(tmp_path: Path) -> None:
    stage = invoke("1", "--json", "--out", str(tmp_path))
    assert [r["experiment"] for r in json.loads(stage.stdout)] == ["1.1", "1.3"]
    assert stage.exit_code == 0 and "left out: 1.2 (only with --device cuda)" in stage.stderr
    alone = invoke("1.2", "--out", str(tmp_path))
    assert alone.exit_code == 2 and alone.stdout == ""
    assert "1.2" in alone.stderr and "cpu" in alone.stderr and "cuda" in alone.stderr


@pytest.mark.parametrize(
    "args, word",
    [(["9"], "9"), (["1.99"], "1.99"), (["x"], "x"), (["1.1", "--device", "tpu"], "tpu")],
)
def test_wrong_names_are_named(args: list[str], word: str, tmp_path: Path) -> None:
    result = invoke(*args, "--out", str(tmp_path))
    assert result.exit_code == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: ") and f"'{word}'" in result.stderr


def test_every_experiment_says_what_it_expects_and_once() -> None:
    def silent(lab: Lab) -> Report:
        return Report([], [], "")

    with pytest.raises(RuntimeError, match="no expectation"):
        runner.run(Experiment("1.1", "t", "q", silent))
    lab = Lab()
    lab.expect("a")
    with pytest.raises(RuntimeError, match="once"):
        lab.expect("b")


def test_table() -> None:
    text = table(["name", "n"], [["a", 1234567], ["b", 0.123456], ["c", 12345.6], ["d", 1e9]])
    lines = text.splitlines()
    assert lines[1] == "|------|--------:|" and len({len(line) for line in lines}) == 1
    cells = [line.split("|")[2].strip() for line in lines[2:]]
    assert cells == ["1234567", "0.123", "12.3k", "1G"]


# -- Work: operations and bytes -------------------------------------------------------------------


def matrices(model: _core.ModelConfig) -> int:
    """Weights of the matrices but lm_head, from what the engine asks to be loaded."""
    slots = _core.Engine.weight_slots(model)
    return sum(
        shape[0] * shape[1]
        for name, shape in slots.items()
        if len(shape) == 2 and "embed" not in name
    )


def operations_by_loop(model: _core.ModelConfig, first: int, tokens: int) -> int:
    """Tokens [first, first + tokens) of one sequence, and logits of the last."""
    total = 2 * model.vocab_size * model.hidden_size
    for position in range(first, first + tokens):
        total += 2 * matrices(model)
        for _ in model.layers:
            for _ in range(model.num_heads):
                for _ in range(position + 1):
                    total += 2 * model.head_dim + 2 * model.head_dim  # q · k, and its share of v
    return total


def test_work_against_loops_and_the_engines_own_plan() -> None:
    model = model_config(**TINY)
    work = Work(model)
    assert work.layer_parameters == matrices(model)
    assert work.prefill_operations(7) == operations_by_loop(model, 0, 7)
    assert work.prefill_operations(5, cached=3) == operations_by_loop(model, 3, 5)
    assert work.decode_operations(8) == operations_by_loop(model, 7, 1)
    assert causal_pairs(3, 2) == 3 + 4 + 5
    config = _core.EngineConfig(
        device="cpu", dtype="bfloat16", kv_cache_dtype="bfloat16", num_blocks=1
    )
    plan = _core.Engine.plan_memory(config, model)
    assert work.kv_bytes * plan["block_size"] == plan["kv_block"]
    assert work.weight_bytes <= plan["weights"] <= 1.1 * work.weight_bytes  # norms and padding
    assert work.decode_bytes([3, 4]) == work.weight_bytes + 7 * work.kv_bytes


def test_bench_counts_what_the_trace_says() -> None:
    lab = Lab(small=True)
    with lab.engine(lab.model, max_num_seqs=2, max_num_batched_tokens=8) as bench:
        run = bench.run([Request(bench.prompt(12), 3), Request(bench.prompt(4, 1), 2, 1)])
        again = bench.run([Request(bench.prompt(12), 3)])
    assert [len(t) for t in run.tokens] == [3, 2] and again.tokens == run.tokens[:1]
    assert [s["num_tokens"] for s in run.steps] == [8, 8, 2, 1]
    assert [e["request_id"] for e in run.steps[1]["entries"]] == [0, 1]
    assert [e["request_id"] for e in again.steps[0]["entries"]] == [0]
    work = bench.work
    total = sum(work.step_operations(s) for s in again.steps)
    # A piece of a prompt that is not its last has no logits.
    head = 2 * work.head_parameters
    pieces = [(0, 8), (8, 4), (12, 1), (13, 1)]
    assert total == sum(operations_by_loop(bench.model, *p) for p in pieces) - head


# -- Stage 1 --------------------------------------------------------------------------------------


def test_tokens_and_logits() -> None:
    c = counts("1.1")
    assert c["prompt_tokens"] == 9 and c["logits"] == 9 * 2048
    assert c["same_tokens"] == c["tokens"] == 4
    assert c["probability_sum"] == pytest.approx(1)


def test_the_kv_cache_saves_rows_not_steps() -> None:
    c = counts("1.2")
    assert c["steps_without"] == c["steps_with"] == 10 and c["same_tokens"] == 1
    assert c["tokens_without"] == sum(range(12, 22)) and c["tokens_with"] == 12 + 9
    assert c["operations_without"] == c["expected_operations_without"]
    assert c["operations_with"] == c["expected_operations_with"]
    assert c["operations_without"] > 5 * c["operations_with"]


def test_operations_for_each_byte_grow_with_the_rows() -> None:
    c, model = counts("1.3"), model_config(**TINY)
    for rows in (4, 32):
        assert c[f"operations: prefill, {rows} tokens"] == operations_by_loop(model, 0, rows)
        assert c[f"bytes: prefill, {rows} tokens"] == c["weight_bytes"] + rows * c["kv_bytes"]
    decode = c["operations: decode, 1 token"] / c["bytes: decode, 1 token"]
    prefill = c["operations: prefill, 32 tokens"] / c["bytes: prefill, 32 tokens"]
    assert 0.9 < decode < 1.1 and prefill > 20 * decode


def test_draws_follow_the_distribution() -> None:
    c = counts("1.4")
    assert c["kept: temperature 1"] == c["kept: temperature 0.5"] == 2048
    assert c["kept: top_k 4"] == 4 and 1 < c["kept: top_p 0.5"] < 100
    assert c["kept: temperature 0 (greedy)"] == c["different: temperature 0 (greedy)"] == 1
    for name, _ in stage1.SETTINGS:
        assert c[f"cut off: {name}"] == 0
        assert c[f"spread: {name}"] < 3
    assert c["different: temperature 0.5"] < c["different: temperature 1.5"]


def test_the_spread_finds_draws_from_another_distribution() -> None:
    logits = np.linspace(0, 4, 30).astype(np.float32)
    right = stage1.distribution(logits, 1.0)
    rng = np.random.default_rng(0)
    drawn = Counter(int(t) for t in rng.choice(30, 2000, p=right))
    assert stage1.mean_square_deviation(right, drawn, 2000) < 2
    assert stage1.mean_square_deviation(stage1.distribution(logits, 0.7), drawn, 2000) > 5


def test_distribution() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert stage1.distribution(logits, 1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    squares = np.array([1, 16, 4, 9]) / 30
    assert stage1.distribution(logits, 0.5) == pytest.approx(squares)
    assert stage1.distribution(logits, 1.0, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert stage1.distribution(logits, 1.0, top_p=0.5) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert stage1.distribution(logits, 1.0, top_p=0.3) == pytest.approx([0, 1, 0, 0])
    assert stage1.distribution(logits, 0.0) == pytest.approx([0, 1, 0, 0])


# -- Stage 2 --------------------------------------------------------------------------------------


def test_one_pass_over_the_weights_serves_all() -> None:
    c = counts("2.1")
    work = Work(model_config(**TINY))
    for batch in (1, 4):  # the first full step: each has its prompt of 16 and a token
        assert c[f"bytes: {batch}"] == c["weight_bytes"] + batch * 17 * work.kv_bytes
        assert c[f"operations: {batch}"] == batch * operations_by_loop(work.model, 16, 1)
        assert c[f"steps: {batch}"] == 4
    assert c["bytes: 4"] / 4 < c["bytes: 1"] / 2


def seats_by_hand(lengths: list[int], seats: int, static: bool) -> int:
    """Steps, by playing each."""
    queue, running, steps = list(lengths), list[int](), 0
    while queue or running:
        if not (static and running):
            while queue and len(running) < seats:
                running.append(queue.pop(0))
        running = [left - 1 for left in running if left > 1]
        steps += 1
    return steps


def test_a_freed_seat_is_filled_at_once() -> None:
    c = counts("2.2")
    lengths = stage2.answer_lengths(9)
    for mode in ("static", "continuous"):
        steps = seats_by_hand(lengths, 3, mode == "static")
        assert c[f"steps: {mode}"] == c[f"expected: {mode}"] == steps
        assert c[f"idle: {mode}"] == 3 * steps - sum(lengths)
    assert c["tokens"] == sum(lengths) and c["same_tokens"] == 1
    assert c["idle: continuous"] < c["idle: static"]
    assert c["mean end: continuous"] < c["mean end: static"]


def test_expected_steps_against_playing_them() -> None:
    lengths = stage2.answer_lengths(60)
    for seats in (1, 4, 7):
        expected = stage2.steps_with_free_seats(lengths, seats)
        assert expected == seats_by_hand(lengths, seats, False)


def test_the_timeline_is_the_trace() -> None:
    lengths = stage2.answer_lengths(9)
    with Lab().bundled(max_num_seqs=3, enable_prefix_caching=False) as bench:
        run = bench.run([Request(bench.prompt(5, i), n) for i, n in enumerate(lengths)])
    spans = stage2.seat_spans(run.steps, 3)
    assert {request: end - first for request, _, first, end in spans} == dict(enumerate(lengths))
    taken = Counter((seat, step) for _, seat, a, b in spans for step in range(a, b))
    assert max(taken.values()) == 1 and {seat for seat, _ in taken} == {0, 1, 2}


def test_a_long_prompt_in_pieces_lets_the_others_go_on() -> None:
    c = counts("2.3")
    for mode in ("whole prompt", "chunks, 16 rows a step"):
        assert c[f"prompt steps: {mode}"] == c[f"expected steps: {mode}"]
        assert c[f"largest step: {mode}"] == c[f"expected largest step: {mode}"]
        assert c[f"missed: {mode}"] == 0
    assert c["largest step: whole prompt"] == 98 and c["prompt steps: whole prompt"] == 1
    assert c["prompt steps: chunks, 16 rows a step"] == 7  # 96 prompt rows, 14 a step
    assert c["operations: whole prompt"] > 4 * c["operations: chunks, 16 rows a step"]


# -- The pages ------------------------------------------------------------------------------------

PAGES = sorted(LEARN.glob("*.md"))
REFERENCE = re.compile(
    r"`((?:cpp|cuda|python|bindings|tests|benchmarks|training|docs)/[\w./-]*)(?:::([\w:.~]+))?`"
)


def missing(path: str, name: str | None) -> str | None:
    """What is wrong with a reference; None: nothing."""
    file = ROOT / path
    if not file.exists():
        return f"{path} does not exist"
    if name is None:
        return None
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return None if name in python_names(ast.parse(text)) else f"{path} has no {name}"
    plain = re.escape(name)
    found = re.search(rf"(?<![\w:]){plain}\s*\(|\b(?:struct|class|enum class)\s+{plain}\b", text)
    return None if found else f"{path} has no {name}"


def python_names(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions and classes, members as Class.name."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names |= {prefix + node.name} | python_names(node, f"{prefix}{node.name}.")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_and_function_that_a_page_names_exists(page: Path) -> None:
    found = REFERENCE.findall(page.read_text(encoding="utf-8"))
    assert [w for path, name in found if (w := missing(path, name or None))] == []


def test_the_check_of_references_finds_what_is_gone() -> None:
    scheduler = "cpp/engine/scheduler.cpp"
    assert missing(scheduler, "Scheduler::schedule") is None
    assert missing("cpp/engine/trace.h", "StepRecord") is None
    assert missing("python/nano_inference/llm.py", "LLM.generate") is None
    assert missing("cpp/engine/schedule.cpp", None) == "cpp/engine/schedule.cpp does not exist"
    assert missing(scheduler, "Scheduler::sched") is not None
    assert missing(scheduler, "schedule_all") is not None
    assert missing("python/nano_inference/llm.py", "generate") is not None
    assert REFERENCE.findall("a `cpp/a.h::B::c`, `x/y.py` and `docs/`") == [
        ("cpp/a.h", "B::c"),
        ("docs/", ""),
    ]


def on_device(experiments: list[Experiment], device: str) -> list[str]:
    return [e.key for e in experiments if device in e.devices]


@pytest.mark.parametrize("stage", [s.number for s in catalog.STAGES])
def test_a_stage_has_a_page_with_the_result_and_plot_of_each_experiment(stage: int) -> None:
    (page,) = LEARN.glob(f"{stage}-*.md")
    text = page.read_text(encoding="utf-8")
    marks = list(pages.RESULT.finditer(text))
    experiments = catalog.find([str(stage)])
    assert [m["key"] for m in marks if not m["device"]] == on_device(experiments, "cpu")
    on_card = [m["key"] for m in marks if m["device"]]
    only_there = [e for e in experiments if e.devices == ("cuda",)]
    assert set(on_device(only_there, "cuda")) <= set(on_card) <= set(on_device(experiments, "cuda"))
    assert all(f"### {e.key} " in text for e in experiments)
    for m in marks:
        assert "**Expected:**" in m["text"]
        for image in re.findall(r"\]\((img/[^)]*)\)", m["text"]):
            assert (LEARN / image).read_text(encoding="utf-8").startswith("<svg")
    assert f"nano-inference learn {stage}\n" in text and "arXiv" in text
    assert text.count("<details") == text.count("</details>") == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in re.findall(r"nano-inference learn ((?:[\d.]+ ?)+)", text):
        assert catalog.find([w.rstrip(".") for w in words.split()])
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert f"learn/{page.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_waits_for_a_card(page: Path) -> None:
    assert pages.PENDING.strip() not in page.read_text(encoding="utf-8")


def test_results_are_written_between_their_marks() -> None:
    result = runner.run(fake("1.1")).as_dict()
    marks = ("1.1", "1.2", "1.1 cuda")
    page = "a\n" + "".join(f"<!-- result {m} -->\nold {m}\n<!-- end -->\nb\n" for m in marks)
    filled = pages.fill(page, result)
    assert filled.startswith("a\n<!-- result 1.1 -->\n**Expected:** two\n\n| what |")
    assert "old 1.1\n" not in filled and "old 1.2" in filled and "old 1.1 cuda" in filled
    assert pages.fill(filled, result) == filled
    card = pages.fill(filled, result | {"device": "cuda", "machine": "a card"})
    assert "old 1.1 cuda" not in card and card.count("**Expected:** two") == 2
    assert re.search(r"<!-- result 1.1 cuda -->\n[^<]*\*a card, ", card)


def test_results_of_another_machine_are_taken_from_a_folder(tmp_path: Path) -> None:
    """With their plots, whatever the folder was called there."""
    kept, docs = tmp_path / "kept", tmp_path / "docs"
    (docs / "img").mkdir(parents=True)
    (docs / "1.md").write_text("<!-- result 1.1 cuda -->\n<!-- end -->\n", encoding="utf-8")
    for device in ("cpu", "cuda"):
        result = runner.run(fake("1.1"))
        runner.keep(replace(result, device=device, machine="far away"), kept)
    assert {p.name for p in kept.iterdir()} == {
        f"1.1{device}.{kind}" for device in ("", "-cuda") for kind in ("svg", "json")
    }
    pages.write(docs, kept)
    text = (docs / "1.md").read_text(encoding="utf-8")
    assert "![1.1 Title 1.1](img/1.1-cuda.svg)" in text and "*far away, " in text
    assert [p.name for p in (docs / "img").iterdir()] == ["1.1-cuda.svg"]
