"""Checks of user input: a refusal is a ValueError that names the field and says what is right."""

import difflib
import math
from collections.abc import Collection
from typing import Any, NoReturn


class NamedFields(type):
    """Metaclass of the parameter dataclasses: an unknown keyword is a ValueError that names it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        fields: Collection[str] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        for name in kwargs:
            if name not in fields:
                raise ValueError(unknown_field(cls.__name__, name, fields))
        return super().__call__(*args, **kwargs)


def unknown_field(owner: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "known: " + ", ".join(known)
    return f"{owner} does not know '{name}'; {hint}"


def refuse(name: str, value: Any, want: str) -> NoReturn:
    raise ValueError(f"{name} must be {want}, got {value!r}")


def is_int(value: Any) -> bool:
    """An integer and not a bool; numpy's integers count."""
    return type(value) is int or (hasattr(value, "__index__") and not isinstance(value, bool))


def check_int(name: str, value: Any, low: int, high: int | None = None, also: str = "") -> None:
    if is_int(value) and low <= value and (high is None or value <= high):
        return
    span = f"of at least {low}" if high is None else f"between {low} and {high}"
    refuse(name, value, f"an integer {span}{also}")


def check_float(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> None:
    """low <= value <= high (low < value with open_low), and finite."""
    if (
        (isinstance(value, (int, float)) or hasattr(value, "__float__"))
        and not isinstance(value, (bool, str))
        and low <= value <= high
        and value != math.inf
        and not (open_low and value == low)
    ):
        return
    above = f"above {low:g}" if open_low else f"of at least {low:g}"
    span = f"{above} and at most {high:g}" if high != math.inf else f"{above}, and finite"
    refuse(name, value, f"a number {span}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, "one of " + ", ".join(map(repr, choices)))


def check_text(name: str, value: Any) -> None:
    """A string that UTF-8 can hold: JSON and surrogateescape can smuggle in half characters."""
    if not isinstance(value, str):
        refuse(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(name, value, "valid Unicode, without lone surrogates")


def check_optional_str(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        refuse(name, value, "a non-empty string or None")


def check_token_ids(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(is_int(t) and t >= 0 for t in value):
        refuse(name, value, "a list of token ids (integers >= 0)")
