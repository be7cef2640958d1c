"""What LLM and AsyncLLM are started with, and the memory plan that follows from it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from . import _core
from .bundled import DEFAULT
from .config import DTYPES, LoadedConfig
from .validation import (
    NamedFields,
    check_bool,
    check_choice,
    check_float,
    check_int,
    check_optional_str,
    refuse,
)

# vLLM's options that have one possible value here. Saying that value is fine.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((1,), "a model runs on one device"),
    "pipeline_parallel_size": ((1,), "a model runs on one device"),
    "data_parallel_size": ((1,), "a model runs on one device"),
    "distributed_executor_backend": ((None,), "a model runs on one device"),
    "disable_custom_all_reduce": ((False,), "a model runs on one device"),
    "trust_remote_code": ((False,), "code that comes with a model is never run"),
    "quantization": ((None,), "quantized weights are not available"),
    "swap_space": ((4, 4.0, 0, 0.0), "a preempted sequence is computed again, never swapped out"),
    "cpu_offload_gb": ((0, 0.0), "all weights stay in the device's memory"),
    "tokenizer_mode": (("auto",), "tokenizer.json is what is read"),
    "tokenizer_revision": ((None,), "revision is the tokenizer's, too"),
    "config_format": (("auto", "hf"), "config.json is what is read"),
    "load_format": (("auto",), "safetensors are read if there are any, else .bin files"),
    "generation_config": (("auto",), "it is read from the model's folder"),
    "hf_overrides": ((None, {}), "config.json is taken as it is"),
    "speculative_config": ((None,), "there is no speculative decoding"),
    "enable_lora": ((False,), "adapters are not available"),
    "disable_sliding_window": ((False,), "a model's sliding windows are always used"),
}


@dataclass(slots=True)
class EngineArgs(metaclass=NamedFields):
    """Start-up options; names and meanings are vLLM's. An unknown one, or an impossible value, is a
    ValueError that names it."""

    FIXED: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = _FIXED

    model: str = DEFAULT
    """A folder with config.json, weights and tokenizer.json, a name on the Hugging Face hub, or a
    bundled model."""
    tokenizer: str | None = None
    """Folder or hub name of another tokenizer."""
    skip_tokenizer_init: bool = False
    """No tokenizer: prompts are token ids, `text` stays empty."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    download_dir: str | None = None
    """Where downloads go instead of the hub's cache."""
    hf_token: str | bool | None = None
    """Access token for the hub; None: HF_TOKEN or the one stored by `hf auth login`."""
    dtype: str = "auto"
    """Of the weights: auto (as the checkpoint says; on CUDA bfloat16 for float32), float32 (CPU
    only), bfloat16, float16."""
    kv_cache_dtype: str = "auto"
    """Of the cache: auto (as the weights), float32, bfloat16, float16, fp8 or fp8_e4m3. On CUDA
    auto, the weights' own type, or fp8; on the CPU no fp8."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: what the model's config says."""
    block_size: int = 16
    """Tokens in a block of the paged cache; on CUDA a multiple of 16."""
    num_blocks: int | None = None
    """Size of the cache in blocks; None: see kv_cache_memory_bytes."""
    num_gpu_blocks_override: int | None = None
    """vLLM's name for num_blocks."""
    kv_cache_memory_bytes: int | None = None
    """Size of the cache in bytes; None: see gpu_memory_utilization."""
    gpu_memory_utilization: float | None = None
    """On CUDA the share of the card's memory that weights, activations, cache and whatever else is
    on the card may take together (None: 0.9); on the CPU the share of the memory left free by
    weights and activations that the cache may take (None: 0.5). The cache takes no more than
    max_num_seqs sequences of max_model_len tokens need. Not together with num_blocks or
    kv_cache_memory_bytes, which say how large the cache is."""
    paged: bool = True
    """False: one contiguous reservation of max_model_len tokens a sequence, for comparison."""
    enable_prefix_caching: bool = True
    """Keep the cache of finished requests for prompts that begin alike."""
    enable_chunked_prefill: bool = True
    """Cut long prompts into pieces that run beside decoding; False: a prompt is one piece."""
    static_batching: bool = False
    """Start a batch only when the one before has ended, for comparison."""
    scheduling_policy: str = "fcfs"
    """fcfs, or priority (smaller numbers first)."""
    max_num_seqs: int | None = None
    """Most sequences in a step; None: 256 on CUDA, 128 on the CPU, or max_num_batched_tokens if
    that is less. Arithmetic bounds a step of so many rows on a CPU: with more, all would only be
    slower."""
    max_num_batched_tokens: int | None = None
    """Most tokens in a step; None: 8192 on CUDA, 128 on the CPU, at least max_num_seqs, and
    max_model_len without chunked prefill. On a CPU, more would hardly be faster, and hold up
    running requests for longer."""
    max_waiting: int | None = None
    """Most requests in the queue; 0: any number; None: 1024 in AsyncLLM, any number in LLM."""
    max_logprobs: int = 20
    """Largest logprobs and prompt_logprobs of a request; -1: the whole vocabulary. Memory for the
    results is taken at the start: with very many, prompt_logprobs are computed in shorter chunks
    than other prompts, and max_num_seqs decides (8 bytes for each token that may be wanted)."""
    seed: int | None = 0
    """Starts the generator of seeds for requests that have none; None: another one each time."""
    device: str = "auto"
    """cpu, cuda (the first card), cuda:N, or auto: cuda if there is a card that can be used."""
    num_threads: int | None = None
    """CPU threads; None: all that this process may use."""
    isa: str | None = None
    """CPU instruction set (see `nano-inference info`); None: the best one."""
    batch_invariant: bool | None = None
    """A request's result is the same bytes whatever runs beside it; None: True. False, on CUDA
    only, leaves the matrix products free to sum in the order that is fastest for a batch."""
    enforce_eager: bool = False
    """CUDA: launch every kernel of every step, without CUDA graphs."""
    cudagraph_capture_sizes: list[int] | None = None
    """CUDA: numbers of sequences for which a step of decoding is captured as a graph; None: 1, 2,
    4, 8 to 256 in eights, then in steps of 32, up to and with max_num_seqs."""
    async_scheduling: bool | None = None
    """Launch a step before the tokens of the one before have arrived; None: only on CUDA."""
    check_weights: bool = False
    """Refuse weights that are NaN or infinite (reads everything once more)."""
    use_tqdm_on_load: bool = True
    """A progress bar while weights load."""
    disable_log_stats: bool = True
    """False: log throughput and cache use every ten seconds of work."""
    trace_capacity: int = 1024
    """Steps that the trace keeps; 0: none."""
    check_invariants: bool = False
    """Check the engine's bookkeeping after every step (for tests)."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            if not hasattr(self.model, "__fspath__"):
                refuse("model", self.model, "a folder or a name on the hub")
            self.model = str(self.model)
        self._check_types()
        self._check_sizes()
        self._check_choices()
        self._check_device()

    @property
    def target(self) -> Target:
        """The device that runs the model."""
        return find_device(self.device)

    def _check_types(self) -> None:
        for name in _BOOLS:
            check_bool(name, getattr(self, name))
        for name in ("batch_invariant", "async_scheduling"):
            if getattr(self, name) is not None:
                check_bool(name, getattr(self, name))
        if hasattr(self.download_dir, "__fspath__"):
            self.download_dir = str(self.download_dir)
        for name in ("tokenizer", "revision", "download_dir", "isa"):
            check_optional_str(name, getattr(self, name))
        if self.hf_token is not None and not isinstance(self.hf_token, (str, bool)):
            refuse("hf_token", type(self.hf_token).__name__, "a string, True, False or None")

    def _check_sizes(self) -> None:
        for name in _COUNTS:
            if (value := getattr(self, name)) is not None:
                check_int(name, value, 1, _LARGEST.get(name))
        check_int("block_size", self.block_size, 1)
        check_int("max_logprobs", self.max_logprobs, -1)
        check_int("trace_capacity", self.trace_capacity, 0)
        if self.max_waiting is not None:
            check_int("max_waiting", self.max_waiting, 0)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.gpu_memory_utilization is not None:
            check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        if self.cudagraph_capture_sizes is not None:
            check_graph_sizes(self.cudagraph_capture_sizes)
        self._check_cache_size()
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise ValueError(
                f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs}): "
                "each running sequence needs a token a step"
            )

    def _check_cache_size(self) -> None:
        override = self.num_gpu_blocks_override
        if override is not None and self.num_blocks not in (None, override):
            raise ValueError("num_gpu_blocks_override is another name for num_blocks: give one")
        blocks = "num_blocks" if override is None else "num_gpu_blocks_override"
        names = (blocks, "kv_cache_memory_bytes", "gpu_memory_utilization")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both size the cache: give one")
        if override is not None:
            self.num_blocks = override

    def _check_choices(self) -> None:
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", *DTYPES, *FP8))
        check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))

    def _check_device(self) -> None:
        """What one kind of device has and the other has not."""
        target = self.target
        chosen = "" if self.device == target.kind else f" (device={self.device!r})"
        refused = _NOT_ON_CUDA if target.is_cuda else _NOT_ON_CPU
        for name, (is_refused, why) in refused.items():
            if is_refused(value := getattr(self, name)):
                shown = f"{name}={value!r}"
                raise ValueError(f"{shown} is not possible on {target.kind}{chosen}: {why}")
        if self.enforce_eager and self.cudagraph_capture_sizes is not None:
            raise ValueError(
                "cudagraph_capture_sizes has no effect with enforce_eager=True: give one"
            )

    def engine_config(self, loaded: LoadedConfig) -> _core.EngineConfig:
        """All but the size of the cache (num_blocks = 1)."""
        target = self.target
        defaults = _CUDA_SIZES if target.is_cuda else _CPU_SIZES
        tokens = self.max_num_batched_tokens
        if tokens is None:
            whole_prompt = 0 if self.enable_chunked_prefill else loaded.max_model_len
            tokens = max(defaults.tokens, whole_prompt, self.max_num_seqs or 0)
        elif not self.enable_chunked_prefill and tokens < loaded.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens ({tokens}) must be at least max_model_len "
                f"({loaded.max_model_len}) with enable_chunked_prefill=False"
            )
        seqs = self.max_num_seqs or min(defaults.seqs, tokens)
        vocab_size = loaded.model_config.vocab_size
        all_logprobs = self.max_logprobs == -1
        config = _core.EngineConfig(
            device=target.kind,
            isa=self.isa or "",
            num_threads=self.num_threads or 0,
            dtype=loaded.dtype,
            kv_cache_dtype=self._kv_dtype(loaded, target),
            block_size=self.block_size,
            num_blocks=1,
            paged=self.paged,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_chunked_prefill=self.enable_chunked_prefill,
            static_batching=self.static_batching,
            policy=self.scheduling_policy,
            max_model_len=loaded.max_model_len,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_waiting=self.max_waiting or 0,
            max_logprobs=vocab_size if all_logprobs else min(self.max_logprobs, vocab_size),
            eos_token_ids=loaded.generation.eos_token_ids,
            trace_capacity=self.trace_capacity,
            check_invariants=self.check_invariants,
            overlap=target.is_cuda if self.async_scheduling is None else self.async_scheduling,
        )
        if target.is_cuda:
            config.device_index = target.index
            config.batch_invariant = self.batch_invariant is not False
            config.graph_sizes = self._graph_sizes(seqs)
            config.plan_cache = plan_cache()
        return config

    def _kv_dtype(self, loaded: LoadedConfig, target: Target) -> str:
        if self.kv_cache_dtype == "auto":
            return loaded.dtype
        if self.kv_cache_dtype in FP8:
            return "fp8_e4m3"
        kv_dtype = DTYPES[self.kv_cache_dtype]
        if target.is_cuda and kv_dtype != loaded.dtype:
            raise ValueError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not possible with dtype "
                f"{loaded.dtype} on cuda, only 'auto', {loaded.dtype!r} or 'fp8' is"
            )
        return kv_dtype

    def _graph_sizes(self, seqs: int) -> list[int]:
        if self.enforce_eager:
            return []
        if self.cudagraph_capture_sizes is None:
            return default_graph_sizes(seqs)
        sizes = sorted(set(self.cudagraph_capture_sizes))
        if sizes[-1] > seqs:
            raise ValueError(
                f"cudagraph_capture_sizes has {sizes[-1]}, but a step has at most max_num_seqs "
                f"({seqs}) sequences"
            )
        return sizes


FP8 = ("fp8", "fp8_e4m3")


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What max_num_seqs and max_num_batched_tokens are where nobody says."""

    seqs: int
    tokens: int


_CPU_SIZES = _Sizes(128, 128)
_CUDA_SIZES = _Sizes(256, 8192)

# Values that a device cannot honour, and why.
_Refusals = dict[str, tuple[Callable[[Any], bool], str]]
_NOT_ON_CPU: _Refusals = {
    "kv_cache_dtype": (lambda v: v in FP8, "only CUDA has caches of this type"),
    "batch_invariant": (lambda v: v is False, "the CPU always is"),
    "enforce_eager": (lambda v: v, "it is about CUDA graphs, which the CPU has not"),
    "cudagraph_capture_sizes": (lambda v: v is not None, "the CPU has no CUDA graphs"),
}
_NOT_ON_CUDA: _Refusals = {
    "dtype": (lambda v: DTYPES.get(v) == "float32", "its types are 'bfloat16' and 'float16'"),
    "kv_cache_dtype": (
        lambda v: DTYPES.get(v) == "float32",
        "it is 'auto', the type of the weights, or 'fp8'",
    ),
    "block_size": (lambda v: v % 16 != 0, "it must be a multiple of 16"),
    "num_threads": (lambda v: v is not None, "it is about the CPU; say device='cpu' to use that"),
    "isa": (lambda v: v is not None, "it is about the CPU; say device='cpu' to use that"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A device that can be used."""

    kind: str
    """cpu or cuda."""
    index: int = 0
    """Which card."""

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"


def find_device(name: Any) -> Target:
    """What auto, cpu, cuda or cuda:N means here. ValueError, saying why, if it cannot be used."""
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", name) if isinstance(name, str) else None
    if match is None and name not in ("auto", "cpu"):
        refuse("device", name, "'auto', 'cpu', 'cuda', or 'cuda:N' with the number N of a card")
    if name == "cpu":
        return Target("cpu")
    cards = _core.cuda_devices()
    if match is None:
        return Target("cuda" if cards else "cpu")
    if not cards:
        raise ValueError(f"device={name!r} cannot be used: {_core.cuda_error()}")
    index = int(match[1] or 0)
    if index >= len(cards):
        refuse("device", name, f"a card that is here: cuda:0 to cuda:{len(cards) - 1}")
    return Target("cuda", index)


def check_graph_sizes(sizes: Any) -> None:
    if not isinstance(sizes, (list, tuple)) or not sizes:
        refuse("cudagraph_capture_sizes", sizes, "a list of at least one integer, or None")
    for size in sizes:
        check_int("cudagraph_capture_sizes", size, 1, also=" (each of the list)")


def default_graph_sizes(max_num_seqs: int) -> list[int]:
    """Dense where padding to the next size would cost most."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 1, 32)]
    return sorted({*(size for size in sizes if size < max_num_seqs), max_num_seqs})


def plan_cache() -> str:
    """The file that keeps the timed plans of matrix products, in NANO_INFERENCE_CACHE (a folder) or
    the user's cache. A folder that cannot be had costs the timing at each start, no more."""
    folder = os.environ.get("NANO_INFERENCE_CACHE")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(base, "nano_inference")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, "gemm_plans.txt")


_BOOLS = (
    "skip_tokenizer_init",
    "paged",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "static_batching",
    "check_weights",
    "use_tqdm_on_load",
    "disable_log_stats",
    "check_invariants",
    "enforce_eager",
)
_COUNTS = (
    "max_model_len",
    "num_blocks",
    "num_gpu_blocks_override",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_threads",
)
_LARGEST = {"kv_cache_memory_bytes": 2**62, "num_threads": 1024}  # others: 32 bits


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that the engine will take, known before a weight is read."""

    weights: int
    activations: int
    kv_block: int
    """One block: keys and values of all layers."""
    block_size: int
    """Tokens in a block."""
    num_blocks: int
    available: int
    """Memory of the device that is free now."""

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.kv_block

    @property
    def num_tokens(self) -> int:
        """Tokens that fit into the cache."""
        return self.num_blocks * self.block_size


def plan_engine(args: EngineArgs, loaded: LoadedConfig) -> tuple[_core.EngineConfig, MemoryPlan]:
    """Sizes the cache. MemoryError, with the numbers, if the model does not fit; ValueError if the
    cache cannot hold one sequence of max_model_len tokens. On CUDA the config may leave the size
    open (num_blocks = 0): the engine decides when all else is in the card's memory, and the plan
    holds what is expected."""
    config = args.engine_config(loaded)
    sizes = _core.Engine.plan_memory(config, loaded.model_config)
    given = _given_blocks(args, sizes["kv_block"])
    if given is not None:
        blocks = _check_blocks(given, loaded, sizes)
        config.num_blocks = blocks
    elif args.target.is_cuda:
        config.memory_fraction = _share(args)
        config.num_blocks = 0
        blocks = _expected_blocks(config, sizes)
    else:
        wanted = _shared_blocks(args, config, sizes)
        blocks = config.num_blocks = _check_blocks(wanted, loaded, sizes)
    plan = MemoryPlan(
        weights=sizes["weights"],
        activations=sizes["activations"],
        kv_block=sizes["kv_block"],
        block_size=sizes["block_size"],
        num_blocks=blocks,
        available=sizes["memory_available"],
    )
    return config, plan


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A size of the cache, and what it comes from."""

    blocks: int
    least: int
    """Blocks without which the model is said not to fit."""
    why: str


def _given_blocks(args: EngineArgs, block: int) -> _Wanted | None:
    """What num_blocks or kv_cache_memory_bytes say."""
    if args.num_blocks is not None:
        alias = args.num_gpu_blocks_override is not None
        name = "num_gpu_blocks_override" if alias else "num_blocks"
        return _Wanted(args.num_blocks, args.num_blocks, f"{name}={args.num_blocks} gives")
    if args.kv_cache_memory_bytes is not None:
        blocks = args.kv_cache_memory_bytes // block
        why = f"kv_cache_memory_bytes={args.kv_cache_memory_bytes} gives"
        return _Wanted(blocks, max(1, blocks), why)
    return None


def _share(args: EngineArgs) -> float:
    if args.gpu_memory_utilization is not None:
        return float(args.gpu_memory_utilization)
    return 0.9 if args.target.is_cuda else 0.5


def _longest(max_model_len: int, sizes: dict[str, int]) -> int:
    """Blocks of the longest sequence."""
    return -(-max_model_len // sizes["block_size"])


def _shared_blocks(args: EngineArgs, config: _core.EngineConfig, sizes: dict[str, int]) -> _Wanted:
    """CPU: a share of what weights and activations leave."""
    room = sizes["memory_available"] - sizes["weights"] - sizes["activations"]
    blocks = int(max(0, room) * _share(args)) // sizes["kv_block"]
    most = config.max_num_seqs * _longest(config.max_model_len, sizes)
    why = (
        f"gpu_memory_utilization={_share(args):g} of the {gigabytes(room)} "
        "that weights and activations leave gives"
    )
    return _Wanted(min(most, blocks), 1, why)


def _check_blocks(wanted: _Wanted, loaded: LoadedConfig, sizes: dict[str, int]) -> int:
    available, slots = sizes["memory_available"], sizes["block_size"]
    room = available - sizes["weights"] - sizes["activations"]
    if (least := wanted.least * sizes["kv_block"]) > room:
        raise MemoryError(f"{_needs(sizes, least)} > {gigabytes(available)} available")
    if wanted.blocks < _longest(loaded.max_model_len, sizes):
        fits = f"; max_model_len={wanted.blocks * slots} would fit" if wanted.blocks else ""
        raise ValueError(
            f"the KV cache is too small for max_model_len={loaded.max_model_len}: {wanted.why} "
            f"{wanted.blocks * slots} tokens{fits}"
        )
    return wanted.blocks


def _expected_blocks(config: _core.EngineConfig, sizes: dict[str, int]) -> int:
    """CUDA: the card's share, less what is on the card already, weights and activations."""
    total, available = sizes["memory_total"], sizes["memory_available"]
    share = int(config.memory_fraction * total)
    usable = share - (total - available)
    room = usable - sizes["weights"] - sizes["activations"]
    block, longest = sizes["kv_block"], _longest(config.max_model_len, sizes)
    if longest * block > room:
        # Here the guess is to be too small rather than too large; to refuse, it is not.
        spare = max(0, room - sizes["reserve"])
        slots = sizes["block_size"] if config.paged else 16  # unpaged, a block is a sequence
        tokens = spare * sizes["block_size"] // block // slots * slots
        hint = f"max_model_len={tokens} would fit" if tokens else "take a smaller model"
        raise MemoryError(
            f"{_needs(sizes, longest * block)} (one sequence of max_model_len="
            f"{config.max_model_len} tokens) > {gigabytes(max(0, usable))}: "
            f"gpu_memory_utilization={config.memory_fraction:g} of the card's {gigabytes(total)} "
            f"is {gigabytes(share)}, and {gigabytes(total - available)} are in use; {hint}"
        )
    return min(config.max_num_seqs * longest, room // block)


def _needs(sizes: dict[str, int], cache: int) -> str:
    return (
        f"the model does not fit into memory: weights {gigabytes(sizes['weights'])} + activations "
        f"{gigabytes(sizes['activations'])} + KV cache of at least {gigabytes(cache)}"
    )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
