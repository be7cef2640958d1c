"""Rotary tables against transformers' own functions, and the ways a config may spell them."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nano_inference import rope

ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, ORIGINAL: 256},
    "llama3-wide": {**LLAMA3, ORIGINAL: 8192, "low_freq_factor": 2},
    "yarn": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 512},
    "yarn-implicit-original": {"rope_type": "yarn", "factor": 2.0},
    "yarn-below-one": {"rope_type": "yarn", "factor": 0.5, ORIGINAL: 512},
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 40.0, ORIGINAL: 64, "mscale": 0.707, "mscale_all_dim": 1.1
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "factor": 8.0, ORIGINAL: 128, "attention_factor": 1.3
    },
    "yarn-untruncated": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 128, "truncate": False},
    "yarn-betas": {
        "rope_type": "yarn", "factor": 8.0, ORIGINAL: 128, "beta_fast": 8, "beta_slow": 2
    },
}  # fmt: skip
MAX_POSITIONS = 2048


def reference(params, head_dim, theta, seq_len=None):
    config = LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={**params, "rope_theta": theta},
    )
    if params["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[params["rope_type"]](config, "cpu", seq_len=seq_len)


def as_4(params, theta, key="rope_type"):
    params = {(key if k == "rope_type" else k): v for k, v in params.items()}
    return {"rope_theta": theta, "rope_scaling": params}


@pytest.mark.parametrize("head_dim", [6, 20, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", CASES)
def test_table_equals_transformers(name, theta, head_dim):
    params = CASES[name]
    want, want_factor = reference(params, head_dim, theta)
    hf = {"rope_parameters": {**params, "rope_theta": theta}}
    settings = rope.read_settings(hf, head_dim, MAX_POSITIONS)
    got = rope.build(settings, MAX_POSITIONS)
    # float32 powers of two libraries may differ in the last bit; llama3 mixes by a difference
    np.testing.assert_allclose(got.inv_freq, want.numpy(), rtol=2e-6)
    assert got.attention_factor == pytest.approx(want_factor, rel=1e-12)
    for key in ("type", "rope_type"):
        assert (
            rope.build(rope.read_settings(as_4(params, theta, key), head_dim, MAX_POSITIONS), 2048)
            == got
        )


@pytest.mark.parametrize("length", [100, 2048, 3000, 8192])
def test_dynamic_table_is_the_one_for_max_model_len(length):
    params = CASES["dynamic"]
    want, _ = reference(params, 64, 10000.0, seq_len=length)
    settings = rope.read_settings({"rope_parameters": params}, 64, MAX_POSITIONS)
    np.testing.assert_allclose(rope.build(settings, length).inv_freq, want.numpy(), rtol=2e-6)
    whole, _ = reference(params, 64, 10000.0, seq_len=8192)
    np.testing.assert_allclose(rope.build(settings).inv_freq, whole.numpy(), rtol=5e-7)


def test_partial_rotation_has_fewer_frequencies():
    hf = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}
    settings = rope.read_settings(hf, 32, MAX_POSITIONS)
    want = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16) / 2.0
    np.testing.assert_allclose(rope.build(settings).inv_freq, want, rtol=1e-6)


@pytest.mark.parametrize(
    "params, want",
    [
        ({}, 2048),
        ({"rope_type": "linear", "factor": 2.5}, 5120),
        ({"rope_type": "dynamic", "factor": 4.0}, 8192),
        ({**LLAMA3, ORIGINAL: 256}, 2048),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 1024}, 4096),
        ({"type": "yarn", "factor": 4.0}, 8192),
    ],
)
def test_scaled_max_positions(params, want):
    assert rope.read_settings({"rope_scaling": params}, 64, MAX_POSITIONS).scaled_max == want


@pytest.mark.parametrize(
    "hf, culprit",
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "'beta_fast'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 7}}, ORIGINAL),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "high_freq_factor",
        ),
    ],
)
def test_unsupported_settings_are_named(hf, culprit):
    with pytest.raises(ValueError, match=culprit):
        rope.build(rope.read_settings(hf, 64, MAX_POSITIONS))


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="even number of dimensions, got 7"):
        rope.read_settings({}, 7, MAX_POSITIONS)
