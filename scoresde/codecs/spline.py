"""Monotone maps through a table: rational quadratics between the knots, straight lines outside of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spline(NamedTuple):
    r"""D increasing maps, once continuously differentiable, each through K knots (x_k, y_k).

    Between two knots, with ξ = (x − x_k)/(x_{k+1} − x_k), slope s of the chord and d_k of the map at the knots:

        y = y_k + (y_{k+1} − y_k) (s ξ² + d_k ξ(1 − ξ)) / (s + (d_k + d_{k+1} − 2s) ξ(1 − ξ)),

    which increases for all positive d_k and is undone in closed form (Gregory & Delbourgo 1982; Durkan et al. 2019,
    eq. 4–8). Outside it goes on with d_0 and d_{K−1}.

    Attributes:
        x, y: (D, K), increasing; y may be (K,).
    """

    x: Tensor
    y: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx of x (…, D)."""
        x0, y0, width, height, left, right = self._piece(x, self.x)
        s, xi = height / width, ((x - x0) / width).clamp(0, 1)
        inner = xi * (1 - xi)
        below = s + (left + right - 2 * s) * inner
        y = y0 + height * (s * xi**2 + left * inner) / below
        slope = s**2 * (right * xi**2 + 2 * s * inner + left * (1 - xi) ** 2) / below**2
        outside = x - x.clamp(*self._ends(self.x))
        return y + slope * outside, slope.log()

    def inverse(self, y: Tensor) -> Tensor:
        """x of y (…, D)."""
        x0, y0, width, height, left, right = self._piece(y, self.y.expand_as(self.x))
        low, high = self._ends(self.y.expand_as(self.x))
        inside = y.clamp(low, high)
        s, above = height / width, inside - y0
        bend = left + right - 2 * s
        a, b, c = height * (s - left) + above * bend, height * left - above * bend, -s * above
        xi = 2 * c / (-b - (b**2 - 4 * a * c).clamp(min=0).sqrt())
        outside = y - inside
        return x0 + xi.clamp(0, 1) * width + outside / torch.where(outside < 0, left, right)

    @staticmethod
    def _ends(knots: Tensor) -> tuple[Tensor, Tensor]:
        return knots[:, 0], knots[:, -1]

    def _piece(self, values: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Of the piece that holds each value (…, D): x_k, y_k, both differences, d_k and d_{k+1}."""
        y, flat = self.y.expand_as(self.x), values.detach().reshape(-1, len(knots)).T.contiguous()
        k = torch.searchsorted(knots.contiguous(), flat).clamp(1, knots.shape[1] - 1) - 1
        chords = y.diff() / self.x.diff()
        middle = (y[:, 2:] - y[:, :-2]) / (self.x[:, 2:] - self.x[:, :-2])
        slopes = torch.cat([chords[:, :1], middle, chords[:, -1:]], 1)
        found = (self.x[:, :-1], y[:, :-1], self.x.diff(), y.diff(), slopes[:, :-1], slopes[:, 1:])
        return tuple(table.gather(1, k).T.reshape(values.shape) for table in found)
