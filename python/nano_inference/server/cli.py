"""The command `nano-inference serve`: its options follow from the schema in args.py."""

from __future__ import annotations

import os
from typing import Any

import click

from .args import GROUPS, OPTIONS, Option, load_args

_METAVARS = {
    "int": "N",
    "float": "X",
    "Size": "SIZE",
    "str": "TEXT",
    "list[str]": "TEXT",
    "list[int]": "N,N,…",
}


class SchemaOption(click.Option):
    """Hands on the text as given: args.py reads flags, environment and file alike."""

    def __init__(self, known: Option) -> None:
        self.group = known.group
        names = [known.name, known.flag, *known.aliases]
        extra: dict[str, Any] = {"metavar": _METAVARS.get(known.kind)}
        if known.kind == "bool":
            names = [known.name, f"{known.flag}/--no-{known.flag[2:]}"]
            extra = {"is_flag": True}
        elif known.kind == "list[str]":
            extra["multiple"] = True
        if known.choices:
            extra["metavar"] = "|".join(known.choices)
        default = f"  [{known.default_text}]" if known.default_text else ""
        super().__init__(names, default=None, help=known.doc + default, **extra)


class ServeCommand(click.Command):
    """--help by groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in (*GROUPS, ""):
            rows = [
                row
                for param in self.get_params(ctx)
                if getattr(param, "group", "") == group and (row := param.get_help_record(ctx))
            ]
            with formatter.section(group or "Other"):
                formatter.write_dl(rows, col_max=32)


def _set_debug(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.find_root().command.debug = True  # type: ignore[attr-defined]


_DEBUG = click.Option(
    ["--debug"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_debug,
    help="Show where an error came from.",
)
_CONFIG = click.Option(
    ["--config"], metavar="FILE", help="TOML file; its keys are the names of the options with _."
)


def _serve(**flags: Any) -> int:
    """Serve a model over HTTP to any client of the OpenAI API.

    Each option may also be an environment variable (--log-level: NANO_INFERENCE_LOG_LEVEL) or a key
    of the file that --config names (log_level = "debug"). The command line comes first, then the
    environment, the file, and the defaults in brackets. SIZE is in bytes, or as 4GB or 16MiB. What
    is a list may be given several times, or as a,b in a variable.
    """
    args = load_args(flags, os.environ)
    from .run import run_server

    return run_server(args)


serve = ServeCommand(
    "serve",
    params=[_CONFIG, *map(SchemaOption, OPTIONS.values()), _DEBUG],
    callback=_serve,
    help=_serve.__doc__,
    context_settings={"max_content_width": 100},
)
