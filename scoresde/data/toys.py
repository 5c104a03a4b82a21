r"""Distributions in the plane with an exact density: what likelihoods and samplers are held against.

Each is centred, with variance 1 per coordinate on average over the two.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..codecs.scaling import Scaling
from ..noise.rng import Rng
from ..ops.broadcast import host
from .dataset import Dataset, Split


class Toy(abc.ABC):
    """A distribution on R² that can be sampled and whose density is known.

    Attributes:
        name: for logs.
    """

    name: str

    @abc.abstractmethod
    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """(n, 2) float32."""

    @abc.abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,) float64 on the CPU, of x (B, 2)."""

    def dataset(self, *, train: int = 50_000, test: int = 10_000, seed: int = 0) -> Dataset:
        """Independent samples in model coordinates (`Scaling.identity`), so likelihoods compare with `log_prob`.

        Args:
            train, test: samples per split, ≥ 1.
            seed: of all of them.
        """
        train, test = whole(train, "train"), whole(test, "test")
        x = self.sample(train + test, rng=Rng(seed))
        return Dataset(self.name, Split(x[:train]), Split(x[train:]), Scaling.identity(), log_prob=self.log_prob)


def toy_dataset(toy: Toy, train: int = 50_000, test: int = 10_000, seed: int = 0) -> Dataset:
    """`toy.dataset(…)`, as a function that a configuration can name.

    Args:
        toy: the law.
        train, test: points to draw, ≥ 1.
        seed: of the draws.
    """
    return toy.dataset(train=train, test=test, seed=seed)


class EightGaussians(Toy):
    """Eight equal isotropic Gaussians on a circle; variance radius²/2 + std².

    Args:
        std: of each, in (0, 1); the circle has radius √(2 (1 − std²)).
    """

    name = "eight_gaussians"

    def __init__(self, std: float = 0.14):
        self.std = _checked_std(std)
        angles = torch.arange(8, dtype=torch.float64, device="cpu") * (math.pi / 4)
        self.means = math.sqrt(2 * (1 - std**2)) * torch.stack([angles.cos(), angles.sin()], 1)

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        mean = self.means[rng.integers(8, (n,))]
        return (mean + self.std * rng.normal((n, 2), dtype=torch.float64)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        log_weights = torch.full((8,), -math.log(8), dtype=torch.float64, device="cpu")
        return _log_mixture(_checked_points(x), self.means, log_weights, self.std)


class Checkerboard(Toy):
    """Uniform on the dark cells of a board on [−√3, √3]²; the density is 1/6 there and 0 elsewhere.

    Args:
        cells: per side, even and ≥ 2.
    """

    name = "checkerboard"

    def __init__(self, cells: int = 4):
        if cells < 2 or cells % 2:
            raise ValueError(f"cells is an even number of at least 2; got {cells}.")
        self.cells, self.half_width = cells, math.sqrt(3)

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        column = rng.integers(self.cells, (n,))
        row = 2 * rng.integers(self.cells // 2, (n,)) + column % 2
        # kept off the edges, where rounding to float32 could cross into a cell of density 0
        inside = rng.uniform((n, 2), dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        board = torch.stack([column, row], 1) + inside
        return (self.half_width * (2 * board / self.cells - 1)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        x = _checked_points(x)
        cell = ((x / self.half_width + 1) * (self.cells / 2)).floor()
        dark = ((cell >= 0) & (cell < self.cells)).all(1) & (cell.sum(1) % 2 == 0)
        return x.new_full((len(x),), -math.log(2 * self.half_width**2)).masked_fill(~dark, -torch.inf)


class NoisyCurves(Toy):
    """Equal mixture of c(t) + std·ε over curves, t ~ U[low, high], moved to the origin and scaled to variance 1.

    The density is a one-dimensional integral of Gaussians along each curve, by Gauss–Legendre panels of 16 nodes that
    are at most two standard deviations long: log p is exact to round-off near the curve, and to 1e-7 at 28 standard
    deviations from it, where an end of the curve may contribute a boundary layer of a few hundredths of std.

    Args:
        name: for logs.
        curves: t (n,) -> points (n, 2).
        low, high: range of t.
        std: of the noise, in (0, 1).
    """

    def __init__(self, name: str, curves: Sequence[Callable[[Tensor], Tensor]], low: float, high: float, std: float):
        self.name, self.curves, self.low, self.high, self.std = name, curves, low, high, _checked_std(std)
        # any fine rule finds mean and scale; the panels then follow from the largest speed along the scaled curves
        points, weights = self._nodes(512)
        self.mean = weights @ points
        variance = float(weights @ ((points - self.mean) ** 2).sum(1))
        self.scale = math.sqrt(2 * (1 - std**2) / variance)
        steps = self._curves_at(torch.linspace(0, 1, 4097, dtype=torch.float64, device="cpu")).diff(dim=1)
        length = float(steps.norm(dim=2).max()) * 4096 * self.scale
        points, weights = self._nodes(math.ceil(length / (2 * std)))
        self.points, self.log_weights = self.scale * (points - self.mean), weights.log()

    def _curves_at(self, unit: Tensor) -> Tensor:
        """(curves, n, 2) points at `unit` (n,), 0 at `low` and 1 at `high`."""
        return torch.stack([curve(self.low + (self.high - self.low) * unit) for curve in self.curves])

    def _nodes(self, panels: int) -> tuple[Tensor, Tensor]:
        """(K, 2) points on the curves and their (K,) probabilities."""
        u, w = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(16))
        unit = (torch.arange(panels, dtype=torch.float64, device="cpu")[:, None] + (u + 1) / 2).flatten() / panels
        points = self._curves_at(unit).flatten(0, 1)
        return points, (w / (2 * panels * len(self.curves))).repeat(panels * len(self.curves))

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        which = rng.integers(len(self.curves), (n,))
        points = self._curves_at(rng.uniform((n,), dtype=torch.float64))[which, torch.arange(n, device="cpu")]
        noise = rng.normal((n, 2), dtype=torch.float64)
        return (self.scale * (points - self.mean) + self.std * noise).float()

    def log_prob(self, x: Tensor) -> Tensor:
        return _log_mixture(_checked_points(x), self.points, self.log_weights, self.std)


def Moons(std: float = 0.1) -> NoisyCurves:
    """Two interleaved half circles plus isotropic Gaussian noise (the two moons of scikit-learn, rescaled).

    Args:
        std: of the noise, in (0, 1).
    """
    return NoisyCurves("moons", (_upper_moon, _lower_moon), 0.0, math.pi, std)


def SwissRoll(std: float = 0.1) -> NoisyCurves:
    """The spiral (t cos t, t sin t), t ~ U[3π/2, 9π/2], plus isotropic Gaussian noise, rescaled.

    Args:
        std: of the noise, in (0, 1); neighbouring arms are 0.9 apart.
    """
    return NoisyCurves("swiss_roll", (_spiral,), 1.5 * math.pi, 4.5 * math.pi, std)


class Pinwheel(Toy):
    r"""Gaussian blades z ~ N((1, 0), diag(radial_std², tangential_std²)), turned by 2πk/arms + rate·exp(|z|).

    The angle depends on the radius alone, and a turn keeps the radius: the map keeps areas and is undone by the turn
    back, so p(x) = Σ_k p_z(R(−φ_k(|x|)) x)/arms exactly. (After the pinwheel of Johnson et al. 2016, which turns by
    z_1 instead and so changes areas.)

    Args:
        arms: number of blades, ≥ 1.
        radial_std, tangential_std: before rescaling, > 0.
        rate: strength of the twist.
    """

    name = "pinwheel"

    def __init__(self, arms: int = 5, radial_std: float = 0.3, tangential_std: float = 0.1, rate: float = 0.25):
        if arms < 1 or not (radial_std > 0 and tangential_std > 0):
            raise ValueError(f"Expected arms ≥ 1 and stds > 0; got arms={arms}, stds {radial_std}, {tangential_std}.")
        self.arms, self.rate = arms, rate
        self.stds = host([radial_std, tangential_std])
        self.scale = math.sqrt(2 / (1 + radial_std**2 + tangential_std**2))  # E |z|² = 1 + Σ std²

    def _turn(self, z: Tensor, arm: Tensor, sign: int) -> Tensor:
        angle = sign * (2 * math.pi / self.arms * arm + self.rate * z.norm(dim=-1).exp())
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos * z[..., 0] - sin * z[..., 1], sin * z[..., 0] + cos * z[..., 1]], -1)

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        arm = rng.integers(self.arms, (n,)).double()
        z = rng.normal((n, 2), dtype=torch.float64) * self.stds + host([1.0, 0.0])
        return (self.scale * self._turn(z, arm, 1)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        arms = torch.arange(self.arms, dtype=torch.float64, device="cpu")
        z = self._turn((_checked_points(x) / self.scale)[:, None].expand(-1, self.arms, 2), arms, -1)
        u = (z - host([1.0, 0.0])) / self.stds
        log_norm = math.log(2 * math.pi * self.arms) + float(self.stds.log().sum()) + 2 * math.log(self.scale)
        return (-0.5 * (u**2).sum(-1)).logsumexp(1) - log_norm


def _upper_moon(t: Tensor) -> Tensor:
    return torch.stack([t.cos(), t.sin()], -1)


def _lower_moon(t: Tensor) -> Tensor:
    return torch.stack([1 - t.cos(), 0.5 - t.sin()], -1)


def _spiral(t: Tensor) -> Tensor:
    return torch.stack([t * t.cos(), t * t.sin()], -1)


def _log_mixture(x: Tensor, centres: Tensor, log_weights: Tensor, std: float) -> Tensor:
    """log Σ_k w_k N(x; c_k, std² I), (B,), in blocks that bound the memory."""
    scaled, centres = x / std, centres / std
    parts = []
    for part in scaled.split(max(1, 2**18 // len(centres))):
        squares = (part[:, :1] - centres[:, 0]) ** 2 + (part[:, 1:] - centres[:, 1]) ** 2
        parts.append((log_weights - squares / 2).logsumexp(1))
    return torch.cat(parts) - math.log(2 * math.pi * std**2)


def _checked_std(std: float) -> float:
    if not (0 < std < 1):
        raise ValueError(f"std lies in (0, 1), for a distribution of variance 1; got {std}.")
    return float(std)


def _checked_points(x: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"Expected points (B, 2); got shape {tuple(x.shape)}.")
    return x.double().cpu()
