"""Writes a trained model as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .model import Config, Llama
from .tokenizer import BOS, END, PAD


def export(model: Llama, config: Config, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors in bfloat16; the embedding is also
    the head, so it is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
        "max_new_tokens": 512,  # a story's length
    }
    for name, content in (("config", config.to_hf()), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
