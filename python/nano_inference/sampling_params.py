"""What a request asks for; names, meanings and defaults are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .validation import (
    NamedFields,
    check_bool,
    check_float,
    check_int,
    check_text,
    check_token_ids,
    is_token_id,
    refuse,
)

if TYPE_CHECKING:
    from . import _core
    from .tokenizer import Tokenizer

_UINT64 = 2**64

_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "spaces_between_special_tokens": ((True,), "the tokenizer's own decoder joins the tokens"),
    "logits_processors": ((None,), "sampling runs in the native engine; see logit_bias"),
    "structured_outputs": ((None,), "output is not constrained to a grammar"),
    "guided_decoding": ((None,), "output is not constrained to a grammar"),
    "best_of": ((None,), "all n choices are returned"),
    "extra_args": ((None,), "there is nothing that takes them"),
}


@dataclass(slots=True)
class SamplingParams(metaclass=NamedFields):
    """How to choose tokens and when to stop.

    An unknown field or an impossible value is a ValueError that names it. Values are checked when
    the object is made and again when it is used, so fields may be assigned in between.
    """

    FIXED: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = _FIXED

    n: int = 1
    """Number of choices; they share the prompt's cache blocks."""
    presence_penalty: float = 0.0
    """In [-2, 2]: subtracted from the logit of each token that the output already has."""
    frequency_penalty: float = 0.0
    """In [-2, 2]: the same, times how often the output has it."""
    repetition_penalty: float = 1.0
    """> 0: divides (multiplies, if negative) the logits of tokens in prompt or output; 1 is off."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]: sample from the smallest set of tokens with at least this probability."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 or -1 is off."""
    min_p: float = 0.0
    """In [0, 1]: drop tokens less likely than min_p times the most likely one."""
    seed: int | None = None
    """Same seed, same output. None (or -1): drawn from the generator that LLM(seed=...) started."""
    stop: str | list[str] | None = None
    """Strings that end a choice. They are looked for once min_tokens tokens are there."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a choice, beside the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after end-of-sequence tokens."""
    max_tokens: int | None = 16
    """Limit of the output; None: as many as fit."""
    min_tokens: int = 0
    """No end-of-sequence or stop token, and no stop string, before this many tokens."""
    logprobs: int | None = None
    """Log-probabilities of each chosen token and of the n most likely ones; -1: of all tokens."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    detokenize: bool = True
    """False: `text` stays empty."""
    skip_special_tokens: bool = True
    """Leave special tokens out of `text`."""
    bad_words: list[str] | None = None
    """Words that the output must not contain."""
    logit_bias: Mapping[int, float] | None = None
    """Token id -> number in [-100, 100] added to its logit."""
    allowed_token_ids: list[int] | None = None
    """Only these tokens may be chosen."""
    include_stop_str_in_output: bool = False
    """Keep the stop string (or the stop token's text) at the end of `text`."""
    truncate_prompt_tokens: int | None = None
    """Keep only the last n tokens of the prompt; -1: as many as leave room for max_tokens."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError naming the first impossible field."""
        self._validate_numbers()
        self._validate_lists()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        if not self.detokenize and self.stop_strings:
            raise ValueError("stop needs detokenize=True: stop strings are found in the text")

    def _validate_numbers(self) -> None:
        check_int("n", self.n, 1)
        check_float("presence_penalty", self.presence_penalty, -2, 2)
        check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        check_float("repetition_penalty", self.repetition_penalty, 0, open_low=True)
        check_float("temperature", self.temperature, 0)
        check_float("top_p", self.top_p, 0, 1, open_low=True)
        check_int("top_k", self.top_k, -1, also=" (0 or -1: off)")
        check_float("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), _UINT64 - 1, also=", or None")
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, also=", or None for as many as fit")
        check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, -1, also=" (-1: all tokens), or None")
        if (cut := self.truncate_prompt_tokens) is not None:
            check_int("truncate_prompt_tokens", cut, -1, also=" (-1: what fits), or None")
            if cut == 0:
                refuse("truncate_prompt_tokens", cut, "at least 1, or -1 for what fits, or None")

    def _validate_lists(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        _check_strings("stop", stops)
        _check_strings("bad_words", self.bad_words)
        if self.stop_token_ids is not None:
            check_token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            check_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                refuse("allowed_token_ids", self.allowed_token_ids, "None or not empty")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                refuse("logit_bias", self.logit_bias, "a dict of token id -> bias")
            for token, bias in self.logit_bias.items():
                if not is_token_id(token):
                    refuse("logit_bias", token, "a dict whose keys are token ids (integers >= 0)")
                check_float(f"logit_bias[{token}]", bias, -100, 100)

    @property
    def stop_strings(self) -> list[str]:
        if not self.stop:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_core(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        drawn_seed: int,
        max_logprobs: int | None = None,
    ) -> _core.SamplingParams:
        """The native engine's form of it. drawn_seed is used where no seed was given; max_logprobs
        is the limit that the engine was started with."""
        from . import _core

        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) == -1 and max_logprobs not in (None, -1):
                raise ValueError(
                    f"{name}=-1 (whole vocabulary) needs max_logprobs=-1 at start, "
                    f"max_logprobs is {max_logprobs}"
                )
        if tokenizer is None and (self.stop or self.bad_words):
            which = "stop" if self.stop else "bad_words"
            raise ValueError(f"{which} needs a tokenizer, and skip_tokenizer_init is on")
        return _core.SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=drawn_seed if self.seed in (None, -1) else int(self.seed or 0) % _UINT64,
            max_tokens=-1 if self.max_tokens is None else self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=list(self.stop_token_ids or ()),
            logit_bias=dict(self.logit_bias or {}),
            bad_words=_bad_word_ids(self.bad_words or [], tokenizer),
            allowed_token_ids=list(self.allowed_token_ids or ()),
            logprobs=_logprob_count(self.logprobs, vocab_size),
            prompt_logprobs=_logprob_count(self.prompt_logprobs, vocab_size),
        )


def _check_strings(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(s, str) and s for s in value):
        refuse(name, value, "a list of non-empty strings")
    for text in value:
        check_text(name, text)


def _logprob_count(value: int | None, vocab_size: int) -> int:
    if value is None:
        return -1
    return vocab_size if value == -1 else value


def _bad_word_ids(words: list[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Each word as it is spelt at the start of a text and after a space."""
    spellings: list[list[int]] = []
    for word in words:
        assert tokenizer is not None
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in spellings:
                spellings.append(ids)
    return spellings
