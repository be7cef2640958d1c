"""Tokenizer, streaming detokenization, stop strings and chat templates, on tokenizers made here."""

import datetime
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nano_inference.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "El zorro marrón salta sobre el perro perezoso; ¿por qué?",
    "def hello(name):\n    return f'hello {name}'\n",
    "人工智能正在改变世界。 日本語のテキスト。",
]
TEXTS = [
    "The quick fox",
    "  two spaces, then\n\ttabs ",
    "naïve café: e\u0301 n\u0303 – combining",
    "你好，世界！日本語 한국어",
    "👋🏽 family 👨\u200d👩\u200d👧\u200d👦 flag 🇩🇪 end",
    "mixed ünï 🙂🙃 text 漢字",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 हिन्दी",
]
SPECIALS = ["<|start|>", "<|end|>", "<pad>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool call>", "東京"])  # of characters that stand for no byte
    return tokenizer


def byte_fallback(metaspace: bool = False) -> tokenizers.Tokenizer:
    """As sentencepiece models converted to tokenizer.json: Llama 2, Mistral. Latin text only, the
    rest is spelled in bytes."""
    scratch = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    scratch.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    scratch.train_from_iterator(CORPUS[:2], trainer)
    trained = json.loads(scratch.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [piece for piece in trained["vocab"] if piece != "▁"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    words = ["[UNK]", "the", "fox", "##es", "jump", "##ed", ",", "over"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


MAKERS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "metaspace": lambda: byte_fallback(metaspace=True),
}
LOADED: dict[str, Tokenizer] = {}


def load(kind: str) -> Tokenizer:
    if kind not in LOADED:
        LOADED[kind] = Tokenizer(MAKERS[kind](), {}, {})
    return LOADED[kind]


def save(path, backend, config=None, **files):
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def stream(tokenizer, prompt, pieces, skip=True):
    """What each push gives, finish last."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [detokenizer.push(piece) for piece in pieces] + [detokenizer.finish()]


# --- detokenization ---


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_whole_at_every_split(kind, text):
    tokenizer = load(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole, text = text, tokenizer.decode(ids)
    assert text == whole or kind == "metaspace"  # which drops one of two leading spaces
    for at in range(len(ids) + 1):
        out = stream(tokenizer, [], [ids[:at], ids[at:]])
        assert "".join(out) == text
        assert "\ufffd" not in "".join(out)
    one_by_one = stream(tokenizer, [], [[token] for token in ids])
    assert "".join(one_by_one) == text
    assert one_by_one[-1] == ""  # nothing was held back too long


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_continues_the_prompt(kind, text):
    """Prompt text + streamed text = the text of both, spaces and cut characters included."""
    tokenizer = load(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    text = tokenizer.decode(ids)
    cuts = 0
    for at in range(1, len(ids)):
        out = "".join(stream(tokenizer, ids[:at], [[token] for token in ids[at:]]))
        prompt = tokenizer.decode(ids[:at])
        if "\ufffd" not in prompt:
            assert prompt + out == text
        else:  # the prompt ends within a character, which the stream completes
            cuts += 1
            assert text.endswith(out)
            assert len(out.encode()) >= sum(len(tokenizer.token_bytes(t)) for t in ids[at:])
    if kind != "byte-level" and not text.isascii():
        assert cuts > 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 420), max_size=30), st.lists(st.integers(0, 30)), st.booleans())
def test_any_byte_level_tokens_stream_as_they_decode(ids, cuts, skip):
    """Random tokens, so mostly broken UTF-8: the same replacement characters as the whole."""
    tokenizer = load("byte-level")
    bounds = [0, *sorted(cuts), len(ids)]
    pieces = [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    if sum(pieces, []) != ids:
        pieces = [ids]
    out = stream(tokenizer, [], pieces, skip)
    assert "".join(out) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.integers(0, 60), st.sampled_from(sorted(MAKERS)))
def test_any_text_streams_as_it_decodes(text, at, kind):
    tokenizer = load(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(tokenizer, [], [ids[:at], ids[at:]])) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 330), max_size=20), st.integers(0, 20), st.booleans())
def test_broken_byte_fallback_does_not_depend_on_the_split(ids, at, skip):
    tokenizer = load("byte-fallback")
    whole = "".join(stream(tokenizer, [], [ids], skip))
    assert "".join(stream(tokenizer, [], [ids[:at], ids[at:]], skip)) == whole
    assert "".join(stream(tokenizer, [], [[token] for token in ids], skip)) == whole


def test_half_a_character_is_held_back_until_finish():
    tokenizer = load("byte-fallback")
    first, *rest = tokenizer.encode("🙂", add_special_tokens=False)[-4:]
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert [detokenizer.push([token]) for token in (first, *rest[:2])] == ["", "", ""]
    assert detokenizer.push(rest[2:]) == "🙂"
    assert detokenizer.push([first]) == ""
    assert detokenizer.finish() == "\ufffd"
    # a broken character is given up as soon as it is known to be broken
    assert stream(tokenizer, [], [[first], tokenizer.encode("a", False)[-1:]])[1] == "\ufffda"


def test_special_tokens_are_skipped_or_shown():
    tokenizer = load("byte-level")
    start, end = (tokenizer._backend.token_to_id(s) for s in SPECIALS[:2])
    ids = [start, *tokenizer.encode("hi 🙂"), end]
    assert "".join(stream(tokenizer, [], [ids])) == "hi 🙂"
    assert "".join(stream(tokenizer, [], [ids], skip=False)) == "<|start|>hi 🙂<|end|>"
    assert "".join(stream(tokenizer, [], [[99999, *ids]])) == "hi 🙂"  # unknown ids have no text


def test_leading_space_is_dropped_only_where_the_text_begins():
    tokenizer = load("byte-fallback")
    bos = tokenizer._backend.token_to_id("<s>")
    ids = tokenizer.encode("over the", add_special_tokens=False)
    assert "".join(stream(tokenizer, [], [ids])) == "over the"
    assert "".join(stream(tokenizer, [bos], [ids])) == "over the"
    assert "".join(stream(tokenizer, ids, [ids])) == " over the"


def test_word_pieces():
    tokenizer = Tokenizer(word_pieces(), {}, {})
    ids = tokenizer.encode("the foxes jumped , over the fox")
    assert "".join(stream(tokenizer, [], [[token] for token in ids])) == tokenizer.decode(ids)


def test_cost_of_a_stream_is_bounded_by_its_distinct_tokens():
    class Counting:
        def __init__(self, backend):
            self.backend, self.calls = backend, 0

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def decode(self, ids, skip_special_tokens):
            self.calls += len(ids)
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting(byte_fallback())
    tokenizer = Tokenizer(counting, {}, {})
    ids = tokenizer.encode(" ".join(CORPUS), add_special_tokens=False) * 50
    text = "".join(stream(tokenizer, [], [[token] for token in ids]))
    assert len(text) > 10_000
    assert counting.calls <= 3 * len(set(ids)) + 1


# --- stop strings ---


def first_stop(text, stops):
    """(text before it, stop): the stop that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return end - len(stop), stop
    return len(text), None


def check_stops(text, stops, pieces, include):
    checker = StopChecker(stops, include_stop=include)
    out, found = "", None
    for piece in pieces:
        before = found
        shown, found = checker.push(piece)
        assert before is None or (shown, found) == ("", before)
        out += shown
    out += checker.finish()
    begin, stop = first_stop(text, stops)
    assert found == stop
    assert out == text[: begin + (len(stop) if include and stop else 0)]


@settings(max_examples=500, deadline=None)
@given(
    st.text("ab\n", max_size=14),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 14), max_size=5),
    st.booleans(),
)
def test_stop_strings_at_any_split(text, stops, cuts, include):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    check_stops(text, stops, pieces, include)
    check_stops(text, stops, list(text), include)
    check_stops(text, stops, [text], include)


def test_text_that_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(["</answer>", "END"])
    assert checker.push("42 <") == ("42 ", None)
    assert checker.push("/ans") == ("", None)
    assert checker.push("wers EN") == ("</answers ", None)
    assert checker.push("D and more") == ("", "END")
    assert checker.push("ignored") == ("", "END")
    assert checker.finish() == ""
    assert StopChecker(["END"], include_stop=True).push("the END.") == ("the END", "END")


def test_stop_string_over_several_tokens():
    tokenizer = load("byte-fallback")
    text = "hello 世界 stop 🙂 here, more"
    checker, out = StopChecker(["🙂 he"]), ""
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    for token in tokenizer.encode(text, add_special_tokens=False):
        shown, found = checker.push(detokenizer.push([token]))
        out += shown
        if found:
            break
    assert (out, found) == ("hello 世界 stop ", "🙂 he")


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop"):
        StopChecker(["a", ""])


# --- files ---


def test_from_dir_agrees_with_transformers(tmp_path):
    config = {
        "bos_token": "<|start|>",
        "eos_token": {"content": "<|end|>", "__type": "AddedToken"},
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
    }
    backend = byte_level()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", backend.token_to_id("<|start|>"))]
    )
    backend.enable_truncation(4)  # what some were saved with; not for inference
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_dir(save(tmp_path, backend, config))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.special_ids == set(map(backend.token_to_id, SPECIALS))
    assert not tokenizer.has_chat_template


def test_missing_or_broken_tokenizer_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_dir(tmp_path)
    save(tmp_path, byte_level(), tokenizer_config__json="{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_dir(tmp_path)


def test_decoder_that_cannot_stream_is_refused():
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.BPEDecoder()])
    with pytest.raises(ValueError, match="BPEDecoder"):
        Tokenizer(backend, {}, {})


# --- chat templates ---

CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|start|>system\\nYou are helpful.<|end|>\\n' }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + system + message['content'].strip() + ' [/INST]' }}
{% else %}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}
"""
TOOLS = """{%- set ns = namespace(count=0) -%}
{%- if tools %}{{ '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% endfor %}{{ tools | tojson }}{% endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {%- if message.role == 'assistant' -%}
        {% generation %}<a>{{ message.content }}</a>{% endgeneration %}
    {%- else -%}
        <{{ ns.count }}>{{ message.content }}{{ message.role | tojson }}
    {%- endif -%}
{%- endfor -%}
{{ flavour | default('plain') }} {{ strftime_now('%Y') }} {{ {'z': 1, 'a': '<ü>'} | tojson }}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "tools": TOOLS}
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hi <there> & 'you' 🙂 "},
    {"role": "assistant", "content": "Hello! "},
]
QUESTION = [*CHAT, {"role": "user", "content": "Why?\n"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "Köln"}}}
SPECIAL_CONFIG = {"bos_token": "<|start|>", "eos_token": "<|end|>"}


@pytest.fixture(scope="module", params=TEMPLATES)
def chat_pair(request, tmp_path_factory):
    config = {**SPECIAL_CONFIG, "chat_template": TEMPLATES[request.param]}
    path = save(tmp_path_factory.mktemp(request.param), byte_level(), config)
    return Tokenizer.from_dir(path), PreTrainedTokenizerFast.from_pretrained(path)


@pytest.mark.parametrize(
    "messages, options",
    [
        (QUESTION, {}),
        (QUESTION, {"add_generation_prompt": False}),
        (QUESTION, {"tools": [TOOL]}),
        (QUESTION, {"flavour": "spicy"}),
        (CHAT[1:], {}),
        (CHAT, {"add_generation_prompt": False, "continue_final_message": True}),
        (QUESTION, {"add_generation_prompt": False, "continue_final_message": True}),
    ],
)
def test_chat_template_renders_as_in_transformers(chat_pair, messages, options):
    tokenizer, reference = chat_pair
    want = reference.apply_chat_template(
        messages, tokenize=False, **{"add_generation_prompt": True, **options}
    )
    before = json.dumps(messages)
    assert tokenizer.apply_chat_template(messages, **options) == want
    assert json.dumps(messages) == before
    assert tokenizer.has_chat_template


def test_continued_list_content_is_cut_after_its_text(tmp_path):
    template = (
        "{% for m in messages %}{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endfor %}"
    )
    tokenizer = Tokenizer(byte_level(), {}, {"default": template})
    messages = [{"role": "user", "content": [{"type": "text", "text": "one "}]}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenizer.apply_chat_template(messages, **options) == "[one "


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def test_content_parts_become_text_for_templates_of_strings():
    tokenizer = Tokenizer(byte_level(), SPECIAL_CONFIG, {"default": CHATML})
    messages = [{"role": "system", "content": PARTS[:1]}, {"role": "user", "content": PARTS}]
    before = json.dumps(messages)
    plain = [{"role": "system", "content": "one"}, {"role": "user", "content": "one\ntwo"}]
    assert tokenizer.apply_chat_template(messages) == tokenizer.apply_chat_template(plain)
    assert json.dumps(messages) == before
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenizer.apply_chat_template(messages, **options).endswith("user\none\ntwo")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for p in m['content'] | list %}[{{ p.text }}]{% endfor %}"
        "{% endfor %}",
        "{% for m in messages %}{% set c = m.get('content') %}{% set d = c[:] %}"
        "{% for p in d if p.type == 'text' %}[{{ p.text }}]{% endfor %}{% endfor %}",
        "{% macro show(content) %}{% for p in content %}[{{ p.text }}]{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    ],
)
def test_templates_that_iterate_get_the_parts(template):
    tokenizer = Tokenizer(byte_level(), {}, {"default": template})
    messages = [{"role": "user", "content": PARTS}]
    assert tokenizer.apply_chat_template(messages) == "[one][two]"


@pytest.mark.parametrize("template", [CHATML, "{% for p in messages[0].content %}{% endfor %}"])
@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url' is not available"),
        ({"type": "input_audio"}, "'input_audio' is not available"),
        ({"text": "x"}, "must be a dict with a type"),
        ("x", "must be a dict with a type"),
        ({"type": "text"}, "needs its 'text'"),
    ],
)
def test_other_content_parts_are_refused(template, part, message):
    tokenizer = Tokenizer(byte_level(), SPECIAL_CONFIG, {"default": template})
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": [*PARTS, part]}])


def test_tokenize_gives_ids(chat_pair):
    tokenizer, reference = chat_pair
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert text == tokenizer.apply_chat_template(QUESTION)
    ids = tokenizer.apply_chat_template(QUESTION, tokenize=True)
    assert ids == reference.encode(text, add_special_tokens=False)
    with pytest.raises(ValueError, match="tokenize must be True or False"):
        tokenizer.apply_chat_template(QUESTION, tokenize="yes")


def test_errors_of_templates_are_value_errors():
    tokenizer = Tokenizer(byte_level(), SPECIAL_CONFIG, {"default": LLAMA2})
    with pytest.raises(ValueError, match="Roles must alternate"):
        tokenizer.apply_chat_template([{"role": "assistant", "content": "x"}])
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.apply_chat_template(QUESTION, chat_template="{% if %}")
    with pytest.raises(ValueError, match="must be a dict"):
        tokenizer.apply_chat_template(["hello"])
    with pytest.raises(ValueError, match="exclude each other"):
        tokenizer.apply_chat_template(CHAT, continue_final_message=True)
    drop = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="changes or drops"):
        tokenizer.apply_chat_template(
            CHAT, chat_template=drop, add_generation_prompt=False, continue_final_message=True
        )


def test_templates_are_sandboxed():
    tokenizer = Tokenizer(byte_level(), {}, {})
    for escape in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
    ):
        with pytest.raises(ValueError, match="chat template"):
            tokenizer.apply_chat_template(CHAT, chat_template=escape)


def test_no_chat_template_is_said():
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(byte_level(), {}, {}).apply_chat_template(CHAT)


def test_where_templates_come_from(tmp_path):
    user = [{"role": "user", "content": "x"}]
    save(tmp_path, byte_level(), {"chat_template": "config"})
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(user) == "config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(user) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(user) == "jinja"


def test_several_templates():
    templates = {"default": "plain", "tool_use": "tools"}
    tokenizer = Tokenizer(byte_level(), {}, templates)
    assert tokenizer.apply_chat_template(CHAT) == "plain"
    assert tokenizer.apply_chat_template(CHAT, tools=[TOOL]) == "tools"
    with pytest.raises(ValueError, match="no default"):
        Tokenizer(byte_level(), {}, {"rag": "x"}).apply_chat_template(CHAT)


def test_strftime_now_is_today():
    tokenizer = Tokenizer(byte_level(), {}, {"default": "{{ strftime_now('%d %b %Y') }}"})
    before = datetime.datetime.now()
    got = tokenizer.apply_chat_template(CHAT)
    assert got in {d.strftime("%d %b %Y") for d in (before, datetime.datetime.now())}
