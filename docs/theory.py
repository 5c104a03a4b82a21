"""Draws theory.png, the three pictures of theory.md, on a mixture of two Gaussians in one dimension.

python docs/theory.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scoresde import DDIM, SDE, VESDE, VPSDE, GaussianMixtureDenoiser, LogSNRGrid, RectifiedFlow, Rng, Sampler

MEANS, COVS, WEIGHTS = torch.tensor([[-1.0], [1.2]]), 0.02, torch.tensor([0.4, 0.6])
SDES: tuple[tuple[str, SDE], ...] = (("VP", VPSDE()), ("VE", VESDE(sigma_max=20.0)), ("flow", RectifiedFlow()))


def exact(sde: SDE) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(MEANS, COVS, WEIGHTS, sde)


def paths(sde: SDE, n: int) -> tuple[Tensor, Tensor]:
    """Times (steps,) and states (steps, n) of n paths of the probability-flow ODE, from noise to data."""
    times, states = [], []
    start = Rng(seeds=list(range(n))).normal((n, 1)) * sde.marginal(torch.tensor(sde.t_max))[1]
    for trace in Sampler(DDIM(), LogSNRGrid(), steps=400, denoise=False).iterate(exact(sde), start):
        times.append(float(trace.t))
        states.append(trace.x[:, 0])
    return torch.tensor(times, dtype=torch.float64), torch.stack(states)


def forward(axis: plt.Axes) -> None:
    """p(x_t) of the VP process as grey, and paths of its ODE through it."""
    sde = SDES[0][1]
    x = torch.linspace(-3, 3, 240)[:, None]
    t = torch.linspace(sde.t_min, sde.t_max, 200)
    density = torch.stack([exact(sde).log_prob(x, t=float(at)).exp() for at in t], 1)
    axis.imshow(density.clamp(max=0.8), origin="lower", aspect="auto", extent=(0, 1, -3, 3), cmap="Greys")
    times, states = paths(sde, 8)
    axis.plot(times, states, lw=1)
    axis.set(xlabel="t", ylabel="$x_t$", xlim=(0, 1), ylim=(-3, 3), title="From data to noise, and back by the ODE")


def pair(axis: plt.Axes) -> None:
    """What a network says is one line in the plane of (x_0, ε), and x_t another: they cross in the estimate."""
    alpha, sigma, at, eps = 0.8, 0.6, 1.2, 0.5
    x0 = torch.linspace(-1, 3, 2)
    seen = alpha * at + sigma * eps
    axis.plot(x0, (seen - alpha * x0) / sigma, "k", label="the input: $\\alpha x_0 + \\sigma\\varepsilon = x_t$")
    outputs = (("$\\varepsilon$", 0.0, 1.0), ("$v$", -sigma, alpha), ("flow", -1.0, 1.0))
    for name, p, q in outputs:
        axis.plot(x0, (p * at + q * eps - p * x0) / q, "--", lw=1, label=f"an output that means {name}")
    axis.axvline(at, ls=":", lw=1, color="grey", label="an output that means $x_0$")
    axis.plot(at, eps, "ko")
    axis.annotate("$(\\hat x_0, \\hat\\varepsilon)$", (at, eps), (-58, 6), textcoords="offset points")
    axis.set(
        xlabel="$x_0$",
        ylabel="$\\varepsilon$",
        xlim=(-0.5, 2.5),
        ylim=(-1, 2.5),
        title="One pair, whatever is predicted",
    )
    axis.legend(fontsize=7, loc="upper right", framealpha=1)


def one_ode(axis: plt.Axes) -> None:
    """y = x/α over the noise level σ/α: paths of three processes lie on each other."""
    for (name, sde), style in zip(SDES, ("-", "--", ":"), strict=True):
        times, states = paths(sde, 6)
        alpha, sigma = sde.marginal(times)
        seen = (sigma / alpha > 0.02) & (sigma / alpha < 8)
        start = states[seen] / alpha[seen, None]
        axis.plot((sigma / alpha)[seen], start, style, lw=1.5, color={"-": "C0", "--": "C1", ":": "k"}[style])
        axis.plot([], [], style, color={"-": "C0", "--": "C1", ":": "k"}[style], label=name)
    axis.set(
        xscale="log",
        xlabel="$\\sigma/\\alpha$",
        ylabel="$x_t/\\alpha$",
        ylim=(-6, 6),
        title="One ODE for every process",
    )
    axis.legend(fontsize=8)


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for draw, axis in zip((forward, pair, one_ode), axes, strict=True):
        draw(axis)
    figure.savefig(Path(__file__).with_name("theory.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
