"""Discrete noise schedules, as tabulated by other projects, in continuous time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import whole
from .sde import SDE


class TableSDE(SDE):
    r"""A discrete schedule used in continuous time: entry i = 1 … N of the table sits at t = i/N.

    Between entries λ = log α²/σ² is linear in t, so `time` inverts `log_snr` exactly and every tabulated level is
    reproduced. The rates are those of the segment, and jump at its ends.

    Args:
        alpha_bar: table of ᾱ_i = ∏(1 − β_j), decreasing in (0, 1), data end first: DDPM and every VP-type
            checkpoint with any β table (Ho et al. 2020, eq. 4). α² = ᾱ, σ² = 1 − ᾱ.
        sigmas: table of noise levels, increasing, > 0, α = 1: NCSN-type checkpoints (Song & Ermon 2019).
            Exclusive with `alpha_bar`.

    A network that wants the 0-based step index gets it by `noise_input=lambda sde, t: t * len(sde) - 1`.

    Raises:
        ValueError: neither or both tables, fewer than two entries, or a table out of order or range.
    """

    def __init__(
        self, alpha_bar: Sequence[float] | Tensor | None = None, *, sigmas: Sequence[float] | Tensor | None = None
    ):
        if (alpha_bar is None) == (sigmas is None):
            raise ValueError("TableSDE needs alpha_bar or sigmas, one of the two.")
        self.preserving = alpha_bar is not None
        table = torch.as_tensor(alpha_bar if self.preserving else sigmas, dtype=torch.float64, device="cpu").flatten()
        if len(table) < 2:
            raise ValueError(f"TableSDE needs at least two entries; got {len(table)}.")
        snr = torch.log(table) - torch.log1p(-table) if self.preserving else -2 * torch.log(table)
        if not torch.isfinite(snr).all() or not (snr[1:] < snr[:-1]).all():
            rule = "alpha_bar must fall within (0, 1)" if self.preserving else "sigmas must rise, above 0"
            raise ValueError(f"{rule}, strictly, data end first; got {table[:3].tolist()} … {table[-3:].tolist()}.")
        self._table, self.entries = snr, len(table)
        self.t_min, self.t_max = 1 / len(table), 1.0

    def __len__(self) -> int:
        return len(self._table)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """λ at t, its slope dλ/dt, both from the segment that holds t."""
        table, n = self._table.to(t.device), len(self._table)
        place = t.double() * n - 1
        index = place.floor().long().clamp(0, n - 2)
        step = table[index + 1] - table[index]
        return table[index] + (place - index) * step, step * n

    def log_snr(self, t: Tensor) -> Tensor:
        return self._segment(t)[0].to(t.dtype)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self._segment(t)[0]
        if self.preserving:
            return torch.sigmoid(log_snr).sqrt().to(t.dtype), torch.sigmoid(-log_snr).sqrt().to(t.dtype)
        return torch.ones_like(t), (-0.5 * log_snr).exp().to(t.dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.marginal(t)
        slope = self._segment(t)[1].to(t.dtype)
        if self.preserving:  # dα/dλ = ½ασ², dσ/dλ = −½σα²
            return 0.5 * slope * alpha * sigma**2, -0.5 * slope * sigma * alpha**2
        return torch.zeros_like(t), -0.5 * slope * sigma

    def time(self, log_snr: Tensor) -> Tensor:
        table, n = self._table.to(log_snr.device), len(self._table)
        value = log_snr.double().contiguous()
        index = (torch.searchsorted(-table, -value) - 1).clamp(0, n - 2)
        part = (value - table[index]) / (table[index + 1] - table[index])
        return ((index + 1 + part) / n).to(log_snr.dtype)


class DDPM(TableSDE):
    r"""The discrete process of DDPM in continuous time: step i = 1 … N, q(x_i | x_{i−1}) = N(√(1 − β_i) x_{i−1}, β_i).

    Its first sampler is `Ancestral` over the grid of its steps, UniformGrid with `steps − 1` of them and a last
    denoising; `DiscreteTimes(steps)` trains at the steps alone.

    Args:
        betas: "linear", β_i evenly from `beta_start` to `beta_end` (Ho et al. 2020, sec. 4); or "cosine",
            ᾱ_i ∝ cos²(π/2 (i/N + 0.008)/1.008), each β_i at most 0.999 (Nichol & Dhariwal 2021, eq. 17).
        steps: N ≥ 2.
        beta_start, beta_end: of the linear table, 0 < beta_start ≤ beta_end < 1; the paper's are for 1,000 steps.

    Raises:
        ValueError: another name of a table, or numbers outside these ranges.
    """

    def __init__(
        self, betas: str = "linear", steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        steps = whole(steps, "steps", 2)
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"Expected 0 < beta_start ≤ beta_end < 1; got {beta_start} and {beta_end}.")
        if betas == "linear":
            beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
        elif betas == "cosine":
            place = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
            alpha_bar = ((place + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"betas is 'linear' or 'cosine'; got {betas!r}. Other tables: TableSDE(alpha_bar).")
        super().__init__((1 - beta).cumprod(0))
