"""Checks of user input: a refusal is a ValueError that names the field and says what is right."""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

INT32_MAX = 2**31 - 1


class NamedFields(type):
    """Metaclass of the parameter dataclasses: an unknown keyword is a ValueError that names it. The
    class may have a table FIXED, keyword -> (possible values, why): vLLM's keywords that ask for
    nothing here. They are checked and dropped."""

    FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        fields: Collection[str] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        given = {}
        for name, value in kwargs.items():
            if name in cls.FIXED:
                check_fixed(name, value, *cls.FIXED[name])
            elif name in fields:
                given[name] = value
            else:
                raise ValueError(unknown_field(cls.__name__, name, fields))
        return super().__call__(*args, **given)


def check_fixed(name: str, value: Any, possible: tuple[Any, ...], why: str) -> None:
    # True is no 1 here, and what compares strangely (an array, say) is no match.
    if not any(value is p or (type(value) is type(p) and value == p) for p in possible):
        only = " or ".join(map(repr, possible))
        raise ValueError(f"{name}={value!r} is not possible, only {only} is: {why}")


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
    """low <= value <= high; without `high`, what the engine's 32 bits hold."""
    if not is_int(value) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"between {low} and {high}"
        refuse(name, value, f"an integer {span}{also}")
    if high is None and value > INT32_MAX:
        refuse(name, value, f"an integer between {low} and {INT32_MAX}{also}")


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
    if not isinstance(value, (list, tuple)) or not all(map(is_token_id, value)):
        refuse(name, value, "a list of token ids (integers >= 0)")


def is_token_id(value: Any) -> bool:
    return is_int(value) and 0 <= value <= INT32_MAX
