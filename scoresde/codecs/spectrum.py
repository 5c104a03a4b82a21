"""Sound as magnitudes and phases of its spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .codec import Codec, finite

_PHASE = math.sqrt(3) / math.pi  # makes a phase that is uniform in (−π, π] one of unit variance


@dataclass(frozen=True)
class Spectrum(Codec):
    r"""Magnitudes, logarithmic, and phases of the modified discrete cosine transform of signals (C, L).

    The transform (Princen & Bradley 1986) of M bands takes windows of 2M values, M apart, under a sine. It is an
    orthonormal map of the L values, seen as a circle: the last window goes on at the first value. Two neighbouring
    bands (a, b) = r (cos θ, sin θ) become u = ½ log(r² + floor²), which is smooth in time and frequency where a and b
    change their signs from window to window, and θ. Both are scaled to about unit variance: (u − mean_k) / spread_k
    and θ √3/π. As du dθ = da db / (r² + floor²), the volume is exact, also in silence. Channel c·M + k of model data,
    k < M/2, is u of pair k of channel c, and channel c·M + M/2 + k is θ.

    Args:
        mean, spread: of u of each of the M/2 pairs, spread > 0.
        floor: > 0; magnitudes far below it are all alike.

    Raises:
        ValueError: no bands, or numbers that are not finite and, but for `mean`, positive.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    floor: float

    def __post_init__(self) -> None:
        for name in ("mean", "spread"):  # a run folder keeps tuples as lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        positive = all(0 < v < math.inf for v in (*self.spread, self.floor))
        if (
            not self.mean
            or len(self.spread) != len(self.mean)
            or not positive
            or not all(map(math.isfinite, self.mean))
        ):
            raise ValueError(
                f"mean and spread hold a number for each pair of bands, spread and floor are positive; got mean="
                f"{self.mean}, spread={self.spread}, floor={self.floor}."
            )

    @classmethod
    def of(cls, raw: Tensor, bands: int, floor: float = 2.0**-15) -> Spectrum:
        """The codec whose `mean` and `spread` are those of signals (N, C, L), L a multiple of `bands`, an even number.
        The default of `floor` is the step of 16-bit sound in [−1, 1].

        Raises:
            ValueError: another length, or an odd number of bands.
        """
        if whole(bands, "bands", 2) % 2:
            raise ValueError(f"bands is an even number; got {bands}.")
        u = _polar(_transformed(raw.double(), _checked(raw.shape[1:], bands)), floor)[0].transpose(2, 3).flatten(0, 2)
        spread = u.std(0, correction=0)
        return cls(tuple(u.mean(0).tolist()), tuple(torch.where(spread > 1e-6, spread, 1.0).tolist()), floor)

    @property
    def bands(self) -> int:
        """M."""
        return 2 * len(self.mean)

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses what is no signal (B, C, L) of finite floats, with L a multiple of the number of bands.

        Raises:
            TypeError: integers.
            ValueError: another shape, NaN or infinite values.
        """
        finite(raw, name)
        _checked(raw.shape[1:], self.bands)

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """(B, C·M, L/M) of signals (B, C, L)."""
        mean, spread = self._scales(raw)
        u, phase = _polar(_transformed(raw, self.bands), self.floor)
        return torch.cat([(u - mean) / spread, phase * _PHASE], 2).flatten(1, 2)

    def decode(self, x: Tensor) -> Tensor:
        """Signals (B, C, L) of model data (B, C·M, L/M); a u that is less than that of silence is silence.

        Raises:
            ValueError: NaN or infinite values.
        """
        finite(x, "model data")
        phase = x.unflatten(1, (-1, 2, len(self.mean)))[:, :, 1] / _PHASE
        power = (2 * self._log_magnitude(x)).clamp(max=80).exp()  # what a bad sample asks for beyond is not in float32
        r = (power - self.floor**2).clamp(min=0).sqrt()
        c = torch.stack([r * phase.cos(), r * phase.sin()], 3).flatten(2, 3)
        first, second = (c.transpose(2, 3) @ _windows(self.bands, c).T).chunk(2, 3)
        return (first + second.roll(1, 2)).flatten(2)

    def layout(self, x: Tensor) -> Tensor:
        """Signals (B, C, L) of model data within four deviations: those of noise would be too loud for float32."""
        return self.decode(x.clamp(-4, 4))

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """Σ log(√3/π / spread) − 2u of each sample, (B,) float64 nats."""
        spread = self._scales(x.double())[1]
        return (math.log(_PHASE) - spread.log() - 2 * self._log_magnitude(x.double())).flatten(1).sum(1)

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """(C·M, L/M) of (C, L)."""
        _checked(raw_shape, self.bands)
        return raw_shape[0] * self.bands, raw_shape[1] // self.bands

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        return f"floats (C, L) with L a multiple of {self.bands}"

    def _log_magnitude(self, x: Tensor) -> Tensor:
        """u (B, C, M/2, L/M) of model data."""
        mean, spread = self._scales(x)
        return x.unflatten(1, (-1, 2, len(self.mean)))[:, :, 0] * spread + mean

    def _scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """mean and spread, (M/2, 1) each, of the dtype and on the device of `like`."""
        mean, spread = (like.new_tensor(values)[:, None] for values in (self.mean, self.spread))
        return mean, spread


def _checked(shape: Sequence[int], bands: int) -> int:
    """`bands`, which signals of `shape` can be cut into."""
    if len(shape) != 2 or shape[1] % bands:
        raise ValueError(f"The spectrum of {bands} bands is of signals (C, L), L a multiple; got {tuple(shape)}.")
    return bands


def _windows(bands: int, like: Tensor) -> Tensor:
    """(2M, M): the values of a window -> those of a frame."""
    n, k = (torch.arange(size, dtype=torch.float64, device=like.device) + 0.5 for size in (2 * bands, bands))
    waves = (math.pi / bands * (n[:, None] + bands / 2) * k).cos() * math.sqrt(2 / bands)
    return ((math.pi / (2 * bands) * n).sin()[:, None] * waves).to(like.dtype)


def _transformed(raw: Tensor, bands: int) -> Tensor:
    """(B, C, M, L/M) of signals (B, C, L)."""
    frames = raw.unflatten(2, (-1, bands))
    return (torch.cat([frames, frames.roll(-1, 2)], 3) @ _windows(bands, raw)).transpose(2, 3)


def _polar(c: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(u, θ) of pairs of neighbouring bands, (B, C, M/2, L/M) each."""
    a, b = c[:, :, 0::2], c[:, :, 1::2]
    return (a.square() + b.square() + floor**2).log() / 2, torch.atan2(b, a)
