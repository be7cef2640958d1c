"""Stage 4 on a card: what changes when there are a hundred cores, thousands of threads, and a host
that must start every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..plot import Panel, Points
from ..random_model import LLAMA_3_2_1B, model_config
from . import card
from .card import (
    CHUNK,
    NAIVE_PASSES,
    Keys,
    Launches,
    causal_operations,
    normal,
    other_bits,
    relative_error,
    score_bytes,
    split_product,
)
from .experiment import Cell, Experiment, Report
from .lab import CARD_TINY, Bench, Lab, Request, Step

if TYPE_CHECKING:
    from torch import Tensor

HEADS, KV_HEADS, DIM = 32, 8, 128

# -- 4.7 Attention on a card ----------------------------------------------------------------------


def prompt_attention(lab: Lab) -> Report:
    card.need_torch()
    lengths = lab.size([512, 1024, 2048, 4096, 8192], [256, 512])
    last, rates = lengths[-1], lab.machine
    scores = score_bytes(HEADS, last)
    passes = NAIVE_PASSES * scores
    operations = causal_operations(HEADS, DIM, last)
    lab.expect(
        f"{last} tokens of {HEADS} heads have {HEADS * last**2 / 1e6:.0f} million scores, "
        f"{scores / 1e6:.0f} MB in bf16. The formula, operator by operator, passes over them "
        f"{NAIVE_PASSES} times, {passes / 1e9:.2g} GB: "
        f"{1e3 * passes / rates['read_bytes_per_second']:.2g} ms at best, and it computes the half "
        "above the diagonal, too, only to throw it away. Fused, no score leaves the "
        f"multiprocessor that made it, and {operations / 1e9:.0f} billion operations are left: "
        f"{1e3 * operations / rates['flops_per_second']:.2g} ms at best."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {"naive": [], "fused": []}
    speeds: dict[str, list[tuple[float, float]]] = {"naive": [], "fused": []}
    for n in lab.progress(lengths, "prompt lengths"):
        keys = Keys.random(n, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
        q = keys.queries(n)
        calls = {"naive": keys.naive(q), "fused": keys.paged(q)}
        error = relative_error(calls["fused"](), calls["naive"]())
        held = {name: card.peak_bytes(call) for name, call in calls.items()}
        operations, result = causal_operations(HEADS, DIM, n), 2 * q.numel()
        row: list[Cell] = [n, score_bytes(HEADS, n) / 1e6]
        row += [held["naive"] / 1e6, held["fused"] / 1e6]
        seconds = {name: card.seconds_of(call) for name, call in calls.items()}
        row += [1e3 * t for t in seconds.values()]
        row += [operations / t / 1e12 for t in seconds.values()]
        rows.append(row)
        for name, t in seconds.items():
            times[name].append((float(n), 1e3 * t))
            speeds[name].append((float(n), operations / t / 1e12))
            counts[f"held_{name}_{n}"] = held[name]
        counts |= {f"error_{n}": error, f"scores_{n}": score_bytes(HEADS, n), f"out_{n}": result}
        del keys, q, calls
        card.free()
    ms = {name: line[-1][1] for name, line in times.items()}
    return Report(
        ["tokens", "MB of scores", "MB held, naive", "MB held, fused", "ms, naive", "ms, fused"]
        + ["TFLOP/s, naive", "TFLOP/s, fused"],
        rows,
        f"{last} tokens took {ms['naive']:.3g} ms operator by operator and {ms['fused']:.3g} ms "
        f"fused, {ms['naive'] / ms['fused']:.0f} times less, and "
        f"{counts[f'held_fused_{last}'] / 1e6:.0f} MB instead of "
        f"{counts[f'held_naive_{last}'] / 1e6:.0f}. The results agree to "
        f"{max(counts[f'error_{n}'] for n in lengths):.0e} of the largest: both round to bf16, the "
        "naive one after each operator.",
        counts,
        [
            Panel("Time", "tokens", "ms", lines=list(times.items()), x_log=True, y_log=True),
            Panel("Of the operations that are needed", "tokens", "TFLOP/s",
                  lines=list(speeds.items()), x_log=True),
        ],
    )  # fmt: skip


# -- 4.8 Few queries, many cores ------------------------------------------------------------------


def split_kv(lab: Lab) -> Report:
    card.need_torch()
    import torch

    lengths = lab.size([1024, 4096, 16_384, 65_536, 131_072], [512, 1024])
    last, read = lengths[-1], lab.machine["read_bytes_per_second"]
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    size = 4 * KV_HEADS * DIM * last
    lab.expect(
        f"one new token of a context of {last}: K and V are {size / 1e6:.0f} MB, "
        f"{1e6 * size / read:.0f} µs at best. There is one query, so there are only {HEADS} heads "
        f"to share out, and {cores} multiprocessors: a kernel that gives each head to one of them "
        f"leaves {max(0, cores - HEADS)} idle. Cut the context into chunks of {CHUNK} tokens, and "
        f"there are {-(-last // CHUNK) * KV_HEADS} pieces (a piece serves all heads that share its "
        "K and V), whose results are merged at the end. The chunks lie at fixed places, whatever "
        "the batch, and the uncut kernel closes its sums at the same places: the bits are the same."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"other_bits": 0, "other_bits_batch": 0, "outputs": 0}
    names = ("naive, dense cache", "one block a head", "split")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for n in lab.progress(lengths, "contexts"):
        keys = Keys.random(n, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
        # Up to four query rows of a sequence go to the decode kernel, more to the prefill kernel.
        one, five = keys.queries(1), keys.queries(5)
        split, uncut = keys.paged(one), keys.paged(five)
        naive = keys.naive(one)
        counts["other_bits"] += other_bits(split(), uncut()[-1:])
        counts["outputs"] += one.numel()
        counts[f"error_{n}"] = relative_error(split(), naive())
        counts["other_bits_batch"] += _changed_in_company(keys, one)
        pieces = -(-n // CHUNK) * KV_HEADS
        seconds = dict(zip(names, map(card.seconds_of, (naive, uncut, split)), strict=True))
        for name, t in seconds.items():
            times[name].append((float(n), 1e6 * t))
        rows.append([n, keys.bytes / 1e6, HEADS, pieces, 1e6 * keys.bytes / read])
        rows[-1] += [1e6 * t for t in seconds.values()]
        rows[-1].append(keys.bytes / seconds["split"] / 1e9)
        counts |= {f"pieces_{n}": pieces, f"bytes_{n}": keys.bytes}
        del keys, split, uncut, naive
        card.free()
    us = {name: line[-1][1] for name, line in times.items()}
    bound = [(float(n), 1e6 * counts[f"bytes_{n}"] / read) for n in lengths]
    return Report(
        ["context", "MB", "pieces, uncut", "pieces, split", "bound µs"]
        + [f"µs, {name}" for name in names] + ["GB/s, split"],
        rows,
        f"at {last} tokens the uncut kernel took {us[names[1]]:.0f} µs and the split one "
        f"{us[names[2]]:.0f} µs, {us[names[1]] / us[names[2]]:.1f} times less "
        f"({bound[-1][1]:.0f} µs at best). {counts['other_bits']:.0f} of {counts['outputs']:.0f} "
        f"outputs have other bits split than uncut, {counts['other_bits_batch']:.0f} alone than "
        "beside another sequence.",
        counts,
        [
            Panel("One token's attention", "context", "µs",
                  lines=[*times.items(), ("bound: reading K and V", bound)],
                  x_log=True, y_log=True, wide=True)
        ],
    )  # fmt: skip


def _changed_in_company(keys: Keys, q: Tensor) -> int:
    """Outputs of the first sequence that change when another one, with fewer tokens of the same
    cache, is in the batch."""
    import torch

    from .. import ops

    cache = (keys.k_cache, keys.v_cache)
    tables = torch.cat([keys.tables, keys.tables])
    context = torch.tensor([keys.n, keys.n // 2], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    both = ops.paged_attention(torch.cat([q, q]), *cache, tables, context, starts, DIM**-0.5)
    return other_bits(keys.paged(q)(), both[:1])


# -- 4.9 Eager against a captured graph -----------------------------------------------------------


def graphs(lab: Lab) -> Report:
    card.need_torch()
    shapes: dict[str, dict[str, Any]] = lab.size(
        {"nano-5m": NANO, "1.2 billion": LLAMA_3_2_1B}, {"tiny": CARD_TINY}
    )
    batches, new = lab.size([1, 32], [1, 4]), lab.size(64, 6)
    read = lab.machine["read_bytes_per_second"]
    models = {name: model_config(**shape) for name, shape in shapes.items()}
    layers = {name: len(m.layers) for name, m in models.items()}
    each = card.kernels_of_a_layer()
    kernels = ", ".join(f"{each * n} and a few ({name})" for name, n in layers.items())
    lab.expect(
        "a layer is 9 kernels (experiment 4.3 counts them); where rows are few, from Hopper on, "
        "5: norm, rotation, gate and residual addition are then parts of others. So a step of "
        f"one row is {kernels}. Eagerly, the host starts each: a few microseconds of its time. "
        "Captured once as a graph, all of them are started together, and a step is 1 launch. It "
        "pays where a kernel takes less time than its launch, in small models and small "
        "batches; where the card has enough to do, the host is ahead of it anyway. The bits "
        "stay the same: a graph is the same kernels."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"same": 0, "runs": 0, "counted": 0}
    bars: dict[str, list[tuple[float, float]]] = {"eager": [], "graph": []}
    names: list[str] = []
    gains: dict[str, float] = {}
    least: dict[str, float] = {}
    ways: dict[str, list[int]] = {"eager": [], "graph": batches}
    options = {"max_num_seqs": max(batches), "max_model_len": 256}
    answers: dict[tuple[str, int, str], list[Any]] = {}
    seconds: dict[tuple[str, int, str], float] = {}
    seen: dict[tuple[str, int, str], Launches | None] = {}
    runs = [(name, way) for name in models for way in ways]
    for name, way in lab.progress(runs, "timed"):
        card.free()
        with lab.engine(models[name], graph_sizes=ways[way], **options) as bench:
            least[name] = bench.work.weight_bytes / read
            for batch in batches:
                key = name, batch, way
                answers[key], seconds[key] = _decode(bench, batch, new)
    # Counting comes last: a profiler that has once been there leaves launches slower.
    for name, way in lab.progress(runs, "counted"):
        card.free()
        with lab.engine(models[name], graph_sizes=ways[way], **options) as bench:
            seen[name, batches[0], way] = _launches(bench, batches[0])
    for name in models:
        counts[f"layers_{name}"] = layers[name]
        for batch in batches:
            pair = [(name, batch, way) for way in ways]
            counts["same"] += answers[pair[0]] == answers[pair[1]]
            counts["runs"] += 1
            gains[f"{name}, batch {batch}"] = seconds[pair[0]] / seconds[pair[1]]
            for key, way in zip(pair, ways, strict=True):
                bars[way].append((float(len(names)), 1e3 * seconds[key]))
                launched = seen.get(key)
                row: list[Cell] = ["", ""] if launched is None else [*launched]
                row = [name, batch, way, *row, 1e3 * least[name], 1e3 * seconds[key]]
                rows.append([*row, batch / seconds[key]])
                if launched is not None:
                    counts |= {f"kernels_{way}_{name}": launched.kernels}
                    counts |= {f"calls_{way}_{name}": launched.calls}
                    counts["counted"] += 1
            names.append(f"{name}, batch {batch}")
    return Report(
        ["model", "batch", "launched", "kernels a step", "launches a step"]
        + ["weights read, ms", "ms a step", "tokens/s"],
        rows,
        "eagerly, a step took "
        + ", ".join(f"{gain:.2f} times as long ({what})" for what, gain in gains.items())
        + f". Tokens and log-probabilities are the same, bit by bit, in {counts['same']:.0f} of "
        f"{counts['runs']:.0f} comparisons.",
        counts,
        [
            Panel("A step of decoding", "", "ms", bars=list(bars.items()), x_names=names,
                  wide=True, y_log=False)
        ],
    )  # fmt: skip


# The bundled model's shape; its weights do not matter here.
NANO: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "qk_norm": False,
}


def _decode(bench: Bench, batch: int, new: int) -> tuple[list[Any], float]:
    """What the first of `batch` requests got, and seconds of a step."""
    bench.run(_requests(bench, batch, 4))  # loads what the first step loads
    run = bench.run(_requests(bench, batch, new))
    full = [s for s in run.steps if s["num_decodes"] == s["num_tokens"] == batch]
    return run.scored[0], _median(full)


def _requests(bench: Bench, batch: int, new: int) -> list[Request]:
    return [Request(bench.prompt(16, i), new, sampling={"logprobs": 0}) for i in range(batch)]


def _launches(bench: Bench, batch: int) -> Launches | None:
    """Of a step of decoding: the difference of two runs, one of which has four steps more."""
    bench.run(_requests(bench, batch, 4))
    more, less = (
        card.launches(lambda n=n: bench.run(_requests(bench, batch, n)))  # type: ignore[misc]
        for n in (6, 2)
    )
    if more is None or less is None:
        return None
    return Launches((more.kernels - less.kernels) // 4, (more.calls - less.calls) // 4)


def _median(steps: Sequence[Step]) -> float:
    times = sorted(s["end_time"] - s["start_time"] for s in steps)
    return float(times[len(times) // 2])


# -- 4.10 Fusion on a card ------------------------------------------------------------------------


def card_fusion(lab: Lab) -> Report:
    card.need_torch()
    import torch
    import torch.nn.functional as F

    from .. import ops

    rows_of_x = lab.size([1, 64, 1024, 8192], [1, 64])
    hidden, inner = lab.size((4096, 14_336), (256, 512))
    saved = 2 * (hidden + 2 * inner)
    last, read = rows_of_x[-1], lab.machine["read_bytes_per_second"]
    lab.expect(
        "between the products of a layer stand a residual addition, a norm, and the gate of the "
        "MLP. Taken apart they are 4 kernels: add, norm, activation, multiply; fused, 2. Fused, "
        "the norm need not read the sum again, nor the multiplication the activation, which need "
        f"not be written either: 2 bytes × ({hidden} + 2 × {inner}) a row less. For {last} rows "
        f"that is {saved * last / 1e6:.0f} MB, {1e6 * saved * last / read:.0f} µs; for one row "
        "what counts is that a kernel takes some microseconds, however little it does."
    )
    weight = normal(hidden, seed=9)
    weight32 = weight.float()  # as the engine keeps it
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"saved_a_row": saved, "counted": 0}
    lines: dict[str, list[tuple[float, float]]] = {"separate": [], "fused": []}
    for n in lab.progress(rows_of_x, "rows"):
        x, residual, gate_up = normal(n, hidden), normal(n, hidden, seed=1), normal(n, 2 * inner)
        gate, up = gate_up[:, :inner], gate_up[:, inner:]

        def separate(
            x: Tensor = x, r: Tensor = residual, gate: Tensor = gate, up: Tensor = up
        ) -> tuple[Tensor, Tensor]:
            return F.rms_norm(x + r, (hidden,), weight, 1e-6), F.silu(gate) * up

        def fused(
            x: Tensor = x, r: Tensor = residual, both: Tensor = gate_up
        ) -> tuple[Tensor, Tensor]:
            return ops.add_rms_norm_(x, r, weight32, 1e-6), ops.silu_and_mul(both)

        wanted = separate()
        kept = residual.clone()
        found = fused()
        residual.copy_(kept)
        error = max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
        counts[f"error_{n}"] = error
        moved = {
            "separate": 2 * n * (3 * hidden + 2 * hidden + 2 * inner + 3 * inner),
            "fused": 2 * n * (4 * hidden + 3 * inner),
        }
        calls: dict[str, Callable[[], object]] = {"separate": separate, "fused": fused}
        for name, call in calls.items():
            t = card.seconds_of(call)
            seen = card.launches(call)
            residual.zero_()  # it grows with every call
            counts[f"bytes_{name}_{n}"] = moved[name]
            if seen is not None:
                counts[f"kernels_{name}_{n}"] = seen.kernels
                counts["counted"] += 1
            lines[name].append((float(n), 1e6 * t))
            rows.append([n, name, "" if seen is None else seen.kernels, moved[name] / 1e6])
            rows[-1] += [1e6 * t, moved[name] / t / 1e9]
        torch.cuda.synchronize()
    times = [lines["separate"][i][1] / lines["fused"][i][1] for i in (0, -1)]
    less = counts[f"bytes_separate_{last}"] - counts[f"bytes_fused_{last}"]
    return Report(
        ["rows", "operators", "kernels", "MB", "µs", "GB/s"],
        rows,
        f"taken apart it took {times[0]:.1f} times as long for one row, and {times[1]:.1f} times "
        f"for {last}; fused, these moved {less / 1e6:.0f} MB less (expected "
        f"{saved * last / 1e6:.0f}), {less / counts[f'bytes_separate_{last}']:.0%} of all.",
        counts,
        [
            Panel("Addition, norm and gate", "rows", "µs", lines=list(lines.items()),
                  x_log=True, y_log=True, wide=True)
        ],
    )  # fmt: skip


# -- 4.11 One request, many batches, on a card ----------------------------------------------------

# Sums that are long enough for a library to cut them (K of 2048 and 8192).
WIDE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_layers": 4,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 64,
}


def card_batches(lab: Lab) -> Report:
    card.need_torch()
    count, batches = lab.size(64, 24), lab.size([1, 4, 8, 16, 32, 64], [1, 4, 16, 64])
    model = model_config(**{**WIDE, "num_layers": lab.size(4, 1)})
    lab.expect(
        f"{count} sampled tokens of one request, with a seed, in batches of "
        f"{', '.join(map(str, batches))}. With batch_invariant=True, the default, each sum has one "
        "order, which depends on nothing but its own length: every log-probability has the same "
        "bits in every batch. With batch_invariant=False the fastest product is taken for each "
        "number of rows, the library's or our own for few, whether it cuts its sums, so that all "
        "multiprocessors have something to do, or not: between two that differ in this, other "
        "bits, and sooner or later another token. "
        "Then the same for single products, where cutting by hand must change most of the bits."
    )
    rows: list[list[Cell]] = []
    counts: dict[str, float] = {"tokens": count, "batches": len(batches)}
    lines: list[tuple[str, Points]] = []
    for invariant in lab.progress((True, False), "with and without the promise"):
        card.free()
        with lab.engine(
            model,
            max_num_seqs=max(batches),
            max_model_len=256,
            max_num_batched_tokens=4096,
            batch_invariant=invariant,
        ) as bench:
            answers = {batch: _needle(bench, batch, count) for batch in batches}
        alone, points = answers[batches[0]], []
        which = "invariant" if invariant else "free"
        counts |= {f"same_{which}": 0, f"other_bits_{which}": 0, f"other_tokens_{which}": 0}
        for batch, answer in answers.items():
            other = sum(a != b for a, b in zip(answer, alone, strict=True))
            tokens = sum(a[0] != b[0] for a, b in zip(answer, alone, strict=True))
            rows.append([f"engine, batch_invariant={invariant}", batch, other, count, tokens])
            points.append((float(batch), 100 * other / count))
            counts[f"same_{which}"] += not other
            counts[f"other_bits_{which}"] += other
            counts[f"other_tokens_{which}"] += tokens
        lines.append((f"batch_invariant={invariant}", points))
    card.free()
    for name, key, other, size in _products(lab.size((64, 1024, 8192), (64, 64, 512))):
        rows.append([name, "", other, size, ""])
        counts |= {f"other_{key}": other, "outputs": size}
    return Report(
        ["", "rows or requests", "other bits", "of", "other tokens"],
        rows,
        f"with batch_invariant=True {counts['same_invariant']:.0f} of {len(batches)} batches gave "
        f"the same bits; without it {counts['same_free']:.0f}, with "
        f"{counts['other_bits_free']:.0f} log-probabilities and "
        f"{counts['other_tokens_free']:.0f} tokens that differ. A product that was cut in four by "
        f"hand has other bits in {counts['other_split']:.0f} of {counts['outputs']:.0f} outputs.",
        counts,
        [
            Panel("Log-probabilities with other bits than alone", "requests in the batch", "%",
                  lines=lines, x_log=True, wide=True)
        ],
    )  # fmt: skip


def _needle(bench: Bench, batch: int, count: int) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of one request beside batch - 1 others, which go on for as long
    as it does."""
    sampling = {"temperature": 1.0, "logprobs": 0}
    return bench.run(
        [
            Request(bench.prompt(40 + i % 17, i), count, sampling={**sampling, "seed": i})
            for i in range(batch)
        ]
    ).scored[0]


def _products(size: tuple[int, int, int]) -> list[tuple[str, str, int, int]]:
    """(name, key, outputs with other bits, outputs) of x W^T, each row alone against all rows at
    once; and cut in four against whole."""
    import torch

    from .. import ops

    rows, out, features = size
    x, w = normal(rows, features), normal(out, features, seed=1)

    def alone(product: Any) -> Tensor:
        return torch.cat([product(x[i : i + 1]) for i in range(rows)])

    found = []
    for name, key, product in (
        (
            "ops.linear, a row alone and among 64",
            "ours",
            lambda x: ops.linear(x, w),
        ),
        ("torch, a row alone and among 64", "torch", lambda x: x @ w.T),
    ):
        found.append((name, key, other_bits(alone(product), product(x)), rows * out))
    cut, whole = (split_product(x, w, parts) for parts in (4, 1))
    found.append(
        (
            "by hand, whole and cut in four",
            "split",
            other_bits(cut, whole),
            rows * out,
        )
    )
    return found


# -- 4.12 The card's roof -------------------------------------------------------------------------


def card_roof(lab: Lab) -> Report:
    card.need_torch()
    from .. import ops

    read, compute = (lab.machine[k] for k in ("read_bytes_per_second", "flops_per_second"))
    balance = compute / read
    out, features = lab.size((14_336, 4096), (256, 256))
    rows_of_x = lab.size([1, 8, 64, 256, 1024, 8192], [1, 64])
    prompt, context, sequences = lab.size((4096, 4096, 32), (128, 128, 2))
    group = HEADS // KV_HEADS
    lab.expect(
        f"this card moves {read / 1e9:.0f} GB and does {compute / 1e12:.0f} million million "
        f"operations a second, {balance:.0f} for each byte; a CPU has time for about 10. A product "
        f"of n rows has about n operations a byte, so it takes some {balance:.0f} rows to keep the "
        f"card busy. Decode attention has {group} operations a byte, one for each head that shares "
        "a key and a value, whatever the batch: no number of sequences gets it off the slope. "
        f"Prompt attention has {_per_byte(prompt)[1]:.0f} if scores stay on the chip, and "
        f"{_per_byte(prompt)[0]:.0f} if they are written down."
    )
    rows: list[list[Cell]] = []
    dots: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, float] = {}
    share: dict[str, float] = {}

    def add(kind: str, label: str, operations: float, moved: float, seconds: float) -> None:
        intensity = operations / moved
        roof = min(compute, read * intensity)
        dots.setdefault(kind, []).append((intensity, operations / seconds))
        by = "memory" if intensity < balance else "arithmetic"
        share[label] = operations / seconds / roof
        rows.append([label, operations / 1e9, moved / 1e6, intensity, by, 1e6 * seconds])
        rows[-1] += [operations / seconds / 1e12, f"{share[label]:.0%}"]
        counts.update({f"operations: {label}": operations, f"bytes: {label}": moved})

    weights = [normal(out, features, seed=s) for s in range(lab.size(3, 1))]  # more than L2 holds
    for n in lab.progress(rows_of_x, "products"):
        x = normal(n, features)
        turn = iter(range(1 << 30))

        def by_torch(x: Tensor = x, turn: Any = turn) -> Tensor:
            return x @ weights[next(turn) % len(weights)].T

        def by_ours(x: Tensor = x, turn: Any = turn) -> Tensor:
            return ops.linear(x, weights[next(turn) % len(weights)])

        what = f"{n} rows" if n > 1 else "1 row"
        work = 2.0 * n * out * features, 2.0 * (out * features + n * (out + features))
        add("product (cuBLAS)", f"product, {what}, cuBLAS", *work, card.seconds_of(by_torch))
        if n <= 64:  # the kernel for few rows; an engine times both and takes the faster one
            add("product (ours)", f"product, {what}, ours", *work, card.seconds_of(by_ours))
    weights.clear()
    card.free()
    keys = Keys.random(prompt, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    q = keys.queries(prompt)
    operations = float(causal_operations(HEADS, DIM, prompt))
    naive, least = (operations / rate for rate in _per_byte(prompt))
    add(
        "prompt attention",
        "prompt attention, naive",
        operations,
        naive,
        card.seconds_of(keys.naive(q)),
    )
    add(
        "prompt attention",
        "prompt attention, fused",
        operations,
        least,
        card.seconds_of(keys.paged(q)),
    )
    del keys, q
    card.free()
    keys = Keys.random(context, sequences, HEADS, KV_HEADS, DIM)
    q = keys.queries(1)
    operations = 4.0 * HEADS * DIM * context * sequences
    label = f"decode attention, {sequences} sequences"
    add("decode attention", label, operations, float(keys.bytes), card.seconds_of(keys.paged(q)))
    del keys, q
    card.free()
    edge = [0.5, balance, max(x for line in dots.values() for x, _ in line) * 2]
    roof_line = [(i, min(compute, i * read)) for i in sorted(edge)]
    counts["balance"] = balance
    many = f"product, {rows_of_x[-1]} rows, cuBLAS"
    return Report(
        ["what", "GFLOP", "MB", "FLOP/byte", "bound by", "µs", "TFLOP/s", "of the roof"],
        rows,
        "of what the roof allows, a product of one row reached "
        f"{share['product, 1 row, ours']:.0%} (cuBLAS {share['product, 1 row, cuBLAS']:.0%}), one "
        f"of {rows_of_x[-1]} rows {share[many]:.0%}, fused prompt attention "
        f"{share['prompt attention, fused']:.0%} and decode attention {share[label]:.0%}.",
        counts,
        [
            Panel("What the card allows, and what was reached", "operations for each byte",
                  "operations a second", lines=[("the card's roof", roof_line)],
                  dots=list(dots.items()), x_log=True, y_log=True, wide=True)
        ],
    )  # fmt: skip


def _per_byte(n: int) -> tuple[float, float]:
    """Operations of prompt attention for each byte, with scores in memory and without."""
    operations = causal_operations(HEADS, DIM, n)
    least = 4 * n * DIM * (HEADS + KV_HEADS)  # queries in, results out, K and V once
    return operations / (NAIVE_PASSES * score_bytes(HEADS, n) + least), operations / least


ON_CARD = ("cuda",)
EXPERIMENTS = [
    Experiment(
        "4.7",
        "Attention on a card",
        "What does it cost a card to write the scores down?",
        prompt_attention,
        ON_CARD,
    ),
    Experiment(
        "4.8",
        "One query, a hundred cores",
        "Who has work when a single token is decoded?",
        split_kv,
        ON_CARD,
    ),
    Experiment(
        "4.9",
        "Eager or captured",
        "What does it cost to start a kernel?",
        graphs,
        ON_CARD,
    ),
    Experiment(
        "4.10",
        "Fusion on a card",
        "What do a kernel and a byte less save on a card?",
        card_fusion,
        ON_CARD,
    ),
    Experiment(
        "4.11",
        "One request, many batches, on a card",
        "What does it take to get the same answer twice, and what breaks it?",
        card_batches,
        ON_CARD,
    ),
    Experiment(
        "4.12",
        "The card's roof",
        "How close does each kernel come to what the card allows?",
        card_roof,
        ON_CARD,
    ),
]
