"""What the kernels must compute, in float64 numpy and written as the mathematics reads: the other
side of test_ops.py and test_sampling.py. Nothing here knows of tiles, panels, blocks or threads.
And the devices that both run on, with what each can take."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nano_inference import _core

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

EPS = float(np.finfo(np.float32).eps)
DTYPES = ("float32", "bfloat16", "float16")

# -- 16-bit floats --------------------------------------------------------------------------------


def to_bits(x: Array, dtype: str) -> Array:
    """The values as a backend takes them: float32, or 16-bit numbers as uint16; ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return x
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    high = x.view(np.uint32).astype(np.uint64)
    rounded = ((high + 0x7FFF + ((high >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bits(bits: Array, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "float32":
        return bits.astype(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Array, dtype: str) -> npt.NDArray[np.float32]:
    if dtype != "fp8_e4m3":
        return from_bits(to_bits(x, dtype), dtype)
    size = np.minimum(np.abs(x.astype(np.float64)), 1e30)  # infinities saturate as well
    step = 2.0 ** (np.maximum(np.frexp(size)[1] - 1, -6) - 3)
    return np.copysign(np.minimum(np.round(size / step) * step, 448), x).astype(np.float32)


def ulp(x: Array, dtype: str) -> Doubles:
    """Distance between neighbouring 16-bit or 8-bit numbers around x; 0 for float32, whose rounding
    the bounds of arithmetic include."""
    if dtype == "float32":
        return np.zeros(x.shape)
    bits, lowest = {"bfloat16": (7, -126), "float16": (10, -14), "fp8_e4m3": (3, -6)}[dtype]
    return 2.0 ** (np.maximum(np.frexp(x.astype(np.float64))[1] - 1, lowest) - bits)


def half_ulp(x: Array, dtype: str) -> Doubles:
    """Largest rounding error of a value near x."""
    size = np.abs(x.astype(np.float64))
    if dtype == "fp8_e4m3":
        return size * 2.0**-4 + 2.0**-10
    if dtype == "float16":
        return size * 2.0**-11 + 2.0**-25
    return size * (2.0**-8 if dtype == "bfloat16" else 2.0**-24)


# -- Devices --------------------------------------------------------------------------------------

ISAS = _core.cpu_isas()
CUDA = ("cuda_bf16", "cuda_f16") if _core.cuda_devices() else ()
# The instruction sets; the copies that a card needs, over a CPU; a card with both activation types.
DEVICES = (*ISAS, "staged_cpu", *CUDA)


@functools.cache
def ops_for(device: str, threads: int = 2) -> _core.Ops:
    if device in CUDA:
        return _core.Ops("cuda", activation_dtype=activation_dtype(device))
    if device == "staged_cpu":
        return _core.Ops("staged_cpu", "portable", threads)
    return _core.Ops(isa=device, num_threads=threads)


def activation_dtype(device: str) -> str:
    return {"cuda_bf16": "bfloat16", "cuda_f16": "float16"}.get(device, "float32")


def weight_dtypes(device: str) -> tuple[str, ...]:
    return (activation_dtype(device),) if device in CUDA else DTYPES


def cache_dtypes(device: str) -> tuple[str, ...]:
    return (activation_dtype(device), "fp8_e4m3") if device in CUDA else DTYPES


def cache_dtype(device: str, dtype: str) -> str:
    """The one that is asked for or, on a card, that of the activations."""
    return activation_dtype(device) if device in CUDA else dtype


def supported(device: str, *, head_dim: int = 64, block_size: int = 16) -> bool:
    """A card's kernels know four sizes of heads, and blocks of a multiple of 16 tokens."""
    return device not in CUDA or (head_dim in (64, 96, 128, 256) and block_size % 16 == 0)


# -- Operators ------------------------------------------------------------------------------------


def linear(x: Array, w: Array, bias: Array | None = None) -> tuple[Doubles, Doubles]:
    """x W^T + bias and, for the error bound, the same sum of absolute values."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    value, size = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        value, size = value + bias, size + np.abs(bias)
    return value, size


def norm(
    x: Array, weight: Array, bias: Array | None, kind: str, eps: float
) -> tuple[Doubles, Doubles]:
    """The normalised rows and the size of what was added up to get them."""
    x = x.astype(np.float64)
    mean = x.mean(-1, keepdims=True) if kind == "layer" else np.zeros_like(x[..., :1])
    factor = 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    spread = np.abs(x).mean(-1, keepdims=True) if kind == "layer" else 0.0
    value, size = (x - mean) * factor * weight, (np.abs(x) + spread) * factor * np.abs(weight)
    if bias is not None:
        value, size = value + bias, size + np.abs(bias)
    return value, size


def rotate(x: Array, cos: Array, sin: Array) -> tuple[Doubles, Doubles]:
    """x [T, heads, head_dim], cos and sin [T, half]: pairs (i, i + half); the rest stays."""
    x, half = x.astype(np.float64), cos.shape[-1]
    cos, sin = cos[:, None, :].astype(np.float64), sin[:, None, :].astype(np.float64)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    value = np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
    size = np.concatenate(
        [
            np.abs(a * cos) + np.abs(b * sin),
            np.abs(b * cos) + np.abs(a * sin),
            np.abs(rest),
        ],
        -1,
    )
    return value, size


def attention(
    q: Array,
    k: Array,
    v: Array,
    first_position: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    narrow: float = 0.0,
) -> tuple[Doubles, Doubles]:
    """One sequence: q [rows, heads, d] from first_position on, k and v [context, kv_heads, d].
    Also the size of the output times the size of the scores: how errors of both add up; `narrow` is
    the error of a probability, as a multiple of that of fp32."""
    q, k, v = q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = scale * np.einsum("rhd,chd->hrc", q, k)
    sizes = scale * np.einsum("rhd,chd->hrc", np.abs(q), np.abs(k))
    if softcap > 0:
        scores, sizes = softcap * np.tanh(scores / softcap), sizes + softcap
    row, col = np.arange(q.shape[0])[:, None] + first_position, np.arange(k.shape[0])[None, :]
    seen = (col <= row) & ((col > row - window) if window > 0 else True)
    visible = np.where(seen, scores, -np.inf)
    p = np.exp(visible - visible.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    reach = 1 + narrow + np.where(seen, sizes, 0).max(-1)  # [heads, rows]
    value = np.einsum("hrc,chd->rhd", p, v)
    size = np.einsum("hrc,chd->rhd", p, np.abs(v)) * reach.T[:, :, None]
    return value, size


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def activation(x: Array, name: str) -> tuple[Doubles, Doubles]:
    """The value and its size for the error bound: e^y is known as well as y is. Far in the tail,
    where the value is next to nothing beside x, only that is asked for."""
    x = x.astype(np.float64)
    if name == "relu":
        return np.where(np.isnan(x), x, np.maximum(x, 0)), np.zeros_like(x)
    with np.errstate(over="ignore"):
        if name == "silu":
            value, y = x / (1 + np.exp(-x)), x
        elif name == "gelu_tanh":
            y = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
            value = x / (1 + np.exp(-y))  # (1 + tanh(y / 2)) / 2, without cancellation
        else:
            value, y = 0.5 * x * _erfc(-x / np.sqrt(2)), x**2 / 2
    return value, np.abs(value) * (1 + np.minimum(np.abs(y), 1e3)) + 1e-10 * np.abs(x)


# -- Sampling -------------------------------------------------------------------------------------


def philox4x32(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    mask = 0xFFFFFFFF
    c, k = list(counter), [key & mask, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def uniform(seed: int, choice: int, position: int) -> float:
    """Where the unit of 16 tokens is drawn, in [0, 1): 53 bits of the first two words."""
    word = philox4x32(seed, (position, choice, 0, 0))
    return float((word[0] << 32 | word[1]) >> 11) * 2.0**-53


def rounds(seed: int, choice: int, position: int) -> dict[int, float]:
    """By bit of a token's id, 24 bits of a word, the last one set: in the unit's tournament those
    meet first that differ in bit 3, then in bit 0, 1 and 2; the side whose bit is 0 wins if the
    number is less than its share."""
    words = philox4x32(seed, (position, choice, 1, 0))
    return {bit: (word >> 8 | 1) * 2.0**-24 for bit, word in zip((3, 0, 1, 2), words, strict=True)}


def drawn(p: Doubles, key: tuple[int, int, int], near: float) -> set[int]:
    """The tokens that a draw of (seed, choice, position) may be: one, except where a number lies
    within `near` of a boundary, so that rounding decides."""
    u, draws = uniform(*key), rounds(*key)
    padded = np.zeros(-(-len(p) // 16) * 16)
    padded[: len(p)] = p / p.sum()
    units = padded.reshape(-1, 16)
    after = np.cumsum(units.sum(axis=1))
    before = after - units.sum(axis=1)
    found: set[int] = set()
    for unit in np.flatnonzero((before < after) & (before - near <= u) & (u < after + near)):
        left = [np.arange(16)]  # those who may be the winner, told from the last round back
        for bit in (2, 1, 0, 3):
            split = []
            for ids in left:
                low, high = ids[ids >> bit & 1 == 0], ids[ids >> bit & 1 == 1]
                share = units[unit, low].sum() / units[unit, ids].sum()
                split += [low] if share > 0 and draws[bit] < share + near else []
                split += [high] if share < 1 and draws[bit] >= share - near else []
            left = split
        found |= {int(unit) * 16 + int(ids[0]) for ids in left}
    return found


def log_softmax(logits: Array) -> Doubles:
    x = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    top = x.max()
    return x - top - np.log(np.exp(x - top).sum())


def processed_logits(logits: Array, row: dict[str, Any]) -> Doubles:
    """bias -> mask -> penalties -> temperature (0: none)."""
    x = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    for token, bias in row.get("bias", {}).items():
        x[token] += bias
    if "mask" in row:
        x[~np.asarray(row["mask"], bool)] = -np.inf
    for token, count in row.get("counts", {}).items():
        penalty = row.get("repetition_penalty", 1.0)
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        x[token] -= row.get("frequency_penalty", 0.0) * count
        x[token] -= row.get("presence_penalty", 0.0) * (count > 0)
    return x / (row.get("temperature", 1.0) or 1.0)


def probabilities(logits: Array, row: dict[str, Any]) -> Doubles:
    """What a token is drawn from: after top-k, then top-p, then min-p; ties go to the lower id."""
    x = processed_logits(logits, row)
    order = np.lexsort((np.arange(len(x)), -x))  # most likely first
    if row.get("temperature", 1.0) == 0:
        order = order[:1]
    elif row.get("top_k", 0) > 0:
        order = order[: row["top_k"]]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    before = np.cumsum(p) - p
    keep = (before < row.get("top_p", 1.0)) & (p >= row.get("min_p", 0.0) * p[0])
    keep[0] = True
    out = np.zeros(len(x))
    out[order[keep]] = p[keep] / p[keep].sum()
    return out


def rank_range(logits: Array, token: int) -> tuple[int, int]:
    """Ranks that a token may have; several where others are equally likely."""
    x = np.where(np.isnan(logits), -np.inf, logits)
    above = int((x > x[token]).sum())
    return above + 1, above + int((x == x[token]).sum())
