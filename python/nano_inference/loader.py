"""Checkpoints: safetensors by their own header, mapped and never copied; .bin through torch.

All that can be wrong with a checkpoint is found before the first weight is loaded, except NaN.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from . import _core
    from .config import LoadedConfig
    from .models import WeightSource

Array = npt.NDArray[Any]

# safetensors' name -> the engine's name and numpy's type; bf16 is read as its bits.
STORED: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
}
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16,
    "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4,
}  # fmt: skip
MAX_HEADER = 100 << 20
CUDA_THREADS = 8  # to read with; one alone cannot feed a card
# Buffers that old checkpoints carry and nobody needs.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
# Scales of a quantized KV cache, as different tools name them.
KV_SCALE = re.compile(r"(\.(k|v|kv)_scale|\.(k|v)_proj\.output_scale)$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; `read` gives a view of the file (bf16 as uint16 bits)."""

    shape: tuple[int, ...]
    dtype: str  # the engine's name, or the file's if the engine cannot read it
    nbytes: int
    read: Callable[[], Array]


Checkpoint = dict[str, StoredTensor]


def load_weights(
    engine: _core.Engine,
    path: Path,
    loaded: LoadedConfig,
    *,
    check_nan: bool = False,
    progress: bool = True,
    threads: int = 1,
) -> int:
    """Fills every weight slot of the engine; finish_loading is the caller's. ValueError lists all
    that is wrong with the checkpoint, before anything is loaded. Returns the bytes read.

    threads: more than one only where the engine lets several load at once (CUDA); the first error
    ends the loading."""
    from tqdm.auto import tqdm

    checkpoint = _without_prefix(open_checkpoint(Path(path)), loaded.name_prefix)
    check_tensors(checkpoint, loaded.weight_map)
    parts = Counter(source.name for source in loaded.weight_map)
    total = sum(checkpoint[name].nbytes for name in parts)
    # No closure: a traceback would hold it, and the engine with it, for good (engine.py).
    load = partial(_load, engine, checkpoint, parts, loaded.dtype if check_nan else None)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress
    ) as bar:
        for nbytes in _each(load, loaded.weight_map, checkpoint, threads):
            bar.update(nbytes)
    return total


def _load(
    engine: _core.Engine,
    checkpoint: Checkpoint,
    parts: Counter[str],
    finite_as: str | None,
    source: WeightSource,
) -> int:
    """Fills one slot. finite_as: the type in which the values must be finite."""
    tensor = checkpoint[source.name]
    data = tensor.read()
    if finite_as is not None and not is_finite(data, tensor.dtype, finite_as):
        raise ValueError(f"tensor '{source.name}' holds NaN or infinite values (as {finite_as})")
    try:
        engine.load_weight(source.slot, slot_view(data, source), tensor.dtype)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"tensor '{source.name}': {error}") from error
    return tensor.nbytes // parts[source.name]


def _each(
    load: Callable[[WeightSource], int],
    weight_map: list[WeightSource],
    checkpoint: Checkpoint,
    threads: int,
) -> Iterator[int]:
    """What `load` returns for each weight, in any order."""
    if threads == 1:
        yield from map(load, weight_map)
        return
    # Largest first: a large one begun last would keep all others waiting.
    order = sorted(weight_map, key=lambda source: -checkpoint[source.name].nbytes)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="load")
    try:
        for done in as_completed([pool.submit(load, source) for source in order]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def slot_view(data: Array, source: WeightSource) -> Array:
    """The part of a stored tensor that one slot holds, C-contiguous."""
    if source.transpose:
        data = data.T
    if source.rows is not None:
        data = data[source.rows[0] : source.rows[1]]
    return np.require(data, requirements=["C", "A"])  # copies only what is transposed or unaligned


# The least numbers that rounding makes infinite.
TOO_LARGE = {"float32": math.inf, "bfloat16": float.fromhex("0x1.FFp127"), "float16": 65520.0}


def is_finite(data: Array, dtype: str, loaded_dtype: str = "float32") -> bool:
    """No NaN, no infinity, in the file or after rounding to loaded_dtype."""
    rows = data.reshape(-1)
    limit = TOO_LARGE[loaded_dtype]
    # Without its sign, a bf16 is ordered as its bits are; NaN is above infinity.
    limit_bits = 0x4780 if loaded_dtype == "float16" else 0x7F80  # 65536, infinity
    for begin in range(0, rows.size, 1 << 22):  # bounds the temporary
        part = rows[begin : begin + (1 << 22)]
        if dtype == "bfloat16":
            if ((part & 0x7FFF) >= limit_bits).any():
                return False
        elif not (np.abs(part, dtype=np.float32) < limit).all():  # false for NaN
            return False
    return True


def check_tensors(checkpoint: Checkpoint, weight_map: list[WeightSource]) -> None:
    """Compares the checkpoint with what the family needs; one ValueError lists every difference."""
    wanted = {source.name: source.shape for source in weight_map}
    known = {*wanted, "lm_head.weight"}  # some store it although it is tied; the embedding is used
    missing = [name for name in wanted if name not in checkpoint]
    others = [name for name in checkpoint if name not in known and not IGNORED.search(name)]
    scales = [name for name in others if KV_SCALE.search(name)]
    unexpected = [name for name in others if not KV_SCALE.search(name)]
    shapes, dtypes = [], []
    for name, shape in wanted.items():
        tensor = checkpoint.get(name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            shapes.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        if tensor.dtype not in ("float32", "bfloat16", "float16"):
            dtypes.append(f"{name} ({tensor.dtype})")
    problems = [
        f"{len(found)} {what}: {_first_ten(found)}"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("scales of an fp8 KV cache, which cannot be taken from a checkpoint yet", scales),
            ("wrongly shaped", shapes),
            ("of a type other than float32, bfloat16, float16", dtypes),
        )
        if found
    ]
    if problems:
        raise ValueError("the checkpoint does not fit its config; tensors " + "; ".join(problems))


def _first_ten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _without_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    return {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()}


# --- files ---


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's files: safetensors if there are any, else .bin; shards by their index."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            return _shards(index)
        if (path / stem).is_file():
            return [path / stem]
    raise ValueError(f"{path} has no weights (looked for model.safetensors and pytorch_model.bin)")


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_index_map(index).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: '{outside[0]}' is not a plain file name")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {len(missing)} weight files: {_first_ten(missing)}")
    return [index.parent / name for name in names]


def _index_map(index: Path) -> dict[str, str]:
    from .config import read_json

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no 'weight_map' from tensors to files")
    if not weight_map:
        raise ValueError(f"{index}: 'weight_map' is empty")
    return weight_map


def open_checkpoint(path: Path) -> Checkpoint:
    """Every tensor of the model folder, unread."""
    checkpoint: Checkpoint = {}
    origin: dict[str, str] = {}
    for file in weight_files(path):
        opened = open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
        for name, tensor in opened.items():
            if name in checkpoint:
                raise ValueError(f"tensor '{name}' is in both {origin[name]} and {file.name}")
            checkpoint[name], origin[name] = tensor, file.name
    return checkpoint


def checkpoint_bytes(path: Path) -> int:
    """Size of the weight files."""
    return sum(file.stat().st_size for file in weight_files(Path(path)))


def stored_dtype(path: Path) -> str | None:
    """The type most bytes of a safetensors checkpoint have; None if there is no such checkpoint."""
    try:
        files = weight_files(path)
    except ValueError:
        return None
    sizes: Counter[str] = Counter()
    for file in files:
        if file.suffix == ".safetensors":
            for tensor in open_safetensors(file).values():
                sizes[tensor.dtype] += tensor.nbytes
    known = {name for name, _ in STORED.values()}
    return next((name for name, _ in sizes.most_common() if name in known), None)


# --- safetensors: u64 header length, JSON header, data ---


def open_safetensors(file: Path) -> Checkpoint:
    """Maps the file and checks its header against its size. Tensors are views of the mapping."""
    size = file.stat().st_size
    if size < 8:
        raise ValueError(
            f"{file}: truncated, a safetensors file has at least 8 bytes, this one {size}"
        )
    with open(file, "rb") as handle:
        mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    header_len = int.from_bytes(mapping[:8], "little")
    if header_len > min(size - 8, MAX_HEADER):
        raise ValueError(f"{file}: the header claims {header_len} bytes, the file has {size}")
    header = _parse_header(file, mapping[8 : 8 + header_len])
    begin = 8 + header_len
    data_size = size - begin
    checkpoint: Checkpoint = {}
    spans = []
    for name, entry in header.items():
        shape, kind, (first, last) = _check_entry(file, name, entry, data_size)
        spans.append((first, last, name))
        checkpoint[name] = _mapped(mapping, begin + first, last - first, shape, kind)
    spans.sort()
    for (_, last, name), (first, _, next_name) in zip(spans, spans[1:], strict=False):
        if first < last:
            raise ValueError(f"{file}: tensors '{name}' and '{next_name}' overlap")
    return checkpoint


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise ValueError(f"{file}: '{name}' comes twice in the header")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _check_entry(
    file: Path, name: str, entry: Any, data_size: int
) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    where = f"{file}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not described by a JSON object")
    kind: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in ITEM_BITS:
        raise ValueError(f"{where} has the unknown type {kind!r}")
    if not natural(shape):
        raise ValueError(f"{where} has the impossible shape {shape!r}")
    if not natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has the impossible data_offsets {offsets!r}")
    if offsets[1] > data_size:
        raise ValueError(
            f"{where} ends at byte {offsets[1]} of the data, the file has {data_size}: truncated?"
        )
    expected = (math.prod(shape) * ITEM_BITS[kind] + 7) // 8
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"{where} of type {kind} and shape {shape} needs {expected} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}"
        )
    return tuple(shape), kind, (offsets[0], offsets[1])


def _mapped(
    mapping: mmap.mmap, offset: int, nbytes: int, shape: tuple[int, ...], kind: str
) -> StoredTensor:
    if kind not in STORED:
        return StoredTensor(shape, kind, nbytes, lambda: np.empty(0))  # check_tensors refuses it
    dtype, stored = STORED[kind]

    def read() -> Array:
        count = nbytes // stored.itemsize
        flat: Array = np.frombuffer(mapping, dtype=stored, count=count, offset=offset)
        return flat.reshape(shape)

    return StoredTensor(shape, dtype, nbytes, read)


# --- .bin: pickles of torch ---


def _open_bin(file: Path) -> Checkpoint:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{file}: reading .bin checkpoints needs torch: pip install nano-inference[torch]"
        ) from None
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # torch raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file}: torch cannot read it: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file} does not hold tensors by name")
    return dict(_torch_tensors(state))


def _torch_tensors(state: dict[str, Any]) -> Iterator[tuple[str, StoredTensor]]:
    import torch

    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")

        def read(tensor: Any = tensor, dtype: str = dtype) -> Array:
            if dtype == "bfloat16":
                return np.asarray(tensor.contiguous().view(torch.int16).numpy()).view(np.uint16)
            return np.asarray(tensor.numpy())

        nbytes = tensor.numel() * tensor.element_size()
        yield name, StoredTensor(tuple(tensor.shape), dtype, nbytes, read)
