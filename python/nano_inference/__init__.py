"""nano-inference: run Hugging Face language models, with vLLM's names and meanings.

    from nano_inference import LLM, SamplingParams

    llm = LLM("path/to/model")
    for output in llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=32)):
        print(output.outputs[0].text)

Importing this package imports nothing heavy; each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import QueueFullError
    from .async_llm import AsyncLLM
    from .engine_args import EngineArgs
    from .llm import LLM
    from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from .sampling_params import SamplingParams

    __version__: str

_HOME = {
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineArgs": "engine_args",
    "LLM": "llm",
    "Logprob": "outputs",
    "QueueFullError": "_core",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "__version__": "_core",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "Logprob",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
