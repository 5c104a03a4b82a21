r"""The arithmetic of samplers and losses: a few ops that are one pass over memory on a GPU, and plain torch elsewhere.

    from scoresde import ops

    x = ops.lincomb(((1 - a, x), (b, score)), (std, rng.noise(x)))

On CUDA, noise is made inside the kernel and never stored. Nothing is compiled, loaded or looked up before the first
tensor on a GPU; `python -m scoresde.kernels` shows what this machine has. `SCORESDE_KERNELS` or `use` choose between
"auto", "off" and "require".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise.address import Noise
from ..noise.draws import normal_like
from ..noise.switch import enabled, mode, use, why_not
from . import gradients as gradients  # so that the ops can be differentiated
from . import library as ops
from . import reference
from .broadcast import host
from .reference import Coefficient

__all__ = [
    "Coefficient",
    "Noise",
    "dsm_loss",
    "enabled",
    "langevin",
    "lincomb",
    "mode",
    "use",
    "why_not",
]

_MOST = 5
"""Most tensors that a kernel reads at once."""


def lincomb(
    terms: Sequence[tuple[Coefficient, Tensor]], noise: tuple[Coefficient, Tensor | Noise] | None = None
) -> Tensor:
    r"""Σ c_i x_i + std z: every update of a sampler, and the perturbation x_t = α x_0 + σ ε.

    Args:
        terms: pairs of a coefficient, a number or a tensor () or (B,), and a tensor (B, *event).
        noise: (std, z): z from `Rng.noise`, or any tensor of the shape of the sum. None: no noise.

    Returns:
        The sum, (B, *event), in the common dtype of the x_i; half types are added up in float32 and rounded once.
    """
    like = terms[0][1]
    if not enabled(like.device, like.dtype):
        return reference.lincomb(terms, noise if noise is None else (noise[0], _tensor(noise[1], like)))
    dtype = like.dtype
    for _, x in terms[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    inputs, factors = [x.to(dtype) for _, x in terms], [_factor(c, like) for c, _ in terms]
    std, drawn = None, None
    if noise is not None:
        eps, drawn = _either(noise[1], like)
        std = _factor(noise[0], like)
        if eps is not None:
            inputs, factors, std = [*inputs, eps.to(dtype)], [*factors, std], None
    while len(inputs) > _MOST:
        inputs, factors = (
            [ops.lincomb(inputs[:_MOST], factors[:_MOST]), *inputs[_MOST:]],
            [_factor(1.0, like), *factors[_MOST:]],
        )
    return ops.lincomb(inputs, factors, std, drawn)


def langevin(
    x: Tensor, eps: Tensor, sigma: Tensor, snr: float, noise: Tensor | Noise, *, measured: bool = False
) -> Tensor:
    r"""The Langevin corrector x + h score + √(2h) z with score = −ε̂/σ.

    Every sample has its step `h = σ² min(1, 2 snr² (N + 64)/(‖ε̂‖² + 64))`, where N is its number of dimensions D, or
    ‖z‖² if `measured`.

    Args:
        x, eps: x_t and ε̂, (B, *event).
        sigma: σ_t, () or (B,).
        snr: > 0.
        noise: z from `Rng.noise`, or a tensor (B, *event).
        measured: take ‖z‖² of the noise itself, as Song et al. 2021, alg. 4, do for the batch.
    """
    if not enabled(x.device, x.dtype) or isinstance(noise, Tensor):
        return reference.langevin(x, eps, _tensor(noise, x), sigma, snr, measured)
    return ops.langevin(x, eps.to(x.dtype), _factor(sigma, x), snr, measured, noise)


def dsm_loss(prediction: Tensor, noise: Tensor | Noise, weight: Tensor) -> Tensor:
    r"""Denoising score matching, w ‖ε̂ − ε‖²/D of every sample.

    `noise` is that of x_t: on CUDA it is made again here and in the backward pass, so that it need not be kept.

    Args:
        prediction: ε̂, (B, *event).
        noise: ε from `Rng.noise`, or a tensor (B, *event).
        weight: w, () or (B,).

    Returns:
        (B,), in float32 or wider.
    """
    if not enabled(prediction.device, prediction.dtype):
        return reference.dsm_loss(prediction, _tensor(noise, prediction), weight)
    eps, found = _either(noise, prediction)
    return ops.dsm_loss(prediction, _factor(weight, prediction), eps, found)


def _either(noise: Tensor | Noise, like: Tensor) -> tuple[Tensor | None, Noise | None]:
    """Noise as (numbers, None) or as (None, their address)."""
    return (noise.to(like.dtype), None) if isinstance(noise, Tensor) else (None, noise)


def _tensor(noise: Tensor | Noise, like: Tensor) -> Tensor:
    return noise if isinstance(noise, Tensor) else normal_like(like, noise)


def _factor(value: Coefficient, like: Tensor) -> Tensor:
    """`value` on the device, or as a number on the CPU, which is an argument of the launch and needs no copy."""
    if not isinstance(value, Tensor):
        return host(value)
    return value if value.ndim == 0 and value.device.type == "cpu" else value.to(like.device)
