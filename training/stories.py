"""A grammar-driven writer of children's stories: the training text of the small model.

`write_story` draws a plot, a cast, a place and an object, and walks through the plot's stages
(`story_plots`), of which each offers many sentences. The facts of a story are chosen before its
first word, so names keep their kinds and pronouns, and what was lost is what is found, where it
was seen. `story_request` phrases a user's wish together with the arguments that fulfil it;
`check_story` (`story_check`) finds what is inconsistent in a story that a model wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import NamedTuple

from training.story_check import check_story
from training.story_more_plots import MORE_PLOTS
from training.story_plots import FIRST_PLOTS, SHARED
from training.story_words import (
    BARRIERS,
    BOYS,
    CROSSERS,
    DARES,
    DISHES,
    ELDERS,
    FOODS,
    GENDER,
    GIRLS,
    KINDS,
    MORALS,
    NOISES,
    OBJECTS,
    PLACES,
    PLANTS,
    PRONOUNS,
    SKILLS,
    TRAITS,
    WEATHERS,
    WORKS,
)

__all__ = ["PLOTS", "Story", "check_story", "story_request", "write_story"]


@dataclass(slots=True)
class Story:
    """A story and the facts that it was written from (hero, kind, pronoun, friend, place, ...)."""

    text: str
    facts: dict[str, str]


class _Stage(NamedTuple):
    """One step of a plot: its sentences, each as (needed tag, forbidden tag, variants)."""

    optional: bool
    new_paragraph: bool
    sentences: tuple[tuple[str, str, tuple[str, ...]], ...]
    conditional: bool


_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_TAG = re.compile(r"<(!?)(\w+)>")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u(?!s|ni)|[AEIO][a-z])(?!one\b|once\b)")


def _expand(sentence: str) -> tuple[str, ...]:
    """All variants of a sentence with choices like `[a|b|]`, as format strings."""
    parts = _CHOICE.split(sentence)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple("".join(choice) for choice in product(*choices))


def _parse_stage(block: str, optional: bool, new_paragraph: bool) -> _Stage:
    sentences = []
    for line in block.splitlines():
        tag = _TAG.match(line)
        need, without = ("", "") if not tag else ("", tag[2]) if tag[1] else (tag[2], "")
        sentences.append((need, without, _expand(line[tag.end() :] if tag else line)))
    conditional = any(need or without for need, without, _ in sentences)
    return _Stage(optional, new_paragraph, tuple(sentences), conditional)


def _parse_plot(text: str) -> tuple[_Stage, ...]:
    stages = []
    for paragraph in text.strip().split("\n---\n"):
        for i, block in enumerate(paragraph.strip().split("\n\n")):
            optional = block.startswith("?\n")
            if block.startswith("@"):
                optional = block.endswith("?")
                block = SHARED[block.strip("@?\n")]
            block = block.removeprefix("?\n").strip()
            stages.append(_parse_stage(block, optional, i == 0))
    return tuple(stages)


PLOTS = FIRST_PLOTS | MORE_PLOTS

_STAGES = {name: _parse_plot(text) for name, text in PLOTS.items()}
_TOPIC_PLOT = {topic: plot for plot in PLOTS for topic in (plot, *MORALS[plot])}
_NAMES = {"she": GIRLS, "he": BOYS}
_KINDS = tuple(KINDS)
_ANIMALS = tuple(kind for kind in KINDS if kind not in ("girl", "boy"))
_PLOT_NAMES = tuple(PLOTS)
_OBJECTS = tuple(OBJECTS)
_ELDERS = tuple(ELDERS)
_SKILLS = tuple(SKILLS)

# plots that need something of their place or of their object
_PLACE_NEEDS = {
    "storm": "out",
    "brave": "out",
    "race": "out",
    "plant": "soil",
    "cross": "out",
    "clues": "out",
}
_OBJECT_NEEDS = {"mend": "break", "mistake": "break"}
_OBJECT_PLOTS = tuple(
    plot for plot in ("lost", "mend", "surprise", "mistake", "borrow", "honest") if plot in PLOTS
)
# what a skill or a work needs of its place
_NEEDS = {
    "swim": "water", "skip": "water", "raft": "water", "skate": "out", "ride": "out",
    "hop": "out", "climb": "out", "bake": "stove", "tree house": "soil", "swing": "soil",
    "scarecrow": "soil", "bird house": "out", "bridge": "out", "stone tower": "out",
    "pot of soup": "stove", "giant pancake": "stove",
}  # fmt: skip


def _places_of(plot: str) -> tuple[str, ...]:
    need = _PLACE_NEEDS.get(plot)
    return tuple(noun for noun, place in PLACES.items() if need is None or need in place.tags)


def _objects_of(plot: str) -> tuple[str, ...]:
    need = _OBJECT_NEEDS.get(plot)
    return tuple(noun for noun, (_, tags) in OBJECTS.items() if need is None or need in tags)


_PLOT_PLACES = {plot: _places_of(plot) for plot in PLOTS}
_PLOT_OBJECTS = {plot: _objects_of(plot) for plot in PLOTS}
_COLORS = frozenset(
    "red blue green yellow striped purple silver golden brown orange pink white".split()
)
_LENGTHS = {"short": 0.0, "medium": 0.5, "long": 1.0}


class _Writer:
    """The facts of one story as slots for its sentences."""

    def __init__(self, rng: Random) -> None:
        self.random = rng.random
        self.slots: dict[str, str] = {}
        self.tags: set[str] = set()

    def pick(self, items):
        return items[int(self.random() * len(items))]

    def two(self, items):
        """Two different items."""
        i = int(self.random() * len(items))
        return items[i], items[(i + 1 + int(self.random() * (len(items) - 1))) % len(items)]

    def character(self, name: str | None, kind: str | None, taken: str, prefix: str) -> None:
        """Fill the slots of the hero (no prefix) or of the friend (`f`)."""
        if kind is None:
            pool = _KINDS if self.random() < 0.8 else ("girl", "boy")
            if name is not None:
                wrong = "boy" if GENDER[name] == "she" else "girl"
                kind = self.pick([k for k in pool if k != wrong])
            else:
                kind = self.pick(pool)
        if name is None:
            gender = {"girl": "she", "boy": "he"}.get(kind) or self.pick(("she", "he"))
            name = self.pick(_NAMES[gender])
            while name == taken:
                name = self.pick(_NAMES[gender])
        subject, object_, possessive, reflexive = PRONOUNS[GENDER[name]]
        s = self.slots
        s[prefix + "k"] = kind
        s[prefix + "he"], s[prefix + "him"], s[prefix + "his"] = subject, object_, possessive
        s[prefix + "himself"] = reflexive
        s[prefix + "He"], s[prefix + "His"] = subject.capitalize(), possessive.capitalize()
        s[prefix + "hands"], s[prefix + "home"] = KINDS[kind][0], KINDS[kind][1]
        s["F" if prefix else "N"] = name

    def scene(self, plot: str, place: str | None, thing: str | None) -> None:
        """Fill the slots of place, weather, object, food and elder."""
        s = self.slots
        where = PLACES[place or self.pick(_PLOT_PLACES[plot])]
        s["p"], s["tp"], s["pn"] = where.at, where.to, where.noun
        s["see"], s["see2"] = self.two(where.sees)
        s["spot"], s["spot2"] = self.two(where.spots)
        s["sound"] = self.pick(where.sounds)
        s["w"] = self.pick(WEATHERS)
        adjective, _, noun = (thing or "").rpartition(" ")
        noun = noun or self.pick(_PLOT_OBJECTS[plot])
        adjectives, tags = OBJECTS[noun]
        adjective = adjective or self.pick(adjectives)
        s["on"], s["o"] = noun, f"{adjective} {noun}"
        s["color"] = adjective if adjective in _COLORS else "odd"
        s["food"], s["dish"] = self.pick(FOODS), self.pick(DISHES)
        s["E"], s["t"], s["ft"] = self.pick(_ELDERS), *self.two(TRAITS)
        s["elder"] = self.pick(("mother", "father", "aunt", "uncle"))
        out = "out" in where.tags
        moods = {
            "shower": out and plot != "storm",
            "hunger": out and plot != "sharing",
            "snack": plot != "sharing",
            "rolls": out and "roll" in tags,
            "flies": out and "light" in tags,
        }
        self.tags |= where.tags | tags | {s["w"]} | {tag for tag, holds in moods.items() if holds}

    def fits(self, what: str) -> bool:
        """Whether the place has what this skill or this work needs."""
        return what not in _NEEDS or _NEEDS[what] in self.tags

    def theme(self, plot: str) -> None:
        """Fill the slots that one plot has for itself."""
        s = self.slots
        if plot == "skill":
            can = KINDS[s["k"]][2]
            skills = [k for k in _SKILLS if k not in can and self.fits(k)]
            s["do"], s["doing"], fail, s["tip"], good = SKILLS[self.pick(skills)]
            s["fail"], s["good"] = fail.format_map(s), good.format_map(s)
            s["fail_"], s["good_"] = s["fail"], s["good"]
        elif plot in _THEMES:
            table, keys = _THEMES[plot]
            rows = [row for row in table if self.fits(row[0])]
            s.update(zip(keys, self.pick(rows), strict=True))
            if plot == "cross":
                s.update(zip(("barrier", "tool", "peril"), self.pick(BARRIERS), strict=True))

    def sentence(self, stage: _Stage) -> str:
        sentences = stage.sentences
        if stage.conditional:
            tags = self.tags
            sentences = [
                x
                for x in sentences
                if (not x[0] or x[0] in tags) and (not x[1] or x[1] not in tags)
            ]
        return self.pick(self.pick(sentences)[2]).format_map(self.slots)

    def text(self, plot: str, fullness: float) -> str:
        paragraphs: list[list[str]] = []
        fresh = False
        for stage in _STAGES[plot]:
            fresh = fresh or stage.new_paragraph
            if stage.optional and self.random() > fullness:
                continue
            if fresh:
                paragraphs.append([])
                fresh = False
            paragraphs[-1].append(self.sentence(stage))
        text = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)
        return _ARTICLE.sub(r"\1n ", text)


_THEMES: dict[str, tuple[tuple, tuple[str, ...]]] = {
    "brave": (DARES, ("dare", "why", "need")),
    "plant": (PLANTS, ("seed", "plant", "fruit")),
    "noise": (NOISES, ("noise", "fear", "cause")),
    "make": (WORKS, ("work", "step1", "step2", "trouble", "answer", "use")),
    "cross": (CROSSERS, ("small", "reason")),
}


def _choose_plot(
    w: _Writer, topic: str | None, place: str | None, noun: str | None, with_object: bool
) -> str:
    if topic is not None:
        if topic not in _TOPIC_PLOT:
            raise ValueError(f"unknown topic {topic!r}; one of {sorted(_TOPIC_PLOT)}")
        plots: tuple[str, ...] = (_TOPIC_PLOT[topic],)
    else:
        plots = _OBJECT_PLOTS if with_object else _PLOT_NAMES
    if place is not None:
        plots = tuple(p for p in plots if place in _PLOT_PLACES[p])
    if noun is not None:
        plots = tuple(p for p in plots if noun in _PLOT_OBJECTS[p])
    if not plots:
        raise ValueError(f"no plot fits topic {topic!r} with place {place!r} and thing {noun!r}")
    return w.pick(plots)


def _check_arguments(hero, kind, place, thing, length) -> None:
    for what, value, table in (
        ("hero", hero, GENDER),
        ("kind", kind, KINDS),
        ("place", place, PLACES),
        ("thing", thing and thing.split()[-1], OBJECTS),
        ("length", length, _LENGTHS),
    ):
        if value is not None and value not in table:
            raise ValueError(f"unknown {what} {value!r}; one of {sorted(table)}")
    gendered = {"girl": "she", "boy": "he"}.get(kind)
    if hero is not None and gendered and GENDER[hero] != gendered:
        raise ValueError(f"hero {hero!r} is not the name of a {kind}")


def write_story(
    rng: Random,
    *,
    hero: str | None = None,
    kind: str | None = None,
    place: str | None = None,
    topic: str | None = None,
    thing: str | None = None,
    length: str | None = None,
) -> Story:
    """Write a story; what is given is obeyed, the rest is drawn from `rng`.

    hero: a name; kind: what the hero is ("fox"); place: a noun of the place table ("forest");
    topic: a plot's name or one of its topics ("sharing"); thing: the object that the story turns
    on ("ball" or "red ball"); length: "short", "medium" or "long".
    """
    _check_arguments(hero, kind, place, thing, length)
    w = _Writer(rng)
    plot = _choose_plot(w, topic, place, thing and thing.split()[-1], thing is not None)
    w.character(hero, kind, "", "")
    w.character(None, None, w.slots["N"], "f")
    w.scene(plot, place, thing)
    w.theme(plot)
    if w.random() < 0.35:
        w.tags.add("once")
    else:
        w.tags.add("other")
    fullness = _LENGTHS[length] if length else w.random()
    text = w.text(plot, fullness)
    s = w.slots
    facts = {
        "hero": s["N"], "kind": s["k"], "pronoun": s["he"],
        "friend": s["F"], "friend_kind": s["fk"], "friend_pronoun": s["fhe"],
        "place": s["pn"], "plot": plot, "topic": MORALS[plot][0], "weather": s["w"],
        "opening": "once" if "once" in w.tags else "other",
    }  # fmt: skip
    if plot in _OBJECT_PLOTS:
        facts["thing"] = s["o"]
        facts["spot"] = s["spot"]
    for key in ("do", "dare", "plant", "noise", "work", "small"):
        if key in s:
            facts["detail"] = s[key]
    return Story(text, facts)


_BARE = (
    "Tell me a story.", "Please write a short story.", "Can you tell me a story?",
    "I would like to hear a story.", "Write a story for children.", "Tell a bedtime story.",
)  # fmt: skip
_ASK = (
    "Tell me a story about {x}.", "Write a short story about {x}.",
    "Please tell a story about {x}.", "Can you write a story about {x}?",
    "I want a story about {x}.",
    "Make up a story about {x}, please.", "Could you tell me a tale about {x}?",
    "Write a children's story about {x}.", "My child would love a story about {x}.",
    "Story time! Something about {x}, please.", "Do you know a story about {x}?",
    "Write me a little story about {x}.",
)  # fmt: skip
_THING_CLAUSES = {
    "lost": ("who lost a {o}", "who lost a {o} and found it again"),
    "mend": ("who broke a {o} and mended it", "with a broken {o}"),
    "surprise": ("who gave a friend a {o}", "who hid a {o} as a birthday surprise"),
    "borrow": ("who borrowed a {o}", "who borrowed a {o} and gave it back"),
    "honest": ("who found a {o}", "who found a {o} and looked for its owner"),
    "mistake": ("who broke a friend's {o}", "who had to say sorry about a {o}"),
}


def story_request(rng: Random) -> tuple[str, dict[str, str]]:
    """A user's wish for a story, and the arguments of `write_story` that fulfil it."""
    w = _Writer(rng)
    if w.random() < 0.12:
        return w.pick(_BARE), {}
    wish: dict[str, str] = {}
    draw = w.random()
    if draw < 0.15:  # a topic alone
        wish["topic"] = w.pick(MORALS[w.pick(_PLOT_NAMES)])
        return w.pick(_ASK).format(x=wish["topic"]), wish
    w.character(None, None, "", "")
    wish["kind"] = w.slots["k"]
    x = "a " + wish["kind"]
    if w.random() < 0.6:
        wish["hero"] = w.slots["N"]
        named = w.pick(("a {k} named {N}", "a {k} called {N}", "{N} the {k}", "{N}, a {k}"))
        x = named.format_map(w.slots)
    if draw < 0.45:
        plot = w.pick(_OBJECT_PLOTS)
        w.scene(plot, None, None)
        wish["topic"], wish["thing"] = plot, w.slots["o"]
        comma = "," if x.endswith(f", a {wish['kind']}") and plot != "mend" else ""
        x += f"{comma} " + w.pick(_THING_CLAUSES[plot]).format_map(w.slots)
    elif draw < 0.7:
        place = PLACES[w.pick(tuple(PLACES))]
        wish["place"] = place.noun
        x += " " + place.at
    elif draw < 0.8:
        plot = w.pick(_PLOT_NAMES)
        wish["topic"] = w.pick(MORALS[plot])
        x += f"{',' * (', a ' in x)} and {wish['topic']}"
    text = w.pick(_ASK).format(x=x)
    if w.random() < 0.1:
        wish["length"] = w.pick(("short", "long"))
        text += " Keep it short." if wish["length"] == "short" else " Make it long."
    return _ARTICLE.sub(r"\1n ", text), wish
