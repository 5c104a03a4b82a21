r"""tr ∂ε̂/∂x beside ε̂ itself, from one network forward; exactly, or by probes that stay fixed over a solve.

A divergence accumulates columns over the solve. With M = ∫ σ ∂ε̂/∂x du the integrated Jacobian, the exact one
carries tr M, Hutchinson's the p estimates eᵀM e, Hutch++ the forms vᵀM v of a basis and of probes beside it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checks import positive, whole
from ..diffusion.readable import Readable
from ..noise.rng import Rng

Field = Callable[[Tensor], Tensor]

Denoised = Callable[[Tensor, float], Tensor]
"""(x0 (B, *event), ς) -> x̂_0 of x0 with noise of σ/α = ς: one network call."""


class Divergence(Readable, abc.ABC):
    """How log-density changes are measured along the ODE."""

    @abc.abstractmethod
    def probes(self, x: Tensor, rng: Rng, denoised: Denoised | None = None) -> Tensor:
        """Vectors (B, p, *event) that stay fixed over one solve from data x (B, *event); p = 0 where none are needed.

        `denoised` is there for those that look at the model first.
        """

    @abc.abstractmethod
    def products(self, dims: int) -> int:
        """Backward products beside each network call, for D = `dims`."""

    @abc.abstractmethod
    def columns(self, dims: int) -> tuple[int, int]:
        """(columns carried, how many of the leading ones are log-densities under error control) for D = `dims`."""

    def __call__(
        self, field: Field, x: Tensor, probes: Tensor, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(field(x) (B, *event), rates (B, columns)) from one forward of the field.

        Neither carries gradients, unless `differentiable`: then both do, to x and to the parameters of the field.
        """
        x, value = forward(field, x, differentiable)
        rates = self.rates(value, x, probes, differentiable)
        return (value if differentiable else value.detach()), rates

    @abc.abstractmethod
    def rates(self, value: Tensor, x: Tensor, probes: Tensor, differentiable: bool) -> Tensor:
        """What is integrated (B, columns), float64, by backward passes from `value` = field(x) to x."""

    @abc.abstractmethod
    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """(estimate (B,), standard error (B,)) of tr M from the integrated columns."""


def forward(field: Field, x: Tensor, differentiable: bool = False) -> tuple[Tensor, Tensor]:
    """(x, field(x)) with a graph from one to the other: of an x of its own, unless `differentiable`."""
    with torch.enable_grad():
        if not (differentiable and x.requires_grad):
            x = x.detach().requires_grad_()
        return x, field(x) + 0 * x  # a field that does not depend on x has no divergence graph


def _products(value: Tensor, x: Tensor, vectors: Tensor, differentiable: bool) -> Tensor:
    """vᵀ ∂value/∂x for each of the vectors (B, p, *event), flat: (B, p, D) in float64."""
    seeds = vectors.transpose(0, 1).to(value.dtype)
    if len(seeds) == 1:  # a batch of one costs vmap's overhead
        (grads,) = torch.autograd.grad(value, x, seeds[0], create_graph=differentiable)
        return grads[:, None].flatten(2).double()
    (grads,) = torch.autograd.grad(value, x, seeds, is_grads_batched=True, create_graph=differentiable)
    return grads.transpose(0, 1).flatten(2).double()


def jacobian(value: Tensor, x: Tensor, chunk: int, differentiable: bool) -> Iterator[tuple[int, Tensor]]:
    """∂value/∂x of each sample by D backward products: (d, rows d, d + 1, … of it (k, B, D)), k ≤ `chunk` at a time."""
    dims = x[0].numel()
    for first in range(0, dims, chunk):
        rows = torch.arange(first, min(first + chunk, dims), device=x.device)
        basis = torch.zeros(len(rows), dims, dtype=value.dtype, device=x.device)
        basis[torch.arange(len(rows), device="cpu"), rows] = 1
        basis = basis[:, None].expand(-1, len(x), -1).reshape(len(rows), *x.shape)
        keep = differentiable or first + chunk < dims
        (grads,) = torch.autograd.grad(
            value, x, basis, is_grads_batched=True, retain_graph=keep, create_graph=differentiable
        )
        yield first, grads.flatten(2)


class Exact(Divergence):
    """tr ∂ε̂/∂x by one forward and D backward products, in batched chunks, for any event shape.

    Args:
        chunk: backward products at a time, ≥ 1: memory against speed.
    """

    def __init__(self, chunk: int = 32):
        self.chunk = whole(chunk, "Exact's chunk")

    def probes(self, x: Tensor, rng: Rng, denoised: Denoised | None = None) -> Tensor:
        return x.new_empty(len(x), 0, *x.shape[1:])

    def columns(self, dims: int) -> tuple[int, int]:
        return 1, 1

    def products(self, dims: int) -> int:
        return dims

    def rates(self, value: Tensor, x: Tensor, probes: Tensor, differentiable: bool) -> Tensor:
        trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for first, rows in jacobian(value, x, self.chunk, differentiable):
            trace = trace + rows.diagonal(first, 0, 2).double().sum(1)
        return trace[:, None]

    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        return columns[:, 0], torch.zeros_like(columns[:, 0])


class Hutchinson(Divergence):
    r"""Unbiased probes of the trace, eᵀ(∂ε̂/∂x) e (Hutchinson 1990; Grathwohl et al. 2019, eq. 8).

    The probes are drawn once per solve and sample: redrawing them would feed noise to the step-size control.

    The standard error with p ≥ 2 probes is the spread of their p integrated estimates over √p, times t/1.96 with t the
    97.5 % point of Student's law of p − 1 degrees: ±1.96 of it is the 95 % interval. One probe has no spread; its
    product w = Mᵀe, integrated beside it at no network cost, bounds the variance instead:
    2D/(D − 2)‖w − (eᵀw/D) e‖² estimates 2(Σ_{i≠j} M_ij² + D Var(M_ii)), the probe's variance plus what an uneven
    diagonal adds (for Gaussian probes, the rest of 2‖M‖_F² too). It is conservative; for D ≤ 2 it is √2‖w‖.

    Args:
        probes: p ≥ 1.
        kind: "rademacher" (exact for a diagonal Jacobian) or "gaussian".
    """

    def __init__(self, probes: int = 1, kind: str = "rademacher"):
        if kind not in ("rademacher", "gaussian"):
            raise ValueError(f"kind is 'rademacher' or 'gaussian'; got {kind!r}.")
        self.count, self.kind = whole(probes, "Hutchinson's number of probes"), kind

    def probes(self, x: Tensor, rng: Rng, denoised: Denoised | None = None) -> Tensor:
        like = x[:, None].expand(-1, self.count, *x.shape[1:])
        return rng.rademacher_like(like) if self.kind == "rademacher" else rng.normal_like(like)

    def columns(self, dims: int) -> tuple[int, int]:
        return (1 + dims if self.count == 1 else self.count), self.count

    def products(self, dims: int) -> int:
        return self.count

    def rates(self, value: Tensor, x: Tensor, probes: Tensor, differentiable: bool) -> Tensor:
        products = _products(value, x, probes, differentiable)
        estimates = (products * probes.flatten(2)).sum(2)
        return torch.cat([estimates, products[:, 0]], 1) if self.count == 1 else estimates

    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        if self.count > 1:
            return columns.mean(1), spread(columns)
        estimate, product = columns[:, 0], columns[:, 1:]
        e, dims = probes[:, 0].flatten(1).double(), product.shape[1]
        if dims <= 2:
            return estimate, math.sqrt(2) * product.norm(dim=1)
        share = (e * product).sum(1, keepdim=True) / e.square().sum(1, keepdim=True)
        even = 2 * dims / (dims - 2) * (product - share * e).square().sum(1)
        if self.kind == "gaussian":
            even = even + 2 * dims * share[:, 0] ** 2
        return estimate, even.sqrt()


class HutchPlusPlus(Divergence):
    r"""tr of M on a basis Q exactly, probes for the rest of M (after Meyer et al. 2021, alg. 1).

    d log p/du is linear in the Jacobian, so with one basis Q (D, k) and p probes fixed over a solve the estimate is
    that of the integrated M, unbiased whatever Q is, and the field stays smooth: a basis that followed the Jacobian
    from call to call would not be. Q is drawn once, before the solve, from one more network call: the range of
    ∂x̂_0/∂x at noise ς = `level` (randomised range finder, Halko et al. 2011, alg. 4.1). Since ∂ε̂/∂x = (I −
    α ∂x̂_0/∂x)/σ, M is a multiple c of I minus what lies in the ranges of ∂x̂_0/∂x.

    Projecting Q out of the probes, as in the paper, would spoil what Rademacher probes do best: any diagonal matrix,
    and c I with it, costs them no variance. So Q is taken off M instead, as a control variate, with B = QᵀMQ:

        eᵀMe − eᵀQ (B − c I) Qᵀe + tr B − c k,      c the mean diagonal of M beside Q by the *other* probes

    The standard error is the spread of the p probes, as in `Hutchinson`; each call costs k + p products. It pays where
    ∂x̂_0/∂x has a rank of about k beside a diagonal; elsewhere k more probes of `Hutchinson` are better.

    Args:
        sketch: k ≥ 1 columns of Q (D at most; then the trace is exact).
        probes: p ≥ 2.
        level: ς = σ/α of the look ahead, > 0, in units of the data.
    """

    def __init__(self, sketch: int = 4, probes: int = 4, level: float = 0.3):
        level = positive(level, "HutchPlusPlus's level", "a noise σ/α")
        self.sketch, self.level = whole(sketch, "HutchPlusPlus's sketch"), float(level)
        self.count = whole(probes, "HutchPlusPlus's number of probes", 2)

    def probes(self, x: Tensor, rng: Rng, denoised: Denoised | None = None) -> Tensor:
        if denoised is None:
            raise ValueError("HutchPlusPlus looks at the model first: pass denoised=, as log_likelihood does.")
        k = min(self.sketch, x[0].numel())
        point, value = forward(lambda z: denoised(z, self.level), x)
        test = rng.normal_like(x[:, None].expand(-1, k, *x.shape[1:]))
        basis = torch.linalg.qr(_products(value, point, test, False).mT).Q.mT  # (B, k, D), rows orthonormal
        signs = rng.rademacher_like(x[:, None].expand(-1, self.count, *x.shape[1:])).double()
        return torch.cat([basis.reshape(len(x), k, *x.shape[1:]), signs], 1)

    def columns(self, dims: int) -> tuple[int, int]:
        total = self.count + min(self.sketch, dims) ** 2
        return total, total

    def products(self, dims: int) -> int:
        return min(self.sketch, dims) + self.count

    def rates(self, value: Tensor, x: Tensor, probes: Tensor, differentiable: bool) -> Tensor:
        products, flat = _products(value, x, probes, differentiable), probes.flatten(2)
        k = flat.shape[1] - self.count
        forms = (products[:, k:] * flat[:, k:]).sum(2)
        inner = products[:, :k] @ flat[:, :k].mT  # QᵀMQ
        return torch.cat([forms, inner.flatten(1)], 1)

    def summarise(self, columns: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        flat = probes.flatten(2)
        k, dims, p = flat.shape[1] - self.count, flat.shape[2], self.count
        forms, inner = columns[:, :p], columns[:, p:].unflatten(1, (k, k))
        trace = inner.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        if k == dims:
            return trace[:, 0], torch.zeros_like(trace[:, 0])
        inside = flat[:, k:] @ flat[:, :k].mT  # Qᵀe, (B, p, k)
        length = inside.square().sum(2)
        beside = forms - torch.einsum("bpi,bij,bpj->bp", inside, inner, inside)
        mean = beside / (dims - length)  # c by each probe: exact for M = c I − QΛQᵀ
        c = (mean.sum(1, keepdim=True) - mean) / (p - 1)
        estimates = beside + c * (length - k) + trace
        return estimates.mean(1), spread(estimates)


def spread(estimates: Tensor) -> Tensor:
    """Standard error (B,) of the mean of p ≥ 2 estimates (B, p), widened so that ±1.96 of it covers 95 %."""
    p = estimates.shape[1]
    return estimates.std(1) / math.sqrt(p) * (_student(p - 1) / 1.96)


def _student(degrees: int) -> float:
    """The 97.5 % point of Student's t: a table, then the expansion in 1/ν (Fisher & Cornish 1960), within 1 %."""
    table = (12.706, 4.303, 3.182, 2.776)
    if degrees <= len(table):
        return table[degrees - 1]
    return 1.96 + 2.372 / degrees + 2.823 / degrees**2
