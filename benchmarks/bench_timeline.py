"""What the card does between two decode steps, and whether it waits for the host.

    python benchmarks/bench_timeline.py [--model qwen3-0.6b] [--check] [--json] [--save]

256 requests of 128 tokens in and 128 out, through the engine of bench_gpu.py, under torch's
profiler: it listens to the driver (CUPTI), so it sees the engine's kernels, copies and calls, all
by one clock. Of the run only the steps count in which all requests decode. A step goes from the
beginning of its first kernel (embed) to that of the next step's. It is one graph, whose last kernel
writes the tokens to the host's memory; the next step's inputs come meanwhile, in a stream of their
own.

- idle: neither a kernel nor a copy runs. Between two steps that is the most that the card can have
  waited for the host; the card's own delays in starting copies and graphs are in it, too.
- waited for the host: the part of idle time before the host's call returned that put the next
  kernel or copy into the stream.
- ahead: from the return of the call that launched the next step's graph to the end of this
  step's last kernel. Below 0 the card was there first.
- the host works: a step less what the engine's thread spends in cudaEventSynchronize.

The profiler makes each launch and each kernel slower: compare the step's time with the one without
it. The host's lane in the picture is its calls to CUDA; what lies between them is the engine's
(deliver, schedule, build). The engine's own trace is off, for it costs time itself, and knows only
when a step was begun and when its tokens had come.

--check fails if the card is idle for more than 30 us between two steps, in the median."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_gpu import MAX_MODEL_LEN, MODELS, PROMPT, Prompts, driver, make_engine, seconds
from common import HERE, commit, markdown_table, save

from nano_inference import _core
from nano_inference.plot import Panel, Span, render

RUNNING, OUTPUT = 256, 128
assert PROMPT + OUTPUT <= MAX_MODEL_LEN
EDGE = 16  # steps left out at both ends: some requests begin, and so end, some steps after others
LIMIT = 30.0  # us of idle time between two steps
IDLE_GAP = "of that, idle"

FIRST, PROMPTS = "embed_kernel", "prefill"  # parts of kernels' names
LAST = ("draw_kernel", "choose_kernel")
SAMPLER = ("units_kernel", "segment_kernel", "draw_kernel")  # the first that a step has
CALLS = ("cudaMemcpyAsync", "cudaGraphLaunch", "cudaLaunch", "cudaEventSynchronize")
WAIT = "cudaEventSynchronize"


class Event(NamedTuple):
    """A kernel or a copy on the card, or a call of the host. Times are in microseconds."""

    name: str
    start: float
    end: float
    issued: float | None = None
    """When the host's call returned that put it into the stream; None: not known."""


@dataclass
class Step:
    """Microseconds; what is None is not known."""

    period: float
    busy: float
    """Some kernel runs."""
    idle_inside: float
    """Before the end of its last kernel."""
    gap: float
    """From the end of its last kernel to the beginning of the next step's first one."""
    idle_gap: float
    """Neither a kernel nor a copy runs."""
    late: float | None
    """Idle in the whole step, for the host had not asked yet."""
    ahead: float | None
    """At which the next step was launched, before `gap` begins."""


# -- Figures --------------------------------------------------------------------------------------


def is_copy(event: Event) -> bool:
    return event.name.startswith("Memcpy")


def union(events: Iterable[Event], tolerance: float = 0.0) -> list[tuple[float, float]]:
    """When something runs: spans in order, more than `tolerance` apart. Kernels may overlap, for
    one may be put on the card before the one before it has ended."""
    spans: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda e: e.start):
        if spans and event.start <= spans[-1][1] + tolerance:
            spans[-1] = (spans[-1][0], max(spans[-1][1], event.end))
        else:
            spans.append((event.start, event.end))
    return spans


def split(events: Iterable[Event]) -> list[list[Event]]:
    """By steps, each with the next one's first kernel as its last event."""
    ordered = sorted(events, key=lambda e: e.start)
    firsts = [i for i, event in enumerate(ordered) if FIRST in event.name]
    return [ordered[a : b + 1] for a, b in zip(firsts, firsts[1:], strict=False)]


def decodes(steps: Sequence[list[Event]]) -> list[list[Event]]:
    """The longest row of steps that sample and have no prompts in them."""
    best: list[list[Event]] = []
    row: list[list[Event]] = []
    for step in steps:
        names = [event.name for event in step[:-1]]
        is_whole = any(last in name for name in names for last in LAST)
        if is_whole and not any(PROMPTS in name for name in names):
            row.append(step)
        else:
            row = []
        if len(row) > len(best):
            best = row
    return best


def measure_step(step: Sequence[Event]) -> Step:
    """Of what split() gives."""
    *own, following = step
    kernels = [event for event in own if not is_copy(event)]
    last = max(event.end for event in kernels)
    inside = between = 0.0
    late: float | None = 0.0
    spans = union(step)
    for (_, begin), (end, _) in zip(spans, spans[1:], strict=False):
        if begin < last:
            inside += end - begin
        else:
            between += end - begin
        issued = next(event.issued for event in step if event.start == end)
        if late is not None:  # a graph may begin before its call returns
            late = None if issued is None else late + max(0.0, min(issued, end) - begin)
    return Step(
        period=following.start - step[0].start,
        busy=sum(end - start for start, end in union(kernels)),
        idle_inside=inside,
        gap=max(0.0, following.start - last),
        idle_gap=between,
        late=late,
        ahead=None if following.issued is None else last - following.issued,
    )


def host_work(step: Sequence[Event], calls: Iterable[Event]) -> float | None:
    """Of the step's time, what the engine's thread does not wait in."""
    begin, end = step[0].start, step[-1].start
    waits = [call for call in calls if call.name.startswith(WAIT)]
    if not waits:
        return None
    return end - begin - sum(max(0.0, min(w.end, end) - max(w.start, begin)) for w in waits)


def quantity(name: str, unit: str, values: Sequence[float | None]) -> list[dict[str, Any]]:
    """A row of the table; none where something is not known."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return []
    low, middle, high, top = (float(v) for v in np.percentile(known, (0, 50, 90, 100)))
    row = {"of a step": name, "unit": unit, "min": low, "median": middle, "p90": high, "max": top}
    return [row]


def table_rows(
    steps: Sequence[list[Event]], calls: Sequence[Event], unprofiled: Sequence[float]
) -> list[dict[str, Any]]:
    found = [measure_step(step) for step in steps]
    idle = [100 * (s.idle_inside + s.idle_gap) / s.period for s in found]
    return [
        *quantity("all of it, without the profiler", "us", unprofiled),
        *quantity("all of it", "us", [s.period for s in found]),
        *quantity("kernels run", "us", [s.busy for s in found]),
        *quantity("idle before the end of its last kernel", "us", [s.idle_inside for s in found]),
        *quantity("last kernel to the next step's first", "us", [s.gap for s in found]),
        *quantity(IDLE_GAP, "us", [s.idle_gap for s in found]),
        *quantity("waited for the host", "us", [s.late for s in found]),
        *quantity("the next one launched ahead by", "us", [s.ahead for s in found]),
        *quantity("the host works", "us", [host_work(step, calls) for step in steps]),
        *quantity("idle", "%", idle),
    ]


# -- The picture ----------------------------------------------------------------------------------

LANES = ("host", "copies", "forward", "sampler")


def lanes(step: Sequence[Event]) -> dict[str, list[Event]]:
    """The step's own events."""
    own = step[:-1]
    starts = ([event.start for event in own if part in event.name] for part in SAMPLER)
    sampler = max(next(filter(None, starts), [step[-1].start]))
    found: dict[str, list[Event]] = {"copies": [], "forward": [], "sampler": []}
    for event in own:
        lane = "forward" if event.start < sampler else "sampler"
        found["copies" if is_copy(event) else lane].append(event)
    return found


def panel(
    title: str, steps: Sequence[list[Event]], calls: Sequence[Event], begin: float, end: float
) -> Panel:
    """What happens in [begin, end). Spans that could not be told apart are drawn as one."""
    spans: list[Span] = []

    def draw(row: int, some: Iterable[tuple[float, float]], name: str) -> None:
        clipped = [(max(a, begin) - begin, min(b, end) - begin) for a, b in some]
        spans.extend(Span(row, a, b, name) for a, b in clipped if a < b)

    for name in dict.fromkeys(call.name for call in calls):
        draw(0, [(call.start, call.end) for call in calls if call.name == name], name)
    for step in steps:
        for name, events in lanes(step).items():
            draw(LANES.index(name), union(events, (end - begin) / 2000), name)
    return Panel(title, "us", "", spans=spans, y_names=LANES, wide=True)


def picture(steps: Sequence[list[Event]], calls: Sequence[Event]) -> str:
    """Three steps from the middle, and the two boundaries between them at a larger scale (SVG)."""
    three = steps[len(steps) // 2 - 1 :][:3]
    panels = [panel("three steps", three, calls, three[0][0].start, three[-1][-1].start)]
    for number, step in enumerate(three[:2], 1):
        sampled = max(event.end for event in step[:-1] if not is_copy(event))
        begin, end = sampled - 50, step[-1].start + 50
        panels.append(panel(f"from step {number} to {number + 1}", three, calls, begin, end))
    return render(panels, f"Decode steps of {RUNNING} sequences")


# -- Measuring ------------------------------------------------------------------------------------


def torch_with_card() -> Any:
    try:
        import torch
    except ImportError:
        raise SystemExit("bench_timeline.py needs torch with CUDA, for its profiler") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no card, so its profiler sees nothing")
    return torch


def read_profile(raw: Sequence[Any], on_card: Any) -> tuple[list[Event], list[Event]]:
    """What ran on the card, and the host's calls, of kineto's events."""
    origin = min((event.start_ns() for event in raw), default=0)

    def event(of: Any, issued: float | None = None) -> Event:
        start = (of.start_ns() - origin) / 1e3
        return Event(of.name(), start, start + of.duration_ns() / 1e3, issued)

    card = [of for of in raw if of.device_type() == on_card]
    host = [of for of in raw if of.device_type() != on_card and of.name().startswith(CALLS)]
    calls = [event(of) for of in host]
    returned = {of.correlation_id(): call.end for of, call in zip(host, calls, strict=True)}
    return [event(of, returned.get(of.correlation_id())) for of in card], calls


def profiled(torch: Any, engine: _core.Engine, prompts: Prompts) -> tuple[Any, Any]:
    """read_profile() of one run."""
    kinds = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA], acc_events=True) as seen:
        seconds(engine, prompts(RUNNING, PROMPT), OUTPUT)
        torch.cuda.synchronize()
    raw = seen.profiler.kineto_results.events()
    return read_profile(raw, torch.autograd.DeviceType.CUDA)


def step_times(engine: _core.Engine, prompts: Prompts, repeats: int) -> list[float]:
    """Microseconds, by the clock, as bench_gpu.py has them."""
    times = []
    for _ in range(repeats):
        short = seconds(engine, prompts(RUNNING, PROMPT), 1)
        long = seconds(engine, prompts(RUNNING, PROMPT), OUTPUT)
        times.append(1e6 * (long - short) / (OUTPUT - 1))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="qwen3-0.6b", choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="runs without the profiler")
    parser.add_argument("--device", type=int, default=0, help="number of the card")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--check", action="store_true", help="fail if the card waits too long")
    parser.add_argument("--svg", type=Path, help="draw three steps into this file")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/timeline.*")
    args = parser.parse_args()
    torch = torch_with_card()
    cards = _core.cuda_devices()
    if not cards:
        raise SystemExit(_core.cuda_error())
    torch.cuda.set_device(args.device)

    about: dict[str, Any] = {
        "card": cards[args.device],
        "driver": driver(args.device),
        "torch": torch.__version__,
        "model": args.model,
        "running": RUNNING,
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or (commit() if shutil.which("git") else "unknown"),
    }
    engine = make_engine(MODELS[args.model], args.device, invariant=True)
    prompts = Prompts(50_000)
    seconds(engine, prompts(RUNNING, PROMPT), OUTPUT)  # touch everything once
    unprofiled = step_times(engine, prompts, args.repeats)
    events, calls = profiled(torch, engine, prompts)
    engine.shutdown()
    if not events:
        raise SystemExit("the profiler saw no kernels: may this user read the driver's counters?")
    steps = decodes(split(events))[EDGE:-EDGE]
    if len(steps) < 3:
        raise SystemExit(f"too few decode steps among {len(events)} events of the card")

    rows = table_rows(steps, calls, unprofiled)
    about["steps"] = len(steps)
    result = {"context": about, "results": rows}
    print(json.dumps(result, indent=2) if args.json else markdown_table(rows))
    if args.save:
        save("timeline", result, f"Decode steps of {RUNNING} sequences on a card", rows)
    for file in [args.svg] * (args.svg is not None) + [HERE / "results/timeline.svg"] * args.save:
        file.write_text(picture(steps, calls))
    idle = next(row["median"] for row in rows if row["of a step"] == IDLE_GAP)
    if args.check and idle > LIMIT:
        raise SystemExit(f"idle for {idle:.1f} us between two steps; may be {LIMIT:.0f}")


if __name__ == "__main__":
    main()
