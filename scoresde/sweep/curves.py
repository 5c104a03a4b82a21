"""Learning curves as inline SVG: one line per run, axes that suit the numbers. Needs nothing but Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Sizes in units of the picture, which is as wide as its place on the page.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 290, 58, 18, 12, 46
_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """One line: its name, the number that gives it its colour, and its points."""

    name: str
    number: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Numbers from `low` to `high`, placed on a segment of the picture; logarithmic where they span decades.

    Args:
        low, high: the numbers at the ends; both > 0 if `log`.
        start, end: where they are, in units of the picture.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        """Where `value` is on the picture."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to eight round numbers within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for parts in ((1,), (1, 3), (1, 2, 5)):
                found = [part * 10.0**power for power in decades for part in parts]
                found = [value for value in found if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 8)]
        # 1, 2 or 5 times a power of ten, so that about five steps cover the axis
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(part * power for part in (1, 2, 5, 10) if part * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def axis(values: Sequence[float], start: float, end: float, *, span: float, pad: float = 0.0) -> Axis:
    """An axis for `values`, logarithmic if all are positive and the largest is `span` times the smallest.

    `pad` is the share of the axis that stays free at both ends.
    """
    low, high = min(values), max(values)
    log = low > 0 and high / low >= span
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
    if log:
        grow = (high / low) ** pad
        return Axis(low / grow, high * grow, start, end, True)
    grow = (high - low) * pad
    return Axis(low - grow, high + grow, start, end, False)


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure of `curves` against images; an empty string if none has a finite point."""
    curves = [Curve(c.name, c.number, thin(c.points)) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    x = axis([p[0] for c in curves for p in c.points], _LEFT, _WIDTH - _RIGHT, span=30)
    y = axis([p[1] for c in curves for p in c.points], _HEIGHT - _BOTTOM, _TOP, span=10, pad=0.05)
    parts = [
        f'<figure class="chart"><figcaption>{escape(title)}<output></output></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} against images">'
    ]
    for value in x.ticks():
        at = f"{x.place(value):.1f}"
        parts.append(f'<path class="grid" d="M{at} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{short(value)}</text>')
    for value in y.ticks():
        at = f"{y.place(value):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy=".35em" text-anchor="end">{short(value)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 7}" text-anchor="middle">images{" (log)" * x.log}</text>')
    parts += [_line(curve, x, y) for curve in curves]
    return "".join([*parts, "</svg></figure>"])


def _line(curve: Curve, x: Axis, y: Axis) -> str:
    places = [f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in curve.points]
    last = curve.points[-1]
    label = escape(f"{curve.name}: {last[1]:.5g} after {short(last[0])} images")
    # the second, wide and invisible, is what a mouse can hit
    line = "M" + "L".join(places)
    dots = "".join(f'<circle r="3" cx="{p.split()[0]}" cy="{p.split()[1]}"/>' for p in places if len(places) <= 12)
    return (
        f'<g class="run" data-run="{curve.number}" data-label="{label}" style="--h:{hue(curve.number)}">'
        f'<path class="line" d="{line}"/>{dots}<path class="hit" d="{line}"><title>{label}</title></path></g>'
    )


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points; of more than 300, means of neighbours, so that a page of many runs stays small."""
    points = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]
    size = math.ceil(len(points) / _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g)) for g in groups]


def hue(number: int) -> int:
    """Degrees on the colour circle: turning by the golden angle keeps any few colours apart."""
    return round(210 + number * 137.508) % 360


def short(value: float) -> str:
    """`20000` as `20k`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
