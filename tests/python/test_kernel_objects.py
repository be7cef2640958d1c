"""The kernel objects are compiled with wider instructions than the rest of the program. An inline
function emitted there as a weak symbol could be the copy that the linker keeps for everybody, and
would then fault on an older CPU. So: no weak symbols, and one exported table per object."""

import subprocess

from cpp_build import build


def symbols(path: str) -> list[tuple[str, str]]:
    """(type, name) of the defined symbols of an object file."""
    command = ["nm", "--defined-only", "--demangle", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(line.split(maxsplit=2)[1], line.split(maxsplit=2)[2]) for line in listing.splitlines()]


def test_no_weak_symbols() -> None:
    objects = sorted((build() / "cpp").rglob("ni_kernels_*.dir/cpu/kernels.cpp.o"))
    isas = {path.parts[-3].removeprefix("ni_kernels_").removesuffix(".dir") for path in objects}
    assert {"portable", "reference"} <= isas
    for path in objects:
        found = symbols(str(path))
        weak = [name for kind, name in found if kind in "wWvVu"]
        assert weak == [], f"{path.name} for {path.parts[-3]} holds weak symbols"
        exported = [name for kind, name in found if kind.isupper()]
        assert len(exported) == 1, f"{path.parts[-3]} should export its table only: {exported}"


def test_weak_symbols_are_seen(tmp_path) -> None:
    source = tmp_path / "weak.cpp"
    source.write_text("inline int f(int x) { return x + 1; }\nint (*table)(int) = f;\n")
    subprocess.run(["c++", "-c", str(source), "-o", str(tmp_path / "weak.o")], check=True)
    assert ("W", "f(int)") in symbols(str(tmp_path / "weak.o"))
