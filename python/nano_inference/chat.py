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
import jinja2.meta
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


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
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
    return env


_ENV = _environment()


@lru_cache(maxsize=32)
def _compile(template: str) -> tuple[jinja2.Template, bool]:
    """The template, and whether it iterates over the parts of a message's content."""
    tree = _parse(template)
    return _ENV.from_string(template), _iterates_content(tree)


def _parse(template: str) -> jinja2.nodes.Template:
    try:
        return _ENV.parse(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}") from None


def _iterates_content(tree: jinja2.nodes.Template) -> bool:
    names = {"content"}  # variables that hold a content; macros take it as a parameter
    known = 0
    while known != len(names):  # one may be set from another
        known = len(names)
        for assign in tree.find_all(jinja2.nodes.Assign):
            if isinstance(assign.target, jinja2.nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(jinja2.nodes.For))


@lru_cache(maxsize=32)
def variables(template: str) -> frozenset[str]:
    """The variables that the template reads, beside those that it sets itself."""
    return frozenset(jinja2.meta.find_undeclared_variables(_parse(template)))


@lru_cache(maxsize=32)
def mentions(template: str, word: str) -> bool:
    """Whether the template reads an attribute of this name, or has it as a string."""
    tree = _parse(template)
    return any(node.attr == word for node in tree.find_all(jinja2.nodes.Getattr)) or any(
        node.value == word for node in tree.find_all(jinja2.nodes.Const)
    )


def _is_content(node: jinja2.nodes.Node | None, names: set[str]) -> bool:
    """Whether the expression is message.content, maybe filtered or sliced."""
    match node:
        case jinja2.nodes.Name():
            return node.name in names
        case jinja2.nodes.Getattr():
            return node.attr == "content"
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")):
            return True
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Slice()) | jinja2.nodes.Filter():
            return _is_content(node.node, names)
        case jinja2.nodes.Call(node=jinja2.nodes.Getattr(attr="get"), args=[first, *_]):
            return isinstance(first, jinja2.nodes.Const) and first.value == "content"
        case jinja2.nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    return False


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: dict[str, Any],
) -> str:
    """The prompt text. With continue_final_message it ends where the last message does.

    Where a message's content is a list of text parts, a template that does not iterate over them
    gets their texts, joined by newlines.
    """
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(
                f"messages: each must be a dict with role and content, got {message!r}"
            )
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    try:
        compiled, takes_parts = _compile(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}") from None
    messages = [_read_parts(message, takes_parts) for message in messages]
    final = ""
    if continue_final_message:
        messages, final = _mark_end(messages)
    try:
        text = compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"chat template: {error}") from None
    return _cut_at_mark(text, final) if continue_final_message else text


def _read_parts(message: dict[str, Any], keep: bool) -> dict[str, Any]:
    """The message with its content parts checked and, unless `keep`, joined to one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(
                f"messages: a content part of type {kind!r} is not available, only 'text' is"
                if kind is not None
                else f"messages: a content part must be a dict with a type, got {part!r}"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"messages: a text part needs its 'text', a string, got {part!r}")
        texts.append(part["text"])
    return message if keep else {**message, "content": "\n".join(texts)}


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
