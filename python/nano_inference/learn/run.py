"""Running an experiment and keeping what came out."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .. import _core
from ..plot import render
from .experiment import Experiment, Result
from .lab import Lab


def run(
    experiment: Experiment,
    device: str = "cpu",
    *,
    small: bool = False,
    say: Callable[[str], None] = lambda text: None,
    show_progress: bool = False,
) -> Result:
    lab = Lab(device, small=small, say=say, show_progress=show_progress)
    began = time.perf_counter()
    report = experiment.run(lab)
    if not lab.expectation:
        raise RuntimeError(f"experiment {experiment.key} stated no expectation")
    seconds, today = time.perf_counter() - began, datetime.date.today().isoformat()
    return Result(
        experiment, device, lab.expectation, report, seconds, about_machine(device), today
    )


def about_machine(device: str) -> str:
    """In a line, for the reader of a result."""
    from ..bench.report import machine
    from ..info import machine_info

    if device == "cuda":
        return _core.cuda_devices()[0]
    return f"{machine()['cpu']}{_generation()}, {machine_info(None, None)['device']}"


def _generation() -> str:
    """Virtual machines call many generations of a processor by one name; their numbers differ."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = [re.search(rf"^{key}\s*:\s*(\d+)$", text, re.M) for key in ("cpu family", "model")]
    family, model = (m[1] if m else "?" for m in found)
    return f" (family {family}, model {model})"


def keep(result: Result, folder: Path) -> Result:
    """Writes the result (JSON) and its plot (SVG), if it has one; returns it with the plot's
    path."""
    folder.mkdir(parents=True, exist_ok=True)
    if result.report.panels:
        path = folder / f"{result.name}.svg"
        title = f"{result.experiment.key}  {result.experiment.title}"
        path.write_text(render(result.report.panels, title), encoding="utf-8")
        result = replace(result, plot=str(path))
    text = json.dumps(result.as_dict(), indent=1, ensure_ascii=False)
    (folder / f"{result.name}.json").write_text(text + "\n", encoding="utf-8")
    return result
