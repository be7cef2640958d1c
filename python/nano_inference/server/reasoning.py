"""Splits what a model thinks, <think>…</think>, from what it answers."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokenizer import IncrementalDetokenizer, Tokenizer

BEGIN, END = "<think>", "</think>"

_START, _THINKING, _ANSWER = range(3)


def template_thinks(template: str) -> bool:
    return BEGIN in template or END in template


def prompt_opens(prompt: str) -> bool:
    """The chat template has already written <think>, and the answer goes on inside."""
    return prompt.rstrip().endswith(BEGIN)


class ReasoningSplitter:
    """Text in, (reasoning, answer) out, piece by piece. How the text is cut changes nothing. Only a
    <think> that begins the text counts; newlines beside the tags belong to neither part."""

    def __init__(self, opened: bool) -> None:
        self._state = _THINKING if opened else _START
        self.has_thought = opened
        self._held = ""  # may be part of a tag, or newlines before one
        self._fresh = opened  # newlines that follow a tag are dropped

    @property
    def answers(self) -> bool:
        """The answer has begun."""
        return self._state == _ANSWER

    def push(self, text: str) -> tuple[str, str]:
        if self._state == _ANSWER and not self._fresh:
            return "", text
        self._held += text
        if self._state == _START:
            self._start()
        thought = self._think() if self._state == _THINKING else ""
        return thought, self._answer() if self._state == _ANSWER else ""

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        held, self._held = self._held, ""
        if self._state == _THINKING:
            return held.rstrip("\n"), ""
        return "", "" if self._fresh else held

    def _start(self) -> None:
        seen = self._held.lstrip()
        if seen.startswith(BEGIN):
            self._held = seen[len(BEGIN) :]
            self._state, self._fresh, self.has_thought = _THINKING, True, True
        elif not BEGIN.startswith(seen):
            self._state = _ANSWER

    def _skip_newlines(self) -> None:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held

    def _think(self) -> str:
        self._skip_newlines()
        thought, end, rest = self._held.partition(END)
        if end:
            self._held, self._state, self._fresh = rest, _ANSWER, True
            return thought.rstrip("\n")
        keep = next(
            (n for n in range(min(len(END) - 1, len(thought)), 0, -1) if thought.endswith(END[:n])),
            0,
        )
        safe = thought[: len(thought) - keep].rstrip("\n")
        self._held = thought[len(safe) :]
        return safe

    def _answer(self) -> str:
        self._skip_newlines()
        held, self._held = self._held, ""
        return held


def count_reasoning_tokens(tokenizer: Tokenizer, token_ids: Sequence[int], opened: bool) -> int:
    """Tokens up to the one that completes </think>, the tags included; of a text that does not
    think, none."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    splitter = ReasoningSplitter(opened)
    for i, token in enumerate(token_ids):
        splitter.push(detokenizer.push([token]))
        if splitter.answers:
            return i + 1 if splitter.has_thought else 0
    return len(token_ids) if splitter.has_thought else 0
