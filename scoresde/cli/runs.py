"""scoresde-runs: what has become of the runs below a folder, from their files alone, in a fraction of a second."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..runs.files import STATES, Run, count_states, find, keys, measured, natural, read
from ..runs.listing import layout, number_in, window, wrapped
from ..runs.redact import guard


def main() -> None:
    """Entry point of `scoresde-runs`."""
    parser = argparse.ArgumentParser(prog="scoresde-runs", description="The runs below a folder, and their state.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    parser.add_argument("--sort", metavar="KEY", default="run", help="a column or a key")
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with curves and pictures")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    output = guard(hide=str)  # the files have no secrets, and may be large
    chosen = parser.parse_args()
    if not chosen.folder.is_dir():
        parser.error(f"{chosen.folder} is no folder; give one that holds runs: scoresde-runs runs")
    runs = [read(folder) for folder in find(chosen.folder)]
    try:
        runs = arrange(runs, chosen.sort)
    except ValueError as error:
        parser.error(str(error))
    if chosen.json:
        print(json.dumps([_record(run) for run in runs], indent=1))
    elif runs:
        print(describe(runs, chosen.folder, width=window()))
    else:
        print(f"No runs below {chosen.folder}.")
    if chosen.html:
        from ..sweep.page import write_page

        write_page(chosen.html, runs, title=str(chosen.folder))
        print(f"Page in {chosen.html}", file=sys.stderr)
    output.flush()
    if output.lost:
        sys.exit(1)


def arrange(runs: Sequence[Run], by: str = "bits/dim") -> list[Run]:
    """Sorted by a column or a key; runs without the value come last.

    Raises:
        ValueError: no run has it.
    """
    tables, _, _ = keys(runs)
    rows = [dict(table) for table in tables]
    for run, row in zip(runs, rows, strict=True):
        row |= run.numbers | {"run": str(run.folder), "state": str(STATES.index(run.state))}
    if runs and not any(by in row for row in rows):
        raise ValueError(f"no run has {by!r}; sort by run, state, step, images, bits/dim, loss or a configuration key")

    def rank(place: int) -> tuple[Any, ...]:
        value = rows[place].get(by)
        size = number_in(value)
        return value is None, size is None, natural(str(value)) if size is None else size

    return [runs[place] for place in sorted(range(len(runs)), key=rank)]


def describe(runs: Sequence[Run], root: Path, *, width: int | None = None) -> str:
    """The table: what all share in the lines above it, then one line per run; see `layout`."""
    tables, differ, same = keys(runs)
    head = [f"{len(runs)} run{'s' * (len(runs) > 1)} below {root}: {count_states(runs)}"]
    if same:
        # of a whole configuration the groups and single keys; --json has the rest
        main = [key for key, value in same.items() if len(same) <= 20 or (value is not None and "." not in key)]
        head += wrapped("all: ", [f"{key}={same[key]}" for key in main], width, lines=3)
    columns: dict[str, list[Any]] = {"run": [str(run.folder.relative_to(root)) for run in runs]}
    figures = [measured(run) for run in runs]
    # the configuration's key `loss` has the name of a number
    optional = [key for key in differ if key not in figures[0]]
    columns |= {key: [table.get(key) for table in tables] for key in optional}
    columns |= {name: [row[name] for row in figures] for name in figures[0]}
    columns["state"] = [": ".join(filter(None, [run.state, run.reason])) for run in runs]
    table, left_out = layout(columns, width, optional=optional)
    left_out += [key for key in differ if key in figures[0]]
    if left_out:
        head += wrapped("also different: ", left_out, width, lines=2)
    return "\n".join([*head, "", table])


def _record(run: Run) -> dict[str, Any]:
    record = {field.name: getattr(run, field.name) for field in fields(run) if field.name != "rows"}
    return json.loads(json.dumps(record, default=str), parse_constant=lambda name: None)


if __name__ == "__main__":
    main()
