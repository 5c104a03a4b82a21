"""The table of samplers: sorted, each number with its error, and in words which is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics import Score
from ..runs.listing import layout, window
from .evaluation import Samples
from .scoring import TRAINING, rank_name, ranked


def columns_of(
    made: Mapping[str, Samples], scores: Mapping[str, Mapping[str, Score]], by: str | None
) -> dict[str, list[str]]:
    """The table, column by column: the rows as `ranked`, and behind the number by which they are, what each has more
    than the first.
    """
    rows = ranked(scores, by)
    names = list(dict.fromkeys(name for row in rows for name in scores[row]))
    count = len(next(iter(made.values())).x)
    costs = [made.get(row) for row in rows]
    columns = {
        "sampler": rows,
        "network calls": [f"{cost.evaluations:.0f}" if cost else "" for cost in costs],
        f"seconds for {count:,}": [f"{cost.seconds:.1f}" if cost else "" for cost in costs],
    }
    first = rank_name(names, by)
    for name in [first, *(name for name in names if name != first)] if names else []:
        columns[name] = [shown(scores[row].get(name)) for row in rows]
        if name == first and len(made) > 1:
            best = scores[rows[0]][name]
            more = [shown(scores[row][name].minus(best)) if row in made else "" for row in rows[1:]]
            columns[f"{name} − {rows[0]}"] = ["", *more]
    return columns


def verdict(made: Mapping[str, Samples], scores: Mapping[str, Mapping[str, Score]], by: str | None) -> str:
    """Which sampler is better, in a sentence; empty where there is nothing to compare."""
    best, *others = [row for row in ranked(scores, by) if row in made]
    name = rank_name(scores[best], by)
    if not name or not others:
        return ""
    gaps = {row: scores[row][name].minus(scores[best][name]) for row in others}
    worse = [row for row, gap in gaps.items() if abs(gap.value) > 2 * gap.stderr]
    alike = [row for row in others if row not in worse]
    said = [f"{best} is better than {', '.join(worse)} by more than two standard errors"] * bool(worse)
    said += [f"{best} is not told apart from {', '.join(alike)}: draw more evaluation.samples"] * bool(alike)
    return f"By {name}, {'; '.join(said)}."


def shown(score: Score | None) -> str:
    """A number to two digits of its error."""
    if score is None:
        return "–"
    if not math.isfinite(score.stderr):
        return f"{score.value:.4g}"
    places = 4 if score.stderr == 0 else min(max(1 - math.floor(math.log10(score.stderr)), 0), 12)
    if places > 6:
        return f"{score.value:.2e} ± {score.stderr:.1e}"
    return f"{score.value:.{places}f} ± {score.stderr:.{places}f}"


def printed(columns: Mapping[str, Sequence[str]]) -> str:
    """For the console: one table, or on a terminal as many as are needed, with the same rows."""
    width, (head, *names), tables = window() or 10**6, list(columns), []
    while names:
        for count in range(len(names), 0, -1):
            table = layout({name: columns[name] for name in [head, *names[:count]]}, None)[0]
            if max(map(len, table.splitlines())) <= width:
                break
        tables.append(table)
        names = names[count:]
    return "\n\n".join(tables)


def markdown(columns: Mapping[str, Sequence[str]]) -> str:
    """The table for `summary.md`."""
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def record_of(scores: Mapping[str, Mapping[str, Score]], best: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The scores for JSON: value, standard error, the difference to the best row, and the values without each group,
    from which the paired error of any other difference is had.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row, numbers in scores.items():
        found[row] = {}
        for name, each in numbers.items():
            record = {"value": each.value, "stderr": each.stderr}
            if row not in (best, TRAINING):
                gap = each.minus(scores[best][name])
                record |= {"minus_best": gap.value, "minus_best_stderr": gap.stderr}
            found[row][name] = {**record, "left_out": list(each.left_out)}
    return found
