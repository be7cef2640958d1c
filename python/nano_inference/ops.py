"""The engine's operators on torch tensors: guests in anybody's model.

    from nano_inference import ops
    y = ops.rms_norm(x, weight)

On a card they take bfloat16 and float16 tensors where they lie and run on the caller's current
stream; on a CPU float32 ones, computed by the CPU backend. Each is a `torch.library` operator
`torch.ops.nano_inference.<name>`, so torch.compile keeps it as one node. They are for inference:
there are no gradients. On a card, ids, slots and block tables are not checked: one that is out of
range reads or writes somewhere else. attention, copy_blocks_ and sample take some lists from host
memory and cannot be captured into a CUDA graph.

Every operator's row is the same bits whatever rows stand beside it, but for `linear` on a card with
more than 64 rows, which takes the plan that cuBLASLt proposes (an engine times and compares plans).
A name that ends in `_` changes a tensor that it is given. Wrong types, shapes, devices or strides
are a ValueError that names the argument.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nano_inference import _core

HEAD_DIMS = (64, 96, 128, 256)  # of attention on a card
_ROW = 64  # elements; a card's weights have rows that are a multiple of it
_FP8 = torch.float8_e4m3fn
_ON_CARD = (torch.bfloat16, torch.float16)  # types of activations, weights, caches
_ON_CPU = (torch.float32, torch.bfloat16, torch.float16)  # of weights and caches

# -- Checks and the way to the native side --------------------------------------------------------


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"


def _shape(t: Tensor, name: str, *sizes: int | None) -> None:
    """None: any."""
    good = t.dim() == len(sizes) and all(
        want is None or have == want for have, want in zip(t.shape, sizes, strict=True)
    )
    text = ", ".join("any" if n is None else str(n) for n in sizes)
    _check(good, f"{name} must have the shape [{text}], got {_describe(t)}")


def _typed(t: Tensor, name: str, device: torch.device, *types: torch.dtype) -> None:
    _check(device.type in ("cpu", "cuda"), f"{name} must be on a CPU or a CUDA card")
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
    _check(
        t.dtype in types and t.device == device,
        f"{name} must be {names} on {device}, got {_describe(t)}",
    )


def _activations(t: Tensor, name: str, like: Tensor | None = None) -> None:
    """A matrix of activations with dense rows."""
    if like is not None:
        _typed(t, name, like.device, like.dtype)
    else:
        _typed(t, name, t.device, *(_ON_CARD if t.is_cuda else _ON_CPU[:1]))
    _dense_rows(t, name)


def _dense_rows(t: Tensor, name: str) -> None:
    dense = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        _check(size <= 1 or stride == dense, f"{name} must have contiguous rows")
        dense *= size
    # Rows that overlap would be written twice.
    _check(t.dim() == 0 or t.shape[0] <= 1 or t.stride(0) >= dense, f"{name} has overlapping rows")


def _aligned(t: Tensor, name: str, elements: int) -> None:
    """Vector loads of a card need rows that start at multiples of so many elements."""
    bytes_ = elements * t.element_size()
    _check(
        not t.is_cuda
        or (t.data_ptr() % bytes_ == 0 and (t.shape[0] <= 1 or t.stride(0) % elements == 0)),
        f"{name}: rows must start at multiples of {bytes_} bytes on a card",
    )


def _ints(
    t: Tensor, name: str, dtype: torch.dtype, device: torch.device, *sizes: int | None
) -> None:
    _typed(t, name, device, dtype)
    _shape(t, name, *sizes)
    _check(t.is_contiguous(), f"{name} must be contiguous")


def _host(t: Tensor, name: str, dtype: torch.dtype, *sizes: int | None) -> None:
    _ints(t, name, dtype, torch.device("cpu"), *sizes)


def _float32(t: Tensor | None, name: str, like: Tensor, *sizes: int) -> Tensor | None:
    """A parameter of a few numbers; float32 on every backend."""
    if t is None:
        return None
    _check(
        t.is_floating_point() and t.device == like.device,
        f"{name} must be floating-point numbers on {like.device}, got {_describe(t)}",
    )
    _shape(t, name, *sizes)
    return t.detach().to(torch.float32).contiguous()


def _caches(
    k: Tensor, v: Tensor, like: Tensor | None = None, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """like: the activations that go with them, if there are any."""
    device = k.device if like is None else like.device
    on_card = device.type == "cuda"
    types = _ON_CPU if not on_card else (*(_ON_CARD if like is None else (like.dtype,)), _FP8)
    for name, t in (("k_cache", k), ("v_cache", v)):
        _shape(t, name, None, None, None, None)
        _typed(t, name, device, *types)
        _dense_rows(t, name)
        _aligned(t, name, 16 // t.element_size())
    _check(
        k.shape == v.shape and k.dtype == v.dtype and k.stride() == v.stride(),
        f"v_cache must be like k_cache, {_describe(k)}, got {_describe(v)}",
    )
    _check(
        not on_card or k.shape[3] in HEAD_DIMS,
        f"k_cache: head_dim {k.shape[3]} is not supported on a card; supported are "
        + ", ".join(map(str, HEAD_DIMS)),
    )
    block_size = k.shape[2]
    _check(
        block_size % 16 == 0 or (not on_card and 16 % block_size == 0),
        f"k_cache: block_size must be a multiple of 16, got {block_size}",
    )
    _check(k_scale > 0, f"k_scale must be positive, got {k_scale}")
    _check(v_scale > 0, f"v_scale must be positive, got {v_scale}")
    _check(
        k.dtype == _FP8 or k_scale == v_scale == 1.0,
        "k_scale and v_scale are for caches of float8_e4m3fn",
    )


@functools.cache
def _backend(device: str, index: int, dtype: str) -> _core.TensorOps:
    return _core.TensorOps(device, index, dtype)


# A card's memory is given back while its driver still runs.
atexit.register(_backend.cache_clear)


def _run(like: Tensor, call: Callable[[_core.TensorOps], Any]) -> None:
    """On the card of `like`, in its type (bfloat16 where that is neither), on the caller's stream
    there."""
    if not like.is_cuda:
        return call(_backend("cpu", 0, "float32"))
    dtype = "float16" if like.dtype == torch.float16 else "bfloat16"
    with torch.cuda.device(like.device):
        backend = _backend("cuda", like.device.index, dtype)
        backend.set_stream(torch.cuda.current_stream(like.device).cuda_stream)
        call(backend)


def _a(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], str]:
    return t.data_ptr(), tuple(t.shape), t.stride(), str(t.dtype).removeprefix("torch.")


def _maybe(t: Tensor | None) -> Any:
    return None if t is None else _a(t)


def _weight(t: Tensor, name: str, device: torch.device, *on_card: torch.dtype) -> Tensor:
    """With rows as the backend wants them: where they lie, or on a card, where it has one of these
    types, padded with zeros."""
    _shape(t, name, None, None)
    _typed(t, name, device, *(on_card if device.type == "cuda" else _ON_CPU))
    _check(t.numel() > 0, f"{name} must not be empty")
    t = t.detach()
    _dense_rows(t, name)
    if device.type != "cuda":
        return t
    columns = t.shape[1]
    padded = -(-columns // _ROW) * _ROW
    if t.stride(0) == padded == columns and t.data_ptr() % 16 == 0:
        return t
    wide = t.new_zeros(t.shape[0], padded)
    wide[:, :columns] = t
    return wide[:, :columns]


def _norm_weight(t: Tensor, name: str, x: Tensor) -> Tensor:
    weight = _float32(t, name, x, x.shape[1])
    assert weight is not None
    return weight


# -- Norms ----------------------------------------------------------------------------------------


@torch.library.custom_op("nano_inference::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, None, "rms", eps)


@torch.library.custom_op("nano_inference::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _norm(x, None, weight, bias, "layer", eps)


@torch.library.custom_op("nano_inference::add_rms_norm_", mutates_args=("residual",))
def _add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, residual, weight, None, "rms", eps)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    _shape(x, "x", None, None)
    _activations(x, "x")
    if residual is not None:
        _shape(residual, "residual", *x.shape)
        _activations(residual, "residual", x)
    w, b = _norm_weight(weight, "weight", x), _float32(bias, "bias", x, x.shape[1])
    out = x.new_empty(x.shape)
    _run(x, lambda o: o.norm(_a(x), _maybe(residual), _a(w), _maybe(b), kind, eps, _a(out)))
    return out


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_add_rms_norm_.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the columns (Zhang and Sennrich, "Root mean square
    layer normalization", 2019). x [rows, n]; weight [n], taken as float32."""
    return _rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the columns (Ba et al., "Layer
    normalization", 2016). x [rows, n]; weight and bias [n], taken as float32."""
    return _layer_norm(x, weight, bias, eps)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """residual += x, rounded to its type; returns rms_norm(residual, weight, eps). x and residual
    [rows, n]."""
    return _add_rms_norm_(x, residual, weight, eps)


# -- Products, tables, activations ----------------------------------------------------------------


@torch.library.custom_op("nano_inference::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _shape(x, "x", None, None)
    _activations(x, "x")
    w = _weight(weight, "weight", x.device, x.dtype)
    _check(
        w.shape[1] == x.shape[1],
        f"weight must have the shape [any, {x.shape[1]}], got {_describe(weight)}",
    )
    b = _float32(bias, "bias", x, w.shape[0])
    if not x.is_cuda:
        out = x.new_empty(x.shape[0], w.shape[0])
        _run(x, lambda o: o.linear(_a(x), _a(w), _maybe(b), _a(out)))
        return out
    if x.data_ptr() % 16 != 0 or x.stride(0) % 8 != 0 or x.shape[1] % 8 != 0:
        rows = x.new_zeros(x.shape[0], -(-x.shape[1] // 8) * 8)
        rows[:, : x.shape[1]] = x
        x = rows[:, : x.shape[1]]
    # Rows of a multiple of 16 bytes, as the products want them.
    wide = x.new_empty(x.shape[0], -(-w.shape[0] // 8) * 8)
    out = wide[:, : w.shape[0]]
    _run(x, lambda o: o.linear(_a(x), _a(w), _maybe(b), _a(out)))
    return out.contiguous()


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, summed in float32 in an order that does not depend on the number of rows.
    x [rows, n]; weight [m, n], of x's type on a card (without a copy if it is contiguous and n is a
    multiple of 64), of float32, bfloat16 or float16 on a CPU, where it is packed on every call;
    bias [m]."""
    return _linear(x, weight, bias)


@torch.library.custom_op("nano_inference::embedding", mutates_args=())
def _embedding(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    _ints(token_ids, "token_ids", torch.int32, weight.device, None)
    w = _weight(weight, "weight", weight.device, *_ON_CARD)
    dtype = w.dtype if w.is_cuda else torch.float32
    out = w.new_empty((token_ids.shape[0], w.shape[1]), dtype=dtype)
    _run(out, lambda o: o.embedding(_a(token_ids), _a(w), scale, _a(out)))
    return out


@_embedding.register_fake
def _(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    dtype = weight.dtype if weight.is_cuda else torch.float32
    return weight.new_empty((token_ids.shape[0], weight.shape[1]), dtype=dtype)


def embedding(token_ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """weight[token_ids] * scale. token_ids [rows] int32; weight [vocab, n] as for linear()."""
    return _embedding(token_ids, weight, scale)


@torch.library.custom_op("nano_inference::activation", mutates_args=())
def _activation(x: Tensor, kind: str, gated: bool) -> Tensor:
    _shape(x, "x", None, None)
    _activations(x, "x")
    _check(
        not gated or x.shape[1] % 2 == 0,
        f"x must have an even number of columns, got {_describe(x)}",
    )
    out = x.new_empty(x.shape[0], x.shape[1] // 2 if gated else x.shape[1])
    _run(x, lambda o: o.activation(_a(x), kind, gated, _a(out)))
    return out


@_activation.register_fake
def _(x: Tensor, kind: str, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2 if gated else x.shape[1])


def activation(x: Tensor, kind: str, gated: bool = False) -> Tensor:
    """kind: "silu" (x sigmoid(x)), "gelu" (x Phi(x), Hendrycks and Gimpel, 2016), "gelu_tanh" (its
    approximation) or "relu". gated: x [rows, 2 n] to act(x[:, :n]) * x[:, n:] (Shazeer, "GLU
    variants improve transformer", 2020); else x [rows, n] to act(x)."""
    return _activation(x, kind, gated)


def silu_and_mul(x: Tensor) -> Tensor:
    """activation(x, "silu", gated=True)."""
    return _activation(x, "silu", True)


def gelu_and_mul(x: Tensor) -> Tensor:
    """activation(x, "gelu", gated=True)."""
    return _activation(x, "gelu", True)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """activation(x, "gelu_tanh", gated=True)."""
    return _activation(x, "gelu_tanh", True)


@torch.library.custom_op("nano_inference::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    _shape(x, "x", None, None)
    _activations(x, "x")
    _ints(rows, "rows", torch.int32, x.device, None)
    out = x.new_empty(rows.shape[0], x.shape[1])
    _run(x, lambda o: o.gather_rows(_a(x), _a(rows), _a(out)))
    return out


@_gather_rows.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows]. x [any, n]; rows [count] int32."""
    return _gather_rows(x, rows)


# -- The cache ------------------------------------------------------------------------------------


def new_kv_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache of one layer, [num_blocks, num_kv_heads, block_size, head_dim] each,
    zeros. Token t of a sequence lies in slot t % block_size of the sequence's block
    t // block_size (Kwon et al., "Efficient memory management for large language model serving with
    PagedAttention", 2023). On a card both are plain rows, so caches may come from elsewhere (blocks
    any distance apart). On a CPU k_cache is not: within a block's head it holds K in tiles of 16
    slots, transposed; only the operators here read it.

    dtype: on a card that of the activations, or float8_e4m3fn; on a CPU float32, bfloat16 or
    float16. block_size: a multiple of 16 (on a CPU also 1, 2, 4 or 8). head_dim: on a card 64, 96,
    128 or 256."""
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    _check(min(shape) > 0, f"a cache of the shape {list(shape)} is empty")
    k = torch.zeros(shape, dtype=dtype, device=device)
    v = torch.zeros(shape, dtype=dtype, device=device)
    _caches(k, v)
    return k, v


@torch.library.custom_op(
    "nano_inference::rope_kv_write_", mutates_args=("qkv", "k_cache", "v_cache")
)
def _rope_kv_write_(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_scale: float,
    v_scale: float,
) -> None:
    _shape(qkv, "qkv", None, None)
    _activations(qkv, "qkv")
    _caches(k_cache, v_cache, qkv, k_scale, v_scale)
    _, kv_heads, _, d = k_cache.shape
    _check(
        qkv.shape[1] % d == 0 and qkv.shape[1] > 2 * kv_heads * d,
        f"qkv must have (heads + 2 * {kv_heads}) * {d} columns, got {_describe(qkv)}",
    )
    _aligned(qkv, "qkv", 2)
    _ints(positions, "positions", torch.int32, qkv.device, qkv.shape[0])
    _ints(slot_mapping, "slot_mapping", torch.int64, qkv.device, qkv.shape[0])
    _check((cos is None) == (sin is None), "cos and sin come together")
    if cos is not None and sin is not None:
        _shape(cos, "cos", None, None)
        _check(
            0 < 2 * cos.shape[1] <= d and (not qkv.is_cuda or cos.shape[1] % 2 == 0),
            f"cos must rotate an even number of dimensions (a multiple of 4 on a card) up to {d}, "
            f"got {_describe(cos)}",
        )
        shape = tuple(cos.shape)
        cos, sin = _float32(cos, "cos", qkv, *shape), _float32(sin, "sin", qkv, *shape)
        if not qkv.is_cuda and positions.numel() > 0:
            most = int(positions.max())
            _check(most < shape[0], f"positions: {most} is beyond the {shape[0]} of cos")
    qw, kw = _float32(q_norm, "q_norm", qkv, d), _float32(k_norm, "k_norm", qkv, d)
    _run(
        qkv,
        lambda o: o.rope_kv_write(
            _a(qkv), _a(positions), _a(slot_mapping), _a(k_cache), _a(v_cache),
            _maybe(cos), _maybe(sin), _maybe(qw), _maybe(kw), eps, k_scale, v_scale,
        ),
    )  # fmt: skip


@_rope_kv_write_.register_fake
def _(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_scale: float,
    v_scale: float,
) -> None:
    return None


def rope_kv_write_(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Between the qkv product and attention: normalises q and k by head (q_norm, k_norm [head_dim],
    if given), rotates them (Su et al., "RoFormer", 2021; dimension i with i + rotary_dim / 2), and
    writes k and v into the cache. q changes in place; what becomes of k in qkv is left open.

    qkv [T, (heads + 2 kv_heads) * head_dim]; positions [T] int32; slot_mapping [T] int64, block *
    block_size + slot, -1: nowhere; cos and sin [positions, rotary_dim / 2], None: no rotation.
    k_scale, v_scale: of float8_e4m3fn caches; what is stored times the scale is meant."""
    _rope_kv_write_(
        qkv, positions, slot_mapping, k_cache, v_cache, cos, sin, q_norm, k_norm, eps, k_scale,
        v_scale,
    )  # fmt: skip


@torch.library.custom_op("nano_inference::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int,
    softcap: float,
    k_scale: float,
    v_scale: float,
) -> Tensor:
    _shape(q, "q", None, None, None)
    _activations(q, "q")
    _aligned(q, "q", 8)
    _caches(k_cache, v_cache, q, k_scale, v_scale)
    _, kv_heads, _, d = k_cache.shape
    _check(
        q.shape[2] == d and q.shape[1] > 0 and q.shape[1] % kv_heads == 0,
        f"q must have the shape [any, a multiple of {kv_heads}, {d}], got {_describe(q)}",
    )
    _ints(block_tables, "block_tables", torch.int32, q.device, None, None)
    _host(context_lens, "context_lens", torch.int32, block_tables.shape[0])
    _host(cu_seqlens_q, "cu_seqlens_q", torch.int32, block_tables.shape[0] + 1)
    _check(scale > 0, f"scale must be positive, got {scale}")
    _check(window >= 0, f"window must not be negative, got {window}")
    _check(softcap >= 0, f"softcap must not be negative, got {softcap}")
    out = q.new_empty(q.shape)
    _run(
        q,
        lambda o: o.attention(
            _a(q), _a(k_cache), _a(v_cache), _a(block_tables), _a(context_lens), _a(cu_seqlens_q),
            scale, window, softcap, k_scale, v_scale, _a(out),
        ),
    )  # fmt: skip
    return out


@_paged_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int,
    softcap: float,
    k_scale: float,
    v_scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Causal softmax attention of S sequences over a paged cache (Kwon et al., 2023), tile by tile
    with running maxima (Dao et al., "FlashAttention", 2022); decodes and prompt chunks may stand
    side by side. K and V of the q rows are read from the cache as well: write them first.

    q [T, heads, head_dim], may be a view of qkv; the rows of sequence s are those from
    cu_seqlens_q[s] to cu_seqlens_q[s + 1], at the last positions of a context of context_lens[s]
    tokens. block_tables [S, width] int32. cu_seqlens_q [S + 1] and context_lens [S]: int32 on the
    CPU, wherever q is. window > 0: a query at p sees positions p - window + 1 to p. softcap > 0: a
    score s becomes softcap * tanh(s / softcap) (Gemma 2; on a card only). Returns [T, heads,
    head_dim]."""
    return _paged_attention(
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, window, softcap,
        k_scale, v_scale,
    )  # fmt: skip


@torch.library.custom_op("nano_inference::copy_blocks_", mutates_args=("k_cache", "v_cache"))
def _copy_blocks_(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    _caches(k_cache, v_cache)
    _host(pairs, "pairs", torch.int32, None, 2)
    _run(k_cache, lambda o: o.copy_blocks(_a(k_cache), _a(v_cache), _a(pairs)))


@_copy_blocks_.register_fake
def _(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    return None


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    """Block pairs[i, 1] becomes a copy of block pairs[i, 0], all at once: no block may be copied
    from and to. pairs [n, 2] int32 on the CPU."""
    _copy_blocks_(k_cache, v_cache, pairs)


# -- Sampling -------------------------------------------------------------------------------------


@torch.library.custom_op("nano_inference::sample", mutates_args=())
def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    _shape(logits, "logits", None, None)
    _typed(logits, "logits", logits.device, torch.float32)
    rows = logits.shape[0]
    _check(logits.shape[1] > 0, "logits must have columns")
    for name, t, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int32),
    ):
        _host(t, name, dtype, rows)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    scratch = logits.detach().clone(memory_format=torch.contiguous_format)
    _run(
        scratch,
        lambda o: o.sample(
            _a(scratch), _a(temperature), _a(top_k), _a(top_p), _a(min_p), _a(seeds), _a(positions),
            _a(out),
        ),
    )  # fmt: skip
    return out


@_sample.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int32)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """A token id a row, int32 [rows]: temperature (0: the most likely token), then top-k (0: off),
    top-p (1: off; Holtzman et al., "The curious case of neural text degeneration", 2020), min-p (0:
    off; Nguyen et al., 2024), then a draw by numbers that Philox (Salmon et al., 2011) gives for
    (seed, position): the same row draws the same token whatever stands beside it.

    logits [rows, vocab] float32. On the CPU, [rows] each: temperature, top_p, min_p float32, top_k
    and positions int32, seeds int64."""
    return _sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
