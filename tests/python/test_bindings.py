"""The native module as Python sees it: its stub, its configs, and block manager and scheduler
studied step by step with schedules worked out by hand."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nano_inference
from nano_inference import _core

STUB = ast.parse((Path(nano_inference.__file__).parent / "_core.pyi").read_text())

# -- The stub says what there is ------------------------------------------------------------------


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Public names that a stub's module or class declares."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
    return {n: v for n, v in found.items() if not n.startswith("_") or n == "__version__"}


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def classes() -> list[ast.ClassDef]:
    return [node for node in STUB.body if isinstance(node, ast.ClassDef)]


def test_stub_lists_the_module() -> None:
    assert set(names_in(STUB.body)) == public(vars(_core)) | {"__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", _core.__version__)


@pytest.mark.parametrize("node", classes(), ids=lambda node: node.name)
def test_stub_lists_the_members(node: ast.ClassDef) -> None:
    native = getattr(_core, node.name)
    assert set(names_in(node.body)) == public(vars(native))
    for name, member in names_in(node.body).items():
        is_method = isinstance(member, ast.FunctionDef) and not any(
            isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list
        )
        assert callable(getattr(native, name)) == is_method, name


def stub_signature(node: ast.FunctionDef) -> list[tuple[str, bool]]:
    """Parameter names, and whether each has a default."""
    args = node.args.args
    required = len(args) - len(node.args.defaults)
    return [(a.arg, i >= required) for i, a in enumerate(args) if a.arg != "self"]


def native_signature(function: Any) -> list[tuple[str, bool]]:
    """The same from the first line of pybind11's doc string."""
    line = function.__doc__.splitlines()[0]
    inside = line[line.index("(") + 1 : line.rindex(") ->")]
    parts, depth = [""], 0
    for c in inside:
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    names = [re.match(r"\s*(\w+)", part) for part in parts]
    pairs = [(m[1], "=" in part) for m, part in zip(names, parts, strict=True) if m]
    return [pair for pair in pairs if pair[0] != "self"]


def functions() -> list[Any]:
    out = []
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            out.append(pytest.param(node, getattr(_core, node.name), id=node.name))
        elif isinstance(node, ast.ClassDef):
            native = getattr(_core, node.name)
            for name, member in names_in(node.body).items():
                if isinstance(member, ast.FunctionDef) and callable(getattr(native, name)):
                    out.append(
                        pytest.param(member, getattr(native, name), id=f"{node.name}.{name}")
                    )
            for member in node.body:
                if (
                    isinstance(member, ast.FunctionDef)
                    and member.name == "__init__"
                    and not member.args.kwarg
                ):
                    out.append(pytest.param(member, native.__init__, id=node.name))
    return out


@pytest.mark.parametrize("node,native", functions())
def test_stub_signatures(node: ast.FunctionDef, native: Any) -> None:
    assert stub_signature(node) == native_signature(native)


# -- Configs --------------------------------------------------------------------------------------

KEYWORD_CLASSES = ["ModelConfig", "EngineConfig", "SamplingParams", "SchedulerConfig"]
ENUMS = {
    "norm": ["rms", "layer"],
    "act": ["silu", "gelu_tanh", "gelu", "relu"],
    "policy": ["fcfs", "priority"],
    "dtype": ["float32", "bfloat16", "float16"],
    "kv_cache_dtype": ["float32", "bfloat16", "float16"],
}


def fields() -> list[Any]:
    out = []
    for node in classes():
        if node.name in KEYWORD_CLASSES:
            for name, member in names_in(node.body).items():
                if isinstance(member, ast.AnnAssign):
                    kind = ast.unparse(member.annotation)
                    out.append(pytest.param(node.name, name, kind, id=f"{node.name}.{name}"))
    return out


def example(name: str, kind: str) -> Any:
    """A value that is not the default."""
    if name in ENUMS:
        return ENUMS[name][-1]
    return {
        "int": 7,
        "float": 0.625,
        "str": "portable",
        "list[int]": [3, 5],
        "list[list[int]]": [[1, 2], [3]],
        "dict[int, float]": {4: -math.inf, 9: 1.5},
        "list[RopeConfig]": [_core.RopeConfig([1.0, 0.5], 2.0)],
        "list[LayerConfig]": [_core.LayerConfig(5, -1)],
    }.get(kind)


@pytest.mark.parametrize("cls,name,kind", fields())
def test_field(cls: str, name: str, kind: str) -> None:
    """Settable by keyword and by attribute, has the type that the stub says, and refuses others."""
    native = getattr(_core, cls)
    default = getattr(native(), name)
    assert type(default).__name__ == kind.split("[")[0]
    value = not default if kind == "bool" else example(name, kind)
    made, changed = native(**{name: value}), native()
    setattr(changed, name, value)
    for config in (made, changed):
        got = getattr(config, name)
        if kind == "list[RopeConfig]":
            assert (got[0].inv_freq, got[0].attention_factor) == ([1.0, 0.5], 2.0)
        elif kind == "list[LayerConfig]":
            assert (got[0].window, got[0].rope) == (5, -1)
        else:
            assert got == value
    assert value != default or cls == "EngineConfig" and name == "device"
    for wrong in (object(), None, [object()], {"x": "y"}):
        with pytest.raises(ValueError, match=f"^{name}: "):
            native(**{name: wrong})


@pytest.mark.parametrize("cls", KEYWORD_CLASSES)
def test_unknown_fields_are_named(cls: str) -> None:
    native = getattr(_core, cls)
    with pytest.raises(ValueError, match=f"{cls} has no field 'num_layesr'"):
        native(num_layesr=3)
    with pytest.raises(TypeError):
        native(3)
    with pytest.raises(AttributeError):
        native().num_layesr = 3


def test_methods_are_no_fields() -> None:
    with pytest.raises(ValueError, match="validate"):
        _core.ModelConfig(validate=1)
    with pytest.raises(ValueError, match="__class__"):
        _core.EngineConfig(__class__=int)


@pytest.mark.parametrize(
    "cls,name", [(p.values[0], p.values[1]) for p in fields() if p.values[1] in ENUMS]
)
def test_enums_are_strings(cls: str, name: str) -> None:
    native = getattr(_core, cls)
    for value in ENUMS[name]:
        assert getattr(native(**{name: value}), name) == value
    config = native()
    for wrong in ("", "FCFS", "int8"):
        with pytest.raises(
            ValueError, match=f"{name}: '{wrong}' is unknown.*{', '.join(ENUMS[name])}"
        ):
            setattr(config, name, wrong)
    assert getattr(config, name) == getattr(native(), name)


def test_integers_must_fit() -> None:
    for wrong in (2**31, -(2**31) - 1, 1.5, "3"):
        with pytest.raises(ValueError, match="^top_k: "):
            _core.SamplingParams(top_k=wrong)
    assert _core.SamplingParams(seed=2**64 - 1).seed == 2**64 - 1
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="^seed: "):
            _core.SamplingParams(seed=wrong)
    assert _core.SamplingParams(top_k=np.int64(5)).top_k == 5


MODEL = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1, head_dim=8,
    max_position_embeddings=64, ropes=[_core.RopeConfig([1.0, 0.1])],
    layers=[_core.LayerConfig()] * 2,
)  # fmt: skip


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(vocab_size=0), "vocab_size must be positive, got 0"),
        (dict(head_dim=-8), "head_dim must be positive, got -8"),
        (dict(layers=[]), "layers"),
        (dict(num_heads=3, num_kv_heads=2), r"num_heads \(3\).*num_kv_heads \(2\)"),
        (dict(norm_eps=-1.0), "norm_eps"),
        (dict(ropes=[_core.RopeConfig([1.0] * 5)]), "10 dimensions.*8"),
        (dict(ropes=[_core.RopeConfig([])]), "rotates 0"),
        (dict(layers=[_core.LayerConfig(window=-1)]), "window.*-1"),
        (dict(layers=[_core.LayerConfig(rope=1)]), "rope 1 of 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_model_config_validate(change: dict[str, Any], message: str) -> None:
    _core.ModelConfig(**MODEL).validate()
    with pytest.raises(ValueError, match=message):
        _core.ModelConfig(**(MODEL | change)).validate()


# -- The block manager, by hand -------------------------------------------------------------------


def computed(blocks: _core.BlockManager, tokens: list[int], salt: str = "") -> _core.Sequence:
    """A sequence whose tokens all lie in the cache, committed."""
    seq = _core.Sequence(tokens, salt)
    blocks.take_prefix(seq)
    assert blocks.grow(seq, len(tokens)) == []
    seq.num_computed = len(tokens)
    blocks.commit(seq)
    return seq


def counts(blocks: _core.BlockManager) -> tuple[int, int, int]:
    s = blocks.stats()
    assert s["blocks_free"] + s["blocks_cached"] + s["blocks_used"] == s["blocks_total"]
    assert blocks.num_available == s["blocks_free"] + s["blocks_cached"]
    return s["blocks_free"], s["blocks_cached"], s["blocks_used"]


def test_blocks_are_shared_through_the_prefix_cache() -> None:
    blocks = _core.BlockManager(num_blocks=6, block_size=4)
    assert (blocks.block_size, blocks.num_blocks, blocks.num_available) == (4, 6, 6)
    a = computed(blocks, list(range(10)))
    assert len(a.block_table) == 3 and counts(blocks) == (3, 0, 3)
    blocks.free(a)
    assert a.block_table == [] and a.num_computed == 0
    assert counts(blocks) == (4, 2, 0), "full blocks stay known, the third goes back"

    b = _core.Sequence([*range(8), 99, 98])
    assert blocks.lookup_prefix(b) == 8 and b.block_table == []
    assert blocks.take_prefix(b) == 8 and b.num_computed == 8
    assert blocks.blocks_needed(b, 10) == 1
    assert blocks.grow(b, 10) == [] and counts(blocks) == (3, 0, 3)
    blocks.check_invariants([b])

    # At least one token is left to compute; other first tokens or another salt find nothing.
    assert blocks.lookup_prefix(_core.Sequence(list(range(8)))) == 4
    assert blocks.lookup_prefix(_core.Sequence([7, *range(1, 10)])) == 0
    assert blocks.lookup_prefix(_core.Sequence(list(range(10)), "salt")) == 0
    stats = blocks.stats()
    assert (stats["prefix_queries"], stats["prefix_hits"], stats["evictions"]) == (20, 8, 0)

    assert blocks.grow(_core.Sequence([1] * 13), 13) is None, "four blocks of three"
    assert counts(blocks) == (3, 0, 3)
    blocks.free(b)
    c = computed(blocks, list(range(100, 124)))  # needs all six: evicts the two cached ones
    assert blocks.stats()["evictions"] == 2 and counts(blocks) == (0, 0, 6)
    with pytest.raises(RuntimeError, match="referenced"):
        blocks.reset_prefix_cache()
    blocks.free(c)
    blocks.reset_prefix_cache()
    assert counts(blocks) == (6, 0, 0)
    assert blocks.lookup_prefix(_core.Sequence(list(range(100, 124)))) == 0


def test_forks_copy_what_they_write() -> None:
    blocks = _core.BlockManager(num_blocks=6, block_size=4)
    parent, child = computed(blocks, [1, 2, 3, 4, 5, 6]), _core.Sequence([1, 2, 3, 4, 5, 6])
    blocks.fork(parent, child)
    assert child.block_table == parent.block_table and child.num_computed == 6
    assert counts(blocks) == (4, 0, 2)
    shared = parent.block_table[1]
    child.tokens = [*child.tokens, 7]
    assert blocks.blocks_needed(child, 7) == 1
    copies = blocks.grow(child, 7)
    assert copies == [(shared, child.block_table[1])] and child.block_table[1] != shared
    assert child.block_table[0] == parent.block_table[0]
    assert blocks.blocks_needed(parent, 7) == 0 and blocks.grow(parent, 7) == [], "alone again"
    assert blocks.stats()["copies"] == 1
    blocks.check_invariants([parent, child])
    blocks.grow(child, 12)
    assert len(child.block_table) == 3
    blocks.shrink(child, 7)
    assert len(child.block_table) == 2
    blocks.free(parent)
    blocks.check_invariants([child])
    with pytest.raises(RuntimeError, match="reference counts"):
        blocks.check_invariants([parent])


def test_misused_sequences_are_refused() -> None:
    """Sequences are plain data: what would index memory out of range is a ValueError."""
    blocks, other = _core.BlockManager(4, 4), _core.BlockManager(4000, 4)
    seq = _core.Sequence([1, 2, 3, 4, 5])
    for wrong in (-1, 1, 2**31 - 1):
        seq.num_computed = wrong
        for call in (
            lambda: blocks.grow(seq, 5),
            lambda: blocks.commit(seq),
            lambda: blocks.blocks_needed(seq, 5),
            lambda: blocks.shrink(seq, 1),
            lambda: blocks.free(seq),
            lambda: blocks.fork(seq, _core.Sequence([1])),
        ):
            with pytest.raises(ValueError, match="num_computed"):
                call()
    seq.num_computed = 0
    assert blocks.grow(seq, 5) == []
    seq.num_computed = 5
    seq.tokens = [1]
    with pytest.raises(ValueError, match="num_computed"):
        blocks.commit(seq)
    foreign = computed(other, [1, 2, 3])
    far = computed(other, list(range(100)))
    for stranger in (foreign, far):
        if stranger.block_table[0] >= 4 or stranger is far:
            with pytest.raises(ValueError, match="did not give"):
                blocks.free(stranger)
    for call in (blocks.grow, blocks.blocks_needed, blocks.shrink):
        with pytest.raises(ValueError, match="num_tokens.*-1"):
            call(_core.Sequence([1]), -1)
    held = computed(other, [9, 9, 9, 9, 9])
    with pytest.raises(RuntimeError, match="empty block table"):
        other.take_prefix(held)
    with pytest.raises(RuntimeError, match="empty block table"):
        other.fork(far, held)
    with pytest.raises(RuntimeError, match="committed"):
        other.shrink(held, 0)
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            _core.BlockManager(*wrong)


# -- The scheduler, by hand -----------------------------------------------------------------------


def make(num_blocks: int = 16, **config: Any) -> tuple[_core.Scheduler, _core.BlockManager]:
    values: dict[str, Any] = dict(
        max_num_seqs=2,
        max_num_batched_tokens=6,
        max_model_len=32,
        vocab_size=100,
        eos_token_ids=[9],
    )
    blocks = _core.BlockManager(num_blocks, 4)
    return _core.Scheduler(_core.SchedulerConfig(**(values | config)), blocks), blocks


def rows(plan: dict[str, Any]) -> list[tuple[int, int, int, int, bool]]:
    return [
        (i["request_id"], i["num_computed"], i["num_query"], i["num_samples"], i["is_decode"])
        for i in plan["items"]
    ]


def ends(updates: list[dict[str, Any]]) -> list[tuple[int, int, int, str, bool]]:
    return [
        (u["request_id"], u["choice"], u["num_new_tokens"], u["finish_reason"], u["request_done"])
        for u in updates
    ]


def test_a_small_schedule() -> None:
    """Two seats, six rows a step: chunked prefill beside decodes, and the third request waits."""
    scheduler, blocks = make()
    params = lambda n: _core.SamplingParams(max_tokens=n)  # noqa: E731
    scheduler.add(1, [11, 12, 13, 14, 15], params(3))
    scheduler.add(2, [21, 22, 23, 24, 25, 26, 27], params(2))
    scheduler.add(3, [31, 32], params(5))
    assert scheduler.has_work()
    assert scheduler.stats()["waiting"] == 3

    plan = scheduler.schedule()  # all five rows of request 1, one of request 2
    assert rows(plan) == [(1, 0, 5, 1, False), (2, 0, 1, 0, False)]
    assert plan["admitted"] == [(1, 0), (2, 0)] and plan["preempted"] == plan["resumed"] == []
    assert (plan["num_tokens"], plan["num_decodes"], plan["num_samples"]) == (6, 0, 1)
    assert [len(i["block_table"]) for i in plan["items"]] == [2, 2] and plan["copies"] == []
    assert ends(scheduler.update([41])) == [(1, 0, 1, "", False)]
    assert scheduler.stats()["running"] == 2 and scheduler.stats()["waiting_requests"] == 1

    plan = scheduler.schedule()  # the decode first, then five more prompt rows
    assert rows(plan) == [(1, 5, 1, 1, True), (2, 1, 5, 0, False)]
    assert ends(scheduler.update([42])) == [(1, 0, 1, "", False)]

    plan = scheduler.schedule()
    assert rows(plan) == [(1, 6, 1, 1, True), (2, 6, 1, 1, False)]
    assert ends(scheduler.update([43, 51])) == [(1, 0, 1, "length", True), (2, 0, 1, "", False)]
    scheduler.check_invariants()

    plan = scheduler.schedule()  # a seat is free
    assert rows(plan) == [(2, 7, 1, 1, True), (3, 0, 2, 1, False)] and plan["admitted"] == [(3, 0)]
    assert ends(scheduler.update([52, 9])) == [(2, 0, 1, "length", True), (3, 0, 1, "stop", True)]

    assert not scheduler.has_work()
    assert scheduler.schedule()["items"] == []
    assert blocks.num_available == blocks.num_blocks
    scheduler.check_invariants()


def test_preemption_and_resumption() -> None:
    """Three blocks for two sequences that grow to two blocks each: the newer one gives way."""
    scheduler, blocks = make(num_blocks=3, max_num_batched_tokens=8)
    scheduler.add(1, [1, 2, 3, 4], _core.SamplingParams(max_tokens=3))
    scheduler.add(2, [5, 6, 7, 8], _core.SamplingParams(max_tokens=3))
    assert rows(scheduler.schedule()) == [(1, 0, 4, 1, False), (2, 0, 4, 1, False)]
    scheduler.update([41, 51])
    plan = scheduler.schedule()
    assert rows(plan) == [(1, 4, 1, 1, True)] and plan["preempted"] == [(2, 0)]
    assert scheduler.stats() | {"preemptions": 1, "running": 1, "waiting": 1} == scheduler.stats()
    scheduler.update([42])
    plan = scheduler.schedule()
    assert rows(plan) == [(1, 5, 1, 1, True)] and plan["resumed"] == []
    assert ends(scheduler.update([43])) == [(1, 0, 1, "length", True)]
    plan = scheduler.schedule()  # its first block is still cached: one token is computed
    assert plan["resumed"] == [(2, 0)] and plan["admitted"] == []
    assert rows(plan) == [(2, 4, 1, 1, False)]
    scheduler.update([52])
    scheduler.schedule()
    assert ends(scheduler.update([53])) == [(2, 0, 1, "length", True)]
    assert blocks.num_available == 3


def test_choices_share_the_prompt() -> None:
    scheduler, blocks = make(max_num_seqs=3)
    scheduler.add(7, [1, 2, 3, 4, 5], _core.SamplingParams(n=2, max_tokens=2))
    plan = scheduler.schedule()
    assert rows(plan) == [(7, 0, 5, 2, False)]
    assert ends(scheduler.update([41, 42])) == [(7, 0, 1, "", False), (7, 1, 1, "", False)]
    assert blocks.stats()["blocks_used"] == 2
    plan = scheduler.schedule()
    assert [i["choice"] for i in plan["items"]] == [0, 1]
    tables = [i["block_table"] for i in plan["items"]]
    assert tables[0][0] == tables[1][0] and tables[0][1] != tables[1][1]
    assert len(plan["copies"]) == 1 and set(plan["copies"][0]) == {tables[0][1], tables[1][1]}
    assert ends(scheduler.update([43, 44])) == [
        (7, 0, 1, "length", False),
        (7, 1, 1, "length", True),
    ]


def test_abort_and_fail() -> None:
    scheduler, blocks = make()
    for i in (1, 2, 3):
        scheduler.add(i, [i] * 5, _core.SamplingParams())
    scheduler.schedule()
    assert ends(scheduler.abort(1)) == [(1, 0, 0, "abort", True)]
    assert scheduler.abort(1) == [] and scheduler.abort(77) == []
    scheduler.update([40])  # the row of the aborted one is still in the step
    assert blocks.stats()["blocks_used"] == 2
    scheduler.schedule()
    failed = ends(scheduler.fail())
    assert [(u[0], u[3], u[4]) for u in failed] == [(2, "error", True), (3, "error", True)]
    assert not scheduler.has_work() and blocks.num_available == blocks.num_blocks


def test_priority_and_static_batching() -> None:
    scheduler, _ = make(max_num_seqs=1, policy="priority")
    for i, priority in ((1, 5), (2, -1), (3, 0)):
        scheduler.add(i, [i], _core.SamplingParams(max_tokens=1), priority)
    order = []
    while scheduler.has_work():
        order.append(rows(scheduler.schedule())[0][0])
        scheduler.update([40])
    assert order == [2, 3, 1]

    scheduler, _ = make(static_batching=True)
    for i, n in ((1, 1), (2, 3), (3, 1)):
        scheduler.add(i, [i], _core.SamplingParams(max_tokens=n))
    batches = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        batches.append([i["request_id"] for i in plan["items"]])
        scheduler.update([40] * plan["num_samples"])
    assert batches == [[1, 2], [2], [2], [3]], "the third waits for the whole batch"


def test_scheduler_refuses() -> None:
    scheduler, _ = make(num_blocks=2, max_waiting=1)
    add = lambda tokens=(1,), i=1, **p: scheduler.add(i, list(tokens), _core.SamplingParams(**p))  # noqa: E731
    for message, call in [
        ("prompt is empty", lambda: add(())),
        (r"prompt\[1\] is 100", lambda: add((1, 100))),
        (r"prompt\[0\] is -1", lambda: add((-1,))),
        ("prompt has 32 tokens", lambda: add([1] * 32)),
        ("cache holds only 8", lambda: add([1] * 9)),
        ("never fit.*at most 5", lambda: add([1] * 4, max_tokens=6)),
        ("temperature.*nan", lambda: add(temperature=math.nan)),
        ("top_p.*0", lambda: add(top_p=0.0)),
        ("n must be", lambda: add(n=3)),
        ("logit_bias.*nan", lambda: add(logit_bias={3: math.nan})),
        (r"bad_words\[0\]", lambda: add(bad_words=[[]])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    add()
    with pytest.raises(ValueError, match="request id 1 is already in use"):
        add()
    with pytest.raises(_core.QueueFullError, match="full"):
        add(i=2)
    assert issubclass(_core.QueueFullError, RuntimeError)
    with pytest.raises(RuntimeError):
        scheduler.update([])  # no step
    scheduler.schedule()
    for samples in ([], [1, 2]):
        with pytest.raises(ValueError, match="samples 1 tokens"):
            scheduler.update(samples)
    with pytest.raises(RuntimeError):
        scheduler.schedule()  # the step before is still open
    for message, config in [
        ("max_num_seqs", dict(max_num_seqs=0)),
        ("max_num_batched_tokens", dict(max_num_batched_tokens=1)),
        ("vocab_size", dict(vocab_size=0)),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**config)


def test_update_refuses_impossible_tokens() -> None:
    scheduler, _ = make()
    scheduler.add(1, [1], _core.SamplingParams())
    scheduler.schedule()
    for wrong in (100, -1):
        with pytest.raises(ValueError, match=f"token {wrong}"):
            scheduler.update([wrong])
    assert ends(scheduler.update([99])) == [(1, 0, 1, "", False)]


def test_scheduler_keeps_its_blocks_alive() -> None:
    scheduler = _core.Scheduler(
        _core.SchedulerConfig(vocab_size=10, max_model_len=8), _core.BlockManager(4, 4)
    )
    scheduler.add(1, [1], _core.SamplingParams(max_tokens=1))
    scheduler.schedule()
    assert ends(scheduler.update([2])) == [(1, 0, 1, "length", True)]


# -- The engine -----------------------------------------------------------------------------------


def engine(load: bool = True, **config: Any) -> _core.Engine:
    model = _core.ModelConfig(**MODEL, tie_embeddings=True)
    values: dict[str, Any] = dict(
        dtype="float32", kv_cache_dtype="float32", num_blocks=16, block_size=4, max_model_len=32,
        max_num_seqs=2, max_num_batched_tokens=8, num_threads=1, check_invariants=True,
    )  # fmt: skip
    made = _core.Engine(_core.EngineConfig(**(values | config)), model)
    if load:
        rng = np.random.default_rng(1)
        for name, shape in _core.Engine.weight_slots(model).items():
            made.load_weight(name, rng.standard_normal(shape, dtype=np.float32), "float32")
        made.finish_loading()
    return made


def test_engine_loads_what_it_lists() -> None:
    made = engine(load=False)
    slots = _core.Engine.weight_slots(_core.ModelConfig(**MODEL))
    assert slots["embed.weight"] == (50, 16) and slots["layers.1.down.weight"] == (16, 24)
    with pytest.raises(ValueError, match="not loaded.*embed.weight"):
        made.finish_loading()
    ones = np.ones((50, 16), np.float32)
    for message, args in [
        ("unknown weight slot 'embde'", ("embde", ones, "float32")),
        (r"\[50, 16\], got \[16, 50\]", ("embed.weight", np.ones((16, 50), np.float32), "float32")),
        (r"\[50, 16\], got \[50\]", ("embed.weight", np.ones(50, np.float32), "float32")),
        ("dimensions", ("embed.weight", np.ones((1, 50, 16), np.float32), "float32")),
        ("4 bytes, got 8", ("embed.weight", ones.astype(np.float64), "float32")),
        ("bfloat16", ("embed.weight", ones, "bfloat16")),
        ("int8", ("embed.weight", ones, "int8")),
        ("contiguous", ("embed.weight", np.ones((16, 50), np.float32).T, "float32")),
    ]:
        with pytest.raises(ValueError, match=message):
            made.load_weight(*args)


def test_engine_steps_by_hand() -> None:
    made = engine()
    made.submit(
        5, np.array([1, 2, 3]), _core.SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    )
    produced = []
    while made.step():
        produced += made.wait_outputs(0.0)
    produced += made.wait_outputs(0.0)
    tokens = [t for o in produced for t in o.token_ids]
    assert produced[-1].finish_reason == "length" and produced[-1].request_done
    context = [1, 2, 3]
    scored = [entry for o in produced for entry in o.logprobs]
    for token, entry in zip(tokens, scored, strict=True):
        logits = made.logits(context)[-1].astype(np.float64)
        assert token == logits.argmax() == entry.token_id == entry.top_ids[0] and entry.rank == 1
        want = logits.max() - np.logaddexp.reduce(logits)
        assert entry.logprob == pytest.approx(want, abs=1e-5)
        assert entry.top_ids == np.argsort(-logits, kind="stable")[:2].tolist()
        context.append(token)
    stats = made.stats()
    assert stats["received"] == stats["finished"] == 1 and stats["generated_tokens"] == 4
    assert stats["prompt_tokens"] == 3 and stats["steps"] == 4
    assert stats["blocks_free"] + stats["blocks_cached"] == stats["blocks_total"] == 16
    trace = made.trace()
    assert [r["num_tokens"] for r in trace] == [3, 1, 1, 1]
    assert [r["step"] for r in made.trace(3)] == [3, 4]
    assert trace[-1]["finished"] == [(5, 0, "length")]


def test_engine_refuses_token_ids() -> None:
    made = engine()
    for wrong, message in [
        ([1, 50], r"prompt\[1\] is 50"),
        ([2**40], "1099511627776.*out of range"),
        (["a"], "integers"),
        (np.array([1.0]), "integers"),
        (np.array([[1]]), "one-dimensional"),
        (7, "integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.submit(1, wrong, _core.SamplingParams())
    with pytest.raises((ValueError, RuntimeError)):
        made.logits([1] * 33)
    with pytest.raises(ValueError, match="50"):
        made.logits([50])
    assert not made.step() and made.stats()["running"] == made.stats()["waiting"] == 0
