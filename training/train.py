"""Training: AdamW, cosine schedule, bf16 where the device has it.

The main model learns the data; the draft model learns to say what the main model would say.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from .data import LEARN
from .model import Config, Llama
from .tokenizer import CONTEXT

# Of the loss, by the length of the rows. Without it the stories, whose every token counts, would
# drown the answers of the skills.
SHARE = {128: 0.5, 512: 0.3, CONTEXT: 0.2}

Rows = dict[int, npt.NDArray[np.uint16]]


@dataclass(frozen=True)
class Schedule:
    steps: int
    batch: dict[int, int]
    """Rows of each length in a step."""
    learning_rate: float = 3e-3
    warmup: int = 300
    weight_decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * cosine)


def batches(rows: dict[int, Tensor], batch: dict[int, int], seed: int) -> Iterator[list[Tensor]]:
    """For ever: some rows of each length; every row once before any row twice."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(data: Tensor, size: int) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(data), generator=generator).to(data.device)
            for at in range(0, len(order) - size + 1, size):
                yield data[order[at : at + size]]

    streams = [shuffled(rows[length], size) for length, size in batch.items()]
    while True:
        yield [next(s) for s in streams]


def split(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, the tokens that follow them, and which of these count."""
    ids = (row & (LEARN - 1)).long()
    return ids[:, :-1], ids[:, 1:], (row[:, 1:] & LEARN) != 0


def loss_sum(model: Llama, row: Tensor, teacher: Llama | None = None) -> Tensor:
    """Cross entropy summed over the positions that count: with the tokens that follow, or with the
    teacher's distribution."""
    ids, targets, learn = split(row)
    logits = model(ids).float()
    if teacher is None:
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    else:
        with torch.no_grad():
            wanted = (teacher(ids).float() * 1.5).softmax(-1)  # sharper: the likeliest token counts
        each = -(wanted * logits.log_softmax(-1)).sum(-1).flatten()
    return (each * learn.flatten()).sum()


def train(
    config: Config,
    rows: Rows,
    test: Rows,
    schedule: Schedule,
    log: Path,
    device: str,
    start: Path | None = None,
    teacher: Llama | None = None,
) -> Llama:
    """Trains a new model, or goes on with one that was exported to `start`."""
    torch.manual_seed(schedule.seed)
    torch.compiler.reset()  # a graph for every length, and the number of graphs is limited
    torch.set_float32_matmul_precision("high")
    model = Llama(config).to(device)
    if start is not None:
        model.load_state_dict(load_file(start / "model.safetensors"))
    on_gpu = device.startswith("cuda")
    data = {t: torch.from_numpy(r.view(np.int16)).to(device).int() for t, r in rows.items()}
    held = {t: torch.from_numpy(r.view(np.int16)).to(device).int() for t, r in test.items()}
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=on_gpu,
    )

    def objective(row: Tensor) -> Tensor:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=on_gpu):
            return loss_sum(model, row, teacher)

    step_loss: Any = torch.compile(objective, dynamic=False) if on_gpu else objective
    stream = batches(data, schedule.batch, schedule.seed)
    for row in next(batches(data, schedule.batch, 1)):  # compile before the clock starts
        step_loss(row).backward()
    optimizer.zero_grad()
    per_step = sum(length * rows for length, rows in schedule.batch.items())
    begin = time.perf_counter()
    with log.open("w") as file:
        head = {"config": asdict(config), "schedule": asdict(schedule), "device": device}
        file.write(json.dumps(head) + "\n")
        for step in range(1, schedule.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step - 1)
            some = next(stream)
            losses = []
            for row in some:
                mean = step_loss(row) / ((row[:, 1:] & LEARN) != 0).sum()
                (mean * SHARE[row.shape[1]]).backward()
                losses.append(mean.detach() * SHARE[row.shape[1]])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = step == schedule.steps
            if step % 50 == 0 or last:
                entry: dict[str, Any] = {
                    "step": step,
                    "loss": round(sum(losses).item(), 4),  # waits for the device
                    "seconds": round(time.perf_counter() - begin, 1),
                    "tokens": step * per_step,
                    "lr": float(f"{schedule.rate(step - 1):.3g}"),
                }
                if step % 500 == 0 or last:
                    entry["test_loss"] = test_losses(model, held, schedule.batch)
                    print(json.dumps(entry), flush=True)
                file.write(json.dumps(entry) + "\n")
    return model


@torch.no_grad()
def test_losses(model: Llama, held: dict[int, Tensor], batch: dict[int, int]) -> dict[int, float]:
    """Mean cross entropy on rows of held-out examples, by the length of the rows."""
    out = {}
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for length, rows in held.items():
            total = count = 0.0
            for at in range(0, min(len(rows), 4 * batch[length]), batch[length]):
                row = rows[at : at + batch[length]]
                total += loss_sum(model, row).item()
                count += split(row)[2].sum().item()
            out[length] = round(total / count, 4)
    return out
