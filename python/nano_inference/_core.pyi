"""The native engine. Shapes are in brackets; all errors are ValueError (bad input), QueueFullError,
or RuntimeError (the machine failed)."""

from collections.abc import Sequence as _Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__version__: str

class QueueFullError(RuntimeError):
    """The waiting queue holds max_waiting requests."""

class RopeConfig:
    """One rotary table: angle(position, i) = position * inv_freq[i]; cos and sin are multiplied by
    attention_factor. Rotates dimension i with i + rotary_dim / 2, rotary_dim = 2 *
    len(inv_freq)."""

    def __init__(self, inv_freq: _Sequence[float], attention_factor: float = 1.0) -> None: ...
    inv_freq: list[float]
    attention_factor: float

class LayerConfig:
    def __init__(self, window: int = 0, rope: int = 0) -> None: ...
    window: int  # sliding window in tokens; 0: none
    rope: int  # index into ModelConfig.ropes; -1: no rotation

class ModelConfig:
    """What the decoder needs to know of a model. Every field is a keyword of the constructor."""

    def __init__(self, **fields: Any) -> None: ...
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: str  # "rms", "layer"
    norm_eps: float
    act: str  # "silu", "gelu_tanh", "gelu", "relu"
    gated_mlp: bool
    qk_norm: bool
    learned_positions: bool
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    attn_scale: float  # 0: 1 / sqrt(head_dim)
    ropes: list[RopeConfig]
    layers: list[LayerConfig]
    def validate(self) -> None: ...

class EngineConfig:
    """Every field is a keyword of the constructor."""

    def __init__(self, **fields: Any) -> None: ...
    device: str  # "cpu", "cuda"
    isa: str  # CPU instruction set; "": best
    num_threads: int  # 0: all available
    dtype: str  # weights: "float32", "bfloat16", "float16"
    kv_cache_dtype: str  # the same three, or "fp8_e4m3" (CUDA)
    block_size: int
    num_blocks: int  # 0: finish_loading() decides, by memory_fraction (CUDA)
    paged: bool  # False: one contiguous reservation of max_model_len slots a sequence
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    static_batching: bool
    policy: str  # "fcfs", "priority"
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int  # 0: unbounded
    max_logprobs: int
    eos_token_ids: list[int]
    trace_capacity: int  # steps kept; 0: no trace
    check_invariants: bool  # after every step (for tests)
    device_index: int  # CUDA: which card
    batch_invariant: bool  # CUDA: promise 1 holds
    graph_sizes: list[int]  # numbers of rows for which decoding is captured; empty: no graphs
    overlap: bool  # launch a step before the tokens of the one before have arrived
    memory_fraction: float  # of the card's memory, for everything
    plan_cache: str  # file of timed plans of matrix products; "": none

class SamplingParams:
    """Every field is a keyword of the constructor; see engine/sampling_params.h for the
    meanings."""

    def __init__(self, **fields: Any) -> None: ...
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int  # -1: as many as fit
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: list[int]
    logit_bias: dict[int, float]
    bad_words: list[list[int]]
    allowed_token_ids: list[int]
    logprobs: int  # -1: none
    prompt_logprobs: int  # -1: none

class TokenLogprobs:
    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]

class Output:
    """What one step (or an abort) did to one choice of one request."""

    request_id: int
    choice: int
    token_ids: list[int]  # new tokens
    logprobs: list[TokenLogprobs]  # one a new token when asked for, else empty
    prompt_logprobs: list[TokenLogprobs]  # further prompt tokens' (from the second on), in order
    num_cached: int  # prompt tokens found in the prefix cache
    finish_reason: str  # "" while running; "stop", "length", "abort", "error"
    stop_token: int  # the stop_token_ids member that ended it, or -1
    request_done: bool  # no choice of this request is left
    error: str  # why, with finish_reason "error"
    arrival_time: float  # seconds, time.monotonic() clock
    first_scheduled_time: float
    step_time: float  # when the step that made this ended

class Engine:
    """Lifecycle: construct, load_weight for every slot, finish_loading, start (or step() by hand),
    submit/abort/wait_outputs from any thread, shutdown."""

    def __init__(self, engine_config: EngineConfig, model_config: ModelConfig) -> None: ...
    @staticmethod
    def plan_memory(engine_config: EngineConfig, model_config: ModelConfig) -> dict[str, int]:
        """Bytes, without allocating: weights, activations (of the largest step, its inputs and
        outputs included), kv_block (all layers, K and V, one block), reserve (what libraries,
        operators and captured steps take of a card besides, rather too much); memory_available,
        memory_total of the device; block_size (after `paged`)."""
    @staticmethod
    def weight_slots(model_config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor that must be loaded: name -> shape."""
    def load_weight(self, slot: str, data: npt.NDArray[Any], dtype: str) -> None:
        """data: C-contiguous or row-strided array of the slot's shape; bf16 as uint16 bits. On CUDA
        from any number of threads at once."""
    def finish_loading(self) -> None:
        """Throws ValueError listing the slots that are missing."""
    def start(self) -> None:
        """Starts the engine thread."""
    def shutdown(self) -> None:
        """Stops the thread after the step in flight; unfinished requests end with "abort"."""
    def submit(
        self,
        request_id: int,
        prompt_token_ids: _Sequence[int] | npt.NDArray[np.int32],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Throws ValueError naming the impossible parameter, or QueueFullError."""
    def submit_all(
        self,
        requests: _Sequence[
            tuple[int, _Sequence[int] | npt.NDArray[np.int32], SamplingParams, int, str]
        ],
    ) -> None:
        """All or none, with submit()'s arguments each: the next step knows all of them."""
    def validate(self, prompt_token_ids: _Sequence[int], params: SamplingParams) -> None: ...
    def abort(self, request_id: int, choice: int = -1, stop: bool = False) -> None:
        """Ends a request, or one choice. stop: a stop string was found; counts as finished."""
    def wait_outputs(self, timeout: float = -1.0) -> list[Output]:
        """Blocks (GIL released) until there are outputs, the engine stops, or timeout seconds
        passed."""
    def step(self) -> bool:
        """One step on the caller's thread, if start() was not called. False: there was no work."""
    def stats(self) -> dict[str, Any]:
        """Requests: received = finished + aborted + rejected + failed + running + waiting.
        Sequences: running_seqs, waiting_seqs, preemptions. Steps: steps, failed_steps,
        last_step_time (seconds, time.monotonic() clock; 0: none yet), busy_since (when a request
        last came to an idle engine): with work pending, no step has finished since the later of the
        two. Tokens: prompt_tokens (computed), cached_tokens, generated_tokens. Blocks: blocks_total
        = blocks_free + blocks_cached + blocks_used, block_size, prefix_queries and prefix_hits
        (tokens), evictions. healthy."""
    def trace(self, since_step: int = 0) -> list[dict[str, Any]]:
        """Records of the last trace_capacity steps; see engine/trace.h."""
    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks; False while requests run."""
    def logits(self, token_ids: _Sequence[int]) -> npt.NDArray[np.float32]:
        """[len, vocab] of a forward pass outside the scheduler, for tests and study. Not after
        start()."""
    @property
    def config(self) -> EngineConfig: ...
    @property
    def num_blocks(self) -> int:
        """Of the cache; final after finish_loading()."""
    @property
    def device_name(self) -> str: ...

class Sequence:
    """Tokens with a block table: what the block manager works on. For study and tests."""

    def __init__(self, tokens: list[int], cache_salt: str = "") -> None: ...
    tokens: list[int]
    num_computed: int
    @property
    def block_table(self) -> list[int]: ...
    @property
    def num_cached(self) -> int: ...

class BlockManager:
    """The engine's block manager on its own; see engine/block_manager.h."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, enable_prefix_caching: bool = True
    ) -> None: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_available(self) -> int: ...
    def lookup_prefix(self, seq: Sequence) -> int: ...
    def take_prefix(self, seq: Sequence) -> int: ...
    def blocks_needed(self, seq: Sequence, num_tokens: int) -> int: ...
    def grow(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """The copies (source, destination) to make; None, and nothing changed, if blocks lack."""
    def fork(self, parent: Sequence, child: Sequence) -> None: ...
    def commit(self, seq: Sequence) -> None: ...
    def shrink(self, seq: Sequence, num_tokens: int) -> None: ...
    def free(self, seq: Sequence) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def check_invariants(self, sequences: list[Sequence]) -> None: ...

class SchedulerConfig:
    """Every field is a keyword of the constructor; see engine/scheduler.h."""

    def __init__(self, **fields: Any) -> None: ...
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_waiting: int
    vocab_size: int
    max_logprobs: int
    policy: str
    enable_chunked_prefill: bool
    static_batching: bool
    eos_token_ids: list[int]

class Scheduler:
    """The engine's scheduler on its own: schedule() says what a step computes, update() takes the
    sampled tokens."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None: ...
    def add(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None: ...
    def abort(self, request_id: int, choice: int = -1) -> list[dict[str, Any]]: ...
    def has_work(self) -> bool: ...
    def schedule(self) -> dict[str, Any]:
        """items (request_id, choice, num_computed, num_query, num_samples, is_decode, block_table),
        copies, num_tokens, num_decodes, num_samples; admitted, resumed, preempted."""
    def update(self, samples: list[int]) -> list[dict[str, Any]]: ...
    def fail(self) -> list[dict[str, Any]]: ...
    def stats(self) -> dict[str, int]: ...
    def check_invariants(self) -> None: ...

class Weight:
    """A weight matrix in the backend's layout."""

    @property
    def bytes(self) -> int: ...

class Cache:
    """One layer of a paged KV cache."""

    def read(self) -> npt.NDArray[np.float32]:
        """[2, num_kv_heads, num_blocks * block_size, head_dim]: K, then V."""

class Ops:
    """Every operator of a backend on numpy arrays. Activations are float32 [rows, features] with
    contiguous rows; results go into `out`. bf16 and f16 weights come as their bits. On "cuda"
    operands are copied to the card, converted to activation_dtype, and back."""

    def __init__(
        self,
        device: str = "cpu",
        isa: str = "",
        num_threads: int = 0,
        activation_dtype: str = "",
    ) -> None:
        """activation_dtype: on CUDA "bfloat16" (also if empty) or "float16"; weights must be of
        this type there, caches too or fp8_e4m3."""
    @property
    def name(self) -> str: ...
    @property
    def activation_dtype(self) -> str:
        """In which the device computes: float32 on CPUs."""
    def weight(
        self,
        rows: npt.NDArray[Any],
        source_dtype: str = "float32",
        dtype: str = "float32",
        bias: npt.NDArray[np.float32] | None = None,
    ) -> Weight: ...
    def cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Cache:
        """dtype also "fp8_e4m3" on CUDA: what is stored times the scale is meant."""
    def embed(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        w: Weight,
        out: npt.NDArray[np.float32],
        position_table: Weight | None = None,
        scale: float = 1.0,
    ) -> None: ...
    def norm(
        self,
        x: npt.NDArray[np.float32],
        weight: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None = None,
        kind: str = "rms",
        eps: float = 1e-6,
    ) -> None: ...
    def add_norm(
        self,
        x: npt.NDArray[np.float32],
        residual: npt.NDArray[np.float32],
        weight: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None = None,
        kind: str = "rms",
        eps: float = 1e-6,
    ) -> None: ...
    def linear(
        self,
        x: npt.NDArray[np.float32],
        w: Weight,
        out: npt.NDArray[np.float32],
        accumulate: bool = False,
    ) -> None: ...
    def rope_tables(
        self, rope: RopeConfig, num_positions: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """cos and sin as the engine fills them, [num_positions, rotary_dim / 2] each."""
    def rope_kv_write(
        self,
        qkv: npt.NDArray[np.float32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int64],
        cache: Cache,
        cos: npt.NDArray[np.float32] | None = None,
        sin: npt.NDArray[np.float32] | None = None,
        q_norm: npt.NDArray[np.float32] | None = None,
        k_norm: npt.NDArray[np.float32] | None = None,
        eps: float = 1e-6,
    ) -> None:
        """qkv [T, (heads + 2 kv_heads) * head_dim]: q is normalised and rotated in place, k and v
        go to `slots` (block * block_size + offset; -1: nowhere)."""
    def attention(
        self,
        q: npt.NDArray[np.float32],
        cu_seqlens_q: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        cache: Cache,
        out: npt.NDArray[np.float32],
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        """Causal; q and out [T, heads * head_dim]; sequence s has rows cu_seqlens_q[s:s + 2].
        softcap: CUDA only."""
    def activation(
        self, x: npt.NDArray[np.float32], act: str, gated: bool, out: npt.NDArray[np.float32]
    ) -> None: ...
    def gather_rows(
        self,
        x: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32],
        out: npt.NDArray[np.float32],
    ) -> None: ...
    def copy_blocks(self, cache: Cache, pairs: list[tuple[int, int]]) -> None: ...
    def sample(
        self,
        logits: npt.NDArray[np.float32],
        rows: list[dict[str, Any]],
        max_logprobs: int = 0,
    ) -> dict[str, npt.NDArray[Any]]:
        """rows: a dict a row of logits: fields of SamplingRow, "counts" {token: output count},
        "bias" {token: bias}, "mask" [vocab] of bool. Returns token_ids, logprobs, ranks, top_ids,
        top_logprobs."""

def cuda_devices() -> list[str]:
    """Names of the cards that can be used, by index; empty: cuda_error() says why."""

def cuda_error() -> str:
    """What is missing to use CUDA; "": nothing."""

_TensorView = tuple[int, tuple[int, ...], tuple[int, ...], str]

class TensorOps:
    """Every operator on memory of others, for nano_inference.ops: a tensor is (address, shape,
    strides, torch's name of its type). On CUDA they run on the stream that was set last."""

    def __init__(self, device: str, index: int, dtype: str) -> None: ...
    @property
    def k_tile(self) -> int: ...
    def set_stream(self, stream: int) -> None: ...
    def norm(
        self,
        x: _TensorView,
        residual: _TensorView | None,
        weight: _TensorView,
        bias: _TensorView | None,
        kind: str,
        eps: float,
        out: _TensorView,
    ) -> None: ...
    def linear(
        self, x: _TensorView, weight: _TensorView, bias: _TensorView | None, out: _TensorView
    ) -> None: ...
    def embedding(
        self, token_ids: _TensorView, weight: _TensorView, scale: float, out: _TensorView
    ) -> None: ...
    def activation(self, x: _TensorView, kind: str, gated: bool, out: _TensorView) -> None: ...
    def gather_rows(self, x: _TensorView, rows: _TensorView, out: _TensorView) -> None: ...
    def rope_kv_write(
        self,
        qkv: _TensorView,
        positions: _TensorView,
        slots: _TensorView,
        k_cache: _TensorView,
        v_cache: _TensorView,
        cos: _TensorView | None,
        sin: _TensorView | None,
        q_norm: _TensorView | None,
        k_norm: _TensorView | None,
        eps: float,
        k_scale: float,
        v_scale: float,
    ) -> None: ...
    def attention(
        self,
        q: _TensorView,
        k_cache: _TensorView,
        v_cache: _TensorView,
        block_tables: _TensorView,
        context_lens: _TensorView,
        cu_seqlens_q: _TensorView,
        scale: float,
        window: int,
        softcap: float,
        k_scale: float,
        v_scale: float,
        out: _TensorView,
    ) -> None: ...
    def copy_blocks(
        self, k_cache: _TensorView, v_cache: _TensorView, pairs: _TensorView
    ) -> None: ...
    def sample(
        self,
        logits: _TensorView,
        temperature: _TensorView,
        top_k: _TensorView,
        top_p: _TensorView,
        min_p: _TensorView,
        seeds: _TensorView,
        positions: _TensorView,
        out: _TensorView,
    ) -> None: ...

def cpu_isas() -> list[str]:
    """Instruction sets that this machine can run, best first."""

def num_threads_available() -> int: ...
def measure_machine(num_threads: int = 0) -> dict[str, float]:
    """What the machine gives, in less than a second (256 MiB are taken for it): the roofline.
    read_bytes_per_second out of memory; flops_per_second out of registers, a multiply-add being
    two: bf16 dot products where the CPU has them, else fp32; fp32_flops_per_second."""
