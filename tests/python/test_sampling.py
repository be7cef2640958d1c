"""The sampler against reference.py: the same processing in float64, Philox from its paper and the
draw that core/philox.h tells of, on every device of this machine. A draw is compared token by
token; where a random number or a cut lies so close to a boundary that rounding decides, either side
is right, and that may happen only rarely."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import reference as ref

Array = npt.NDArray[Any]
Row = dict[str, Any]

NEAR = (
    1e-5  # relative distance to a cut, absolute to a step of the CDF, within which rounding decides
)

each_device = pytest.mark.parametrize("device", ref.DEVICES)


def sample(device: str, logits: Array, rows: list[Row], max_logprobs: int = 0) -> dict[str, Array]:
    before = logits.copy()
    got = ref.ops_for(device).sample(logits, rows, max_logprobs)
    assert logits.tobytes() == before.tobytes(), "the caller's logits were changed"
    assert np.all((got["token_ids"] >= 0) & (got["token_ids"] < logits.shape[1]))
    return got


def random_logits(seed: int, rows: int, vocab: int, spread: float = 3.0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, vocab)) * spread).astype(np.float32)


def accepted(logits: Array, row: Row) -> set[int]:
    """The tokens that are right: one, except next to a boundary."""
    key = (row.get("seed", 0), row.get("choice", 0), row.get("position", 0))
    tokens: set[int] = set()
    for shift in (1, 1 - NEAR, 1 + NEAR):
        moved = dict(row, top_p=row.get("top_p", 1.0), min_p=row.get("min_p", 0.0) * shift)
        if moved["top_p"] < 1:
            moved["top_p"] *= shift
        tokens |= ref.drawn(ref.probabilities(logits, moved), key, NEAR)
    return tokens


def check_draws(device: str, logits: Array, rows: list[Row], most_unclear: float = 0.02) -> None:
    got = sample(device, logits, rows)["token_ids"]
    unclear = 0
    for i, row in enumerate(rows):
        right = accepted(logits[i], row)
        unclear += len(right) > 1
        assert got[i] in right, f"row {i}: {row}: got {got[i]}, want one of {right}"
    assert unclear <= most_unclear * len(rows), "the comparison proves nothing"


# -- The random numbers ---------------------------------------------------------------------------


def test_philox_reference() -> None:
    """Known answers that its authors publish with Random123."""
    ones = 0xFFFFFFFF
    cases = [
        (0, (0, 0, 0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, (ones, ones, ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for key, counter, answer in cases:
        assert ref.philox4x32(key, counter) == answer


@each_device
def test_key_of_a_draw(device: str) -> None:
    """Seed (64 bits), choice (32 bits) and position each enter the draw, and nothing else does:
    over equally likely tokens the unit is floor(u * units), and the bits of the token in it are
    those of the rounds' numbers."""
    rng, units = np.random.default_rng(1), 63
    keys = [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (2**32, 0, 0),
        (2**64 - 1, 2**32 - 1, 2**31 - 1),
    ]
    keys += [
        (int(rng.integers(2**63)) * 2 + 1, int(rng.integers(2**32)), int(rng.integers(2**31)))
        for _ in range(300)
    ]
    rows = [dict(seed=s, choice=c, position=p) for s, c, p in keys]
    got = sample(device, np.zeros((len(rows), 16 * units), np.float32), rows)["token_ids"]
    u = np.array([ref.uniform(*key) for key in keys])
    in_unit = [sum((d >= 0.5) << bit for bit, d in ref.rounds(*key).items()) for key in keys]
    clear = np.abs(u * units - np.round(u * units)) > 1e-3
    assert clear.sum() > 0.95 * len(rows)
    np.testing.assert_array_equal(got[clear], (16 * np.floor(u * units) + in_unit)[clear])


# -- Each parameter -------------------------------------------------------------------------------

PENALTIES = dict(repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=0.3)
PARAMETERS: dict[str, Row] = {
    "plain": {},
    "cold": dict(temperature=0.3),
    "hot": dict(temperature=2.5),
    "top_k": dict(top_k=5),
    "top_k one": dict(top_k=1),
    "top_k all": dict(top_k=97),
    "top_k over": dict(top_k=1000),
    "top_p": dict(top_p=0.7),
    "top_p tiny": dict(top_p=1e-6),
    "top_p large": dict(top_p=0.9999),
    "min_p": dict(min_p=0.2),
    "min_p one": dict(min_p=1.0),
    "top_k top_p": dict(top_k=8, top_p=0.6),
    "top_p ends before top_k": dict(top_k=60, top_p=0.4),
    "top_k top_p min_p": dict(top_k=20, top_p=0.9, min_p=0.1),
    "all three, hot": dict(top_k=30, top_p=0.8, min_p=0.3, temperature=1.9),
    "repetition": dict(repetition_penalty=2.0),
    "repetition below one": dict(repetition_penalty=0.5),
    "presence": dict(presence_penalty=1.5),
    "presence negative": dict(presence_penalty=-2.0),
    "frequency": dict(frequency_penalty=0.9),
    "frequency negative": dict(frequency_penalty=-0.4),
    "penalties": PENALTIES,
    "penalties, cold": dict(PENALTIES, temperature=0.6, top_p=0.9),
    "penalties, greedy": dict(PENALTIES, temperature=0.0),
    "greedy": dict(temperature=0.0),
    "greedy ignores the rest": dict(temperature=0.0, top_k=9, top_p=0.5, min_p=0.01),
}


def extras(rng: np.random.Generator, vocab: int, kind: str) -> Row:
    """Counts (0: in the prompt only), biases, a mask, or all of them."""
    out: Row = {}
    tokens = rng.permutation(vocab)
    if kind in ("counts", "all"):
        out["counts"] = {int(t): int(rng.integers(0, 5)) for t in tokens[: vocab // 3]}
    if kind in ("bias", "all"):
        out["bias"] = {int(t): float(np.float32(rng.normal() * 4)) for t in tokens[: vocab // 4]}
        out["bias"].update({int(t): -np.inf for t in tokens[vocab // 4 : vocab // 3]})
    if kind in ("mask", "all"):
        out["mask"] = rng.random(vocab) < 0.4
        out["mask"][tokens[-1]] = True
    return out


@each_device
@pytest.mark.parametrize("kind", ["counts", "bias", "mask", "all"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter(device: str, name: str, kind: str) -> None:
    vocab, rng = 97, np.random.default_rng(2)
    rows = [
        dict(PARAMETERS[name], **extras(rng, vocab, kind), seed=i, choice=i % 3, position=7 * i)
        for i in range(60)
    ]
    check_draws(device, random_logits(3, len(rows), vocab), rows)


@each_device
def test_frequencies(device: str) -> None:
    """20 000 draws of one row land on the tokens in proportion; the others stay away."""
    logits, draws = random_logits(4, 1, 40, 1.5), 20_000
    for row in (
        {},
        dict(top_k=7, temperature=1.5),
        dict(top_p=0.8),
        dict(min_p=0.1, temperature=0.7),
    ):
        rows = [dict(row, seed=99, position=i) for i in range(draws)]
        got = sample(device, np.repeat(logits, draws, 0), rows)["token_ids"]
        p = ref.probabilities(logits[0], row)
        counts = np.bincount(got, minlength=40)
        assert counts[p == 0].sum() == 0
        likely = p > 0
        chi2 = ((counts[likely] - draws * p[likely]) ** 2 / (draws * p[likely])).sum()
        freedom = likely.sum() - 1
        assert chi2 < freedom + 6 * np.sqrt(2 * freedom) + 10, row


@each_device
def test_processing_is_seen_by_its_edges(device: str) -> None:
    """Small cases whose answer can be read off."""
    x = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    got = lambda **row: int(sample(device, x, [row])["token_ids"][0])  # noqa: E731
    greedy = dict(temperature=0.0)
    assert got(**greedy) == 0
    assert got(**greedy, bias={0: -np.inf}) == 1
    assert got(**greedy, bias={3: 3.5}) == 3
    assert got(**greedy, bias={3: 3.0}) == 0, "ties go to the lower id"
    assert got(**greedy, mask=np.array([0, 0, 1, 1], bool)) == 2
    assert got(**greedy, bias={3: 100.0}, mask=np.array([0, 1, 1, 0], bool)) == 1
    assert got(**greedy, repetition_penalty=2.0, counts={0: 0}) == 1, "the prompt counts too"
    assert got(**greedy, presence_penalty=2.0, counts={0: 0}) == 0, "the prompt does not count"
    assert got(**greedy, presence_penalty=1.5, counts={0: 9}) == 1
    assert got(**greedy, frequency_penalty=0.4, counts={0: 3}) == 1
    assert got(**greedy, frequency_penalty=0.4, counts={0: 2}) == 0
    assert got(**greedy, repetition_penalty=2.0, counts={0: 1, 1: 1}, bias={0: -2.5}) == 1
    # A negative logit gets more negative: -1 * 2 < -1.5.
    y = np.array([[-1.0, -1.5]], np.float32)
    row = dict(temperature=0.0, repetition_penalty=2.0, counts={0: 1})
    assert sample(device, y, [row])["token_ids"][0] == 1


@each_device
def test_ties(device: str) -> None:
    """Equal logits: top-k keeps exactly k and top-p just enough, lower ids first."""
    x = np.zeros((400, 50), np.float32)
    x[:, 20:30] = 1.0
    for row, support in [
        (dict(top_k=4), set(range(20, 24))),
        (dict(top_k=12), set(range(20, 30)) | {0, 1}),
        (dict(top_p=0.2), {20, 21, 22, 23, 24}),  # 10 e / (10 e + 40) = 0.405: a half of it
        (dict(min_p=0.9), set(range(20, 30))),
        (dict(temperature=0.0), {20}),
        (dict(top_k=4, top_p=0.5), {20, 21}),
    ]:
        rows = [dict(row, seed=i) for i in range(len(x))]
        assert set(sample(device, x, rows)["token_ids"].tolist()) == support, row


@each_device
@pytest.mark.parametrize("temperature", [1e-4, 0.02, 1e4, 1e30])
def test_extreme_temperatures(device: str, temperature: float) -> None:
    """No overflow, and what is banned stays banned however hot it is."""
    mask = np.arange(200) % 3 == 0
    rows = [dict(temperature=temperature, seed=i, mask=mask, bias={0: -np.inf}) for i in range(200)]
    logits = random_logits(5, 200, 200, 10)
    check_draws(device, logits, rows)


@each_device
def test_large_vocabulary(device: str) -> None:
    vocab, rng = 151_936, np.random.default_rng(6)
    rows: list[Row] = [
        {},
        dict(temperature=0.0),
        dict(top_k=50),
        dict(top_k=100_000),
        dict(top_p=0.95),
        dict(top_k=40, top_p=0.9, min_p=0.02, temperature=0.8),
        dict(min_p=0.05),
        dict(mask=rng.random(vocab) < 0.001),
        dict(PENALTIES, counts={int(t): 2 for t in rng.integers(0, vocab, 3000)}),
        dict(top_p=0.999, temperature=3.0),
    ]
    rows = [dict(row, seed=i) for i, row in enumerate(rows)]
    logits = random_logits(7, len(rows), vocab, 2.5)
    check_draws(device, logits, rows, most_unclear=0.5)  # a step of the CDF is often below 1e-5


# -- Log-probabilities ----------------------------------------------------------------------------


def check_logprobs(logits: Array, got: dict[str, Array], asked: list[int]) -> None:
    for i, count in enumerate(asked):
        if count < 0:
            continue
        want, token = ref.log_softmax(logits[i]), int(got["token_ids"][i])
        assert np.isclose(got["logprobs"][i], want[token], rtol=1e-6, atol=2e-6)
        lowest, highest = ref.rank_range(logits[i], token)
        assert lowest <= got["ranks"][i] <= highest
        order = np.lexsort((np.arange(len(want)), -want))[:count]
        np.testing.assert_array_equal(got["top_ids"][i, :count], order)
        np.testing.assert_allclose(
            got["top_logprobs"][i, :count], want[order], rtol=1e-6, atol=2e-6
        )


@each_device
def test_logprobs_are_raw(device: str) -> None:
    """Before bias, mask, penalties and temperature; asked for row by row."""
    rng = np.random.default_rng(8)
    asked = [-1, 0, 1, 5, 20, 3, -1, 20] * 5
    logits = random_logits(9, len(asked), 333)
    rows = [
        dict(PENALTIES, temperature=2.0, seed=i, num_logprobs=n, **extras(rng, 333, "all"))
        for i, n in enumerate(asked)
    ]
    got = sample(device, logits, rows, max_logprobs=20)
    check_logprobs(logits, got, asked)
    plain = [dict(row, num_logprobs=-1) for row in rows]
    np.testing.assert_array_equal(got["token_ids"], sample(device, logits, plain)["token_ids"])


@each_device
def test_logprobs_of_targets(device: str) -> None:
    """A target is scored, not drawn, whatever the other fields say."""
    rng = np.random.default_rng(10)
    logits = random_logits(11, 30, 101)
    targets = rng.integers(0, 101, 30)
    rows = [
        dict(target=int(t), num_logprobs=i % 4, temperature=0.0, mask=np.zeros(101, bool))
        for i, t in enumerate(targets)
    ]
    got = sample(device, logits, rows, max_logprobs=4)
    np.testing.assert_array_equal(got["token_ids"], targets)
    check_logprobs(logits, got, [row["num_logprobs"] for row in rows])


@each_device
def test_logprobs_with_ties_and_all_tokens(device: str) -> None:
    logits = np.round(random_logits(12, 6, 32, 1.0))
    rows = [dict(num_logprobs=32, seed=i) for i in range(6)]
    check_logprobs(logits, sample(device, logits, rows, max_logprobs=32), [32] * 6)


@each_device
def test_logprobs_far_apart_and_large(device: str) -> None:
    """Precise where a plain fp32 sum would not be: 151 936 tokens, and logits around 1e4."""
    even = np.zeros((1, 151_936), np.float32)
    got = sample(device, even, [dict(num_logprobs=2)], 2)
    assert np.isclose(got["logprobs"][0], -np.log(151_936), rtol=1e-6)
    assert got["top_ids"][0].tolist() == [0, 1]
    large = np.array([[1e4, 1e4 - 1, -1e4, 0]], np.float32)
    got = sample(device, large, [dict(num_logprobs=4, target=2)], 4)
    check_logprobs(large, got, [4])


# -- Bad numbers ----------------------------------------------------------------------------------

NAN, INF = np.nan, np.inf
HOPELESS: dict[str, list[float]] = {
    "nan": [NAN] * 40,
    "minus infinity": [-INF] * 40,
    "infinity": [INF] * 40,
    "mixed": [NAN, -INF, NAN, INF] * 10,
    "nan and minus infinity": [NAN, -INF] * 20,
    "one number": [NAN] * 39 + [1.0],
    "huge": [3.4e38, -3.4e38] * 20,
    "tiny": [1e-45, -1e-45] * 20,
}
ROWS: list[Row] = [
    {},
    dict(temperature=0.0),
    dict(top_k=3, top_p=0.5, min_p=0.1),
    dict(top_p=1e-9),
    dict(PENALTIES, counts={i: i % 3 for i in range(40)}),
    dict(bias={i: -INF for i in range(40)}),
    dict(bias={i: 3e38 for i in range(40)}, temperature=1e-4),
    dict(mask=np.arange(40) == 39),
    dict(mask=np.zeros(40, bool)),
    dict(temperature=1e38),
    dict(target=39),
]


@each_device
@pytest.mark.parametrize("name", HOPELESS)
def test_bad_logits_never_crash(device: str, name: str) -> None:
    """Some token of the vocabulary comes out, the masked-out ones never, and the neighbour's row is
    as it would be alone."""
    x = np.array([HOPELESS[name]] * (len(ROWS) * 2), np.float32)
    good = random_logits(13, len(ROWS), 40)
    x[1::2] = good
    rows = [dict(ROWS[i // 2], seed=i, num_logprobs=3) for i in range(len(x))]
    got = sample(device, x, rows, max_logprobs=3)
    alone = sample(device, good, rows[1::2], max_logprobs=3)
    for key in got:
        assert got[key][1::2].tobytes() == alone[key].tobytes(), key
    for i, row in enumerate(rows):
        if "mask" in row and row["mask"].any():
            assert row["mask"][got["token_ids"][i]]
    for ids in got["top_ids"]:
        assert len(set(ids.tolist())) == 3 and ids.min() >= 0 and ids.max() < 40


@each_device
def test_nan_counts_as_impossible(device: str) -> None:
    x = random_logits(14, 300, 30)
    x[:, ::2] = NAN
    rows = [dict(seed=i, **(dict(top_k=4) if i % 2 else dict(top_p=0.9))) for i in range(300)]
    check_draws(device, x, rows)
    assert sample(device, x, [dict(temperature=0.0)] * 300)["token_ids"].min() % 2 == 1


@each_device
def test_everything_banned_falls_back_to_the_mask(device: str) -> None:
    """The best raw logit that the mask allows; without a mask, the best."""
    x = random_logits(15, 2, 40)
    mask = np.arange(40) % 7 == 3
    ban = {i: -INF for i in range(40)}
    got = sample(device, x, [dict(bias=ban), dict(bias=ban, mask=mask)])["token_ids"]
    assert got[0] == x[0].argmax()
    assert got[1] == np.where(mask, x[1], -INF).argmax()


# -- Promise 1 ------------------------------------------------------------------------------------


@each_device
def test_rows_are_independent(device: str) -> None:
    """A row alone, in a batch, on one thread or two: the same bits."""
    rng, vocab, count = np.random.default_rng(16), 2053, 33
    rows: list[Row] = []
    for i in range(count):
        values = list(PARAMETERS.values())[i % len(PARAMETERS)]
        kind = ("counts", "bias", "mask", "all")[i % 4]
        rows.append(dict(values, **extras(rng, vocab, kind), seed=i, num_logprobs=i % 6))
    logits = random_logits(17, count, vocab)
    whole = ref.ops_for(device, 2).sample(logits, rows, 5)
    for threads in (1, 2):
        for i in range(count):
            alone = ref.ops_for(device, threads).sample(logits[i : i + 1], rows[i : i + 1], 5)
            for key, value in alone.items():
                assert value[0].tobytes() == whole[key][i].tobytes(), f"{key} of row {i}"


def test_devices_draw_alike() -> None:
    """Not promised bit for bit; but the same draws, since the cuts rarely lie on a boundary."""
    logits = random_logits(18, 200, 500)
    rows = [dict(top_p=0.9, seed=i) for i in range(200)]
    drawn = [sample(d, logits, rows)["token_ids"] for d in ref.DEVICES]
    for other in drawn[1:]:
        assert (other != drawn[0]).sum() <= 2
