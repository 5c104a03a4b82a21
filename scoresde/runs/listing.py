"""What differs between configurations, and a table of it that fits a terminal. Needs nothing but Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


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
    same = {key: value for key, value in full[0].items() if all(key in table and repr(table[key]) == repr(value)
                                                                for table in full)} if full else {}  # fmt: skip
    return differ, same


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def fit(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters, the middle of a longer one left out."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def layout(
    columns: Mapping[str, Sequence[Any]], width: int, *, optional: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Lines of a table of at most `width` characters, and the names of the columns that it has no room for.

    First and last column to the left, the others to the right. The last has what room is left, at least 24; of the
    others a cell has at most 24. `optional` are left out, last first, until the rest fits.
    """
    shown = dict(columns)
    left_out: list[str] = []
    while True:
        names = _short(list(shown), optional)
        cells = [
            [fit(_text(v), 24) for v in (name, *column)] for name, column in zip(names, shown.values(), strict=True)
        ]
        last = [names[-1], *(" ".join(_text(v).split()) for v in list(shown.values())[-1])]
        room = width - sum(max(map(len, column)) + 2 for column in cells[:-1])
        droppable = [key for key in shown if key in optional]
        if room >= min(24, max(map(len, last))) or not droppable:
            break
        left_out.insert(0, droppable[-1])
        del shown[droppable[-1]]
    room = max(room, 24)
    cells[-1] = [text if len(text) <= room else text[: room - 1] + "…" for text in (fit(t, len(t)) for t in last)]
    sizes = [max(map(len, column)) for column in cells]
    cells = [[column[0], "-" * size, *column[1:]] for column, size in zip(cells, sizes, strict=True)]
    ends = (0, len(cells) - 1)
    padded = [
        [cell.ljust(size) if i in ends else cell.rjust(size) for cell in column]
        for i, (column, size) in enumerate(zip(cells, sizes, strict=True))
    ]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)], left_out


def wrapped(head: str, parts: Sequence[str], width: int, *, lines: int) -> list[str]:
    """`head` and the parts in at most `lines` lines of `width` characters; '…' says that some are left out."""
    found: list[str] = []
    line = head
    for i, part in enumerate(parts):
        part = fit(part, 60) + (" " if i < len(parts) - 1 else "")
        if len(line) + len(part) > width:
            if len(found) == lines - 1:
                return [*found, line.rstrip()[: width - 2] + " …"]
            found, line = [*found, line.rstrip()], " " * len(head)
        line += part
    return [*found, line.rstrip()]


def _short(names: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Without the groups where the last part alone is clear: `optim.lr` is `lr`."""
    tails = [name.rpartition(".")[2] if name in optional else name for name in names]
    return [tail if tails.count(tail) == 1 else name for tail, name in zip(tails, names, strict=True)]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
