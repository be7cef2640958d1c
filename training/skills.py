"""Skills as questions with one right answer: what the model is trained on and scored by.

Every example has a key; a hash of it decides whether it belongs to the training or to the test
set, so no question that a score is computed from was ever trained on.
"""

from __future__ import annotations

import json
import random
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from . import stories, words

HELD_OUT = 16  # one example in so many belongs to the test set


@dataclass(slots=True)
class Example:
    prompt: str
    answer: str
    key: str
    """What makes it the same question, however it is put."""
    spelled: bool = False
    """The answer is trained as one token a character."""


def held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT == 0


def sample(skill: str, rng: random.Random, test: bool = False) -> Example:
    """An example of the training or of the test set."""
    make = SKILLS[skill]
    while True:
        example = make(rng)
        if held_out(example.key) == test:
            return example


def is_right(skill: str, example: Example, answer: str) -> bool:
    """Whether an answer counts: word for word, JSON by its value."""
    if skill != "json":
        return answer.strip() == example.answer
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except json.JSONDecodeError:
        return False


# -- Arithmetic -----------------------------------------------------------------------------------

_SUMS = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "{a} plus {b}",
    "Can you add {a} and {b}?",
    "{n} has {a} {i}s and gets {b} more. How many {i}s does {n} have now?",
)
_DIFFERENCES = (
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "{a}-{b}",
    "Subtract {b} from {a}.",
    "Calculate {a} - {b}.",
    "How much is {a} minus {b}?",
    "What is the difference of {a} and {b}?",
    "{a} minus {b}",
    "Can you subtract {b} from {a}?",
    "{n} has {a} {i}s and gives {b} away. How many {i}s are left?",
)


def _number(rng: random.Random) -> int:
    """Up to three digits; short numbers are rare among those below 1000, so they get a share."""
    return rng.randrange(10 ** rng.choice((1, 2, 3, 3, 3, 3)))


def _put_numbers(rng: random.Random, phrasings: tuple[str, ...], a: int, b: int) -> str:
    text = rng.choice(phrasings)
    return text.format(a=a, b=b, n=rng.choice(words.NAMES), i=rng.choice(words.NOUNS))


def addition(rng: random.Random) -> Example:
    a, b = _number(rng), _number(rng)
    return Example(_put_numbers(rng, _SUMS, a, b), str(a + b), f"{a}+{b}")


def subtraction(rng: random.Random) -> Example:
    a, b = _number(rng), _number(rng)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    return Example(_put_numbers(rng, _DIFFERENCES, a, b), str(a - b), f"{a}-{b}")


# -- Strings and lists ----------------------------------------------------------------------------


@cache
def _story_words() -> list[str]:
    """Short words that stories use, and the nouns."""
    rng = random.Random("words")
    found = set(words.NOUNS)
    for _ in range(600):
        found.update(re.findall(r"\b[a-z]{2,10}\b", stories.write_story(rng).text))
    return sorted(found)


def _string(rng: random.Random, longest: int) -> str:
    length = rng.randint(1, longest)
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(_story_words())[:longest]
    if kind < 0.35:  # words run together: what the letters of a token are, whatever stands beside
        return "".join(rng.choices(_story_words(), k=rng.randint(2, 3)))[:longest]
    alphabet = string.ascii_lowercase
    if kind > 0.9:
        alphabet = string.ascii_letters + string.digits
    elif kind > 0.8:
        alphabet = string.digits
    elif kind > 0.72:
        alphabet = string.ascii_uppercase
    return "".join(rng.choices(alphabet, k=length))


_COPY = (
    "Repeat: {s}",
    "Copy this: {s}",
    'Repeat "{s}" exactly.',
    'Say "{s}".',
    'Copy the string "{s}".',
    "Write this once more: {s}",
    "Repeat after me: {s}",
    "copy {s}",
)
_REVERSE = (
    "Reverse: {s}",
    'Reverse the string "{s}".',
    'Write "{s}" backwards.',
    "Spell {s} backwards.",
    'What is "{s}" in reverse?',
    "Reverse the word {s}.",
    "reverse {s}",
    "Reverse the letters of {s}.",
)


def copying(rng: random.Random) -> Example:
    text = _string(rng, 24)
    return Example(rng.choice(_COPY).format(s=text), text, "copy " + text)


def reversing(rng: random.Random) -> Example:
    text = _string(rng, 12)
    prompt = rng.choice(_REVERSE).format(s=text)
    return Example(prompt, text[::-1], "reverse " + text, spelled=True)


_SORT_UP = (
    "Sort these numbers: {s}",
    "Sort from smallest to largest: {s}",
    "Put these numbers in order: {s}",
    "Sort in ascending order: {s}",
    "Sort: {s}",
    "sort {s}",
)
_SORT_DOWN = (
    "Sort from largest to smallest: {s}",
    "Sort in descending order: {s}",
    "Put these numbers in order, largest first: {s}",
)
_SORT_WORDS = (
    "Sort these words: {s}",
    "Sort alphabetically: {s}",
    "Put these words in alphabetical order: {s}",
    "Sort: {s}",
    "sort {s}",
)
_SORT_LETTERS = (
    "Sort these letters: {s}",
    "Put these letters in alphabetical order: {s}",
)


def sorting(rng: random.Random) -> Example:
    count = rng.randint(2, 8)
    kind = rng.random()
    if kind < 0.6:
        below = rng.choice((10, 100, 100, 1000))
        numbers = [rng.randrange(below) for _ in range(count)]
        down = rng.random() < 0.35
        items = [str(n) for n in numbers]
        answer = [str(n) for n in sorted(numbers, reverse=down)]
        template = rng.choice(_SORT_DOWN if down else _SORT_UP)
    else:
        pool = words.NOUNS if kind < 0.85 else list(string.ascii_lowercase)
        items = rng.sample(pool, count)
        answer = sorted(items)
        template = rng.choice(_SORT_WORDS if kind < 0.85 else _SORT_LETTERS)
    key = "sort " + " ".join(items)
    listed = rng.choice((", ", ", ", " ")).join(items)
    return Example(template.format(s=listed), ", ".join(answer), key)


_COUNT = (
    'How many times does "{w}" appear? {s}',
    'Count the word "{w}": {s}',
    'How often does "{w}" occur here: {s}',
    "How many {w}s are there? {s}",
)
_COUNT_ALL = (
    "How many words are there? {s}",
    "Count the words: {s}",
)
_COUNT_SIGNS = (
    "Count the signs: {s}",
    "How many signs are there? {s}",
)


def counting(rng: random.Random) -> Example:
    kind = rng.random()
    count = rng.randint(1, 20)
    if kind < 0.1:
        first = rng.randint(1, 40)
        listed = ", ".join(str(i) for i in range(first, first + count))
        prompt = f"Count from {first} to {first + count - 1}."
        return Example(prompt, listed, "count " + prompt)
    if kind < 0.25:
        text = " ".join([rng.choice("*#+@x")] * count)
        prompt = rng.choice(_COUNT_SIGNS).format(s=text)
    elif kind < 0.4:
        text = " ".join(rng.choices(words.NOUNS, k=count))
        prompt = rng.choice(_COUNT_ALL).format(s=text)
    else:
        word, *others = rng.sample(words.NOUNS, rng.randint(2, 4))
        items = [word] * count + rng.choices(others, k=rng.randint(0, 10))
        rng.shuffle(items)
        text = " ".join(items)
        prompt = rng.choice(_COUNT).format(w=word, s=text)
    return Example(prompt, str(count), "count " + prompt)


# -- JSON -----------------------------------------------------------------------------------------

_RECORDS: tuple[tuple[tuple[str, ...], dict[str, Callable[[random.Random], object]]], ...] = (
    (
        (
            "{name} is {age} years old and lives in {city}.",
            "{name}, who lives in {city}, is {age} years old.",
            "In {city} lives {name}, aged {age}.",
        ),
        {
            "name": lambda r: r.choice(words.NAMES),
            "age": lambda r: r.randint(3, 99),
            "city": lambda r: r.choice(words.CITIES),
        },
    ),
    (
        (
            "{name} works as a {job} in {city}.",
            "The {job} from {city} is called {name}.",
            "{name} from {city} is a {job}.",
        ),
        {
            "name": lambda r: r.choice(words.NAMES),
            "job": lambda r: r.choice(words.JOBS),
            "city": lambda r: r.choice(words.CITIES),
        },
    ),
    (
        (
            "The {colour} {item} costs {price} coins.",
            "For {price} coins you can buy the {colour} {item}.",
            "They sell a {colour} {item} for {price} coins.",
        ),
        {
            "item": lambda r: r.choice(words.NOUNS),
            "colour": lambda r: r.choice(words.COLOURS),
            "price": lambda r: r.randint(1, 999),
        },
    ),
    (
        (
            "{name} bought {count} {item}s on {day}.",
            "On {day}, {name} bought {count} {item}s.",
        ),
        {
            "name": lambda r: r.choice(words.NAMES),
            "count": lambda r: r.randint(2, 99),
            "item": lambda r: r.choice(words.NOUNS),
            "day": lambda r: r.choice(words.DAYS),
        },
    ),
    (
        (
            "{name} has a pet {animal} called {pet}.",
            "The {animal} {pet} belongs to {name}.",
        ),
        {
            "name": lambda r: r.choice(words.NAMES[:25]),
            "animal": lambda r: r.choice(words.ANIMALS),
            "pet": lambda r: r.choice(words.NAMES[25:]),
        },
    ),
)
_JSON = (
    "Write JSON with the keys {keys}: {s}",
    "Fill in JSON with {keys}. {s}",
    "{s} Give {keys} as JSON.",
    "Turn this into JSON with the keys {keys}: {s}",
)


def json_record(rng: random.Random) -> Example:
    sentences, fields = rng.choice(_RECORDS)
    values = {name: draw(rng) for name, draw in fields.items()}
    text = rng.choice(sentences).format(**values)
    keys = rng.sample(list(fields), rng.randint(2, len(fields)))
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    prompt = rng.choice(_JSON).format(keys=listed, s=text)
    return Example(prompt, json.dumps({k: values[k] for k in keys}), "json " + text)


# -- Answers of one word --------------------------------------------------------------------------

_ONE_WORD = (
    "{q} Answer with one word.",
    "Answer with one word: {q}",
    "{q} One word only.",
    "In one word: {q}",
)


def _told_fact(rng: random.Random) -> tuple[str, str]:
    """A question about something just said."""
    name, other = rng.sample(words.NAMES, 2)
    colour, colour2 = rng.sample(words.COLOURS, 2)
    item, item2 = rng.sample(words.NOUNS, 2)
    city = rng.choice(words.CITIES)
    told = f"{name} has a {colour} {item}. {other} has a {colour2} {item2}."
    moved = f"{name} went to {city} with the {item}. {other} stayed at home."
    return rng.choice(
        (
            (f"{told} What colour is the {item2}?", colour2),
            (f"{told} What colour is the {item}?", colour),
            (f"{told} Who has the {item2}?", other),
            (f"{told} Who has the {item}?", name),
            (f"{moved} Where did {name} go?", city),
            (f"{moved} Who stayed at home?", other),
            (f"{moved} Who went to {city}?", name),
        )
    )


def _known_fact(rng: random.Random) -> tuple[str, str]:
    kind = rng.randrange(6)
    if kind == 0:
        word, answer = rng.choice(list(words.OPPOSITES.items()))
        if rng.random() < 0.5:
            word, answer = answer, word
        asked = (f"What is the opposite of {word}?", f"Which word is the opposite of {word}?")
        return rng.choice(asked), answer
    if kind == 1:
        word, answer = rng.choice(list(words.SOUNDS.items()))
        return rng.choice((f"What does a {word} say?", f"What sound does a {word} make?")), answer
    if kind == 2:
        word, answer = rng.choice(list(words.COLOUR_OF.items()))
        return rng.choice((f"What colour is {word}?", f"Which colour does {word} have?")), answer
    if kind == 3:
        i = rng.randrange(7)
        if rng.random() < 0.5:
            return f"Which day comes after {words.DAYS[i]}?", words.DAYS[(i + 1) % 7]
        return f"Which day comes before {words.DAYS[i]}?", words.DAYS[(i - 1) % 7]
    word = rng.choice(list(words.CATEGORY))
    answer = words.CATEGORY[word]
    if kind == 4:
        other = rng.choice([c for c in sorted(set(words.CATEGORY.values())) if c != answer])
        pair = [answer, other]
        rng.shuffle(pair)
        return f"{word}: {pair[0]} or {pair[1]}?", answer
    a, b = rng.sample(range(1000), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def one_word(rng: random.Random) -> Example:
    question, answer = _told_fact(rng) if rng.random() < 0.5 else _known_fact(rng)
    prompt = rng.choice(_ONE_WORD).format(q=question)
    return Example(prompt, answer, "word " + prompt)


SKILLS: dict[str, Callable[[random.Random], Example]] = {
    "addition": addition,
    "subtraction": subtraction,
    "counting": counting,
    "sorting": sorting,
    "copying": copying,
    "reversing": reversing,
    "json": json_record,
    "one_word": one_word,
}

# -- Retrieval ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fact:
    text: str
    questions: tuple[str, ...]
    answer: str
    subject: str


def fact(rng: random.Random) -> Fact:
    """A sentence, questions about it, and their answer."""
    kind = rng.randrange(6)
    name = rng.choice(words.NAMES)
    thing = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"
    if kind == 0:
        answer = "".join(rng.choices(string.digits, k=4))
        asked = (
            f"What is the code of the {thing}?",
            f"Which code does the {thing} have?",
            f"Tell me the code of the {thing}.",
        )
        return Fact(f"The code of the {thing} is {answer}.", asked, answer, f"code {thing}")
    if kind == 1:
        answer = rng.choice(words.PLACES)
        asked = (
            f"Where is the {thing}?",
            f"In which place is the {thing}?",
            f"Where can I find the {thing}?",
        )
        return Fact(f"The {thing} is in the {answer}.", asked, answer, f"place {thing}")
    if kind == 2:
        answer = rng.choice(words.CITIES)
        asked = (f"Where does {name} live?", f"In which city does {name} live?")
        return Fact(f"{name} lives in {answer}.", asked, answer, f"city {name}")
    if kind == 3:
        answer = rng.choice(words.JOBS)
        asked = (f"What is {name}'s job?", f"What does {name} work as?")
        return Fact(f"{name} works as a {answer}.", asked, answer, f"job {name}")
    if kind == 4:
        answer = rng.choice(words.NAMES)
        asked = (f"Who owns the {thing}?", f"Whose is the {thing}?")
        return Fact(f"The {thing} belongs to {answer}.", asked, answer, f"owner {thing}")
    answer = rng.choice(words.FOODS)
    asked = (f"What does {name} like to eat?", f"What is {name}'s favourite food?")
    return Fact(f"{name} likes to eat {answer}.", asked, answer, f"food {name}")


_RETRIEVE = (
    "Read this. {facts}\n{question}",
    "{facts}\n\n{question}",
    "Here are some notes: {facts} Now the question: {question}",
    "Remember these facts.\n{facts}\n{question}",
)

JOINTS = (" ", " ", "\n")  # between sentences


def notes(
    rng: random.Random,
    count: Callable[[str], int],
    length: int,
    sentences: list[str],
    joint: str = " ",
) -> list[Fact | str]:
    """Facts about different things, between other sentences, of about `length` tokens."""
    out: list[Fact | str] = []
    subjects: set[str] = set()
    share = rng.choice((0.0, 0.1, 0.5, 0.8))  # of sentences that are none of the facts
    size = 0
    while size < length:
        if sentences and rng.random() < share:
            line: Fact | str = rng.choice(sentences)
            size += count(joint + line)
        else:
            line = fact(rng)
            if line.subject in subjects:
                continue
            subjects.add(line.subject)
            size += count(joint + line.text)
        out.append(line)
    return out


def ask(rng: random.Random, one: Fact) -> Example:
    return Example(rng.choice(one.questions), one.answer, f"fact {one.text}")


def put(rng: random.Random, lines: list[Fact | str], question: str, joint: str = " ") -> str:
    """Notes and a question as one message."""
    text = joint.join(line if isinstance(line, str) else line.text for line in lines)
    return rng.choice(_RETRIEVE).format(facts=text, question=question)


def retrieval(
    rng: random.Random,
    count: Callable[[str], int],
    distance: int,
    sentences: list[str],
    test: bool = True,
) -> Example:
    """A question about a fact after which at least `distance` tokens follow, others before."""
    joint = rng.choice(JOINTS)
    while True:
        lines = notes(rng, count, distance + rng.randint(30, 80), sentences, joint)
        behind = 0
        for at in range(len(lines) - 1, -1, -1):
            line = lines[at]
            if behind >= distance and not isinstance(line, str):
                example = ask(rng, line)
                if held_out(example.key) == test:
                    example.prompt = put(rng, lines, example.prompt, joint)
                    return example
            behind += count(joint + (line if isinstance(line, str) else line.text))
