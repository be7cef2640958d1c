"""Bodies of requests and responses. What a request may hold is OpenAI's documentation and vLLM's
extensions; each field has an effect, or is refused by name.

A field that is null counts as not given.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..validation import unknown_field
from .errors import refused

_INT32 = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=_INT32)]
Natural = Annotated[int, Meta(ge=0, le=_INT32)]
TokenId = Annotated[int, Meta(ge=0, le=_INT32)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NonEmpty = Annotated[str, Meta(min_length=1)]
# Each of them costs time at every token, or is tokenized beforehand, while others wait.
Word = Annotated[str, Meta(min_length=1, max_length=1000)]
Words = Annotated[list[Word], Meta(max_length=256)]

# Fields with one possible value here (others are refused, with the reason): name -> (values, why).
_COMMON_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((None, False), "responses are not stored"),
    "prompt_cache_retention": ((None, "in_memory"), "prefixes are cached in memory alone"),
    "prompt_cache_options": ((None,), "every prefix is cached by itself, while there is room"),
    "moderation": ((None,), "nothing moderates here"),
    "use_beam_search": ((None, False), "there is no beam search"),
    "length_penalty": ((None, 1, 1.0), "there is no beam search"),
    "early_stopping": ((None, False), "there is no beam search"),
    "spaces_between_special_tokens": ((None, True), "the tokenizer's own decoder joins the tokens"),
    "logits_processors": ((None,), "sampling runs in the native engine; see logit_bias"),
    "structured_outputs": ((None,), "output is not constrained to a grammar"),
    "guided_json": ((None,), "output is not constrained to a grammar"),
    "guided_regex": ((None,), "output is not constrained to a grammar"),
    "guided_choice": ((None,), "output is not constrained to a grammar"),
    "guided_grammar": ((None,), "output is not constrained to a grammar"),
    "response_format": ((None, {"type": "text"}), "output is text"),
}
CHAT_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    **_COMMON_FIXED,
    "tools": ((None, []), "tools are not available"),
    "tool_choice": ((None, "none"), "tools are not available"),
    "functions": ((None, []), "tools are not available"),
    "function_call": ((None, "none"), "tools are not available"),
    "parallel_tool_calls": ((None, True, False), "tools are not available"),
    "modalities": ((None, ["text"]), "output is text"),
    "audio": ((None,), "output is text"),
    "prediction": ((None,), "there are no predicted outputs"),
    "web_search_options": ((None,), "there is no web search"),
    "chat_template": ((None,), "templates are programs, and those of requests are not run"),
    "documents": ((None,), "put them into the messages"),
    "best_of": ((None,), "all n choices are returned"),
}
COMPLETION_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    **_COMMON_FIXED,
}


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    """A last event tells the usage of the whole request."""
    include_obfuscation: bool | None = None
    """Pad events with random characters, so that their sizes tell less."""


class GenerationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # -- Sampling; names and meanings are SamplingParams' --
    n: Count | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    min_p: Probability | None = None
    seed: Int64 | None = None
    logit_bias: dict[int, Bias] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Words | None = None
    # -- Where it ends --
    stop: Word | Words | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: Natural | None = None
    # -- Text --
    echo: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    add_special_tokens: bool | None = None
    # -- Scheduling and cache --
    priority: Annotated[int, Meta(ge=-(2**31), le=_INT32)] | None = None
    cache_salt: NonEmpty | None = None
    # -- Asks for nothing: labels, and hints to a cache that needs none --
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)] | None = None
    """A text, a list of token ids, or a list of such prompts; without one: the empty text."""
    max_tokens: Natural | None = None
    """0 needs echo: the prompt alone, with its logprobs."""
    logprobs: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    suffix: str | None = None
    """What comes behind the text that is to be filled in; needs a model that has tokens for it."""
    best_of: Count | None = None
    """Generate so many choices and return the n with the highest log-probability per token."""


class TextPart(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of a message that this server gave, all fields may come back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None
    """Of an earlier answer; the chat template decides what the model sees of it."""
    refusal: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Meta(max_length=0)] | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    """Needs a chat template that reads it; "none" also turns enable_thinking off."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Other than medium needs a chat template that reads it."""


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of a text (prompt) or of a chat (messages)."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """On for a prompt; off for a chat, whose template writes them."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[TokenId]


FIXED: dict[type, dict[str, tuple[tuple[Any, ...], str]]] = {
    ChatRequest: CHAT_FIXED,
    CompletionRequest: COMPLETION_FIXED,
    TokenizeRequest: {
        name: CHAT_FIXED[name] for name in ("tools", "chat_template")
    },
    DetokenizeRequest: {},
}  # fmt: skip

Body = TypeVar("Body", bound=Struct)


def read_body(body: bytes, kind: type[Body]) -> Body:
    """The request, or a 400 that names what is wrong."""
    try:
        values = msgspec.json.decode(body)
    except RecursionError:
        raise refused("the body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise refused(f"the body is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise refused("the body must be a JSON object")
    fixed, known = FIXED[kind], kind.__struct_fields__
    for name in list(values):
        if name in fixed:
            _check_fixed(name, values.pop(name), *fixed[name])
        elif name not in known:
            name = name[:200]
            raise refused(unknown_field("the request", name, [*known, *fixed]), name)
    try:
        return msgspec.convert(values, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _name_field(str(error)) from None


def _check_fixed(name: str, value: Any, possible: tuple[Any, ...], why: str) -> None:
    # True is no 1 here.
    if any(type(value) is type(p) and value == p for p in possible):
        return
    said = [msgspec.json.encode(p).decode() for p in possible if p is not None]
    only = " or ".join(said) if said else "null"
    raise refused(f"{name} is not supported, only {only} is possible: {why}", name)


def _name_field(message: str) -> Exception:
    """msgspec says "… - at `$.n`"."""
    text, _, place = message.partition(" - at ")
    found = re.search(r"\$\.?([^`]*)", place)
    param = (found.group(1) if found else "").removesuffix("[...]") or None
    if inner := re.search(r"(?:required|unknown) field `(.*)`", text):
        param = inner.group(1) if param is None else f"{param}.{inner.group(1)}"
    if param is not None and (part := re.fullmatch(r"(messages\[.*\.content\[.*\])(.*)", param)):
        if "type" in part.group(2) or "unknown field" in text:
            text += "; of content parts only {'type': 'text', 'text': …} is available"
    elif param is not None and re.fullmatch(r"messages\[.*\]\.role", param):
        text += "; roles are system, developer, user, assistant (tools are not available)"
    return refused(text if param is None else f"{param}: {text}", param)


# -- Responses ------------------------------------------------------------------------------------


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class ScoredToken(Struct):
    """vLLM's form, in prompt_logprobs."""

    logprob: float | None
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, ScoredToken] | None]


class CompletionLogprobs(Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, tag_field="object", tag="text_completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    service_tier: str | UnsetType = UNSET


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Struct, tag_field="role", tag="assistant"):
    content: str | None
    reasoning_content: str | None | UnsetType = UNSET
    """There if reasoning is split from answers."""
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None


class ChatCompletion(Struct, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ModelCard(Struct, tag_field="object", tag="model"):
    id: str
    created: int
    max_model_len: int | None
    owned_by: str = "nano-inference"


class ModelList(Struct, tag_field="object", tag="list"):
    data: list[ModelCard]


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(Struct):
    prompt: str
