"""Runs the C++ suites and reports each GoogleTest case under its own name.

Collecting this file builds the suites (a no-op when they are up to date), because only the
executables know the names of parametrised cases. Each suite then runs once. The kernel suites of
the CUDA backend join them where there is a card.
"""

import functools
import json
import subprocess
import tempfile
from pathlib import Path

import pytest

from cpp_build import BuildError, build, suites
from nano_inference import _core

KINDS = [False, True] if _core.cuda_devices() else [False]  # cuda?


def executable(suite: str) -> str:
    return str((suites() | suites(cuda=True))[suite])


def list_cases(suite: str) -> list[str]:
    """`Suite.case` names, from gtest's indented listing."""
    result = subprocess.run(
        [executable(suite), "--gtest_list_tests"], capture_output=True, text=True, check=True
    )
    cases, prefix = [], ""
    for line in result.stdout.splitlines():
        name = line.split("#")[0].rstrip()
        if name.startswith("  "):
            cases.append(prefix + name.strip())
        elif name.endswith("."):
            prefix = name
    return cases


@functools.cache
def run_suite(suite: str) -> tuple[dict[str, dict], str]:
    """The outcome of each case that ended, and what the suite printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        result = subprocess.run(
            [executable(suite), f"--gtest_output=json:{report}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output = f"exit code {result.returncode}\n{result.stdout[-8000:]}"
        if not report.exists():  # it crashed
            return {}, output
        groups = json.loads(report.read_text())["testsuites"]
    cases = {f"{g['name']}.{c['name']}": c for g in groups for c in g["testsuite"]}
    return cases, output


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        try:
            names = []
            for cuda in KINDS:
                build(cuda)
                names += [(suite, case) for suite in suites(cuda) for case in list_cases(suite)]
        except (BuildError, subprocess.CalledProcessError, OSError):
            names = []  # test_cpp_builds says why
        metafunc.parametrize(("suite", "case"), names, ids=[f"{s}:{c}" for s, c in names])


@pytest.mark.parametrize("cuda", KINDS, ids=["cpu", "cuda"][: len(KINDS)])
def test_cpp_builds(cuda: bool) -> None:
    try:
        build(cuda)
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)
    for suite in suites(cuda):
        assert list_cases(suite), f"{suite} has no test cases"


def test_cpp(suite: str, case: str) -> None:
    cases, output = run_suite(suite)
    if case not in cases:
        pytest.fail(f"{suite} ended before {case} did:\n{output}", pytrace=False)
    failures = [failure["failure"] for failure in cases[case].get("failures", [])]
    if failures:
        pytest.fail("\n".join(failures)[:6000], pytrace=False)
    assert cases[case]["status"] == "RUN", f"{case} is disabled"
    assert cases[case]["result"] == "COMPLETED", f"{case} was skipped"
