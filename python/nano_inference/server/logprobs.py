"""Log-probabilities in the formats of the two endpoints and of vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence

from ..outputs import Logprob
from ..tokenizer import Tokenizer
from .protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    ScoredToken,
    TokenLogprob,
    TopLogprob,
)

Scores = dict[int, Logprob]
_LEAST = -9999.0  # as OpenAI and vLLM say it: JSON has no -inf


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST


def _token_bytes(tokenizer: Tokenizer | None, token: int) -> bytes:
    return b"" if tokenizer is None else tokenizer.token_bytes(token)


def chat_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Iterable[Scores], top: int
) -> ChatLogprobs:
    content = []
    for token, scores in zip(token_ids, logprobs, strict=True):
        likely = [entry for entry in scores.items() if (entry[1].rank or 0) <= top]
        likely.sort(key=lambda entry: entry[1].rank or 0)
        own = _token_bytes(tokenizer, token)
        tops = []
        for other, score in likely[:top]:
            piece = _token_bytes(tokenizer, other)
            tops.append(
                TopLogprob(piece.decode(errors="replace"), _finite(score.logprob), list(piece))
            )
        mine = _finite(scores[token].logprob)
        content.append(TokenLogprob(own.decode(errors="replace"), mine, list(own), tops))
    return ChatLogprobs(content)


def prompt_logprobs(scores: Sequence[Scores | None], top: int) -> PromptLogprobs:
    return [
        None
        if entry is None
        else {
            token: ScoredToken(_finite(score.logprob), score.rank, score.decoded_token)
            for token, score in _likely(entry, top)
        }
        for entry in scores
    ]


def _likely(scores: Scores, top: int) -> Iterable[tuple[int, Logprob]]:
    """The chosen token, which stands first, and the `top` most likely ones (-1: all)."""
    for i, (token, score) in enumerate(scores.items()):
        if i == 0 or top == -1 or (score.rank or 0) <= top:
            yield token, score


class LegacyLogprobs:
    """Of one choice of /v1/completions, piece by piece: each token knows where in the choice's text
    its characters begin."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._skipped: frozenset[int] = frozenset()
        if tokenizer is not None and skip_special_tokens:
            self._skipped = tokenizer.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def take(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Scores | None],
        shown: str | None = None,
    ) -> CompletionLogprobs:
        """shown: the echoed prompt's text; its special tokens count where they stand in it."""
        out = CompletionLogprobs([], [], [], [])
        for token, scores in zip(token_ids, logprobs, strict=True):
            piece = _token_bytes(self._tokenizer, token)
            out.text_offset.append(self._offset)
            out.tokens.append(_legacy_text(piece))
            if scores is None:  # nothing predicts the first token
                out.token_logprobs.append(None)
                out.top_logprobs.append(None)
            else:
                out.token_logprobs.append(_finite(scores[token].logprob))
                out.top_logprobs.append(self._by_text(scores))
            if token not in self._skipped or (
                shown is not None and shown.startswith(piece.decode(errors="replace"), self._offset)
            ):
                self._offset += len(self._utf8.decode(piece))
        return out

    def _by_text(self, scores: Scores) -> dict[str, float]:
        return {
            _legacy_text(_token_bytes(self._tokenizer, token)): _finite(score.logprob)
            for token, score in _likely(scores, self._top)
        }


def _legacy_text(piece: bytes) -> str:
    """A token that is no whole character is told by its bytes, as OpenAI does."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
