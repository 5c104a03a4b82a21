"""The libraries that the benchmarks run beside scoresde, told of the same SDEs and the same exact scores.

    pip install -e ".[bench]" && pip install --no-deps k-diffusion

k-diffusion's own dependencies (clip, kornia, scikit-image, accelerate and more) serve its other modules; only
`k_diffusion/sampling.py` is loaded here, with the one helper that it takes from there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import distributions, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import scoresde as S

Solver = Callable[[S.Denoiser, Tensor, int], Tensor | None]
"""(denoiser, x_T, budget) -> x at t_min by at most `budget` evaluations; None where that cannot be."""


def versions() -> dict[str, str]:
    """Of the peers that are installed: not every benchmark needs them."""
    installed = {str(distribution.name).lower() for distribution in distributions()}
    return {name: version(name) for name in ("diffusers", "azula", "k-diffusion", "torchdiffeq") if name in installed}


@cache
def k_sampling() -> Any:
    """k-diffusion's module of samplers."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ImportError("The peers need k-diffusion: pip install --no-deps k-diffusion.")
    package = ModuleType("k_diffusion_alone")
    package.__path__ = []
    package.utils = SimpleNamespace(append_dims=lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)])
    sys.modules[package.__name__] = package
    path = Path(found.submodule_search_locations[0]) / "sampling.py"
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def k_model(denoiser: S.Denoiser) -> Callable[..., Tensor]:
    """k-diffusion's contract, model(y, ς) -> x̂_0 with y = x/α and ς = σ/α, for any SDE."""
    sde = denoiser.sde

    def model(y: Tensor, ratio: Tensor) -> Tensor:
        t = sde.time(-2 * ratio.double().log()).clamp(sde.t_min, sde.t_max)
        alpha = sde.marginal(t)[0].reshape(-1, *[1] * (y.ndim - 1)).to(y.dtype)
        return denoiser(alpha * y, t).x0

    return model


class AzulaModel:
    """azula's contract, denoiser(x, t) -> mean, with a schedule of ours in it (azula's own time runs over [0, 1])."""

    def __init__(self, denoiser: S.Denoiser, times: Callable[[Tensor], Tensor]):
        self.denoiser, self.times = denoiser, times

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.denoiser.sde.marginal(self.times(t))

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(mean=self.denoiser(x, self.times(t)).x0)


def levels(sde: S.SDE, grid: str, steps: int) -> Tensor:
    """ς = σ/α over `steps` steps from t_max to t_min, float64: "karras" (ρ = 7), "log" (equal steps) or "time"."""
    grids: dict[str, S.Grid] = {"karras": S.KarrasGrid(7.0), "log": S.LogSNRGrid(), "time": S.UniformGrid()}
    return torch.exp(-0.5 * sde.log_snr(grids[grid](sde, steps)))


def k_diffusion(function: str, grid: str, calls: int = 1, noisy: bool = False, **kwargs: Any) -> Solver:
    """One of its `sample_*` functions, in y = x/α."""

    def solve(denoiser: S.Denoiser, x: Tensor, budget: int) -> Tensor:
        sde = denoiser.sde
        ends = sde.marginal(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))[0]
        noise = {"noise_sampler": lambda *_: torch.randn_like(x)} if noisy else {}
        sample = getattr(k_sampling(), function)
        sigmas = levels(sde, grid, max(budget // calls, 1))
        return ends[1] * sample(k_model(denoiser), x / ends[0], sigmas, disable=True, **noise, **kwargs)

    return solve


def k_adaptive(denoiser: S.Denoiser, x: Tensor, budget: int) -> Tensor | None:
    """Its `sample_dpm_adaptive` at the tightest tolerance that stays within the budget; None where none does."""
    sde = denoiser.sde
    first, last = levels(sde, "log", 1).tolist()
    ends = sde.marginal(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))[0]
    found = None
    for rtol in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4):
        y, info = k_sampling().sample_dpm_adaptive(
            k_model(denoiser), x / ends[0], last, first, disable=True, rtol=rtol, atol=rtol * 0.156, return_info=True
        )
        if info["nfe"] > budget:
            break
        found = ends[1] * y
    return found


def azula(sampler: str, grid: str, **kwargs: Any) -> Solver:
    """One of its samplers; `grid` is what its linear time is mapped to."""

    def solve(denoiser: S.Denoiser, x: Tensor, budget: int) -> Tensor:
        import azula.sample

        sde = denoiser.sde
        knots = levels(sde, grid, budget)

        def times(u: Tensor) -> Tensor:
            place = ((1 - u) * budget).round().long()
            return sde.time(-2 * knots.log())[place].clamp(sde.t_min, sde.t_max)

        model = AzulaModel(denoiser, times)
        return getattr(azula.sample, sampler)(model, steps=budget, silent=True, dtype=torch.float64, **kwargs)(x)

    return solve


def diffusers(scheduler: str, grid: str, **kwargs: Any) -> Solver:
    """One of its multistep schedulers, in its own variance-preserving x = y/√(1 + ς²) and told ς itself."""

    def solve(denoiser: S.Denoiser, x: Tensor, budget: int) -> Tensor:
        import diffusers

        sde = denoiser.sde
        made = getattr(diffusers, scheduler)(**{"prediction_type": "sample", **kwargs})
        made.set_timesteps(budget)
        sigmas = levels(sde, grid, budget)
        made.sigmas, made.timesteps = sigmas, torch.arange(budget)
        alphas = sde.marginal(sde.time(-2 * sigmas.log()).clamp(sde.t_min, sde.t_max))[0]
        model, y = k_model(denoiser), x / alphas[0]
        x = y / (1 + sigmas[0] ** 2).sqrt()
        for t in made.timesteps:
            root = (1 + sigmas[t] ** 2).sqrt()
            x = made.step(model(root * x, sigmas[t].expand(len(x))), t, x, return_dict=False)[0].double()
        return alphas[-1] * (1 + sigmas[-1] ** 2).sqrt() * x

    return solve
