"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from decimal import Decimal


def parse_size(value: str) -> int:
    """Bytes, or a number with KB, MB, GB, TB, or KiB, MiB, GiB, TiB."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) *(?:([kmgt])(i?)b|b)?", value.strip().lower())
    size = 0
    if match is not None:
        number, prefix, binary = match.groups()
        unit = (1024 if binary else 1000) ** " kmgt".index(prefix or " ")
        size = int(Decimal(number) * unit)
    if size <= 0:
        raise ValueError(f"{value!r} is no size, as 4000000000, 4GB or 3.5GiB are")
    return size
