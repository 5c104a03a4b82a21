"""Where a value per sample meets a tensor of samples."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_as_batch(value: Tensor, like: Tensor) -> Tensor:
    """View `value` of shape () or (B,) so that it broadcasts against `like` of shape (B, *event).

    Raises:
        ValueError: `value` is neither a scalar nor one number per sample of `like`.
    """
    if value.ndim == 0:
        return value
    if value.ndim != 1 or like.ndim == 0 or value.shape[0] != like.shape[0]:
        raise ValueError(
            f"Expected a scalar or one value per sample: shape () or ({like.shape[0] if like.ndim else ''},) "
            f"for a batch of shape {tuple(like.shape)}; got shape {tuple(value.shape)}."
        )
    return value.reshape(-1, *[1] * (like.ndim - 1))


def coefficient(value: Tensor, like: Tensor) -> Tensor:
    """`value` (() or (B,)), computed in any precision, in the dtype of `like` (float32 for half types) and expanded."""
    return expand_as_batch(value.to(torch.promote_types(like.dtype, torch.float32)), like)


def as_time(t: Tensor | float, like: Tensor) -> Tensor:
    """`t` as a real tensor on the device of `like`: float64 for Python numbers, float32 or wider otherwise.

    Times stay out of half precision, which cannot tell neighbouring steps apart, and are never integers. A time () that
    lies on the CPU stays there: what is computed of it is a number, which kernels on any device take as it is, where
    on a GPU it would be dozens of kernels for one number each.

    Raises:
        TypeError: `t` holds integers (a step index is not a time).
    """
    if not isinstance(t, Tensor):
        return torch.tensor(float(t), dtype=torch.float64, device=like.device)
    if not t.is_floating_point():
        raise TypeError(
            f"t is a continuous time, a floating-point tensor; got dtype {t.dtype}. "
            "A network that wants step indices gets them through Preconditioned(noise_input=…)."
        )
    if t.dtype in (torch.float16, torch.bfloat16):
        t = t.float()
    return t if t.ndim == 0 and t.device.type == "cpu" else t.to(like.device)


def beside(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`; a number by a fill, as a copy would wait and a CUDA graph may not contain it."""
    if value.ndim == 0 and value.device != like.device:
        return torch.empty_like(value, device=like.device).fill_(value)
    return value.to(like.device)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """`value` (() or (B,)), computed in any precision, as networks want it: (B,) beside `like`, in its dtype, for half
    types float32."""
    return beside(value.to(torch.promote_types(like.dtype, torch.float32)), like).expand(len(like))
