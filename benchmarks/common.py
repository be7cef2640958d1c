"""What the Python benchmarks share: the machine's own rates, running requests, tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nano_inference import _core

HERE = Path(__file__).resolve().parent
GB = 1e9
# Seconds for which a card rests before what may be compared with something else: an H200 that has
# multiplied matrices for 35 to 80 ms lowers its clocks, and all takes up to 8% longer
# (docs/kernels.md).
REST = 0.25

# -- The machine ----------------------------------------------------------------------------------


@cache
def machine_program() -> Path:
    """Compiles machine.cpp and what it measures with, once a run; needs a C++ compiler (CXX)."""
    program = Path(tempfile.mkdtemp(prefix="nano-inference-")) / "machine"
    compiler = os.environ.get("CXX", "c++")
    cpp = HERE.parent / "cpp"
    sources = [HERE / "machine.cpp", cpp / "cpu" / "machine.cpp"]
    subprocess.run(
        [compiler, "-O3", "-std=c++20", "-pthread", f"-I{cpp}", *sources, "-o", program], check=True
    )
    return program


def measure_machine(threads: int) -> dict[str, float]:
    """Bytes a second read from memory; fp32, bf16 operations a second (a multiply-add is two)."""
    out = subprocess.run(
        [str(machine_program()), str(threads)], check=True, capture_output=True, text=True
    )
    rates: dict[str, float] = json.loads(out.stdout)
    return rates


def mean_rates(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {key: (before[key] + after[key]) / 2 for key in before}


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    return found[1] if found else platform.machine()


def commit() -> str:
    """Of the checkout that this file is in; + where tracked files differ from it."""

    def git(*args: str) -> str:
        out = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True)
        return out.stdout.strip()

    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def context(threads: int, device: str) -> dict[str, Any]:
    """Where and when a result was measured."""
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "backend": device,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }


# -- Running --------------------------------------------------------------------------------------


def greedy_requests(pairs: list[tuple[np.ndarray, int]]) -> list[tuple[Any, ...]]:
    """submit_all()'s arguments for (prompt, output length) pairs."""
    options = {"temperature": 0.0, "ignore_eos": True}
    return [
        (i, prompt, _core.SamplingParams(max_tokens=length, **options), 0, "")
        for i, (prompt, length) in enumerate(pairs)
    ]


def run_requests(engine: _core.Engine, pairs: list[tuple[np.ndarray, int]]) -> list[list[int]]:
    """Runs (prompt, output length) pairs, greedily, to their end. The engine must be started."""
    return run_prepared(engine, greedy_requests(pairs))


def run_prepared(engine: _core.Engine, requests: list[tuple[Any, ...]]) -> list[list[int]]:
    """run_requests() for what greedy_requests() has made, whose making takes no time here."""
    tokens: list[list[int]] = [[] for _ in requests]
    engine.submit_all(requests)
    done = 0
    while done < len(requests):
        for output in engine.wait_outputs(60.0):
            tokens[output.request_id] += output.token_ids
            if output.finish_reason not in ("", "length"):
                raise RuntimeError(f"request {output.request_id}: {output.error}")
            done += output.request_done
    return tokens


# -- Results --------------------------------------------------------------------------------------


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Column names are the keys of the first row; numbers to the right."""
    names = list(rows[0])
    right = [any(isinstance(row[name], (int, float)) for row in rows) for name in names]

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return str(value)

    lines = [names, ["--:" if r else "---" for r in right]]
    lines += [[text(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(name: str, result: dict[str, Any], title: str, rows: list[dict[str, Any]]) -> None:
    """results/NAME.json and NAME.md, for the repository; whole at any time, for who saves often."""
    about = ", ".join(f"{key} {value}" for key, value in result["context"].items())
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    texts = {
        "json": json.dumps(result, indent=2) + "\n",
        "md": f"# {title}\n\n{about}\n\n{markdown_table(rows)}\n",
    }
    for suffix, text in texts.items():
        part = folder / f"{name}.{suffix}.part"
        part.write_text(text)
        part.replace(folder / f"{name}.{suffix}")
