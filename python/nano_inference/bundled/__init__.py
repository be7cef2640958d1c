"""The models that come with the package: used by name, and where no model is named."""

from __future__ import annotations

from pathlib import Path

MODELS = ("nano-5m", "nano-5m-draft")
DEFAULT = "nano-5m"
NOTICE = "no model named: using nano-5m, a small one for stories and simple tasks"


def bundled_model(name: str) -> Path | None:
    """The folder of a bundled model; None if there is none of this name."""
    return Path(__file__).parent / name if name in MODELS else None
