"""Finding a model: a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .bundled import bundled_model

CONFIG_FILES = ["*.json", "*.jinja"]
SAFETENSORS = ["model*.safetensors"]
TORCH_BIN = ["pytorch_model*.bin"]
SUBFOLDERS = ["*/*"]  # other formats and precisions of the same model
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    token: str | bool | None = None,
    need_weights: bool = True,
) -> Path:
    """The model's folder: itself, a bundled model's, or one of the hub's. A hub name is downloaded
    once into the cache (or `download_dir`), with huggingface_hub's progress bars; HF_ENDPOINT,
    HF_TOKEN and HF_HUB_OFFLINE are honoured."""
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if (bundled := bundled_model(model)) is not None:
        return bundled
    if model and folder.exists():
        raise ValueError(f"{model!r} is a file; give the folder that holds config.json")
    if not HUB_NAME.fullmatch(model) or ".." in model or "--" in model:
        raise ValueError(f"{model!r} is neither a folder nor a Hugging Face hub name (owner/name)")
    options = {"revision": revision, "cache_dir": download_dir, "token": token}
    if not need_weights:
        return _download(model, options, CONFIG_FILES)
    path = _download(model, options, CONFIG_FILES + SAFETENSORS)
    if any(path.glob(SAFETENSORS[0])):
        return path
    return _download(model, options, CONFIG_FILES + TORCH_BIN)


def _download(model: str, options: dict[str, Any], patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            model, allow_patterns=patterns, ignore_patterns=SUBFOLDERS, **options
        )
    except GatedRepoError:
        raise ValueError(
            f"access to {model!r} is restricted: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{model!r} is neither a folder nor a model on the hub (or it is private: set HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{model!r} has no revision {options['revision']!r} on the hub") from None
    except HFValidationError as error:
        raise ValueError(f"{model!r} is neither a folder nor a hub name: {_line(error)}") from None
    except LocalEntryNotFoundError as error:
        raise ValueError(_not_cached(model, error)) from None
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(f"downloading {model!r} failed: {_line(error)}") from None
    return Path(folder)


def _not_cached(model: str, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"{model!r} is no folder, not (wholly) in the hub cache, and HF_HUB_OFFLINE is set"
    cause = _line(error.__cause__ or error)
    return f"{model!r} is no folder, not (wholly) in the hub cache; the hub is unreachable: {cause}"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
