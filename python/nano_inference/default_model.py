"""The model that runs when none is named."""

from __future__ import annotations

DEFAULT_MODEL_NAME = "tiny-random-llama"
DEFAULT_MODEL_NOTICE = "no --model given: using a tiny random model; its text means nothing"


def default_model() -> str:
    """Its folder."""
    from .random_model import cached_random_model

    return str(cached_random_model())
