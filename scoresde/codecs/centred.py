"""Points whose centre does not matter."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import positive
from ..noise.rng import Rng
from ..ops.centred import centred_basis
from .codec import Codec, Stored, decodable, finite

_basis = functools.lru_cache(maxsize=16)(centred_basis)


@dataclass(frozen=True)
class Centred(Codec):
    r"""N points (N, d) with their centre at 0 become N − 1 (N − 1, d), without loss: x = H raw/scale.

    H (`centred_basis`) is an orthonormal basis of the N-tuples of sum 0, so distances and angles in d·N dimensions are
    kept, and a rotation of the points is the same rotation of x: encode(raw Rᵀ) = encode(raw) Rᵀ. Centred points fill a
    subspace of dimension d(N − 1); the density of raw data is the one on that subspace, in its own Euclidean measure:
    log p(raw) = log p(x) − d(N − 1) log scale. (In all d·N dimensions there is none.) Masses count for nothing.

    Args:
        scale: raw units per unit of x, > 0; `Centred.of` measures the deviation of the training data.
        slack: how far the centre may be from 0, as a share of the largest coordinate of the sample.
        move: take samples with any centre, and move them: their density is that of the moved ones.

    Raises:
        ValueError: a scale or slack that is not positive.
    """

    scale: float = 1.0
    slack: float = 1e-3
    move: bool = False

    def __post_init__(self) -> None:
        positive(self.scale, "scale", "a length in raw units")
        positive(self.slack, "slack", "a share of the largest coordinate")

    @classmethod
    def of(cls, raw: Stored, *, slack: float = 1e-3, move: bool = False) -> Centred:
        """The codec whose model data have variance 1 on average over all entries, for points (M, N, d)."""
        unit, squares = cls(1.0, slack, move), 0.0
        for part in torch.arange(len(raw), device="cpu").split(4096):
            rows = raw[part]
            unit.check(rows)
            squares += float(unit.transform(rows.double()).square().mean((1, 2)).sum())
        if not squares > 0:
            raise ValueError("All points of all samples lie in one place: there is no scale to measure.")
        return cls(math.sqrt(squares / len(raw)), slack, move)

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses what is no points, NaN, and samples with another centre than 0."""
        finite(raw, name)
        self.encoded_shape(raw.shape[1:])
        if self.move:
            return
        off = raw.double().mean(1).norm(dim=1) > self.slack * raw.abs().amax((1, 2)).double()
        if bool(off.any()):
            row = int(off.nonzero()[0])
            centre = ", ".join(f"{value:.4g}" for value in raw[row].double().mean(0).tolist())
            raise ValueError(
                f"{name}: {int(off.sum())} of {len(raw)} samples have another centre than 0, the first in row {row}: "
                f"({centre}). Store them centred, raw - raw.mean(1, keepdim=True), or set move=True."
            )

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """(N − 1, d).

        Raises:
            ValueError: samples that are not two points (N, d) or more.
        """
        if len(raw_shape) != 2 or raw_shape[0] < 2:
            raise ValueError(f"Centred takes samples of N ≥ 2 points (N, d); got {tuple(raw_shape)}.")
        return (raw_shape[0] - 1, raw_shape[1])

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """H raw/scale, (B, N − 1, d)."""
        return _basis(raw.shape[1]).to(raw) @ raw / self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Points (B, N, d) with their centre at 0."""
        decodable(x)
        return self.layout(x) * self.scale

    def layout(self, x: Tensor) -> Tensor:
        """N points, in units of x."""
        return _basis(x.shape[1] + 1).to(x).T @ x

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """−d(N − 1) log scale of each sample."""
        nats = -x[0].numel() * math.log(self.scale)
        return torch.full((len(x),), nats, dtype=torch.float64, device=x.device)

    @property
    def subspace(self) -> bool:
        """Raw data fill a subspace of d(N − 1) dimensions."""
        return True

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        return "points (N, d)" if self.move else "points (N, d) with their centre at 0"
