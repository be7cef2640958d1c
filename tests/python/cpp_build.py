"""Builds the C++ test suites, once a session and incrementally.

The build folder is build/tests, or $NI_TEST_BUILD_DIR to share one (CI shares its -Werror build).
Where there is a card, the kernel suites of the CUDA backend are built too, into build/cuda, or
$NI_CUDA_TEST_BUILD_DIR.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIR = Path(os.environ.get("NI_TEST_BUILD_DIR") or ROOT / "build" / "tests").resolve()
CUDA_BUILD_DIR = Path(os.environ.get("NI_CUDA_TEST_BUILD_DIR") or ROOT / "build" / "cuda").resolve()

NO_GTEST = (
    "GoogleTest is missing and could not be fetched. Install it with "
    "`pip install -e '.[test]'`, `apt-get install libgtest-dev` or `dnf install gtest-devel`."
)


class BuildError(Exception):
    pass


def _run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        output = result.stdout + result.stderr
        hint = NO_GTEST + "\n" if "googletest" in output and "Populate" in output else ""
        raise BuildError(f"{hint}`{' '.join(command)}` failed:\n{output[-6000:]}")


@functools.cache
def _build(folder: Path, cuda: str) -> BuildError | None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder)]
    if not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", "-DNI_PYTHON=OFF", "-DNI_TESTS=ON", f"-DNI_CUDA={cuda}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    try:
        _run(*configure)
        _run("cmake", "--build", str(folder))
    except (BuildError, OSError) as error:
        return BuildError(str(error))
    return None


def build(cuda: bool = False) -> Path:
    """The build folder, up to date; raises BuildError with the compiler's words."""
    folder = CUDA_BUILD_DIR if cuda else BUILD_DIR
    error = _build(folder, "ON" if cuda else "OFF")
    if error is not None:
        raise error
    return folder


def suites(cuda: bool = False) -> dict[str, Path]:
    """The executable of each suite, built or not."""
    folder, prefix = ("cpp/cuda", "cuda_") if cuda else ("cpp", "")
    root = CUDA_BUILD_DIR if cuda else BUILD_DIR
    sources = sorted((ROOT / "tests" / folder).glob("*_test.cpp"))
    return {prefix + s.stem: root / "tests" / folder / (prefix + s.stem) for s in sources}
