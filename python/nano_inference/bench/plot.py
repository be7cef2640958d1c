"""Plots as SVG, drawn by hand: a page of panels with lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np

from . import stats
from .records import Record

_WIDTH, _HEIGHT = 460, 280  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 34, 44  # around its axes
_MOST_POINTS = 400  # of a line: more would not be seen
_COLORS = ("#1f6fb4", "#d1622b", "#3a8f4d")
_FONT = "font-family='system-ui, sans-serif'"

Points = Sequence[tuple[float, float]]


@dataclass
class Panel:
    title: str
    x_label: str
    y_label: str
    lines: list[tuple[str, Points]] = field(default_factory=list)
    """(name, points); the names make the legend if there are several."""


def cdf(values: Sequence[float]) -> Points:
    """(value, share of values up to it), thinned evenly over the ranks."""
    if not len(values):
        return []
    ordered = np.sort(np.asarray(values, np.float64))
    ranks = np.unique(np.linspace(0, len(ordered) - 1, _MOST_POINTS).round().astype(int))
    return [(float(ordered[r]), (r + 1) / len(ordered)) for r in ranks.tolist()]


def nice_ticks(top: float, about: int = 5) -> list[float]:
    """From 0 to `top` in steps of 1, 2 or 5 times a power of ten."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m in (1, 2, 5) if m * power >= raw), 10)
    return [i * step for i in range(math.floor(top / step + 1e-9) + 1)]


def render(panels: Sequence[Panel], title: str, columns: int = 2) -> str:
    """The page."""
    rows = -(-len(panels) // columns)
    width, height = columns * _WIDTH, rows * _HEIGHT + 36
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        _text(width / 2, 24, title, "middle", 15),
    ]
    for i, panel in enumerate(panels):
        x, y = i % columns * _WIDTH, i // columns * _HEIGHT + 36
        parts += [f"<g transform='translate({x} {y})'>", *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    points = [p for _, line in panel.lines for p in line]
    x_ticks = nice_ticks(max((x for x, _ in points), default=1.0))
    y_ticks = nice_ticks(max((y for _, y in points), default=1.0))
    x_top = max([x_ticks[-1], *(x for x, _ in points)])
    y_top = max([y_ticks[-1], *(y for _, y in points)])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / x_top * (right - _LEFT), bottom - y / y_top * (bottom - _TOP)

    parts = [_text(_LEFT, _TOP - 12, panel.title, "start", 13)]
    for tick in x_ticks:
        x, _ = place(tick, 0)
        parts.append(_line(x, _TOP, x, bottom, "#e4e4e4"))
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle"))
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(_line(_LEFT, y, right, y, "#e4e4e4"))
        parts.append(_text(_LEFT - 6, y + 4, f"{tick:g}", "end"))
    parts.append(_line(_LEFT, bottom, right, bottom, "#555"))
    parts.append(_line(_LEFT, _TOP, _LEFT, bottom, "#555"))
    parts.append(_text((_LEFT + right) / 2, bottom + 34, panel.x_label, "middle"))
    parts.append(
        f"<g transform='translate(14 {(_TOP + bottom) / 2:.1f}) rotate(-90)'>"
        + _text(0, 0, panel.y_label, "middle")
        + "</g>"
    )
    for i, (name, line) in enumerate(panel.lines):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in line))
        parts.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='1.6'/>")
        if len(panel.lines) > 1:
            parts.append(_text(right - 4, bottom - 10 - 15 * i, name, "end", 11, color))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}'/>"


def _text(x: float, y: float, text: str, anchor: str, size: int = 11, color: str = "#222") -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)  # XML has no other controls
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_FONT} font-size='{size}' "
        f"fill='{color}'>{escape(printable)}</text>"
    )


# -- The plots of a run ---------------------------------------------------------------------------


def run_plot(records: Sequence[Record], start: float, title: str) -> str:
    """Distributions of the times, and the course of the run."""
    good = [r for r in records if r.ok]

    def shares(name: str, *lines: tuple[str, list[float]]) -> Panel:
        drawn = [(label, cdf([1e3 * v for v in values])) for label, values in lines]
        return Panel(name, "ms", "share", drawn)

    tokens = [g for r in good for g in stats.token_gaps(r)]
    tpots = [t for r in good if (t := stats.tpot(r)) is not None]
    flight = [(t - start, float(n)) for t, n in stats.in_flight(records)]
    panels = [
        shares("Time to first token", ("", [stats.ttft(r) for r in good])),
        shares("Time between tokens", ("every gap", tokens), ("mean of a request", tpots)),
        shares("End to end", ("", [stats.e2e(r) for r in good])),
        Panel("Requests in flight", "s", "requests", [("", _thin(_steps(flight)))]),
        Panel("Output", "s", "tokens/s", [("", token_rate(good, start))]),
        Panel(
            "Time to first token, by start",
            "s",
            "ms",
            [("", _thin(sorted((r.start - start, 1e3 * stats.ttft(r)) for r in good)))],
        ),
    ]
    return render(panels, title)


def token_rate(records: Sequence[Record], start: float, bins: int = 60) -> Points:
    """Output tokens a second over the time of the run."""
    times: list[float] = []
    weights: list[float] = []
    for r in records:
        times += [t - start for t in r.times]
        weights += r.event_tokens()
    if not times or max(times) <= 0:
        return []
    sums, edges = np.histogram(times, bins, (0.0, max(times)), weights=weights)
    width = edges[1] - edges[0]
    return [(float(e + width / 2), float(s / width)) for e, s in zip(edges, sums, strict=False)]


def _steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A line that jumps at each point instead of climbing to it."""
    if not points:
        return []
    drawn, before = [], 0.0
    for x, y in points:
        drawn += [(x, before), (x, y)]
        before = y
    return drawn


def _thin(points: Points) -> Points:
    every = max(1, len(points) // (4 * _MOST_POINTS))
    return [*points[::every], points[-1]] if points else []
