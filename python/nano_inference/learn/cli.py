"""The command nano-inference learn."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..cli import DEBUG, JSON_OUTPUT

if TYPE_CHECKING:
    from .experiment import Experiment, Result


@click.command("learn")
@click.argument("what", nargs=-1, metavar="[STAGE|EXPERIMENT]...")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("learn"),
    show_default=True,
    help="Folder for plots (SVG) and results (JSON).",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the experiments run; auto is the CPU.",
)
@JSON_OUTPUT
@DEBUG
def learn(what: tuple[str, ...], out: Path, device: str, as_json: bool) -> None:
    """Learn how inference works, by experiments on this machine.

    Without an argument, the stages and experiments are listed. 2 runs all of stage 2, 2.3 one
    experiment. Each says what to expect before it runs, prints a table, and writes a plot (SVG),
    which a browser shows. docs/learn explains them, a page a stage.
    """
    from .catalog import STAGES, find
    from .experiment import Missing
    from .lab import choose_device

    if not what:
        click.echo(json.dumps(_listing(), indent=2) if as_json else _list_text())
        return
    chosen, device = find(what), choose_device(device)
    stages = {str(s.number) for s in STAGES} & set(what)
    elsewhere = [e for e in chosen if device not in e.devices]
    if elsewhere and not stages:
        e = elsewhere[0]
        raise ValueError(
            f"experiment {e.key} ({e.title}) has no meaning on {device}, only on "
            f"{' and '.join(e.devices)}: --device {e.devices[0]}"
        )
    results = []
    for e in chosen:
        if e in elsewhere:
            continue
        try:
            results.append(_run(e, device, out, as_json))
        except Missing as error:
            if not stages:
                raise ValueError(f"experiment {e.key} cannot run here: {error}") from None
            click.echo(f"left out: experiment {e.key}: {error}\n", err=True)
    if elsewhere:
        keys = ", ".join(e.key for e in elsewhere)
        other = "cuda" if device == "cpu" else "cpu"
        click.echo(f"left out: {keys} (only with --device {other})", err=True)
    if as_json:
        click.echo(json.dumps([r.as_dict() for r in results], indent=2, ensure_ascii=False))


def _run(experiment: Experiment, device: str, out: Path, quiet: bool) -> Result:
    """Runs it and shows it as it goes."""
    from .experiment import table
    from .run import keep, run

    def show(text: str = "", **style: bool) -> None:
        if not quiet:
            click.secho(text, **style)  # type: ignore[arg-type]

    show(f"{experiment.key}  {experiment.title}", bold=True)
    show(experiment.question)
    result = run(
        experiment,
        device,
        say=lambda text: show("\n" + _wrapped("Expected", text) + "\n"),
        show_progress=sys.stderr.isatty(),
    )
    result = keep(result, out)
    show(table(result.report.columns, result.report.rows))
    show("\n" + _wrapped("Outcome", result.report.outcome))
    if result.plot is not None:
        show(f"{'Plot:':10}{result.plot}")
    show()
    return result


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(text, 99, initial_indent=f"{name + ':':10}", subsequent_indent=" " * 10)


def _listing() -> list[dict[str, object]]:
    from .catalog import STAGES

    return [
        {
            "stage": stage.number,
            "title": stage.title,
            "about": stage.about,
            "experiments": [
                {"key": e.key, "title": e.title, "question": e.question, "devices": e.devices}
                for e in stage.experiments
            ],
        }
        for stage in STAGES
    ]


def _list_text() -> str:
    from .catalog import STAGES

    lines = []
    for stage in STAGES:
        lines.append(click.style(f"{stage.number}  {stage.title}", bold=True) + f": {stage.about}")
        for e in stage.experiments:
            where = "" if "cpu" in e.devices else " (--device cuda)"
            lines.append(f"   {e.key:<4} {e.question}{where}")
    lines += [
        "",
        "nano-inference learn 1 runs a stage, learn 1.3 one experiment. Each stage has a page in a",
        "clone of the repository: begin with docs/learn/1-basic-inference.md.",
    ]
    return "\n".join(lines)
