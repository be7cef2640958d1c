"""Plots as SVG, drawn by hand: a page of panels with lines, dots, bars, or spans of a timeline.

Axes are linear from 0, or logarithmic. What has one name has one colour; the names make the legend
if there are several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 460, 280  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 34, 44  # around its axes
_MOST_POINTS = 400  # of a line: more would not be seen
_COLORS = ("#1f6fb4", "#d1622b", "#3a8f4d", "#8a5bb0", "#b8932a", "#c2437f", "#4a9aa5", "#7a7a7a")
_GREY, _PALE = "#555", "#e4e4e4"
_FONT = "font-family='system-ui, sans-serif'"
_CHARACTER = 6.0  # width of a letter of the legend, about

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Span:
    """A bar of a timeline: row `row` (0 is the top one) from `start` to `end`."""

    row: int
    start: float
    end: float
    name: str = ""
    label: str = ""
    """Written into it."""


@dataclass
class Panel:
    title: str
    x_label: str
    y_label: str
    lines: list[tuple[str, Points]] = field(default_factory=list)
    """(name, points)"""
    dots: list[tuple[str, Points]] = field(default_factory=list)
    bars: list[tuple[str, Points]] = field(default_factory=list)
    """Side by side at each x = 0, 1, 2, …"""
    spans: list[Span] = field(default_factory=list)
    labels: list[tuple[float, float, str]] = field(default_factory=list)
    """Text just above a point."""
    x_names: Sequence[str] = ()
    """What stands at x = 0, 1, 2, … instead of numbers."""
    y_names: Sequence[str] = ()
    """The rows of the spans, from the top."""
    x_log: bool = False
    y_log: bool = False
    wide: bool = False
    """As wide as the page, in a row of its own."""
    legend: bool = True
    """If there are several names."""

    @property
    def series(self) -> list[tuple[str, Points]]:
        return [*self.lines, *self.dots, *self.bars]

    def names(self) -> list[str]:
        """All names, each once, in the order of their colours."""
        found = [name for name, _ in self.series] + [span.name for span in self.spans]
        return list(dict.fromkeys(found))


def cdf(values: Sequence[float]) -> Points:
    """(value, share of values up to it), thinned evenly over the ranks."""
    ordered, n = sorted(float(v) for v in values), len(values)
    count = min(n, _MOST_POINTS)
    ranks = dict.fromkeys(round(i * (n - 1) / max(1, count - 1)) for i in range(count))
    return [(ordered[r], (r + 1) / n) for r in ranks]


def thin(points: Points) -> Points:
    """Evenly, to as many as can be seen; the last one stays."""
    every = max(1, len(points) // (4 * _MOST_POINTS))
    return [*points[::every], points[-1]] if points else []


def stairs(points: Points) -> Points:
    """A line that jumps at each point instead of climbing to it."""
    drawn: list[tuple[float, float]] = []
    before = 0.0
    for x, y in points:
        drawn += [(x, before), (x, y)]
        before = y
    return drawn


def nice_ticks(top: float, about: int = 5) -> list[float]:
    """From 0 to `top` in steps of 1, 2 or 5 times a power of ten."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m in (1, 2, 5) if m * power >= raw), 10)
    return [i * step for i in range(math.floor(top / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high]; also 2 and 5 times each where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first < 3 else (1,)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    below = max((t for t in ticks if t <= low * 1.0001), default=ticks[0])
    above = min((t for t in ticks if t >= high * 0.9999), default=ticks[-1])
    return [t for t in ticks if below <= t <= max(above, below * 2)]


def number(value: float) -> str:
    """Short: 1200 is 1200, 12000 is 12k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def render(panels: Sequence[Panel], title: str, columns: int = 2) -> str:
    """The page."""
    columns = min(columns, max(1, len(panels))) if not any(p.wide for p in panels) else columns
    places, row, column = [], 0, 0
    for panel in panels:
        if panel.wide and column:
            row, column = row + 1, 0
        places.append((column * _WIDTH, row * _HEIGHT + 36))
        column += columns if panel.wide else 1
        if column >= columns:
            row, column = row + 1, 0
    width, height = columns * _WIDTH, (row + (column > 0)) * _HEIGHT + 36
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        _text(width / 2, 24, title, "middle", 15),
    ]
    for panel, (x, y) in zip(panels, places, strict=True):
        inside = _draw(panel, width if panel.wide else _WIDTH)
        parts += [f"<g transform='translate({x} {y})'>", *inside, "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass
class _Axis:
    """Values to places: `begin` pixels is where it starts."""

    ticks: list[float]
    low: float
    high: float
    begin: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def _axis(values: Sequence[float], log: bool, names: int, begin: float, end: float) -> _Axis:
    """`names`: so many places at 0, 1, 2, … instead of an axis of numbers."""
    if names:
        return _Axis([float(i) for i in range(names)], -0.5, names - 0.5, begin, end, False)
    if log:
        ticks = log_ticks(min(values, default=1.0), max(values, default=10.0))
        return _Axis(ticks, ticks[0], ticks[-1], begin, end, True)
    ticks = nice_ticks(max(values, default=1.0))
    return _Axis(ticks, 0.0, max([ticks[-1], *values]), begin, end, False)


def _draw(panel: Panel, width: float) -> list[str]:
    names = panel.names()
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}
    right, bottom = width - _RIGHT, _HEIGHT - _BOTTOM
    legend: list[str] = []
    top = float(_TOP)
    if panel.legend and len(names) > 1:
        legend, top = _legend(colors, right)

    def shown(some: Points) -> list[tuple[float, float]]:  # a logarithm has no place for 0
        return [p for p in some if (p[0] > 0 or not panel.x_log) and (p[1] > 0 or not panel.y_log)]

    points = [p for _, some in panel.series for p in shown(some)]
    rows = len(panel.y_names) or max((span.row + 1 for span in panel.spans), default=0)
    places = len(panel.x_names) or _bar_places(panel)
    xs = [x for x, _ in points] + [span.end for span in panel.spans]
    x_axis = _axis(xs, panel.x_log, places, _LEFT, right)
    if rows:  # from the top
        y_axis = _Axis([float(i) for i in range(rows)], -0.5, rows - 0.5, top, bottom, False)
    else:
        y_axis = _axis([y for _, y in points], panel.y_log, 0, bottom, top)

    parts = [_text(_LEFT, _TOP - 12, panel.title, "start", 13), *legend]
    parts += _grid(panel, x_axis, y_axis, top, rows)
    for span in panel.spans:
        parts += _span(span, x_axis, y_axis, colors[span.name])
    parts += _bars(panel, x_axis, y_axis, colors)
    for name, line in panel.lines:
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in shown(line))
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colors[name]}' stroke-width='1.6'/>"
        )
    dots = [[(x_axis(x), y_axis(y)) for x, y in shown(some)] for _, some in panel.dots]
    parts += _dots(dots, [colors[name] for name, _ in panel.dots])
    for x, y, text in panel.labels:
        at = x_axis(x)
        anchor = "end" if at > (_LEFT + right) / 2 else "start"
        parts.append(_text(at, y_axis(y) - 6, text, anchor))
    return parts


def _dots(series: Sequence[Points], colors: Sequence[str]) -> list[str]:
    """At their places. One that a later series would cover is larger and shows around it."""
    parts = []
    for i, (dots, color) in enumerate(zip(series, colors, strict=True)):
        later = [dot for other in series[i + 1 :] for dot in other]
        for dot in dots:
            radius = 5 if any(math.dist(dot, other) < 3 for other in later) else 3
            x, y = dot
            parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{color}'/>")
    return parts


def _bar_places(panel: Panel) -> int:
    return 1 + round(max((x for _, bars in panel.bars for x, _ in bars), default=-1.0))


def _legend(colors: dict[str, str], right: float) -> tuple[list[str], float]:
    """Squares and names under the title; where the axes may begin below them."""
    parts: list[str] = []
    x, y = float(_LEFT), _TOP + 2.0
    for name, color in colors.items():
        length = 22 + _CHARACTER * len(name)
        if x > _LEFT and x + length > right:
            x, y = float(_LEFT), y + 15
        parts.append(_rectangle(x, y - 8, 9, 9, color))
        parts.append(_text(x + 13, y, name, "start"))
        x += length
    return parts, y + 12


def _grid(panel: Panel, x_axis: _Axis, y_axis: _Axis, top: float, rows: int) -> list[str]:
    left, right, bottom = x_axis.begin, x_axis.end, float(_HEIGHT - _BOTTOM)
    parts = []
    for i, tick in enumerate(x_axis.ticks):
        x = x_axis(tick)
        if not panel.x_names:
            parts.append(_line(x, top, x, bottom, _PALE))
        text = panel.x_names[i] if i < len(panel.x_names) else number(tick)
        parts.append(_text(x, bottom + 16, text, "middle"))
    every = 1 + rows // 13  # names that do not fit are left out
    for i, tick in enumerate(y_axis.ticks):
        y = y_axis(tick)
        if not rows:
            parts.append(_line(left, y, right, y, _PALE))
        if i % every == 0:
            text = panel.y_names[i] if i < len(panel.y_names) else number(tick)
            parts.append(_text(left - 6, y + 4, text, "end"))
    parts.append(_line(left, bottom, right, bottom, _GREY))
    parts.append(_line(left, top, left, bottom, _GREY))
    parts.append(_text((left + right) / 2, bottom + 34, panel.x_label, "middle"))
    middle = (top + bottom) / 2
    turned = _text(0, 0, panel.y_label, "middle")
    parts.append(f"<g transform='translate(14 {middle:.1f}) rotate(-90)'>{turned}</g>")
    return parts


def _span(span: Span, x_axis: _Axis, y_axis: _Axis, color: str) -> list[str]:
    height = y_axis(1.0) - y_axis(0.0)
    gap = min(1.5, height / 8)
    x, y = x_axis(span.start), y_axis(span.row - 0.5)
    width = x_axis(span.end) - x
    width -= min(1.0, width / 8)  # so that neighbours stay apart
    parts = [_rectangle(x, y + gap, width, height - 2 * gap, color)]
    if span.label:
        middle = (x + x_axis(span.end)) / 2
        parts.append(_text(middle, y + height / 2 + 4, span.label, "middle", 10, "white"))
    return parts


def _bars(panel: Panel, x_axis: _Axis, y_axis: _Axis, colors: dict[str, str]) -> list[str]:
    width = 0.8 / max(1, len(panel.bars))  # of the 1 that a place has
    floor = y_axis(y_axis.low)
    parts = []
    for i, (name, bars) in enumerate(panel.bars):
        for x, y in bars:
            if y > y_axis.low:
                left, high = x_axis(x - 0.4 + i * width), y_axis(y)
                size = x_axis(x - 0.4 + (i + 1) * width) - left
                parts.append(_rectangle(left, high, size, floor - high, colors[name]))
    return parts


def _rectangle(x: float, y: float, width: float, height: float, color: str) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' fill='{color}'/>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}'/>"


def _text(x: float, y: float, text: str, anchor: str, size: int = 11, color: str = "#222") -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)  # XML has no other controls
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_FONT} font-size='{size}' "
        f"fill='{color}'>{escape(printable)}</text>"
    )
