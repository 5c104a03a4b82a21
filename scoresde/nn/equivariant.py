"""An equivariant network for sets of points, such as the atoms of a molecule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive, sizes, whole
from ..diffusion.conditions import Cond
from ..ops.centred import centred_basis
from .conditioning import Conditioning, Options
from .layers import linear

_SOFT = 1e-6  # added to squared distances, so that a point has derivatives where another lies


class Round(nn.Module):
    """One round of an EGNN: m_ij of points i and j, which moves them and, but for the last, changes their features."""

    def __init__(self, width: int, radial: int, last: bool):
        super().__init__()
        self.last = last
        self.modulation = linear(width, width)
        self.here, self.there = linear(width, width), linear(width, width)
        self.apart, self.inner = linear(radial + 1, width), linear(width, width)
        self.pull_in, self.pull = linear(width, width), linear(width, 1)
        nn.init.zeros_(self.pull.weight)
        if not last:
            self.gate, self.sum = linear(width, 1), linear(width, width)
            self.own, self.outer = linear(width, width), linear(width, width)

    def forward(self, h: Tensor, x: Tensor, bumps: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """(h, x) of points h (B, N, width), x (B, N, d); `bumps` (B, N, N, radial) are their distances at the start."""
        apart, square = _differences(x)
        h = h + self.modulation(emb)[:, None]
        m = self.here(h)[:, :, None] + self.there(h)[:, None] + self.apart(torch.cat([bumps, square], -1))
        m = F.silu(self.inner(F.silu(m)))
        scale = x.shape[1] ** -0.5
        pull = self.pull(F.silu(self.pull_in(m))) / (1 + square.sqrt())
        x = x + scale * (apart * pull).sum(2)
        if self.last:
            return h, x
        told = scale * (m * self.gate(m).sigmoid()).sum(2)
        return h + self.outer(F.silu(self.own(h) + self.sum(told))), x


class EGNN(nn.Module):
    r"""F = x_L − x_0, of rounds of messages between all pairs of points (Satorras et al. 2021; for diffusion,
    Hoogeboom et al. 2022); zero output at the start.

        m_ij = φ(h_i, h_j, ‖x_i − x_j‖),   x_i ← x_i + N^{−1/2} Σ_j (x_i − x_j)/(1 + ‖x_i − x_j‖) ψ(m_ij),
        h_i ← h_i + χ(h_i, N^{−1/2} Σ_j gate(m_ij) m_ij, c_noise, cond)

    F(R x) = R F(x) for every rotation and reflection R, F does not change when all points are shifted, and follows
    an exchange of points of one number. Distances enter squared and as `radial` Gaussians of width reach/(radial − 1).

    Args:
        event_shape: (N, d), points and their coordinates; (N − 1, d) with `centred`.
        numbers: N whole numbers ≥ 0, one for each point: points that differ in it are of different kinds, as atoms
            with their atomic numbers are. () makes all of them alike.
        centred: x comes in the N − 1 coordinates of `scoresde.codecs.Centred`, and F goes out in them. Without it F
            is (N, d), and its mean over the points is zero.
        width: of the features of points and pairs, even.
        depth: number of rounds, ≥ 1.
        radial: number of Gaussians, ≥ 2.
        reach: the distance of the last of them, in units of c_in x, which has about unit variance; > 0.
        conditioning: embedding and embedding_scale, the waves that carry c_noise, see `Conditioning`; classes,
            cond_dim, cond_image and cond_dropout, the conditions there are, see `Conditions`.

    Raises:
        ValueError: arguments out of range, or inputs of another shape.
    """

    basis: Tensor
    kinds: Tensor
    centres: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        numbers: Sequence[int] = (),
        centred: bool = True,
        width: int = 64,
        depth: int = 4,
        radial: int = 32,
        reach: float = 5.0,
        **conditioning: Unpack[Options],
    ):
        super().__init__()
        self.event_shape, self.centred = sizes(event_shape, "event_shape"), bool(centred)
        if len(self.event_shape) != 2:
            raise ValueError(f"event_shape is (points, coordinates), such as (9, 3); got {self.event_shape}.")
        points = self.event_shape[0] + self.centred
        kinds = [whole(number, "Each of numbers", 0) for number in numbers] or [0] * points
        if len(kinds) != points:
            less = f" (centred=true: {points} points less their centre)" if self.centred else ""
            raise ValueError(
                f"numbers has one entry for each of the {points} points of samples {self.event_shape}{less}; got "
                f"{len(kinds)}."
            )
        depth, radial = (
            whole(depth, "depth, the number of rounds,"),
            whole(radial, "radial, the number of Gaussians,", 2),
        )
        reach = positive(reach, "reach", "a distance")
        self.conditioning = Conditioning(width, **conditioning)
        if "tokens" in self.conditioning.conditions.shapes:
            raise ValueError("An EGNN has no attention to read tokens with: take cond_tokens=0.")
        different = sorted(set(kinds))
        self.register_buffer("kinds", torch.tensor([different.index(kind) for kind in kinds]), persistent=False)
        self.register_buffer("centres", torch.linspace(0, reach, radial), persistent=False)
        basis = centred_basis(points) if self.centred else torch.eye(points, dtype=torch.float64)
        self.register_buffer("basis", basis, persistent=False)
        self.kind = nn.Embedding(len(different), width)
        self.rounds = nn.ModuleList(Round(width, radial, k == depth) for k in range(1, depth + 1))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, *event_shape) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This EGNN is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        emb = self.conditioning(c_noise, cond, x)
        basis = self.basis.to(x.dtype)
        start = place = _combined(basis.mT, x)
        _, square = _differences(start)
        bumps = (-0.5 * ((square.sqrt() - self.centres) / self.centres[1]).square()).exp()
        h = self.kind(self.kinds).to(x.dtype).expand(len(x), -1, -1)
        for one in self.rounds:
            h, place = one(h, place, bumps, emb)
        moved = place - start
        return _combined(basis, moved - moved.mean(1, keepdim=True)).to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditioning.conditions.null(cond)


def _combined(weights: Tensor, x: Tensor) -> Tensor:
    """weights (M, N) @ x (B, N, d), a product that autocast leaves as it is: bfloat16 would move atoms by 1 %."""
    return (weights[:, :, None] * x[:, None]).sum(2)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i − x_j (B, N, N, d) of points x (B, N, d), and their squared lengths (B, N, N, 1)."""
    apart = x[:, :, None] - x[:, None]
    return apart, apart.square().sum(-1, keepdim=True) + _SOFT
