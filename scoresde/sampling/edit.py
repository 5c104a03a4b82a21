r"""Changing given samples: by noising and drawing them anew in part, or in the latent of the probability-flow ODE.

The latent x_T comes from `AdaptiveODE.encode`, and `Sampler(AdaptiveODE(…), denoise=False)` brings it back.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from ..checks import positive
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.grids import Grid
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops.broadcast import expand_as_batch, host, samples
from .sampler import Sampler


class From:
    """The end of another grid: n steps from the noise level σ/α = `level` down, spaced as `grid` has them there.

    Args:
        grid: any rule that gives grids of any length.
        level: σ/α > 0.

    Raises:
        ValueError: `level` is not positive; when called, the SDE does not reach it, or `grid` ends above it.
    """

    def __init__(self, grid: Grid, level: float):
        self.grid, self.level = grid, positive(level, "level", "a noise level sigma/alpha")

    def start(self, sde: SDE) -> Tensor:
        """The time of `level`, float64 ()."""
        start = sde.time(-2 * host(self.level).log())
        if not sde.t_min < float(start) <= sde.t_max:
            raise ValueError(f"{type(sde).__name__} has no time of noise level {self.level} in (t_min, t_max].")
        return start

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        start = self.start(sde)

        def below(whole: int) -> Tensor:
            times = self.grid(sde, whole)
            return times[times < start * (1 - 1e-9)]

        # the shortest whole grid with as many times below the start as there are steps
        most = steps
        while len(below(most)) < steps:
            most *= 2
            if most > 2**14 * steps:
                raise ValueError(f"The grid has no {steps} times below the noise level {self.level}.")
        whole = bisect.bisect_left(range(most + 1), steps, lo=max(steps, 1), key=lambda n: len(below(n)))
        return torch.cat([start[None], below(whole)[-steps:].double()])


def sdedit(
    denoiser: Denoiser, x0: Tensor, sampler: Sampler, level: float, *, cond: Cond = None, rng: Rng | None = None
) -> Tensor:
    r"""SDEdit: `x0` noised up to σ/α = `level`, and sampled from there (Meng et al. 2022, alg. 1).

    Detail finer than the noise is drawn anew, and coarser structure stays; `x0` need not look like data.

    Args:
        denoiser: the model, or one that is guided.
        x0: (B, *event).
        sampler: its steps are all taken below `level`, spaced as its grid has them there.
        level: σ/α > 0, in units of the data, that the SDE reaches: the larger, the more is drawn anew.
        cond: condition of each sample.
        rng: default `Rng(0)`.

    Returns:
        (B, *event).
    """
    rng, x0 = Rng(0) if rng is None else rng, samples(x0, "x0")
    grid = From(sampler.grid_for(denoiser), level)
    noisy = denoiser.sde.perturb(x0, grid.start(denoiser.sde), rng.noise(x0))
    return Sampler(sampler.step, grid, sampler.steps, sampler.denoise)(denoiser, noisy, cond=cond, rng=rng)


def interpolate(first: Tensor, second: Tensor, share: Tensor | float) -> Tensor:
    r"""Spherical interpolation of latents, per sample (Shoemake 1985): [sin((1 − w)Ω) a + sin(wΩ) b]/sin Ω.

    Ω is the angle between a and b. Straight lines between latents pass through points that are closer to 0 than noise
    ever is, and give samples without detail.

    Args:
        first, second: a, b (B, *event), not 0. Opposite latents, between which a sphere has no unique path, are
            joined by the straight line.
        share: w, a number or (B,): 0 is `first`, 1 `second`.

    Raises:
        ValueError: shapes that differ, or a share that is neither a number nor (B,).
    """
    first, second = samples(first, "first"), samples(second, "second")
    if first.shape != second.shape:
        raise ValueError(f"Latents are paired, (B, *event); got {tuple(first.shape)} and {tuple(second.shape)}.")
    a, b = first.flatten(1).double(), second.flatten(1).double()
    share = expand_as_batch(torch.as_tensor(share, dtype=torch.float64, device=a.device), a)
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
    angle = cosine.clamp(-1, 1).arccos().clamp(1e-6, torch.pi - 1e-6)  # parallel latents: a straight line
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed.to(first.dtype).reshape(first.shape)


def attribute(having: Tensor, lacking: Tensor) -> Tensor:
    """Direction of an attribute in the latent, (1, *event): the mean latent of samples that have it minus that of
    samples that lack it (Radford et al. 2016; Kingma & Dhariwal 2018, sec. 6.2). Add a multiple of it, and decode.

    Args:
        having, lacking: latents (N, *event) and (M, *event), N and M ≥ 1.

    Raises:
        ValueError: no sample of one kind, or latents of other shapes.
    """
    having, lacking = samples(having, "having"), samples(lacking, "lacking")
    if having.shape[1:] != lacking.shape[1:]:
        raise ValueError(
            f"An attribute is between latents of one shape; got {tuple(having.shape)} and {tuple(lacking.shape)}."
        )
    if min(len(having), len(lacking)) == 0:
        raise ValueError(f"An attribute needs samples with and without it; got {len(having)} and {len(lacking)}.")
    return having.mean(0, keepdim=True) - lacking.mean(0, keepdim=True)
