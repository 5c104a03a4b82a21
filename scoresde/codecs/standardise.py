"""Features in units of their own, each by its own map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..noise.rng import Rng
from .codec import Codec, Edges, Stored, decodable, range_of, refuse
from .fit import REACH, Columns, maps_of, moments_of
from .spline import Spline

_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float32, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}
_FEWEST, _MOST = 1e-37, 3e38  # what float32 holds


@dataclass(frozen=True)
class Standardise(Codec):
    r"""Features (D,), or channels (D, *sizes), with mean 0 and deviation 1: x = (f(raw) − mean)/std, each by its own.

    f is the identity, a logarithm, or a smooth increasing map through a table of quantiles, so that what comes out is
    about normal. A column of integers is dequantised: integer k owns [f(k), f(k + 1)], and x is uniform on it, so that
    log p(k) = log p(x) + log((f(k + 1) − f(k))/std), which for f the identity is the usual u ~ U[0, 1). Everything is
    computed in float64. `Standardise.of(raw)` measures all of these numbers.

    Args:
        mean, std: of f(raw), D each, std > 0.
        integers: numbers of the columns that hold integers.
        log: D shifts: f = log(raw − shift), for values above it; None for columns without. () for none.
        quantiles: D tables of K increasing raw values at which f is −reach … reach in equal steps, and between and
            outside of which it is a `Spline`; () for columns without. () for none.
        reach: f of the last quantile, > 0.
        low, high: D bounds of raw values, refused outside of it, and to which decoded ones are clamped; None for
            columns without. () for none.
        columns: D names, for messages; () for their numbers.
        dtype: of raw values, as "float32".
        seen: D pairs, the least and the greatest training value of a column of integers, to which decoded ones are
            clamped; others are not refused. None for columns without. () for none.

    Raises:
        ValueError: numbers that do not fit, a deviation that is not positive, or quantiles that do not increase.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    integers: tuple[int, ...] = ()
    log: tuple[float | None, ...] = ()
    quantiles: tuple[tuple[float, ...], ...] = ()
    reach: float = REACH
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    columns: tuple[str, ...] = ()
    dtype: str = "float32"
    seen: tuple[tuple[float, float] | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mean", "std", "integers", "log", "low", "high", "columns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "quantiles", tuple(map(tuple, self.quantiles)))
        object.__setattr__(self, "seen", tuple(pair and (pair[0], pair[1]) for pair in self.seen))
        d = len(self.mean)
        for name in ("std", "log", "quantiles", "low", "high", "columns", "seen"):
            values = getattr(self, name)
            if len(values) != d and (values or name == "std"):
                raise ValueError(f"Standardise: {name} is of {len(values)} columns, and mean of {d}.")
        if not d or not all(0 < value < float("inf") for value in self.std) or not self.reach > 0:
            raise ValueError(f"Standardise: expected deviations and reach > 0; got {self.std}, {self.reach}.")
        if any(a >= b for table in self.quantiles for a, b in pairwise(table)):
            raise ValueError("Standardise: the quantiles of a column increase.")
        if len({len(table) for table in self.quantiles} - {0}) > 1 or {1, 2} & {len(t) for t in self.quantiles}:
            raise ValueError("Standardise: all tables of quantiles have the same length, 3 at least.")
        if self.dtype not in _DTYPES or not set(self.integers) <= set(range(d)):
            raise ValueError(f"Standardise: dtype is one of {', '.join(_DTYPES)}, and integers are numbers of columns.")

    @classmethod
    def of(
        cls,
        raw: Stored,
        *,
        columns: Sequence[str] = (),
        integers: Columns | None = None,
        log: Columns = (),
        quantile: Columns = (),
        low: Mapping[Any, float] | None = None,
        high: Mapping[Any, float] | None = None,
        knots: int = 33,
    ) -> Standardise:
        """Measured on training samples.

        Args:
            raw: (N, D), or (N, D, *sizes), by whose channels.
            columns: D names; () for their numbers.
            integers: columns, by name or number; None for those in which every value is whole.
            log, quantile: columns that get these maps, by name or number; ("all",) for all that are left.
            low, high: bounds, by name or number.
            knots: K of the tables of quantiles, ≥ 3; fewer where there are fewer than 20 samples for each.

        Raises:
            ValueError: NaN, a column that never varies, or one that is named and not there.
        """
        maps = maps_of(raw, tuple(columns), integers, log, quantile, (low or {}, high or {}), knots)
        d = raw.shape[1]
        mean, std = moments_of(raw, cls((0.0,) * d, (1.0,) * d, **maps))
        return cls(mean, std, **maps)

    def __repr__(self) -> str:
        log, tables = sum(shift is not None for shift in self.log), sum(map(bool, self.quantiles))
        kinds = {"integers": len(self.integers), "logarithms": log, "tables of quantiles": tables}
        said = ", ".join(f"{n} {name}" for name, n in kinds.items() if n)
        return f"Standardise({len(self.mean)} columns{said and ': '}{said})"

    @property
    def discrete(self) -> bool:
        """Whether some column holds integers."""
        return bool(self.integers)

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which `decode` returns raw values."""
        return _DTYPES[self.dtype]

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        whole = f", {len(self.integers)} of them of integers" if self.integers else ""
        return f"{len(self.mean)} columns of numbers{whole}"

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses another number of columns, NaN, integers that are not whole, and what a bound or logarithm excludes.

        Raises:
            TypeError, ValueError: it is one of these; names column and row.
        """
        d = len(self.mean)
        if raw.ndim < 2 or raw.shape[1] != d:
            raise ValueError(f"{name} has the shape {tuple(raw.shape)}, expected (N, {d}) or (N, {d}, *sizes).")
        if raw.dtype == torch.bool or raw.is_complex():
            raise TypeError(f"{name} holds {raw.dtype}, expected numbers.")
        if not raw.is_floating_point() and len(self.integers) < d:
            raise TypeError(
                f"{name} holds {raw.dtype}{range_of(raw)}, expected floating-point values in {d - len(self.integers)} "
                f"of {d} columns. Integers are points, which have no density: name their columns in integers=."
            )
        values = raw.movedim(1, -1)
        refuse(~values.isfinite(), raw, name, "is no finite number: remove the row, or fill it in", self.columns)
        if self.integers:
            kinds = self._mask(values)
            why = "is not whole, and the column holds integers"
            refuse(kinds & (values != values.round()), raw, name, why, self.columns)
        for bounds, side in ((self.low, "below"), (self.high, "above")):
            if bounds:
                limit = self._row(bounds, float("-inf" if side == "below" else "inf"), values)
                outside = values.double() < limit if side == "below" else values.double() > limit
                refuse(outside, raw, name, f"is {side} its bound", self.columns)
        if self.log:
            shifts = self._row(self.log, float("-inf"), values)
            refuse(values.double() <= shifts, raw, name, "has no logarithm", self.columns)

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of `raw`, whose values are not looked at: float64 for float64, else float32."""
        values = raw.double().movedim(1, -1)
        x = self._standard(values)[0]
        if self.integers:
            u = values.new_tensor(0.5)
            if rng is not None:
                u = rng.uniform(raw.shape, dtype=torch.float32, device=raw.device).to(values).movedim(1, -1)
            x = torch.where(self._mask(values), x + u * (self._standard(values + 1)[0] - x), x)
        return x.movedim(-1, 1).to(raw.dtype if raw.dtype == torch.float64 else torch.float32)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data: the integer whose bin holds x, the inverse of f elsewhere, both within bounds."""
        decodable(x)
        given = x.double().movedim(1, -1)
        y = given * self._row(self.std, 1.0, given) + self._row(self.mean, 0.0, given)
        raw = y.clone()
        if self.quantiles:
            tabled = [k for k, table in enumerate(self.quantiles) if table]
            raw[..., tabled] = self._spline(y).inverse(y[..., tabled])
        for k, shift in enumerate(self.log):
            if shift is not None:
                raw[..., k] = shift + y[..., k].exp().clamp(_FEWEST, _MOST)
        if self.integers:
            near = raw.floor()  # or a neighbour, where rounding has crossed an edge
            over, under = self._standard(near + 1)[0] <= given, self._standard(near)[0] > given
            raw = torch.where(self._mask(raw), near + over.double() - under.double(), raw)
        limits = (self._row(self.low, -_MOST, raw), self._row(self.high, _MOST, raw))
        if self.seen:
            least, most = (tuple(pair and pair[side] for pair in self.seen) for side in (0, 1))
            raw = raw.clamp(self._row(least, -_MOST, raw), self._row(most, _MOST, raw))
        kind = torch.promote_types(x.dtype, torch.float32) if self.raw_dtype.is_floating_point else self.raw_dtype
        return raw.clamp(*limits).movedim(-1, 1).to(kind)

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """Σ log |dx/d raw| of each sample, of integers the logarithm of the width of their bin, (B,) nats."""
        values = raw.double().movedim(1, -1)
        here, volume = self._standard(values)
        if self.integers:
            kinds = self._mask(values)
            width = (self._standard(values + 1)[0] - here).where(kinds, 1.0)
            volume = torch.where(kinds, width.log(), volume)
        return volume.flatten(1).sum(1)

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> Edges | None:
        """The edges of the bins of integers, both the value itself in other columns; None if there are no integers."""
        if not self.integers:
            return None
        values = raw.double().movedim(1, -1)
        low = self._standard(values)[0]
        high = torch.where(self._mask(values), self._standard(values + 1)[0], low)
        if open_ends:
            kinds = self._mask(values)
            low = low.masked_fill(kinds & (values <= self._row(self.low, float("-inf"), values)), float("-inf"))
            high = high.masked_fill(kinds & (values >= self._row(self.high, float("inf"), values)), float("inf"))
        return low.movedim(-1, 1), high.movedim(-1, 1)

    def carry(self, edges: Edges | None) -> Edges | None:
        """Edges of another codec's bins; every map here increases."""
        if edges is None or self.integers:
            return None
        low, high = (self._standard(edge.movedim(1, -1))[0].movedim(-1, 1) for edge in edges)
        return low, high

    def _standard(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(f(v) − mean)/std of v (…, D) float64, and the logarithm of its slope."""
        std = self._row(self.std, 1.0, values)
        y, slope = values, -std.log().expand_as(values)
        if self.quantiles:
            tabled = [k for k, table in enumerate(self.quantiles) if table]
            y, slope = y.clone(), slope.clone()
            y[..., tabled], own = self._spline(values)(values[..., tabled])
            slope[..., tabled] = slope[..., tabled] + own
        if self.log:
            logged = [k for k, shift in enumerate(self.log) if shift is not None]
            y, slope = y.clone(), slope.clone()
            y[..., logged] = (values - self._row(self.log, 0.0, values))[..., logged].log()
            slope[..., logged] = slope[..., logged] - y[..., logged]
        return (y - self._row(self.mean, 0.0, values)) / std, slope

    def _spline(self, like: Tensor) -> Spline:
        tables = like.new_tensor([table for table in self.quantiles if table])
        ends = torch.linspace(-self.reach, self.reach, tables.shape[1], dtype=tables.dtype, device=tables.device)
        return Spline(tables, ends)

    def _mask(self, like: Tensor) -> Tensor:
        """(D,) bool: the columns of integers."""
        return torch.tensor([k in self.integers for k in range(len(self.mean))], dtype=torch.bool, device=like.device)

    @staticmethod
    def _row(numbers: Sequence[float | None], otherwise: float, like: Tensor) -> Tensor:
        """Numbers of each column, (D,) float64; () where there is none."""
        filled = [otherwise if number is None else number for number in numbers] or otherwise
        return torch.tensor(filled, dtype=torch.float64, device=like.device)
