"""Fixtures that several files use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of bytes: token i < 256 is byte i."""
    from nano_inference.random_model import write_random_model

    return write_random_model(tmp_path_factory.mktemp("random") / "llama")


@pytest.fixture(scope="session")
def endless_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with so long a context that a request without max_tokens outlives every test."""
    from nano_inference.random_model import write_random_model

    path = tmp_path_factory.mktemp("random") / "endless"
    return write_random_model(path, max_position_embeddings=200_000)
