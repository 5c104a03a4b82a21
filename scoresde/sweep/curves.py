"""Learning curves of several runs as one SVG picture, drawn by matplotlib, to be put into a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_POINTS = 300


class Curve(NamedTuple):
    """One line: its name, the number that gives it its colour, and its points."""

    name: str
    number: int
    points: Sequence[tuple[float, float]]


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure of `curves` against images with its legend; an empty string if none has a finite point.

    Each line and its name in the legend carry the number of their run, as every other element of the page does that
    belongs to it: the page's style gives them one colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = [curve._replace(points=points) for curve in curves if (points := thin(curve.points))]
    if not curves:
        return ""
    entries = [
        f'<li class="run" {_of(number)}><span class="dot"></span>{escape(name)}: {points[-1][1]:.5g}</li>'
        for name, number, points in curves
    ]
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<div role="img" aria-label="{escape(title)} against images">{_drawn(title, curves)}</div>'
        f'<ul class="legend">{"".join(entries)}</ul></figure>'
    )


def _drawn(title: str, curves: Sequence[Curve]) -> str:
    """The picture as an `<svg>` element of an HTML page, without addresses and names of its own."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        mark = "o" if len(curve.points) <= 12 else ""
        axes.plot(*zip(*curve.points, strict=True), marker=mark, markersize=3, gid=f"run-{curve.number}")
    axes.set(xlabel="images", ylabel=title)
    axes.set_xscale("log" if spans([x for curve in curves for x, _ in curve.points], 30) else "linear")
    axes.set_yscale("log" if spans([y for curve in curves for _, y in curve.points], 10) else "linear")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scoresde"}):
        no_facts = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=no_facts)
    svg = written.getvalue()
    svg = re.sub(r' (xmlns(:\w+)?|clip-path)="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="run-(\d+)">', lambda found: f'<g class="run" {_of(int(found[1]))}>', svg)
    return re.sub(r'<g id="[^"]*">', "<g>", svg)


def _of(number: int) -> str:
    """The attributes of an element that belongs to a run."""
    return f'data-run="{number}" style="--h:{hue(number)}"'


def spans(values: Sequence[float], times: float) -> bool:
    """Whether all values are positive and the largest is at least `times` the smallest: a logarithmic axis suits."""
    return min(values) > 0 and max(values) / min(values) >= times


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points; of more than 300, means of neighbours, so that a page of many runs stays small."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(math.ceil(len(points) / _POINTS), 1)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def hue(number: int) -> int:
    """Degrees on the colour circle: turning by the golden angle keeps any few colours apart."""
    return round(210 + number * 137.508) % 360
