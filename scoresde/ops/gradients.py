r"""Gradients of the ops, written with the ops, so that they can be differentiated again and draw their noise again.

Coefficients have gradients too: sums over the samples that share one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..noise.address import Noise
from ..noise.draws import normal_like
from . import library as ops


def _dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """⟨a, b⟩ in the shape of `like`, () or (B,): the gradient by c of a sum with terms c b, if a is that of the sum."""
    product = a.to(torch.promote_types(a.dtype, torch.float32)) * b
    return (product[:, None].flatten(1).sum(1) if like.ndim else product.sum()).to(like)


def _keep_lincomb(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, coefficients, std, seeds, draws, ctx.draw, ctx.row = inputs
    ctx.number = len(tensors)
    ctx.save_for_backward(*tensors, *coefficients, std, seeds, draws)


def _lincomb(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    n = ctx.number
    *saved, std, seeds, draws = ctx.saved_tensors
    tensors, coefficients = saved[:n], saved[n:]
    wanted_inputs, wanted_coefficients, wanted_std = ctx.needs_input_grad[:3]
    by_input = [
        ops.lincomb([grad], [c]) if wanted else None for c, wanted in zip(coefficients, wanted_inputs, strict=True)
    ]
    by_coefficient = [
        _dot(grad, x, c) if wanted else None
        for x, c, wanted in zip(tensors, coefficients, wanted_coefficients, strict=True)
    ]
    by_std = _dot(grad, normal_like(grad, Noise(seeds, draws, ctx.draw, ctx.row)), std) if wanted_std else None
    return by_input, by_coefficient, by_std, None, None, None, None


def _keep_langevin(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, eps, sigma, ctx.snr, ctx.measured, seeds, draws, ctx.draw, ctx.row = inputs
    ctx.save_for_backward(eps, sigma, seeds, draws)


def _langevin(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    r"""The op is x − r σ ε̂ + √(2r) σ z with r = min(1, c/(‖ε̂‖² + 64)); r reaches the loss by both coefficients."""
    eps, sigma, seeds, draws = ctx.saved_tensors
    z = normal_like(eps, Noise(seeds, draws, ctx.draw, ctx.row))
    size = z.flatten(1).square().sum(1) if ctx.measured else eps.shape[1:].numel()
    room = eps.to(z.dtype).flatten(1).square().sum(1) + 64
    free = 2 * ctx.snr**2 * (size + 64) / room
    ratio = free.clamp(max=1.0)
    per_sample = ratio.new_empty(len(eps))
    by_drift, by_noise = _dot(grad, eps, per_sample), _dot(grad, z, per_sample)
    by_sigma = -ratio * by_drift + (2 * ratio).sqrt() * by_noise
    by_room = torch.where(free < 1, (sigma * by_drift - sigma / (2 * ratio).sqrt() * by_noise) * ratio / room, 0)
    by_eps = ops.lincomb([grad, eps], [-ratio * sigma, 2 * by_room])
    return grad, by_eps, (by_sigma if sigma.ndim else by_sigma.sum()).to(sigma), *[None] * 6


def _keep_dsm_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.draw, ctx.row = inputs
    ctx.save_for_backward(*tensors)


def _dsm_loss(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    r"""∂/∂ε̂ = (2 g w/D)(ε̂ − ε), a `lincomb` with the same noise; ∂/∂ε is its negative."""
    prediction, weight, eps, seeds, draws = ctx.saved_tensors
    noise = None if eps is not None else Noise(seeds, draws, ctx.draw, ctx.row)
    _, weight_wanted, eps_wanted, *_ = ctx.needs_input_grad
    scale = 2 / max(prediction.shape[1:].numel(), 1) * grad.double() * weight
    if eps is None:
        by_prediction = ops.lincomb([prediction], [scale], -scale, noise)
    else:
        by_prediction = ops.lincomb([prediction, eps], [scale, -scale])
    by_weight = None
    if weight_wanted:
        by_weight = grad * ops.dsm_loss(prediction, torch.ones_like(weight), eps, noise)
        by_weight = (by_weight if weight.ndim else by_weight.sum()).to(weight)
    by_eps = ops.lincomb([by_prediction], [-torch.ones_like(weight)]) if eps_wanted else None
    return by_prediction, by_weight, by_eps, *[None] * 4


for _name, _backward, _keep in (
    ("lincomb", _lincomb, _keep_lincomb),
    ("langevin", _langevin, _keep_langevin),
    ("dsm_loss", _dsm_loss, _keep_dsm_loss),
):
    torch.library.register_autograd(f"scoresde::{_name}", _backward, setup_context=_keep, lib=ops.LIBRARY)
