"""POST /v1/completions: prompts as texts or token ids, several at once, echo, legacy logprobs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ..outputs import CompletionOutput, RequestOutput
from .answer import (
    Answer,
    check_stream_options,
    encode,
    loaded_llm,
    off_loop,
    prepare,
    sampling_params,
)
from .errors import ApiError, refused
from .logprobs import LegacyLogprobs, Scores, prompt_logprobs
from .protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    read_body,
)

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from .state import ServerState

DEFAULT_MAX_TOKENS = 16  # OpenAI's

_NAMES = {name: name for name in CompletionRequest.__struct_fields__}
_NAMES["prompt_token_ids"] = "prompt"


async def read_completion(state: ServerState, body: bytes) -> CompletionAnswer:
    """The answer to a body, ready to be submitted."""
    llm = loaded_llm(state)
    request = read_body(body, CompletionRequest)
    _check(request)
    answer = CompletionAnswer(state, llm, request)
    prompts = _prompts(llm, request)
    if request.suffix:
        prompts = await off_loop(len(body), lambda: _to_fill_in(llm, request, prompts))
    choices = max(answer.n, request.best_of or 0)
    _check_count(llm, len(prompts), choices)
    names = _NAMES if choices == answer.n else {**_NAMES, "n": "best_of"}
    params = sampling_params(llm, request, names, **_more(request, choices))
    for i, prompt in enumerate(prompts):
        await asyncio.sleep(0)  # streams go on meanwhile
        try:
            prepared = await prepare(
                llm,
                request,
                prompt,
                params,
                f"{answer.id}-{i}",
                names,
                add_special_tokens=request.add_special_tokens is not False,
                asked_tokens=request.max_tokens,
            )
        except ApiError as error:
            if len(prompts) > 1 and error.param == "prompt":
                raise refused(f"prompt {i}: {error.message}", f"prompt[{i}]", error.code) from None
            raise
        answer.requests.append(prepared)
    return answer


def _check(request: CompletionRequest) -> None:
    check_stream_options(request)
    n = request.n or 1
    if request.best_of is not None and request.best_of < n:
        raise refused(f"best_of must be at least n ({n}), got {request.best_of}", "best_of")
    if request.stream and (request.best_of or n) > n:
        raise refused("best_of is known at the end only: it needs stream to be off", "best_of")
    if request.suffix and request.echo:
        raise refused("echo is not possible with suffix: the text begins in the middle", "suffix")
    if request.max_tokens == 0 and not request.echo:
        raise refused("max_tokens must be at least 1 (0 needs echo)", "max_tokens")


def _check_count(llm: AsyncLLM, prompts: int, choices: int) -> None:
    limit = llm.engine.core.config.max_waiting
    if prompts > 1 and 0 < limit < prompts * choices:
        raise refused(
            f"prompt holds {prompts} prompts with {choices} choices each, more than the queue's "
            f"{limit}",
            "prompt",
        )


def _more(request: CompletionRequest, choices: int) -> dict[str, Any]:
    """Sampling parameters that the request's fields do not give by themselves."""
    asked, top = request.max_tokens, request.logprobs
    more: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS if asked is None else max(asked, 1)}
    if choices > (request.n or 1):  # to know the best of them
        more |= {"n": choices, "logprobs": 0}
    if top is not None:
        more["logprobs"] = top
        if request.echo:
            other = request.prompt_logprobs
            more["prompt_logprobs"] = top if other is None else _larger(top, other)
    return more


def _larger(a: int, b: int) -> int:
    return -1 if -1 in (a, b) else max(a, b)


def _prompts(llm: AsyncLLM, request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if prompt is None and request.suffix:
        return [""]
    if prompt is None:  # "as if from the beginning of a new document"
        tokenizer = llm.engine.tokenizer
        begin = None if tokenizer is None else tokenizer.bos_token_id
        if begin is None:
            raise refused(
                "prompt is missing, and the model has no token that begins a text", "prompt"
            )
        return [[begin]]
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(part, int) for part in prompt):
        return [cast(list[int], prompt)]
    if all(isinstance(part, (str, list)) for part in prompt):
        return cast(list[str | list[int]], prompt)
    raise refused(
        "prompt must be a text, token ids, or a list of such prompts: not mixed", "prompt"
    )


def _to_fill_in(
    llm: AsyncLLM, request: CompletionRequest, prompts: list[str | list[int]]
) -> list[str | list[int]]:
    tokenizer, suffix = llm.get_tokenizer(), request.suffix or ""
    special = request.add_special_tokens is not False
    try:
        return [tokenizer.encode_to_fill_in(prompt, suffix, special) for prompt in prompts]
    except ValueError as error:
        raise refused(f"suffix is not supported: {error}", "suffix") from None


class CompletionAnswer(Answer):
    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    request: CompletionRequest

    def __init__(self, state: ServerState, llm: AsyncLLM, request: CompletionRequest) -> None:
        super().__init__(state, llm, request)
        self._choices: dict[int, _Choice] = {}

    def add_choice(
        self, index: int, choice: CompletionOutput, output: RequestOutput, found: list[bytes]
    ) -> None:
        if index not in self._choices:
            self._choices[index] = _Choice(self, index)
        mine = self._choices[index]
        if mine.done or (not choice.token_ids and not choice.finished()):
            return
        text, logprobs = mine.take(choice)
        if logprobs is not None and logprobs.tokens:
            found.append(self.event(encode(CompletionChoice(index, text, logprobs, None))))
        elif text:
            found.append(self.event(mine.prefix + encode(text) + mine.suffix))
        if choice.finished():
            mine.done = True
            found.append(self.event(encode(mine.result("", None, choice))))

    def completion(self, outputs: list[RequestOutput]) -> msgspec.Struct:
        choices = []
        for i, output in enumerate(outputs):
            for rank, choice in enumerate(self._best(output.outputs)):
                mine = _Choice(self, i * self.n + rank)
                result = mine.result(*mine.take(choice), choice)
                top = self.request.prompt_logprobs
                if top is not None and output.prompt_logprobs is not None:
                    result.prompt_logprobs = prompt_logprobs(output.prompt_logprobs, top)
                choices.append(result)
        return Completion(
            self.id,
            self.created,
            self.model,
            self.fingerprint,
            choices,
            self.usage(),
            self.service_tier,
        )

    def _best(self, choices: list[CompletionOutput]) -> list[CompletionOutput]:
        if len(choices) == self.n:
            return choices
        per_token = [(c.cumulative_logprob or 0.0) / len(c.token_ids) for c in choices]
        ranked = sorted(choices, key=lambda c: per_token[c.index], reverse=True)
        return ranked[: self.n]

    @property
    def completion_tokens(self) -> int:
        # For max_tokens=0 the engine makes one token; nobody sees it.
        return 0 if self.request.max_tokens == 0 else super().completion_tokens

    def echo(self, index: int) -> tuple[str, list[int], list[Scores | None]]:
        """Text, tokens and logprobs of a choice's prompt; all are there before its first token."""
        state = self.requests[index // self.n].state
        text = state.prompt
        if text is None and self.tokenizer is not None:
            text = self.tokenizer.decode(state.prompt_token_ids, state.params.skip_special_tokens)
        return text or "", state.prompt_token_ids, state.prompt_logprobs or []


class _Choice:
    """How far one choice has been told."""

    def __init__(self, answer: CompletionAnswer, index: int) -> None:
        self._answer, self._index = answer, index
        self._to_echo = bool(answer.request.echo)
        self._legacy: LegacyLogprobs | None = None
        if (top := answer.request.logprobs) is not None:
            skip = answer.request.skip_special_tokens is not False
            self._legacy = LegacyLogprobs(answer.tokenizer, skip, top)
        self.done = False
        self.prefix = b'{"index":%d,"text":' % index
        self.suffix = b',"logprobs":null,"finish_reason":null,"stop_reason":null}'

    def take(self, choice: CompletionOutput) -> tuple[str, CompletionLogprobs | None]:
        """What to show of it; the prompt first, if it is echoed."""
        text, tokens = choice.text, choice.token_ids
        scores: list[Scores | None] = [*(choice.logprobs or ())]
        if self._answer.request.max_tokens == 0:
            text, tokens, scores = "", [], []
        shown = None
        if self._to_echo:
            self._to_echo = False
            shown, ids, prompt_scores = self._answer.echo(self._index)
            text, tokens, scores = shown + text, ids + tokens, prompt_scores + scores
        if self._legacy is None:
            return text, None
        return text, self._legacy.take(tokens, scores, shown)

    def result(
        self, text: str, logprobs: CompletionLogprobs | None, choice: CompletionOutput
    ) -> CompletionChoice:
        reason: Any = choice.finish_reason
        if self._answer.request.max_tokens == 0:
            return CompletionChoice(self._index, text, logprobs, "length")
        return CompletionChoice(self._index, text, logprobs, reason, choice.stop_reason)
