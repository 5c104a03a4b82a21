"""scoresde-runs: what has become of the runs below a folder, from their files alone, in a fraction of a second."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runs.files import STATES, Run, find, keys, natural, read
from ..runs.listing import layout, number, wrapped


def main() -> None:
    """Entry point of `scoresde-runs`."""
    parser = argparse.ArgumentParser(prog="scoresde-runs", description="The runs below a folder, and their state.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    parser.add_argument("--sort", metavar="KEY", default="run", help="a column or a key")
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with curves and pictures")
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
        width = os.get_terminal_size().columns if sys.stdout.isatty() else 120
        print(describe(runs, chosen.folder, width=max(width, 80)))
    else:
        print(f"No runs below {chosen.folder}.")
    if chosen.html:
        from ..sweep.page import write_page

        write_page(chosen.html, runs, title=str(chosen.folder))
        print(f"Page in {chosen.html}", file=sys.stderr)


def arrange(runs: Sequence[Run], by: str = "bits/dim") -> list[Run]:
    """Sorted by a column or a key; runs without the value come last.

    Raises:
        ValueError: no run has it.
    """
    tables, _, _ = keys(runs)
    fixed: dict[str, Callable[[Run], Any]] = {
        "run": lambda run: natural(str(run.folder)), "state": lambda run: STATES.index(run.state),
        "step": lambda run: run.step, "images": lambda run: run.images, "bits/dim": lambda run: run.bits,
        "loss": lambda run: run.loss,
    }  # fmt: skip
    if by not in fixed and runs and not any(by in table for table in tables):
        raise ValueError(f"no run has {by!r}; sort by {', '.join(fixed)} or a key of the configuration")
    found = [fixed[by](run) if by in fixed else table.get(by) for run, table in zip(runs, tables, strict=True)]

    def rank(i: int) -> tuple[Any, ...]:
        value = found[i]
        if isinstance(value, list):
            return (0, 0, *value)
        try:
            size = number(float(value)) if isinstance(value, (int, float, str)) else None
        except ValueError:
            size = None
        return (value is None, size is None, size if size is not None else str(value))

    return [runs[i] for i in sorted(range(len(runs)), key=rank)]


def describe(runs: Sequence[Run], root: Path, *, width: int = 120) -> str:
    """The table: what all share in the lines above it, then one line per run."""
    tables, differ, same = keys(runs)
    counts = ", ".join(f"{n} {state}" for state in STATES if (n := sum(run.state == state for run in runs)))
    head = [f"{len(runs)} run{'s' * (len(runs) > 1)} below {root}: {counts}"]
    if same:
        # of a whole configuration the groups and single keys; --json has the rest
        main = [key for key, value in same.items() if len(same) <= 20 or (value is not None and "." not in key)]
        head += wrapped("all: ", [f"{key}={same[key]}" for key in main], width, lines=3)
    columns = {key: [table.get(key, "–") for table in tables] for key in differ}
    fixed = {
        "step": [_count(run.step) for run in runs],
        "images": [_count(run.images) for run in runs],
        "bits/dim": [_bits(run) for run in runs],
        "loss": ["–" if run.loss is None else f"{run.loss:.5g}" for run in runs],
        "state": [": ".join(filter(None, [run.state, run.reason])) for run in runs],
    }
    names = [str(run.folder.relative_to(root)) for run in runs]
    lines, left_out = layout({"run": names, **columns, **fixed}, width, optional=differ)
    if left_out:
        head += wrapped("also different: ", left_out, width, lines=2)
    return "\n".join([*head, "", *lines])


def _bits(run: Run) -> str:
    if run.bits is None:
        return "–"
    return f"{run.bits:.4f}" + ("" if run.stderr is None else f" ± {run.stderr:.4f}")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _record(run: Run) -> dict[str, Any]:
    record = asdict(run) | {"folder": str(run.folder)}
    del record["rows"]
    return json.loads(json.dumps(record, default=str), parse_constant=lambda name: None)


if __name__ == "__main__":
    main()
