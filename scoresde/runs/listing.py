"""What differs between configurations, and a table of it that fits a terminal."""

from __future__ import annotations

import io
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"sde": {"_target_": "scoresde.VPSDE", "beta_max": 20.0}}` as `{"sde": "VPSDE", "sde.beta_max": 20.0}`."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name == "_target_":
            found[prefix] = str(value).rpartition(".")[2]
        else:
            found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def differing(tables: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """(keys in which the tables differ, what they all share), in order of appearance.

    Where a class differs (`sde`), its arguments (`sde.beta_max`) count only if they differ between tables of the same
    class. A table that is empty (an unreadable configuration, say) is not compared.
    """
    full = [table for table in tables if table]
    differ: list[str] = []
    # parents first, because their values tell which tables are compared
    for key in sorted(dict.fromkeys(name for table in full for name in table), key=lambda name: name.count(".")):
        parents = [parent for parent in differ if key.startswith(f"{parent}.")]
        seen: dict[str, set[str]] = {}
        for table in full:
            alike = repr([table.get(parent) for parent in parents])
            seen.setdefault(alike, set()).add(repr(table.get(key)))
        if any(len(found) > 1 for found in seen.values()):
            differ.append(key)
    shared = set.intersection(*({(key, repr(value)) for key, value in table.items()} for table in full or [{}]))
    return differ, {key: value for table in full[:1] for key, value in table.items() if (key, repr(value)) in shared}


def number(value: Any) -> float | None:
    """`value` if it is a finite number that a float can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of 400 digits
        return None


def number_in(value: Any) -> float | None:
    """The finite number that a value is or that its text says (overrides are text), else None."""
    try:
        return number(float(value) if isinstance(value, str) else value)
    except ValueError:
        return None


def text(value: Any, missing: str = "–") -> str:
    """A value in a table: six digits of a number, `missing` for None."""
    return f"{value:.6g}" if isinstance(value, float) else missing if value is None else str(value)


def fit(words: str, width: int | None) -> str:
    """`words` on one line without control characters; of more than `width` characters the middle is left out."""
    line = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    if width is None or len(line) <= width:
        return line
    head = width // 2
    return f"{line[:head]}…{line[len(line) - (width - 1 - head) :]}"


def window() -> int | None:
    """Characters in a line of the terminal, at least 80; None where the output is read by a program or kept."""
    return max(shutil.get_terminal_size().columns, 80) if sys.stdout.isatty() else None


def layout(
    columns: Mapping[str, Sequence[Any]], width: int | None, *, optional: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """A table, and the names of the columns that it has no room for.

    Args:
        columns: name -> cells. The first and the last column are aligned to the left, the others to the right.
        width: characters in a line. A cell has at most 24, the last column takes the room that is left, and `optional`
            columns are left out, last first, until it has 24. None: every cell is shown in full.
        optional: columns that may be left out, named without their group where the last part alone is clear.
    """
    keys = [key for key in columns if key in optional]
    console = Console(file=io.StringIO(), width=width or 100_000, color_system=None)
    for count in range(len(keys), -1, -1):
        shown = {key: column for key, column in columns.items() if key not in keys[count:]}
        table = _table(dict(zip(_short(list(shown), optional), shown.values(), strict=True)), width and 24)
        table.columns[-1].max_width = width and 24
        if console.measure(table, options=console.options.update(width=100_000)).maximum <= console.width:
            break
    table.columns[-1].max_width = None
    with console.capture() as found:
        console.print(table)
    return "\n".join(line.rstrip() for line in found.get().splitlines()), keys[count:]


def _table(columns: Mapping[str, Sequence[Any]], longest: int | None) -> Table:
    """One line per row: the last column gives way where the table is too wide, the others never do."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    *_, last = columns
    for place, name in enumerate(columns):
        left = place == 0 or name == last
        table.add_column(Text(fit(name, longest)), justify="left" if left else "right", no_wrap=name != last)
    for row in zip(*columns.values(), strict=True):
        cells = [fit(text(value), longest) for value in row[:-1]]
        table.add_row(*map(Text, cells), Text(fit(text(row[-1]), None), no_wrap=True, overflow="ellipsis"))
    return table


def wrapped(head: str, parts: Sequence[str], width: int | None, *, lines: int) -> list[str]:
    """`head` and the parts in at most `lines` lines of `width` characters; '…' says that some are left out.

    With no width the lines have 120 characters, and nothing is left out.
    """
    whole = head + " ".join(fit(part, width and 60) for part in parts)
    wrap = textwrap.TextWrapper(width or 120, subsequent_indent=" " * len(head), placeholder=" …")
    wrap.break_on_hyphens, wrap.max_lines = False, lines if width else None
    return wrap.wrap(whole)


def _short(names: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Without the groups where the last part alone is clear: `optim.lr` is `lr`."""
    tails = [name.rpartition(".")[2] if name in optional else name for name in names]
    return [tail if tails.count(tail) == 1 else name for tail, name in zip(tails, names, strict=True)]
