"""The operators on torch tensors: numbers against torch in float64, torch.compile, torch's own
checks of custom operators, the caller's stream, and refusals.

A result may be off by twice the error of torch's float32 result, rounded to the same type, plus 2
units of that type (float32: 20 eps of what was added up)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference as ref
from nano_inference import _core, ops

HAS_CUDA = torch.cuda.is_available() and bool(_core.cuda_devices())
DEVICES = [("cpu", torch.float32)]
if HAS_CUDA:
    DEVICES += [("cuda", torch.bfloat16), ("cuda", torch.float16)]

each_device = pytest.mark.parametrize("device,dtype", DEVICES, ids=str)


def normal(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    rng = np.random.default_rng([seed, *shape])
    values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return values.to(device=device, dtype=dtype)


def ids(values: Any, device: str = "cpu", dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def double(t: Tensor) -> Tensor:
    return t.detach().cpu().double()


def assert_close(got: Tensor, want: Tensor, naive: Tensor, size: Tensor | None = None) -> None:
    """want: float64; naive: what torch gets in float32. size: of what is added up."""
    assert got.shape == want.shape and not torch.isnan(got).any()
    dtype = str(got.dtype).removeprefix("torch.")
    bound = 2 * (naive.cpu().to(got.dtype).double() - want).abs().max()
    bound = bound + 2 * torch.from_numpy(ref.ulp(want.numpy(), dtype))
    bound = bound + 20 * ref.EPS * (want.abs().max() if size is None else size)
    off = (double(got) - want).abs()
    assert (off <= bound).all(), f"off by {off.max():.3g}, {(off - bound).max():.3g} too much"


# -- Numbers --------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("n", [7, 64, 100, 1024])
def test_norms(device: str, dtype: torch.dtype, n: int) -> None:
    x = normal(9, n, device=device, dtype=dtype)
    w, b = (normal(n, device=device, dtype=dtype, seed=s) for s in (1, 2))
    want = F.rms_norm(double(x), (n,), double(w), 1e-6)
    assert_close(ops.rms_norm(x, w), want, F.rms_norm(x.float(), (n,), w.float(), 1e-6))
    for bias in (b, None):
        parameters = (double(w), None if bias is None else double(bias))
        naive = F.layer_norm(x.float(), (n,), w.float(), None if bias is None else bias.float())
        assert_close(ops.layer_norm(x, w, bias), F.layer_norm(double(x), (n,), *parameters), naive)

    residual = normal(9, n, device=device, dtype=dtype, seed=3)
    total = (residual.float() + x.float()).to(dtype)
    out = ops.add_rms_norm_(x, residual, w, 1e-5)
    assert torch.equal(residual, total)
    want = F.rms_norm(double(total), (n,), double(w), 1e-5)
    assert_close(out, want, F.rms_norm(total.float(), (n,), w.float(), 1e-5))


@each_device
def test_rows_may_be_far_apart(device: str, dtype: torch.dtype) -> None:
    wide = normal(6, 300, device=device, dtype=dtype)
    x, w = wide[:, 8:108], normal(100, device=device, dtype=torch.float32)
    assert torch.equal(ops.rms_norm(x, w), ops.rms_norm(x.contiguous(), w))
    m = normal(40, 100, device=device, dtype=dtype, seed=1)
    assert torch.equal(ops.linear(x, m), ops.linear(x.contiguous(), m))
    residual, other = wide[:, 200:], wide[:, 200:].clone()
    a, b = ops.add_rms_norm_(x, residual, w), ops.add_rms_norm_(x, other, w)
    assert torch.equal(a, b) and torch.equal(residual, other)


@pytest.mark.skipif(not HAS_CUDA, reason="no card")
@pytest.mark.parametrize("n", [64, 4096])
def test_cuda_linear_of_a_weight_that_was_just_written(n: int) -> None:
    """The kernel for few rows fetches weights early; a guest's may not be there yet."""
    dtype = torch.bfloat16
    x, g = normal(4, 1024, device="cuda", dtype=dtype), torch.ones(1024, device="cuda")
    sources = [normal(n, 1024, device="cuda", dtype=dtype, seed=s) for s in (1, 2)]
    weights = [ops.rms_norm(source, g) for source in sources]
    torch.cuda.synchronize()
    want = [ops.linear(x, w) for w in weights]
    torch.cuda.synchronize()
    for i in range(40):  # each weight takes the memory of the other one
        got = ops.linear(x, ops.rms_norm(sources[i % 2], g))
        assert torch.equal(got, want[i % 2])


@each_device
@pytest.mark.parametrize(
    "m,n,k", [(1, 64, 64), (3, 33, 70), (17, 128, 256), (100, 65, 128), (70, 40, 33)]
)
def test_linear(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = normal(m, k, device=device, dtype=dtype), normal(n, k, device=device, dtype=dtype)
    b = normal(n, device=device, dtype=dtype, seed=1)
    size = F.linear(double(x).abs(), double(w).abs(), double(b).abs())
    for bias in (None, b):
        y = None if bias is None else bias.float()
        want = F.linear(double(x), double(w), None if bias is None else double(bias))
        got = ops.linear(x, w, bias)
        assert got.is_contiguous()
        assert_close(
            got,
            want,
            F.linear(x.float().cpu(), w.float().cpu(), None if y is None else y.cpu()),
            size,
        )
    alone = torch.cat([ops.linear(x[i : i + 1], w, b) for i in range(m)])
    assert torch.equal(alone, ops.linear(x, w, b)), "a row depends on its neighbours"


@each_device
def test_embedding_and_gather_rows(device: str, dtype: torch.dtype) -> None:
    for n in (64, 100):
        table = normal(50, n, device=device, dtype=dtype)
        at = ids([0, 49, 7, 7], device)
        assert torch.equal(ops.embedding(at, table), table[at.long()])
        want = double(table[at.long()]) * 3.5
        assert_close(ops.embedding(at, table, 3.5), want, want.float())
        assert torch.equal(ops.gather_rows(table, at), table[at.long()])


@each_device
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_activation(device: str, dtype: torch.dtype, kind: str, gated: bool) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
    }
    f, x = functions[kind], normal(11, 130, device=device, dtype=dtype) * 3

    def apply(t: Tensor) -> Tensor:
        return f(t[:, :65]) * t[:, 65:] if gated else f(t)

    got = ops.activation(x, kind, gated)
    assert_close(got, apply(double(x)), apply(x.float()))
    shorthand = {"silu": ops.silu_and_mul, "gelu": ops.gelu_and_mul}
    shorthand["gelu_tanh"] = ops.gelu_tanh_and_mul
    if gated and kind in shorthand:
        assert torch.equal(shorthand[kind](x), got)


# -- The cache ------------------------------------------------------------------------------------


def cache_dtypes(device: str, dtype: torch.dtype) -> list[torch.dtype]:
    if device == "cpu":
        return [torch.float32, torch.bfloat16, torch.float16]
    return [dtype, torch.float8_e4m3fn]


class Sequences:
    """Sequences of random rows in a paged cache, written by rope_kv_write_ without rotation."""

    def __init__(
        self, device: str, dtype: torch.dtype, cache: torch.dtype, heads: int, kv_heads: int, d: int
    ) -> None:
        self.shape, self.lengths, bs = (heads, kv_heads, d), [70, 1, 300], 16
        self.scales = (0.5, 2.0) if cache == torch.float8_e4m3fn else (1.0, 1.0)
        self.qkv = [
            normal(n, (heads + 2 * kv_heads) * d, device=device, dtype=dtype, seed=n)
            for n in self.lengths
        ]
        blocks = np.random.default_rng(5).permutation(60).astype(np.int32)
        self.tables = torch.from_numpy(blocks.reshape(3, 20))
        self.tables = self.tables.to(device)
        self.k, self.v = ops.new_kv_cache(60, kv_heads, bs, d, cache, device)
        for table, rows in zip(self.tables.cpu(), self.qkv, strict=True):
            at = torch.arange(len(rows))
            slots = table[at // bs].long() * bs + at % bs
            ops.rope_kv_write_(
                rows.clone(), at.int().to(device), slots.to(device), self.k, self.v,
                k_scale=self.scales[0], v_scale=self.scales[1],
            )  # fmt: skip
        self.stored = [self._stored(rows, cache) for rows in self.qkv]

    def _stored(self, rows: Tensor, cache: torch.dtype) -> tuple[Tensor, Tensor]:
        heads, kv_heads, d = self.shape
        kv = rows[:, heads * d :].float().cpu().reshape(len(rows), 2, kv_heads, d)
        k, v = (
            (kv[:, i] / s).to(cache).float() * s for i, s in zip((0, 1), self.scales, strict=True)
        )
        return k, v

    def attend(self, items: list[tuple[int, int, int]], **options: Any) -> list[Tensor]:
        """items: (sequence, first row, rows)."""
        heads, kv_heads, d = self.shape
        rows = torch.cat([self.qkv[s][first : first + n] for s, first, n in items])
        q = rows.view(len(rows), heads + 2 * kv_heads, d)[:, :heads]  # a view
        out = ops.paged_attention(
            q, self.k, self.v, self.tables[[s for s, _, _ in items]],
            ids([first + n for _, first, n in items]),
            ids(np.cumsum([0] + [n for _, _, n in items])), d**-0.5,
            k_scale=self.scales[0], v_scale=self.scales[1], **options,
        )  # fmt: skip
        return list(out.split([n for _, _, n in items]))

    def check(self, items: list[tuple[int, int, int]], window: int = 0, softcap: float = 0) -> None:
        heads, kv_heads, d = self.shape
        for got, (s, first, n) in zip(
            self.attend(items, window=window, softcap=softcap), items, strict=True
        ):
            q = self.qkv[s][first : first + n, : heads * d].reshape(n, heads, d).float().cpu()
            k, v = (t[: first + n] for t in self.stored[s])
            args = (first, d**-0.5, window, softcap)
            want, size = ref.attention(q.numpy(), k.numpy(), v.numpy(), *args)
            dtype = str(got.dtype).removeprefix("torch.")
            narrow = ref.ulp(np.ones(1), dtype)[0] / 2 / (20 * ref.EPS)
            size = ref.attention(q.numpy(), k.numpy(), v.numpy(), *args, narrow)[1]
            wanted = torch.from_numpy(want)
            assert_close(got, wanted, wanted.float(), torch.from_numpy(size))


@each_device
@pytest.mark.parametrize("heads,kv_heads,d", [(4, 2, 64), (3, 3, 96), (7, 1, 128), (2, 1, 256)])
def test_paged_attention(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, d: int
) -> None:
    for cache in cache_dtypes(device, dtype):
        sequences = Sequences(device, dtype, cache, heads, kv_heads, d)
        sequences.check([(0, 69, 1), (1, 0, 1), (2, 299, 1)])
        sequences.check([(2, 10, 290), (0, 69, 1), (1, 0, 1)])
        sequences.check([(0, 0, 70), (2, 299, 1)], window=33)
        if device == "cuda":
            sequences.check([(0, 0, 70), (2, 299, 1)], softcap=7.0)
        whole = sequences.attend([(0, 0, 70)])[0]
        for r in (0, 1, 15, 16, 63, 64, 69):
            beside = sequences.attend([(2, 299, 1), (0, r, 1)])[1]
            assert torch.equal(beside, whole[r : r + 1]), f"row {r} depends on its neighbours"


@each_device
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("d,rotary", [(64, 64), (128, 48), (96, 0)])
def test_rope_kv_write(device: str, dtype: torch.dtype, d: int, rotary: int, norm: bool) -> None:
    heads, kv_heads, tokens = 3, 1, 20
    for cache in cache_dtypes(device, dtype):
        scales = (0.5, 2.0) if cache == torch.float8_e4m3fn else (1.0, 1.0)
        k_cache, v_cache = ops.new_kv_cache(4, kv_heads, 16, d, cache, device)
        qkv = normal(tokens, (heads + 2 * kv_heads) * d, device=device, dtype=dtype)
        given = qkv.clone().float().cpu().numpy().reshape(tokens, -1, d)
        at = np.random.default_rng(1).integers(0, 50, tokens)
        slots = ids(np.random.default_rng(2).permutation(64)[:tokens], device, torch.int64)
        slots[3] = -1
        written = slots.cpu() >= 0
        cos, sin = (
            (normal(50, rotary // 2, device=device, dtype=torch.float32, seed=s) for s in (1, 2))
            if rotary
            else (None, None)
        )
        qw, kw = (
            (normal(d, device=device, dtype=torch.float32, seed=s) for s in (3, 4))
            if norm
            else (None, None)
        )
        args = (ids(at, device), slots, k_cache, v_cache, cos, sin, qw, kw, 1e-6, *scales)
        ops.rope_kv_write_(qkv, *args)
        got = qkv[:, : heads * d].reshape(tokens, heads, d)
        for name, part, weight in (("q", given[:, :heads], qw), ("k", given[:, heads:-1], kw)):
            value, size = part.astype(np.float64), np.abs(part)
            if weight is not None:
                value, size = ref.norm(part, weight.cpu().numpy(), None, "rms", 1e-6)
            if cos is not None and sin is not None:
                value, size = ref.rotate(value, cos.cpu().numpy()[at], sin.cpu().numpy()[at])
            want = torch.from_numpy(value)
            sizes = torch.from_numpy(size)
            if name == "q":
                assert_close(got, want, want.float(), sizes)
                continue
            wanted = torch.zeros(64, kv_heads, d, dtype=torch.float64)
            wanted[slots.cpu()[written]] = want[written]
            off = (in_slots(plain_keys(k_cache)) * scales[0] - wanted).abs()
            dtype_name = str(cache).removeprefix("torch.").replace("float8_e4m3fn", "fp8_e4m3")
            unit = ref.half_ulp(wanted.numpy() / scales[0], dtype_name)
            bound = torch.from_numpy(unit) * scales[0] + 30 * ref.EPS * sizes.max()
            assert (off <= bound).all() and (off[wanted == 0] == 0).all()
        wanted = torch.zeros(64, kv_heads, d)
        values = torch.from_numpy(given[:, heads + kv_heads :])
        wanted[slots.cpu()[written]] = (values / scales[1]).to(cache).float()[written]
        assert torch.equal(in_slots(v_cache), wanted.double())


def plain_keys(k: Tensor) -> Tensor:
    """K as rows: on a CPU it lies in tiles of 16 slots, transposed."""
    if k.is_cuda:
        return k
    blocks, heads, block_size, d = k.shape
    return k.view(blocks, heads, block_size // 16, d, 16).transpose(-1, -2).reshape(k.shape)


def in_slots(cache: Tensor) -> Tensor:
    """[slots, heads, head_dim]"""
    return cache.cpu().double().transpose(1, 2).flatten(0, 1)


@each_device
def test_copy_blocks(device: str, dtype: torch.dtype) -> None:
    for cache in cache_dtypes(device, dtype):
        k, v = ops.new_kv_cache(6, 2, 16, 64, cache, device)
        for t, seed in ((k, 1), (v, 2)):
            t.copy_(normal(6, 2, 16, 64, device=device, dtype=torch.float32, seed=seed))
        want_k, want_v = k.clone(), v.clone()
        for want in (want_k, want_v):
            want[3], want[5] = want[0].clone(), want[1].clone()
        ops.copy_blocks_(k, v, ids([[0, 3], [1, 5]]))
        ops.copy_blocks_(k, v, ids(np.zeros((0, 2))))
        assert torch.equal(k.float(), want_k.float()) and torch.equal(v.float(), want_v.float())


# -- Sampling -------------------------------------------------------------------------------------


def sampling(rows: int) -> tuple[Tensor, ...]:
    """Parameters of the rows: each kind in turn."""
    i = np.arange(rows)
    return (
        torch.from_numpy(np.where(i % 5 == 0, 0.0, 0.6 + i % 3).astype(np.float32)),
        torch.from_numpy(np.where(i % 4 == 1, 20, 0).astype(np.int32)),
        torch.from_numpy(np.where(i % 4 == 2, 0.8, 1.0).astype(np.float32)),
        torch.from_numpy(np.where(i % 4 == 3, 0.1, 0.0).astype(np.float32)),
        torch.from_numpy(i * 7919 - 3),
        torch.from_numpy(i.astype(np.int32)),
    )


@pytest.mark.parametrize("device", sorted({d for d, _ in DEVICES}))
def test_sample(device: str) -> None:
    rows, vocab = 200, 500
    logits = normal(rows, vocab, device=device, dtype=torch.float32) * 3
    before, parameters = logits.clone(), sampling(rows)
    got = ops.sample(logits, *parameters)
    assert torch.equal(logits, before) and got.dtype == torch.int32 and got.device == logits.device
    unclear = 0
    for i in range(rows):
        t, top_k, top_p, min_p, seed, position = (p[i].item() for p in parameters)
        row = dict(temperature=t, top_k=top_k, top_p=top_p, min_p=min_p)
        p = ref.probabilities(logits[i].cpu().numpy(), row)
        right = ref.drawn(p, (seed % 2**64, 0, position), 1e-4)
        unclear += len(right) > 1
        assert int(got[i]) in right
    assert unclear < rows / 5, "the comparison proves nothing"
    alone = torch.cat(
        [ops.sample(logits[i : i + 1], *(p[i : i + 1] for p in parameters)) for i in range(rows)]
    )
    assert torch.equal(alone, got)
    nothing = ops.sample(logits[:0], *(p[:0] for p in parameters))
    assert nothing.shape == (0,)


# -- torch.compile and torch's own checks ---------------------------------------------------------


def examples(device: str, dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A call of each operator with all its arguments; fresh tensors each time."""
    x, r = (normal(5, 64, device=device, dtype=dtype, seed=s) for s in (1, 2))
    w, table = (normal(n, 64, device=device, dtype=dtype, seed=n) for n in (48, 30))
    p = normal(64, device=device, dtype=torch.float32)
    b = normal(48, device=device, dtype=torch.float32)
    k, v = ops.new_kv_cache(4, 1, 16, 64, dtype, device)
    slots, positions = ids([0, 1, 2, 17, -1], device, torch.int64), ids([0, 1, 2, 3, 4], device)
    cos, sin = (normal(9, 32, device=device, dtype=torch.float32, seed=s) for s in (5, 6))
    qkv = normal(5, 4 * 64, device=device, dtype=dtype)
    q = normal(5, 2, 64, device=device, dtype=dtype)
    tables, contexts, starts = ids([[0, 1], [2, 0]], device), ids([4, 3]), ids([0, 3, 5])
    logits = normal(5, 90, device=device, dtype=torch.float32)
    space = torch.ops.nano_inference
    return {
        "rms_norm": (space.rms_norm, (x, p, 1e-6)),
        "layer_norm": (space.layer_norm, (x, p, p, 1e-6)),
        "add_rms_norm_": (space.add_rms_norm_, (x, r, p, 1e-6)),
        "linear": (space.linear, (x, w, b)),
        "embedding": (space.embedding, (ids([3, 0, 29], device), table, 2.0)),
        "activation": (space.activation, (x, "silu", True)),
        "gather_rows": (space.gather_rows, (x, ids([4, 0], device))),
        "rope_kv_write_": (
            space.rope_kv_write_,
            (qkv, positions, slots, k, v, cos, sin, p, p, 1e-6, 1.0, 1.0),
        ),
        "paged_attention": (
            space.paged_attention,
            (q, k, v, tables, contexts, starts, 0.125, 0, 0.0, 1.0, 1.0),
        ),
        "copy_blocks_": (space.copy_blocks_, (k, v, ids([[0, 3]]))),
        "sample": (space.sample, (logits, *sampling(5))),
    }


NAMES = list(examples("cpu", torch.float32))


def test_every_operator_has_an_example() -> None:
    known = {n.rsplit("::")[-1] for n in torch._C._dispatch_get_all_op_names() if "nano_inf" in n}
    assert {n.split(".")[0] for n in known} == set(NAMES)


@each_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(device: str, dtype: torch.dtype, name: str, backend: str) -> None:
    torch._dynamo.reset()
    operator, args = examples(device, dtype)[name]
    other = examples(device, dtype)[name][1]

    def model(*args: Any) -> Any:
        first = args[0] + 0 if name in ("rms_norm", "linear") else args[0]
        return operator(first, *args[1:])

    want = model(*args)
    got = torch.compile(model, fullgraph=True, backend=backend)(*other)
    assert (want is None) == (got is None)
    if want is not None:
        assert torch.equal(got, want)
    for a, b in zip(args, other, strict=True):  # those that changed in place included
        if isinstance(a, Tensor):
            assert torch.equal(a, b)


@each_device
@pytest.mark.parametrize("name", NAMES)
def test_torch_finds_nothing_wrong(device: str, dtype: torch.dtype, name: str) -> None:
    operator, args = examples(device, dtype)[name]
    torch.library.opcheck(operator, args)


@each_device
def test_the_names_of_the_module_compile(device: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    w, m = (normal(*s, device=device, dtype=dtype) for s in ((64,), (128, 64)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(x: Tensor, residual: Tensor) -> Tensor:
        return ops.silu_and_mul(ops.linear(ops.add_rms_norm_(x, residual, w), m))

    x, r = (normal(5, 64, device=device, dtype=dtype, seed=s) for s in (1, 2))
    again = r.clone()
    want = ops.silu_and_mul(ops.linear(ops.add_rms_norm_(x, again, w), m))
    assert torch.equal(block(x, r), want) and torch.equal(r, again)


# -- Refusals -------------------------------------------------------------------------------------


def bad_calls(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    def f(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def change(name: str, **changes: Any) -> Callable[[], Any]:
        operator, args = examples(device, dtype)[name]
        names = [a.name for a in operator.default._schema.arguments]
        assert set(changes) <= set(names)
        return lambda: operator(*(changes.get(n, a) for n, a in zip(names, args, strict=True)))

    i32, i64 = torch.int32, torch.int64
    yield "rms_norm: dimensions", r"x must have the shape \[any, any\]", change("rms_norm", x=f(64))
    yield "rms_norm: type", "x must be", change("rms_norm", x=f(5, 64, dtype=torch.float64))
    yield "rms_norm: strides", "x must have contiguous", change("rms_norm", x=f(64, 64).T[:5])
    yield "rms_norm: weight", r"weight.*\[64\]", change("rms_norm", weight=f(63))
    yield "rms_norm: weight's type", "weight", change("rms_norm", weight=f(64, dtype=i32))
    yield "layer_norm: bias", "bias", change("layer_norm", bias=f(1, 64))
    yield "residual's shape", r"residual.*\[5, 64\]", change("add_rms_norm_", residual=f(4, 64))
    other = torch.float64
    yield "residual's type", "residual", change("add_rms_norm_", residual=f(5, 64, dtype=other))
    yield (
        "residual's overlap",
        "residual has overlapping",
        change("add_rms_norm_", residual=f(1, 64).expand(5, 64)),
    )
    yield "linear: weight", r"weight.*\[any, 64\]", change("linear", weight=f(48, 63))
    yield "linear: type", "weight must be", change("linear", weight=f(48, 64, dtype=i32))
    yield "linear: transposed", "weight must have contig", change("linear", weight=f(64, 48).T)
    yield "linear: bias", r"bias.*\[48\]", change("linear", bias=f(47))
    yield (
        "embedding: ids",
        "token_ids must be int32",
        change("embedding", token_ids=f(3, dtype=i64)),
    )
    yield "activation: odd", "x must have an even", change("activation", x=f(5, 63))
    yield "activation: kind", "kind 'swish'.*silu", change("activation", kind="swish")
    yield "gather: rows", "rows must be int32", change("gather_rows", rows=f(3, dtype=i64))

    rope = "rope_kv_write_"
    yield "rope: columns", "qkv", change(rope, qkv=f(5, 100))
    yield "rope: positions", r"positions.*\[5\]", change(rope, positions=f(4, dtype=i32))
    yield "rope: slots", "slot_mapping must be int64", change(rope, slot_mapping=f(5, dtype=i32))
    yield "rope: cos alone", "come together", change(rope, sin=None)
    yield "rope: cos", "cos", change(rope, cos=f(9, 33), sin=f(9, 33))
    yield "rope: sin", "sin", change(rope, sin=f(9, 30))
    yield "rope: q_norm", "q_norm", change(rope, q_norm=f(63))
    yield "rope: v_cache", "v_cache must be like k_cache", change(rope, v_cache=f(4, 1, 32, 64))
    yield "rope: scale", "k_scale", change(rope, k_scale=0.0)
    yield "rope: scale of no fp8", "v_scale.*float8", change(rope, v_scale=2.0)

    attend = "paged_attention"
    yield "attention: q", "q(:| must have the shape)", change(attend, q=f(5, 2, 63))
    yield "attention: cache", "k_cache", change(attend, k_cache=f(4, 16, 64))
    yield (
        "attention: cache's type",
        "k_cache must",
        change(attend, k_cache=f(4, 1, 16, 64, dtype=other)),
    )
    yield "attention: tables", "block_tables", change(attend, block_tables=f(2, 2, dtype=i64))
    yield "attention: lengths", r"context_lens.*\[2\]", change(attend, context_lens=ids([4]))
    yield "attention: starts", "cu_seqlens_q", change(attend, cu_seqlens_q=ids([0, 3, 4]))
    yield "attention: falling", "cu_seqlens_q", change(attend, cu_seqlens_q=ids([0, 9, 5]))
    yield "attention: too long", "context_lens.*33", change(attend, context_lens=ids([33, 3]))
    yield "attention: too short", "context_lens", change(attend, context_lens=ids([2, 3]))
    yield "attention: scale", "scale must", change(attend, scale=0.0)
    yield "attention: window", "window", change(attend, window=-1)
    yield "attention: softcap", "softcap", change(attend, softcap=-1.0)

    copy = "copy_blocks_"
    yield "copy: pairs", "pairs must have", change(copy, pairs=ids([0, 1]))
    yield "copy: block", r"pairs: \(0, 4\)", change(copy, pairs=ids([[0, 4]]))
    yield "sample: logits", "logits must be float32", change("sample", logits=f(5, 90, dtype=other))
    yield "sample: rows", r"top_k.*\[5\]", change("sample", top_k=ids([1]))
    yield "sample: type", "seeds must be int64", change("sample", seeds=ids([1, 2, 3, 4, 5]))

    new = ops.new_kv_cache
    yield "cache: empty", "empty", lambda: new(0, 1, 16, 64, dtype, device)
    yield "cache: block_size", "block_size.*12", lambda: new(1, 1, 12, 64, dtype, device)
    yield "cache: dtype", "k_cache|dtype", lambda: new(1, 1, 16, 64, other, device)
    if device == "cuda":
        yield "cache: head_dim", "head_dim 80.*96", lambda: new(1, 1, 16, 80, dtype, device)
        yield "another device", "weight.*cuda", change("rms_norm", weight=torch.ones(64))
        yield "lengths there", "context_lens.*cpu", change(attend, context_lens=ids([4, 3], "cuda"))
        odd = f(5, 2 * 64 + 4)[:, 4:].unflatten(1, (2, 64))
        yield "attention: alignment", "q: rows must start", change(attend, q=odd)


@pytest.mark.parametrize(
    "message,call",
    [
        pytest.param(message, call, id=f"{device}, {dtype}, {name}")
        for device, dtype in DEVICES
        for name, message, call in bad_calls(device, dtype)
    ],
)
def test_bad_arguments_are_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_unsupported_device_is_named() -> None:
    with pytest.raises(ValueError, match="x must be on a CPU or a CUDA card"):
        ops._norm(torch.ones(2, 4, device="meta"), None, torch.ones(4), None, "rms", 1e-6)


# -- The caller's stream --------------------------------------------------------------------------

if HAS_CUDA:

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_callers_stream_is_used(dtype: torch.dtype) -> None:
        """What the caller's stream does before and after, the operator sees and waits for; what
        another stream does it does not wait for."""
        x, w = torch.zeros(64, 4096, device="cuda", dtype=dtype), torch.ones(4096, device="cuda")
        m = normal(256, 4096, device="cuda", dtype=dtype)
        good = normal(64, 4096, device="cuda", dtype=dtype)
        want = ops.linear(ops.rms_norm(good, w), m)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            x.copy_(good)
            got = ops.linear(ops.rms_norm(x, w), m)
        assert not stream.query(), "an operator waited for the card"
        stream.synchronize()
        assert torch.equal(got, want)

        blocker = torch.cuda.Stream()
        with torch.cuda.stream(blocker):
            torch.cuda._sleep(2_000_000_000)
        with torch.cuda.stream(stream):
            again = ops.linear(ops.rms_norm(good, w), m)
        stream.synchronize()
        assert not blocker.query(), "an operator ran on, or waited for, another stream"
        assert torch.equal(again, want)
        torch.cuda.synchronize()

    def test_streams_in_turns() -> None:
        """Attention's work lists and working memory survive a change of streams."""
        sequences = Sequences("cuda", torch.bfloat16, torch.bfloat16, 4, 2, 64)
        items = [(0, 69, 1), (1, 0, 1), (2, 299, 1)]
        want = sequences.attend(items)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        results = []
        for i in range(60):
            with torch.cuda.stream(streams[i % 3]):
                results.append(sequences.attend(items))
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))

    def test_memory_is_used_where_it_lies() -> None:
        """No copies of what is large: a weight and a cache."""
        w = torch.zeros(8192, 8192, device="cuda", dtype=torch.bfloat16)
        x = normal(4, 8192, device="cuda", dtype=torch.bfloat16)
        ops.linear(x, w)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.linear(x, w)
        assert torch.cuda.max_memory_allocated() - before < w.nbytes / 16
