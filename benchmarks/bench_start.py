"""From the start of a process to the first token on a card: the bundled model, and one of Llama 3.1
8B's shape, without and with a file of timed plans. Every start is a fresh process; the 8B model is
written to a temporary folder first (16 GB), so its files are in the page cache.

    python benchmarks/bench_start.py [--only bundled,8b] [--device cuda] [--check] [--json] [--save]

--check fails if a start takes longer than it may (bundled: 2 s, 8B: 15 s; vLLM took 58 s for 8B).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import commit, markdown_table, save

from nano_inference import _core
from nano_inference.random_model import LLAMA_3_1_8B, bf16_pool

LIMITS = {"bundled": 2.0, "8b": 15.0}  # seconds, with plans on file
TIMEOUT = 600

# argv: model ("" for the bundled one), device, time.time() at the start of the process.
CHILD = """
import json, sys, time
entered = time.time()
from nano_inference import LLM, SamplingParams
imported = time.time()
model, device, began = sys.argv[1] or None, sys.argv[2], float(sys.argv[3])
options = {"skip_tokenizer_init": True} if model else {}
llm = LLM(model, device=device, use_tqdm_on_load=False, **options)
ready = time.time()
prompt = list(range(100, 164)) if model else "Once upon a time"
(out,) = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
done = time.time()
assert len(out.outputs[0].token_ids) == 1
phases = {"interpreter": entered - began, "imports": imported - entered}
phases |= {**llm.engine.phases, "first token": done - ready}
print(json.dumps({"total": done - began, "phases": phases, "backend": llm.engine.core.device_name}))
"""


def start_once(model: str, device: str, cache: Path) -> dict[str, Any]:
    """Seconds to the first token, in all and by phase."""
    environ = {**os.environ, "NANO_INFERENCE_CACHE": str(cache)}
    command = [sys.executable, "-c", CHILD, model, device, repr(time.time())]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT)
    if child.returncode != 0:
        raise SystemExit(f"the start failed:\n{child.stderr}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


# -- The 8B model's files -------------------------------------------------------------------------


def tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_heads"] * dim, shape["num_kv_heads"] * dim
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for i in range(shape["num_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (q, hidden)
        yield layer + "self_attn.k_proj.weight", (kv, hidden)
        yield layer + "self_attn.v_proj.weight", (kv, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, q)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (inner, hidden)
        yield layer + "mlp.up_proj.weight", (inner, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocab_size"], hidden)


def write_llama(folder: Path, shape: dict[str, Any]) -> None:
    """config.json and model.safetensors of random bf16 weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape["rope_theta"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, size in tensors(shape):
        begin, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = bf16_pool(1 << 25)
    ones = np.full(shape["hidden_size"], 0x3F80, np.uint16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (_, size) in enumerate(tensors(shape)):
            if len(size) == 1:
                file.write(ones.tobytes())
            else:
                write_random(file, pool, int(np.prod(size)), 7919 * number)


def write_random(file: Any, pool: np.ndarray, count: int, begin: int) -> None:
    begin %= len(pool)
    while count > 0:
        part = pool[begin : begin + count]
        file.write(memoryview(part))
        count -= len(part)
        begin = 0


# -- Measuring ------------------------------------------------------------------------------------


def measure(name: str, model: str, device: str) -> list[dict[str, Any]]:
    """Rows of the table: without plans, and with those that the first start has left."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="nano-inference-") as cache:
        for plans in ("timed", "on file"):
            found = start_once(model, device, Path(cache))
            print(f"{name}, plans {plans}: {found['total']:.2f} s", flush=True)
            for phase, took in found["phases"].items():
                print(f"  {phase}: {took:.2f} s", flush=True)
            rows.append({"model": name, "plans": plans, "seconds": found["total"], **found})
    return rows


def measure_8b(device: str, where: str | None) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="nano-inference-8b-", dir=where) as folder:
        begin = time.perf_counter()
        write_llama(Path(folder), LLAMA_3_1_8B)
        print(f"8b: files written in {time.perf_counter() - begin:.1f} s", flush=True)
        return measure("8b", folder, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="bundled,8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", help="where the 8B model's 16 GB may lie for a while")
    parser.add_argument("--check", action="store_true", help="fail if it takes too long")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/start.*")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if "bundled" in args.only.split(","):
        rows += measure("bundled", "", args.device)
    if "8b" in args.only.split(","):
        rows += measure_8b(args.device, args.folder)
    if not rows:
        raise SystemExit(f"--only is one or both of bundled, 8b, got {args.only!r}")

    about = {
        "backend": rows[0]["backend"],
        "version": _core.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit() if shutil.which("git") else "unknown",
    }
    table = [{k: row[k] for k in ("model", "plans", "seconds")} | row["phases"] for row in rows]
    names = list(dict.fromkeys(key for row in table for key in row))
    table = [{name: row.get(name, "") for name in names} for row in table]
    result = {"context": about, "results": rows}
    print(json.dumps(result, indent=2) if args.json else markdown_table(table))
    if args.save:
        save("start", result, "From the start of the process to the first token, seconds", table)
    late = [r for r in rows if r["plans"] == "on file" and r["seconds"] > LIMITS[r["model"]]]
    if args.check and late:
        raise SystemExit(f"too slow: {', '.join(r['model'] for r in late)}; may take {LIMITS}")


if __name__ == "__main__":
    main()
