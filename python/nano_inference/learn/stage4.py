"""Stage 4, kernels: from plain loops to the machine's limits, and what the order of a sum
decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _core
from ..bundled import DEFAULT, bundled_model
from ..plot import Panel, Points
from . import stage4_card
from .by_hand import Decoder, Ops, whole
from .experiment import Cell, Experiment, Report
from .kernels import (
    LANES,
    Generated,
    Online,
    Prompt,
    first_difference,
    from_bf16,
    generate,
    isas,
    materialised,
    materialised_bytes,
    online_bytes,
    peak_bytes,
    random_matrix,
    seconds_of,
    split_linear,
    to_bf16,
    units_apart,
)
from .lab import Lab
from .work import Work

OUT, IN = 3072, 1024  # one matrix of a model of half a billion weights

# -- 4.1 From loops to vectors --------------------------------------------------------------------


def vectors(lab: Lab) -> Report:
    rows_of_x = lab.size([1, 8, 128], [1, 8])
    out, features = lab.size((OUT, IN), (96, 64))
    read, compute = (lab.machine[k] for k in ("read_bytes_per_second", "flops_per_second"))
    names = isas()
    size, balance = 2 * out * features, compute / read
    lab.expect(
        f"a matrix of {out} × {features} in bf16 is {size / 1e6:.1f} MB and takes "
        f"{2 * out * features / 1e6:.1f} million operations a row: one for each byte. The machine "
        f"has time for {balance:.0f} operations a byte, so one row is bound by memory, whatever "
        f"the instructions ({size / read * 1e6:.0f} µs), and {rows_of_x[-1]} rows by arithmetic "
        f"({2 * rows_of_x[-1] * out * features / compute * 1e6:.0f} µs). The instruction sets add "
        "up " + ", ".join(f"{LANES[n]} ({n})" for n in names) + " products at once: as many "
        "times faster, at best, until the roof is reached."
    )
    w = to_bf16(random_matrix(out, features))
    exact = from_bf16(w).astype(np.float64)
    copies = lab.size(max(2, (160 << 20) // size), 1)  # so that none is in the cache again
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"weight_bytes": size, "isas": len(names)}
    dots: list[tuple[str, Points]] = []
    speed: dict[tuple[str, int], float] = {}
    for name in lab.progress(names, "instruction sets"):
        ops = _core.Ops(isa=name)
        weights = [ops.weight(w, "bfloat16", "bfloat16") for _ in range(copies)]
        points = []
        for n in rows_of_x:
            x, y = random_matrix(n, features, n), np.empty((n, out), np.float32)
            turn = iter(range(1 << 30))

            def call(x: Any = x, y: Any = y, weights: Any = weights, turn: Any = turn) -> None:
                ops.linear(x, weights[next(turn) % copies], y)  # noqa: B023

            t = seconds_of(call, lab.size(0.3, 0.0))
            operations, moved = 2 * n * out * features, weights[0].bytes + x.nbytes + y.nbytes
            roof = min(compute, read * operations / moved)
            speed[name, n] = operations / t
            points.append((operations / moved, operations / t))
            rows.append([name, n, moved / 1e6, operations / 1e6, t * 1e6])
            rows[-1] += [moved / t / 1e9, operations / t / 1e9, f"{operations / t / roof:.0%}"]
            truth = x.astype(np.float64) @ exact.T
            error = float(np.abs(y - truth).max() / np.abs(truth).max())
            counts |= {f"error_{name}_{n}": error, f"operations_{n}": operations}
            counts |= {f"bytes_{name}_{n}": moved, f"packed_{name}": weights[0].bytes}
        dots.append((name, points))
        del weights
    best, last = names[-1], rows_of_x[-1]
    first, many = speed[best, 1] / speed[names[0], 1], speed[best, last] / speed[names[0], last]
    return Report(
        ["kernels", "rows", "MB", "MFLOP", "µs", "GB/s", "GFLOP/s", "of the roof"],
        rows,
        f"with one row {best} is {first:.0f} times as fast as the plain loops and reads "
        f"{size / 1e9 * speed[best, 1] / (2 * out * features):.0f} of {read / 1e9:.0f} GB/s; with "
        f"{last} rows it is {many:.0f} times as fast and does {speed[best, last] / 1e9:.0f} of "
        f"{compute / 1e9:.0f} GFLOP/s.",
        counts,
        [
            _under_the_roof(lab, "The same product under the roof", dots)
        ],
    )  # fmt: skip


def _under_the_roof(lab: Lab, title: str, dots: list[tuple[str, Points]]) -> Panel:
    """dots: (operations for each byte, operations a second)."""
    read, compute = (lab.machine[k] for k in ("read_bytes_per_second", "flops_per_second"))
    most = max(x for _, points in dots for x, _ in points)
    edges = sorted([0.3, compute / read, 4 * max(most, compute / read)])
    return Panel(
        title,
        "operations for each byte",
        "operations a second",
        lines=[("the machine's roof", [(i, min(compute, i * read)) for i in edges])],
        dots=dots,
        x_log=True,
        y_log=True,
        wide=True,
    )


# -- 4.2 Packed once ------------------------------------------------------------------------------


def packed(lab: Lab) -> Report:
    out, features = lab.size((OUT, IN), (96, 64))
    rows_of_x = lab.size([1, 8, 128], [1, 8])
    size = 2 * out * features
    lab.expect(
        "a checkpoint stores a matrix row by row: what one output needs lies together. The kernel "
        "makes 32 outputs at once and wants their weights side by side, so the matrix is packed "
        f"into panels when it is loaded. Packing before each product would read {size / 1e6:.1f} "
        f"MB and write as many before the product reads them: {3 * size / 1e6:.1f} MB instead of "
        f"{size / 1e6:.1f}. For one row that is most of the work; for many rows it counts less."
    )
    ops = _core.Ops()
    w = to_bf16(random_matrix(out, features))
    weight = ops.weight(w, "bfloat16", "bfloat16")
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"stored_bytes": w.nbytes, "packed_bytes": weight.bytes}
    once: list[tuple[float, float]] = []
    each: list[tuple[float, float]] = []
    dots: dict[str, list[tuple[float, float]]] = {"packed once": [], "packed each time": []}
    same = 0
    for n in lab.progress(rows_of_x, "rows"):
        x, y, z = random_matrix(n, features, n), *(np.empty((n, out), np.float32) for _ in "yz")

        def pack_and_multiply(x: Any = x, z: Any = z) -> None:
            ops.linear(x, ops.weight(w, "bfloat16", "bfloat16"), z)

        a = seconds_of(lambda x=x, y=y: ops.linear(x, weight, y), lab.size(0.3, 0.0))  # type: ignore[misc]
        b = seconds_of(pack_and_multiply, lab.size(0.3, 0.0))
        same += bool(np.array_equal(y.view(np.uint32), z.view(np.uint32)))
        moved = x.nbytes + y.nbytes
        megabytes = ((weight.bytes + moved) / 1e6, (w.nbytes + 2 * weight.bytes + moved) / 1e6)
        operations = 2.0 * n * out * features
        rows.append([n, *megabytes, a * 1e6, b * 1e6, operations / a / 1e9, operations / b / 1e9])
        once.append((n, a * 1e6))
        each.append((n, b * 1e6))
        for points, mb, t in zip(dots.values(), megabytes, (a, b), strict=True):
            points.append((operations / mb / 1e6, operations / t))
    counts |= {"same": same, "sizes": len(rows_of_x)}
    return Report(
        ["rows", "MB, packed once", "MB, packed each time", "µs, once", "µs, each time"]
        + ["GFLOP/s, once", "GFLOP/s, each time"],
        rows,
        f"one row took {once[0][1]:.0f} µs of a packed matrix and {each[0][1]:.0f} µs with the "
        f"packing; for {rows_of_x[-1]} rows packing made it {each[-1][1] / once[-1][1]:.1f} times "
        "as slow. More than the bytes say: packing moves single elements, and is not made to be "
        "fast, because it happens once.",
        counts,
        [
            Panel("A product, and a product with packing", "rows", "µs",
                  lines=[("packed once", once), ("packed each time", each)],
                  x_log=True, y_log=True, wide=True),
            _under_the_roof(lab, "Both under the roof", list(dots.items())),
        ],
    )  # fmt: skip


# -- 4.3 Fusion -----------------------------------------------------------------------------------


def model_path() -> Any:
    path = bundled_model(DEFAULT)
    assert path is not None
    return path


def fusion(lab: Lab) -> Report:
    tokens = lab.size([1, 16, 256], [1, 16])
    ids = np.random.default_rng(3).integers(6, 2048, max(tokens)).tolist()
    longest = max(tokens)
    decoders = {
        name: Decoder(model_path(), Ops(), max_len=longest, fused=name == "fused")
        for name in ("separate", "fused")
    }
    c = decoders["fused"].config
    layers, hidden, inner = len(c.layers), c.hidden_size, c.intermediate_size
    saved = layers * 4 * (5 * hidden + 2 * inner)
    lab.expect(
        "one layer is 9 calls: q, k and v are one product, gate and up are one, the residual is "
        "added where the norm reads it, and the gate is applied where the activation is computed. "
        "Taken apart they are 15. That saves reading the input of q, k and v twice, that of gate "
        "and up once, the residual twice, and writing and reading the activation once: for each "
        f"token and layer 4 bytes × (5 × {hidden} + 2 × {inner}), {saved} bytes a token in "
        f"{layers} layers. The bits stay the same."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"layers": layers, "saved_a_token": saved}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    dots: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    work, same = Work(c), 0
    for n in lab.progress(tokens, "tokens"):
        logits = []
        for name, decoder in decoders.items():
            logits.append(decoder.forward([ids[:n]], [0]))
            ops = decoder.ops
            ops.reset()
            decoder.forward([ids[:n]], [0])
            calls, moved = sum(ops.calls.values()), sum(ops.bytes.values())
            kinds = ", ".join(f"{k} {kind}" for kind, k in sorted(ops.calls.items()))
            t = seconds_of(lambda d=decoder, n=n: d.forward([ids[:n]], [0]), lab.size(0.5, 0.0))  # type: ignore[misc]
            counts |= {f"calls_{name}_{n}": calls, f"bytes_{name}_{n}": moved}
            times[name].append((n, t * 1e3))
            operations = work.prefill_operations(n)
            dots[name].append((operations / moved, operations / t))
            rows.append([n, name, calls, moved / 1e6, t * 1e3, operations / t / 1e9, kinds])
        same += bool(np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32)))
    counts |= {"same": same, "sizes": len(tokens)}
    n = tokens[-1]
    less = counts[f"bytes_separate_{n}"] - counts[f"bytes_fused_{n}"]
    return Report(
        ["tokens", "operators", "calls", "MB moved", "ms", "GFLOP/s", "calls by kind"],
        rows,
        f"{counts[f'calls_separate_{n}']:.0f} calls became {counts[f'calls_fused_{n}']:.0f}; "
        f"{n} tokens moved {less / 1e6:.1f} MB less (expected {saved * n / 1e6:.1f}), "
        f"{less / counts[f'bytes_separate_{n}']:.0%} of all, and the logits are "
        + ("the same, bit by bit." if same == len(tokens) else "NOT the same."),
        counts,
        [
            Panel("A forward pass", "tokens", "ms", lines=list(times.items()),
                  x_log=True, y_log=True, wide=True),
            _under_the_roof(lab, "Both under the roof", list(dots.items())),
        ],
    )  # fmt: skip


# -- 4.4 Attention without the score matrix -------------------------------------------------------


def attention(lab: Lab) -> Report:
    lengths = lab.size([128, 256, 512, 1024, 2048], [64, 128])
    prompts = [Prompt.random(n) for n in lengths]
    last = prompts[-1]
    lab.expect(
        f"{last.n} tokens of {last.heads} heads have {last.heads * last.n**2 / 1e6:.0f} million "
        f"scores, {4 * last.heads * last.n**2 / 1e6:.0f} MB, and the textbook's formula passes "
        f"over them a dozen times: {materialised_bytes(last) / 1e6:.0f} MB. Twice the tokens, four "
        f"times the bytes. Online softmax keeps 64 scores a row and a running sum, which stay in "
        f"the core's cache; memory sees Q, K, V and the result: {online_bytes(last) / 1e6:.0f} MB, "
        "most of it K and V again for each block of queries. The results differ by rounding only."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {"all scores in memory": [], "online": []}
    memory: dict[str, list[tuple[float, float]]] = {name: [] for name in times}
    dots: dict[str, list[tuple[float, float]]] = {name: [] for name in times}
    for p in lab.progress(prompts, "prompt lengths"):
        online = Online(p)
        plain = materialised(p)
        error = float(np.abs(plain - online()).max() / np.abs(plain).max())
        peaks = peak_bytes(lambda p=p: materialised(p)), peak_bytes(online)  # type: ignore[misc]
        a = seconds_of(lambda p=p: materialised(p), lab.size(0.2, 0.0))  # type: ignore[misc]
        b = seconds_of(online, lab.size(0.2, 0.0))
        moved = materialised_bytes(p), online_bytes(p)
        rows.append([p.n, moved[0] / 1e6, moved[1] / 1e6, peaks[0] / 1e6, a * 1e3, b * 1e3])
        rows[-1] += [p.operations / a / 1e9, p.operations / b / 1e9]
        for name, t, size in zip(times, (a, b), moved, strict=True):
            times[name].append((p.n, t * 1e3))
            memory[name].append((p.n, size / 1e6))
            dots[name].append((p.operations / size, p.operations / t))
        counts |= {f"error_{p.n}": error, f"scores_{p.n}": 4 * p.heads * p.n**2}
        counts |= {f"peak_materialised_{p.n}": peaks[0], f"peak_online_{p.n}": peaks[1]}
        counts |= {f"bytes_materialised_{p.n}": moved[0], f"bytes_online_{p.n}": moved[1]}
    ms = [line[-1][1] for line in times.values()]
    return Report(
        ["tokens", "MB, all scores", "MB, online", "extra MB held, all scores"]
        + ["ms, all scores", "ms, online", "GFLOP/s, all scores", "GFLOP/s, online"],
        rows,
        f"at {last.n} tokens the scores moved {rows[-1][1]:.0f} MB and took {ms[0]:.0f} ms; "
        f"online, {rows[-1][2]:.0f} MB and {ms[1]:.0f} ms, {ms[0] / ms[1]:.0f} times less. The "
        f"results agree to {max(counts[f'error_{n}'] for n in lengths):.0e} of the largest.",
        counts,
        [
            Panel("Bytes to and from memory", "tokens", "MB", lines=list(memory.items()),
                  x_log=True, y_log=True),
            Panel("Time", "tokens", "ms", lines=list(times.items()), x_log=True, y_log=True),
            _under_the_roof(lab, "Both under the roof (of bf16)", list(dots.items())),
        ],
    )  # fmt: skip


# -- 4.5 The order of a sum -----------------------------------------------------------------------


def order(lab: Lab) -> Report:
    out, features, batch = lab.size((OUT, IN, 8), (96, 64, 8))
    cuts = [1, 2, 4, 8]
    lab.expect(
        "a sum of rounded numbers depends on the order in which it is made: (a + b) + c is not "
        "a + (b + c). The engine's product is one chain in ascending order, so a row's bits are "
        f"the same alone and among {batch}. Cut into parts that are added up at the end, as a "
        "kernel would to give many cores work, most outputs get other bits. They are no worse: "
        "short chains even round a little less. They are others."
    )
    ops = _core.Ops()
    w, x = random_matrix(out, features), random_matrix(batch, features, 1)
    truth = x.astype(np.float64) @ w.astype(np.float64).T
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"outputs": batch * out}
    one = split_linear(ops, x, [ops.weight(w)])
    alone = np.concatenate([split_linear(ops, x[i : i + 1], [ops.weight(w)]) for i in range(batch)])
    counts["changed_by_batch"] = int((alone.view(np.uint32) != one.view(np.uint32)).sum())
    rows.append(_order_row("one chain, each row alone", alone, one, truth))
    bars: list[tuple[float, float]] = []
    for parts in lab.progress(cuts, "parts"):
        edges = [features * i // parts for i in range(parts + 1)]
        pieces = [
            ops.weight(np.ascontiguousarray(w[:, a:b]))
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        y = split_linear(ops, x, pieces)
        name = "one chain" if parts == 1 else f"{parts} parts"
        rows.append(_order_row(name, y, one, truth))
        counts[f"changed_{parts}"] = int((y.view(np.uint32) != one.view(np.uint32)).sum())
        bars.append((float(len(bars)), 100 * counts[f"changed_{parts}"] / y.size))
    blas = x @ w.T
    rows.append(_order_row("numpy's matrix product", blas, one, truth))
    counts["error"] = float(np.abs(one - truth).max())
    counts["error_8"] = float(np.abs(y - truth).max())
    return Report(
        ["order", "outputs with other bits", "share", "float32 numbers between, at most"]
        + ["largest error (float64)"],
        rows,
        f"{counts['changed_by_batch']:.0f} of {counts['outputs']:.0f} outputs changed between "
        f"alone and together; cut in two, {counts['changed_2'] / counts['outputs']:.0%} did. The "
        f"largest error was {counts['error']:.1e} in one chain and {counts['error_8']:.1e} in 8 "
        "parts.",
        counts,
        [
            Panel("Outputs with other bits than one chain", "parts of the sum", "%",
                  bars=[("", bars)], x_names=[str(n) for n in cuts], wide=True)
        ],
    )  # fmt: skip


def _order_row(name: str, y: Any, one: Any, truth: Any) -> list[Cell]:
    changed = int((y.view(np.uint32) != one.view(np.uint32)).sum())
    # Near zero, where terms cancel, neighbours are very close: only what is large says something.
    large = np.abs(truth) > 0.1 * np.abs(truth).max()
    apart = int(units_apart(y, one)[large].max())
    return [name, changed, f"{changed / y.size:.0%}", apart, f"{np.abs(y - truth).max():.1e}"]


# -- 4.6 One request, many batches ----------------------------------------------------------------


def split_when_few(rows: int) -> int:
    """How a kernel might keep its cores busy: few rows, so the sums are cut."""
    return 4 if rows < 8 else 1


Answer = list[tuple[int, float]]  # tokens with their log-probabilities


def batches(lab: Lab) -> Report:
    count = lab.size(200, 24)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(6, 2048, int(n)).tolist() for n in [12, *rng.integers(4, 80, 31)]]
    lab.expect(
        f"a request of {count} sampled tokens, with a seed. In the engine its tokens and the bits "
        "of their log-probabilities are the same alone, among others, in small chunks, behind a "
        "cached prefix, with one thread or several: no sum knows how many rows there are. Then "
        "the same model by hand, with sums that are cut in four when there are fewer than 8 rows: "
        "alone and among 8 it computes with other bits, each a little off the other's, and sooner "
        "or later another token is drawn; from there on it is another text."
    )
    results: list[tuple[str, list[Any], list[Any]]] = []
    alone: Answer = []
    runs: list[tuple[str, int, dict[str, Any]]] = [
        ("engine, alone", 0, {}),
        ("engine, among 8", 7, {}),
        ("engine, among 32", lab.size(31, 11), {}),
        ("engine, prompts in chunks of 5", 7, {"max_num_batched_tokens": 16}),
        ("engine, cached prefix", 1, {"repeat": True}),
        ("engine, one thread", 7, {"num_threads": 1}),
    ]
    for name, others, options in lab.progress(runs, "in the engine"):
        got = _engine_answer(lab, prompts[: others + 1], count, options)
        alone = alone or got
        results.append((name, got, alone))
    width = 8
    by_hand = {}
    for name, split, n in lab.progress(
        [
            ("by hand, one chain, alone", whole, 1),
            ("by hand, one chain, among 8", whole, width),
            ("by hand, few rows cut, alone", split_when_few, 1),
            ("by hand, few rows cut, among 8", split_when_few, width),
        ],
        "by hand",
    ):
        by_hand[name] = _by_hand(split, prompts[:1] * n if n == 1 else prompts[:n], count)
    names = list(by_hand)
    tokens = [token for token, _ in alone]
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"tokens": count, "engine_runs": len(results), "engine_same": 0}
    for name, got, reference in results:
        at = first_difference(got, reference)
        counts["engine_same"] += at is None
        rows.append([name, "engine, alone", _share(at, count), "none" if at is None else at + 1])
    for name, reference_name in ((names[0], "engine, alone"), (names[1], names[0])):
        reference = tokens if reference_name not in by_hand else by_hand[reference_name].tokens[0]
        at = first_difference(by_hand[name].tokens[0], reference)
        rows.append([name, reference_name, _share(at, count), "none" if at is None else at + 1])
        counts["by_hand_same"] = counts.get("by_hand_same", 0) + (at is None)
    one, many = by_hand[names[2]], by_hand[names[3]]
    at = first_difference(one.tokens[0], many.tokens[0])
    rows.append([names[2], names[3], _share(at, count), "none" if at is None else at + 1])
    counts |= {
        "logits_same_whole": _same_logits(by_hand[names[0]], by_hand[names[1]]),
        "logits_same_cut": _same_logits(one, many),
        "logits": int(one.logits[0].size),
        "first_other_token": -1 if at is None else at,
    }
    changed = 1 - counts["logits_same_cut"] / counts["logits"]
    fate = (
        f"after {at} equal tokens another one was drawn"
        if at is not None
        else f"none of {count} tokens changed this time"
    )
    return Report(
        ["run", "compared with", "equal tokens", "first other token"],
        rows,
        f"{counts['engine_same']:.0f} of {len(results)} runs of the engine have the same tokens "
        f"and log-probabilities, bit by bit. With sums that are cut when rows are few, "
        f"{changed:.0%} of the first logits had other bits, and {fate}.",
        counts,
        [
            Panel("Logits with equal bits, alone and among 8", "token", "% of the vocabulary",
                  lines=[("one chain", _logit_line(by_hand[names[0]], by_hand[names[1]])),
                         ("cut when rows are few", _logit_line(one, many))], wide=True)
        ],
    )  # fmt: skip


def _share(at: int | None, count: int) -> str:
    return f"{count if at is None else at} of {count}"


def _same_logits(a: Generated, b: Generated, step: int = 0) -> int:
    return int((a.logits[step].view(np.uint32) == b.logits[step].view(np.uint32)).sum())


def _logit_line(a: Generated, b: Generated) -> Points:
    """Until the texts part: from there on they answer other questions."""
    end = first_difference(a.tokens[0], b.tokens[0])
    steps = range(len(a.logits) if end is None else end + 1)
    return [(float(i + 1), 100 * _same_logits(a, b, i) / a.logits[0].size) for i in steps]


def _by_hand(
    split: Callable[[int], int], prompts: Sequence[Sequence[int]], count: int
) -> Generated:
    ops = Ops(split=split)
    longest = max(len(p) for p in prompts) + count
    decoder = Decoder(model_path(), ops, num_seqs=len(prompts), max_len=longest)
    return generate(decoder, prompts, count)


def _engine_answer(
    lab: Lab, prompts: list[list[int]], count: int, options: dict[str, Any]
) -> Answer:
    """What the first prompt's request gets, with the others in the batch. `repeat`: it runs once
    before, so that its prompt is in the prefix cache."""
    repeat = options.pop("repeat", False)
    defaults = {"max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 256}
    # Blocks of 4, so that a prompt of 12 tokens has whole ones to find.
    defaults |= {"block_size": 4, "enable_prefix_caching": repeat}
    if "max_num_batched_tokens" in options:
        defaults["max_num_seqs"] = 8
    with lab.bundled(**{**defaults, **options}) as bench:
        answer: Answer = []
        for round_ in range(2 if repeat else 1):
            answer = []
            for i, prompt in enumerate(prompts):
                params = _core.SamplingParams(
                    temperature=1.0, seed=i, max_tokens=count, ignore_eos=True, logprobs=0
                )
                bench.core.submit(100 * round_ + i, prompt, params)
            while bench.core.step():
                for out in bench.core.wait_outputs(0.0):
                    if out.request_id == 100 * round_:
                        pairs = zip(out.token_ids, out.logprobs, strict=True)
                        answer += [(token, scored.logprob) for token, scored in pairs]
        return answer


EXPERIMENTS = [
    Experiment(
        "4.1",
        "From loops to vectors",
        "How far are plain loops from what the machine can do, and what closes the gap?",
        vectors,
        ("cpu",),
    ),
    Experiment(
        "4.2",
        "Packed once",
        "Why are weights stored in another order than in the checkpoint?",
        packed,
        ("cpu",),
    ),
    Experiment(
        "4.3",
        "Fusion",
        "What do operators save that do two things at once?",
        fusion,
        ("cpu",),
    ),
    Experiment(
        "4.4",
        "Attention without the score matrix",
        "What does it cost to write the scores down?",
        attention,
        ("cpu",),
    ),
    Experiment(
        "4.5",
        "The order of a sum",
        "Why does one product have more than one right answer?",
        order,
        ("cpu",),
    ),
    Experiment(
        "4.6",
        "One request, many batches",
        "Does an answer depend on who else is being served?",
        batches,
        ("cpu",),
    ),
    *stage4_card.EXPERIMENTS,
]
