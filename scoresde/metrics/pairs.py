"""Two samples made comparable, and averages over their pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_ENTRIES = 2**20  # of a block of distances: bounds the memory


def paired(x: Tensor, y: Tensor, *, minimum: int) -> tuple[Tensor, Tensor]:
    """x and y as float64 matrices (n, D) and (m, D) on the device of x.

    Raises:
        TypeError: one holds integers and the other floats: raw and model data are not the same units.
        ValueError: no batch, fewer than `minimum` samples, events of different shapes, NaN or infinite values.
    """
    if x.is_floating_point() != y.is_floating_point():
        raise TypeError(f"x holds {x.dtype} and y {y.dtype}: encode or decode both, so that their units agree.")
    for name, value in (("x", x), ("y", y)):
        if value.ndim < 2 or len(value) < minimum:
            raise ValueError(f"{name}: expected at least {minimum} samples (N, *event); got {tuple(value.shape)}.")
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} NaN or infinite values of {value.numel()}: it has no distance.")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"x has events of shape {tuple(x.shape[1:])}, y of shape {tuple(y.shape[1:])}; not comparable."
        )
    return x.detach().flatten(1).double(), y.detach().flatten(1).to(x.device).double()


def mean_between(x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of `function` of the distances |x_i − y_j| over all n m pairs."""
    total = sum((function(distances).sum() for _, distances in distances_between(x, y)), x.new_zeros(()))
    return total / (len(x) * len(y))


def mean_within(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of `function` of |x_i − x_j| over the n (n − 1) pairs with i ≠ j: unbiased."""
    total = -len(x) * function(x.new_zeros(()))  # the pairs with i = j
    for rows, distances in distances_between(x, x):
        distances.diagonal(rows.start).zero_()
        total = total + function(distances).sum()
    return total / (len(x) * (len(x) - 1))


def distances_between(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of |x_i − y_j|: (the rows i, (rows, m)). They are computed from products, so 0 is one up to round-off."""
    centre = y.mean(0)  # products cancel less near the origin
    y = y - centre
    norms = (y * y).sum(1)
    for rows in row_blocks(x, y):
        part = x[rows] - centre
        squares = torch.addmm(norms, part, y.T, alpha=-2).add_((part * part).sum(1, keepdim=True))
        yield rows, squares.clamp_min_(0).sqrt_()


def row_blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Rows of x of which a block against all of y has a bounded number of entries."""
    size = max(1, _ENTRIES // len(y))
    for first in range(0, len(x), size):
        yield slice(first, min(first + size, len(x)))
