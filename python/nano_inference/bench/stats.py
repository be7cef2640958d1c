"""From recorded times to figures. The definitions are in docs/benchmarking.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .records import Record

PERCENTILES = (50, 90, 95, 99)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and percentiles (linear between ranks, as numpy's), minimum and maximum."""
    if not len(values):
        return {}
    found = {"mean": float(np.mean(values))}
    for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found["median" if p == 50 else f"p{p}"] = float(value)
    return found | {"min": float(np.min(values)), "max": float(np.max(values))}


# -- One request ----------------------------------------------------------------------------------


def ttft(record: Record) -> float:
    return record.times[0] - record.start


def tpot(record: Record) -> float | None:
    """None for an answer whose tokens all came at once."""
    after_first = record.output_tokens - record.event_tokens()[0]
    if after_first <= 0 or len(record.times) < 2:
        return None
    return (record.times[-1] - record.times[0]) / after_first


def e2e(record: Record) -> float:
    return record.end - record.start


def event_gaps(record: Record) -> list[float]:
    return np.diff(record.times).tolist()


def token_gaps(record: Record) -> list[float]:
    """Time between tokens: an event of k tokens after a gap g counts as k gaps of g / k."""
    k = np.asarray(record.event_tokens()[1:], np.int64)
    return np.repeat(np.diff(record.times) / k, k).tolist()


# -- Service level objectives ---------------------------------------------------------------------

_MEASURES = {"ttft": ttft, "tpot": tpot, "e2e": e2e, "e2el": e2e}


@dataclass(frozen=True)
class Objective:
    name: str
    milliseconds: float

    def met(self, record: Record) -> bool:
        value = _MEASURES[self.name](record)
        return value is None or value * 1e3 <= self.milliseconds


def parse_goodput(words: Sequence[str]) -> list[Objective]:
    """From "ttft:500", "tpot:50", "e2e:2000"."""
    objectives = []
    for word in words:
        name, _, text = word.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if name not in _MEASURES or not limit > 0:
            raise ValueError(
                f"--goodput {word!r}: must be ttft, tpot or e2e with milliseconds, as ttft:500"
            )
        objectives.append(Objective(name, limit))
    return objectives


# -- All requests ---------------------------------------------------------------------------------


def summarize(
    records: Sequence[Record], seconds: float, objectives: Sequence[Objective] = ()
) -> dict[str, Any]:
    """The figures of a run that took `seconds`. Times are in milliseconds."""
    good = [r for r in records if r.ok]
    output = sum(r.output_tokens for r in good)
    prompt = sum(r.prompt_tokens or 0 for r in good)
    events = sum(len(r.times) for r in good)
    tpots = [value for r in good if (value := tpot(r)) is not None]
    found: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(records),
        "completed": len(good),
        "failed": len(records) - len(good),
        "failures": _failures(records),
        "prompt_tokens": prompt,
        "cached_tokens": sum(r.cached_tokens or 0 for r in good),
        "output_tokens": output,
        "output_tokens_counted_by": _counted_by(good),
        "events": events,
        "tokens_per_event": output / events if events else None,
        "tokens_of_each_event_known": all(r.event_tokens_known for r in good),
        "request_throughput": len(good) / seconds,
        "output_throughput": output / seconds,
        "total_throughput": (output + prompt) / seconds,
        "max_in_flight": _most_in_flight(records),
        "ttft_ms": spread([1e3 * ttft(r) for r in good]),
        "tpot_ms": spread([1e3 * t for t in tpots]),
        "itl_ms": spread([1e3 * g for r in good for g in token_gaps(r)]),
        "event_gap_ms": spread([1e3 * g for r in good for g in event_gaps(r)]),
        "e2e_ms": spread([1e3 * e2e(r) for r in good]),
        "late_ms": spread([1e3 * r.late for r in records]),
    }
    if objectives:
        met = sum(all(o.met(r) for o in objectives) for r in good)
        found["goodput"] = {
            "objectives_ms": {o.name: o.milliseconds for o in objectives},
            "requests": met,
            "share": met / len(records) if records else 0.0,
            "requests_per_second": met / seconds,
        }
    return found


def _failures(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By reason, the most frequent first, each with the words of the first one."""
    groups: dict[str, dict[str, Any]] = {}
    for r in records:
        if r.error is not None:
            group = groups.setdefault(
                r.error, {"reason": r.error, "count": 0, "example": r.message}
            )
            group["count"] += 1
    return sorted(groups.values(), key=lambda g: -g["count"])


def _counted_by(good: Sequence[Record]) -> str:
    told = sum(r.completion_tokens is not None for r in good)
    if told == len(good):
        return "usage"
    return "events" if told == 0 else "usage or, without it, events"


def in_flight(records: Sequence[Record]) -> list[tuple[float, int]]:
    """(time, requests in flight from then on)."""
    lasting = [r for r in records if r.end > r.start]
    changes = sorted([(r.start, 1) for r in lasting] + [(r.end, -1) for r in lasting])
    steps, now = [], 0
    for time, change in changes:
        now += change
        steps.append((time, now))
    return steps


def _most_in_flight(records: Sequence[Record]) -> int:
    return max((count for _, count in in_flight(records)), default=0)
