"""Text to tokens and back: tokenizer.json, streaming detokenization, stop strings."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from .config import read_json
from .validation import check_bool, check_text

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
LONG_TEXT = 1 << 15  # from so many characters on, other threads should go on meanwhile
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders whose text for a token depends on what follows it: no stream could be right.
UNSTREAMABLE = {"BPEDecoder", "CTC"}


# Tokens for filling in the middle: before the prefix, before the suffix, before the middle.
FILL_IN_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
)


class Tokenizer:
    """A model folder's tokenizer."""

    def __init__(
        self, backend: Any, config: dict[str, Any], chat_templates: dict[str, str]
    ) -> None:
        self._backend = backend  # tokenizers.Tokenizer
        self._chat_templates = chat_templates
        self.special_tokens = {
            key: text
            for key in SPECIAL_TOKENS
            if (text := _token_text(config.get(key))) is not None
        }
        self.special_ids = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )
        self.eos_token_id = self._special_id("eos_token")
        self.bos_token_id = self._special_id("bos_token")
        self._decoders = _decoder_types(backend)
        self._pieces: dict[int, bytes] = {}
        unstreamable = UNSTREAMABLE & self._decoders
        if unstreamable:
            raise ValueError(f"tokenizer.json: the decoder {unstreamable.pop()} is not supported")

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and the chat template of a model folder."""
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{path} has no tokenizer.json (skip_tokenizer_init=True works without one)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file} cannot be read: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                config.update(read_json(path / name))
        return cls(backend, config, _read_chat_templates(path, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) >= LONG_TEXT:  # a batch is tokenized without Python's lock
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` on its own, as transformers gives it without its clean-up of spaces."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    @overload
    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, tokenize: Literal[False] = ..., **kwargs: Any
    ) -> str: ...

    @overload
    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, tokenize: bool, **kwargs: Any
    ) -> str | list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str | list[int]:
        """The prompt of a conversation: its text or, with tokenize, its token ids. `kwargs` are
        variables of the template."""
        from . import chat

        check_bool("tokenize", tokenize)
        check_bool("add_generation_prompt", add_generation_prompt)
        check_bool("continue_final_message", continue_final_message)
        if chat_template is None:
            chat_template = self.choose_template(tools)
        check_text("chat_template", chat_template)
        text = chat.render(
            chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={"tools": tools, "documents": None, **self.special_tokens, **kwargs},
        )
        # The template has written the special tokens.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text which is not empty. b"" for an unknown id."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._find_bytes(token)
        return piece

    def _find_bytes(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        if "ByteLevel" in self._decoders:
            values = [BYTE_OF_CHAR.get(char) for char in text]
            # An added token may hold characters that stand for no byte: then it means itself.
            return text.encode() if None in values else bytes(v for v in values if v is not None)
        if "ByteFallback" in self._decoders and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        # What it adds to itself: decoders treat the first token of a text differently (its space).
        once = self.decode([token], skip_special_tokens=False)
        twice = self.decode([token, token], skip_special_tokens=False)
        return twice[len(once) :].encode()

    def first_bytes(self, token: int) -> bytes:
        """The bytes of a token that begins a text: without the leading space of some tokenizers."""
        if "ByteLevel" in self._decoders:
            return self.token_bytes(token)
        text = self.decode([token], skip_special_tokens=False)
        return self.token_bytes(token) if "\ufffd" in text else text.encode()

    def choose_template(self, tools: list[dict[str, Any]] | None) -> str:
        """The template that apply_chat_template() takes. ValueError if there is none."""
        if not self._chat_templates:
            raise ValueError(
                "the model has no chat template (pass chat_template=, or use generate)"
            )
        name = "tool_use" if tools and "tool_use" in self._chat_templates else "default"
        if name not in self._chat_templates:
            known = ", ".join(self._chat_templates)
            raise ValueError(f"the model has several chat templates ({known}) and no default one")
        return self._chat_templates[name]

    @property
    def can_fill_in(self) -> bool:
        return self._fill_in_ids() is not None

    def encode_to_fill_in(
        self, prefix: str | Sequence[int], suffix: str, add_special_tokens: bool = True
    ) -> list[int]:
        """The prompt after which a model writes what belongs between prefix and suffix (Bavarian et
        al. 2022, prefix-suffix-middle). ValueError if the model has no tokens for it."""
        ids = self._fill_in_ids()
        if ids is None:
            known = ", ".join(names[0] for names in FILL_IN_TOKENS)
            raise ValueError(f"the model has no tokens to fill in the middle (none of {known})")
        if isinstance(prefix, str):
            begin = self.encode("", add_special_tokens)
            prefix = self.encode(prefix, add_special_tokens=False)
        else:
            begin = []
        return [*begin, ids[0], *prefix, ids[1], *self.encode(suffix, False), ids[2]]

    def _fill_in_ids(self) -> list[int] | None:
        for names in FILL_IN_TOKENS:
            ids = [self._backend.token_to_id(name) for name in names]
            if None not in ids:
                return ids
        return None

    def _special_id(self, key: str) -> int | None:
        text = self.special_tokens.get(key)
        return None if text is None else self._backend.token_to_id(text)


class IncrementalDetokenizer:
    """Tokens in, text out, piece by piece. How the tokens are cut into pushes changes nothing, a
    character is held back until its last byte is there, and the cost of a token is constant.

    The text continues the prompt: a space that joins both is kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._empty = True  # nothing visible so far
        # Only a character that the prompt leaves unfinished matters; it has at most 3 bytes so far.
        visible = [token for token in prompt_ids[-64:] if token not in self._skipped]
        self._empty = not visible and all(token in self._skipped for token in prompt_ids)
        for token in visible[-8:]:
            self._utf8.decode(tokenizer.token_bytes(token))

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        out = []
        for token in ids:
            if token in self._skipped:
                continue
            if self._empty:
                piece = self._tokenizer.first_bytes(token)
                self._empty = False
            else:
                piece = self._tokenizer.token_bytes(token)
            out.append(self._utf8.decode(piece))
        return "".join(out)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never got whole."""
        return self._utf8.decode(b"", final=True)


class StopChecker:
    """Finds stop strings in a stream of text and never lets a part of one out.

    The stop string that is complete first wins (of several ending together, the longest), so the
    result does not depend on how the text is cut into pushes.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if any(not stop for stop in stops):
            raise ValueError("stop: an empty string cannot be a stop string")
        self._stops = list(stops)
        self._include = include_stop
        self._held = ""
        self._found: str | None = None

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that is safe to show now, and the stop string if one was found: then the stream
        is over, and further text is dropped. Stop strings that end in a text pushed with
        may_stop=False do not count; those that only begin there do."""
        if self._found is not None:
            return "", self._found
        if not self._stops:
            return text, None
        held = self._held + text
        hits = []
        for stop in self._stops if may_stop else ():
            # One that ends in the text held back was passed over before.
            at = held.find(stop, max(0, len(self._held) + 1 - len(stop)))
            if at >= 0:
                hits.append((at + len(stop), at, stop))
        if hits:
            end, begin, self._found = min(hits)
            self._held = ""
            return held[: end if self._include else begin], self._found
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def finish(self) -> str:
        """The text that was held back; the stream ended otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others get characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def _decoder_types(backend: Any) -> set[str]:
    """Types of all decoders in the tokenizer's chain."""
    if backend.decoder is None:
        return set()
    found: set[str] = set()
    pending = [json.loads(backend.decoder.__getstate__())]
    while pending:
        node = pending.pop()
        found.add(node.get("type", ""))
        pending += node.get("decoders", [])
    return found


def _token_text(entry: Any) -> str | None:
    """Special tokens are strings or objects with their content."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _read_chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template. A file of its own goes before tokenizer_config.json."""
    jinja, old = path / "chat_template.jinja", path / "chat_template.json"
    if jinja.is_file():
        return {"default": jinja.read_text(encoding="utf-8")}
    found = read_json(old).get("chat_template") if old.is_file() else config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):  # [{"name": …, "template": …}]
        return {entry["name"]: entry["template"] for entry in found}
    return {}
