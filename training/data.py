"""Training rows: conversations and stories as token ids of fixed lengths, made in shards.

A row begins with a document and is filled with whole turns of one conversation (or with further
stories), so that what the model sees at position 0 is what it sees when it is used.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import skills, stories, talk
from .tokenizer import ASSISTANT, BOS, CONTEXT, END, PAD, SYSTEM, USER

LEARN = 0x8000  # this bit of an entry: the token counts in the loss
Row = npt.NDArray[np.uint16]

# Rows of each length in a shard, about 1.2 million tokens.
SHARD_ROWS = {128: 4096, 512: 768, CONTEXT: 128}

# How often each skill is asked; the harder ones more often.
WEIGHTS = {
    "addition": 3.0,
    "subtraction": 3.0,
    "counting": 2.5,
    "sorting": 3.0,
    "copying": 1.5,
    "reversing": 3.5,
    "json": 1.5,
    "one_word": 1.5,
}
# In the second stage: whose thing is which is what the first learns last.
SECOND_WEIGHTS = {**WEIGHTS, "one_word": 12.0}


@dataclass(slots=True)
class Turn:
    prompt: str
    answer: str
    spelled: bool = False


class Writer:
    """Writes rows with one random generator, of training or of test examples."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: str,
        test: bool = False,
        weights: dict[str, float] = WEIGHTS,
    ) -> None:
        self.tokenizer, self.test = tokenizer, test
        self.rng = random.Random(seed)
        self._vocab = tokenizer.get_vocab()
        self._skills, self._weights = list(weights), list(weights.values())
        self.sentences: list[str] = []
        for _ in range(100):
            text = self.story().text
            self.sentences += re.findall(r"[A-Z][^.!?\"\n]+\.(?= |\n|$)", text)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def story(self, **wish: Any) -> stories.Story:
        while True:
            story = stories.write_story(self.rng, **wish)
            if skills.held_out(story.text) == self.test:
                return story

    # -- Turns ----------------------------------------------------------------------------------

    def skill_turn(self) -> Turn:
        chance = self.rng.random()
        if chance < 0.04:
            return Turn(*talk.small_talk(self.rng))
        if chance < 0.12:
            return self.notes_turns(self.rng.randint(10, 60), 1)[0]
        skill = self.rng.choices(self._skills, self._weights)[0]
        one = skills.sample(skill, self.rng, self.test)
        return Turn(one.prompt, one.answer, one.spelled)

    def story_turn(self) -> Turn:
        prompt, wish = stories.story_request(self.rng)
        return Turn(prompt, self.story(**wish).text)

    def notes_turns(self, length: int, most: int) -> list[Turn]:
        """Notes with a question, and further questions about the same notes."""
        joint = self.rng.choice(skills.JOINTS)
        while True:
            lines = skills.notes(self.rng, self.count, length, self.sentences, joint)
            facts = [line for line in lines if isinstance(line, skills.Fact)]
            self.rng.shuffle(facts)
            asked = [skills.ask(self.rng, one) for one in facts[: 4 * most]]
            asked = [one for one in asked if skills.held_out(one.key) == self.test][:most]
            if asked:
                first, *others = asked
                turns = [Turn(skills.put(self.rng, lines, first.prompt, joint), first.answer)]
                return turns + [Turn(one.prompt, one.answer) for one in others]

    # -- Rows -----------------------------------------------------------------------------------

    def conversation(self, length: int, turns: list[Turn]) -> Row:
        """The given turns, as far as they fit, and then others until the row is full."""
        ids, learn = [BOS], [False]
        if self.rng.random() < 0.12:
            system = [SYSTEM, *self.encode(self.rng.choice(talk.SYSTEM)), END]
            ids += system
            learn += [False] * len(system)
        while True:
            turn = turns.pop(0) if turns else self.skill_turn()
            asked = [USER, *self.encode(turn.prompt), END, ASSISTANT]
            if turn.spelled:
                answer = [*(self._vocab[c] for c in turn.answer), END]
            else:
                answer = [*self.encode(turn.answer), END]
            if len(ids) + len(asked) + len(answer) > length:
                if len(ids) > length // 4 or not turns:
                    break
                continue
            ids += asked + answer
            learn += [False] * len(asked) + [True] * len(answer)
        return _row(length, ids, learn)

    def story_row(self, length: int) -> Row:
        ids: list[int] = []
        while len(ids) < length:
            ids += [BOS, *self.encode(self.story().text), END]
        ids = ids[:length]
        return _row(length, ids, [i != BOS for i in ids])

    def row(self, length: int) -> Row:
        if length < 512:
            return self.conversation(length, [])
        if length < CONTEXT:
            chance = self.rng.random()
            if chance < 0.45:
                return self.story_row(length)
            if chance < 0.75:
                return self.conversation(length, [self.story_turn()])
            return self.conversation(length, self.notes_turns(self.rng.randint(60, 400), 8))
        size = self.rng.randint(500, length - 150)
        return self.conversation(length, self.notes_turns(size, 12))


def _row(length: int, ids: list[int], learn: list[bool]) -> Row:
    row = np.full(length, PAD, np.uint16)
    row[: len(ids)] = ids
    row[: len(ids)] |= np.where(learn, LEARN, 0).astype(np.uint16)
    return row


@cache
def _load(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)


Job = tuple[str, str, bool, dict[str, float]]  # tokenizer, seed, test, weights of the skills


def make_shard(job: Job) -> dict[int, npt.NDArray[np.uint16]]:
    """A shard of the training (or test) set: rows by length. The same everywhere."""
    path, seed, test, weights = job
    writer = Writer(_load(path), seed, test, weights)
    return {
        length: np.stack([writer.row(length) for _ in range(rows)])
        for length, rows in SHARD_ROWS.items()
    }


def make_shards(
    tokenizer: Path,
    name: str,
    count: int,
    workers: int,
    test: bool = False,
    weights: dict[str, float] = WEIGHTS,
) -> dict[int, npt.NDArray[np.uint16]]:
    """Shards "name 0", "name 1", … as one."""
    jobs = [(str(tokenizer), f"{name} {i}", test, weights) for i in range(count)]
    if workers <= 1:
        shards = [make_shard(job) for job in jobs]
    else:
        with get_context("spawn").Pool(workers) as pool:
            shards = pool.map(make_shard, jobs, chunksize=1)
    return {length: np.concatenate([s[length] for s in shards]) for length in SHARD_ROWS}
