r"""tr ∂ε̂/∂x beside ε̂ itself, from one network forward; exactly, or by probes that stay fixed over a solve.

A divergence accumulates columns over the solve. With M = ∫ σ ∂ε̂/∂x du the integrated Jacobian, the exact one
carries tr M, Hutchinson's the p estimates eᵀM e.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .rng import Rng

Field = Callable[[Tensor], Tensor]


class Divergence(abc.ABC):
    """How log-density changes are measured along the ODE."""

    @abc.abstractmethod
    def probes(self, x: Tensor, rng: Rng) -> Tensor:
        """Probe vectors (B, p, *event) for one solve; p = 0 where none are needed."""

    @abc.abstractmethod
    def columns(self, dims: int) -> tuple[int, int]:
        """(columns carried, how many of the leading ones are log-densities under error control) for D = `dims`."""

    @abc.abstractmethod
    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """(field(x) (B, *event), rates (B, columns)) from one forward of the field."""

    @abc.abstractmethod
    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """(estimate (B,), standard error (B,)) of tr M from the integrated columns."""


def _forward(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = field(x)
    if not value.requires_grad:  # a field that does not depend on x has no divergence graph
        value = value + 0 * x
    return x, value


class Exact(Divergence):
    """tr ∂ε̂/∂x by one forward and D backward products, in batched chunks, for any event shape.

    Args:
        chunk: backward products at a time, ≥ 1: memory against speed.
    """

    def __init__(self, chunk: int = 32):
        if chunk < 1:
            raise ValueError(f"Exact needs chunk >= 1; got {chunk}.")
        self.chunk = int(chunk)

    def probes(self, x: Tensor, rng: Rng) -> Tensor:
        return x.new_empty(len(x), 0, *x.shape[1:])

    def columns(self, dims: int) -> tuple[int, int]:
        return 1, 1

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        x, value = _forward(field, x)
        dims = x[0].numel()
        trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for start in range(0, dims, self.chunk):
            rows = torch.arange(start, min(start + self.chunk, dims), device=x.device)
            basis = torch.zeros(len(rows), dims, dtype=value.dtype, device=x.device)
            basis[torch.arange(len(rows)), rows] = 1
            basis = basis[:, None].expand(-1, len(x), -1).reshape(len(rows), *x.shape)
            (grads,) = torch.autograd.grad(
                value, x, basis, is_grads_batched=True, retain_graph=rows[-1].item() + 1 < dims
            )
            diagonal = grads.reshape(len(rows), len(x), dims)[torch.arange(len(rows)), :, rows]
            trace += diagonal.double().sum(0)
        return value.detach(), trace[:, None]

    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        return columns[:, 0], torch.zeros_like(columns[:, 0])


class Hutchinson(Divergence):
    r"""Unbiased probes of the trace, eᵀ(∂ε̂/∂x) e (Hutchinson 1990; Grathwohl et al. 2019, eq. 8).

    The probes are drawn once per solve and sample: redrawing them would feed noise to the step-size control.

    The standard error with p ≥ 2 probes is the spread of their p integrated estimates over √p. One probe has no
    spread; its product w = Mᵀe, integrated beside it at no network cost, bounds the variance instead:
    2D/(D − 2)‖w − (eᵀw/D) e‖² estimates 2(Σ_{i≠j} M_ij² + D Var(M_ii)), the probe's variance plus what an uneven
    diagonal adds (for Gaussian probes, the rest of 2‖M‖_F² too). It is conservative; for D ≤ 2 it is √2‖w‖.

    Args:
        probes: p ≥ 1.
        kind: "rademacher" (exact for a diagonal Jacobian) or "gaussian".
    """

    def __init__(self, probes: int = 1, kind: str = "rademacher"):
        if probes < 1:
            raise ValueError(f"Hutchinson needs at least one probe; got {probes}.")
        if kind not in ("rademacher", "gaussian"):
            raise ValueError(f"kind is 'rademacher' or 'gaussian'; got {kind!r}.")
        self.count, self.kind = int(probes), kind

    def probes(self, x: Tensor, rng: Rng) -> Tensor:
        like = x[:, None].expand(-1, self.count, *x.shape[1:])
        return rng.rademacher_like(like) if self.kind == "rademacher" else rng.normal_like(like)

    def columns(self, dims: int) -> tuple[int, int]:
        return (1 + dims if self.count == 1 else self.count), self.count

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        x, value = _forward(field, x)
        seeds = probes.transpose(0, 1).to(value.dtype)
        if self.count == 1:
            (grads,) = torch.autograd.grad(value, x, seeds[0])
            products = grads[:, None]
        else:
            (grads,) = torch.autograd.grad(value, x, seeds, is_grads_batched=True)
            products = grads.transpose(0, 1)
        products = products.flatten(2).double()
        estimates = (products * probes.flatten(2)).sum(2)
        columns = torch.cat([estimates, products[:, 0]], 1) if self.count == 1 else estimates
        return value.detach(), columns

    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        if self.count > 1:
            return columns.mean(1), columns.std(1) / math.sqrt(self.count)
        estimate, product = columns[:, 0], columns[:, 1:]
        e, dims = probes[:, 0].flatten(1).double(), product.shape[1]
        if dims <= 2:
            return estimate, math.sqrt(2) * product.norm(dim=1)
        share = (e * product).sum(1, keepdim=True) / e.square().sum(1, keepdim=True)
        even = 2 * dims / (dims - 2) * (product - share * e).square().sum(1)
        if self.kind == "gaussian":
            even = even + 2 * dims * share[:, 0] ** 2
        return estimate, even.sqrt()
