"""LLM: batches of prompts in, finished texts out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .engine import EngineAccess, LoadedEngine, Messages, PreparedRequest, Prompt, model_or_default
from .engine_args import EngineArgs
from .outputs import RequestOutput
from .request import RequestState
from .sampling_params import SamplingParams
from .validation import refuse

_WAIT_SECONDS = 0.1  # how long Ctrl-C may have to wait


class LLM(EngineAccess):
    """A model that generates, as in vLLM.

    LLM(model=None, *, dtype="auto", max_model_len=None, ...): the options are EngineArgs' fields.
    Without a model the bundled one runs, and a line in the log says so. The model is loaded and
    ready when the constructor returns. close() (or leaving a `with` block) stops the engine.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._engine = LoadedEngine(EngineArgs(model=model_or_default(model), **options))
        self._lock = threading.Lock()  # one thread at a time reads the engine's outputs
        self._bars: dict[int, Any] = {}  # progress bars, by the engine's number of the request

    # -- Generation -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Finishes all prompts, batched as memory allows, and returns them in order.

        A prompt is a string, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids};
        the dicts may have a "cache_salt" (prompts with different salts share no cache).
        sampling_params: one for all, a list with one for each, or None for
        get_default_sampling_params(). If one prompt is impossible, none runs.
        use_tqdm: whether to show a progress bar (on a terminal), or what makes one, as tqdm does.
        """
        _check_run_options(use_tqdm, lora_request)
        many = _is_batch(prompts)
        batch: list[Prompt] = list(prompts) if many else [prompts]  # type: ignore[arg-type, list-item]
        return self._run(self._prepare(batch, sampling_params, priority, True), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of {"role": ..., "content": ...}, or a list of them.
        A content is a text or a list of {"type": "text", "text": ...}. chat_template_kwargs are
        variables of the template."""
        _check_run_options(use_tqdm, lora_request)
        prompts = [
            self._engine.render_chat(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in _conversations(messages)
        ]
        # The template has written the special tokens.
        return self._run(self._prepare(prompts, sampling_params, None, False), use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        delta: bool = True,
        priority: int = 0,
    ) -> Iterator[RequestOutput]:
        """One prompt, step by step. Each RequestOutput carries only what is new: the texts, joined,
        are the text that generate() returns. With delta=False each carries everything so far.
        Closing the iterator aborts the request."""
        request = self._engine.prepare(prompt, sampling_params, priority=priority)
        return self._stream(request, delta)

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        delta: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:
        """chat() of one conversation, step by step as stream()."""
        prompt = self._engine.render_chat(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        request = self._engine.prepare(prompt, sampling_params, add_special_tokens=False)
        return self._stream(request, delta)

    # -- The rest -------------------------------------------------------------------------------

    def close(self) -> None:
        """Stops the engine; requests in flight end with finish_reason "abort"."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- Inside ---------------------------------------------------------------------------------

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
        add_special_tokens: bool,
    ) -> list[PreparedRequest]:
        all_params = _one_each("sampling_params", params, len(prompts))
        priorities = _one_each("priority", 0 if priority is None else priority, len(prompts))
        requests = []
        for i, prompt in enumerate(prompts):
            try:
                requests.append(
                    self._engine.prepare(
                        prompt,
                        all_params[i],
                        priority=priorities[i],
                        add_special_tokens=add_special_tokens,
                    )
                )
            except ValueError as error:
                raise ValueError(
                    f"prompt {i}: {error}" if len(prompts) > 1 else str(error)
                ) from None
        return requests

    def _run(
        self, requests: list[PreparedRequest], use_tqdm: bool | Callable[..., Any]
    ) -> list[RequestOutput]:
        states = [request.state for request in requests]
        try:
            with self._show_progress(states, use_tqdm):
                self._engine.submit_all(requests)
                for state in states:
                    while not state.finished:
                        self._pump(state)
        except BaseException:  # Ctrl-C, too
            for state in states:
                self._engine.abort(state)
            raise
        return [self._result(state, i) for i, state in enumerate(states)]

    @contextlib.contextmanager
    def _show_progress(
        self, states: list[RequestState], use_tqdm: bool | Callable[..., Any]
    ) -> Iterator[None]:
        if use_tqdm is False:
            yield
            return
        options = {"total": len(states), "desc": "Prompts", "unit": "prompt"}
        if use_tqdm is True:
            from tqdm.auto import tqdm

            # disable=None: no bar where stderr is not a terminal.
            bar = tqdm(**options, disable=None)
        else:
            bar = use_tqdm(**options)
        self._bars.update((state.core_id, bar) for state in states)
        try:
            yield
        finally:
            for state in states:
                self._bars.pop(state.core_id, None)
            bar.close()

    def _stream(self, request: PreparedRequest, delta: bool) -> Iterator[RequestOutput]:
        state = self._engine.submit(request)
        try:
            output = None
            while output is None or not output.finished:
                while not state.changed:
                    self._pump(state)
                self._raise_failure(state)
                output = state.take(delta=delta)
                yield output
        finally:
            self._engine.abort(state)

    def _pump(self, state: RequestState) -> None:
        """Takes in what the engine made, for all requests. Waits for a moment at most."""
        with self._lock:
            if state.finished:
                return
            for changed in self._engine.apply(self._engine.core.wait_outputs(_WAIT_SECONDS)):
                if changed.finished and (bar := self._bars.pop(changed.core_id, None)) is not None:
                    bar.update(1)

    def _result(self, state: RequestState, index: int) -> RequestOutput:
        self._raise_failure(state, f"prompt {index}: ")
        return state.take()

    def _raise_failure(self, state: RequestState, where: str = "") -> None:
        if state.error is not None:
            raise RuntimeError(f"{where}the engine failed: {state.error}")


def _check_run_options(use_tqdm: Any, lora_request: Any) -> None:
    if not isinstance(use_tqdm, bool) and not callable(use_tqdm):
        refuse("use_tqdm", use_tqdm, "True, False or a callable that makes the bar")
    if lora_request is not None:
        refuse("lora_request", lora_request, "None: LoRA adapters are not available")


def _is_batch(prompts: Any) -> bool:
    """A list of prompts; a list of numbers is one prompt."""
    if isinstance(prompts, (list, tuple)):
        return not prompts or not all(_is_number(p) for p in prompts)
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (hasattr(value, "__index__") and not hasattr(value, "__len__"))


def _conversations(messages: Any) -> list[Messages]:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(
            f"messages must be a list of dicts, or a list of such lists, got {messages!r}"
        )
    if messages and isinstance(messages[0], dict):
        return [messages]
    return list(messages)


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """One for each prompt: a single value serves all."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name}: {len(value)} given for {count} prompts; give one, or one for each"
        )
    return list(value)
