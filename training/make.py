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
from pathlib import Path

import torch

from . import tokenizer as tokenizers
from .data import CONTEXT, SHARD_ROWS, make_shards
from .evaluate import Transformers, agreement, evaluate, table
from .export import export
from .model import DRAFT, MAIN
from .plot import plot
from .train import Schedule, train

SHARDS = 300  # of 1.2 million tokens
MAIN_SCHEDULE = Schedule(steps=6500, batch={128: 512, 512: 96, CONTEXT: 16})
DRAFT_SCHEDULE = Schedule(steps=2200, batch={128: 512, 512: 96, CONTEXT: 16})


def scaled(schedule: Schedule, scale: float) -> Schedule:
    """A smaller run of the same kind."""
    if scale == 1.0:
        return schedule
    batch = {t: max(1, round(n * min(1.0, 20 * scale))) for t, n in schedule.batch.items()}
    return Schedule(max(2, round(schedule.steps * scale)), batch, schedule.learning_rate, warmup=20)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the bundled models.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of data and steps; 1: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--count", type=int, default=500, help="prompts a skill; 0: no scores")
    args = parser.parse_args()
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", flush=True)

    main_folder, draft_folder = args.out / "main", args.out / "draft"
    for folder in (main_folder, draft_folder):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizers.save(tokenizers.train(examples=max(500, round(10_000 * args.scale))), main_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(main_folder / name, draft_folder / name)
    say("tokenizer trained")
    path = main_folder / "tokenizer.json"
    rows = make_shards(path, 0, max(1, round(SHARDS * args.scale)), args.workers)
    test = make_shards(path, 0, 1, 1, test=True)
    tokens = sum(r.size for r in rows.values())
    say(f"{tokens / 1e6:.1f} million tokens of training rows ({len(SHARD_ROWS)} lengths)")
    log = args.out / "main.jsonl"
    model = train(MAIN, rows, test, scaled(MAIN_SCHEDULE, args.scale), log, args.device)
    export(model, MAIN, main_folder)
    say("main model trained")
    schedule = scaled(DRAFT_SCHEDULE, args.scale)
    draft = train(DRAFT, rows, test, schedule, args.out / "draft.jsonl", args.device, model)
    export(draft, DRAFT, draft_folder)
    say("draft model trained")
    plot([args.out / "main.jsonl", args.out / "draft.jsonl"], args.out / "curves.svg")
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
