"""Kernels as C++ that a host compiler takes, for tests without a card (emulated.h).

translate.py FROM TO: writes cuda/*.cu, *.cuh of the repository FROM to TO/cuda, *.cu as *.cu.cpp.
Inline PTX becomes calls of emulated::ptx(), dynamic shared memory a pointer; all else is as it is.
"""

import re
import sys
from pathlib import Path


def end_of_parentheses(text: str, begin: int) -> int:
    """The index after the parenthesis that closes the one at `begin`."""
    depth, i = 0, begin
    while True:
        if text[i] == '"':
            i = re.compile(r'"(\\.|[^"\\])*"').match(text, i).end()
            continue
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        i += 1
        if depth == 0:
            return i


def split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand outside of strings and brackets."""
    parts, depth, i = [""], 0, 0
    while i < len(text):
        end = i + 1
        if text[i] == '"':
            end = re.compile(r'"(\\.|[^"\\])*"').match(text, i).end()
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(text[i], 0)
        if text[i] == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += text[i:end]
        i = end
    return parts


def call(inline: str) -> str:
    """`"text" : "=r"(a) : "r"(b) : "memory"` as a call."""
    text, *sections = split(inline, ":")
    operands = []
    for kind, section in zip(("out", "in"), sections, strict=False):
        for operand in split(section, ","):
            if operand.strip():
                value = operand[operand.index("(") :]
                operands.append(f"ni::emulated::{kind}{value}")
    return f"ni::emulated::ptx({text.strip()}, {{{', '.join(operands)}}})"


def translate(text: str) -> str:
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];",
        r"auto* \2 = reinterpret_cast<\1*>(ni::emulated::dynamic_shared());",
        text,
    )
    # kernel<<<grid, threads, bytes, stream>>>(…)
    text = re.sub(
        r"([\w:]+(?:<[^;{}]*?>)?)<<<(.*?)>>>\(",
        r"ni::emulated::launch({\2}, \1, ",
        text,
        flags=re.DOTALL,
    )
    result, at = "", 0
    for found in re.finditer(r"\basm( volatile)?\(", text):
        end = end_of_parentheses(text, found.end() - 1)
        result += text[at : found.start()] + call(text[found.end() : end - 1])
        at = end
    return result + text[at:]


def main() -> None:
    source, target = Path(sys.argv[1]) / "cuda", Path(sys.argv[2]) / "cuda"
    target.mkdir(parents=True, exist_ok=True)
    for path in [*source.glob("*.cu"), *source.glob("*.cuh")]:
        to = target / (path.name + ".cpp" if path.suffix == ".cu" else path.name)
        text = f'#line 1 "{path}"\n' + translate(path.read_text())
        if not to.exists() or to.read_text() != text:  # else all would be compiled again
            to.write_text(text)


if __name__ == "__main__":
    main()
