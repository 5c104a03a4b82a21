"""Conjugate gradients, sample by sample: the systems that observations make, with no matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import whole
from ..ops.broadcast import expand_as_batch

Product = Callable[[Tensor], Tensor]
"""S v for v (B, *y), linear and symmetric within each sample."""


def conjugate_gradients(
    product: Product, b: Tensor, *, iterations: int, tolerance: float, strict: bool = False
) -> Tensor:
    r"""u with S u = b for a symmetric S ⪰ 0, from u = 0, in float64 (Hestenes & Stiefel 1952).

    In exact arithmetic it ends after as many iterations as S has distinct eigenvalues. A sample stops when its residual
    is below `tolerance` ‖b‖, or where vᵀS v ≤ 0. A network's Jacobian need be neither symmetric nor positive, and then
    iterates can go anywhere, so the one with the least residual is returned. Under `torch.compile` the loop is unrolled
    with all its iterations; a strict solve breaks the graph instead, because it has to look at its numbers.

    Args:
        product: S v.
        b: (B, *y).
        iterations: the most that are made, ≥ 1.
        tolerance: on ‖S u − b‖/‖b‖, ≥ 0.
        strict: raise an error where the tolerance is not reached.

    Returns:
        u, float64 (B, *y).

    Raises:
        RuntimeError: `strict`, and a sample is not solved.
    """
    b = b.double()
    u, residual, direction = torch.zeros_like(b), b, b
    size = _dot(b, b)
    goal, moving = tolerance**2 * size, size > 0
    best, least = u, size
    for _ in range(iterations):
        moving = moving & (size > goal)
        # a compiled graph has no way out of a loop, so there all iterations are made, except in a strict solve
        if (strict or not torch.compiler.is_compiling()) and not bool(moving.any()):
            break
        image = product(direction).double()
        curvature = _dot(direction, image)
        moving = moving & (curvature > 0)
        length = torch.where(moving, size, 0.0) / torch.where(moving, curvature, 1.0)
        u = u + expand_as_batch(length, b) * direction
        residual = residual - expand_as_batch(length, b) * image
        after = torch.where(moving, _dot(residual, residual), size)
        direction = residual + expand_as_batch(after / torch.where(moving, size, 1.0), b) * direction
        size = after
        better = size < least
        best, least = torch.where(expand_as_batch(better, b), u, best), torch.minimum(size, least)
    if strict:
        bad = (least > goal).nonzero().flatten().tolist()
        if bad:
            raise RuntimeError(
                f"Conjugate gradients did not reach {tolerance} in {iterations} iterations for samples {bad}: allow "
                "more iterations or a larger tolerance, or look whether the operator is linear."
            )
    return best


def checked(iterations: int, tolerance: float) -> tuple[int, float]:
    """Both arguments of a solve, or a ValueError."""
    if not 0 < tolerance < 1:
        raise ValueError(f"A relative residual needs 0 < tolerance < 1; got {tolerance}.")
    return whole(iterations, "iterations"), float(tolerance)


def solve(product: Product, variance: Tensor, b: Tensor, *, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    r"""u = (diag(variance) + P)⁻¹ b and log det of that matrix.

    Where b has at most `iterations` entries, P is written out by as many products, its symmetric part is taken, and
    both results are exact. Otherwise u comes from conjugate gradients, and log det is that of diag(variance), its limit
    as P → 0. What this leaves out is the same for all samples of a Gaussian prior; an estimate from b or from a probe
    would differ between samples by its noise.

    Args:
        product: P v, P ⪰ 0.
        variance: > 0, of the shape of b.
        b: (B, *y).
        iterations, tolerance: of conjugate gradients.

    Returns:
        float64 (B, *y) and (B,).
    """
    size = b[0].numel()
    variance, b = variance.double().expand(b.shape), b.double()
    if size > iterations:
        u = conjugate_gradients(lambda v: variance * v + product(v), b, iterations=iterations, tolerance=tolerance)
        return u, variance.clamp(min=torch.finfo(torch.float64).tiny).log().flatten(1).sum(1)
    basis = torch.eye(size, dtype=torch.float64, device=b.device).reshape(size, 1, *b.shape[1:])
    matrix = torch.stack([product(row.expand(b.shape)).double().flatten(1) for row in basis], 1)
    matrix = 0.5 * (matrix + matrix.mT)
    # a sample that is not finite gets NaN, and must not make the factorisation of the others fail
    sound = torch.isfinite(matrix).all((1, 2), keepdim=True)
    matrix = torch.where(sound, matrix, 0.0)
    # where a network errs its Jacobian has negative eigenvalues; their size measures the error, and takes their place
    values, vectors = torch.linalg.eigh(matrix.detach())
    lift = 2 * (-values).clamp(min=0) + 1e-10 * values.abs().mean(1, keepdim=True) + 1e-16
    matrix = matrix + vectors @ (lift[..., None] * vectors.mT) + torch.diag_embed(variance.flatten(1))
    factor = torch.linalg.cholesky(matrix)
    u = torch.cholesky_solve(torch.where(sound, b.flatten(1)[..., None], torch.nan), factor)[..., 0]
    return u.reshape(b.shape), 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
