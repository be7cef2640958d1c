"""Golden tests: every family against transformers, on tiny random models.

float32: |logit - reference| <= 1e-4 * max|reference|, and 64 greedy tokens equal. Prompts are
chosen on the reference alone so that its best token always leads by more than that tolerance.
"""

import numpy as np
import pytest
import torch
import transformers

import tiny
from nano_inference import _core
from nano_inference.config import load_model
from nano_inference.models import families

TOLERANCE = 1e-4
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Odd sizes on purpose: hidden no multiple of 16, head_dim 6, 20, 24, odd intermediate and vocab.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 160,
}
GQA = {"num_key_value_heads": 2}
WIDE = {
    "hidden_size": 60,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 101,
}
GPT2 = {"vocab_size": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 160}


def rope(**params):
    return {"rope_parameters": {"rope_theta": 10000.0, **params}}


def yarn(**params):
    return rope(rope_type="yarn", factor=4.0, **{ORIGINAL: 40}, **params)


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
CASES = {
    "llama": ("Llama", {}),
    "llama-gqa-tied": ("Llama", {**GQA, "tie_word_embeddings": True, "vocab_size": 131}),
    "llama-mqa-biases": ("Llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim-override": ("Llama", {**GQA, "head_dim": 24}),
    "llama-theta": ("Llama", rope(rope_type="default", rope_theta=500000.0)),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama-linear": ("Llama", {**GQA, **rope(rope_type="linear", factor=2.5)}),
    "llama-dynamic": ("Llama", {**GQA, **rope(rope_type="dynamic", factor=2.0)}),
    "llama-llama3": ("Llama", {**WIDE, **rope(**LLAMA3, **{ORIGINAL: 32})}),
    "llama-yarn": ("Llama", {**WIDE, **yarn()}),
    "llama-yarn-mscale": ("Llama", {**WIDE, **yarn(mscale=0.707, mscale_all_dim=1.2)}),
    "llama-yarn-options": (
        "Llama",
        {**WIDE, **yarn(attention_factor=1.2, truncate=False, beta_fast=16, beta_slow=2)},
    ),
    "mistral-full": ("Mistral", {**GQA, "sliding_window": None}),
    "mistral-window": ("Mistral", {**GQA, "sliding_window": 7}),
    "mistral-window-head-dim": ("Mistral", {**GQA, "sliding_window": 16, "head_dim": 20}),
    "qwen2": ("Qwen2", {**WIDE}),
    "qwen2-tied": ("Qwen2", {**GQA, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**GQA, **QWEN_WINDOW}),
    "qwen2-yarn": ("Qwen2", {**GQA, **yarn()}),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 20}),
    "qwen3-tied-biases": (
        "Qwen3", {**WIDE, "head_dim": 24, "tie_word_embeddings": True, "attention_bias": True}
    ),
    "qwen3-window": (
        "Qwen3",
        {**GQA, "head_dim": 6, "use_sliding_window": True, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-inner": ("GPT2", {"n_inner": 37, "activation_function": "gelu", "n_head": 2}),
    "gpt2-unscaled": ("GPT2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
}  # fmt: skip
BASE_CASE = ["llama-gqa-tied", "mistral-window", "qwen2", "qwen3", "gpt2"]


def make(name, path):
    family, overrides = CASES[name]
    sizes = GPT2 if family == "GPT2" else SMALL
    config = getattr(transformers, f"{family}Config")(**{**sizes, **overrides})
    return tiny.save_model(path, config, seed=len(name))


def reference_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def assert_close(got, want):
    assert got.shape == want.shape
    error, scale = np.abs(got - want).max(), np.abs(want).max()
    assert error <= TOLERANCE * scale, f"error {error / scale:.2e} of max|logit|"


def decisive_prompt(model, length, new_tokens=64, tolerance=TOLERANCE):
    """A prompt whose greedy continuation by transformers is varied and nowhere nearly a tie; and
    that continuation."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, model.config.vocab_size, length).tolist()
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(result.logits)
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > 3 * tolerance * logits.abs().amax(1)
        tokens = result.sequences[0, length:].tolist()
        if clear.all() and len(set(tokens)) >= 8:
            return prompt, tokens
    raise AssertionError("no decisive prompt found")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(name, tmp_path):
    model = make(name, tmp_path)
    prompt, want = decisive_prompt(model, 33)
    # Within max_position_embeddings the reference uses the plain table of the dynamic rule.
    engine = tiny.build_engine(tmp_path, max_model_len=160)
    assert_close(engine.logits(prompt), reference_logits(model, prompt))
    assert tiny.greedy(engine, prompt, 64) == want


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("name", BASE_CASE)
def test_logits_on_every_instruction_set(name, isa, tmp_path):
    model = make(name, tmp_path)
    ids = np.random.default_rng(4).integers(0, 97, 70).tolist()
    engine = tiny.build_engine(tmp_path, max_model_len=160, isa=isa)
    assert_close(engine.logits(ids), reference_logits(model, ids))


def test_dynamic_rope_beyond_the_trained_positions(tmp_path):
    """The table for 251 tokens, of 160 trained ones: what transformers uses for a prompt of 251."""
    model = make("llama-dynamic", tmp_path)
    ids = np.random.default_rng(1).integers(0, 97, 251).tolist()
    engine = tiny.build_engine(tmp_path, max_model_len=251)
    assert_close(engine.logits(ids[:250]), reference_logits(model, ids)[:250])


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["llama", "llama-linear", "llama-llama3", "llama-yarn", "qwen3"])
def test_config_as_transformers_4_writes_it(name, type_key, tmp_path):
    model = make(name, tmp_path)
    tiny.rewrite_as_transformers_4(tmp_path, type_key)
    ids = np.random.default_rng(2).integers(0, 97, 90).tolist()
    engine = tiny.build_engine(tmp_path, max_model_len=160)
    assert_close(engine.logits(ids), reference_logits(model, ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BASE_CASE)
def test_16_bit_weights(name, dtype, tmp_path):
    """RMS error against float32 at most twice that of torch in the same type, whether the
    checkpoint has that type or is rounded to it while loading."""
    model = make(name, tmp_path / "f32")
    ids = np.random.default_rng(3).integers(0, 97, 60).tolist()
    exact = reference_logits(model, ids)
    rounded = tiny.build_engine(tmp_path / "f32", dtype=dtype).logits(ids)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "f16")
    stored = tiny.build_engine(tmp_path / "f16")
    rms = [np.sqrt(np.mean((x - exact) ** 2)) for x in (rounded, reference_logits(model, ids))]
    assert rms[0] > 0.0
    assert rms[0] <= 2 * rms[1]
    stored_rms = np.sqrt(np.mean((stored.logits(ids) - exact) ** 2))
    assert stored_rms <= 2 * rms[1]


def test_gpt2_names_without_prefix_and_with_buffers(tmp_path):
    model = make("gpt2", tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 160, 160), np.float32)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    engine = tiny.build_engine(tmp_path)
    assert_close(engine.logits(ids), reference_logits(model, ids))


@pytest.mark.parametrize("name", BASE_CASE)
def test_weight_map_fills_every_slot_once(name, tmp_path):
    make(name, tmp_path)
    loaded = load_model(tmp_path)
    slots = [source.slot for source in loaded.weight_map]
    assert len(slots) == len(set(slots))
    assert set(slots) == set(_core.Engine.weight_slots(loaded.model_config))


# --- configs: defaults, dtypes, lengths, refusals ---


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make("llama", path)
    return path


def variant(source, tmp_path, **changes):
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    tiny.edit_config(tmp_path, **changes)
    return tmp_path


def test_unknown_architecture_lists_the_known_ones(llama_dir, tmp_path):
    path = variant(llama_dir, tmp_path, architectures=["NoSuchForCausalLM"])
    with pytest.raises(ValueError, match="NoSuchForCausalLM") as error:
        load_model(path)
    known = families()
    assert len(known) >= 5
    assert all(name in str(error.value) for name in known)


@pytest.mark.parametrize(
    "changes, culprit",
    [
        ({"architectures": ...}, "no architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "xielu"}, "hidden_act"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "'su'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "97"}, "vocab_size"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_unsupported_settings_are_named(changes, culprit, llama_dir, tmp_path):
    with pytest.raises(ValueError, match=culprit):
        load_model(variant(llama_dir, tmp_path, **changes))


@pytest.mark.parametrize(
    "name, changes, culprit",
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("mistral-window", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("mistral-window", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    ],
)
def test_family_refusals(name, changes, culprit, tmp_path):
    make(name, tmp_path)
    tiny.edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=culprit):
        load_model(tmp_path)


def test_config_files_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        load_model(tmp_path)


def test_max_model_len(llama_dir):
    assert load_model(llama_dir).max_model_len == 160
    assert load_model(llama_dir, max_model_len=50).max_model_len == 50
    with pytest.raises(ValueError, match=r"161.*160"):
        load_model(llama_dir, max_model_len=161)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="max_model_len"):
            load_model(llama_dir, max_model_len=bad)


@pytest.mark.parametrize(
    "changes, asked, want",
    [
        ({}, "auto", "float32"),
        ({"dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": ..., "torch_dtype": "torch.float16"}, "auto", "float16"),
        ({"dtype": ...}, "auto", "float32"),  # as the tensors are stored
        ({"dtype": "bfloat16"}, "float32", "float32"),
        ({}, "half", "float16"),
        ({"dtype": "float64"}, "bfloat16", "bfloat16"),
    ],
)
def test_dtype(changes, asked, want, llama_dir, tmp_path):
    assert load_model(variant(llama_dir, tmp_path, **changes), dtype=asked).dtype == want


@pytest.mark.parametrize(
    "changes, asked, want",
    [
        ({}, "auto", "bfloat16"),
        ({"dtype": ...}, "auto", "bfloat16"),
        ({"dtype": "float16"}, "auto", "float16"),
        ({}, "half", "float16"),
    ],
)
def test_dtype_on_cuda(changes, asked, want, llama_dir, tmp_path, caplog):
    path = variant(llama_dir, tmp_path, **changes)
    with caplog.at_level("INFO", logger="nano_inference"):
        assert load_model(path, dtype=asked, device="cuda").dtype == want
    assert ("bfloat16 on cuda" in caplog.text) == (want == "bfloat16")
    with pytest.raises(ValueError, match="dtype='float32' .*bfloat16 or float16"):
        load_model(path, dtype="float32", device="cuda")


def test_unknown_dtype_is_named(llama_dir):
    with pytest.raises(ValueError, match="int3"):
        load_model(llama_dir, dtype="int3")


def test_dtype_of_tensors_when_the_config_does_not_say(llama_dir, tmp_path):
    (tmp_path / "config.json").write_text((llama_dir / "config.json").read_text())
    tiny.edit_config(tmp_path, dtype=...)
    big, small = np.zeros(9, np.uint16), np.zeros(2, np.float32)
    tiny.write_safetensors(tmp_path / "model.safetensors", {"a": big, "b": small})
    assert load_model(tmp_path).dtype == "bfloat16"


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "num_attention_heads"]
)
def test_impossibly_large_sizes_are_named(key, llama_dir, tmp_path):
    path = variant(llama_dir, tmp_path, **{key: 90_000_000_000})
    with pytest.raises(ValueError, match=f"'{key}' must be at most"):
        load_model(path)


def test_more_layers_than_any_model_has(llama_dir, tmp_path):
    with pytest.raises(ValueError, match="'num_hidden_layers' must be at most 1000, got 90000000"):
        load_model(variant(llama_dir, tmp_path, num_hidden_layers=90_000_000))


def test_unused_generation_settings_are_logged(llama_dir, tmp_path, caplog):
    path = variant(llama_dir, tmp_path)
    (path / "generation_config.json").write_text(
        '{"do_sample": false, "suppress_tokens": [5], "no_repeat_ngram_size": 3, "num_beams": 1, '
        '"top_k": 5, "eos_token_id": 7, "bad_words_ids": null, "transformers_version": "5.0"}'
    )
    with caplog.at_level("INFO", logger="nano_inference"):
        load_model(path)
    (line,) = caplog.messages
    assert line.endswith("not used: do_sample, no_repeat_ngram_size, suppress_tokens")


def test_generation_defaults(llama_dir, tmp_path):
    path = variant(llama_dir, tmp_path, eos_token_id=[7, 8])
    (path / "generation_config.json").write_text(
        '{"eos_token_id": [9, 7], "temperature": 0.6, "top_k": 20, "top_p": 0.95, '
        '"do_sample": true, "repetition_penalty": 1.1, "max_new_tokens": 77}'
    )
    got = load_model(path).generation
    assert got.eos_token_ids == [9, 7, 8]
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.6, 20, 0.95, None)
    assert (got.repetition_penalty, got.max_new_tokens) == (1.1, 77)
    (path / "generation_config.json").unlink()
    got = load_model(path).generation
    assert got.eos_token_ids == [7, 8]
    assert got.temperature is None
