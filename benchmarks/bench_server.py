"""What the HTTP server costs: the tokens a second of many concurrent streams through it, with the
load generator on the same cores, beside the same prompts through LLM.generate().

    python benchmarks/bench_server.py [--model FOLDER] [--streams 64] [--json] [--save]

Each part is a process of its own, as a user would start it: `nano-inference serve`, `bench serve`
in closed loop, then, without a server, `bench throughput`. They alternate `--rounds` times; the
figures are of the round with the median ratio. Both sides run as many sequences a step.

An event gap is the time between two events of a stream, which other tools call ITL; our ITL per
token shares the gap before an event of several tokens among them."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import context, markdown_table, save

from nano_inference import _core

READY_SECONDS = 300
COMMAND = [sys.executable, "-m", "nano_inference"]


def engine_options(args: argparse.Namespace) -> list[str]:
    """That server and LLM have in common."""
    options = ["--max-num-seqs", str(args.streams)]
    for name in ("model", "num_threads"):
        if (value := getattr(args, name)) is not None:
            options += ["--" + name.replace("_", "-"), str(value)]
    return options


def workload_options(args: argparse.Namespace) -> list[str]:
    """The same seed and tokenizer make the same prompts on both sides."""
    return [
        *["--num-prompts", str(args.num_prompts), "--input-len", str(args.input_len)],
        *["--output-len", str(args.output_len), "--temperature", "0"],
        *["--ignore-eos", "--warmup", str(args.streams)],
    ]


@contextlib.contextmanager
def server(args: argparse.Namespace, log: Path) -> Iterator[str]:
    """A running server; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--port", str(port), *engine_options(args)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_ready(process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health", timeout=5):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server was not ready after {READY_SECONDS} s")
        time.sleep(0.1)


def run_bench(kind: str, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [*COMMAND, "bench", kind, *options, "--save", str(path)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}")
        found: dict[str, Any] = json.loads(path.read_text())
    found.pop("requests", None)  # each event's time: too much for the repository
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One round."""
    with tempfile.TemporaryDirectory() as folder, server(args, Path(folder) / "log") as url:
        http = run_bench(
            *["serve", "--base-url", url, "--concurrency", str(args.streams)],
            *workload_options(args),
        )
    offline = run_bench("throughput", *engine_options(args), *workload_options(args))
    return {"http": http, "offline": offline, "row": row(http, offline)}


def row(http: dict[str, Any], offline: dict[str, Any]) -> dict[str, Any]:
    served, alone = http["summary"], offline["summary"]
    for name in ("prompt_tokens", "output_tokens"):
        if served[name] != alone[name]:
            raise RuntimeError(f"not the same work: {name} {served[name]} and {alone[name]}")
    itl, gap = served["itl_ms"], served["event_gap_ms"]
    return {
        "output tokens/s, HTTP": served["output_throughput"],
        "output tokens/s, LLM.generate": alone["output_throughput"],
        "ratio": served["output_throughput"] / alone["output_throughput"],
        "TTFT median ms": served["ttft_ms"]["median"],
        "event gap median ms": gap["median"],
        "event gap p99 ms": gap["p99"],
        "p99 / median": gap["p99"] / gap["median"],
        "same of ITL per token": itl["p99"] / itl["median"],
        "tokens an event": served["tokens_per_event"],
        "generator, share of a core": http["generator"]["cpu_share"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder or name on the hub; default: nano-inference's own")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--num-threads", type=int, help="of the engine; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--save", action="store_true", help="write results/server.*")
    args = parser.parse_args()

    rounds = [measure(args) for _ in range(args.rounds)]
    middle = statistics.median_low(r["row"]["ratio"] for r in rounds)
    chosen = next(r for r in rounds if r["row"]["ratio"] == middle)
    backend = chosen["offline"]["config"]["backend"]
    about = context(args.num_threads or _core.num_threads_available(), backend)
    about["model"] = chosen["http"]["config"]["model"]
    about["work"] = (
        f"{args.num_prompts} prompts of {args.input_len} -> {args.output_len} tokens in "
        f"{args.streams} streams"
    )
    result = {
        "context": about,
        "http": chosen["http"],
        "offline": chosen["offline"],
        "results": [r["row"] for r in rounds],
    }
    table = [{"": "median" if r is chosen else "", **r["row"]} for r in rounds]
    print(json.dumps(result, indent=2) if args.json else markdown_table(table))
    if args.save:
        save("server", result, "The HTTP server beside LLM.generate", table)


if __name__ == "__main__":
    main()
