"""What is measured of an autoencoder: the bound on the likelihood that it is, and a picture of what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset
from ..diffusion.denoiser import model_device
from ..likelihood.ode import bits_per_dim
from ..losses.loss import Loss
from ..metrics.jackknife import mean_score
from ..noise.rng import Rng
from ..runs.folder import finish
from ..runs.logger import Logger
from ..runs.progress import doing, track
from ..runs.publish import publish
from . import figures
from .evaluation import evenly_spaced
from .report import Evaluation

_AT_ONCE = 256


@torch.no_grad()
def reconstructed(
    loss: Loss, dataset: Dataset, evaluation: Evaluation, seed: int, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Measures −ELBO under N(0, I) in bits/dim of raw data on held-out samples, one draw of z for each; draws
    `reconstructions.png`; writes `summary.md` and at last `summary.json`. Returns what that holds.
    """
    index, network, device = (
        evenly_spaced(len(dataset.test), evaluation.points),
        loss.denoiser.network,
        model_device(loss.denoiser),
    )
    bits, count, parts = [], 0, index.split(_AT_ONCE)
    squares: Any = 0.0
    for part in track(parts, "bits/dim, batches", len(parts)):
        raw = dataset.test.raw[part].to(device)
        x = dataset.encode(raw)
        mean, std = network.encode(x)
        z = mean + std * Rng(seeds=[seed * len(dataset.test) + i for i in part.tolist()]).normal_like(mean)
        kl = (0.5 * (mean.square() + std.square() - 1) - std.log()).flatten(1).double().sum(1)
        log_prob = network.log_prob(x, z).double() - kl
        volume = dataset.codec.log_volume(raw, x) if network.levels is None else 0.0
        bits.append(bits_per_dim(log_prob, dataset.raw_shape, log_volume=volume).cpu())
        squares = squares + (mean.square() + std.square()).double().transpose(0, 1).flatten(1).sum(1).cpu()
        count += mean[:, 0].numel()
    found = mean_score(torch.cat(bits))
    spread = (squares / count).sqrt().tolist()
    shape, n = tuple(network.latent_shape), len(index)
    note = (
        f"bits/dim: {found.value:.4f} ± {found.stderr:.4f} on {n} held-out points: -ELBO under z ~ N(0, I), a bound. "
        f"Latents {shape}, {math.prod(dataset.raw_shape) / math.prod(shape):.3g} times fewer numbers than raw samples, "
        f"of root mean squares {', '.join(f'{each:.3g}' for each in spread[:8])}."
    )
    publish(folder / "summary.md", f"{note}\n")
    if evaluation.pictures:
        with doing("a picture"):
            raw = dataset.test.raw[evenly_spaced(len(dataset.test), min(evaluation.samples, len(dataset.test)))]
            back = dataset.decode(network.decode(network.encode(dataset.encode(raw.to(device)))[0]).cpu())
            figures.sample_grid(back, raw, folder / "reconstructions.png", title="decoded", beside="given")
    bound = {"mean": found.value, "stderr": found.stderr, "points": n, "estimator": "bpd/vae"}
    summary = {**facts, "bits_per_dim": bound, "latent_shape": list(shape), "latent_rms": spread}
    finish(folder / "summary.json", summary)
    print(f"\n{note}", flush=True)
    return summary


def logged(logger: Logger, summary: Mapping[str, Any], folder: Path, *, pictures: bool) -> None:
    """What `reconstructed` found, in the logs."""
    at, bits = {name: summary[name] for name in ("step", "images")}, summary["bits_per_dim"]
    logger.log({"eval/bpd/vae": bits["mean"], "eval/bpd_stderr": bits["stderr"], "final": 1}, **at)
    if pictures:
        logger.image("eval/reconstructions", folder / "reconstructions.png", **at)
