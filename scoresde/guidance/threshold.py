"""A limit for x̂_0 that moves with its sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import positive
from ..diffusion.conditions import Cond
from ..diffusion.denoiser import Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction
from ..ops.broadcast import expand_as_batch


class Thresholded(DenoiserWrapper):
    r"""Dynamic thresholding: x̂_0 becomes clip(x̂_0, −s, s) · limit/s, where s is the greater of `limit` and a quantile
    of |x̂_0| over the sample (Saharia et al. 2022, *Imagen*, sec. 2.3).

    Guidance at a large scale pushes x̂_0 beyond the range of the data; this brings it back at each step. ε̂ moves with
    it, so that x_t = α x̂_0 + σ ε̂ is kept. A sample within the limit is left as it is.

    Args:
        denoiser: of data in about [−limit, limit].
        quantile: p in (0, 1]; the paper's is 0.995. 0 clips to the limit itself, static thresholding.
        limit: the range of model data, > 0.
        inner: what guides the denoiser first, denoiser -> denoiser, as a partial `ClassifierFree`; None for nothing.

    Raises:
        ValueError: arguments outside these.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        quantile: float = 0.995,
        limit: float = 1.0,
        *,
        inner: Callable[[Denoiser], Denoiser] | None = None,
    ):
        super().__init__(denoiser if inner is None else inner(denoiser))
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is a share in [0, 1] of the values of a sample; got {quantile}.")
        self.quantile, self.limit = float(quantile), positive(limit, "limit", "the range of model data")

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        p = self.denoiser(x, t, cond)
        size = torch.quantile(p.x0.abs().flatten(1).float(), self.quantile, dim=1) if self.quantile else x.new_zeros(())
        s = expand_as_batch(size.clamp(min=self.limit).expand(len(x)), p.x0).to(p.x0.dtype)
        x0 = torch.maximum(torch.minimum(p.x0, s), -s) * (self.limit / s)
        return Prediction(x0, p.eps + p.scales.alpha / p.scales.sigma * (p.x0 - x0), p.scales)
