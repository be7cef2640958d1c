"""Checkpoints: what is read is what was written, and every kind of broken file is named."""

import json
import struct
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from nano_inference import loader
from nano_inference.models import find_family

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 11,
    "n_embd": 6,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 5,
    "n_inner": 7,
}


class Recorder:
    """Stands for the engine: keeps what load_weight was given."""

    def __init__(self):
        self.loaded = {}

    def load_weight(self, slot, data, dtype):
        assert slot not in self.loaded
        assert data.flags.c_contiguous and data.flags.aligned
        self.loaded[slot] = (np.array(data), dtype)


def model(hf):
    """(what load_weights needs of a LoadedConfig, random tensors by checkpoint name)"""
    _, family = find_family(hf)
    weight_map = family.weights(family.config(hf, None))
    rng = np.random.default_rng(0)
    shapes = {source.name: source.shape for source in weight_map}
    tensors = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    return SimpleNamespace(
        weight_map=weight_map, name_prefix=getattr(family, "PREFIX", ""), dtype="float32"
    ), tensors


def load(path, loaded, **options):
    engine = Recorder()
    loader.load_weights(engine, path, loaded, progress=False, **options)
    return engine.loaded


def expected(loaded, tensors):
    for source in loaded.weight_map:
        data = tensors[source.name]
        data = data.T if source.transpose else data
        yield source.slot, data if source.rows is None else data[slice(*source.rows)]


def bits(array):
    """float32 -> bf16 bits, by torch."""
    return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)


STORED = {
    "float32": lambda x: x,
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": bits,
}


# --- reading ---


@pytest.mark.parametrize("hf", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", STORED)
def test_every_slot_gets_its_tensor(hf, dtype, tmp_path):
    loaded, tensors = model(hf)
    stored = {name: STORED[dtype](array) for name, array in tensors.items()}
    tiny.write_safetensors(tmp_path / "model.safetensors", stored)
    got = load(tmp_path, loaded, check_nan=True)
    want = dict(expected(loaded, stored))
    assert set(got) == set(want)
    for slot, (data, kind) in got.items():
        assert kind == dtype
        assert data.dtype == want[slot].dtype
        np.testing.assert_array_equal(data, want[slot])
    assert loader.stored_dtype(tmp_path) == dtype


def test_conv1d_is_transposed_and_split():
    _, tensors = model(GPT2)
    loaded, _ = model(GPT2)
    fused = tensors["h.0.attn.c_attn.weight"]  # [hidden, 3 * hidden]
    want = dict(expected(loaded, tensors))
    for part, name in enumerate("qkv"):
        np.testing.assert_array_equal(
            want[f"layers.0.{name}.weight"], fused[:, 6 * part : 6 * part + 6].T
        )


@pytest.mark.parametrize("hf", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_several_threads_load_the_same(hf, tmp_path, capsys):
    loaded, tensors = model(hf)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    one, many = Recorder(), Recorder()
    total = loader.load_weights(one, tmp_path, loaded, progress=False)
    assert loader.load_weights(many, tmp_path, loaded, progress=True, threads=8) == total
    assert total == sum(array.nbytes for array in tensors.values())
    assert "100%" in capsys.readouterr().err
    assert set(one.loaded) == set(many.loaded)
    for slot, (data, kind) in one.loaded.items():
        assert many.loaded[slot][1] == kind
        np.testing.assert_array_equal(many.loaded[slot][0], data)


def test_threads_work_at_once_and_begin_with_the_largest(tmp_path):
    loaded, tensors = model(LLAMA)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    meeting = threading.Barrier(4, timeout=60)
    began = []

    class Waiter(Recorder):
        def load_weight(self, slot, data, dtype):
            began.append(data.nbytes)
            if len(began) <= 4:
                meeting.wait()  # comes to its end only if four threads are in here
            super().load_weight(slot, data, dtype)

    engine = Waiter()
    loader.load_weights(engine, tmp_path, loaded, progress=False, threads=4)
    assert len(engine.loaded) == len(loaded.weight_map)
    largest = sorted((data.nbytes for data, _ in engine.loaded.values()), reverse=True)
    assert sorted(began[:4], reverse=True) == largest[:4]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_names_the_tensor_and_ends_the_loading(kind, threads, tmp_path):
    loaded, tensors = model(LLAMA)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    calls = []

    class Broken(Recorder):
        def load_weight(self, slot, data, dtype):
            calls.append(slot)
            if slot == "layers.0.o.weight":
                raise kind("the card is lost")
            time.sleep(0.01)

    with pytest.raises(kind, match=r"'model\.layers\.0\.self_attn\.o_proj\.weight': the card is"):
        loader.load_weights(Broken(), tmp_path, loaded, progress=False, threads=threads)
    assert len(calls) < len(loaded.weight_map)


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.attn.v_scale"])
def test_scales_of_the_cache_are_refused(name, tmp_path):
    loaded, tensors = model(LLAMA)
    tensors[f"model.layers.0.{name}"] = np.ones(1, np.float32)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"1 scales of an fp8 KV cache.*{name}") as error:
        load(tmp_path, loaded)
    assert "unexpected" not in str(error.value)


def test_nothing_is_copied(tmp_path):
    loaded, tensors = model(LLAMA)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    data = loader.open_checkpoint(tmp_path)["model.norm.weight"].read()
    assert not data.flags.owndata and not data.flags.writeable


def test_written_by_safetensors_itself(tmp_path):
    from safetensors.torch import save_file

    want = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.randn(2, 2).half()}
    save_file(want, tmp_path / "model.safetensors", metadata={"format": "pt"})
    got = loader.open_checkpoint(tmp_path)
    assert {name: tensor.shape for name, tensor in got.items()} == {
        "a": (3, 5),
        "b": (7,),
        "c": (2, 2),
    }
    np.testing.assert_array_equal(
        got["a"].read(), want["a"].view(torch.int16).numpy().view(np.uint16)
    )
    np.testing.assert_array_equal(got["b"].read(), want["b"].numpy())
    np.testing.assert_array_equal(got["c"].read(), want["c"].numpy())


def shard(path, tensors, files):
    """Spreads tensors over files round robin, with an index."""
    names = list(tensors)
    weight_map = {name: files[i % len(files)] for i, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        tiny.write_safetensors(path / file, part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_sharded(tmp_path):
    loaded, tensors = model(LLAMA)
    shard(tmp_path, tensors, SHARDS)
    got = load(tmp_path, loaded)
    for slot, want in expected(loaded, tensors):
        np.testing.assert_array_equal(got[slot][0], want)
    sizes = sum((tmp_path / file).stat().st_size for file in SHARDS)
    assert loader.checkpoint_bytes(tmp_path) == sizes


def test_missing_shards_are_listed(tmp_path):
    loaded, tensors = model(LLAMA)
    shard(tmp_path, tensors, SHARDS)
    (tmp_path / SHARDS[0]).unlink()
    (tmp_path / SHARDS[2]).unlink()
    with pytest.raises(ValueError, match="2 weight files") as error:
        load(tmp_path, loaded)
    assert SHARDS[0] in str(error.value) and SHARDS[2] in str(error.value)
    assert SHARDS[1] not in str(error.value)


@pytest.mark.parametrize(
    "index, culprit",
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "plain file name"),
        ({"weight_map": {}}, "empty"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_broken_index(index, culprit, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=culprit):
        loader.open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    shard(tmp_path, {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, SHARDS[:2])
    tiny.write_safetensors(tmp_path / SHARDS[1], {"a": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=f"'a' is in both {SHARDS[0]} and {SHARDS[1]}"):
        loader.open_checkpoint(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ValueError, match="has no weights"):
        loader.open_checkpoint(tmp_path)


# --- .bin ---


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bin(dtype, zipped, tmp_path):
    loaded, tensors = model(GPT2)
    state = {
        "transformer." + name: torch.from_numpy(array).to(getattr(torch, dtype))
        for name, array in tensors.items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    got = load(tmp_path, loaded, check_nan=True)
    want = expected(loaded, {name: STORED[dtype](array) for name, array in tensors.items()})
    for slot, data in want:
        assert got[slot][1] == dtype
        np.testing.assert_array_equal(got[slot][0], data)


def test_safetensors_go_before_bin(tmp_path):
    tiny.write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(3, np.float32)})
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert list(loader.open_checkpoint(tmp_path)) == ["a"]


def test_bin_without_torch_says_what_to_install(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install nano-inference\[torch\]"):
        loader.open_checkpoint(tmp_path)


class Exploit:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_bin_runs_no_code(tmp_path, capsys):
    torch.save({"a": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="torch cannot read it"):
        loader.open_checkpoint(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_truncated_bin(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: torch cannot read it"):
        loader.open_checkpoint(tmp_path)


# --- tensors that do not fit the config ---


def test_all_differences_are_listed_at_once(tmp_path):
    loaded, tensors = model(LLAMA)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((7, 13), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(12, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    engine = Recorder()
    with pytest.raises(ValueError) as error:
        loader.load_weights(engine, tmp_path, loaded, progress=False)
    message = str(error.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.1.mlp.up_proj.weight [7, 13] instead of [7, 12]" in message
    assert "lm_head.weight (F64)" in message
    assert engine.loaded == {}


def test_long_lists_are_capped(tmp_path):
    loaded, tensors = model(LLAMA)
    names = list(tensors)
    tiny.write_safetensors(tmp_path / "model.safetensors", {names[0]: tensors[names[0]]})
    with pytest.raises(ValueError) as error:
        load(tmp_path, loaded)
    message = str(error.value)
    assert f"{len(names) - 1} missing" in message and message.endswith(", …")
    assert sum(name in message for name in names) == 10


def test_well_known_extras_are_no_error(tmp_path):
    loaded, tensors = model({**LLAMA, "tie_word_embeddings": True})
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    assert "lm_head.weight" not in load(tmp_path, loaded)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", STORED)
def test_nan_is_found_only_if_asked(dtype, bad, tmp_path):
    loaded, tensors = model(LLAMA)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][3, 4] = bad
    stored = {name: STORED[dtype](array) for name, array in tensors.items()}
    tiny.write_safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinite"):
        load(tmp_path, loaded, check_nan=True)
    assert len(load(tmp_path, loaded)) == len(loaded.weight_map)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "stored, loaded, largest, too_large",
    [
        ("float32", "float16", 65519.9, 65520.0),
        ("bfloat16", "float16", 65280.0, 65536.0),
        ("float32", "bfloat16", 3.396e38, 3.3962e38),
    ],
)
def test_numbers_that_rounding_makes_infinite(stored, loaded, largest, too_large, sign):
    for value, finite in ((largest, True), (too_large, False)):
        data = np.full((3, 2), sign * value, np.float32)
        rounded = torch.from_numpy(data).to(getattr(torch, loaded))
        assert bool(rounded.isfinite().all()) is finite
        assert loader.is_finite(STORED[stored](data), stored, loaded) is finite
        assert loader.is_finite(STORED[stored](data), stored)


@pytest.mark.parametrize("dtype", STORED)
def test_largest_numbers_are_finite(dtype):
    edge = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}[dtype]
    array = STORED[dtype](np.array([edge, -edge, 0.0, 1e-40], np.float32))
    assert loader.is_finite(array, dtype)


def test_progress_bar_counts_all_bytes(tmp_path, capsys):
    loaded, tensors = model(GPT2)
    tiny.write_safetensors(tmp_path / "model.safetensors", tensors)
    loader.load_weights(Recorder(), tmp_path, loaded, progress=True)
    shown = capsys.readouterr().err
    assert "Loading weights" in shown and "100%" in shown


# --- broken safetensors ---

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def entry(**changes):
    return {"w": {**ENTRY, **changes}}


@pytest.mark.parametrize(
    "header, data, culprit",
    [
        (entry(), bytes(23), "'w' ends at byte 24 of the data, the file has 23"),
        (entry(shape=[2, 4]), bytes(24), r"'w' of type F32 and shape \[2, 4\] needs 32 bytes"),
        (entry(data_offsets=[0, 20]), bytes(24), "needs 24 bytes, its data_offsets span 20"),
        (entry(data_offsets=[24, 0]), bytes(24), "'w' has the impossible data_offsets"),
        (entry(data_offsets=[-4, 20]), bytes(24), "'w' has the impossible data_offsets"),
        (entry(data_offsets=[0]), bytes(24), "'w' has the impossible data_offsets"),
        (entry(data_offsets=None), bytes(24), "'w' has the impossible data_offsets"),
        (entry(shape=[-2, -3]), bytes(24), "'w' has the impossible shape"),
        (entry(shape=[2.0, 3]), bytes(24), "'w' has the impossible shape"),
        (entry(dtype="F31"), bytes(24), "'w' has the unknown type 'F31'"),
        (entry(dtype=None), bytes(24), "'w' has the unknown type None"),
        ({"w": 7}, bytes(24), "'w' is not described"),
        (
            {"a": ENTRY, "b": {**ENTRY, "data_offsets": [20, 44]}},
            bytes(44),
            "tensors 'a' and 'b' overlap",
        ),
        ({"a": ENTRY, "b": ENTRY}, bytes(24), "tensors 'a' and 'b' overlap"),
        ([], b"", "not a JSON object"),
        (b'{"w": ', b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b'{"w": {}, "w": {}}', b"", "'w' comes twice"),
    ],
)
def test_broken_headers(header, data, culprit, tmp_path):
    file = tmp_path / "model.safetensors"
    tiny.write_raw_safetensors(file, header, data)
    with pytest.raises(ValueError, match=culprit) as error:
        loader.open_safetensors(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 1000])
def test_header_lying_about_its_length(length, tmp_path):
    file = tmp_path / "model.safetensors"
    tiny.write_raw_safetensors(file, entry(), bytes(24), header_len=length)
    with pytest.raises(ValueError, match=f"the header claims {length} bytes"):
        loader.open_safetensors(file)


def test_header_length_too_short(tmp_path):
    file = tmp_path / "model.safetensors"
    tiny.write_raw_safetensors(file, entry(), bytes(24), header_len=5)
    with pytest.raises(ValueError, match="not valid JSON"):
        loader.open_safetensors(file)


def test_every_truncation_is_noticed(tmp_path):
    _, tensors = model(GPT2)
    file = tmp_path / "model.safetensors"
    tiny.write_safetensors(file, tensors)
    whole = file.read_bytes()
    (header_len,) = struct.unpack("<Q", whole[:8])
    for size in [0, 1, 7, 8, 9, 8 + header_len - 1, 8 + header_len, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            loader.open_safetensors(file)


def test_empty_and_scalar_tensors(tmp_path):
    file = tmp_path / "model.safetensors"
    tiny.write_safetensors(
        file, {"none": np.zeros((0, 4), np.float32), "one": np.float32(3).reshape(())}
    )
    got = loader.open_safetensors(file)
    assert got["none"].read().shape == (0, 4)
    assert got["one"].read() == 3.0


def test_unaligned_data_is_read_right(tmp_path):
    file = tmp_path / "model.safetensors"
    want = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = json.dumps(entry()).encode()
    for padding in range(4):
        tiny.write_raw_safetensors(file, raw + b" " * padding, want.tobytes())
        got = loader.open_safetensors(file)["w"].read()
        np.testing.assert_array_equal(np.require(got, requirements=["A"]), want)
