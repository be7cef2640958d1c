"""The command nano-inference: generate, chat, serve, bench, learn, info, version.

Errors are one line on stderr. Exit codes: 0 done, 1 failed while running, 2 wrong usage or bad
input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from . import bundled
from .sizes import parse_size

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import Logprob, RequestOutput
    from .sampling_params import SamplingParams


class Commands(click.Group):
    """Turns every error into its line and exit code."""

    debug = False

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        self.debug = False
        try:
            name = prog_name or "nano-inference"
            sys.exit(super().main(words or ["--help"], name, **extra) or 0)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "nano-inference"
            fail(f"{error.format_message()} (see {where} --help)", 2)
        except click.ClickException as error:
            fail(error.format_message(), 1)
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            sys.exit(130)
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if self.debug:
                raise
            fail(describe(error), 2 if isinstance(error, ValueError) else 1)


class LazyCommand(click.Command):
    """A command, or a group of them, whose module is loaded when it is called."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._module = module

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        command = getattr(import_module(self._module, __package__), str(self.name))
        return command.make_context(info_name, args, parent, **extra)


def fail(message: str, code: int) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(code)


def describe(error: Exception) -> str:
    expected = (ValueError, RuntimeError, OSError, MemoryError)
    text = str(error)
    if isinstance(error, expected) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def options(*decorators: Any) -> Callable[[Any], Any]:
    """Several click options as one decorator, in the order of --help."""

    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, or a number with KB, MB, GB, TB, or KiB, MiB, GiB, TiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _set_debug(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(group := ctx.find_root().command, Commands):
        group.debug = True


DEBUG = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_debug,
    help="Show where an error came from.",
)
MODEL = click.option(
    "--model",
    metavar="FOLDER|NAME",
    help="Folder of a Hugging Face model, its name on the hub, or a bundled one: "
    f"{', '.join(bundled.MODELS)}.  [{bundled.DEFAULT}]",
)
SHAPE_OPTIONS = options(
    MODEL,
    click.option("--revision", help="Branch, tag or commit on the hub."),
    click.option("--device", help="auto, cpu, cuda, or cuda:N for card N.  [auto]"),
    click.option("--dtype", help="Of the weights: auto, float32, bfloat16, float16.  [auto]"),
    click.option(
        "--kv-cache-dtype",
        help="Of the KV cache: the same, or fp8 (CUDA only).  [as the weights]",
    ),
    click.option("--max-model-len", type=int, help="Longest prompt plus output, in tokens."),
    click.option(
        "--kv-cache-memory",
        "kv_cache_memory_bytes",
        type=Size(),
        help="Of the KV cache: bytes, or as 4GB.  [CPU: half of what is free; CUDA: what fits into "
        "90% of the card]",
    ),
    click.option("--num-threads", type=int, help="CPU threads.  [all]"),
    click.option("--isa", help="CPU instruction set (see info).  [the best]"),
)
SAMPLING_OPTIONS = options(
    click.option("--max-tokens", type=int, help="Most tokens of an answer."),
    click.option("--min-tokens", type=int, help="Fewest tokens of an answer."),
    click.option("--temperature", type=float, help="0: always the likeliest token."),
    click.option("--top-p", type=float, help="Sample from this much probability."),
    click.option("--top-k", type=int, help="Sample from this many tokens; 0: all."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one."),
    click.option("--repetition-penalty", type=float, help="Above 1: against repetition."),
    click.option("--presence-penalty", type=float, help="Against tokens already there."),
    click.option("--frequency-penalty", type=float, help="The same, by how often."),
    click.option("--stop", multiple=True, help="String that ends the answer; may be repeated."),
    click.option("--bad-words", multiple=True, help="Never say this; may be repeated."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token."),
    click.option("--seed", type=int, help="Same seed, same answer."),
)
JSON_OUTPUT = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from . import __version__

        click.echo(f"nano-inference {__version__}")
        ctx.exit()


@click.group(
    "nano-inference", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}
)
@DEBUG
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Run language models from Hugging Face on this machine.

    \b
    nano-inference generate "Once upon a time" --model FOLDER
    nano-inference chat --model FOLDER
    nano-inference serve --model FOLDER
    nano-inference info --model FOLDER
    """


# -- generate -------------------------------------------------------------------------------------


@main.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--file",
    type=click.File("r", encoding="utf-8"),
    help="Read prompts from a file, one a line; - is standard input.",
)
@SHAPE_OPTIONS
@SAMPLING_OPTIONS
@click.option("-n", "n", type=int, help="Answers to each prompt.")
@click.option("--logprobs", type=int, help="With --json: the likeliest tokens, and the chosen one.")
@click.option("--stream/--no-stream", default=None, help="Show the text as it comes.  [one prompt]")
@JSON_OUTPUT
@DEBUG
def generate(
    prompts: tuple[str, ...],
    file: TextIO | None,
    stream: bool | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Continue one or more prompts.

    Without a PROMPT, prompts are read from standard input, one a line. Several prompts run as one
    batch. --json prints an object a prompt and line.
    """
    texts = _read_prompts(prompts, file)
    one = len(texts) == 1 and (given["n"] or 1) == 1 and not as_json
    if stream and not one:
        raise click.UsageError("--stream shows one answer to one prompt, and no JSON")
    if given["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    changes = _sampling_changes(given)
    with _load(given, max_logprobs=given["logprobs"] or 0) as llm:
        params = _sampling_params(llm, changes, max_tokens=256)
        if one and stream is not False:
            _show_stream(llm.stream(texts[0], params))
            return
        for output in llm.generate(texts, params):
            if as_json:
                click.echo(json.dumps(_as_dict(output), ensure_ascii=False))
            else:
                _show_answers(output, len(texts) > 1)


def _read_prompts(prompts: tuple[str, ...], file: TextIO | None) -> list[str]:
    if prompts and file is not None:
        raise click.UsageError("give prompts or --file, not both")
    if prompts:
        return list(prompts)
    source = file or sys.stdin
    if file is None and source.isatty():
        raise click.UsageError("no prompt: give one, or --file, or pipe prompts in, one a line")
    try:
        texts = [line.rstrip("\n") for line in source if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts are not UTF-8: {error}") from None
    if not texts:
        raise click.UsageError("the input holds no prompt")
    return texts


def _show_stream(outputs: Iterable[RequestOutput]) -> str:
    """Prints an answer as it comes; returns it."""
    pieces = []
    try:
        for output in outputs:
            pieces.append(output.outputs[0].text)
            click.echo(pieces[-1], nl=False)
    finally:
        click.echo()
    return "".join(pieces)


def _show_answers(output: RequestOutput, with_prompt: bool) -> None:
    for choice in output.outputs:
        if with_prompt:
            click.secho(f"> {output.prompt}", bold=True)
        elif choice.index:
            click.echo("---")
        click.echo(choice.text)


def _as_dict(output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "outputs": [
            {
                "index": choice.index,
                "text": choice.text,
                "token_ids": choice.token_ids,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **({} if choice.logprobs is None else {"logprobs": _logprobs(choice.logprobs)}),
            }
            for choice in output.outputs
        ],
    }


def _logprobs(scores: list[dict[int, Logprob]]) -> list[list[dict[str, Any]]]:
    """For each token: itself first, then the likeliest ones."""
    return [
        [
            {"token_id": token, "token": s.decoded_token, "logprob": s.logprob, "rank": s.rank}
            for token, s in entry.items()
        ]
        for entry in scores
    ]


# -- chat -----------------------------------------------------------------------------------------

CHAT_HELP = """/reset        forget the conversation
/system TEXT  set the system message and start anew; without TEXT there is none
/exit         leave (or Ctrl-D); Ctrl-C stops an answer"""


@main.command()
@SHAPE_OPTIONS
@click.option("--system", help="System message.")
@SAMPLING_OPTIONS
@DEBUG
def chat(system: str | None, **given: Any) -> None:
    """Talk to a model. Ctrl-C stops an answer; /help lists the commands."""
    changes = _sampling_changes(given)
    with _load(given) as llm:
        if not llm.get_tokenizer().has_chat_template:
            raise ValueError("the model has no chat template; use generate")
        talk = Conversation(llm, _sampling_params(llm, changes, max_tokens=None), system)
        talk.run()
    if talk.failed and not talk.interactive:
        sys.exit(1)


class Conversation:
    """The loop of `chat`."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm, self._params = llm, params
        self.interactive = sys.stdin.isatty()
        self.failed = False  # an answer did
        self._reset(system)

    def _reset(self, system: str | None) -> None:
        self._system = system
        self._messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        if self.interactive:
            click.echo("/help lists the commands.", err=True)
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                click.echo("\n(/exit or Ctrl-D leaves)", err=True)
                continue
            if line is None or line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        """A line; None at the end of the input."""
        if self.interactive:
            import readline  # noqa: F401  (gives input() its editing and history)

            try:
                return input("> ").strip()
            except EOFError:
                click.echo()
                return None
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._reset(self._system)
        elif name == "/system":
            self._reset(rest.strip() or None)
        elif name == "/help":
            click.echo(CHAT_HELP)
        else:
            click.echo(f"unknown command {name}; /help lists the commands", err=True)

    def _answer(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            for output in self._llm.stream_chat(self._messages, self._params):
                pieces.append(output.outputs[0].text)
                click.echo(pieces[-1], nl=False)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False, err=True)
        except ValueError as error:  # the conversation has grown too long, say
            self._messages.pop()
            self.failed = True
            click.echo(f"error: {error}", err=True)
            return
        click.echo()
        self._messages.append({"role": "assistant", "content": "".join(pieces)})


# -- serve, bench, learn --------------------------------------------------------------------------

main.add_command(LazyCommand("serve", ".server.cli", "Serve a model over HTTP (OpenAI's API)."))
main.add_command(LazyCommand("bench", ".bench.cli", "Measure a server, or the engine alone."))
main.add_command(LazyCommand("learn", ".learn.cli", "Learn how inference works, by experiments."))

# -- info, version --------------------------------------------------------------------------------


@main.command(short_help="Show devices, memory, and what a model needs.")
@SHAPE_OPTIONS
@JSON_OUTPUT
@DEBUG
def info(as_json: bool, **given: Any) -> None:
    """Show devices, instruction sets and memory; with --model also what the model needs."""
    from .engine_args import EngineArgs
    from .info import machine_info, model_info, render

    options = _engine_options(given)
    for name in options:
        if "model" not in options and name not in ("device", "isa", "num_threads"):
            option = "--" + name.replace("_", "-").removesuffix("-bytes")
            raise click.UsageError(f"{option} needs --model")
    args = EngineArgs(**{"model": "none", **options})  # checks them
    found = {"machine": machine_info(args.isa, args.num_threads)}
    if "model" in options:
        found["model"] = model_info(args)
    click.echo(json.dumps(found, indent=2) if as_json else render(found))


@main.command()
@JSON_OUTPUT
@DEBUG
def version(as_json: bool) -> None:
    """Show the version."""
    from . import __version__

    click.echo(json.dumps({"version": __version__}) if as_json else __version__)


# -- Shared ---------------------------------------------------------------------------------------

_ENGINE_NAMES = (
    "model",
    "revision",
    "device",
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "kv_cache_memory_bytes",
    "num_threads",
    "isa",
)
_SAMPLING_NAMES = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


def _engine_options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _ENGINE_NAMES if given[name] is not None}


def _load(given: dict[str, Any], max_logprobs: int = 0) -> LLM:
    from .llm import LLM

    chosen = _engine_options(given)
    if "model" not in chosen:
        chosen["model"] = bundled.DEFAULT
        click.echo(bundled.NOTICE, err=True)
    chosen["use_tqdm_on_load"] = sys.stderr.isatty()
    chosen["max_logprobs"] = max_logprobs
    return LLM(**chosen, seed=None)  # without --seed, another answer each time


def _sampling_changes(given: dict[str, Any]) -> dict[str, Any]:
    """What the command line says of SamplingParams; checked before a model is loaded."""
    from .sampling_params import SamplingParams

    changes = {name: given[name] for name in _SAMPLING_NAMES if given.get(name) is not None}
    for name in ("stop", "bad_words"):
        if given[name]:
            changes[name] = list(given[name])
    if given["ignore_eos"]:
        changes["ignore_eos"] = True
    SamplingParams(**{"max_tokens": None, **changes})
    return changes


def _sampling_params(llm: LLM, changes: dict[str, Any], max_tokens: int | None) -> SamplingParams:
    """The model's recommendations, overridden by the command line. Where neither limits the answer,
    max_tokens does (None: as many as fit)."""
    if (recommended := llm.engine.loaded.generation.max_new_tokens) is not None:
        max_tokens = recommended
    if max_tokens is not None:
        max_tokens = max(max_tokens, changes.get("min_tokens", 0))
    return llm.get_default_sampling_params().clone(**{"max_tokens": max_tokens, **changes})


if __name__ == "__main__":
    main()
