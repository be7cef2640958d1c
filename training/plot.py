"""The curves of a training log as an SVG."""

from __future__ import annotations

import json
import math
from pathlib import Path

_COLOURS = ("#1f6feb", "#d1481e", "#2f9e44")


def plot(logs: list[Path], out: Path) -> None:
    """Loss over steps (logarithmic), one line a log; dots are losses on held-out stories."""
    width, height, left, bottom = 720, 360, 50, 30
    series = []
    for log in logs:
        entries = [json.loads(line) for line in log.read_text().splitlines()[1:]]
        series.append((log.stem, entries))
    last = max(e["step"] for _, entries in series for e in entries)
    high, low = 8.0, 0.05

    def x(step: float) -> float:
        return left + (width - left - 10) * step / last

    def y(loss: float) -> float:
        share = math.log(max(loss, low) / low) / math.log(high / low)
        return (height - bottom) - (height - bottom - 10) * min(1.0, share)

    parts = []
    for loss in (0.05, 0.1, 0.2, 0.5, 1, 2, 5):
        parts.append(f'<path d="M{left} {y(loss):.1f}H{width - 10}" stroke="#ccc"/>')
        parts.append(f'<text x="8" y="{y(loss) + 4:.1f}">{loss}</text>')
    for i in range(5):
        step = last * i // 4
        parts.append(f'<text x="{x(step) - 14:.1f}" y="{height - 10}">{step}</text>')
    for (name, entries), colour in zip(series, _COLOURS, strict=False):
        line = " ".join(f"{x(e['step']):.1f},{y(e['loss']):.1f}" for e in entries)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        for e in entries:
            for loss in e.get("test_loss", {}).values():
                at = f'cx="{x(e["step"]):.1f}" cy="{y(loss):.1f}"'
                parts.append(f'<circle {at} r="2.5" fill="{colour}"/>')
        parts.append(
            f'<text x="{width - 90}" y="{30 + 18 * _COLOURS.index(colour)}" '
            f'fill="{colour}">{name}</text>'
        )
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )
