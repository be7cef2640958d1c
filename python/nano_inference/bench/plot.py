"""The plots of a run: distributions of the times, and the course of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..plot import Panel, Points, cdf, render, stairs, thin
from . import stats
from .records import Record


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
        Panel("Requests in flight", "s", "requests", [("", thin(stairs(flight)))]),
        Panel("Output", "s", "tokens/s", [("", token_rate(good, start))]),
        Panel(
            "Time to first token, by start",
            "s",
            "ms",
            [("", thin(sorted((r.start - start, 1e3 * stats.ttft(r)) for r in good)))],
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
