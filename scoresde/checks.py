"""Checks of arguments that many constructors share."""

from __future__ import annotations

import math
import operator
from typing import Any


def whole(value: Any, name: str, least: int = 1, *, otherwise: str = "") -> int:
    """`value` as an int, where it is a whole number of at least `least`: Python's, NumPy's or torch's, but no bool.

    Raises:
        ValueError: it is anything else; the message calls it `name`, and says what it may be `otherwise`.
    """
    expected = f"a whole number of at least {least}{otherwise and f', or {otherwise}'}"
    try:
        # a truth value of torch has an index; the dtype is read as text, as commands without torch check numbers too
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool":
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {expected}; got {value!r}.") from None
    if not least <= number < 2**63:  # which is where integers of torch end
        raise ValueError(f"{name} is {expected}{' and below 2^63' if number > least else ''}; got {number}.")
    return number


def sizes(values: Any, name: str) -> tuple[int, ...]:
    """`values` as whole numbers of at least 1, several or none: a shape.

    Raises:
        ValueError: one of them is not; the message calls them `name`.
    """
    return tuple(whole(value, f"Each size of {name}") for value in values)


def positive(value: Any, name: str, what: str = "a number") -> float:
    """`value` as a float, where it is a number that is finite and above 0, and no bool.

    Raises:
        ValueError: it is not; the message calls it `name`, and says `what` it is.
    """
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {what}, > 0 and finite; got {value!r}.")
    return number
