"""What `nano-inference info` shows."""

from __future__ import annotations

import math
from typing import Any

from . import __version__, _core, hub
from .config import LoadedConfig, load_model
from .engine_args import EngineArgs, gigabytes, plan_engine


def machine_info(isa: str | None, num_threads: int | None) -> dict[str, Any]:
    config = _core.EngineConfig(device="cpu", isa=isa or "", dtype="float32", num_blocks=1)
    memory = _core.Engine.plan_memory(config, _smallest_model())
    isas = _core.cpu_isas()
    cards = cuda_cards()
    return {
        "version": __version__,
        "devices": ["cpu", *(card["device"] for card in cards)],
        "cards": cards,
        "cuda_error": _core.cuda_error(),
        "device": _core.Ops(device="cpu", isa=isa or "", num_threads=num_threads or 0).name,
        "isas": isas,
        "isa": isa or isas[0],
        "threads": num_threads or _core.num_threads_available(),
        "memory_total": memory["memory_total"],
        "memory_available": memory["memory_available"],
    }


def cuda_cards() -> list[dict[str, Any]]:
    """The cards that can be used, and their memory in bytes."""
    cards = []
    for index, name in enumerate(_core.cuda_devices()):
        config = _core.EngineConfig(device="cuda", device_index=index, num_blocks=1)
        card: dict[str, Any] = {"device": f"cuda:{index}", "name": name}
        try:
            memory = _core.Engine.plan_memory(config, _smallest_model())
        except (RuntimeError, ValueError) as error:  # full, or somebody else's: say so and go on
            cards.append(card | {"memory_total": 0, "memory_available": 0, "error": str(error)})
            continue
        cards.append(card | {key: memory[key] for key in ("memory_total", "memory_available")})
    return cards


def model_info(args: EngineArgs) -> dict[str, Any]:
    """Shape and memory of a model, from its config alone: no weight is read."""
    path = hub.resolve_model(args.model, revision=args.revision, need_weights=False)
    target = args.target
    loaded = load_model(
        path, dtype=args.dtype, max_model_len=args.max_model_len, device=target.kind
    )
    m, config = loaded.model_config, args.engine_config(loaded)
    sizes = _core.Engine.plan_memory(config, m)
    found = {
        "model": args.model,
        "device": f"cuda:{target.index}" if target.is_cuda else "cpu",
        "architecture": loaded.architecture,
        "parameters": sum(map(math.prod, _core.Engine.weight_slots(m).values())),
        "num_layers": len(m.layers),
        "hidden_size": m.hidden_size,
        "intermediate_size": m.intermediate_size,
        "num_heads": m.num_heads,
        "num_kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "vocab_size": m.vocab_size,
        "max_model_len": loaded.max_model_len,
        "dtype": loaded.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "weight_bytes": sizes["weights"],
        "activation_bytes": sizes["activations"],
        "kv_bytes_per_token": sizes["kv_block"] // sizes["block_size"],
    }
    return found | _what_fits(args, loaded, sizes)


def _what_fits(args: EngineArgs, loaded: LoadedConfig, sizes: dict[str, int]) -> dict[str, Any]:
    room = sizes["memory_available"] - sizes["weights"] - sizes["activations"]
    tokens = max(0, room // sizes["kv_block"]) * sizes["block_size"]
    try:
        _, plan = plan_engine(args, loaded)
    except (MemoryError, ValueError) as error:
        return {"tokens_that_fit": tokens, "fits": False, "why_not": str(error)}
    return {
        "tokens_that_fit": tokens,
        "fits": True,
        "kv_cache_bytes": plan.kv_cache,
        "kv_cache_tokens": plan.num_tokens,
    }


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    machine = found["machine"]
    rows = [
        ("nano-inference", machine["version"]),
        ("devices", ", ".join(machine["devices"])),
        ("instruction sets", ", ".join(machine["isas"]) + f" (using {machine['isa']})"),
        ("threads", machine["threads"]),
        (
            "memory",
            f"{gigabytes(machine['memory_available'])} available of "
            f"{gigabytes(machine['memory_total'])}",
        ),
        *_cuda_rows(machine),
    ]
    if "model" in found:
        rows += _model_rows(found["model"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _cuda_rows(machine: dict[str, Any]) -> list[tuple[str, Any]]:
    if not machine["cards"]:
        return [("cuda", f"cannot be used: {machine['cuda_error']}")]
    return [
        (
            card["device"],
            f"{card['name']}, cannot be opened: {card['error']}"
            if "error" in card
            else f"{card['name']}, {gigabytes(card['memory_available'])} available of "
            f"{gigabytes(card['memory_total'])}",
        )
        for card in machine["cards"]
    ]


def _model_rows(m: dict[str, Any]) -> list[tuple[str, Any]]:
    if m["fits"]:
        cache = f"{gigabytes(m['kv_cache_bytes'])} by default, {m['kv_cache_tokens']:,} tokens"
    else:
        cache = m["why_not"]
    return [
        ("", ""),
        ("model", f"{m['model']} on {m['device']}"),
        ("architecture", m["architecture"]),
        ("parameters", f"{m['parameters']:,}"),
        (
            "shape",
            f"{m['num_layers']} layers, hidden {m['hidden_size']}, MLP {m['intermediate_size']}, "
            f"{m['num_heads']} heads ({m['num_kv_heads']} for K and V) of {m['head_dim']}, "
            f"vocabulary {m['vocab_size']:,}",
        ),
        ("longest sequence", f"{m['max_model_len']:,} tokens"),
        ("weights", f"{gigabytes(m['weight_bytes'])} ({m['dtype']})"),
        ("activations", gigabytes(m["activation_bytes"])),
        ("KV cache", f"{m['kv_bytes_per_token']:,} bytes a token ({m['kv_cache_dtype']})"),
        ("", cache),
        ("", f"{m['tokens_that_fit']:,} tokens fit into the available memory"),
    ]


def _smallest_model() -> _core.ModelConfig:
    """The memory of a device is only told together with a model's needs. This one every device can
    run."""
    return _core.ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=16,
        ropes=[_core.RopeConfig([1.0] * 32)],
        layers=[_core.LayerConfig()],
    )
