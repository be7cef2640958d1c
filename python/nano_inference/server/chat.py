"""POST /v1/chat/completions: conversations through the model's template, reasoning split off."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from .. import chat as templates
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
from .errors import refused
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    TokenizeRequest,
    read_body,
)
from .reasoning import ReasoningSplitter, count_reasoning_tokens, prompt_opens, template_thinks

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from .state import ServerState

_NAMES = {name: name for name in ChatRequest.__struct_fields__}
_NAMES |= {"prompt": "messages", "prompt_token_ids": "messages", "logprobs": "top_logprobs"}


async def read_chat(state: ServerState, body: bytes) -> ChatAnswer:
    """The answer to a body, ready to be submitted."""
    llm = loaded_llm(state)
    request = read_body(body, ChatRequest)
    asked = _check(request)
    answer = ChatAnswer(state, llm, request)
    more: dict[str, Any] = {"max_tokens": asked or llm.engine.loaded.generation.max_new_tokens}
    if request.logprobs:
        more["logprobs"] = request.top_logprobs or 0
    names = {**_NAMES}
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    params = sampling_params(llm, request, names, **more)
    prompt = await off_loop(len(body), partial(render, llm, request))
    answer.opened = prompt_opens(prompt)
    if state.args.reasoning_parser == "auto":
        answer.splits = template_thinks(llm.get_tokenizer().choose_template(None))
    else:
        answer.splits = state.args.reasoning_parser == "think"
    prepared = await prepare(
        llm,
        request,
        prompt,
        params,
        answer.id,
        names,
        add_special_tokens=bool(request.add_special_tokens),  # the template writes them
        asked_tokens=asked,
    )
    answer.requests.append(prepared)
    return answer


def _check(request: ChatRequest) -> int | None:
    """The limit of the output that the request names."""
    check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
    last = request.messages[-1]
    if request.echo and not (request.continue_final_message and last.role == "assistant"):
        raise refused("echo needs continue_final_message, with a message of the assistant", "echo")
    a, b = request.max_tokens, request.max_completion_tokens
    if a is not None and b is not None and a != b:
        raise refused(f"max_tokens ({a}) contradicts max_completion_tokens ({b})", "max_tokens")
    return b if a is None else a


# -- Prompts --------------------------------------------------------------------------------------


def render(llm: AsyncLLM, request: ChatRequest | TokenizeRequest) -> str:
    """The prompt of a conversation. What the template would ignore is refused."""
    assert request.messages is not None
    try:
        template = llm.engine.need_tokenizer("chat").choose_template(None)
    except ValueError as error:
        raise refused(str(error), "messages") from None
    continued = bool(request.continue_final_message)
    generation = request.add_generation_prompt
    if generation is None:
        generation = not continued
    elif generation and continued:
        raise refused(
            "continue_final_message and add_generation_prompt exclude each other",
            "add_generation_prompt",
        )
    try:
        variables = _variables(template, request)
        prompt = llm.engine.render_chat(
            [_as_dict(template, message, i) for i, message in enumerate(request.messages)],
            add_generation_prompt=generation,
            continue_final_message=continued,
            chat_template_kwargs=variables,
        )
    except ValueError as error:
        name = "chat_template_kwargs"
        raise refused(str(error), name if name in str(error) else "messages") from None
    assert isinstance(prompt, str)
    return prompt


def _variables(template: str, request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    known = templates.variables(template)
    variables = dict(request.chat_template_kwargs or {})
    for name in variables:
        if name not in known:
            raise refused(
                f"chat_template_kwargs: the model's chat template does not read {name!r}",
                "chat_template_kwargs",
            )
    effort = request.reasoning_effort if isinstance(request, ChatRequest) else None
    if effort is not None:
        if "reasoning_effort" in known:
            variables["reasoning_effort"] = effort
        elif effort == "none" and "enable_thinking" in known:
            variables["enable_thinking"] = False
        else:
            raise refused(
                f"reasoning_effort {effort!r} is not supported: the model's chat template does not "
                "read it",
                "reasoning_effort",
            )
    verbosity = request.verbosity if isinstance(request, ChatRequest) else None
    if verbosity is not None and "verbosity" in known:
        variables["verbosity"] = verbosity
    elif verbosity not in (None, "medium"):
        raise refused(
            f"verbosity {verbosity!r} is not supported: the model's chat template does not read it",
            "verbosity",
        )
    return variables


def _as_dict(template: str, message: ChatMessage, index: int) -> dict[str, Any]:
    if message.name is not None and not templates.mentions(template, "name"):
        where = f"messages[{index}].name"
        raise refused(f"{where} has no effect: the model's chat template does not read it", where)
    values: dict[str, Any] = msgspec.to_builtins(message)
    if message.role == "developer" and not templates.mentions(template, "developer"):
        values["role"] = "system"  # its older name
    return values


# -- Answers --------------------------------------------------------------------------------------


class ChatAnswer(Answer):
    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    request: ChatRequest
    splits = False
    """Reasoning goes to reasoning_content."""
    opened = False
    """The prompt ends in <think>."""

    def __init__(self, state: ServerState, llm: AsyncLLM, request: ChatRequest) -> None:
        super().__init__(state, llm, request)
        self._choices: dict[int, _Choice] = {}

    def choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._choices[index] = _Choice(self, index)
        return self._choices[index]

    def add_choice(
        self, index: int, choice: CompletionOutput, output: RequestOutput, found: list[bytes]
    ) -> None:
        mine = self.choice(index)
        if mine.done or (not choice.token_ids and not choice.finished()):
            return
        if not mine.started:
            mine.started = True
            role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,' % index
            found.append(self.event(role + b'"finish_reason":null}'))
        reasoning, content = mine.take(choice)
        logprobs = self.logprobs(choice) if choice.token_ids else None
        scores = encode(logprobs)
        if reasoning:
            found.append(self.event(mine.chunk(b"reasoning_content", reasoning, scores)))
            scores = b"null"
        if content or scores != b"null":
            found.append(self.event(mine.chunk(b"content", content, scores)))
        if choice.finished():
            mine.done = True
            end = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%s,"stop_reason":%s}'
            reasons = encode(choice.finish_reason), encode(choice.stop_reason)
            found.append(self.event(end % (index, *reasons)))

    def logprobs(self, choice: CompletionOutput) -> ChatLogprobs | None:
        if choice.logprobs is None:
            return None
        top = self.request.top_logprobs or 0
        return chat_logprobs(self.tokenizer, choice.token_ids, choice.logprobs, top)

    def completion(self, outputs: list[RequestOutput]) -> msgspec.Struct:
        (output,) = outputs
        choices = []
        for choice in output.outputs:
            reasoning, content = self.choice(choice.index).take(choice)
            message = AnswerMessage(content)
            if self.splits:
                message.reasoning_content = reasoning or None
            reason: Any = choice.finish_reason
            scores = self.logprobs(choice)
            choices.append(ChatChoice(choice.index, message, scores, reason, choice.stop_reason))
        result = ChatCompletion(
            self.id,
            self.created,
            self.model,
            self.fingerprint,
            choices,
            self.usage(),
            self.service_tier,
        )
        if self.request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            result.prompt_logprobs = prompt_logprobs(
                output.prompt_logprobs, self.request.prompt_logprobs
            )
        return result

    def echo(self) -> str:
        """The message that is continued."""
        content = self.request.messages[-1].content
        return content if isinstance(content, str) else content[-1].text


class _Choice:
    """How far one choice has been told."""

    def __init__(self, answer: ChatAnswer, index: int) -> None:
        self._answer, self._index = answer, index
        self._to_echo = bool(answer.request.echo)
        self._splitter = ReasoningSplitter(answer.opened) if answer.splits else None
        self._token_ids: list[int] = []  # of a choice that may think
        self.started = self.done = False

    def take(self, choice: CompletionOutput) -> tuple[str, str]:
        """(reasoning, content) that is new."""
        reasoning, content = "", choice.text
        if self._splitter is not None:
            reasoning, content = self._splitter.push(choice.text)
            self._token_ids += choice.token_ids
            if choice.finished():
                rest = self._splitter.finish()
                reasoning, content = reasoning + rest[0], content + rest[1]
                self._count()
        if self._to_echo:
            self._to_echo = False
            content = self._answer.echo() + content
        return reasoning, content

    def _count(self) -> None:
        answer = self._answer
        if answer.tokenizer is not None:
            count = count_reasoning_tokens(answer.tokenizer, self._token_ids, answer.opened)
            answer.reasoning_tokens = (answer.reasoning_tokens or 0) + count

    def chunk(self, field: bytes, text: str, logprobs: bytes) -> bytes:
        head = b'{"index":%d,"delta":{"%s":' % (self._index, field)
        return b"".join((head, encode(text), b'},"logprobs":', logprobs, b',"finish_reason":null}'))
