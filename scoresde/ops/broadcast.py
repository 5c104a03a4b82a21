"""Where a value per sample meets a tensor of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def host(values: float | Sequence[Any]) -> Tensor:
    """`values` in float64 on the CPU, whatever torch's default device is: times, and what is computed of them alone."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def as_double(values: Tensor | float | Sequence[Any]) -> Tensor:
    """`values` in float64: a tensor where it lies, other numbers on the CPU."""
    return values.double() if isinstance(values, Tensor) else host(values)


def samples(x: Tensor, name: str) -> Tensor:
    """`x` (B, *event) as noise can be added to it: in floating point of 32 bits or more, and open to autograd.

    What narrower types round off would be visible beside small noise. Only the type is looked at, so it costs nothing.

    Raises:
        TypeError: no tensor, or one of integers, truth values or complex numbers.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a tensor (B, *event); got {type(x).__name__}. torch.as_tensor({name}) makes one.")
    if not x.is_floating_point():
        cure = "scale them: x.float() / 127.5 - 1 for 8-bit pictures, or Scaling(levels=256).encode(x)"
        if x.is_complex():
            cure = "give both parts as real numbers: torch.view_as_real(x)"
        raise TypeError(f"{name} holds {x.dtype}, and noise is added to real numbers; {cure}.")
    return plain(x if x.dtype in (torch.float32, torch.float64) else x.float())


def plain(x: Tensor) -> Tensor:
    """`x`, or a copy of it where it was made under `torch.inference_mode` and autograd will have to keep it."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


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
        TypeError: `t` holds integers (a step index is not a time), or `like` holds no real numbers.
        ValueError: `t` is the number NaN.
    """
    if not like.is_floating_point():
        samples(like, "x_t")  # which says what to do
    if not isinstance(t, Tensor):
        if math.isnan(t):
            raise ValueError("t is a time; got nan.")
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
    return beside(value.to(torch.promote_types(like.dtype, torch.float32)), like).expand(like.shape[0])
