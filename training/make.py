"""Makes the bundled models from nothing, with one command:

    python -m training.make OUT

OUT/main and OUT/draft are Hugging Face folders; beside them stand the logs of the training, its
curves and the scores. Takes about fifteen minutes on an H200 with 16 cores, the scores included;
--scale 0.001 shows on a CPU that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import tokenizer as tokenizers
from .data import CONTEXT, SECOND_WEIGHTS, make_shards
from .evaluate import Transformers, agreement, evaluate, table
from .export import export
from .model import DRAFT, MAIN, Config, Llama
from .plot import plot
from .train import Rows, Schedule, train

# Rows in a step; shards have 1.2 million tokens each.
BATCH = {128: 512, 512: 96, CONTEXT: 16}
FIRST_SHARDS, SECOND_SHARDS = 300, 64
FIRST = Schedule(steps=6500, batch=BATCH)
SECOND = Schedule(steps=1500, batch=BATCH, learning_rate=1e-3, warmup=100)
DRAFT_SCHEDULE = Schedule(steps=1800, batch=BATCH)


def scaled(schedule: Schedule, scale: float) -> Schedule:
    """A smaller run of the same kind."""
    if scale == 1.0:
        return schedule
    batch = {t: max(1, round(n * min(1.0, 20 * scale))) for t, n in schedule.batch.items()}
    return replace(schedule, steps=max(2, round(schedule.steps * scale)), batch=batch, warmup=20)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the bundled models.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of data and steps; 1: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--count", type=int, default=500, help="prompts a skill; 0: no scores")
    parser.add_argument("--second", action="store_true", help="OUT/first is there already")
    args = parser.parse_args()
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", flush=True)

    first_folder, main_folder, draft_folder = (args.out / n for n in ("first", "main", "draft"))
    for folder in (first_folder, main_folder, draft_folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = first_folder / "tokenizer.json"

    def shards(name: str, count: int, **how: Any) -> Rows:
        rows = make_shards(path, name, max(1, round(count * args.scale)), args.workers, **how)
        say(f"{sum(r.size for r in rows.values()) / 1e6:.1f} million tokens of rows: {name}")
        return rows

    def stage(name: str, config: Config, rows: Rows, schedule: Schedule, **how: Any) -> Llama:
        log, device = args.out / f"{name}.jsonl", args.device
        model = train(config, rows, test, scaled(schedule, args.scale), log, device, **how)
        export(model, config, args.out / name)
        say(f"model trained: {name}")
        return model

    if not args.second:
        tokenizers.save(
            tokenizers.train(examples=max(500, round(10_000 * args.scale))), first_folder
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for folder in (main_folder, draft_folder):
            shutil.copy(first_folder / name, folder / name)
    test = make_shards(path, "test", 1, 1, test=True)
    if not args.second:
        stage("first", MAIN, shards("train", FIRST_SHARDS), FIRST)
    rows = shards("second", SECOND_SHARDS, weights=SECOND_WEIGHTS)
    model = stage("main", MAIN, rows, SECOND, start=first_folder)
    stage("draft", DRAFT, rows, DRAFT_SCHEDULE, teacher=model)
    plot([args.out / f"{n}.jsonl" for n in ("first", "main", "draft")], args.out / "curves.svg")
    if not args.count:
        return
    pair = Transformers(str(main_folder)), Transformers(str(draft_folder))
    results = {"transformers": evaluate(main_folder, pair[0], args.count)}
    results["draft_agreement"] = agreement(*pair, pair[0].tokenizer.backend_tokenizer, 200)
    (args.out / "scores.json").write_text(json.dumps(results, indent=2) + "\n")
    say("scored")
    print(table(results))


if __name__ == "__main__":
    main()
