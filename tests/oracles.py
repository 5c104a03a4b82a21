"""What the tests share: every SDE, mixtures whose every quantity is known, and times that cover an SDE's range.

Imported as `from oracles import …` (pytest puts this folder on the path).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scoresde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineSDE,
    GaussianMixtureDenoiser,
    RectifiedFlow,
    Rng,
    SubVPSDE,
    TableSDE,
)

EVENT_SHAPES: tuple[tuple[int, ...], ...] = ((2,), (3, 4), (3, 4, 4), (2, 3, 2, 2))
"""One event shape of each rank: (D,), (C, L), (C, H, W), (C, D, H, W)."""


def ddpm_alpha_bar(steps: int = 1000) -> Tensor:
    """ᾱ_i of the linear β table of Ho et al. 2020, sec. 4, float64 (steps,)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def ncsn_sigmas(levels: int = 232) -> Tensor:
    """The geometric noise levels of Song & Ermon 2020 for CIFAR-10, float64 (levels,), rising."""
    return torch.logspace(math.log10(0.01), math.log10(50.0), levels, dtype=torch.float64)


def closed_form_sdes() -> dict[str, SDE]:
    """Every SDE whose marginal is a smooth closed form."""
    return {
        "vp": VPSDE(),
        "subvp": SubVPSDE(),
        "ve": VESDE(),
        "cosine": CosineSDE(),
        "edm": EDMSDE(),
        "flow": RectifiedFlow(),
    }


def all_sdes() -> dict[str, SDE]:
    """Every SDE by a short name: the closed forms, a DDPM table of ᾱ and an NCSN table of σ."""
    tables: dict[str, SDE] = {"ddpm": TableSDE(ddpm_alpha_bar()), "ncsn": TableSDE(sigmas=ncsn_sigmas())}
    return closed_form_sdes() | tables


def in_turn(sdes: dict[str, SDE], values: Sequence[Any], each: int) -> list[Any]:
    """Parameters (SDE, value): `each` of the values with every SDE, and other ones with the next SDE.

    For a test of two things that meet nowhere in the code: both vary in full, their combinations in part.
    """
    stride = len(values) // each
    chosen = [(name, (i + k * stride) % len(values)) for i, name in enumerate(sdes) for k in range(each)]
    ids = [value if isinstance(value, str) else str(v) for v, value in enumerate(values)]
    return [pytest.param(sdes[name], values[v], id=f"{name}-{ids[v]}") for name, v in chosen]


def times(sde: SDE, n: int = 7, *, ends: bool = False) -> Tensor:
    """n times spread over both t and log-SNR, float64, rising: inside (t_min, t_max), or with both ends.

    For tables none lies on an entry, where the rates jump.
    """
    start, stop = (torch.tensor(end, dtype=torch.float64) for end in (sde.t_min, sde.t_max))
    u = (torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n
    level = sde.log_snr(start) + u[::2] * (sde.log_snr(stop) - sde.log_snr(start))
    inner = torch.cat([sde.time(level), start + u[1::2] * (stop - start)]).sort().values
    if isinstance(sde, TableSDE):
        inner = (torch.floor(inner * len(sde)) + 0.37) / len(sde)
        inner = inner.clamp((1 + 0.37) / len(sde), 1 - 0.63 / len(sde))
    return torch.cat([start[None], inner, stop[None]]) if ends else inner


def mixture(
    sde: SDE,
    event_shape: Sequence[int],
    components: int = 3,
    seed: int = 0,
    covariance: str = "full",
) -> GaussianMixtureDenoiser:
    """A random mixture over `event_shape`, variances between about 0.05 and 0.5, means of order 1, unequal weights.

    `covariance`: "full", "diagonal" or "isotropic".
    """
    generator = torch.Generator().manual_seed(seed)
    dims = math.prod(event_shape)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = draw(components, *event_shape)
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    if covariance == "isotropic":
        covs = 0.05 + 0.4 * torch.rand(components, generator=generator, dtype=torch.float64)
    elif covariance == "diagonal":
        covs = 0.05 + 0.4 * torch.rand(components, *event_shape, generator=generator, dtype=torch.float64)
    elif covariance == "full":
        root = draw(components, dims, dims) * math.sqrt(0.2 / dims)
        covs = root @ root.mT + 0.05 * torch.eye(dims, dtype=torch.float64)
    else:
        raise ValueError(f"covariance is 'full', 'diagonal' or 'isotropic'; got {covariance!r}.")
    return GaussianMixtureDenoiser(means, covs, weights, sde)


def component_covariances(denoiser: GaussianMixtureDenoiser) -> Tensor:
    """C_k of each component as a full matrix, float64 (K, D, D)."""
    variances = denoiser.variances.expand_as(denoiser.means)
    if denoiser.basis is None:
        return torch.diag_embed(variances)
    return denoiser.basis @ torch.diag_embed(variances) @ denoiser.basis.mT


def data_moments(denoiser: GaussianMixtureDenoiser) -> tuple[Tensor, Tensor]:
    """Exact mean (D,) and covariance (D, D) of the data, float64, over the flattened event."""
    weights = denoiser.log_weights.exp()
    mean = weights @ denoiser.means
    centred = denoiser.means - mean
    between = torch.einsum("k,ki,kj->ij", weights, centred, centred)
    return mean, torch.einsum("k,kij->ij", weights, component_covariances(denoiser)) + between


def marginal_moments(denoiser: GaussianMixtureDenoiser, t: float) -> tuple[Tensor, Tensor]:
    """Exact mean (D,) and covariance (D, D) of x_t, float64."""
    alpha, sigma = denoiser.sde.marginal(torch.tensor(t, dtype=torch.float64))
    mean, cov = data_moments(denoiser)
    return alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=torch.float64)


def mean_and_stderr(values: Tensor) -> tuple[float, float]:
    """Mean of independent draws (n,) and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def segments(sde: SDE, n: int = 256, start: float | None = None) -> Tensor:
    """Edges of n pieces of [start, t_max] of equal log-SNR, rising, float64; the entries of a table instead."""
    start = sde.t_min if start is None else start
    if isinstance(sde, TableSDE):
        edges = torch.arange(1, len(sde) + 1, dtype=torch.float64) / len(sde)
        first = torch.tensor([start], dtype=torch.float64)
        return torch.cat([first, edges[edges > start + 1e-12]])
    ends = torch.tensor([start, sde.t_max], dtype=torch.float64)
    low, high = sde.log_snr(ends)
    edges = sde.time(low + torch.linspace(0, 1, n + 1, dtype=torch.float64) * (high - low))
    edges[0], edges[-1] = ends
    return edges


def gauss_legendre(edges: Tensor, order: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes and weights (pieces, order) of ∫ dt over each piece between `edges`: exact for degree 2·order − 1.

    No node lies on an edge, so functions that jump there are integrated as well as smooth ones.
    """
    nodes, weights = (torch.tensor(values) for values in np.polynomial.legendre.leggauss(order))
    half = 0.5 * (edges[1:] - edges[:-1])[:, None]
    return edges[:-1, None] + half * (1 + nodes), half * weights


def grid(sde: SDE, n: int) -> Tensor:
    """n equal steps in log-SNR over λ ∈ [−3, 3], where a density turns from one Gaussian into its mixture."""
    return sde.time(torch.linspace(-3, 3, n + 1, dtype=torch.float64))


def start(denoiser: GaussianMixtureDenoiser, t: Tensor, n: int = 32) -> Tensor:
    """Exact draws of x_t, float64 (n, *event)."""
    x0 = denoiser.sample(n, rng=Rng(0), dtype=torch.float64)
    return denoiser.sde.perturb(x0, t, Rng(1).normal(x0.shape, dtype=torch.float64))


def slope(errors: list[float]) -> float:
    """log2 of the gain by doubling the steps: the order, if the error is C h^p."""
    coarse, fine = errors
    return math.log2(coarse / fine)


class Fixed(Rng):
    """An Rng whose every normal is `value`: it makes the coefficient of a step's noise visible."""

    def __init__(self, value: float):
        super().__init__(0)
        self.value = value

    def normal(self, shape, *, dtype=None, device=None):
        return torch.full(tuple(shape), self.value, dtype=dtype, device=device)


class Script(Rng):
    """An Rng whose k-th draw is the k-th of `values`: numbers, or tensors (B, 1)."""

    def __init__(self, values: Iterable[Tensor | float]):
        super().__init__(0)
        self.values = list(values)

    def normal(self, shape, *, dtype=None, device=None):
        return torch.as_tensor(self.values.pop(0), dtype=dtype, device=device).expand(tuple(shape))


def ring(sde: SDE) -> GaussianMixtureDenoiser:
    """Eight equal Gaussians of std 0.05 on the unit circle: three scales of structure, and hard choices between."""
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixtureDenoiser(torch.stack([angle.cos(), angle.sin()], 1), 0.05**2, torch.ones(8), sde)
