"""How results are shown and saved."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .records import Record

_COLUMNS = ("mean", "median", "p90", "p95", "p99")


def machine() -> dict[str, Any]:
    """Of this program; a server may run elsewhere."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return {
        "cpu": found[1] if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def command_line() -> list[str]:
    """How this program was started, without secrets."""
    words, hide = ["nano-inference"], False
    for word in sys.argv[1:]:
        words.append("***" if hide else re.sub(r"^--api-key=.*", "--api-key=***", word, flags=re.S))
        hide = word == "--api-key"
    return words


def context() -> dict[str, Any]:
    return {
        "version": __version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": machine(),
    }


def save(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def record_dict(record: Record, start: float) -> dict[str, Any]:
    """A request as it is saved: `start` and `end` in seconds of the run, each event's time in
    milliseconds after the request's start."""
    found: dict[str, Any] = {
        "start": round(record.start - start, 6),
        "end": round(record.end - start, 6),
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": record.cached_tokens,
        "finish_reason": record.finish_reason,
        "event_ms": [round(1e3 * (t - record.start), 3) for t in record.times],
    }
    if record.totals:
        found["event_totals"] = record.totals
    if record.error is not None:
        found |= {"error": record.error, "message": record.message}
    return found


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Spreads as lines of numbers."""
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{c:>11}" for c in _COLUMNS)]
    for name, values in rows:
        cells = (f"{values[c]:>11,.2f}" if c in values else f"{'-':>11}" for c in _COLUMNS)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def serve_report(result: dict[str, Any]) -> str:
    """The result of `bench serve` for people."""
    s, config = result["summary"], result["config"]
    rows = [
        ("server", f"{config['url']}, model {config['model']}"),
        ("load", config["load"]),
        ("prompts", config["prompts"]),
        ("requests", f"{s['completed']:,} done, {s['failed']:,} failed in {s['seconds']:.2f} s"),
        (
            "throughput",
            f"{s['request_throughput']:,.2f} requests/s, {s['output_throughput']:,.1f} output "
            f"tokens/s, {s['total_throughput']:,.1f} tokens/s with prompts",
        ),
        ("tokens", _tokens(s)),
        ("most at once", f"{s['max_in_flight']:,} requests"),
        ("generator", _generator(result["generator"])),
    ]
    if "goodput" in s:
        g = s["goodput"]
        limits = ", ".join(f"{name} ≤ {ms:g} ms" for name, ms in g["objectives_ms"].items())
        rows.append(
            (
                "goodput",
                f"{g['requests_per_second']:,.2f} requests/s ({g['share']:.1%}) with {limits}",
            )
        )
    times = [
        ("TTFT (ms)", s["ttft_ms"]),
        ("TPOT (ms)", s["tpot_ms"]),
        ("ITL, per token (ms)", s["itl_ms"]),
        ("gap between events (ms)", s["event_gap_ms"]),
        ("E2E (ms)", s["e2e_ms"]),
    ]
    parts = [pairs(rows), table(times)]
    if s["events"] and s["output_tokens"] != s["events"]:
        known = s["tokens_of_each_event_known"]
        how = "as counted" if known else "which are taken to be in proportion to its text"
        parts.append(
            f"An event carries {s['tokens_per_event']:.2f} tokens on average: ITL shares the gap "
            f"before an event among its tokens, {how}."
        )
    if s["failures"]:
        lines = [f"{f['count']:>7,} x {f['reason']}: {f['example']}" for f in s["failures"]]
        parts.append("\n".join(["failures", *lines]))
    return "\n\n".join(parts)


def _tokens(s: dict[str, Any]) -> str:
    text = f"{s['output_tokens']:,} output (counted by {s['output_tokens_counted_by']})"
    if s["prompt_tokens"]:
        text += f", {s['prompt_tokens']:,} prompt"
        text += f" of which {s['cached_tokens']:,} cached" if s["cached_tokens"] else ""
        text += f" ({s['prompt_tokens'] / max(1, s['completed']):.1f} a request)"
    return text


def _generator(g: dict[str, Any]) -> str:
    text = f"{g['cpu_seconds']:.2f} s of CPU ({g['cpu_share']:.0%} of a core)"
    if g["late_p99_ms"]:
        text += f", p99 lateness {g['late_p99_ms']:.2f} ms"
    return text
