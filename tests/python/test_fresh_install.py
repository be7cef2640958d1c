"""Promise 10: pip install, then text on a CPU in seconds; no torch, no compiler and no network at
run time. The wheel is built and installed into a fresh virtual environment; an audit hook there
watches what Python imports, starts and connects to, and the system's compilers are out of PATH."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cpp_build import ROOT

PROMPT = "Once upon a time"

# Loaded by the fresh interpreter at start-up. Refusing and recording: an except clause somewhere
# must not hide an attempt.
AUDIT = """
import os, sys

REFUSED = ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen",
           "os.system", "os.exec", "os.posix_spawn", "os.fork")

def hook(event, args):
    if event in REFUSED or (event == "import" and args[0].split(".")[0] == "torch"):
        with open(os.environ["NI_AUDIT_LOG"], "a") as log:
            log.write(f"{event} {args!r}\\n")
        raise RuntimeError(f"refused: {event} {args!r}")

if "NI_AUDIT_LOG" in os.environ:
    sys.addaudithook(hook)
"""


def run(*command: str | Path, **options) -> str:
    options = {"capture_output": True, "text": True, **options}
    result = subprocess.run([str(part) for part in command], **options)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (path,) = folder.glob("nano_inference-*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with nothing but the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "-q", wheel)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "audit_for_test.py").write_text(AUDIT)
    (site / "audit_for_test.pth").write_text("import audit_for_test\n")
    return folder / "bin"


@pytest.fixture
def bare(fresh, tmp_path) -> dict:
    """subprocess options: an empty home, and no program in PATH but the environment's own."""
    log = tmp_path / "audit.log"
    log.touch()
    env = {"PATH": str(fresh), "HOME": str(tmp_path), "NI_AUDIT_LOG": str(log), "LANG": "C.UTF-8"}
    return {"cwd": tmp_path, "env": env}


def audited(options: dict) -> str:
    return Path(options["env"]["NI_AUDIT_LOG"]).read_text()


@pytest.mark.timeout(2400)
def test_wheel_contents(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        requirements = [
            line.split(":", 1)[1].strip()
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    assert {"nano_inference/py.typed", "nano_inference/_core.pyi"} <= names
    assert "nano_inference/bundled/nano-5m/model.safetensors" in names
    assert "nano_inference/bundled/nano-5m-draft/model.safetensors" in names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert sum(n.startswith("nano_inference/_core.") and n.endswith(".so") for n in names) == 1
    stray = [n for n in names if not n.startswith(("nano_inference/", "nano_inference-"))]
    assert stray == []
    assert requirements and not any(r.startswith(("torch", "transformers")) for r in requirements)


@pytest.mark.timeout(600)
def test_generates_without_torch_compiler_or_network(fresh, bare) -> None:
    command = [fresh / "nano-inference", "generate", "--json", "--temperature", "0", PROMPT]
    answers = [json.loads(run(*command, **bare)) for _ in range(2)]
    assert audited(bare) == ""
    for answer in answers:
        assert PROMPT in json.dumps(answer)
    assert texts(answers[0]) == texts(answers[1]) != []


def texts(answer) -> list[str]:
    """Every "text" in the JSON, wherever it is."""
    if isinstance(answer, dict):
        own = [answer["text"]] if isinstance(answer.get("text"), str) else []
        return own + [t for value in answer.values() for t in texts(value)]
    return [t for value in answer for t in texts(value)] if isinstance(answer, list) else []


def test_import_is_light(fresh, bare) -> None:
    """Neither the package nor LLM needs the server's packages; nothing heavy comes with import."""
    code = (
        "import sys, nano_inference\n"
        "early = {m.split('.')[0] for m in sys.modules}\n"
        "assert not early & {'numpy', 'tokenizers', 'jinja2', 'huggingface_hub'}, early\n"
        "from nano_inference import LLM, SamplingParams\n"
        "late = {m.split('.')[0] for m in sys.modules}\n"
        "assert not late & {'starlette', 'uvicorn', 'click', 'torch', 'transformers'}, late\n"
    )
    run(fresh / "python", "-c", code, **bare)
    assert audited(bare) == ""


def test_llm_works_without_the_server_packages(fresh, bare) -> None:
    code = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'click'): sys.modules[name] = None\n"
        "from nano_inference import LLM, SamplingParams\n"
        "from nano_inference.random_model import write_random_model\n"
        "llm = LLM(str(write_random_model('model')))\n"
        "out = llm.generate('Hi', SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)\n"
        "assert len(out[0].outputs[0].token_ids) == 4\n"
    )
    run(fresh / "python", "-c", code, **bare)
    assert audited(bare) == ""


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("import torch", "import"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "socket"),
        ("import subprocess; subprocess.run(['c++', '--version'])", "subprocess.Popen"),
    ],
)
def test_the_watch_bites(fresh, bare, code, event) -> None:
    result = subprocess.run([fresh / "python", "-c", code], capture_output=True, text=True, **bare)
    assert result.returncode != 0 and "refused" in result.stderr
    assert audited(bare).startswith(event)


def test_no_toolchain_at_hand(fresh) -> None:
    assert not [
        c
        for c in ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "nvcc")
        if os.path.exists(fresh / c)
    ]
