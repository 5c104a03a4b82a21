"""Progress of anything that goes on item by item: a bar on a terminal, a few lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item], label: str, total: int | None, *, show: bool = True, every: float = 30.0
) -> Iterator[Item]:
    """Passes the items on and shows the rate and the time left: a bar on a terminal, elsewhere a line now and then.

    Args:
        items, label, total: the items, their name and their number; None where it is not known.
        show: False for silence.
        every: seconds between two lines.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    bar = tqdm(items, desc=label, total=total, leave=False, dynamic_ncols=True, disable=not (show and terminal))
    start = last = time.monotonic()
    for count, item in enumerate(bar, 1):
        yield item
        now = time.monotonic()
        if show and not terminal and now - last >= every:
            rate, last = count / (now - start), now
            of, left = ("", "") if total is None else (f"/{total:,}", f"  {(total - count) / rate:.0f} s left")
            print(f"{label} {count:,}{of}  {rate:.3g}/s{left}", file=sys.stderr, flush=True)
