"""The experiments of stage 4 for a card, without one: their formulas and reports on the CPU, whose
operators have the same names. What only a card can show is in test_cuda_learn.py."""

from __future__ import annotations

import builtins
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nano_inference import _core
from nano_inference.cli import main
from nano_inference.learn import card, catalog, stage4_card
from nano_inference.learn.card import Keys, Launches
from nano_inference.learn.experiment import Missing, Report
from nano_inference.learn.lab import Lab
from nano_inference.plot import render


@dataclass
class CardlessLab(Lab):
    """Runs on the CPU what is meant for a card, in the sizes of a card."""

    small: bool = True

    @property
    def machine(self) -> dict[str, float]:
        return {"read_bytes_per_second": 3e12, "flops_per_second": 8e14}


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "DEVICE", "cpu")
    monkeypatch.setattr(card, "DTYPE", "float32")
    monkeypatch.setattr(card, "need_torch", lambda: None)
    monkeypatch.setattr(card, "free", lambda: None)
    monkeypatch.setattr(card, "seconds_of", lambda work: work() is None or 1e-3)
    monkeypatch.setattr(card, "peak_bytes", lambda work: work().numel())
    monkeypatch.setattr(card, "launches", lambda work: Launches(work() and 40, 12))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def report(key: str) -> tuple[Report, str]:
    (experiment,) = catalog.find([key])
    lab = CardlessLab()
    found = experiment.run(lab)
    assert lab.expectation and found.outcome and found.rows
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert found.panels and render(found.panels, key).startswith("<svg")
    return found, lab.expectation


# -- Formulas -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 48])
def test_both_attentions_are_attention(rows: int, sequences: int) -> None:
    keys = Keys.random(48, sequences, heads=4, kv_heads=2, dim=16)
    q = keys.queries(rows)
    assert q.shape == (sequences * rows, 4, 16)
    by_loop = q.double().reshape(sequences, rows, 4, 16)
    want = torch.zeros_like(by_loop)
    for s in range(sequences):
        for i in range(rows):
            seen = 48 - rows + i + 1
            for head in range(4):
                k, v = (t[s, head // 2, :seen].double() for t in (keys.k, keys.v))
                want[s, i, head] = torch.softmax(k @ by_loop[s, i, head] / 4, 0) @ v
    want = want.reshape(q.shape)
    assert (keys.paged(q)().double() - want).abs().max() < 1e-5
    if rows in (1, 48):
        assert (keys.naive(q)().double() - want).abs().max() < 1e-5


@pytest.mark.usefixtures("no_card")
def test_the_last_rows_of_a_sequence_are_the_same_however_many_there_are() -> None:
    keys = Keys.random(32, 2, heads=4, kv_heads=2, dim=16)
    one, five = keys.queries(1), keys.queries(5)
    assert torch.equal(one, five[[4, 9]])


def test_counts_by_hand() -> None:
    pairs = sum(range(1, 8))
    assert card.causal_operations(3, 16, 7) == 4 * 3 * 16 * pairs
    assert card.score_bytes(3, 7) == 2 * 3 * 49
    naive, fused = stage4_card._per_byte(1 << 20)
    assert naive == pytest.approx(stage4_card.DIM / card.NAIVE_PASSES, rel=1e-3)
    assert fused > 1e5


def test_the_chunk_of_the_page_is_the_kernels() -> None:
    plan = (Path(__file__).parents[2] / "cuda" / "attention_plan.h").read_text()
    assert f"kKvChunk = {card.CHUNK};" in plan and "kDecodeRows = 4;" in plan


def test_bits_and_cut_sums() -> None:
    a = torch.tensor([1.0, 0.0, 2.0])
    assert card.other_bits(a, torch.tensor([1.0, -0.0, 2.0])) == 1
    assert card.other_bits(a.bfloat16(), a.bfloat16()) == 0
    rng = np.random.default_rng(0)
    x, w = (torch.from_numpy(rng.standard_normal(s, dtype=np.float32)) for s in ((3, 50), (7, 50)))
    for parts in (1, 4, 7):
        got = card.split_product(x, w, parts)
        assert (got.double() - x.double() @ w.double().T).abs().max() < 1e-5


# -- The experiments, as far as a CPU can take them -----------------------------------------------


@pytest.mark.usefixtures("no_card")
def test_prompt_attention() -> None:
    found, _ = report("4.7")
    for n in (256, 512):
        assert found.counts[f"scores_{n}"] == 2 * 32 * n * n
        assert found.counts[f"error_{n}"] < 1e-5
        assert found.counts[f"held_naive_{n}"] == n * 32 * 128


@pytest.mark.usefixtures("no_card")
def test_split_kv() -> None:
    found, said = report("4.8")
    assert found.counts["pieces_512"] == 2 * 8 and found.counts["pieces_1024"] == 4 * 8
    assert found.counts["other_bits"] == found.counts["other_bits_batch"] == 0
    assert "leaves 100 idle" in said and found.counts["outputs"] == 2 * 32 * 128


@pytest.mark.usefixtures("no_card")
def test_fusion() -> None:
    c = report("4.10")[0].counts
    for n in (1, 64):
        saved = c[f"bytes_separate_{n}"] - c[f"bytes_fused_{n}"]
        assert saved == n * c["saved_a_row"] and c[f"error_{n}"] < 1e-5


@pytest.mark.usefixtures("no_card")
def test_eager_or_captured() -> None:
    found, said = report("4.9")
    c = found.counts
    assert c["same"] == c["runs"] == c["counted"] == 2 and "18 and a few (tiny)" in said


@pytest.mark.usefixtures("no_card")
def test_batches() -> None:
    found, _ = report("4.11")
    c = found.counts
    assert c["same_invariant"] == c["batches"] == 4 and c["other_bits_invariant"] == 0
    assert c["other_ours"] == 0 and c["other_split"] > c["outputs"] / 2


@pytest.mark.usefixtures("no_card")
def test_roof() -> None:
    found, _ = report("4.12")
    c = found.counts
    assert c["operations: product, 64 rows, cuBLAS"] == 2 * 64 * 256 * 256
    assert c["bytes: decode attention, 2 sequences"] == 2 * 128 * 8 * 128 * 2 * 4  # float32
    assert c["balance"] == pytest.approx(8e14 / 3e12)
    assert len(found.panels[0].dots) == 4 and not math.isnan(found.panels[0].dots[0][1][0][1])


# -- Where something is missing -------------------------------------------------------------------


def test_torch_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(Missing, match="pip install torch"):
        card.need_torch()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Missing, match=r"cannot use the card"):
        card.need_torch()


def test_the_command_leaves_out_what_cannot_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise Missing("torch is not installed")

    monkeypatch.setattr(card, "need_torch", missing)
    monkeypatch.setattr("nano_inference.learn.lab.choose_device", lambda name: "cuda")
    run = CliRunner().invoke
    one = run(main, ["learn", "4.8", "--device", "cuda", "--out", str(tmp_path)])
    assert one.exit_code == 2 and "4.8 cannot run here: torch is not installed" in one.stderr
    stage = run(main, ["learn", "4", "--device", "cuda", "--json", "--out", str(tmp_path)])
    assert stage.exit_code == 0 and stage.stdout == "[]\n"
    assert (
        stage.stderr.count("torch is not installed") == 6
        and "4.5, 4.6 (only with --device cpu)" in stage.stderr
    )
    assert not list(tmp_path.iterdir())


def test_without_a_card_the_device_is_refused() -> None:
    if _core.cuda_devices():
        pytest.skip("there is a card")
    found = CliRunner().invoke(main, ["learn", "4.8", "--device", "cuda"])
    assert found.exit_code == 2 and "cannot be used" in found.stderr
    found = CliRunner().invoke(main, ["learn", "4.8"])
    assert found.exit_code == 2 and "only on cuda: --device cuda" in found.stderr
