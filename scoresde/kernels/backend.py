"""The kernels as torch's ops: registered for tensors on CUDA devices when this module is loaded.

What a kernel does not take (other dtypes, shapes that broadcast), and everything while kernels are off, is computed as
on any other device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import draws
from ..noise.address import Noise
from ..noise.switch import enabled
from ..ops import library
from . import cuda
from .driver import SCALARS, driver

CAPABILITY = (8, 0)  # the first with bfloat16 arithmetic, and the oldest that tests compile for


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this dtype on this CUDA device cannot have kernels. None: they can, and the kernels are loaded."""
    if dtype not in SCALARS:
        return f"they take {', '.join(str(known) for known in SCALARS)}"
    if torch.version.hip is not None:
        return f"this torch ({torch.__version__}) is built for ROCm"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    count = torch.cuda.device_count()
    if not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "torch sees no GPU" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})")
    if (device.index or 0) >= count:
        return f"torch sees {count} GPUs, the first of which is cuda:0"
    try:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            name, needed = torch.cuda.get_device_name(device), ".".join(map(str, CAPABILITY))
            return f"{name} has compute capability {'.'.join(map(str, capability))}, and they need {needed}"
        driver().prepare(SCALARS[dtype], device)
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _lincomb(inputs: list[Tensor], coefficients: list[Tensor], std: Tensor | None, *address: Any) -> Tensor:
    if not _fit(*inputs):
        return library.torch_lincomb(inputs, coefficients, std, *address)
    inputs = _alike(*inputs)
    out = torch.empty_like(inputs[0])
    noise, std = (None, None) if std is None else (Noise(*address), std.double())
    cuda.lincomb(driver().launch, out, inputs, [c.double() for c in coefficients], std, noise)
    return out


def _langevin(x: Tensor, eps: Tensor, sigma: Tensor, snr: float, measured: bool, *address: Any) -> Tensor:
    if not _fit(x, eps):
        return library.torch_langevin(x, eps, sigma, snr, measured, *address)
    x, eps = _alike(x, eps)
    out = torch.empty_like(x)
    cuda.langevin(driver().launch, out, x, eps, sigma.double(), snr, Noise(*address), measured)
    return out


def _dsm_loss(prediction: Tensor, weight: Tensor, eps: Tensor | None, *address: Any) -> Tensor:
    given = () if eps is None else (eps,)
    if not _fit(prediction, *given):
        return library.torch_dsm_loss(prediction, weight, eps, *address)
    prediction, *rest = _alike(prediction, *given)
    loss = prediction.new_empty(len(prediction), dtype=torch.promote_types(prediction.dtype, torch.float32))
    cuda.dsm_loss(driver().launch, loss, prediction, weight.double(), rest[0] if rest else Noise(*address))
    return loss


def _normal(shape: Sequence[int], dtype: torch.dtype, *address: Any) -> Tensor:
    noise = Noise(*address)
    if not enabled(noise.seeds.device, dtype):
        return draws.numpy_normal(shape, dtype, *address)
    out = torch.empty(tuple(shape), dtype=dtype, device=noise.seeds.device)
    cuda.lincomb(driver().launch, out if out.ndim else out[None], [], [], None, noise)
    return out


def _rademacher(shape: Sequence[int], dtype: torch.dtype, *address: Any) -> Tensor:
    noise = Noise(*address)
    if not enabled(noise.seeds.device, dtype):
        return draws.numpy_rademacher(shape, dtype, *address)
    out = torch.empty(tuple(shape), dtype=dtype, device=noise.seeds.device)
    cuda.rademacher(driver().launch, out if out.ndim else out[None], noise)
    return out


def _fit(x: Tensor, *others: Tensor) -> bool:
    return enabled(x.device, x.dtype) and all(other.shape == x.shape and other.dtype == x.dtype for other in others)


def _alike(x: Tensor, *others: Tensor) -> list[Tensor]:
    """All in the memory format of the first: contiguous, or channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    kept = not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return [each.contiguous(memory_format=last if kept else torch.contiguous_format) for each in (x, *others)]


LIBRARY = torch.library.Library("scoresde", "IMPL", "CUDA")

for _name, _kernel in (
    ("lincomb", _lincomb),
    ("langevin", _langevin),
    ("dsm_loss", _dsm_loss),
    ("normal", _normal),
    ("rademacher", _rademacher),
):
    LIBRARY.impl(_name, _kernel)
