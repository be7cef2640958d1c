"""The commands nano-inference bench serve, throughput and latency."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli import DEBUG, JSON_OUTPUT, SHAPE_OPTIONS, Commands, options

if TYPE_CHECKING:
    from ..llm import LLM
    from .load import LoadGenerator, LoadOptions, Run
    from .records import Record
    from .workload import Dataset, DatasetOptions

_FILE = click.Path(dir_okay=False, path_type=Path)
_POSITIVE = click.IntRange(min=1)
_NATURAL = click.IntRange(min=0)
_SECONDS = click.FloatRange(min=0, min_open=True)

_DATASET_OPTIONS = options(
    click.option("--num-prompts", type=_POSITIVE, default=100, show_default=True),
    click.option(
        "--dataset",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help='JSON or JSONL of texts, {"prompt": ...}, {"messages": ...} or ShareGPT '
        "conversations.  [random words]",
    ),
    click.option(
        "--input-len",
        type=_POSITIVE,
        default=128,
        show_default=True,
        help="Tokens of a random prompt.",
    ),
    click.option(
        "--output-len",
        type=_POSITIVE,
        help="Most tokens of an answer.  [128, or as the dataset says]",
    ),
    click.option(
        "--range-ratio",
        type=float,
        default=0.0,
        help="Lengths vary evenly by this share, up and down.  [0]",
    ),
    click.option(
        "--prefix-len",
        type=_NATURAL,
        default=0,
        help="Tokens that all random prompts begin with, besides --input-len.  [0]",
    ),
    click.option("--seed", type=_NATURAL, default=0, help="Of prompts and arrivals.  [0]"),
)
_SAVE = click.option("--save", type=_FILE, help="Write everything to this JSON file.")
_ENGINE_OPTIONS = options(
    SHAPE_OPTIONS,
    click.option("--max-num-seqs", type=int, help="Most sequences in a step.  [256]"),
    click.option("--max-num-batched-tokens", type=int, help="Most tokens in a step.  [2048]"),
)
_ENGINE_NAMES = (
    "model",
    "revision",
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "kv_cache_memory_bytes",
    "num_threads",
    "isa",
    "max_num_seqs",
    "max_num_batched_tokens",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure a server, or the engine alone."""


# -- serve ----------------------------------------------------------------------------------------


@bench.command(short_help="Load a server and measure its answers.")
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Or from OPENAI_API_KEY.")
@click.option("--insecure", is_flag=True, help="Do not check a server's TLS certificate.")
@click.option("--model", help="As the server calls it.  [the first of /v1/models]")
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
)
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Open loop: requests a second on average, or inf for all at once.  [inf]",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the gaps at --request-rate, gamma distributed: 1 is Poisson, less is burstier.  [1]",
)
@click.option("--concurrency", type=_POSITIVE, help="Closed loop: so many streams, each busy.")
@click.option(
    "--duration",
    type=_SECONDS,
    help="Send for so many seconds, the prompts again and again.  [each prompt once]",
)
@_DATASET_OPTIONS
@click.option("--ignore-eos", is_flag=True, help="Ask for answers of just --output-len tokens.")
@click.option("--temperature", type=float, help="[as the server likes]")
@click.option("--extra-body", default="{}", help="JSON: further fields of each request.")
@click.option("--warmup", type=_NATURAL, default=1, help="Requests before.  [1]")
@click.option("--timeout", type=_SECONDS, default=600.0, help="Of a request, in seconds.  [600]")
@click.option(
    "--goodput",
    multiple=True,
    metavar="NAME:MS...",
    help="Count requests within limits: ttft:500, tpot:50, e2e:2000; may be repeated.",
)
@click.option("--allow-failures", is_flag=True, help="Exit with 0 although requests failed.")
@_SAVE
@click.option("--plot", type=_FILE, help="Draw the distributions and the course as SVG.")
@JSON_OUTPUT
@DEBUG
def serve(**given: Any) -> None:
    """Load an OpenAI-compatible server and measure its streamed answers.

    \b
    nano-inference bench serve --concurrency 64 --num-prompts 256 --ignore-eos
    nano-inference bench serve --request-rate 4 --duration 60 --goodput ttft:500

    Times, tokens and percentiles are defined in docs/benchmarking.md. Exit code 1 if a request
    failed.
    """
    result = asyncio.run(_serve(given))
    if given["as_json"]:
        click.echo(json.dumps({k: v for k, v in result.items() if k != "requests"}, indent=2))
    else:
        from .report import serve_report

        click.echo(serve_report(result))
    if result["summary"]["failed"] and not given["allow_failures"]:
        sys.exit(1)


async def _serve(given: dict[str, Any]) -> dict[str, Any]:
    from . import report, stats
    from .http import Client
    from .load import LoadGenerator, first_model
    from .plot import run_plot

    objectives = stats.parse_goodput([w for text in given["goodput"] for w in text.split()])
    _check_serve(given)
    client = Client(given["base_url"], given["api_key"], verify=not given["insecure"])
    model = given["model"] or await first_model(client, given["timeout"])
    load = _load_options(given, model)
    dataset, config = await _serve_dataset(client, load, given)
    warm_up = dataset.prompts[given["num_prompts"] :]
    prompts = dataset.prompts[: given["num_prompts"]]
    generator = LoadGenerator(client, load)
    await generator.warm_up(warm_up)
    run = await _run(generator, prompts, load)
    client.close()
    summary = stats.summarize(run.records, run.seconds, objectives)
    result = {
        **report.context(),
        "config": config,
        "summary": summary,
        "generator": _generator_cost(run, summary),
        "requests": [report.record_dict(r, run.start) for r in run.records],
    }
    if given["save"] is not None:
        report.save(given["save"], result)
    if given["plot"] is not None:
        svg = run_plot(run.records, run.start, f"{config['url']}, {model}: {config['load']}")
        given["plot"].write_text(svg, encoding="utf-8")
    return result


def _check_serve(given: dict[str, Any]) -> None:
    if given["concurrency"] is not None:
        for name in ("request_rate", "burstiness"):
            if given[name] is not None:
                option = "--" + name.replace("_", "-")
                raise click.UsageError(f"{option} is for open loop, --concurrency is closed")
    elif given["duration"] is not None and given["request_rate"] in (None, float("inf")):
        raise click.UsageError("--duration needs --concurrency, or a --request-rate below inf")
    if given["plot"] is not None and given["plot"].suffix.lower() != ".svg":
        raise click.UsageError("--plot draws SVG: name a file that ends in .svg")
    for name in ("save", "plot"):  # before minutes of work
        if given[name] is not None and not given[name].resolve().parent.is_dir():
            raise click.UsageError(f"--{name}: there is no folder {given[name].parent}")


def _load_options(given: dict[str, Any], model: str) -> LoadOptions:
    from .load import LoadOptions

    try:
        extra = json.loads(given["extra_body"])
    except ValueError as error:
        raise click.UsageError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise click.UsageError("--extra-body must be a JSON object")
    if extra.get("n", 1) != 1 or extra.get("stream", True) is not True:
        raise click.UsageError("--extra-body: n must be 1 and stream true, else no time is right")
    return LoadOptions(
        model=model,
        endpoint=given["endpoint"],
        request_rate=given["request_rate"] or float("inf"),
        burstiness=given["burstiness"] or 1.0,
        concurrency=given["concurrency"],
        duration=given["duration"],
        timeout=given["timeout"],
        ignore_eos=given["ignore_eos"],
        temperature=given["temperature"],
        seed=given["seed"],
        extra_body=extra,
    )


def _dataset_options(given: dict[str, Any], more: int) -> DatasetOptions:
    """`more` prompts are for warming up."""
    from .workload import DatasetOptions

    return DatasetOptions(
        num_prompts=given["num_prompts"] + more,
        dataset=given["dataset"],
        input_len=given["input_len"],
        output_len=given["output_len"],
        range_ratio=given["range_ratio"],
        prefix_len=given["prefix_len"],
        seed=given["seed"],
    )


async def _serve_dataset(
    client: Any, load: LoadOptions, given: dict[str, Any]
) -> tuple[Dataset, dict[str, Any]]:
    """The prompts, those for warming up last; and the run's description."""
    from .load import PATHS, token_counter
    from .workload import make_dataset

    wanted = _dataset_options(given, given["warmup"])
    count, why_not = await token_counter(client, load)
    dataset = await make_dataset(wanted, count)
    about = f"{given['num_prompts']} {dataset.about}"
    if count is None and wanted.dataset is None:
        about += f" (no /tokenize: {why_not})"
    if load.concurrency is not None:
        how = f"closed loop, {load.concurrency} streams"
    elif load.request_rate == float("inf"):
        how = "open loop, all at once"
    else:
        how = f"open loop, {load.request_rate:g} requests/s, burstiness {load.burstiness:g}"
    if load.duration is not None:
        how += f", for {load.duration:g} s"
    options = asdict(load)
    options["request_rate"] = str(load.request_rate)  # JSON has no infinity
    config = {
        "url": client.base_url + PATHS[load.endpoint],
        "load": how,
        "prompts": about,
        "warm_up": given["warmup"],
        **options,
    }
    return dataset, config


async def _run(generator: LoadGenerator, prompts: Any, load: LoadOptions) -> Run:
    from tqdm import tqdm

    total = len(prompts) if load.duration is None else None
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=total, desc="Requests", unit="request", disable=None, mininterval=0.5) as bar:

        def done(_: Record) -> None:
            bar.update(1)

        return await generator.run(prompts, done)


def _generator_cost(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """What the load generator took from a machine that it may share with the server."""
    return {
        "cpu_seconds": run.cpu_seconds,
        "cpu_share": run.cpu_seconds / run.seconds,
        "cpu_us_per_event": 1e6 * run.cpu_seconds / max(1, summary["events"]),
        "late_p99_ms": summary["late_ms"].get("p99"),  # 0 in closed loop
    }


# -- throughput, latency --------------------------------------------------------------------------


@bench.command(short_help="Measure many prompts through the engine, without a server.")
@_DATASET_OPTIONS
@_ENGINE_OPTIONS
@click.option("--temperature", type=float, default=0.0, help="[0]")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="[ignore]")
@click.option("--warmup", type=_NATURAL, default=1, help="Prompts before.  [1]")
@_SAVE
@JSON_OUTPUT
@DEBUG
def throughput(**given: Any) -> None:
    """Run the prompts of `bench serve` through LLM.generate() and measure requests and tokens a
    second."""
    from . import offline

    wanted = _dataset_options(given, given["warmup"])
    with _llm(given) as llm:
        dataset = offline.dataset(llm, wanted)
        split = given["num_prompts"]
        found = offline.throughput(
            llm,
            dataset.prompts[:split],
            dataset.prompts[split:],
            given["temperature"],
            given["ignore_eos"],
        )
        config = _offline_config(llm) | {"prompts": f"{split} {dataset.about}"}

    def show() -> str:
        from .report import pairs

        f = found
        return pairs(
            [
                ("model", config["model"]),
                ("prompts", config["prompts"]),
                ("requests", f"{f['requests']:,} in {f['seconds']:.2f} s, {f['steps']:,} steps"),
                ("requests/s", f"{f['request_throughput']:,.2f}"),
                ("prompt tokens/s", f"{f['prompt_throughput']:,.1f}"),
                ("output tokens/s", f"{f['output_throughput']:,.1f}"),
                ("tokens/s", f"{f['total_throughput']:,.1f}"),
            ]
        )

    _finish(given, config, found, show)


@bench.command(short_help="Measure the time of one batch, without a server.")
@click.option("--batch-size", type=_POSITIVE, default=8, show_default=True)
@click.option("--input-len", type=_POSITIVE, default=32, show_default=True)
@click.option("--output-len", type=_POSITIVE, default=128, show_default=True)
@click.option("--iterations", type=_POSITIVE, default=30, show_default=True)
@click.option("--warmup", type=_NATURAL, default=3, show_default=True)
@click.option("--seed", type=_NATURAL, default=0, help="Of the prompts' tokens.  [0]")
@_ENGINE_OPTIONS
@_SAVE
@JSON_OUTPUT
@DEBUG
def latency(**given: Any) -> None:
    """Run one batch of random tokens again and again, greedily and without a prefix cache, and
    measure its time from submission to the last token."""
    from tqdm import tqdm

    from . import offline

    names = ("batch_size", "input_len", "output_len", "iterations", "seed")
    shape = {name: given[name] for name in names}
    total = given["iterations"] + given["warmup"]
    with (
        _llm(given, enable_prefix_caching=False) as llm,
        tqdm(total=total, desc="Batches", unit="batch", disable=None) as bar,
    ):
        found = offline.latency(llm, **shape, warm_up=given["warmup"], on_iteration=bar.update)
        config = _offline_config(llm) | shape

    def show() -> str:
        from .report import pairs, table

        about = [
            ("model", config["model"]),
            (
                "batch",
                f"{given['batch_size']} x {given['input_len']} -> {given['output_len']} tokens, "
                f"{given['iterations']} times",
            ),
            ("output tokens/s", f"{found['output_throughput']:,.1f}"),
        ]
        rows = [
            ("batch (ms)", found["latency_ms"]),
            ("per output token (ms)", found["ms_per_output_token"]),
        ]
        return pairs(about) + "\n\n" + table(rows)

    _finish(given, config, found, show)


def _llm(given: dict[str, Any], **more: Any) -> LLM:
    from .. import bundled
    from ..llm import LLM

    if given["save"] is not None and not given["save"].resolve().parent.is_dir():
        raise click.UsageError(f"--save: there is no folder {given['save'].parent}")
    chosen = {name: given[name] for name in _ENGINE_NAMES if given[name] is not None}
    if "model" not in chosen:
        chosen["model"] = bundled.DEFAULT
        click.echo(bundled.NOTICE, err=True)
    return LLM(**chosen, **more, use_tqdm_on_load=sys.stderr.isatty())


def _offline_config(llm: LLM) -> dict[str, Any]:
    args = asdict(llm.engine.args)
    args.pop("hf_token", None)
    return args | {"backend": llm.engine.core.device_name}


def _finish(
    given: dict[str, Any], config: dict[str, Any], found: dict[str, Any], show: Callable[[], str]
) -> None:
    from . import report

    result = {**report.context(), "config": config, "summary": found}
    if given["save"] is not None:
        report.save(given["save"], result)
    click.echo(json.dumps(result, indent=2) if given["as_json"] else show())


if __name__ == "__main__":
    bench(prog_name="nano-inference bench")
