r"""The arithmetic of multistep methods: what multiplies x_t, the noise and the remembered values, from the times alone.

The reverse family dx = [f x − ½(1 + η²) g² score] dt + η g dw has the law of the forward process for every η ≥ 0. In
y = x/α, ς = σ/α it reads dy = (1 + η²) ε̂ dς with noise of variance 2η²ς |dς|. A Gaussian of standard deviation c is
taken as the known part of the data: with q = c²/(1 + c²), D = q + (1 − q) ς² and M = α√D,

    V = [(1 − q) σ x̂_0 − q α ε̂]/M

is left to predict, and everything else is solved exactly:

    x_s = (M_s/M_t)(D_s/D_t)^{η²/2} x_t + (1 + η²) α_s ∫_{ς_s}^{ς_t} (D_s/D)^{(1 + η²)/2} D^{−½} V dς + std z,
    std² = M_s² [1 − (D_s/D_t)^{η²}]/(1 − q).

c = 0 is data prediction, V = x̂_0 (DPM-Solver++, UniPC, SA-Solver); c = ∞ is noise prediction, V = −ε̂ (DEIS, iPNDM);
and c = σ_data has V = 0 on Gaussian data of that standard deviation, so that only what is not Gaussian is integrated.

DPM-Solver++ 2M (Lu et al. 2022) is q = η = 0: D = ς², M = σ, V = x̂_0. In ℓ = −log ς (their λ), with h = ℓ_s − ℓ_t and r
the time before t, their prop. 4.1, the line through the two latest values, and their alg. 2 are

    x_s = (σ_s/σ_t) x_t + α_s ∫_{ℓ_t}^{ℓ_s} e^{ℓ − ℓ_s} x̂_0(ℓ) dℓ,   x̂_0(ℓ) ≈ x̂_0(t) + (ℓ − ℓ_t) Δ,
    Δ = [x̂_0(t) − x̂_0(r)]/(ℓ_t − ℓ_r),   ∫ e^{ℓ − ℓ_s}(ℓ − ℓ_t) dℓ = h − 1 + e^{−h} ≈ ½ h (1 − e^{−h}),
    x_s = (σ_s/σ_t) x_t + α_s (1 − e^{−h}) [x̂_0(t) + ½ h Δ].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..ode import lagrange
from ..ops import lincomb


class Knot(NamedTuple):
    """A time of the grid as these formulas see it; tensors are () or (B,)."""

    alpha: Tensor
    sigma: Tensor
    level: Tensor  # ℓ = log(α/σ), which rises towards the data
    norm: Tensor  # M = √(q α² + (1 − q) σ²)
    q: float

    @property
    def is_pure_x0(self) -> bool:
        return self.q == 0

    @property
    def is_pure_eps(self) -> bool:
        return self.q == 1

    def value(self, p: Prediction) -> Tensor:
        """V of a prediction at this time; for pure ε it is ε̂ = −V, which need not be copied."""
        if self.is_pure_x0:
            return p.x0
        if self.is_pure_eps:
            return p.eps
        x0, eps = (1 - self.q) * self.sigma / self.norm, -self.q * self.alpha / self.norm
        return lincomb(((x0, p.x0), (eps, p.eps)))


def knots(sde: SDE, times: Tensor, q: float) -> list[Knot]:
    """The knots of `times` (n,) or (n, B)."""
    alpha, sigma = sde.marginal(times)
    norm = (sigma, alpha)[int(q)] if q in (0, 1) else (q * alpha**2 + (1 - q) * sigma**2).sqrt()
    columns = (alpha, sigma, (alpha / sigma).log(), norm)
    return [Knot(*row, q) for row in zip(*columns, strict=True)]


def carry(start: Knot, end: Knot, eta: Tensor | float) -> tuple[Tensor, Tensor]:
    """(scale, std) of x_s = scale x_t + std z, the step without its integral."""
    ratio = end.norm / start.norm
    decay = (ratio * start.alpha / end.alpha) ** (2 * eta**2)  # (D_s/D_t)^{η²}
    if start.is_pure_eps:
        noise_variance = eta**2 * (torch.exp(-2 * start.level) - torch.exp(-2 * end.level))  # η² (ς_t² − ς_s²)
    else:
        noise_variance = (1 - decay) / (1 - start.q)
    return ratio * decay.sqrt(), end.norm * noise_variance.clamp(min=0).sqrt()


def weights(
    levels: list[Tensor], start: Knot, end: Knot, eta: Tensor | float, *, angle: bool = False
) -> tuple[Tensor, ...]:
    r"""(1 + η²) M_s ∫ (D_s/D)^{η²/2} ς/D L_i dℓ from `start` to `end`, of the Lagrange polynomials L_i on `levels`.

    They multiply the values `Knot.value` at those levels, each () or (B,). With `angle` the polynomials are in
    arctan(ς/c).
    """
    q, h = start.q, end.level - start.level
    nodes, quadrature = (row.to(h) for row in _GAUSS)
    u = start.level[..., None] + h[..., None] * nodes
    ratio = torch.exp(-u)
    d = torch.ones_like(ratio) if start.is_pure_eps else q + (1 - q) * ratio**2
    kernel = ratio / d * quadrature
    if isinstance(eta, Tensor) or eta > 0:
        eta = eta[..., None] if isinstance(eta, Tensor) else eta
        kernel = (1 + eta**2) * kernel * ((end.norm / end.alpha)[..., None] / d.sqrt()) ** eta**2
    at = torch.stack(levels, -1)
    if angle and 0 < q < 1:
        c = math.sqrt(q / (1 - q))
        at, u = torch.atan(torch.exp(-at) / c), torch.atan(ratio / c)
    scale = -h * end.norm if start.is_pure_eps else h * end.norm
    return (scale[..., None] * (lagrange(at, u) * kernel[..., None, :]).sum(-1)).unbind(-1)


def bounded(
    levels: list[Tensor], start: Knot, end: Knot, eta: Tensor | float, *, at: int, bound: float, angle: bool = False
) -> tuple[Tensor, ...]:
    r"""`weights` of which no step makes more than `bound` times the largest value: Σ |w_i| ≤ bound · |Σ w_i|.

    A polynomial through values that a network gave a short while apart, continued over a long step, multiplies the
    network's errors by Λ = Σ |w_i|/|Σ w_i|. So order after order is added to the rule of one node (for a corrector that
    of the two ends), which has Λ = 1; and of an order with which Λ would exceed the bound only the share
    (bound − Λ_lower)/(Λ − Λ_lower), as Λ is convex in the weights. On short equal steps Adams–Bashforth has
    Λ = 1, 2, 3.67 and 6.67.

    Args:
        at: which of the levels the step starts at: 0 for a predictor.
        bound: at least 1.
    """
    longer = range(max(at, 1) + 1 + (at == 1), len(levels) + 1)
    orders = [[0, at] if at else [0], *(list(range(n)) for n in longer)]
    rule, gain = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (0, 1))
    for chosen in orders:
        found = dict(zip(chosen, weights([levels[i] for i in chosen], start, end, eta, angle=angle), strict=True))
        wider = torch.stack([found.get(i, torch.zeros_like(found[0])) for i in range(len(levels))], -1)
        widened = wider.abs().sum(-1) / wider.sum(-1).abs()
        share = torch.where(widened > bound, (bound - gain) / (widened - gain), 1.0)
        rule = rule + share[..., None] * (wider - rule)
        gain = rule.abs().sum(-1) / rule.sum(-1).abs()
    return rule.unbind(-1)


def published(
    levels: list[Tensor], start: Knot, end: Knot, eta: Tensor | float, *, latest: bool, slope: str
) -> tuple[Tensor, ...]:
    r"""The weights of one or two x̂_0 by the rules of published code, which `weights` equals up to order h³.

    Args:
        latest: whether the step starts at the first of the levels, as a predictor's does, or at the second.
        slope: what stands for the integral of ℓ − ℓ_start: "bh1" ½ κ h², "bh2" ½ h (1 − e^{−κh}), κ = 1 + η².
    """
    h, kappa = end.level - start.level, 1 + eta**2
    constant = end.alpha * -torch.expm1(-kappa * h)
    if len(levels) == 1:
        return (constant,)
    line = 0.5 * (kappa * h * end.alpha if slope == "bh1" else constant) * h / (levels[0] - levels[1])
    return (constant + line, -line) if latest else (line, constant - line)


_GAUSS = tuple(
    torch.from_numpy(0.5 * row + shift)
    for row, shift in zip(np.polynomial.legendre.leggauss(32), (0.5, 0.0), strict=True)
)
