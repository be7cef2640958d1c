"""Tiny random models in a folder, and the shortest way from there to logits and tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nano_inference import _core
from nano_inference.config import load_model
from nano_inference.loader import load_weights

DTYPE_NAMES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "<f8": "F64", "|i1": "I8"}


def save_model(path: Path, config: Any, seed: int = 0) -> Any:
    """A transformers model of `config` with every parameter random (norms and biases too), so that
    no tensor can be left out unnoticed. Saved in float32; returns the model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # the models are too small to share out
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name or ".ln_" in name:
                noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
            elif "embed" in name or ".wte" in name or ".wpe" in name:
                noise = 0.3 * noise
            elif parameter.dim() > 1:  # keeps activations near 1 at every width
                noise = noise * 1.8 / math.sqrt(min(parameter.shape))
            else:
                noise = 0.1 * noise
            parameter.copy_(noise)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return model


def edit_config(path: Path, **changes: Any) -> dict[str, Any]:
    """Rewrites entries of config.json; ... removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    file.write_text(json.dumps(config))
    return config


def rewrite_as_transformers_4(path: Path, type_key: str = "rope_type") -> None:
    """config.json with rope_theta, rope_scaling and torch_dtype, as transformers 4 writes them."""
    config = json.loads((path / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_config(
        path,
        rope_parameters=...,
        dtype=...,
        torch_dtype=config["dtype"],
        rope_theta=theta,
        rope_scaling=None if kind == "default" else {type_key: kind, **rope},
    )


def build_engine(
    path: Path, *, dtype: str = "auto", max_model_len: int | None = None, **engine_config: Any
) -> _core.Engine:
    """A loaded engine, to be stepped by hand."""
    device = engine_config.get("device", "cpu")
    loaded = load_model(path, dtype=dtype, max_model_len=max_model_len, device=device)
    options = {
        "device": device,
        "num_threads": 2 if device == "cpu" else 0,
        "dtype": loaded.dtype,
        "kv_cache_dtype": loaded.dtype,
        "block_size": 16,
        "num_blocks": 4 * math.ceil(loaded.max_model_len / 16) + 4,
        "max_model_len": loaded.max_model_len,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "check_invariants": True,
    }
    engine = _core.Engine(_core.EngineConfig(**{**options, **engine_config}), loaded.model_config)
    load_weights(engine, path, loaded, progress=False)
    engine.finish_loading()
    return engine


def greedy(engine: _core.Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """The next tokens, through scheduler, cache and sampler."""
    params = _core.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine.submit(1, prompt, params)
    tokens: list[int] = []
    while engine.step():
        for output in engine.wait_outputs(timeout=0.0):
            assert output.finish_reason != "error", output.error
            tokens += output.token_ids
    for output in engine.wait_outputs(timeout=0.0):
        tokens += output.token_ids
    return tokens


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A plain safetensors file; uint16 arrays are bf16 bits."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        end = at + array.nbytes
        kind = DTYPE_NAMES[array.dtype.str]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    write_raw_safetensors(file, header, b"".join(array.tobytes() for array in tensors.values()))


def write_raw_safetensors(
    file: Path, header: Any, data: bytes, header_len: int | None = None
) -> None:
    """Any header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if header_len is None else header_len
    file.write_bytes(length.to_bytes(8, "little") + raw + data)
