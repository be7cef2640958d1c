"""What LLM and AsyncLLM are started with, and the memory plan that follows from it."""

from __future__ import annotations

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
    # Both: it chooses between graphs and none, and the CPU has no graphs.
    "enforce_eager": ((True, False), "it says whether to use graphs, which the CPU has not"),
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
    """Of the weights: auto (as the checkpoint says), float32, bfloat16, float16."""
    kv_cache_dtype: str = "auto"
    """Of the cache: auto (as the weights), float32, bfloat16, float16."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: what the model's config says."""
    block_size: int = 16
    """Tokens in a block of the paged cache."""
    num_blocks: int | None = None
    """Size of the cache in blocks; None: see kv_cache_memory_bytes."""
    num_gpu_blocks_override: int | None = None
    """vLLM's name for num_blocks."""
    kv_cache_memory_bytes: int | None = None
    """Size of the cache in bytes; None: see gpu_memory_utilization."""
    gpu_memory_utilization: float = 0.5
    """Share of the memory left free by weights and activations that the cache may take. It takes no
    more than max_num_seqs sequences of max_model_len tokens need."""
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
    """Most sequences in a step; None: 128, or max_num_batched_tokens if that is less. Arithmetic
    bounds a step of so many rows on a CPU: with more, all would only be slower."""
    max_num_batched_tokens: int | None = None
    """Most tokens in a step; None: 128, at least max_num_seqs, and max_model_len without chunked
    prefill. On a CPU, more would hardly be faster, and hold up running requests for longer."""
    max_waiting: int | None = None
    """Most requests in the queue; 0: any number; None: 1024 in AsyncLLM, any number in LLM."""
    max_logprobs: int = 20
    """Largest logprobs and prompt_logprobs of a request; -1: the whole vocabulary."""
    seed: int | None = 0
    """Starts the generator of seeds for requests that have none; None: another one each time."""
    device: str = "auto"
    """cpu, or auto."""
    num_threads: int | None = None
    """CPU threads; None: all that this process may use."""
    isa: str | None = None
    """CPU instruction set (see `nano-inference info`); None: the best one."""
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

    def _check_types(self) -> None:
        for name in _BOOLS:
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
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        if self.num_gpu_blocks_override is not None:
            if self.num_blocks not in (None, self.num_gpu_blocks_override):
                raise ValueError("num_gpu_blocks_override is another name for num_blocks: give one")
            self.num_blocks = self.num_gpu_blocks_override
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("num_blocks and kv_cache_memory_bytes both size the cache: give one")
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise ValueError(
                f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs}): "
                "each running sequence needs a token a step"
            )

    def _check_choices(self) -> None:
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", *DTYPES))
        check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        check_choice("device", self.device, ("auto", "cpu"))

    def engine_config(self, loaded: LoadedConfig) -> _core.EngineConfig:
        """All but the size of the cache (num_blocks = 1)."""
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = max(128, 0 if self.enable_chunked_prefill else loaded.max_model_len)
            tokens = max(tokens, self.max_num_seqs or 0)
        elif not self.enable_chunked_prefill and tokens < loaded.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens ({tokens}) must be at least max_model_len "
                f"({loaded.max_model_len}) with enable_chunked_prefill=False"
            )
        vocab_size = loaded.model_config.vocab_size
        kv_dtype = loaded.dtype if self.kv_cache_dtype == "auto" else DTYPES[self.kv_cache_dtype]
        return _core.EngineConfig(
            device="cpu" if self.device == "auto" else self.device,
            isa=self.isa or "",
            num_threads=self.num_threads or 0,
            dtype=loaded.dtype,
            kv_cache_dtype=kv_dtype,
            block_size=self.block_size,
            num_blocks=1,
            paged=self.paged,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_chunked_prefill=self.enable_chunked_prefill,
            static_batching=self.static_batching,
            policy=self.scheduling_policy,
            max_model_len=loaded.max_model_len,
            max_num_seqs=self.max_num_seqs or min(128, tokens),
            max_num_batched_tokens=tokens,
            max_waiting=self.max_waiting or 0,
            max_logprobs=vocab_size if self.max_logprobs == -1 else self.max_logprobs,
            eos_token_ids=loaded.generation.eos_token_ids,
            trace_capacity=self.trace_capacity,
            check_invariants=self.check_invariants,
        )


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
    cache cannot hold one sequence of max_model_len tokens."""
    config = args.engine_config(loaded)
    sizes = _core.Engine.plan_memory(config, loaded.model_config)
    weights, activations, block = sizes["weights"], sizes["activations"], sizes["kv_block"]
    available, slots = sizes["memory_available"], sizes["block_size"]
    room = available - weights - activations
    longest = -(-loaded.max_model_len // slots)  # blocks of the longest sequence
    least = 1
    if args.num_blocks is not None:
        blocks = least = args.num_blocks
        alias = args.num_gpu_blocks_override is not None
        why = f"{'num_gpu_blocks_override' if alias else 'num_blocks'}={blocks} gives"
    elif args.kv_cache_memory_bytes is not None:
        blocks = args.kv_cache_memory_bytes // block
        least = max(1, blocks)
        why = f"kv_cache_memory_bytes={args.kv_cache_memory_bytes} gives"
    else:
        share = int(max(0, room) * args.gpu_memory_utilization)
        blocks = min(config.max_num_seqs * longest, share // block)
        why = (
            f"gpu_memory_utilization={args.gpu_memory_utilization:g} of the {gigabytes(room)} "
            "that weights and activations leave gives"
        )
    if least * block > room:
        raise MemoryError(
            f"the model does not fit into memory: weights {gigabytes(weights)} + activations "
            f"{gigabytes(activations)} + KV cache of at least {gigabytes(least * block)} > "
            f"{gigabytes(available)} available"
        )
    if blocks < longest:
        fits = f"; max_model_len={blocks * slots} would fit" if blocks else ""
        raise ValueError(
            f"the KV cache is too small for max_model_len={loaded.max_model_len}: {why} "
            f"{blocks * slots} tokens{fits}"
        )
    config.num_blocks = blocks
    return config, MemoryPlan(weights, activations, block, slots, blocks, available)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
