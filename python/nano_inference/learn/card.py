"""What experiments on a card work with. Tensors, clocks and the naive side of each comparison are
torch's, which is imported when it is needed; the other side is nano_inference.ops, on the same
tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from .experiment import Missing

if TYPE_CHECKING:
    from torch import Tensor

DEVICE, DTYPE = "cuda", "bfloat16"  # tests without a card set others
BLOCK = 16  # tokens of a block of the cache
CHUNK = 256
"""Tokens of the cache that one unit of decode attention sums up: kKvChunk of
cuda/attention_plan.h."""


def need_torch() -> None:
    """Missing, saying what to install, where torch is not there or cannot use the card."""
    try:
        import torch
    except ImportError:
        raise Missing(
            "torch is not installed; on a card it holds the tensors, measures what the card can "
            "do, and is the naive side of comparisons: pip install torch"
        ) from None
    if not torch.cuda.is_available():
        raise Missing(f"torch {torch.__version__} cannot use the card: install a CUDA build of it")


def kernels_of_a_layer() -> int:
    """In a step of one row: from Hopper on, what stands around products is part of them."""
    import torch

    return 5 if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) else 9


def seconds_of(work: Callable[[], object], repeats: int = 3, rounds: int = 12) -> float:
    """Of one call, on the card's own clock; the best of some rounds. The card is kept waiting at
    first, so that it is never the host, slow in launching, that is measured; few calls a round, as
    operators with lists in host memory have four places for them, and then wait for the card."""
    import torch

    work()
    best = float("inf")
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(5_000_000)  # type: ignore[no-untyped-call]  # cycles: about 3 ms
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / repeats)
    return best


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that torch held at once for it, the result included."""
    import torch

    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


@cache
def measured_card() -> dict[str, float]:
    """read_bytes_per_second (of a copy, which reads and writes) and flops_per_second (of a large
    product in bf16)."""
    need_torch()
    import torch

    copy, product = _seconds_of_copy(1 << 30), _seconds_of_product(n := 8192)
    torch.cuda.empty_cache()  # an engine takes its share of what is free
    return {"read_bytes_per_second": (2 << 30) / copy, "flops_per_second": 2 * n**3 / product}


def _seconds_of_copy(size: int) -> float:
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source))


def _seconds_of_product(n: int) -> float:
    a, b = (normal(n, n, seed=s) for s in (1, 2))
    return seconds_of(lambda: a @ b)


# -- Launches -------------------------------------------------------------------------------------


class Launches(NamedTuple):
    """What torch's profiler saw. It listens to the driver, so it sees the engine's kernels, too."""

    kernels: int
    """That ran on the card."""
    calls: int
    """Of the host to start a kernel or a graph."""


_STARTS = ("cudaLaunch", "cudaGraphLaunch", "cuLaunchKernel", "cuGraphLaunch")


def launches(work: Callable[[], object]) -> Launches | None:
    """None where nothing may be counted: some machines keep the driver's counters to themselves."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as seen:
        work()
        torch.cuda.synchronize()
    kernels = calls = 0
    on_card = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    for event in seen.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() == on_card:
            kernels += not name.startswith(("Memcpy", "Memset"))
        else:
            calls += name.startswith(_STARTS)
    return Launches(kernels, calls) if kernels else None


# -- Attention ------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    """On the card, the same numbers each time."""
    import torch

    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=getattr(torch, DTYPE))


@dataclass
class Keys:
    """Keys and values of some sequences of n tokens: dense, and in a paged cache whose blocks lie
    in any order."""

    k: Tensor  # [sequences, kv_heads, n, dim]
    v: Tensor
    k_cache: Tensor  # [blocks, kv_heads, BLOCK, dim]
    v_cache: Tensor
    tables: Tensor  # [sequences, blocks of one]
    heads: int

    @classmethod
    def random(
        cls, n: int, sequences: int = 1, heads: int = 32, kv_heads: int = 8, dim: int = 128
    ) -> Keys:
        """n: a multiple of BLOCK."""
        import torch

        from .. import ops

        k, v = (normal(sequences, kv_heads, n, dim, seed=s) for s in (1, 2))
        blocks = n // BLOCK
        order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(3))
        tables = order.to(torch.int32).reshape(sequences, blocks).to(DEVICE)
        k_cache, v_cache = ops.new_kv_cache(
            sequences * blocks, kv_heads, BLOCK, dim, k.dtype, DEVICE
        )
        slots = tables.long()[:, :, None] * BLOCK + torch.arange(BLOCK, device=DEVICE)
        positions = torch.arange(n, dtype=torch.int32, device=DEVICE).repeat(sequences)
        k_rows, v_rows = (t.transpose(1, 2).reshape(sequences * n, -1) for t in (k, v))
        one_head = k_rows.new_zeros(sequences * n, dim)  # of queries, which do not matter here
        qkv = torch.cat([one_head, k_rows, v_rows], 1)
        ops.rope_kv_write_(qkv, positions, slots.flatten(), k_cache, v_cache)
        return cls(k, v, k_cache, v_cache, tables, heads)

    @property
    def sequences(self) -> int:
        return self.k.shape[0]

    @property
    def n(self) -> int:
        return self.k.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def dim(self) -> int:
        return self.k.shape[3]

    @property
    def bytes(self) -> int:
        """Keys and values."""
        return 2 * self.k.numel() * self.k.element_size()

    def queries(self, rows: int) -> Tensor:
        """[sequences * rows, heads, dim]: `rows` for each sequence. A sequence's last rows are the
        same, however many it has."""
        q = normal(self.sequences, self.n if rows > 8 else 8, self.heads, self.dim, seed=4)
        return q[:, -rows:].reshape(-1, self.heads, self.dim).contiguous()

    def paged(self, q: Tensor) -> Callable[[], Tensor]:
        """The engine's attention."""
        import torch

        from .. import ops

        rows = len(q) // self.sequences
        context = torch.full((self.sequences,), self.n, dtype=torch.int32)
        starts = torch.arange(0, len(q) + 1, rows, dtype=torch.int32)
        scale = self.dim**-0.5
        return lambda: ops.paged_attention(
            q, self.k_cache, self.v_cache, self.tables, context, starts, scale
        )

    def naive(self, q: Tensor) -> Callable[[], Tensor]:
        """The textbook's formula, operator by operator: all scores are written down. q: the rows of
        the last positions, all of them or one."""
        import torch

        group, rows = self.heads // self.kv_heads, len(q) // self.sequences
        wide = q.reshape(self.sequences, rows, self.kv_heads, group, self.dim)
        wide = wide.permute(0, 2, 3, 1, 4).reshape(self.sequences, self.kv_heads, -1, self.dim)
        wide, k, v = wide.contiguous(), self.k.transpose(-1, -2), self.v
        position = torch.arange(self.n - rows, self.n, device=DEVICE)
        unseen = torch.arange(self.n, device=DEVICE) > position[:, None]  # [rows, n]
        if rows == 1:
            unseen = unseen[:0]

        def run() -> Tensor:
            scores = wide @ k
            scores *= self.dim**-0.5
            if len(unseen):
                by_row = scores.view(self.sequences, self.kv_heads, group, rows, self.n)
                by_row.masked_fill_(unseen, float("-inf"))
            out = torch.softmax(scores, -1) @ v
            out = out.view(self.sequences, self.kv_heads, group, rows, self.dim)
            return out.permute(0, 3, 1, 2, 4).reshape(-1, self.heads, self.dim)

        return run


def score_bytes(heads: int, n: int) -> int:
    """All scores of a prompt, in bf16."""
    return 2 * heads * n * n


NAIVE_PASSES = 8
"""Over the scores, in Keys.naive(): written by the product; read and written by scale, mask and
softmax; read by the second product."""


def causal_operations(heads: int, dim: int, n: int) -> int:
    """Scores and sums of values, for the pairs that causal attention needs."""
    return 4 * heads * dim * n * (n + 1) // 2


def other_bits(a: Tensor, b: Tensor) -> int:
    """Elements with other bits."""
    import torch

    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return int((a.contiguous().view(kind) != b.contiguous().view(kind)).sum())


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def split_product(x: Tensor, w: Tensor, parts: int) -> Tensor:
    """x W^T in float32, as a sum over cuts of the summation index."""
    import torch

    edges = [x.shape[1] * i // parts for i in range(parts + 1)]
    pieces: Sequence[Tensor] = [
        x[:, a:b].float() @ w[:, a:b].float().T for a, b in zip(edges, edges[1:], strict=False)
    ]
    total = torch.zeros_like(pieces[0])
    for piece in pieces:
        total += piece
    return total


def free() -> None:
    """Gives back what torch keeps for later, so that an engine can have it."""
    import torch

    torch.cuda.empty_cache()
