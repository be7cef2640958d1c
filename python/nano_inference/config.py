"""From a model folder's config.json and generation_config.json to what the engine needs."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _core
from .models import Fields, WeightSource, find_family

logger = logging.getLogger("nano_inference")

DTYPES = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What the model's makers recommend (generation_config.json); None where they say nothing."""

    eos_token_ids: list[int] = field(default_factory=list)  # of both files
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class LoadedConfig:
    """A model folder, understood."""

    architecture: str
    hf: dict[str, Any]  # config.json
    model_config: _core.ModelConfig
    dtype: str  # "float32", "bfloat16", "float16"
    max_model_len: int
    generation: GenerationDefaults
    weight_map: list[WeightSource]
    name_prefix: str = ""  # tensor names of the checkpoint may start with it


def load_model(
    path: Path, *, dtype: str = "auto", max_model_len: int | None = None, device: str = "cpu"
) -> LoadedConfig:
    """Reads the config in folder `path`. Anything unsupported is a ValueError naming it. device:
    cpu or cuda, which has no float32 weights: auto makes bfloat16 of them."""
    path = Path(path)
    hf = read_json(path / "config.json")
    architecture, family = find_family(hf)
    if max_model_len is not None and (isinstance(max_model_len, bool) or max_model_len <= 0):
        raise ValueError(f"max_model_len must be a positive integer, got {max_model_len!r}")
    fields = family.config(hf, max_model_len)
    longest = fields["max_position_embeddings"]
    if max_model_len is not None and max_model_len > longest:
        raise ValueError(
            f"max_model_len = {max_model_len} is more than the model's {longest} positions"
        )
    return LoadedConfig(
        architecture=architecture,
        hf=hf,
        model_config=_native(fields),
        dtype=_dtype_on(device, dtype, _choose_dtype(dtype, hf, path)),
        max_model_len=max_model_len or longest,
        generation=_generation_defaults(path, hf),
        weight_map=family.weights(fields),
        name_prefix=getattr(family, "PREFIX", ""),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError with one line otherwise."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return data


def _native(fields: Fields) -> _core.ModelConfig:
    ropes = [_core.RopeConfig(r.inv_freq, r.attention_factor) for r in fields["ropes"]]
    layers = [_core.LayerConfig(window=window, rope=rope) for window, rope in fields["layers"]]
    config = _core.ModelConfig(**{**fields, "ropes": ropes, "layers": layers})
    config.validate()
    return config


def _choose_dtype(asked: str, hf: dict[str, Any], path: Path) -> str:
    if asked != "auto":
        if asked not in DTYPES:
            raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {asked!r}")
        return DTYPES[asked]
    name = hf.get("dtype") or hf.get("torch_dtype")
    if name is None:  # the config does not say: as the tensors are stored
        from .loader import stored_dtype

        return stored_dtype(path) or "float32"
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"config.json: the dtype {name!r} is not supported (dtype= overrides it)")
    return DTYPES[name]


def _dtype_on(device: str, asked: str, dtype: str) -> str:
    if device == "cpu" or dtype != "float32":
        return dtype
    if asked != "auto":
        raise ValueError(f"dtype={asked!r} is not possible on {device}: say bfloat16 or float16")
    logger.info("dtype: bfloat16 on %s for a checkpoint of float32", device)
    return "bfloat16"


def _generation_defaults(path: Path, hf: dict[str, Any]) -> GenerationDefaults:
    file = path / "generation_config.json"
    gen = read_json(file) if file.exists() else {}
    eos: list[int] = []
    for source in (gen, hf):
        ids = source.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token >= 0 and token not in eos:
                eos.append(token)
    if ignored := sorted(key for key, value in gen.items() if _is_ignored(key, value)):
        logger.info("%s: not used: %s", file, ", ".join(ignored))
    return GenerationDefaults(eos, **{name: gen.get(name) for name in _HONOURED})


# What vLLM takes from generation_config.json. Like vLLM, not do_sample: temperature=0 is greedy.
_HONOURED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_SAY_NOTHING = ("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "use_cache")


def _is_ignored(key: str, value: Any) -> bool:
    """An entry of generation_config.json that asks for something and is not followed."""
    if key == "do_sample":
        return value is False
    off = value is not True and value in (None, 0, 1, [], {})  # num_beams, length_penalty, …
    return key not in (*_HONOURED, *_SAY_NOTHING) and not key.startswith("_") and not off
