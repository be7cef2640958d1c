"""The stages and their experiments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from .experiment import Experiment


@dataclass(frozen=True)
class Stage:
    number: int
    title: str
    about: str
    module: str

    @property
    def experiments(self) -> list[Experiment]:
        return list(import_module(self.module, __package__).EXPERIMENTS)


STAGES = [
    Stage(1, "Basic inference", "tokens to logits to tokens; why there is a KV cache", ".stage1"),
    Stage(2, "Batching", "one pass over the weights serves many", ".stage2"),
    Stage(3, "Memory", "where the slots of the KV cache go, and what they are worth", ".stage3"),
    Stage(4, "Kernels", "from plain loops to the machine's limits, bit by bit the same", ".stage4"),
]


def find(words: Sequence[str]) -> list[Experiment]:
    """The experiments that "2" (a stage) or "2.3" name, in order. ValueError names a wrong one."""
    chosen = []
    for word in words:
        number = word.split(".")[0]
        stage = next((s for s in STAGES if str(s.number) == number), None)
        if stage is None:
            stages = ", ".join(str(s.number) for s in STAGES)
            raise ValueError(f"there is no stage {word!r}: there are {stages}")
        found = [e for e in stage.experiments if word in (number, e.key)]
        if not found:
            keys = ", ".join(e.key for e in stage.experiments)
            raise ValueError(f"there is no experiment {word!r}: stage {number} has {keys}")
        chosen += found
    return list(dict.fromkeys(chosen))
