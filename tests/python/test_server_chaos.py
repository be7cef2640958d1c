"""The chaos run of benchmarks/chaos.py in a small form: the same clients, server and auditor."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("chaos")
    for name in ("chaos", "common"):  # names that others may have
        sys.modules.pop(name, None)


def test_chaos_leaves_everything_in_balance(chaos: Any) -> None:
    with chaos.chaos_server(None) as server:
        result = asyncio.run(chaos.run_chaos(server, 10, seed=1))
        assert result["wrong"] == []
        assert server.stop() == 0
    clients, stats = result["clients"], result["audit"]["stats"]
    assert stats["received"] == sum(stats[name] for name in chaos.ENDS)
    assert stats["blocks_free"] + stats["blocks_cached"] == stats["blocks_total"]
    # All that the run is about has happened.
    for name in ("whole", "stream", "disconnect", "slow", "half_a_body", "malformed", "look"):
        assert clients[name] > 0, name
    assert clients["answers compared"] > 40  # that many were asked for beforehand
    assert clients["refused: queue full"] > 0 and stats["rejected"] > 0
    assert stats["preemptions"] > 0 and stats["evictions"] > 0 and stats["aborted"] > 0
    assert result["audit"]["most_running"] == chaos.OPTIONS["max_num_seqs"]


def test_the_auditor_sees_what_does_not_balance(chaos: Any) -> None:
    class Core:
        config = type("Config", (), {"num_blocks": 8})

        def stats(self) -> dict[str, Any]:
            names = ("received", *chaos.ENDS, "running", "waiting", "running_seqs", "preemptions")
            names += ("blocks_used", "blocks_cached", "failed_steps", "generated_tokens")
            zeros = dict.fromkeys(names, 0)
            return {
                **zeros, "received": 1, "blocks_free": 7, "blocks_total": 8, "steps": 2,
                "healthy": True,
            }  # fmt: skip

        def trace(self, since: int) -> list[dict[str, Any]]:
            record = {"blocks_used": 1, "blocks_cached": 0, "blocks_free": 6, "running": 0}
            return [{**record, "step": 2, "waiting": 0, "entries": [], "preempted": []}]

    engine = type("Engine", (), {"core": Core()})
    wrong = chaos.Auditor(type("Llm", (), {"engine": engine, "_streams": {}})).report()["wrong"]
    for what in ("requests do not balance", "blocks do not balance: ", "step 1 was not seen"):
        assert any(line.startswith(what) for line in wrong), wrong
    assert any("do not balance in step" in line for line in wrong)
