"""POST /tokenize and /detokenize, as in vLLM."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from .answer import loaded_llm, off_loop, served_model
from .chat import render
from .endpoints import json_body
from .errors import json_response, refused
from .protocol import DetokenizeRequest, Text, TokenizeRequest, Tokens, read_body
from .state import ServerState

_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


async def tokenize(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await json_body(request)
    llm = loaded_llm(state)
    asked = read_body(body, TokenizeRequest)
    served_model(state, asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("give prompt or messages, one of the two", "prompt")
    if asked.messages is None:
        for name in _CHAT_ONLY:
            if getattr(asked, name) is not None:
                raise refused(f"{name} needs messages", name)
    tokenizer = llm.get_tokenizer()

    def work() -> Response:
        text, special = asked.prompt, asked.add_special_tokens
        if text is None:
            text = render(llm, asked)
        ids = tokenizer.encode(text, (asked.messages is None) if special is None else special)
        reply = Tokens(len(ids), llm.engine.core.config.max_model_len, ids)
        if asked.return_token_strs:
            reply.token_strs = [tokenizer.token_bytes(t).decode(errors="replace") for t in ids]
        return json_response(reply)

    return await off_loop(len(body), work)


async def detokenize(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await json_body(request)
    llm = loaded_llm(state)
    asked = read_body(body, DetokenizeRequest)
    served_model(state, asked.model)
    limit = llm.engine.loaded.model_config.vocab_size
    tokenizer = llm.get_tokenizer()

    def work() -> Response:
        for i, token in enumerate(asked.tokens):
            if token >= limit:
                raise refused(
                    f"tokens[{i}] is {token}, but the vocabulary has {limit} tokens", f"tokens[{i}]"
                )
        return json_response(Text(tokenizer.decode(asked.tokens, skip_special_tokens=False)))

    return await off_loop(len(body), work)
