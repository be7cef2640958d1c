"""Stage 3 of the learning path: what its experiments count, in small."""

from __future__ import annotations

from functools import cache

import pytest

from nano_inference import _core
from nano_inference.learn.experiment import Result
from nano_inference.learn.lab import Request
from nano_inference.learn.memory import (
    computed_rows,
    expected_hits,
    live_share,
    lost_rows,
    mean_held,
    needed_rows,
    usage,
)
from nano_inference.learn.run import run
from nano_inference.learn.stage3 import EXPERIMENTS
from nano_inference.learn.tables import Story
from nano_inference.plot import render


@cache
def result(key: str) -> Result:
    return run(next(e for e in EXPERIMENTS if e.key == key), small=True)


def counts(key: str) -> dict[str, float]:
    return result(key).report.counts


def test_paging_fits_more_and_wastes_less() -> None:
    c = counts("3.1")
    assert c["live_contiguous"] == pytest.approx(c["expected_live_contiguous"], abs=0.02)
    assert c["live_paged"] == pytest.approx(c["expected_live_paged"], abs=0.02)
    assert c["live_contiguous"] < 0.25 and c["live_paged"] > 0.85
    assert c["most_contiguous"] == 8  # 8 * 512 slots in reservations of 512
    assert c["fit_paged"] >= 3 * c["fit_contiguous"]
    assert c["steps_paged"] < c["steps_contiguous"]
    assert c["same_answers"] == c["requests"]  # where the cache lies does not change a bit


def test_block_tables_are_shared_copied_and_taken_away() -> None:
    c = counts("3.2")
    assert (c["tokens_found_by_b"], c["new_blocks_of_b"]) == (8, 1)
    assert (c["copies"], c["preempted"], c["ended"]) == (1, 1, 5)
    # The drawing follows the tables; the block manager keeps its own books.
    assert c["cached_as_drawn"] == c["cached_as_counted"] > 0


def test_a_drawn_step_reads_as_it_should() -> None:
    """Two prompts of 6 tokens, 4 of them alike, in blocks of 4."""
    arrivals = [(0, "A", [1, 2, 3, 4, 5, 6], 2), (1, "B", [1, 2, 3, 4, 7, 8], 2)]
    story = Story(arrivals, num_blocks=4, block_size=4)
    frames = [(f.blocks_text(4), f.tables_text()) for f in story.frames]
    assert frames[0] == ("AAAA¦AA..¦    ¦    ", "A: 0 1")
    # A's second token is its last: it ends with this step, and its full block stays B's.
    assert frames[1] == ("BBBB¦    ¦BB..¦    ", "B: 0 2")
    assert frames[2] == ("bbbb¦    ¦    ¦    ", "")


def test_larger_blocks_lose_more() -> None:
    c = counts("3.3")
    sizes = [1, 16, 256]
    for size in sizes:
        assert c[f"lost_{size}"] == pytest.approx(c[f"expected_lost_{size}"], abs=0.02)
    assert c["lost_1"] < 0.001 < c["lost_16"] < 0.15 < c["lost_256"]
    entries = [c[f"entries_{size}"] for size in sizes]
    assert entries == sorted(entries, reverse=True) and entries[0] > 10 * entries[1]


def test_a_shared_text_is_computed_once() -> None:
    c = counts("3.4")
    for way in ("no_prefix_cache", "all_arrive_together", "one_after_another"):
        assert c[f"found_{way}"] == c[f"expected_{way}"]
        assert c[f"found_{way}"] + c[f"computed_{way}"] == c["prompt_tokens"]
    found = [c[f"found_{w}"] for w in ("no_prefix_cache", "all_arrive_together")]
    assert 0 == found[0] < found[1] < c["found_one_after_another"]
    assert c["same_answers"] == c["requests"]


def test_a_turn_of_a_chat_computes_what_is_new() -> None:
    c = counts("3.5")
    assert c["turns_as_expected"] == c["turns"] == c["same_answers"]
    assert c["computed_without"] == c["prompt_tokens"] > 2 * c["computed"]


def test_preemption_computes_again_what_it_lost() -> None:
    c = counts("3.6")
    plenty, least = int(c["plenty"]), int(c["least"])
    assert c[f"preempted_plain_{plenty}"] == c[f"recomputed_plain_{plenty}"] == 0
    assert c[f"preempted_plain_{least}"] > 0
    assert c[f"recomputed_plain_{least}"] == c[f"lost_{least}"] > 0
    assert c[f"recomputed_cached_{least}"] < c[f"recomputed_plain_{least}"]
    assert c["same_answers"] == c["runs"]


@pytest.mark.parametrize("key", [e.key for e in EXPERIMENTS])
def test_reports_are_whole(key: str) -> None:
    found = result(key)
    report = found.report
    assert found.expectation and report.outcome and report.rows
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.panels and render(report.panels, key).startswith("<svg")


# -- The formulas, on numbers done by hand --------------------------------------------------------


def test_slots_that_a_sequence_holds() -> None:
    requests = [Request([0] * 3, 3)]  # holds 4, then 5 tokens
    assert mean_held(requests) == 4.5
    assert mean_held(requests, 4) == 6  # one block, then two
    assert live_share(requests, 4) == 0.75
    assert live_share(requests, 100) == 0.045
    assert needed_rows([Request([0] * 5, 4)]) == 8


def test_prefix_hits_by_hand() -> None:
    a, b = list(range(10)), [*range(6), 99, 98]
    assert expected_hits([a, b], [a, b], 4) == 4  # six alike: one whole block
    assert expected_hits([a, a], [a, a], 5) == 5  # all alike, but one row has to be computed
    assert expected_hits([b], [b], 1) == 0


def test_usage_from_a_trace_by_hand() -> None:
    def step(entries: list[tuple[int, int]], used: int, **events: list[tuple]) -> dict:
        listed = [{"request_id": i, "choice": 0, "context_len": n} for i, n in entries]
        base = {"preempted": [], "finished": [], "waiting": 0, "num_tokens": len(entries)}
        return {**base, "entries": listed, "blocks_used": used, **events}

    trace = [
        step([(0, 5), (1, 3)], 3, waiting=1),
        step([(0, 6)], 2, preempted=[(1, 0)]),
        step([(0, 7)], 0, finished=[(0, 0, "length")]),
    ]
    u = usage(trace, total=16, block_size=4)
    assert (u.live, u.reserved, u.running) == ([8, 6, 0], [12, 8, 0], [2, 1, 0])
    assert (u.live_of_reserved, u.live_of_total, u.fit) == (14 / 20, 14 / 48, 2)
    assert (lost_rows(trace), computed_rows(trace)) == (3, 4)


def test_measured_machine() -> None:
    rates = _core.measure_machine(1)
    assert set(rates) == {"read_bytes_per_second", "flops_per_second", "fp32_flops_per_second"}
    assert rates["flops_per_second"] >= rates["fp32_flops_per_second"] > 1e8
    assert rates["read_bytes_per_second"] > 1e8
    with pytest.raises(ValueError, match="num_threads"):
        _core.measure_machine(-1)
