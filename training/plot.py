"""The curves of a training log as an SVG."""

from __future__ import annotations

import json
from pathlib import Path

from nano_inference.plot import Panel, render


def plot(logs: list[Path], out: Path) -> None:
    """Loss over steps, one line a log; dots are losses on held-out stories."""
    panel = Panel("Training", "step", "loss", y_log=True, wide=True)
    for log in logs:
        entries = [json.loads(line) for line in log.read_text().splitlines()[1:]]
        panel.lines.append((log.stem, [(e["step"], e["loss"]) for e in entries]))
        held_out = [(e["step"], v) for e in entries for v in e.get("test_loss", {}).values()]
        panel.dots.append((log.stem, held_out))
    out.write_text(render([panel], "Loss over the steps of training"))
