"""How raw data become model data, and the log-volume of that map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .codec import Codec, Edges, decodable, finite, range_of

_MOST = 2**23
_SIGNED, _UNSIGNED = (torch.int8, torch.int16, torch.int32), (torch.uint8, torch.int32)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Scaling(Codec):
    r"""An affine map from raw values to model values in [low, high], dequantised if the raw values are integers.

    Discrete (`levels` = L given, raw integers offset … offset + L − 1): x = low + (high − low)(raw − offset + u)/L with
    u ~ U[0, 1), so each integer owns a bin of equal width and the density of x integrates over the bins to at most the
    probability of the integers (Theis, van den Oord & Bethge 2016, Sec. 3.1). Continuous (`levels` None):
    [raw_low, raw_high] is mapped to [low, high].

    With `log_volume` = Σ_dims log |dx/d raw|, log p(raw) = log p(x) + log_volume in nats, and
    bits/dim = −(log p(x) + log_volume)/(D ln 2). For any [low, high], x uniform on it has
    log p(x) = −D ln(high − low) and log_volume = D ln((high − low)/L), so 8-bit uniform noise costs exactly
    log₂ 256 = 8 bits/dim.

    Args:
        low, high: range of model data, low < high.
        levels: number of integer values, 2 … 2²³ (finer bins than those float32 does not tell apart); None for
            continuous data.
        raw_low, raw_high: range of continuous raw data, raw_low < raw_high; not used with `levels`.
        bounded: refuse continuous raw values outside [raw_low, raw_high], and clamp decoded ones to it. With False
            the range only fixes the affine map.
        offset: the least integer: −32768 with 65536 levels for 16-bit sound; 0 without `levels`.

    Raises:
        ValueError: ranges that are empty or not finite, a number of levels outside its range.
    """

    low: float = -1.0
    high: float = 1.0
    levels: int | None = None
    raw_low: float = 0.0
    raw_high: float = 1.0
    bounded: bool = True
    offset: int = 0

    def __post_init__(self) -> None:
        for low, high, name in ((self.low, self.high, ""), (self.raw_low, self.raw_high, "raw_")):
            if not (-math.inf < low < high < math.inf):
                raise ValueError(f"Expected finite {name}low < {name}high; got {name}low={low}, {name}high={high}.")
        if self.levels is not None:
            if whole(self.levels, "levels", 2, otherwise="None for continuous data") > _MOST:
                raise ValueError(f"levels is at most {_MOST}, which float32 tells apart; got {self.levels}.")
            whole(self.offset, "offset", -(2**63))

    @classmethod
    def identity(cls) -> Scaling:
        """Raw data are model data: no range, unit volume."""
        return cls(0.0, 1.0, None, 0.0, 1.0, bounded=False)

    @property
    def _slope(self) -> float:
        """dx/d raw."""
        return (self.high - self.low) / (self.levels or (self.raw_high - self.raw_low))

    @property
    def model_range(self) -> tuple[float, float] | None:
        """(least, greatest) value of model data; None where they have no bounds."""
        return (self.low, self.high) if self.levels is not None or self.bounded else None

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which `decode` returns raw values: the smallest of some integers that hold them all, or float32."""
        if self.levels is None:
            return torch.float32
        last, kinds = self.offset + self.levels - 1, _SIGNED if self.offset < 0 else _UNSIGNED
        fits = (kind for kind in kinds if torch.iinfo(kind).min <= self.offset and last <= torch.iinfo(kind).max)
        return next(fits, torch.int64)

    @property
    def raw_range(self) -> tuple[float, float] | None:
        """(least, greatest) raw value, None where they have no bounds."""
        if self.levels is not None:
            return self.offset, self.offset + self.levels - 1
        return (self.raw_low, self.raw_high) if self.bounded else None

    @property
    def affine(self) -> tuple[float, float]:
        """(slope, offset) of x = slope · raw + offset, of integers the centre of the bin."""
        return self._slope, self.low - self._slope * (self.offset - 0.5 if self.levels else self.raw_low)

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        if self.levels is not None:
            return f"integers {self.offset} … {self.offset + self.levels - 1}"
        return f"floats in {self.raw_low:g} … {self.raw_high:g}" if self.bounded else "floats"

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses raw values that this scaling was not made for.

        Raises:
            TypeError: integers where floats are expected, or the reverse.
            ValueError: NaN or infinite values, or values outside the range; the range found is named.
        """
        if self.levels is not None:
            self._check_integers(raw, name)
        else:
            self._check_floats(raw, name)

    def _check_integers(self, raw: Tensor, name: str) -> None:
        assert self.levels is not None
        first, last = self.offset, self.offset + self.levels - 1
        expected = f"{self.expects} ({self.levels} levels)"
        if raw.dtype not in _INTEGERS:
            raise TypeError(
                f"{name} holds {raw.dtype}{range_of(raw)}, expected {expected}. Pass the integers as they were "
                "stored; if the data are continuous, use Scaling(levels=None, raw_low=…, raw_high=…)."
            )
        if raw.numel() == 0 or (raw.dtype == torch.uint8 and first <= 0 and last >= 255):
            return
        low, high = (int(value) for value in raw.aminmax())
        if low < first or high > last:
            cure = "Set levels to their number."
            if low < first:
                cure = f"Set offset={low}, or store raw - ({low}); and set levels={high - low + 1} or more."
            raise ValueError(f"{name} holds integers {low} … {high}, expected {expected}. {cure}")

    def _check_floats(self, raw: Tensor, name: str) -> None:
        finite(raw, name)
        if not self.bounded or raw.numel() == 0:
            return
        low, high = (float(value) for value in raw.detach().aminmax())
        slack = 1e-6 * (self.raw_high - self.raw_low)  # the range may have been rounded to float32
        if low < self.raw_low - slack or high > self.raw_high + slack:
            raise ValueError(
                f"{name} holds values {low:.6g} … {high:.6g}, outside the declared raw_low={self.raw_low:g} … "
                f"raw_high={self.raw_high:g}. Declare the true range."
            )

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of `raw`, of its shape, whose values are not looked at.

        Args:
            raw: integers offset … offset + levels − 1, or floating-point values in [raw_low, raw_high].
            rng: draws u for discrete data; None puts every value at the centre of its bin, u = ½.

        Returns:
            float32 for discrete data, else the dtype of `raw`.
        """
        if self.levels is None:
            return self.low + (raw - self.raw_low) * self._slope
        u = 0.5 if rng is None else rng.uniform(raw.shape, dtype=torch.float32, device=raw.device)
        counted = raw.float() if self.offset == 0 else (raw.long() - self.offset).float()
        return self.low + (counted + u) * self._slope

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data: the integer whose bin holds x (the nearest one outside [low, high]), or the
        inverse map.

        Raises:
            TypeError: x is not floating point.
            ValueError: x holds NaN or infinite values.
        """
        decodable(x)
        raw = (x - self.low) / self._slope
        if self.levels is not None:
            counted = raw.floor().clamp(0, self.levels - 1)
            return (counted if self.offset == 0 else counted.long() + self.offset).to(self.raw_dtype)
        raw = raw + self.raw_low
        return raw.clamp(self.raw_low, self.raw_high) if self.bounded else raw

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """Σ_dims log |dx/d raw| of each sample in nats, (B,): add it to log p(x) for log p(raw)."""
        nats = raw[0].numel() * math.log(self._slope)
        return torch.full((len(raw),), nats, dtype=torch.float64, device=x.device)

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> Edges | None:
        """The edges of the bins that raw integers own in model space; None for continuous data."""
        if self.levels is None:
            return None
        k = (raw.long() - self.offset).double()
        low, high = self.low + k * self._slope, self.low + (k + 1) * self._slope
        if open_ends:
            low, high = low.masked_fill(k <= 0, -math.inf), high.masked_fill(k >= self.levels - 1, math.inf)
        return low, high

    def carry(self, edges: Edges | None) -> Edges | None:
        """Edges of another codec's bins in model data."""
        if edges is None or self.levels is not None:
            return None
        low, high = (self.low + (edge - self.raw_low) * self._slope for edge in edges)
        return low, high
