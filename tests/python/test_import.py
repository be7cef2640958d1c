"""Importing the package is cheap, and the engine needs none of the server's packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = [
    "torch",
    "transformers",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "numpy",
    "tqdm",
    "click",
    "starlette",
    "uvicorn",
    "asyncio",
    "nano_inference._core",
]
SERVER = ["starlette", "uvicorn", "torch", "transformers"]


def loaded_by(code: str, names: list[str]) -> set[str]:
    """Which of the modules a fresh interpreter has loaded after running the code."""
    report = f"import sys\n{code}\nprint(*[m for m in {names!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("import nano_inference", HEAVY) == set()


def test_the_check_bites() -> None:
    assert "nano_inference._core" in loaded_by("from nano_inference import LLM", HEAVY)


def test_sampling_params_need_no_engine() -> None:
    code = "from nano_inference import SamplingParams; SamplingParams(temperature=0)"
    assert loaded_by(code, HEAVY) == set()


def test_help_loads_no_engine() -> None:
    code = "from nano_inference.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert loaded_by(code, HEAVY) <= {"click", "asyncio"}


def test_llm_works_without_the_servers_packages(model_dir: Path) -> None:
    code = f"""
for name in {SERVER!r}:
    sys.modules[name] = None  # importing it fails
from nano_inference import LLM, SamplingParams
llm = LLM({str(model_dir)!r}, use_tqdm_on_load=False)
out = llm.generate("abc", SamplingParams(max_tokens=3, ignore_eos=True))[0]
assert len(out.outputs[0].token_ids) == 3
llm.close()
for name in {SERVER!r}:
    del sys.modules[name]
"""
    assert loaded_by(code, SERVER) == set()


def test_all_names_resolve() -> None:
    import nano_inference

    for name in nano_inference.__all__:
        assert getattr(nano_inference, name) is not None
    assert set(nano_inference.__all__) <= set(dir(nano_inference))
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        nano_inference.LLMs  # noqa: B018
