"""Writes results into the pages of the learning path:

    python -m nano_inference.learn.pages docs/learn 1 2.3        runs them here, on the CPU
    python -m nano_inference.learn.pages docs/learn --from DIR   takes what `learn --out DIR` kept

It replaces, in each page, what stands between <!-- result 2.3 --> (on a card <!-- result 2.3 cuda
-->) and <!-- end -->. The plots go to the folder's img/."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .catalog import find
from .experiment import table
from .run import keep, run

RESULT = re.compile(
    r"<!-- result (?P<key>\S+)(?P<device> cuda)? -->\n(?P<text>.*?)<!-- end -->\n", re.DOTALL
)
PENDING = "*Not run on a card yet.*\n"
"""Stands in a page until a card's result is written there."""


def markdown(result: Mapping[str, Any]) -> str:
    """Of Result.as_dict()."""
    parts = [
        f"**Expected:** {result['expectation']}",
        table(result["columns"], result["rows"]),
        f"**Outcome:** {result['outcome']}",
    ]
    if result["plot"] is not None:
        name = Path(result["plot"]).name
        parts.append(f"![{result['experiment']} {result['title']}](img/{name})")
    parts.append(f"*{result['machine']}, {result['date']}*")
    return "\n\n".join(parts) + "\n"


def fill(text: str, result: Mapping[str, Any]) -> str:
    """The page with this result in its place, if it has one."""
    device = "" if result["device"] == "cpu" else f" {result['device']}"
    mark = (result["experiment"], device)

    def replaced(match: re.Match[str]) -> str:
        if (match["key"], match["device"] or "") != mark:
            return match[0]
        return f"<!-- result {mark[0]}{device} -->\n{markdown(result)}<!-- end -->\n"

    return RESULT.sub(replaced, text)


def write(folder: Path, kept: Path) -> None:
    """Everything that is kept and has a place in a page of the folder."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md"))}
    for path in sorted(kept.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        filled = {page: fill(text, result) for page, text in pages.items()}
        if filled == pages:
            print(f"no page has a place for {path.stem}, or it is there already", file=sys.stderr)
        elif result["plot"] is not None:
            svg = path.with_suffix(".svg")
            shutil.copyfile(svg, folder / "img" / svg.name)
        pages = filled
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes results into the pages.")
    parser.add_argument("folder", type=Path, help="docs/learn")
    parser.add_argument("what", nargs="*", help="stages or experiments, run here on the CPU")
    parser.add_argument("--from", dest="kept", type=Path, help="folder with results kept before")
    args = parser.parse_args()
    if args.kept is not None:
        write(args.folder, args.kept)
    with tempfile.TemporaryDirectory() as made:
        for experiment in find(args.what):
            if "cpu" in experiment.devices:
                result = run(experiment, say=print, show_progress=sys.stderr.isatty())
                keep(result, Path(made))
        write(args.folder, Path(made))


if __name__ == "__main__":
    main()
