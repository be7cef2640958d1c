"""Builds the C++ test suites, once a session and incrementally.

The build folder is build/tests, or $NI_TEST_BUILD_DIR to share one (CI shares its -Werror build).
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIR = Path(os.environ.get("NI_TEST_BUILD_DIR") or ROOT / "build" / "tests").resolve()

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
def _build() -> BuildError | None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD_DIR)]
    if not (BUILD_DIR / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", "-DNI_PYTHON=OFF", "-DNI_TESTS=ON", "-DNI_CUDA=OFF"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    try:
        _run(*configure)
        _run("cmake", "--build", str(BUILD_DIR))
    except (BuildError, OSError) as error:
        return BuildError(str(error))
    return None


def build() -> Path:
    """The build folder, up to date; raises BuildError with the compiler's words."""
    error = _build()
    if error is not None:
        raise error
    return BUILD_DIR


def suites() -> list[str]:
    return sorted(path.stem for path in (ROOT / "tests" / "cpp").glob("*_test.cpp"))
