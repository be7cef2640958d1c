"""Greps every #include against the layer table of docs/architecture.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGIC = {"sampling_params", "sequence", "block_manager", "scheduler", "step_batch"}
MAY_INCLUDE = {
    "core": {"core"},
    "backend": {"core", "backend"},
    "cpu": {"core", "backend", "cpu"},
    "cuda": {"core", "backend", "cuda"},
    "model": {"core", "backend", "model"},
    "logic": {"core", "logic"},  # engine/{LOGIC}: no backend, no model
    "engine": {"core", "backend", "model", "logic", "engine"},
}
EXCEPTIONS = {("backend/registry.cpp", "cpu")}  # the one place that names the CPU backend


def layer_of(path: str) -> str:
    folder, _, name = path.partition("/")
    return "logic" if folder == "engine" and name.split(".")[0] in LOGIC else folder


def violations(path: str, text: str) -> list[str]:
    found = []
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        layer = layer_of(name if "/" in name else f"{path.partition('/')[0]}/{name}")
        if layer not in MAY_INCLUDE[layer_of(path)] and (path, layer) not in EXCEPTIONS:
            found.append(f"{path} includes {name}")
    return found


def test_layers() -> None:
    files = [(p.relative_to(ROOT / "cpp"), p) for p in (ROOT / "cpp").rglob("*/*.[ch]*")]
    files += [(p.relative_to(ROOT), p) for p in (ROOT / "cuda").rglob("*.[ch]*")]
    assert len(files) > 30
    assert [v for name, p in files for v in violations(str(name), p.read_text())] == []
    assert violations("engine/scheduler.h", '#include "model/config.h"')  # the rule bites
