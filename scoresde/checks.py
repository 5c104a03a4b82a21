"""Checks of arguments that many constructors share."""

from __future__ import annotations

import math
import operator
from types import NoneType
from typing import Any


def whole(value: Any, name: str, least: int = 1, *, otherwise: str = "") -> int:
    """`value` as an int, where it is a whole number of at least `least`: Python's or NumPy's, but no bool.

    Raises:
        ValueError: it is anything else; the message calls it `name`, and says what it may be `otherwise`.
    """
    expected = f"a whole number of at least {least}{otherwise and f', or {otherwise}'}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {expected}; got {value!r}.") from None
    if number < least:
        raise ValueError(f"{name} is {expected}; got {number}.")
    return number


def positive(value: Any, name: str, what: str = "a number") -> float:
    """`value` as a float, where it is a number that is finite and above 0, and no bool.

    Raises:
        ValueError: it is not; the message calls it `name`, and says `what` it is.
    """
    if isinstance(value, (bool, str, NoneType)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {what}, > 0 and finite; got {value!r}.")
    return float(value)
