"""Running an experiment and keeping its plot."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
    return Result(experiment, device, lab.expectation, report, time.perf_counter() - began)


def write_plot(result: Result, folder: Path) -> Result:
    """The result with the path of its plot, if it has one."""
    if not result.report.panels:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.experiment.key}.svg"
    title = f"{result.experiment.key}  {result.experiment.title}"
    path.write_text(render(result.report.panels, title), encoding="utf-8")
    return replace(result, plot=str(path))
