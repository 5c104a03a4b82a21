"""Acting as a user whom permissions bind: `from permissions import ordinary`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

NOBODY = 65534


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """As a user whom permissions bind: root, as tests in a container run, lays its rights down for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
