"""Chat templates: the Jinja programs that models bring along, in a sandbox like transformers'."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

CONTINUE_MARK = "<|nano-inference continues here|> "  # ends in a space: templates may strip it


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks answers for training; here its body counts."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return env.from_string(template)


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: dict[str, Any],
) -> str:
    """The prompt text. With continue_final_message it ends where the last message does."""
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(
                f"messages: each must be a dict with role and content, got {message!r}"
            )
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    final = ""
    if continue_final_message:
        messages, final = _mark_end(messages)
    try:
        text = _compile(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"chat template: {error}") from None
    return _cut_at_mark(text, final) if continue_final_message else text


def _mark_end(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The messages with a mark after the last one's text, and that text."""
    if not messages:
        raise ValueError("continue_final_message: there is no message to continue")
    marked = [*messages[:-1], copy.deepcopy(messages[-1])]
    content = marked[-1].get("content")
    if isinstance(content, str):
        marked[-1]["content"] = content + CONTINUE_MARK
        return marked, content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] += CONTINUE_MARK
            return marked, text
    raise ValueError("continue_final_message: the final message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    at = text.rfind(CONTINUE_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template changes or drops the final message"
        )
    kept = text[:at]
    # A template that strips messages took the mark's space, and would have taken the message's.
    return kept if text.startswith(CONTINUE_MARK, at) else kept.rstrip()
