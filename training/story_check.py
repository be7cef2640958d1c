"""What is inconsistent in a story: the grammar's own scorer for text that a model wrote."""

from __future__ import annotations

import re

from training.story_words import ELDERS, GENDER, KINDS, OBJECTS, PLACES

MAX_CAST = 2  # named characters besides one elder

_NAME = re.compile(r"\b(?:" + "|".join(GENDER) + r")\b")
_PERSON = re.compile(r"\b(?:" + "|".join([*GENDER, *ELDERS]) + r")\b")
_KIND = "(" + "|".join(KINDS) + ")"
_NAMES = "(" + "|".join(GENDER) + ")"
_NAMED = re.compile(rf"\b{_KIND}(?: from [a-z ]+?)?,? (?:named|called) {_NAMES}\b")
_IS = re.compile(
    rf"\b{_NAMES}(?:,| is| was| am)?(?: just| only)? (?:the|an?) (?:[a-z]+ ){{0,2}}?{_KIND}\b(?! mask)"
)
_QUOTED = re.compile(r'"[^"]*"')
_SENTENCE = re.compile(r'[^.!?\n]*[.!?]+"?')
_SHE = re.compile(r"\b(?:she|her|hers|herself)\b", re.I)
_HE = re.compile(r"\b(?:he|him|his|himself)\b", re.I)
_ADJECTIVES = sorted({a for adjectives, _ in OBJECTS.values() for a in adjectives})
_THING = re.compile(rf"\b({'|'.join(_ADJECTIVES)}) ({'|'.join(OBJECTS)})\b")
# nouns that also have another sense in the stories
_LOOSE = {
    "top",
    "ring",
    "bell",
    "train",
    "cart",
    "key",
    "plate",
    "cup",
    "brush",
    "shell",
    "feather",
    "whistle",
}
_NOUN = re.compile(
    rf"\b(?:the|The|his|her|my|your) ({'|'.join(n for n in OBJECTS if n not in _LOOSE)})\b"
)
_PLACE = re.compile(
    "|".join(rf"\b(?:{p.at.rsplit(' ', 1)[0]}|to the) {noun}\b" for noun, p in PLACES.items())
)
_SAW = re.compile(
    r"\bI (?:think I )?saw (?:it|something \w+) "
    r"((?:under|behind|between|inside|in|next to|beside|among|near|at|on) [a-z' ]+?)"
    r"(?: just now| a while| when| not long|[.,!?\"])"
)
_ENDING = re.compile(
    r"the end|home|sle[ep]|dream|friend|smil|happy|glad|proud|never forgot|remember|that day|"
    r"laugh|grin|stars|sun went down|good day|heart|bed\b",
    re.I,
)


def _check_cast(text: str, found: list[str]) -> dict[str, str]:
    """Introductions, kinds and the size of the cast; returns name -> kind."""
    kinds: dict[str, str] = {}
    first_intro: dict[str, int] = {}
    pairs = [(m.end(), m[2], m[1]) for m in _NAMED.finditer(text)]
    pairs += [(m.end(), m[1], m[2]) for m in _IS.finditer(text)]
    for position, name, kind in sorted(pairs):
        if kinds.setdefault(name, kind) != kind:
            found.append(f"{name} is a {kinds[name]} and a {kind}")
        if {"girl": "she", "boy": "he"}.get(kind, GENDER[name]) != GENDER[name]:
            found.append(f"{name} is not the name of a {kind}")
        first_intro.setdefault(name, position)
    seen: dict[str, int] = {}
    for match in _NAME.finditer(text):
        seen.setdefault(match[0], match.start())
    for name, position in seen.items():
        if name not in first_intro:
            found.append(f"{name} is never introduced")
        elif "\n\n" in text[position : first_intro[name]]:
            found.append(f"{name} acts before being introduced")
    if len(seen) > MAX_CAST:
        found.append(f"too many characters: {', '.join(seen)}")
    elders = {elder for elder in ELDERS if re.search(rf"\b{elder}\b", text)}
    if len(elders) > 1:
        found.append(f"more than one elder: {', '.join(sorted(elders))}")
    return kinds


def _check_pronouns(text: str, found: list[str]) -> None:
    """He and she mean somebody of the sentence or, before its first name, of what came before."""
    recent: set[str] = set()
    for paragraph in text.split("\n\n"):
        bare = _QUOTED.sub('"."', paragraph)
        for sentence in _SENTENCE.findall(bare):
            names = list(_PERSON.finditer(sentence))
            genders = {GENDER.get(m[0]) or ELDERS[m[0]] for m in names}
            for gender, pattern in (("she", _SHE), ("he", _HE)):
                for match in pattern.finditer(sentence):
                    early = not names or match.start() < names[0].start()
                    if gender not in (genders | recent if early else genders):
                        found.append(f"{match[0]} does not fit: {sentence.strip()}")
            recent |= genders


def _check_things(text: str, found: list[str]) -> None:
    """One object turns the story, it lies where it was seen, and all happens at one place."""
    things = {" ".join(m) for m in _THING.findall(text)}
    if len(things) > 1:
        found.append(f"more than one object: {', '.join(sorted(things))}")
    nouns = {thing.split()[-1] for thing in things}
    for noun in dict.fromkeys(_NOUN.findall(text)):
        if noun not in nouns:
            found.append(f"the {noun} was never mentioned before")
    places = {match.split()[-1] for match in _PLACE.findall(text)}
    if len(places) > 1:
        found.append(f"more than one place: {', '.join(sorted(places))}")
    for spot in _SAW.findall(text):
        if text.count(spot) < 2:
            found.append(f"seen {spot}, but not found there")


def _check_form(text: str, found: list[str]) -> None:
    for paragraph in text.split("\n\n"):
        if paragraph.count('"') % 2:
            found.append(f"unbalanced quotes: {paragraph[:40]}")
        if paragraph != paragraph.strip() or "\n" in paragraph or "  " in paragraph:
            found.append(f"stray white space: {paragraph[:40]!r}")
    seen: set[str] = set()
    for sentence in _SENTENCE.findall(text):
        sentence = sentence.strip(' "')
        if sentence.count(" ") >= 3 and sentence in seen:
            found.append(f"repeated: {sentence}")
        seen.add(sentence)
    if not re.search(r'[.!?]"?$', text):
        found.append("the text is cut off")
    elif not _ENDING.search(text.rsplit("\n\n", 1)[-1]):
        found.append("no ending")


def check_story(text: str) -> list[str]:
    """The violations found in a story, in words; empty where it is consistent.

    Checked: introductions, kinds, pronouns and number of the characters; one object, one place,
    found where it was seen; quotes, repetitions, an ending.
    """
    found: list[str] = []
    _check_cast(text, found)
    _check_pronouns(text, found)
    _check_things(text, found)
    _check_form(text, found)
    return found
