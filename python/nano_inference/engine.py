"""What LLM and AsyncLLM share: loading a model, and the requests that its engine works on."""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import _core, bundled, hub, loader
from .config import LoadedConfig, load_model
from .engine_args import EngineArgs, MemoryPlan, gigabytes, plan_engine
from .request import RequestState
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer
from .validation import check_int, check_text, is_int, refuse, unknown_field

logger = logging.getLogger("nano_inference")

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[dict[str, Any]]

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
# Arguments of a chat that no variable of its template may replace.
_CHAT_ARGUMENTS = (
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)
_LOG_SECONDS = 10.0


def model_or_default(model: str | None) -> str:
    """The bundled model where none is named; the log says so."""
    if model is not None:
        return model
    logger.warning(bundled.NOTICE)
    return bundled.DEFAULT


class LoadedEngine:
    """A loaded model with its engine running. Not thread-safe but for abort()."""

    def __init__(self, args: EngineArgs) -> None:
        began = time.monotonic()
        self.args = args
        self.phases: dict[str, float] = {}
        """Seconds that each part of the start took."""
        path = hub.resolve_model(
            args.model,
            revision=args.revision,
            download_dir=args.download_dir,
            token=args.hf_token,
        )
        self.loaded: LoadedConfig = load_model(
            path, dtype=args.dtype, max_model_len=args.max_model_len, device=args.target.kind
        )
        self.tokenizer = None if args.skip_tokenizer_init else _load_tokenizer(args, path)
        self._add_tokenizers_eos()
        self.plan: MemoryPlan
        self._load(path, began)
        self._pid = os.getpid()
        self.requests: dict[int, RequestState] = {}  # in flight, by the engine's number
        self._ids = itertools.count()
        self._seeds = random.Random(args.seed)
        self._log_stats = not args.disable_log_stats
        self._last_log = (time.monotonic(), 0)  # and the tokens generated until then
        logger.info(
            "%s ready after %.1f s: weights %s (%.1f GB/s), KV cache %s (%d tokens)",
            args.model,
            time.monotonic() - began,
            gigabytes(self.plan.weights),
            self._bytes_read / 1e9 / max(self.phases["weights"], 1e-9),
            gigabytes(self.plan.kv_cache),
            self.plan.num_tokens,
        )

    def _load(self, path: Path, began: float) -> None:
        """Plans memory, loads the weights and starts the engine."""
        args = self.args
        on_cuda = args.target.is_cuda
        config, self.plan = plan_engine(args, self.loaded)
        then = self._log_phase("config and tokenizer", began)
        self.core = _core.Engine(config, self.loaded.model_config)
        try:
            self._bytes_read = loader.load_weights(
                self.core,
                path,
                self.loaded,
                check_nan=args.check_weights,
                progress=args.use_tqdm_on_load,
                threads=loader.CUDA_THREADS if on_cuda else 1,
            )
            then = self._log_phase("weights", then)
            self.core.finish_loading()
            self.core.start()
        except BaseException as error:
            # The traceback holds self and the loader's variables, and they the device's memory.
            traceback.clear_frames(error.__traceback__)
            del self.core
            raise
        self.plan = replace(self.plan, num_blocks=self.core.num_blocks)
        rest = "plans, cache, warm-up and graphs" if on_cuda else "cache and warm-up"
        self._log_phase(rest, then)

    def _log_phase(self, name: str, began: float) -> float:
        now = time.monotonic()
        self.phases[name] = now - began
        logger.info("%s: %.2f s", name, now - began)
        return now

    def _add_tokenizers_eos(self) -> None:
        """As in vLLM the tokenizer's end-of-sequence token counts beside those of the configs."""
        eos = None if self.tokenizer is None else self.tokenizer.eos_token_id
        known = self.loaded.generation.eos_token_ids
        if eos is not None and eos < self.loaded.model_config.vocab_size and eos not in known:
            known.append(eos)

    # -- A request's life -----------------------------------------------------------------------

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends; vLLM's defaults for the rest."""
        gen = self.loaded.generation
        recommended: dict[str, Any] = {
            "repetition_penalty": gen.repetition_penalty,
            "temperature": gen.temperature,
            "top_k": gen.top_k,
            "top_p": gen.top_p,
            "min_p": gen.min_p,
            "max_tokens": gen.max_new_tokens,
        }
        return SamplingParams(**{k: v for k, v in recommended.items() if v is not None})

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> PreparedRequest:
        """Tokenizes and checks a request; nothing runs yet."""
        self._check_process()
        if params is None:
            params = self.default_sampling_params()
        elif isinstance(params, SamplingParams):
            params = params.clone()  # checks it again; the caller may change his
        else:
            refuse("sampling_params", params, "a SamplingParams, or None")
        self._check_priority(priority)
        text, ids, salt = self._read_prompt(prompt, add_special_tokens)
        if params.truncate_prompt_tokens is not None:
            text, ids = self._truncate(text, ids, params)
        core_params = params.to_core(
            self.tokenizer,
            self.loaded.model_config.vocab_size,
            self._seeds.getrandbits(64),
            max_logprobs=self.args.max_logprobs,
        )
        self.core.validate(ids, core_params)
        core_id = next(self._ids)
        state = RequestState(
            core_id,
            str(core_id) if request_id is None else request_id,
            text,
            ids,
            params,
            self.tokenizer,
        )
        return PreparedRequest(state, core_params, priority, salt)

    def submit(self, request: PreparedRequest) -> RequestState:
        """Hands it to the engine. QueueFullError if max_waiting requests wait already."""
        self.submit_all([request])
        return request.state

    def submit_all(self, requests: Sequence[PreparedRequest]) -> None:
        """Hands them to the engine, all or none: its next step knows all of them."""
        self._check_process()
        states = [request.state for request in requests]
        self.requests.update((state.core_id, state) for state in states)
        try:
            self.core.submit_all(
                [
                    (
                        r.state.core_id,
                        r.state.prompt_token_ids,
                        r.core_params,
                        r.priority,
                        r.cache_salt,
                    )
                    for r in requests
                ]
            )
        except BaseException:  # Ctrl-C may come just after the engine took them
            for state in states:
                self.abort(state)
            raise

    def apply(self, outputs: Iterable[_core.Output]) -> list[RequestState]:
        """Gives the engine's outputs to their requests; returns those that changed. Outputs of
        requests that are over (what a step in flight still made) are dropped."""
        touched: dict[int, RequestState] = {}
        for out in outputs:
            state = self.requests.get(out.request_id)
            if state is None:
                continue
            state.push(out, partial(self._end_choice, state))
            touched[out.request_id] = state
            if state.finished:
                del self.requests[out.request_id]
        if self._log_stats and touched:
            self._maybe_log()
        return list(touched.values())

    def _end_choice(self, state: RequestState, choice: int) -> None:
        self.core.abort(state.core_id, choice, stop=True)

    def abort(self, state: RequestState) -> None:
        """Ends a request; its blocks are free after the step in flight. Outputs are dropped."""
        if self.requests.pop(state.core_id, None) is not None:
            self.core.abort(state.core_id)

    def close(self) -> None:
        if os.getpid() == self._pid:  # a fork's copy has no threads to end
            self.core.shutdown()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"the engine runs in process {self._pid}, and process {os.getpid()} is a fork of "
                "it: threads do not survive a fork; load the model in the process that uses it "
                "(multiprocessing: start method 'spawn')"
            )

    # -- Prompts --------------------------------------------------------------------------------

    def render_chat(
        self,
        messages: Messages,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of a conversation. chat_template_kwargs are variables of the template."""
        variables = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(variables, dict):
            refuse("chat_template_kwargs", variables, "a dict, or None")
        for key in _CHAT_ARGUMENTS:
            if key in variables:
                raise ValueError(f"chat_template_kwargs must not hold '{key}': it is an argument")
        return self.need_tokenizer("chat").apply_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and skip_tokenizer_init is on")
        return self.tokenizer

    def _read_prompt(
        self, prompt: Prompt, add_special_tokens: bool
    ) -> tuple[str | None, list[int], str]:
        """(text, token ids, cache salt) of any form of prompt."""
        if not isinstance(prompt, Mapping):
            prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
        for key in prompt:
            if key not in _PROMPT_KEYS:
                raise ValueError(unknown_field("a prompt", str(key), _PROMPT_KEYS))
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        salt = prompt.get("cache_salt", "")
        if not isinstance(salt, str):
            refuse("cache_salt", salt, "a string")
        if text is None and ids is None:
            raise ValueError("a prompt needs 'prompt' (text) or 'prompt_token_ids'")
        if text is not None:
            check_text("prompt", text)
        if ids is None:
            tokenizer = self.need_tokenizer("a text prompt")
            ids = tokenizer.encode(str(text), add_special_tokens)
        return text, _token_ids(ids), salt

    def _truncate(
        self, text: str | None, ids: list[int], params: SamplingParams
    ) -> tuple[str | None, list[int]]:
        """The end of the prompt; the text is None if something was cut."""
        keep = params.truncate_prompt_tokens or 0
        if keep == -1:
            keep = max(1, self.loaded.max_model_len - (params.max_tokens or 1))
        return (text, ids) if len(ids) <= keep else (None, ids[-keep:])

    def _check_priority(self, priority: int) -> None:
        check_int("priority", priority, -(2**31), 2**31 - 1)
        if priority and self.args.scheduling_policy != "priority":
            raise ValueError(
                f"priority ({priority}) has no effect under the fcfs policy: start with "
                "scheduling_policy='priority'"
            )

    def _maybe_log(self) -> None:
        now = time.monotonic()
        then, tokens = self._last_log
        if now - then < _LOG_SECONDS:
            return
        s = self.core.stats()
        self._last_log = (now, s["generated_tokens"])
        logger.info(
            "%.1f tokens/s; %d running, %d waiting; %.1f%% of the KV cache in use; %d preemptions",
            (s["generated_tokens"] - tokens) / (now - then),
            s["running"],
            s["waiting"],
            100.0 * s["blocks_used"] / s["blocks_total"],
            s["preemptions"],
        )


class EngineAccess:
    """What LLM and AsyncLLM tell of their engine."""

    _engine: LoadedEngine

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, overridden by the model's generation_config.json."""
        return self._engine.default_sampling_params()

    def get_tokenizer(self) -> Tokenizer:
        return self._engine.need_tokenizer("get_tokenizer()")

    @property
    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self._engine.core.stats()

    @property
    def engine(self) -> LoadedEngine:
        """What is underneath: the native engine (.core), the model's config, the memory plan."""
        return self._engine


class PreparedRequest:
    """A checked request that is not yet running."""

    __slots__ = ("cache_salt", "core_params", "priority", "state")

    def __init__(
        self,
        state: RequestState,
        core_params: _core.SamplingParams,
        priority: int,
        cache_salt: str,
    ) -> None:
        self.state = state
        self.core_params = core_params
        self.priority = priority
        self.cache_salt = cache_salt


def _token_ids(ids: Any) -> list[int]:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()  # a numpy array
    if not isinstance(ids, (list, tuple)) or not all(is_int(t) for t in ids):
        refuse("prompt_token_ids", ids, "a list of token ids")
    return list(ids)


def _load_tokenizer(args: EngineArgs, model: Path) -> Tokenizer:
    if args.tokenizer is None:
        return Tokenizer.from_dir(model)
    path = hub.resolve_model(
        args.tokenizer,
        download_dir=args.download_dir,
        token=args.hf_token,
        need_weights=False,
    )
    return Tokenizer.from_dir(path)
