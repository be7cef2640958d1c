"""The changes of docs/learn/make-it-yours.md still fit the code, and the page shows what they
are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "learn" / "make-it-yours.md"
PATCHES = sorted((ROOT / "docs" / "learn" / "patches").glob("*.patch"))


def changed_files(patch: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", patch, re.MULTILINE)


def applies(patch: Path, root: Path) -> bool:
    command = ["git", "apply", "--check", str(patch)]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def copy_files(patch: Path, to: Path) -> None:
    for name in changed_files(patch.read_text(encoding="utf-8")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def test_there_is_a_patch_for_each_chapter() -> None:
    assert [p.name[0] for p in PATCHES] == ["1", "2", "3"]
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (\d)\.", text, re.MULTILINE) == ["1", "2", "3"]
    for name in re.findall(r"docs/learn/patches/\S+", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_a_patch_applies_and_comes_with_tests(patch: Path, tmp_path: Path) -> None:
    copy_files(patch, tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert applies(patch, tmp_path)
    files = changed_files(patch.read_text(encoding="utf-8"))
    # The faster kernel changes no result, so the tests that are there already must hold.
    assert any(f.startswith("tests/") for f in files) or files == ["cpp/cpu/attention.cpp"]


def test_a_patch_that_no_longer_fits_is_seen(tmp_path: Path) -> None:
    copy_files(PATCHES[2], tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    file = tmp_path / "cpp" / "cpu" / "attention.cpp"
    file.write_text(file.read_text().replace("gather_token(", "gather_one("))
    assert not applies(PATCHES[2], tmp_path)


def test_the_page_shows_lines_of_the_patches() -> None:
    chapters = re.split(r"^## (?=\d\.)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    shown = 0
    for chapter, patch in zip(chapters, PATCHES, strict=False):
        lines = patch.read_text(encoding="utf-8")
        for block in re.findall(r"^```diff\n(.*?)^```$", chapter, re.MULTILINE | re.DOTALL):
            assert block in lines, block
            shown += 1
    assert shown >= 9


def test_the_model_family_reads_its_config(tmp_path: Path) -> None:
    """The patch's Python, without installing it."""
    from nano_inference.models import _common, families

    copy_files(PATCHES[1], tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", str(PATCHES[1])], cwd=tmp_path, check=True)
    source = (tmp_path / "python/nano_inference/models/smollm3.py").read_text()
    module: dict = {"__package__": _common.__package__, "__name__": "smollm3"}
    exec(compile(source, "smollm3.py", "exec"), module)  # noqa: S102
    assert not set(module["ARCHITECTURES"]) & set(families())  # else the page is out of date
    hf = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = module["config"]
    assert [rope for _, rope in config(hf, None)["layers"]] == [0, 0, 0, -1]
    listed = {**hf, "no_rope_layers": [0, 1, 1, 0]}
    assert [rope for _, rope in config(listed, None)["layers"]] == [-1, 0, 0, -1]
    assert config(hf, None)["tie_embeddings"] is True
    for wrong in ({"no_rope_layers": [1]}, {"use_sliding_window": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config({**hf, **wrong}, None)
