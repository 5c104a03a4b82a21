"""Checks of arguments that many constructors share."""

from __future__ import annotations

import operator
from typing import Any


def whole(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int, where it is a whole number of at least `least`: Python's or NumPy's, but no bool.

    Raises:
        ValueError: it is anything else; the message calls it `name`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is a whole number of at least {least}; got {value!r}.") from None
    if number < least:
        raise ValueError(f"{name} is a whole number of at least {least}; got {number}.")
    return number
