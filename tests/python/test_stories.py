"""The story writer: varied, consistent by its own checker, and the checker finds planted errors."""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from training import stories  # noqa: E402
from training.story_words import GENDER, KINDS, OBJECTS, PLACES  # noqa: E402

COUNT = 2000


@cache
def sample() -> tuple[stories.Story, ...]:
    return tuple(stories.write_story(Random(seed)) for seed in range(COUNT))


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def a_story(accept) -> stories.Story:
    return next(story for story in sample() if accept(story))


def test_the_same_seed_writes_the_same_story() -> None:
    for seed in range(50):
        first, second = (stories.write_story(Random(seed)) for _ in range(2))
        assert (first.text, first.facts) == (second.text, second.facts)
    assert len({story.text for story in sample()}) == COUNT


def test_the_tables_are_as_large_as_the_variety_needs() -> None:
    assert len(GENDER) >= 60 and set(GENDER.values()) == {"she", "he"}
    assert len(KINDS) >= 25
    assert len(PLACES) >= 30
    assert len(OBJECTS) >= 50


def test_lengths() -> None:
    lengths = [len(story.text.split()) for story in sample()]
    assert min(lengths) >= 80 and max(lengths) <= 400
    assert 140 <= sum(lengths) / COUNT <= 220
    means = [
        sum(len(stories.write_story(Random(i), length=n).text.split()) for i in range(100)) / 100
        for n in ("short", "medium", "long")
    ]
    assert means[0] + 20 < means[1] < means[2] - 20


def test_stories_do_not_read_alike() -> None:
    texts = [story.text for story in sample()]
    assert len({story.facts["plot"] for story in sample()}) >= 12
    assert len({re.split(r"(?<=[.!?])", text)[0] for text in texts}) > 1200
    counts = Counter(gram for text in texts for gram in grams(text, 8) if gram[0] != "Once")
    assert max(counts.values()) < 0.05 * COUNT
    four = [gram for text in texts for gram in grams(text, 4)]
    assert len(set(four)) / len(four) > 0.3


def test_a_third_opens_with_once_upon_a_time() -> None:
    once = sum(story.text.startswith("Once upon a time, ") for story in sample())
    assert 0.3 < once / COUNT < 0.4


def test_vocabulary_is_small_enough_for_a_small_tokenizer() -> None:
    words = {w for story in sample() for w in re.findall(r"[a-z]+", story.text.lower())}
    assert 1200 <= len(words) <= 2200


def test_articles_and_form() -> None:
    silent = {"an hour", "An hour"}
    for text in (story.text for story in sample()):
        assert text.isascii()
        wrong = re.findall(r"\b[Aa] [aeiou]\w*|\b[Aa]n [b-df-hj-np-tv-z]\w*", text)
        assert set(wrong) <= silent, wrong
        assert not re.search(r"[{}\[\]|<>@_]", text), text
        assert not re.search(r"(?:^|[.!?] |\n)\"?[a-z]", text), text
        assert not re.search(r" [.,!?]|[.,]{2}|  |\n{3}", text), text


def test_written_stories_are_consistent() -> None:
    for seed, story in enumerate(sample()):
        assert stories.check_story(story.text) == [], (seed, story.text)


def test_facts_are_told() -> None:
    for story in sample():
        facts, text = story.facts, story.text
        assert facts["hero"] in text and facts["friend"] in text
        assert re.search(rf"\b{facts['kind']}\b", text) and facts["place"] in text
        assert GENDER[facts["hero"]] == facts["pronoun"]
        if "thing" in facts:
            assert facts["thing"] in text


def test_swapped_name_is_found() -> None:
    for story in sample()[:300]:
        hero, friend = story.facts["hero"], story.facts["friend"]
        stranger = next(n for n in GENDER if n not in (hero, friend))
        head, _, tail = story.text.rpartition(hero)
        assert stories.check_story(head + stranger + tail)


def test_swapped_kind_is_found() -> None:
    for story in sample()[:300]:
        name, kind = story.facts["hero"], story.facts["kind"]
        other = "owl" if kind != "owl" else "fox"
        text = story.text + f" {name} the {other} smiled."
        assert any(f"{name} is a" in v for v in stories.check_story(text)), text


def test_swapped_pronoun_is_found() -> None:
    swap = {"he": "she", "she": "he"}
    found = 0
    picked = [s for s in sample() if s.facts["pronoun"] == s.facts["friend_pronoun"]][:200]
    for story in picked:
        pronoun = story.facts["pronoun"]
        bare = re.sub(r'"[^"]*"', lambda m: "#" * len(m[0]), story.text)
        hits = list(re.finditer(rf"\b{pronoun}\b", bare))
        if not hits:
            found += 1
            continue
        text = story.text[: hits[-1].start()] + swap[pronoun] + story.text[hits[-1].end() :]
        found += any("does not fit" in v for v in stories.check_story(text))
    assert found >= 0.9 * len(picked)


def test_swapped_object_is_found() -> None:
    for story in (s for s in sample() if s.facts["plot"] == "lost"):
        other = "yellow kite" if story.facts["thing"].split()[1] != "kite" else "green marble"
        head, _, tail = story.text.rpartition(story.facts["thing"])
        assert any("object" in v for v in stories.check_story(head + other + tail))


def test_thing_found_elsewhere_than_seen_is_reported() -> None:
    story = a_story(lambda s: f"I saw it {s.facts.get('spot')}." in s.text)
    head, _, tail = story.text.rpartition(story.facts["spot"])
    assert any("not found there" in v for v in stories.check_story(head + "in the mud" + tail))


def test_second_place_is_found() -> None:
    story = a_story(lambda s: s.facts["place"] == "forest")
    assert any("place" in v for v in stories.check_story(story.text + " They smiled at the beach."))


def test_repeated_sentence_is_found() -> None:
    for story in sample()[:200]:
        sentences = re.findall(r"(?<=[.!?] )[A-Z][^.!?\n\"]{20,}\.(?=[ \n])", story.text)
        text = story.text + " " + sentences[-1]
        assert any(v.startswith("repeated") for v in stories.check_story(text)), text


def test_unbalanced_quote_is_found() -> None:
    for story in (s for s in sample()[:300] if '"' in s.text):
        text = story.text.replace('"', "", 1)
        assert any(v.startswith("unbalanced") for v in stories.check_story(text))


def test_cut_end_is_found() -> None:
    for story in sample()[:300]:
        assert "the text is cut off" in stories.check_story(story.text[:-10].rstrip('.!?" '))


def test_too_many_characters_are_found() -> None:
    text = sample()[0].text + " Then a fox named Bruno and a bear named Stella came home happy."
    assert any(v.startswith("too many") for v in stories.check_story(text))


def test_requests_are_obeyed() -> None:
    phrasings = set()
    given = Counter()
    for seed in range(1500):
        text, wish = stories.story_request(Random(seed))
        story = stories.write_story(Random(seed + 1), **wish)
        given.update(wish.keys())
        assert text[-1] in ".?!" and not re.search(r"[{}]", text)
        assert not stories.check_story(story.text)
        for key in ("hero", "kind", "place", "thing"):
            if key in wish:
                assert wish[key] in text
                assert story.facts[key] == wish[key]
                assert re.search(rf"\b{wish[key]}\b", story.text)
        if "topic" in wish and wish["topic"] != story.facts["plot"]:
            assert wish["topic"] in text
        phrasings.add(" ".join(text.split()[:4]))
    assert len(phrasings) >= 12
    assert {"hero", "kind", "place", "thing", "topic", "length"} <= set(given)


@pytest.mark.parametrize(
    ("wish", "culprit"),
    [
        ({"hero": "Xerxes"}, "hero"),
        ({"kind": "whale"}, "kind"),
        ({"place": "moon"}, "place"),
        ({"thing": "red sword"}, "thing"),
        ({"length": "endless"}, "length"),
        ({"topic": "taxes"}, "topic"),
        ({"hero": "Mia", "kind": "boy"}, "Mia"),
        ({"topic": "storm", "place": "kitchen"}, "kitchen"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused(wish: dict[str, str], culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        stories.write_story(Random(0), **wish)
