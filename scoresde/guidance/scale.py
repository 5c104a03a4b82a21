"""How strong a guide is: a number, or a function of the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Scale = float | Callable[[Tensor], Tensor]
"""A strength: a number, or a function of the log-SNR λ () or (B,) of the same shape."""


def checked(scale: Scale) -> Scale:
    if callable(scale):
        return scale
    if (isinstance(scale, Tensor) and scale.ndim) or not math.isfinite(scale):
        raise ValueError(f"A guidance scale is a finite number or a function of log-SNR; got {scale}.")
    return float(scale)


def strength(scale: Scale, log_snr: Tensor) -> Tensor:
    """The scale at λ () or (B,), of the same shape."""
    if callable(scale):
        return torch.as_tensor(scale(log_snr), dtype=log_snr.dtype, device=log_snr.device).expand_as(log_snr)
    return torch.full_like(log_snr, scale)


def number(weight: Tensor) -> float | None:
    """One weight for all samples, if it can be read without waiting for a device or breaking a compiled graph."""
    known = weight.ndim == 0 and weight.device.type == "cpu" and not torch.compiler.is_compiling()
    return float(weight) if known else None
