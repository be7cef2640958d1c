"""What an experiment is, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..plot import Panel, number

if TYPE_CHECKING:
    from .lab import Lab

Cell = str | int | float


class Missing(Exception):
    """What an experiment needs and this machine has not."""


@dataclass
class Report:
    """What came out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    outcome: str
    """One sentence that holds the expectation against what happened."""
    counts: dict[str, float] = field(default_factory=dict)
    """Steps, operations, bytes, slots: the same on every machine. Tests look at these."""
    panels: list[Panel] = field(default_factory=list)
    """Of the plot; none: no plot."""


@dataclass(frozen=True)
class Experiment:
    key: str
    """Stage and number: "2.3"."""
    title: str
    question: str
    run: Callable[[Lab], Report]
    """Calls lab.expect() once, before it runs anything it has an expectation of."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it has a meaning."""

    @property
    def stage(self) -> int:
        return int(self.key.split(".")[0])


@dataclass(frozen=True)
class Result:
    """A report with what was expected and where it ran."""

    experiment: Experiment
    device: str
    expectation: str
    report: Report
    seconds: float
    machine: str = ""
    date: str = ""
    plot: str | None = None
    """Path of the SVG."""

    @property
    def name(self) -> str:
        """Of the files that keep it."""
        return self.experiment.key + ("" if self.device == "cpu" else f"-{self.device}")

    def as_dict(self) -> dict[str, Any]:
        e, r = self.experiment, self.report
        return {
            "experiment": e.key,
            "title": e.title,
            "question": e.question,
            "device": self.device,
            "machine": self.machine,
            "date": self.date,
            "expectation": self.expectation,
            "columns": list(r.columns),
            "rows": [list(row) for row in r.rows],
            "outcome": r.outcome,
            "counts": r.counts,
            "seconds": round(self.seconds, 3),
            "plot": self.plot,
        }


def cell(value: Cell) -> str:
    """Three digits of a fraction; whole numbers whole."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:.0f}" if abs(value) < 1e7 else number(float(f"{value:.3g}"))
    if abs(value) >= 1e4:
        return number(float(f"{value:.3g}"))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned for a terminal, and a Markdown table, too: columns that hold numbers to the right."""
    text = [list(columns), *([cell(value) for value in row] for row in rows)]
    right = [any(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    widths = [max(3, *(len(line[i]) for line in text)) for i in range(len(columns))]

    def padded(line: Sequence[str]) -> str:
        pairs = zip(line, widths, right, strict=True)
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in pairs)
        return "| " + " | ".join(cells) + " |"

    rule = "".join("|" + "-" * (w + 1) + "-:"[r] for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([padded(text[0]), rule, *map(padded, text[1:])])
