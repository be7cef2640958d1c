"""Model families, found by the `architectures` entry of config.json.

A family is one module of this package with

    ARCHITECTURES: tuple[str, ...]      names in config.json
    PREFIX: str                         (optional) prefix that tensor names may have or lack
    config(hf, max_model_len) -> dict   the fields of _core.ModelConfig; ropes as rope.Rope,
                                        layers as (window, rope) pairs
    weights(fields) -> [WeightSource]   where each slot of the engine comes from

Adding one touches its file and its test, nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

Fields = dict[str, Any]


@dataclass(frozen=True)
class WeightSource:
    """One slot of the engine and the checkpoint tensor that fills it."""

    name: str  # in the checkpoint
    slot: str
    shape: tuple[int, ...]  # in the checkpoint
    transpose: bool = False  # stored as [in, out]
    rows: tuple[int, int] | None = None  # the slot is these rows of the (transposed) tensor


@cache
def families() -> dict[str, ModuleType]:
    """Architecture name -> family module."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found.update(dict.fromkeys(module.ARCHITECTURES, module))
    return found


def find_family(hf: dict[str, Any]) -> tuple[str, ModuleType]:
    """The first architecture of the config that is known, and its module."""
    names = hf.get("architectures") or []
    known = families()
    for name in names:
        if name in known:
            return name, known[name]
    listed = ", ".join(sorted(known))
    if not names:
        raise ValueError(f"config.json names no architecture (known: {listed})")
    raise ValueError(f"unknown architecture {', '.join(map(str, names))} (known: {listed})")
