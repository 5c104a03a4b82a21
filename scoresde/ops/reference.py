r"""What the ops mean, in torch: plain, differentiable, and with no more passes over memory than eager torch needs.

Sums are built in place on their first term: at the size of a batch of images a temporary costs more than arithmetic.
Half types are added up in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .broadcast import coefficient

Coefficient = Tensor | float
"""A number, or a tensor () or (B,): one for all samples or one for each."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def lincomb(terms: Sequence[tuple[Coefficient, Tensor]], noise: tuple[Coefficient, Tensor] | None = None) -> Tensor:
    """Σ c_i x_i + std z, in the common dtype of the x_i."""
    dtype = terms[0][1].dtype
    for _, x in terms[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    (factor, start), *rest = (*terms, noise) if noise else terms
    total = start.to(_wide(dtype))
    if not isinstance(factor, Tensor) and factor == 1 and rest:
        (factor, x), *rest = rest  # what has factor 1 is only read
        total = _add(total, factor, x)
    else:
        total = total * (coefficient(factor, total) if isinstance(factor, Tensor) else factor)
    for factor, x in rest:
        _add(total, factor, x, out=total)
    return total.to(dtype)


def _add(total: Tensor, factor: Coefficient, x: Tensor, out: Tensor | None = None) -> Tensor:
    if isinstance(factor, Tensor):
        factor = coefficient(factor, total)
        return torch.addcmul(total, x, factor) if out is None else out.addcmul_(x, factor)
    return torch.add(total, x, alpha=factor) if out is None else out.add_(x, alpha=factor)


def langevin(x: Tensor, eps: Tensor, z: Tensor, sigma: Tensor, snr: float, measured: bool) -> Tensor:
    r"""x − (h/σ) ε̂ + √(2h) z, h = σ² min(1, 2 snr² (N + 64)/(‖ε̂‖² + 64)) per sample, N = ‖z‖² or its mean D."""
    wide = _wide(x.dtype)
    size = z.to(wide).flatten(1).square().sum(1) if measured else x.shape[1:].numel()
    ratio = (2 * snr**2 * (size + 64) / (eps.to(wide).flatten(1).square().sum(1) + 64)).clamp(max=1.0)
    return lincomb(((1.0, x), (-ratio * sigma, eps)), ((2 * ratio).sqrt() * sigma, z))


def dsm_loss(prediction: Tensor, eps: Tensor, weight: Tensor) -> Tensor:
    """w_k ‖ε̂_k − ε_k‖²/D of every sample, (B,), in float32 or wider."""
    wide = _wide(prediction.dtype)
    return weight.to(wide) * (prediction.to(wide) - eps.to(wide)).square().flatten(1).mean(1)
