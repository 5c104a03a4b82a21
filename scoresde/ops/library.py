r"""The fused ops of `torch.ops.scoresde`: their schemas, and their shapes for `torch.compile`.

They are the formulas of `reference` here; on a GPU, kernels may be registered in their place. Noise is given by its
address, so the backward pass makes it again and it is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise.address import Noise
from ..noise.draws import ADDRESS, normal_like
from . import reference

_OPS = torch.ops.scoresde


def lincomb(
    inputs: Sequence[Tensor], coefficients: Sequence[Tensor], std: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Σ c_i x_i + std z of one to five tensors of one shape (B, *event) and dtype."""
    return _OPS.lincomb(inputs, coefficients, std, *_flat(noise))


def langevin(x: Tensor, eps: Tensor, sigma: Tensor, snr: float, measured: bool, noise: Noise) -> Tensor:
    """`reference.langevin` with z drawn from `noise`."""
    return _OPS.langevin(x, eps, sigma, snr, measured, *noise)


def dsm_loss(prediction: Tensor, weight: Tensor, eps: Tensor | None, noise: Noise | None) -> Tensor:
    """(B,) w ‖ε̂ − ε‖²/D, ε given or drawn."""
    return _OPS.dsm_loss(prediction, weight, eps, *_flat(noise))


def _flat(noise: Noise | None) -> tuple[Any, ...]:
    return (None, None, 0, 0) if noise is None else noise


def torch_lincomb(inputs: list[Tensor], coefficients: list[Tensor], std: Tensor | None, *address: Any) -> Tensor:
    terms = tuple(zip(coefficients, inputs, strict=True))
    return reference.lincomb(terms, None if std is None else (std, normal_like(inputs[0], Noise(*address))))


def torch_langevin(x: Tensor, eps: Tensor, sigma: Tensor, snr: float, measured: bool, *address: Any) -> Tensor:
    return reference.langevin(x, eps, normal_like(x, Noise(*address)), sigma, snr, measured)


def torch_dsm_loss(prediction: Tensor, weight: Tensor, eps: Tensor | None, *address: Any) -> Tensor:
    eps = normal_like(prediction, Noise(*address)) if eps is None else eps
    return reference.dsm_loss(prediction, eps, weight)


def _like_the_first(x: Tensor | list[Tensor], *_: Any) -> Tensor:
    return torch.empty_like(x if isinstance(x, Tensor) else x[0])


def _one_per_sample(prediction: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=torch.promote_types(prediction.dtype, torch.float32))


LIBRARY: torch.library.Library = torch.library.Library("scoresde", "FRAGMENT")
_OR_NONE = ADDRESS.replace("Tensor ", "Tensor? ")

for _schema, _in_torch, _shape in (
    (
        f"lincomb(Tensor[] inputs, Tensor[] coefficients, Tensor? std, {_OR_NONE}) -> Tensor",
        torch_lincomb,
        _like_the_first,
    ),
    (
        f"langevin(Tensor x, Tensor eps, Tensor sigma, float snr, bool measured, {ADDRESS}) -> Tensor",
        torch_langevin,
        _like_the_first,
    ),
    (
        f"dsm_loss(Tensor prediction, Tensor weight, Tensor? eps, {_OR_NONE}) -> Tensor",
        torch_dsm_loss,
        _one_per_sample,
    ),
):
    _name = LIBRARY.define(_schema)
    LIBRARY.impl(_name, _in_torch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scoresde::{_name}", _shape, lib=LIBRARY)
