"""The two parts of a prefill that no engine can leave out, each alone on the card: the products of
every layer through cuBLASLt, as torch calls it, and our attention over a paged cache. bench_gpu
sets them beside the engine's time. bf16; weights of N(0, 0.02), all else of N(0, 1).

Where there is a choice, it is the one that gives the shorter time and so asks more of the engine:
the faster of torch's two ways to cuBLASLt, attention over a cache that L2 may still hold, and of
several measurements the shortest. (A median of two was at times twice the truth, or, where a
slow upload was taken off, a tenth.)"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import REST
from torch import Tensor

from nano_inference import ops

Step = list[tuple[int, int, int]]  # of each prompt in it: number, rows, context with those rows
BLOCK = 16  # tokens, as the engine's
CALLS = 4  # of attention in a row: a fifth would wait until the inputs of the first are free
LEAST_REPEATS = 5  # of attention, which is short
AHEAD = 4  # times all products before it: after one of Qwen3-0.6B's Python was not yet ready


def seconds(ahead: Callable[[], None], work: Callable[[], None], repeats: int) -> float:
    """Of `work` on the card after a rest, as an engine's prefill is timed. `ahead` keeps the card
    busy, and as hot as in an engine, until Python has called all of `work`: its own time does not
    count."""
    times = []
    for _ in range(repeats + 1):
        time.sleep(REST)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ahead()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])  # in the first, memory is allocated and plans are made


def normal(*shape: int, std: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=std)


class Products:
    """qkv, o, gate_up and down of every layer, each with weights of its own."""

    def __init__(self, shape: dict[str, Any], max_rows: int) -> None:
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        q = shape["num_heads"] * shape["head_dim"]
        qkv = q + 2 * shape["num_kv_heads"] * shape["head_dim"]
        sizes = [(qkv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)]  # (out, in)
        self.weights = [
            [normal(n, k, std=0.02) for n, k in sizes] for _ in range(shape["num_layers"])
        ]
        self.inputs = [normal(max_rows, k) for _, k in sizes]
        self.outputs = [normal(max_rows, n) for n, _ in sizes]

    def run(self, rows: int) -> None:
        for layer in self.weights:
            for x, w, y in zip(self.inputs, layer, self.outputs, strict=True):
                torch.mm(x[:rows], w.t(), out=y[:rows])

    def run_steps(self, steps: list[Step]) -> None:
        for step in steps:
            self.run(rows_of(step))


def rows_of(step: Step) -> int:
    return sum(rows for _, rows, _ in step)


def products_seconds(products: Products, steps: list[Step], repeats: int) -> float:
    times = {}
    before = torch.backends.cuda.preferred_blas_library()
    for library in ("cublaslt", "cublas"):  # heuristics of torch's call, or of cuBLAS in front
        torch.backends.cuda.preferred_blas_library(library)
        times[library] = seconds(
            lambda: products.run_steps(steps), lambda: products.run_steps(steps), repeats
        )
    torch.backends.cuda.preferred_blas_library(before)
    print("  products", ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in times.items()))
    return min(times.values())


class Attention:
    """Of one layer, whose cache holds all prompts of these steps."""

    def __init__(self, shape: dict[str, Any], steps: list[Step]) -> None:
        self.heads, self.kv_heads, self.d = (
            shape[key] for key in ("num_heads", "num_kv_heads", "head_dim")
        )
        prompts = 1 + max(prompt for step in steps for prompt, _, _ in step)
        width = -(-max(context for step in steps for _, _, context in step) // BLOCK)
        blocks = prompts * width
        self.k, self.v = ops.new_kv_cache(
            blocks, self.kv_heads, BLOCK, self.d, torch.bfloat16, "cuda"
        )
        self.k.normal_()
        self.v.normal_()
        self.tables = torch.randperm(blocks, dtype=torch.int32, device="cuda").view(prompts, width)

    def seconds(self, step: Step, products: Products, repeats: int) -> float:
        rows, first, columns = rows_of(step), step[0][0], self.heads + 2 * self.kv_heads
        q = normal(rows, columns * self.d).view(rows, columns, self.d)[:, : self.heads]
        tables = self.tables[first : first + len(step)]
        contexts = torch.tensor([context for _, _, context in step], dtype=torch.int32)
        starts = torch.tensor([0, *(n for _, n, _ in step)]).cumsum(0).int()
        host = torch.zeros(rows, dtype=torch.int32).pin_memory()
        card, touched = host.to("cuda"), torch.zeros(1, device="cuda")

        def ahead() -> None:
            for _ in range(AHEAD):
                products.run(rows)

        def attend() -> None:
            for _ in range(CALLS):
                ops.paged_attention(q, self.k, self.v, tables, contexts, starts, self.d**-0.5)

        # Every call uploads its lists, little more than an int32 a row; an engine does so once a
        # step. Taken off: such copies, each with a small kernel that, as attention, waits for it.
        def upload() -> None:
            for _ in range(CALLS):
                card.copy_(host, non_blocking=True)
                touched.zero_()

        return (seconds(ahead, attend, repeats) - seconds(ahead, upload, repeats)) / CALLS


def measure_parts(
    shape: dict[str, Any], device: int, cases: dict[str, list[Step]], repeats: int
) -> dict[str, float]:
    """Milliseconds of "products CASE" and "attention CASE", all layers and steps together. Leaves
    no tensors on the card."""
    if not torch.cuda.is_available():
        raise SystemExit("the part 'parts' needs a torch that finds the card; see --only")
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    found = {}
    products = Products(shape, max(rows_of(step) for steps in cases.values() for step in steps))
    for case, steps in cases.items():
        attention = Attention(shape, steps)
        often = max(repeats, LEAST_REPEATS)
        layer = sum(attention.seconds(step, products, often) for step in steps)
        found[f"products {case}"] = 1e3 * products_seconds(products, steps, repeats)
        found[f"attention {case}"] = 1e3 * shape["num_layers"] * layer
        del attention
    del products
    torch.cuda.empty_cache()  # the engine takes what is free
    return found
