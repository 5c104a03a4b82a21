"""The second half of `kernels.py`: a whole predictor–corrector sampler, by the peers' loop, by ours, by one graph.

With a small network, where launches and updates are what a step costs, and with a U-Net, where they are next to
nothing: the share of the updates is what a network that costs nothing leaves over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import scoresde as S
from scoresde.nn import UNet

SNR = 0.16


class Small(nn.Module):
    """3-128-128-2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None]], 1))


class Still(S.Denoiser):
    """Predicts the same two tensors everywhere."""

    def __init__(self, x: Tensor):
        super().__init__(S.VPSDE())
        self.register_buffer("x0", torch.randn_like(x))
        self.register_buffer("eps", torch.randn_like(x))

    x0: Tensor
    eps: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: S.Cond = None) -> S.Prediction:
        return S.Prediction(self.x0, self.eps, self.sde.at(t, x))


@torch.no_grad()
def by_hand(denoiser: S.Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Song et al.'s predictor and corrector as written in their code, with noise from torch's generator."""
    sde, ones = denoiser.sde, [1] * (x.ndim - 1)
    for t, s in pairwise(times.unbind()):
        sigma = sde.marginal(t)[1]
        score, noise = denoiser(x, t).score, torch.randn_like(x)
        ratio = SNR * noise.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
        step = (2 * ratio**2).clamp(max=float(sigma**2)).view(-1, *ones)
        x = x + step * score
        x = x + torch.sqrt(2 * step) * noise
        scale, std = (float(value) for value in sde.transition(s, t))
        x_mean = (2 - scale) * x + std**2 * denoiser(x, t).score
        x = x_mean + std * torch.randn_like(x)
    return denoiser(x, times[-1]).x0


def samplers(
    cfg: Any, results: Any, device: torch.device, table: Callable[[Sequence[Sequence[str]]], str]
) -> list[str]:
    gpu = device.type == "cuda"
    small_batch, unet_batch = cfg.batch_size or ((4096, 64) if gpu else (64, 2))
    torch.manual_seed(0)
    small = S.Preconditioned(Small(), S.VPSDE(), S.EDM()).to(device).eval()
    unet = S.Preconditioned(UNet((3, 32, 32), attention=(16,)), S.VPSDE(), S.EDM()).to(device).eval()
    cases = (
        ("MLP 3-128-128-2", small, (small_batch, 2), cfg.steps or (1000 if gpu else 20)),
        ("U-Net 3x32x32", unet, (unet_batch, 3, 32, 32), cfg.unet_steps or (50 if gpu else 2)),
    )
    lines = [["sampler", "loop", "ms", "× eager loop", "share of the updates"]]
    goals = []
    for title, denoiser, shape, steps in cases:
        step = S.PredictorCorrector(S.ReverseDiffusion(), S.Langevin(SNR))
        sampler = S.Sampler(step, steps=steps)
        x, still = denoiser.prior_sample(shape, rng=S.Rng(0), device=device), None
        still = Still(x).to(device)
        grid = sampler.times(denoiser)
        name = "kernels" if gpu else "reference"
        loops: dict[str, Callable[[], Any]] = {
            "eager loop, as the peers write it": lambda d=denoiser, x=x, g=grid: by_hand(d, x, g),
            f"ours, {name}": lambda d=denoiser, x=x, s=sampler: s(d, x, rng=S.Rng(0)),
        }
        updates = {f"ours, {name}": lambda d=still, x=x, s=sampler: s(d, x, rng=S.Rng(0))}
        if gpu:
            captured = S.Sampler(step, steps=steps, cuda_graph=True)
            loops["ours, one CUDA graph"] = lambda d=denoiser, x=x, s=captured: s(d, x, rng=S.Rng(0))
            updates["ours, one CUDA graph"] = lambda d=still, x=x, s=captured: s(d, x, rng=S.Rng(0))
        whole, alone = in_turns(loops, cfg.repeats, device), in_turns(updates, cfg.repeats, device)
        first = next(iter(whole.values()))
        for loop, milliseconds in whole.items():
            share = f"{alone[loop] / milliseconds:.1%}" if loop in alone else ""
            lines.append(
                [
                    f"{title}, {steps} steps, {shape[0]} samples",
                    loop,
                    f"{milliseconds:.4g}",
                    f"{first / milliseconds:.2f}",
                    share,
                ]
            )
            results.add(
                f"sampler/{title}/{loop}",
                milliseconds,
                op="sampler",
                dtype="float32",
                elements=x.numel(),
                column=loop,
                network=title,
                steps=steps,
                updates=alone.get(loop),
                unit="ms",
            )
            print(" | ".join(lines[-1]), flush=True)
        if gpu and denoiser is small and steps >= 1000:
            speed = first / whole["ours, one CUDA graph"]
            goals.append(
                f"- {steps} steps on a small network in a CUDA graph, 5× the eager loop: {speed:.2f}×, "
                + ("reached." if speed >= 5 else "**missed**; the graph's share of updates above says what is left.")
            )
    text = (
        f"Predictor–corrector (reverse diffusion, Langevin), wall time, median of {cfg.repeats} in turns. "
        "`share of the updates`: the same loop around a network that costs nothing."
    )
    return [text, table(lines), *(["\n".join(goals)] if goals else [])]


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median wall time in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):  # the first compiles and captures
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}
