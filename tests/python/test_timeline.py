"""What benchmarks/bench_timeline.py makes of a profile, from events made by hand."""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PERIOD = 100.0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bench_timeline")
    for name in ("bench_timeline", "bench_gpu", "common"):  # names that others may have
        sys.modules.pop(name, None)


def one_step(at: float, asked: float = -50.0, prompts: bool = False) -> list[tuple[Any, ...]]:
    """(name, start, end, issued): 84 us of kernels, 2 idle inside, 14 to the next step, of which
    copies take 5. The inputs of this step were uploaded before it."""
    attention = "prefill_kernel<8>" if prompts else "decode_kernel<8>"
    parts = [
        ("Memcpy HtoD (Pinned -> Device)", -6, -3, asked),
        ("void ni::embed_kernel<4>(EmbedParams)", 0, 10, asked + 2),
        (attention, 8, 50, asked + 2),  # put on the card before the one before it has ended
        ("segment_kernel", 52, 60, asked + 4),
        ("choose_kernel", 60, 86, asked + 4),
        ("Memcpy DtoH (Device -> Pinned)", 88, 90, asked + 5),
    ]
    return [(name, at + start, at + end, at + issued) for name, start, end, issued in parts]


def events(bench: Any, *steps: list[tuple[Any, ...]]) -> list[Any]:
    return [bench.Event(*part) for step in steps for part in step]


def test_a_step_by_parts(bench: Any) -> None:
    first, second = bench.split(events(bench, *(one_step(PERIOD * i) for i in range(3))))
    for step in (first, second):
        found = bench.measure_step(step)
        assert (found.period, found.busy) == (PERIOD, 84)
        assert (found.idle_inside, found.gap, found.idle_gap) == (2, 14, 9)
        assert found.late == 0 and found.ahead == 34  # launched at 52, this step ends at 86
    assert [event.name for event in first if bench.is_copy(event)] == [
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy HtoD (Pinned -> Device)",
    ]


def test_a_late_host(bench: Any) -> None:
    # The download ends at 90. The upload is asked for at 93, the graph at 95 + 2 at the earliest.
    (step,) = bench.split(events(bench, one_step(0), one_step(PERIOD, asked=-7.0)))
    found = bench.measure_step(step)
    assert found.late == 3 and found.ahead == 86 - 95
    # A call may return after the card has begun: no more than all idle time was waited.
    (step,) = bench.split(events(bench, one_step(0), one_step(PERIOD, asked=20.0)))
    assert bench.measure_step(step).late == 4 + 3
    unknown = [bench.Event(*part[:3]) for at in (0, PERIOD) for part in one_step(at)]
    found = bench.measure_step(bench.split(unknown)[0])
    assert found.late is None and found.ahead is None and found.idle_gap == 9


def test_only_steps_that_all_decode(bench: Any) -> None:
    kinds = [True, False, True, False, False, False, True, False]
    some = [one_step(PERIOD * i, prompts=kind) for i, kind in enumerate(kinds)]
    found = bench.decodes(bench.split(reversed(events(bench, *some))))
    assert [step[0].start for step in found] == [300, 400, 500]
    plain = [("draw_kernel", *part[1:]) if part[0] == "choose_kernel" else part for part in some[1]]
    assert len(bench.decodes(bench.split(events(bench, plain, some[2], some[3])))) == 1
    unsampled = [part for part in one_step(0) if part[0] != "choose_kernel"]
    assert bench.decodes(bench.split(events(bench, unsampled, one_step(PERIOD)))) == []
    assert bench.decodes([]) == []


def test_table(bench: Any) -> None:
    steps = bench.split(events(bench, *(one_step(PERIOD * i) for i in range(5))))
    waits = [bench.Event("cudaEventSynchronize", 100 * i + 20, 100 * i + 95) for i in range(5)]
    rows = bench.table_rows(steps, waits, [90.0, 91.0, 92.0])
    medians = {row["of a step"]: row["median"] for row in rows}
    assert medians == {
        "all of it, without the profiler": 91,
        "all of it": 100,
        "kernels run": 84,
        "idle before the end of its last kernel": 2,
        "last kernel to the next step's first": 14,
        "of that, idle": 9,
        "waited for the host": 0,
        "the next one launched ahead by": 34,
        "the host works": 25,
        "idle": 11,
    }
    unknown = [[event._replace(issued=None) for event in step] for step in steps]
    fewer = [row["of a step"] for row in bench.table_rows(unknown, [], [90.0])]
    assert len(rows) - len(fewer) == 3 and "waited for the host" not in fewer


def raw_event(name: str, start: int, end: int, device: str, number: int) -> Any:
    values = {"name": name, "start_ns": start, "duration_ns": end - start}
    values |= {"device_type": device, "correlation_id": number}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_calls_and_what_they_started(bench: Any) -> None:
    raw = [
        raw_event("cudaGraphLaunch", 10_000_000, 10_004_000, "cpu", 7),
        raw_event("aten::zeros", 10_000_000, 10_001_000, "cpu", 8),
        raw_event("embed_kernel", 10_005_000, 10_006_500, "cuda", 7),
        raw_event("choose_kernel", 10_007_000, 10_008_000, "cuda", 9),
    ]
    card, calls = bench.read_profile(raw, "cuda")
    assert calls == [("cudaGraphLaunch", 0, 4, None)]
    assert card == [("embed_kernel", 5, 6.5, 4), ("choose_kernel", 7, 8, None)]


def test_a_run_leaves_table_and_picture(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def late_by(asked: float) -> Any:
        some = [one_step(PERIOD * i, asked, prompts=i < 2) for i in range(50)]
        calls = [bench.Event("cudaGraphLaunch", PERIOD * i, PERIOD * i + 2) for i in range(50)]
        return lambda *_: (events(bench, *some), calls)

    torch = SimpleNamespace(__version__="2", cuda=SimpleNamespace(set_device=lambda _: None))
    engine = SimpleNamespace(shutdown=lambda: None)
    monkeypatch.setattr(bench, "torch_with_card", lambda: torch)
    monkeypatch.setattr(bench, "make_engine", lambda *_, **__: engine)
    monkeypatch.setattr(bench, "seconds", lambda *_: 1.0)
    monkeypatch.setattr(bench, "profiled", late_by(-50.0))
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(sys.modules["common"], "HERE", tmp_path)
    monkeypatch.setattr(bench._core, "cuda_devices", lambda: ["a card"])
    monkeypatch.setattr(sys, "argv", ["bench_timeline.py", "--save", "--check", "--commit", "x"])
    bench.main()
    assert "| of that, idle | us | 9 |" in capsys.readouterr().out
    results = tmp_path / "results"
    kept = json.loads((results / "timeline.json").read_text())
    assert kept["context"]["steps"] == 50 - 2 - 1 - 2 * bench.EDGE
    page = ET.fromstring((results / "timeline.svg").read_text())
    texts = {str(e.text) for e in page.iter("{http://www.w3.org/2000/svg}text")}
    assert {*bench.LANES, "three steps", "from step 2 to 3"} <= texts
    monkeypatch.setattr(bench, "LIMIT", 5.0)
    with pytest.raises(SystemExit, match=r"idle for 9.0 us between two steps; may be 5"):
        bench.main()
