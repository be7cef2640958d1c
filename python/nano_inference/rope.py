"""Rotary position embedding tables from a Hugging Face config.

Every scaling rule ends as one list of inverse frequencies and one factor on cos and sin; the engine
knows nothing else. The arithmetic is float32, step by step as in transformers, so that the tables
agree with the ones that a model was trained or tuned with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rope:
    """angle(position, i) = position * inv_freq[i]; attention_factor multiplies cos and sin."""

    inv_freq: list[float]  # [rotary_dim / 2]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class RopeSettings:
    """The rotary settings of a config, however it spells them."""

    rope_type: str
    theta: float
    params: dict[str, Any]  # the scaling rule's own numbers
    head_dim: int
    max_position_embeddings: int  # as the config says, before scaling
    partial_rotary_factor: float = 1.0

    @property
    def dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.head_dim * self.partial_rotary_factor)

    def number(self, key: str) -> float:
        value = self.params.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ValueError(
                f"config.json: rope type '{self.rope_type}' needs a positive number '{key}', "
                f"got {value!r}"
            )
        return float(value)

    @property
    def original_max(self) -> float:
        """Positions the model was first trained with."""
        if self.params.get("original_max_position_embeddings") is None:
            return float(self.max_position_embeddings)
        return self.number("original_max_position_embeddings")

    @property
    def scaled_max(self) -> int:
        """Positions the model can use once its rule is applied."""
        if self.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.number("factor"))
        if self.rope_type == "yarn" and self.params.get("factor") is not None:
            return int(self.original_max * self.number("factor"))
        return self.max_position_embeddings


def read_settings(
    hf: dict[str, Any],
    head_dim: int,
    max_position_embeddings: int,
    partial_rotary_factor: float = 1.0,
) -> RopeSettings:
    """Reads rope_parameters (transformers 5) or rope_scaling and rope_theta (transformers 4)."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    params = hf.get(key) or {}
    if not isinstance(params, dict):
        raise ValueError(f"config.json: {key} must be an object, got {params!r}")
    if params and all(isinstance(value, dict) for value in params.values()):
        raise ValueError(f"config.json: {key} with one entry a layer type is not supported")
    params = dict(params)
    old_name = params.pop("type", None)
    rope_type = params.pop("rope_type", None) or old_name or "default"
    theta = params.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    partial = params.pop("partial_rotary_factor", None) or partial_rotary_factor
    if rope_type not in _RULES:
        raise ValueError(
            f"config.json: {key} has the unknown type {rope_type!r} (known: {', '.join(_RULES)})"
        )
    unknown = sorted(set(params) - _KEYS[rope_type])
    if unknown:
        raise ValueError(
            f"config.json: {key} of type '{rope_type}' has the unsupported key {unknown[0]!r}"
        )
    settings = RopeSettings(
        rope_type, float(theta), params, head_dim, max_position_embeddings, float(partial)
    )
    if settings.dim < 2 or settings.dim % 2:
        raise ValueError(
            f"config.json: rotary embedding needs an even number of dimensions, got {settings.dim}"
        )
    if rope_type in ("linear", "dynamic") and settings.original_max != max_position_embeddings:
        raise ValueError(
            f"config.json: {key} of type '{rope_type}' has an original_max_position_embeddings "
            f"other than max_position_embeddings ({max_position_embeddings}), unsupported"
        )
    return settings


def build(settings: RopeSettings, max_model_len: int | None = None) -> Rope:
    """The table. 'dynamic' depends on the length: its table is the one for max_model_len tokens."""
    length = max_model_len or settings.scaled_max
    inv_freq, factor = _RULES[settings.rope_type](settings, length)
    return Rope([float(f) for f in inv_freq], float(factor))


def _exponents(dim: int) -> F32:
    exponents: F32 = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return exponents


def _plain(base: float, dim: int) -> F32:
    """1 / base^(2i / dim)"""
    inv_freq: F32 = np.float32(1.0) / np.power(np.float32(base), _exponents(dim))
    return inv_freq


def _default(s: RopeSettings, length: int) -> tuple[F32, float]:
    return _plain(s.theta, s.dim), 1.0


def _linear(s: RopeSettings, length: int) -> tuple[F32, float]:
    return _plain(s.theta, s.dim) / np.float32(s.number("factor")), 1.0


def _dynamic(s: RopeSettings, length: int) -> tuple[F32, float]:
    factor = s.number("factor")
    stretch = factor * max(length, s.max_position_embeddings) / s.max_position_embeddings
    base = s.theta * (stretch - (factor - 1)) ** (s.dim / (s.dim - 2))
    return _plain(base, s.dim), 1.0


def _llama3(s: RopeSettings, length: int) -> tuple[F32, float]:
    """Short wavelengths stay, long ones are stretched by `factor`, those between are mixed."""
    factor, low, high = (
        np.float32(s.number(key)) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    old = np.float32(s.original_max)
    inv_freq = _plain(s.theta, s.dim)
    wavelen = np.float32(2 * math.pi) / inv_freq
    stretched = np.where(wavelen > old / low, inv_freq / factor, inv_freq)
    smooth = (old / wavelen - low) / (high - low)
    mixed = (np.float32(1) - smooth) * stretched / factor + smooth * stretched
    between = (wavelen >= old / high) & (wavelen <= old / low)
    return np.where(between, mixed, stretched), 1.0


def _yarn(s: RopeSettings, length: int) -> tuple[F32, float]:
    """Peng et al., "YaRN", 2023: dimensions that turn often stay, slow ones are interpolated."""
    p = s.params
    original = s.original_max
    has_factor = p.get("factor") is not None
    factor = s.number("factor") if has_factor else s.max_position_embeddings / original

    # The dimension that turns `turns` times within the original context.
    def dimension(turns: float) -> float:
        return s.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(s.theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, s.dim - 1)
    if low == high:
        high += 0.001
    index = np.arange(s.dim // 2, dtype=np.float32)
    ramp = np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    keep = np.float32(1) - ramp
    pos_freqs = np.power(np.float32(s.theta), _exponents(s.dim))
    interpolated = np.float32(1) / (np.float32(factor) * pos_freqs)
    inv_freq = interpolated * (np.float32(1) - keep) + np.float32(1) / pos_freqs * keep
    return inv_freq, _yarn_attention_factor(p, factor)


def _yarn_attention_factor(p: dict[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


_RULES: dict[str, Callable[[RopeSettings, int], tuple[F32, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor", _ORIGINAL},
    "dynamic": {"factor", _ORIGINAL},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate", _ORIGINAL,
    },
}  # fmt: skip
