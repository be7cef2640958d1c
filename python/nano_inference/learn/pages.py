"""Writes what experiments gave on this machine into the pages of the learning path:

    python -m nano_inference.learn.pages docs/learn 1 2.3

runs them and replaces, in each page, what stands between <!-- result 2.3 --> and <!-- end -->. The
plots go to the folder's img/."""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

from .catalog import find
from .experiment import Result, table
from .run import run, write_plot

RESULT = re.compile(r"<!-- result (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def markdown(result: Result) -> str:
    report, key = result.report, result.experiment.key
    parts = [f"**Expected:** {result.expectation}", table(report.columns, report.rows)]
    parts.append(f"**Outcome:** {report.outcome}")
    if report.panels:
        parts.append(f"![{key} {result.experiment.title}](img/{key}.svg)")
    parts.append(f"*{about_machine()}, {datetime.date.today().isoformat()}*")
    return "\n\n".join(parts) + "\n"


def about_machine() -> str:
    from ..bench.report import machine
    from ..info import machine_info

    return f"{machine()['cpu']}, {machine_info(None, None)['device']}"


def fill(text: str, result: Result) -> str:
    """The page with this result in its place, if it has one."""
    key = result.experiment.key

    def replaced(match: re.Match[str]) -> str:
        if match[1] != key:
            return match[0]
        return f"<!-- result {key} -->\n{markdown(result)}<!-- end -->\n"

    return RESULT.sub(replaced, text)


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    for experiment in find(words):
        result = run(experiment, say=print, show_progress=sys.stderr.isatty())
        write_plot(result, folder / "img")
        for page in sorted(folder.glob("*.md")):
            page.write_text(fill(page.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
