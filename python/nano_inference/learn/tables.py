"""Block tables, drawn: the engine's scheduler and block manager alone, with tokens made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import _core
from ..plot import Panel, Span

# (step, letters, prompt, output tokens): a request that arrives before a step; a letter is a choice
Arrival = tuple[int, str, Sequence[int], int]


@dataclass
class Cell:
    """One block after a step."""

    owners: str = ""  # a letter for each sequence that holds it
    filled: int = 0  # slots with a token
    cached: bool = False  # nobody holds it, but the prefix cache knows its tokens
    was: str = ""  # its last owner

    def text(self, block_size: int) -> str:
        """A letter a token; * where several hold the block; lower case: cached."""
        if self.owners:
            letter = self.owners if len(self.owners) == 1 else "*"
            return letter * self.filled + "." * (block_size - self.filled)
        return (self.was.lower() if self.cached else " ") * block_size


@dataclass
class Frame:
    """The cache after one step."""

    step: int
    events: list[str]
    tables: dict[str, list[int]]
    cells: list[Cell]
    cached: int  # blocks, as the block manager counts them

    def blocks_text(self, block_size: int) -> str:
        return "¦".join(cell.text(block_size) for cell in self.cells)

    def tables_text(self) -> str:
        return ", ".join(f"{name}: {' '.join(map(str, t))}" for name, t in self.tables.items())


class Story:
    """Runs some arrivals to their end; a frame a step."""

    def __init__(
        self, arrivals: Sequence[Arrival], *, num_blocks: int, block_size: int, max_tokens: int = 16
    ) -> None:
        self.block_size = block_size
        self.blocks = _core.BlockManager(num_blocks, block_size)
        config = _core.SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=max_tokens,
            max_model_len=num_blocks * block_size,
            vocab_size=1 << 20,
        )
        self.scheduler = _core.Scheduler(config, self.blocks)
        self.cells = [Cell() for _ in range(num_blocks)]
        self.frames: list[Frame] = []
        self._pending = list(arrivals)
        self._names: list[str] = []
        self._tables: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}
        self._token = 1000
        while self._pending or self.scheduler.has_work():
            self._step()

    def _name(self, of: dict[str, Any]) -> str:
        return self._names[of["request_id"]][of["choice"]]

    def _step(self) -> None:
        step = len(self.frames)
        for arrival in [a for a in self._pending if a[0] <= step]:
            self._pending.remove(arrival)
            _, letters, prompt, output = arrival
            params = _core.SamplingParams(
                n=len(letters), temperature=0.0, max_tokens=output, ignore_eos=True
            )
            self.scheduler.add(len(self._names), list(prompt), params)
            self._names.append(letters)
        plan = self.scheduler.schedule()
        events = self._events(plan)
        samples: list[int] = []
        for item in plan["items"]:
            self._tables[self._name(item)] = item["block_table"]
            self._lengths[self._name(item)] = item["num_computed"] + item["num_query"]
            samples += range(self._token, self._token + item["num_samples"])
            self._token += item["num_samples"]
        self._fill()
        for update in self.scheduler.update(samples):
            if update["finish_reason"]:
                self._tables.pop(self._name(update), None)
                events.append(f"{self._name(update)} ends")
        for item in plan["items"]:  # choices of one request share its blocks until they differ
            first, *others = self._names[item["request_id"]]
            for other in others if item["num_samples"] > 1 else ():
                self._tables[other], self._lengths[other] = (
                    self._tables[first],
                    self._lengths[first],
                )
        self._fill()
        self.frames.append(
            Frame(
                step,
                events,
                {name: list(table) for name, table in self._tables.items()},
                [replace(cell) for cell in self.cells],
                self.blocks.stats()["blocks_cached"],
            )
        )

    def _events(self, plan: dict[str, Any]) -> list[str]:
        events = []
        for what, verb in (("preempted", "is preempted"), ("resumed", "is back")):
            for request_id, choice in plan[what]:
                name = self._names[request_id][choice]
                self._tables.pop(name, None)
                events.append(f"{name} {verb}")
        for request_id, _ in plan["admitted"]:
            events.append(f"{self._names[request_id]} comes in")
        fresh = {tuple(key) for key in plan["admitted"] + plan["resumed"]}
        for item in plan["items"]:
            if (item["request_id"], item["choice"]) in fresh and item["num_computed"]:
                events.append(f"{item['num_computed']} tokens are found")
        return events + [f"block {a} is copied to {b}" for a, b in plan["copies"]]

    def _fill(self) -> None:
        size = self.block_size
        for index, cell in enumerate(self.cells):
            holders = [name for name, table in self._tables.items() if index in table]
            if holders:
                name = holders[0]
                begin = self._tables[name].index(index) * size
                filled = max(0, min(size, self._lengths[name] - begin))
                self.cells[index] = Cell("".join(holders), filled, False, name)
            elif cell.owners:  # given back by this step: full blocks can still be found
                cell.cached = cell.filled == size
                cell.owners = ""

    def panel(self) -> Panel:
        """Time runs downwards; a block is a column, as full as it is."""
        size, spans = self.block_size, []
        for row, frame in enumerate(self.frames):
            for index, cell in enumerate(frame.cells):
                if cell.owners or cell.cached:
                    shared = len(cell.owners) > 1
                    name = "shared" if shared else cell.owners or "cached, held by nobody"
                    begin = index * size
                    label = cell.owners or cell.was.lower()
                    spans.append(Span(row, begin + 0.15, begin + cell.filled - 0.15, name, label))
        return Panel(
            f"{len(self.cells)} blocks of {size} slots, step by step",
            "slot of the cache",
            "step",
            spans=spans,
            y_names=[str(frame.step) for frame in self.frames],
            wide=True,
        )
