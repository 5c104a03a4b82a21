"""What `Standardise` measures on training samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from .codec import Codec, Stored, refuse

Columns = Sequence[int | str]
_VALUES, _SORTED = 1 << 22, 200_000  # values at a time, and values of a column whose quantiles are taken
_WIDEST = 1 << 18  # range of integers that are told apart; in float32 wider ones are as good as continuous
REACH = 3.0  # ± the normal score of the first and last quantile
_GAP = 1e-6  # least distance of two quantiles, as a share of the range


def maps_of(
    raw: Stored,
    columns: tuple[str, ...],
    integers: Columns | None,
    log: Columns,
    quantile: Columns,
    bounds: tuple[Mapping[Any, float], Mapping[Any, float]],
    knots: int,
) -> dict[str, Any]:
    """All arguments of `Standardise` but mean and deviation; see `Standardise.of`."""
    whole(knots, "knots", 3)
    d = raw.shape[1] if len(raw.shape) > 1 else 0
    if not d or not len(raw) or len(columns) not in (0, d):
        raise ValueError(f"Expected samples (N, D), (N, D, *sizes), and D names or none; got {tuple(raw.shape)}.")
    least, most, fractions = _extent(raw, columns)
    found = (~fractions & (most - least < _WIDEST)).nonzero().flatten().tolist()
    kinds = found if integers is None else _numbers(integers, columns, range(d))
    logged = _numbers(log, columns, range(d))
    tabled = _numbers(quantile, columns, [k for k in range(d) if k not in logged])
    if both := set(logged) & set(tabled):
        raise ValueError(f"Column {_called(min(both), columns)} is in log= and in quantile=; choose one.")
    low, high = ({_numbers([name], columns, range(d))[0]: each[name] for name in each} for each in bounds)
    for k in logged:
        if least[k] < 0 or (least[k] == 0 and k not in kinds):
            raise ValueError(
                f"Column {_called(k, columns)} goes down to {float(least[k]):.7g}, and has no logarithm there: "
                "quantile= takes any values."
            )
        if k in kinds:
            low.setdefault(k, 0.0)
    for k in set(range(d)) - set(kinds):
        if least[k] == most[k]:
            raise ValueError(
                f"Column {_called(k, columns)} holds {float(least[k]):.7g} in every row, so it has no density. "
                "Leave it out."
            )
    shifts = {k: -1.0 if k in kinds else 0.0 for k in logged}
    knots = max(3, min(knots, len(raw) // 20))
    tables = {k: _table(raw, k, knots) for k in tabled}
    return {
        "integers": tuple(kinds),
        "log": tuple(shifts.get(k) for k in range(d)) if shifts else (),
        "quantiles": tuple(tables.get(k, ()) for k in range(d)) if tables else (),
        "low": tuple(low.get(k) for k in range(d)) if low else (),
        "high": tuple(high.get(k) for k in range(d)) if high else (),
        "columns": columns,
        "seen": tuple((float(least[k]), float(most[k])) if k in kinds else None for k in range(d)) if kinds else (),
        "dtype": "float32" if raw.dtype.is_floating_point else str(raw.dtype).removeprefix("torch."),
    }


def moments_of(raw: Stored, maps: Codec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each column of what `maps` make of raw; integers are uniform in their bins."""
    count, centre = 0, None
    total = squares = none = torch.zeros((), dtype=torch.float64, device="cpu")
    for part in _parts(raw):
        x = _flat(maps.transform(part.double()))
        edges = maps.bins(part)
        within = none if edges is None else _flat(edges[1] - edges[0]).square().sum(0) / 12
        centre = x.mean(0) if centre is None else centre
        count, total = count + len(x), total + (x - centre).sum(0)
        squares = squares + (x - centre).square().sum(0) + within
    shift = total / count
    assert centre is not None
    return tuple((centre + shift).tolist()), tuple((squares / count - shift.square()).sqrt().tolist())


def _extent(raw: Stored, columns: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column: the least and the greatest value, and whether some value has a fraction."""
    first, found = 0, list[tuple[Tensor, Tensor, Tensor]]()
    for part in _parts(raw):
        refuse(~part.movedim(1, -1).isfinite(), part, "raw", "is no finite number", columns, first)
        values = _flat(part.double())
        found.append((values.amin(0), values.amax(0), (values != values.round()).any(0)))
        first += len(part)
    least, most, fractions = (torch.stack(each) for each in zip(*found, strict=True))
    return least.amin(0), most.amax(0), fractions.any(0)


def _table(raw: Stored, column: int, knots: int) -> tuple[float, ...]:
    """Quantiles of one column at equal steps of the normal distribution, each above the one before."""
    rows = torch.arange(min(len(raw), _SORTED), device="cpu") * len(raw) // min(len(raw), _SORTED)
    values = torch.cat([raw[part][:, column].double().flatten() for part in rows.split(1 << 16)])
    scores = torch.linspace(-REACH, REACH, knots, dtype=torch.float64, device="cpu")
    order = values[: 1 << 23].sort().values  # linear between order statistics, as torch.quantile, which has a limit
    at = torch.special.ndtr(scores) * (len(order) - 1)
    table = torch.lerp(order[at.long()], order[(at.long() + 1).clamp(max=len(order) - 1)], at.frac())
    gap = _GAP * max(float(order[-1] - order[0]), 1e-30)
    found = [float(table[0])]
    for value in table[1:].tolist():
        found.append(max(value, found[-1] + gap))
    return tuple(found)


def _parts(raw: Stored) -> Iterator[Tensor]:
    for rows in torch.arange(len(raw), device="cpu").split(max(1, _VALUES // math.prod(raw.shape[1:]))):
        yield raw[rows]


def _flat(values: Tensor) -> Tensor:
    """(N, D, *sizes) as (N · places, D)."""
    return values.movedim(1, -1).flatten(0, -2)


def _numbers(names: Columns, columns: tuple[str, ...], left: Sequence[int]) -> list[int]:
    """The numbers of columns that are named, ["all"] for those that are left."""
    if list(names) == ["all"]:
        return list(left)
    found = []
    for name in names:
        k = columns.index(name) if name in columns else name
        if not isinstance(k, int) or k not in left:
            known = f"They are {', '.join(columns[:12])}." if columns else f"They are 0 … {max(left)}."
            raise ValueError(f"There is no column {name!r}. {known}")
        found.append(k)
    return sorted(set(found))


def _called(k: int, columns: tuple[str, ...]) -> str:
    return repr(columns[k]) if columns else str(k)
